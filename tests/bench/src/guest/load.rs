//! A light load: one request at a time, a new one a millisecond after the last was done, and the longest that one took.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use workload::stall::StallMeter;

/// Between two requests.
const BETWEEN: Duration = Duration::from_millis(1);

/// A running load.
pub struct Load {
    meter: Arc<StallMeter>,
    done: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Runs `request` again and again on a thread of its own.
    ///
    /// # Errors
    /// No thread can be made.
    pub fn start(mut request: impl FnMut() -> Result<()> + Send + 'static) -> Result<Load> {
        let meter = Arc::new(StallMeter::new(1));
        let (done, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let shared = (meter.clone(), done.clone(), failed.clone(), stop.clone());
        let thread = thread::Builder::new().name("load".into()).spawn(move || {
            let (meter, done, failed, stop) = shared;
            while !stop.load(Ordering::Relaxed) {
                match meter.measure(0, &mut request) {
                    Ok(()) => done.fetch_add(1, Ordering::Relaxed),
                    Err(error) => {
                        tracing::error!("a request of the load failed: {error:#}");
                        failed.fetch_add(1, Ordering::Relaxed)
                    }
                };
                thread::sleep(BETWEEN);
            }
        })?;
        Ok(Load { meter, done, failed, stop, thread: Some(thread) })
    }

    /// The longest since the last call, requests done, requests failed.
    ///
    /// # Errors
    /// A request failed: no pause may do that.
    pub fn longest(&self) -> Result<Value> {
        let failed = self.failed.load(Ordering::Relaxed);
        anyhow::ensure!(failed == 0, "{failed} requests failed");
        let ms = self.meter.take().as_secs_f64() * 1e3;
        Ok(json!({"ms": ms, "done": self.done.load(Ordering::Relaxed)}))
    }

    /// Ends it.
    ///
    /// # Errors
    /// The thread panicked.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("running")?;
        thread.join().map_err(|_| anyhow::anyhow!("the load panicked"))
    }
}

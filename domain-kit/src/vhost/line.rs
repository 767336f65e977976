//! The line to a frontend: dialled again whenever it hung up.

use std::fmt::Display;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::hypercall::Hypercall;

/// Between two attempts to reach the frontend.
const REDIAL: Duration = Duration::from_millis(100);

/// What the thread that talks on the line and those that end it share.
#[derive(Debug, Default)]
pub struct Line {
    ended: AtomicBool,
    /// The conversation, to be hung up.
    stream: Mutex<Option<UnixStream>>,
}

impl Line {
    /// Hangs up for good: [`Line::keep`] returns.
    pub fn end(&self) {
        self.ended.store(true, Relaxed);
        if let Some(stream) = &*self.stream.lock().unwrap_or_else(PoisonError::into_inner) {
            let _gone_already = stream.shutdown(Shutdown::Both);
        }
    }

    /// Dials by the approved resource and calls `talk` for each connection, until the line is ended. `device` is for the log.
    pub fn keep(
        &self,
        hv: &Hypercall,
        resource: &str,
        device: impl Display,
        mut talk: impl FnMut(UnixStream) -> Result<(), String>,
    ) {
        let mut complained = false;
        while !self.ended.load(Relaxed) {
            let stream = match hv.resource_open(resource) {
                Ok((_, fd)) => UnixStream::from(fd),
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        tracing::warn!(%device, %error, "the frontend cannot be reached; tried again");
                    }
                    std::thread::sleep(REDIAL);
                    continue;
                }
            };
            complained = false;
            self.set(stream.try_clone().ok());
            // Who ended it meanwhile had nothing to hang up.
            if self.ended.load(Relaxed) {
                break;
            }
            let result = talk(stream);
            self.set(None);
            match result {
                Ok(()) => tracing::info!(%device, "the frontend hung up"),
                Err(error) => {
                    tracing::error!(%device, error, "vhost-user");
                    std::thread::sleep(REDIAL);
                }
            }
        }
    }

    fn set(&self, stream: Option<UnixStream>) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}

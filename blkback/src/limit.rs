//! Limits of a device: requests and bytes per second, with bursts, changeable while it runs.
//!
//! Two buckets, shared by all rings of the device. A bucket fills at its rate up to its burst; a request passes while there is
//! something in the bucket and takes its whole cost, so that one larger than the burst passes too and is paid for afterwards.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a device may do; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests a second.
    pub iops: u64,
    /// Requests at once after a rest; 0: a tenth of a second's.
    pub iops_burst: u64,
    /// Bytes a second.
    pub bytes: u64,
    /// Bytes at once after a rest; 0: a tenth of a second's.
    pub bytes_burst: u64,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: f64,
    burst: f64,
    /// Negative: what was taken ahead.
    level: f64,
}

impl Bucket {
    fn new(rate: u64, burst: u64) -> Option<Bucket> {
        let (rate, burst) = (rate as f64, burst as f64);
        let burst = if burst > 0.0 { burst } else { (rate / 10.0).max(1.0) };
        (rate > 0.0).then_some(Bucket { rate, burst, level: burst })
    }

    fn fill(&mut self, passed: Duration) {
        self.level = (self.level + self.rate * passed.as_secs_f64()).min(self.burst);
    }

    /// How long until something passes.
    fn wait(&self) -> Duration {
        if self.level > 0.0 {
            Duration::ZERO
        } else {
            Duration::from_secs_f64((1e-6 + (-self.level + 1e-3) / self.rate).min(3600.0))
        }
    }
}

#[derive(Debug)]
struct State {
    limits: Limits,
    iops: Option<Bucket>,
    bytes: Option<Bucket>,
    filled: Instant,
}

/// See the module.
#[derive(Debug)]
pub struct Limiter {
    /// Whether there is any limit: without, no lock is taken.
    active: AtomicBool,
    state: Mutex<State>,
}

impl Default for Limiter {
    fn default() -> Self {
        let state = State { limits: Limits::default(), iops: None, bytes: None, filled: Instant::now() };
        Limiter { active: false.into(), state: Mutex::new(state) }
    }
}

impl Limiter {
    /// Changes the limits, from the next request on; true if they were others.
    pub fn set(&self, limits: Limits) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.limits == limits {
            return false;
        }
        *state = State {
            limits,
            iops: Bucket::new(limits.iops, limits.iops_burst),
            bytes: Bucket::new(limits.bytes, limits.bytes_burst),
            filled: Instant::now(),
        };
        self.active.store(state.iops.is_some() || state.bytes.is_some(), Relaxed);
        true
    }

    /// The limits.
    pub fn get(&self) -> Limits {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).limits
    }

    /// Lets a request of `bytes` pass.
    ///
    /// # Errors
    /// How long to wait before asking again; nothing is taken then.
    pub fn pass(&self, now: Instant, bytes: u64) -> Result<(), Duration> {
        if !self.active.load(Relaxed) {
            return Ok(());
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(state.filled);
        state.filled = state.filled.max(now);
        let State { iops, bytes: rate, .. } = &mut *state;
        let mut wait = Duration::ZERO;
        for bucket in [&mut *iops, &mut *rate].into_iter().flatten() {
            bucket.fill(passed);
            wait = wait.max(bucket.wait());
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        if let Some(bucket) = iops {
            bucket.level -= 1.0;
        }
        if let Some(bucket) = rate {
            bucket.level -= bytes as f64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests that pass in `seconds`, asked as often as allowed.
    fn passed(limiter: &Limiter, from: Instant, seconds: f64, bytes: u64) -> u64 {
        let end = from + Duration::from_secs_f64(seconds);
        let (mut now, mut count) = (from, 0);
        while now < end {
            match limiter.pass(now, bytes) {
                Ok(()) => count += 1,
                Err(wait) => now += wait,
            }
        }
        count
    }

    #[test]
    fn rate_and_burst() {
        let limiter = Limiter::default();
        let start = Instant::now();
        assert!(limiter.set(Limits { iops: 100, iops_burst: 20, ..Limits::default() }));
        assert!(!limiter.set(Limits { iops: 100, iops_burst: 20, ..Limits::default() }), "no change");
        let count = passed(&limiter, start, 10.0, 4096);
        assert!((1015..=1025).contains(&count), "{count}");
    }

    #[test]
    fn bytes_and_requests_larger_than_the_burst() {
        let limiter = Limiter::default();
        let start = Instant::now();
        limiter.set(Limits { bytes: 1 << 20, bytes_burst: 4096, ..Limits::default() });
        let count = passed(&limiter, start, 10.0, 256 << 10);
        assert!((39..=42).contains(&count), "{count}");
    }

    #[test]
    fn no_limit_and_changes_at_run_time() {
        let limiter = Limiter::default();
        assert!((0..100_000).all(|_| limiter.pass(Instant::now(), 1 << 20).is_ok()));
        limiter.set(Limits { iops: 1, ..Limits::default() });
        let now = Instant::now();
        assert!(limiter.pass(now, 1).is_ok() && limiter.pass(now, 1).is_err());
        limiter.set(Limits::default());
        assert!(limiter.pass(now, 1).is_ok());
    }
}

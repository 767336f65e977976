//! The longest pause as the load sees it. A request that is still waiting counts with its age, so a
//! hang shows at once and not only when it is over.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Latencies of requests of which each thread has one at a time.
#[derive(Debug)]
pub struct StallMeter {
    base: Instant,
    /// Start of the running request in ns since `base`, plus one; 0 when idle.
    slots: Vec<AtomicU64>,
    interval: AtomicU64,
    longest: AtomicU64,
}

impl StallMeter {
    /// A meter for `threads` threads.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self {
            base: Instant::now(),
            slots: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            interval: AtomicU64::new(0),
            longest: AtomicU64::new(0),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_nanos()).unwrap_or(u64::MAX - 1)
    }

    /// Runs one request of `thread` under the meter. An unknown thread is not measured.
    pub fn measure<T>(&self, thread: usize, request: impl FnOnce() -> T) -> T {
        let start = self.now();
        if let Some(slot) = self.slots.get(thread) {
            slot.store(start + 1, Relaxed);
        }
        let result = request();
        let took = self.now().saturating_sub(start);
        self.interval.fetch_max(took, Relaxed);
        self.longest.fetch_max(took, Relaxed);
        if let Some(slot) = self.slots.get(thread) {
            slot.store(0, Relaxed);
        }
        result
    }

    /// The longest latency since the last call, waiting requests included with their age.
    pub fn take(&self) -> Duration {
        let now = self.now();
        let waiting = self
            .slots
            .iter()
            .map(|s| s.load(Relaxed))
            .filter(|&s| s != 0)
            .map(|s| now.saturating_sub(s - 1))
            .max()
            .unwrap_or(0);
        self.longest.fetch_max(waiting, Relaxed);
        Duration::from_nanos(self.interval.swap(0, Relaxed).max(waiting))
    }

    /// The longest latency of the whole run that a call of [`take`](Self::take) or a finished
    /// request has seen.
    #[must_use]
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest.load(Relaxed))
    }
}

/// Gaps between signs of progress of one stream.
#[derive(Debug)]
pub struct GapMeter {
    base: Instant,
    /// Last progress in ns since `base`, plus one; 0 while nothing is expected.
    last: AtomicU64,
    interval: AtomicU64,
    longest: AtomicU64,
}

impl Default for GapMeter {
    fn default() -> Self {
        Self {
            base: Instant::now(),
            last: AtomicU64::new(0),
            interval: AtomicU64::new(0),
            longest: AtomicU64::new(0),
        }
    }
}

impl GapMeter {
    fn now(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_nanos()).unwrap_or(u64::MAX - 1)
    }

    /// Notes progress. The first call starts the meter.
    pub fn progress(&self) {
        let now = self.now();
        let last = self.last.swap(now + 1, Relaxed);
        if last != 0 {
            let gap = now.saturating_sub(last - 1);
            self.interval.fetch_max(gap, Relaxed);
            self.longest.fetch_max(gap, Relaxed);
        }
    }

    /// Nothing more is expected until the next [`progress`](Self::progress).
    pub fn pause(&self) {
        self.last.store(0, Relaxed);
    }

    /// The longest gap since the last call, the running one included.
    pub fn take(&self) -> Duration {
        let last = self.last.load(Relaxed);
        let running = match last {
            0 => 0,
            _ => self.now().saturating_sub(last - 1),
        };
        self.longest.fetch_max(running, Relaxed);
        Duration::from_nanos(self.interval.swap(0, Relaxed).max(running))
    }

    /// The longest gap of the whole run.
    #[must_use]
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::{GapMeter, StallMeter};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_waiting_request_counts() {
        let meter = StallMeter::new(2);
        thread::scope(|s| {
            s.spawn(|| meter.measure(1, || thread::sleep(Duration::from_millis(200))));
            thread::sleep(Duration::from_millis(100));
            assert!(meter.take() >= Duration::from_millis(40));
        });
        assert!(meter.take() >= Duration::from_millis(200));
        assert!(meter.take() < Duration::from_millis(200));
        assert!(meter.longest() >= Duration::from_millis(200));
    }

    #[test]
    fn a_gap_is_seen_while_it_lasts() {
        let meter = GapMeter::default();
        assert_eq!(meter.take(), Duration::ZERO);
        meter.progress();
        thread::sleep(Duration::from_millis(30));
        assert!(meter.take() >= Duration::from_millis(30));
        meter.progress();
        meter.pause();
        assert!(meter.take() >= Duration::from_millis(30));
        assert_eq!(meter.take(), Duration::ZERO);
    }
}

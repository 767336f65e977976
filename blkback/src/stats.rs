//! What a disk has done.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters of one device since this incarnation began.
#[derive(Debug, Default)]
pub struct Stats {
    /// Requests taken off the ring.
    pub requests: AtomicU64,
    /// Reads answered.
    pub reads: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Writes answered.
    pub writes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Flushes answered.
    pub flushes: AtomicU64,
    /// Requests that the disk could not do.
    pub errors: AtomicU64,
    /// Requests answered with an error because of what they asked.
    pub refused: AtomicU64,
    /// Requests run again after a restart.
    pub replayed: AtomicU64,
    /// Requests given up because they crashed the service.
    pub poisoned: AtomicU64,
    /// Microseconds that the predecessor's I/O took to drain.
    pub drain_us: AtomicU64,
    /// Pages mapped at this time.
    pub mapped_pages: AtomicU64,
    /// Grant-copy hypercalls.
    pub copy_calls: AtomicU64,
}

impl Stats {
    pub(crate) fn read(&self, bytes: u32) {
        self.reads.fetch_add(1, Relaxed);
        self.read_bytes.fetch_add(u64::from(bytes), Relaxed);
    }

    pub(crate) fn written(&self, bytes: u32) {
        self.writes.fetch_add(1, Relaxed);
        self.written_bytes.fetch_add(u64::from(bytes), Relaxed);
    }

    /// Name, value and unit of every counter.
    pub fn counters(&self) -> [(&'static str, u64, &'static str); 13] {
        let get = |c: &AtomicU64| c.load(Relaxed);
        [
            ("requests", get(&self.requests), ""),
            ("reads", get(&self.reads), ""),
            ("read_bytes", get(&self.read_bytes), "bytes"),
            ("writes", get(&self.writes), ""),
            ("written_bytes", get(&self.written_bytes), "bytes"),
            ("flushes", get(&self.flushes), ""),
            ("disk_errors", get(&self.errors), ""),
            ("refused", get(&self.refused), ""),
            ("replayed", get(&self.replayed), ""),
            ("poisoned", get(&self.poisoned), ""),
            ("drain", get(&self.drain_us), "µs"),
            ("mapped_pages", get(&self.mapped_pages), "pages"),
            ("grant_copies", get(&self.copy_calls), ""),
        ]
    }
}

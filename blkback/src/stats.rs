//! What a disk has done.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::request::Kind;

/// A count that one thread moves and all may read: no locked instruction on the data path.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds. By the ring's thread alone.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Sets it.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// Reads it.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Bounds of the latency classes, µs: the first holds what took less than 2 µs, the last everything from 2^24 µs (17 s) on.
const CLASSES: usize = 25;

/// How long requests took from the ring to their answer: powers of two of microseconds.
#[derive(Debug)]
pub struct Histogram([Count; CLASSES]);

impl Default for Histogram {
    fn default() -> Self {
        Histogram(std::array::from_fn(|_| Count::default()))
    }
}

impl Histogram {
    fn note(&self, took: Duration) {
        let us = took.as_micros().min(u64::MAX.into()) as u64;
        let class = (us.max(1).ilog2() as usize).min(CLASSES - 1);
        self.0[class].add(1);
    }

    fn add_to(&self, sums: &mut [u64; CLASSES]) {
        for (sum, count) in sums.iter_mut().zip(&self.0) {
            *sum += count.get();
        }
    }
}

/// Upper bound in µs of the class below which the part `part` (0 to 1) of all lies.
fn quantile(sums: &[u64; CLASSES], part: f64) -> u64 {
    let all: u64 = sums.iter().sum();
    let wanted = (all as f64 * part).ceil() as u64;
    let mut seen = 0;
    for (class, &count) in sums.iter().enumerate() {
        seen += count;
        if seen >= wanted && all > 0 {
            return 2 << class;
        }
    }
    0
}

/// Counters of one ring since this incarnation began.
#[derive(Debug, Default)]
pub struct Stats {
    /// Requests taken off the ring.
    pub requests: Count,
    /// Reads answered.
    pub reads: Count,
    /// Bytes read.
    pub read_bytes: Count,
    /// Writes answered.
    pub writes: Count,
    /// Bytes written.
    pub written_bytes: Count,
    /// Flushes and barriers answered.
    pub flushes: Count,
    /// Discards answered.
    pub discards: Count,
    /// Requests that the disk could not do.
    pub errors: Count,
    /// Requests answered with an error because of what they asked.
    pub refused: Count,
    /// Requests run again after a restart.
    pub replayed: Count,
    /// Requests given up because they crashed the service.
    pub poisoned: Count,
    /// 1 while the disk stands still because the medium is full.
    pub no_space: Count,
    /// Times that a limit made requests wait.
    pub throttled: Count,
    /// Microseconds that the predecessor's I/O took to drain.
    pub drain_us: Count,
    /// Pages mapped at this time.
    pub mapped_pages: Count,
    /// Grant-copy hypercalls.
    pub copy_calls: Count,
    /// By kind: read, write, flush, discard.
    latency: [Histogram; 4],
}

/// Names of [`Stats::latency`]'s parts.
const KINDS: [&str; 4] = ["read", "write", "flush", "discard"];

impl Stats {
    pub(crate) fn done(&self, kind: Kind, bytes: u64, took: Duration) {
        let class = match kind {
            Kind::Read => {
                self.reads.add(1);
                self.read_bytes.add(bytes);
                0
            }
            Kind::Write => {
                self.writes.add(1);
                self.written_bytes.add(bytes);
                1
            }
            Kind::Flush | Kind::Barrier => {
                self.flushes.add(1);
                self.written_bytes.add(bytes);
                2
            }
            Kind::Discard { .. } => {
                self.discards.add(1);
                3
            }
        };
        self.latency[class].note(took);
    }
}

/// Name, value and unit of every counter of a device with these rings. What is not summed up is the first ring's.
pub fn counters(rings: &[std::sync::Arc<Stats>]) -> Vec<(String, u64, &'static str)> {
    let sum = |of: fn(&Stats) -> &Count| rings.iter().map(|r| of(r).get()).sum::<u64>();
    let mut all: Vec<(String, u64, &'static str)> = [
        ("requests", sum(|s| &s.requests), ""),
        ("reads", sum(|s| &s.reads), ""),
        ("read_bytes", sum(|s| &s.read_bytes), "bytes"),
        ("writes", sum(|s| &s.writes), ""),
        ("written_bytes", sum(|s| &s.written_bytes), "bytes"),
        ("flushes", sum(|s| &s.flushes), ""),
        ("discards", sum(|s| &s.discards), ""),
        ("disk_errors", sum(|s| &s.errors), ""),
        ("refused", sum(|s| &s.refused), ""),
        ("replayed", sum(|s| &s.replayed), ""),
        ("poisoned", sum(|s| &s.poisoned), ""),
        ("stopped_no_space", sum(|s| &s.no_space), "rings"),
        ("throttled", sum(|s| &s.throttled), ""),
        ("drain", rings.first().map_or(0, |s| s.drain_us.get()), "µs"),
        ("mapped_pages", sum(|s| &s.mapped_pages), "pages"),
        ("grant_copies", sum(|s| &s.copy_calls), ""),
        ("queues", rings.len() as u64, ""),
    ]
    .map(|(name, value, unit)| (name.to_owned(), value, unit))
    .into();
    for (i, kind) in KINDS.iter().enumerate() {
        let mut sums = [0; CLASSES];
        rings.iter().for_each(|ring| ring.latency[i].add_to(&mut sums));
        if sums.iter().all(|&n| n == 0) {
            continue;
        }
        for (name, part) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999)] {
            all.push((format!("{kind}_latency_{name}"), quantile(&sums, part), "µs, at most"));
        }
        for (class, &count) in sums.iter().enumerate().filter(|(_, n)| **n > 0) {
            all.push((format!("{kind}_latency_below_{}us", 2u64 << class), count, ""));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn latencies_are_summed_over_rings_and_told_by_class() {
        let rings = [Arc::new(Stats::default()), Arc::new(Stats::default())];
        for us in [0, 1, 3, 100] {
            rings[0].done(Kind::Read, 512, Duration::from_micros(us));
        }
        rings[1].done(Kind::Read, 512, Duration::from_secs(1000));
        let all = counters(&rings);
        let get = |name: &str| all.iter().find(|(n, ..)| n == name).map(|(_, v, _)| *v);
        assert_eq!(get("read_bytes"), Some(5 * 512));
        assert_eq!(get("read_latency_below_2us"), Some(2));
        assert_eq!(get("read_latency_below_4us"), Some(1));
        assert_eq!(get("read_latency_below_128us"), Some(1));
        assert_eq!(get("read_latency_below_33554432us"), Some(1));
        assert_eq!(get("read_latency_p50"), Some(4));
        assert_eq!(get("write_latency_p50"), None);
    }
}

//! One load for every disk that is measured, whatever the way to it: so many requests in flight, each timed.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Io {
    /// Else a read.
    pub write: bool,
    /// First byte, a multiple of `len`.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

/// A way to a disk.
pub trait Target {
    /// Queues a request. `tag` is below the pattern's depth and has none in flight.
    ///
    /// # Errors
    /// The way's.
    fn submit(&mut self, tag: u32, io: Io) -> Result<()>;

    /// Hands over what was queued, and waits until at least one request is done; `each` is told its tag.
    ///
    /// # Errors
    /// A request failed, or none was answered for long.
    fn wait(&mut self, each: &mut dyn FnMut(u32)) -> Result<()>;
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pattern {
    /// Of 100 requests so many are writes.
    pub writes: u32,
    /// One after the other; else at random.
    pub sequential: bool,
    /// Bytes of each.
    pub bytes: usize,
    /// Requests in flight.
    pub depth: u32,
    /// Bytes of the disk that are touched.
    pub span: u64,
    /// Length of a turn, milliseconds.
    pub ms: u64,
    /// Whoever waits for responses looks for them this long at most before it sleeps, microseconds.
    pub look_us: u64,
}

/// What a turn gave. Times in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Requests a second.
    pub iops: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Requests done.
    pub requests: u64,
    /// Processor time of all processes on the way, for each request. Put in by who knows them.
    #[serde(default)]
    pub cpu: f64,
}

/// xorshift64, kept from turn to turn.
#[derive(Clone, Debug)]
pub struct Places {
    seed: u64,
    next: u64,
}

impl Default for Places {
    fn default() -> Self {
        Places { seed: 0x9e37_79b9_7f4a_7c15, next: 0 }
    }
}

impl Places {
    /// Any number.
    pub(crate) fn random(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    /// The next request of a pattern.
    pub(crate) fn next(&mut self, pattern: &Pattern) -> Io {
        let blocks = pattern.span / pattern.bytes as u64;
        let block = match pattern.sequential {
            true => self.next % blocks,
            false => self.random() % blocks,
        };
        self.next = block + 1;
        let write = self.random() % 100 < u64::from(pattern.writes);
        Io { write, offset: block * pattern.bytes as u64, len: pattern.bytes }
    }
}

/// One turn of a pattern.
///
/// # Errors
/// The target's; a pattern that asks for nothing.
pub fn run(target: &mut dyn Target, pattern: &Pattern, places: &mut Places) -> Result<Sample> {
    ensure!(pattern.bytes > 0 && pattern.depth > 0, "a pattern without requests");
    ensure!(pattern.span >= pattern.bytes as u64, "the disk is too small");
    let time = Duration::from_millis(pattern.ms);
    let start = Instant::now();
    let mut began = vec![start; pattern.depth as usize];
    let mut free: Vec<u32> = (0..pattern.depth).rev().collect();
    let mut took: Vec<u64> = Vec::with_capacity(1 << 16);
    loop {
        let over = start.elapsed() >= time;
        if over && free.len() == pattern.depth as usize {
            break;
        }
        while !over && let Some(tag) = free.pop() {
            began[tag as usize] = Instant::now();
            target.submit(tag, places.next(pattern))?;
        }
        target.wait(&mut |tag| {
            took.push(began[tag as usize].elapsed().as_nanos() as u64);
            free.push(tag);
        })?;
    }
    let seconds = start.elapsed().as_secs_f64();
    took.sort_unstable();
    let rank = |p: f64| {
        let rank = (p * took.len() as f64).ceil() as usize;
        took.get(rank.clamp(1, took.len().max(1)) - 1).map_or(f64::NAN, |ns| *ns as f64 / 1e3)
    };
    Ok(Sample {
        iops: took.len() as f64 / seconds,
        p50: rank(0.5),
        p99: rank(0.99),
        p999: rank(0.999),
        requests: took.len() as u64,
        cpu: 0.0,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const PATTERN: Pattern =
        Pattern { writes: 30, sequential: false, bytes: 4096, depth: 4, span: 1 << 20, ms: 20, look_us: 0 };

    /// Answers two at a time, or what there is.
    #[derive(Default)]
    struct Fake {
        queued: Vec<u32>,
        writes: u64,
        all: Vec<Io>,
    }

    impl Target for Fake {
        fn submit(&mut self, tag: u32, io: Io) -> Result<()> {
            assert!(!self.queued.contains(&tag), "tag {tag} twice");
            self.writes += u64::from(io.write);
            self.all.push(io);
            self.queued.push(tag);
            Ok(())
        }
        fn wait(&mut self, each: &mut dyn FnMut(u32)) -> Result<()> {
            assert!(!self.queued.is_empty());
            self.queued.drain(..self.queued.len().min(2)).for_each(each);
            Ok(())
        }
    }

    #[test]
    fn every_request_is_inside_and_counted() {
        let mut fake = Fake::default();
        let sample = run(&mut fake, &PATTERN, &mut Places::default()).unwrap();
        assert_eq!(sample.requests, fake.all.len() as u64);
        assert!(fake.queued.is_empty(), "all were waited for");
        assert!(fake.all.iter().all(|io| io.offset % 4096 == 0 && io.offset < 1 << 20 && io.len == 4096));
        let share = fake.writes as f64 / fake.all.len() as f64;
        assert!((0.2..0.4).contains(&share), "{share} of the requests were writes");
        assert!(sample.p50 <= sample.p99 && sample.p99 <= sample.p999 && sample.iops > 0.0);
        // It crosses the guest's connection as JSON, which has no NaN.
        let json = serde_json::to_value(sample).unwrap();
        assert_eq!(serde_json::from_value::<Sample>(json).unwrap(), sample);
    }

    #[test]
    fn a_sequence_goes_round() {
        let pattern = Pattern { sequential: true, span: 3 * 4096, depth: 1, ..PATTERN };
        let mut places = Places::default();
        let offsets: Vec<u64> = (0..5).map(|_| places.next(&pattern).offset / 4096).collect();
        assert_eq!(offsets, [0, 1, 2, 0, 1]);
    }
}

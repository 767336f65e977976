//! Which requests of a queue are under way: vhost-user's INFLIGHT_SHMFD, split ring layout.
//!
//! The memory is the backend's, kept by the frontend, and handed to the next incarnation. A kill keeps the program order of stores, so
//!
//! ```text
//!   take:   counter, attempts ──► inflight = 1
//!   answer: next, last_batch_head ──► used ring, used.idx ──► inflight = 0 ──► used_idx
//! ```
//! and the next incarnation knows of each request whether the driver saw its answer: if the used ring's index is ahead of `used_idx`, the
//! last one was seen and only its mark is left to be taken away. All others that are marked are run again, in the order in which they
//! were taken.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::mem::SharedMem;

const HEAD: usize = 16;
const ENTRY: usize = 16;
// QueueRegionSplit: features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
// DescStateSplit: inflight u8, padding [u8; 5], next u16, counter u64. The first byte of the padding is ours: attempts.
const INFLIGHT: usize = 0;
const ATTEMPTS: usize = 1;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Bytes of a queue's region.
pub const fn region_bytes(size: u16) -> usize {
    (HEAD + ENTRY * size as usize).next_multiple_of(64)
}

/// A queue's region.
#[derive(Debug)]
pub struct Inflight {
    mem: Arc<SharedMem>,
    base: usize,
    size: u16,
    counter: u64,
}

/// What a predecessor left.
#[derive(Debug, PartialEq, Eq)]
pub struct Left {
    /// Heads of the requests to be run again, in order.
    pub again: Vec<u16>,
    /// The index of the next request to be taken.
    pub next_avail: u16,
}

impl Inflight {
    /// Takes up the region of a queue of `size` descriptors at `base`, which must lie inside `mem`. `used_idx` is the used ring's.
    /// `crashed`: the predecessor ended by its own fault, and what it ran counts as tried.
    ///
    /// # Errors
    /// One line: it is not inside, or another queue's.
    pub fn attach(
        mem: Arc<SharedMem>,
        base: usize,
        size: u16,
        used_idx: u16,
        crashed: bool,
    ) -> Result<(Inflight, Left), String> {
        let fits = base.checked_add(region_bytes(size)).is_some_and(|end| end <= mem.len());
        if !fits || !base.is_multiple_of(16) {
            return Err("the in-flight region is shorter than its queues".into());
        }
        let mut this = Inflight { mem, base, size, counter: 1 };
        let version = this.mem.load_u16(base + VERSION, Acquire);
        let entries = this.mem.load_u16(base + DESC_NUM, Relaxed);
        if version == 0 {
            // Never used: zeroes are what there is, but for this.
            this.mem.store_u16(base + DESC_NUM, size, Relaxed);
            this.mem.store_u16(base + USED_IDX, used_idx, Relaxed);
            this.mem.store_u16(base + VERSION, 1, Release);
        } else if version != 1 || entries != size {
            return Err(format!("the in-flight region is of version {version} for {entries} descriptors"));
        }
        if this.mem.load_u16(base + USED_IDX, Relaxed) != used_idx {
            // Seen by the driver; the mark remained.
            let last = this.mem.load_u16(base + LAST_BATCH_HEAD, Relaxed);
            if last < size {
                this.mem.store_u8(this.entry(last) + INFLIGHT, 0, Release);
            }
            this.mem.store_u16(base + USED_IDX, used_idx, Release);
        }
        let mut marked: Vec<(u64, u16)> = Vec::new();
        for head in 0..size {
            let entry = this.entry(head);
            if this.mem.load_u8(entry + INFLIGHT, Acquire) != 1 {
                continue;
            }
            if crashed {
                let tried = this.mem.load_u8(entry + ATTEMPTS, Relaxed);
                this.mem.store_u8(entry + ATTEMPTS, tried.saturating_add(1), Relaxed);
            }
            marked.push((this.mem.load_u64(entry + COUNTER, Relaxed), head));
        }
        marked.sort_unstable();
        this.counter = marked.last().map_or(1, |(counter, _)| counter.wrapping_add(1));
        let again: Vec<u16> = marked.into_iter().map(|(_, head)| head).collect();
        let next_avail = used_idx.wrapping_add(again.len() as u16);
        Ok((this, Left { again, next_avail }))
    }

    fn entry(&self, head: u16) -> usize {
        debug_assert!(head < self.size);
        self.base + HEAD + ENTRY * usize::from(head)
    }

    /// A request is taken off the ring.
    pub fn take(&mut self, head: u16) {
        let entry = self.entry(head);
        self.mem.store_u64(entry + COUNTER, self.counter, Relaxed);
        self.mem.store_u8(entry + ATTEMPTS, 0, Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.mem.store_u8(entry + INFLIGHT, 1, Release);
    }

    /// How often a request ended in a crash.
    pub fn attempts(&self, head: u16) -> u8 {
        self.mem.load_u8(self.entry(head) + ATTEMPTS, Relaxed)
    }

    /// Answers a request: `publish` puts it into the used ring and gives the ring's new index.
    pub fn answer(&self, head: u16, publish: impl FnOnce() -> u16) {
        let entry = self.entry(head);
        let last = self.mem.load_u16(self.base + LAST_BATCH_HEAD, Relaxed);
        self.mem.store_u16(entry + NEXT, last, Relaxed);
        self.mem.store_u16(self.base + LAST_BATCH_HEAD, head, Release);
        let used_idx = publish();
        self.mem.store_u8(entry + INFLIGHT, 0, Release);
        self.mem.store_u16(self.base + USED_IDX, used_idx, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(size: u16) -> Arc<SharedMem> {
        Arc::new(SharedMem::create("inflight", region_bytes(size)).unwrap().0)
    }

    #[test]
    fn what_was_not_answered_is_run_again_in_order() {
        let mem = region(8);
        let (mut first, left) = Inflight::attach(mem.clone(), 0, 8, 100, false).unwrap();
        assert_eq!(left, Left { again: vec![], next_avail: 100 });
        for head in [5, 2, 7] {
            first.take(head);
        }
        first.answer(2, || 101);
        let (mut second, left) = Inflight::attach(mem.clone(), 0, 8, 101, true).unwrap();
        assert_eq!(left, Left { again: vec![5, 7], next_avail: 103 });
        assert_eq!((second.attempts(5), second.attempts(2)), (1, 0));
        second.take(2);
        let (_, left) = Inflight::attach(mem, 0, 8, 101, false).unwrap();
        assert_eq!(left.again, [5, 7, 2]);
    }

    /// The driver saw the answer, and then the process was killed before it could take the mark away.
    #[test]
    fn an_answer_that_was_seen_is_not_given_twice() {
        let mem = region(4);
        let (mut first, _) = Inflight::attach(mem.clone(), 0, 4, 0, false).unwrap();
        first.take(3);
        first.take(1);
        let before = mem.load_u8(HEAD + ENTRY * 3, Relaxed);
        first.answer(3, || 1);
        // As if killed between the used index and the mark.
        mem.store_u8(HEAD + ENTRY * 3, before, Relaxed);
        mem.store_u16(USED_IDX, 0, Relaxed);
        let (_, left) = Inflight::attach(mem.clone(), 0, 4, 1, false).unwrap();
        assert_eq!(left, Left { again: vec![1], next_avail: 2 });
        // And killed before the used index: run again, once.
        let (second, _) = Inflight::attach(mem.clone(), 0, 4, 1, false).unwrap();
        second.mem.store_u16(LAST_BATCH_HEAD, 1, Relaxed);
        let (_, left) = Inflight::attach(mem, 0, 4, 1, false).unwrap();
        assert_eq!(left.again, [1]);
    }

    #[test]
    fn a_region_that_does_not_fit_is_refused() {
        let mem = region(4);
        assert!(Inflight::attach(mem.clone(), 0, 64, 0, false).is_err());
        assert!(Inflight::attach(mem.clone(), usize::MAX - 8, 4, 0, false).is_err());
        Inflight::attach(mem.clone(), 0, 4, 0, false).unwrap();
        mem.store_u16(DESC_NUM, 3, Relaxed);
        assert!(Inflight::attach(mem, 0, 4, 0, false).unwrap_err().contains("for 3"));
    }
}

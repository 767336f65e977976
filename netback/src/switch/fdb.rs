//! Learned forwarding entries: which Ethernet address was last seen at which port.
//!
//! They lie in kept memory, so that a new incarnation floods nothing. An entry is two words, the first of which is whole
//! (address and port), so lookups need no lock. Bounded: 4,096 entries in buckets of four; a bucket's oldest goes first.

use domain_kit::ring::RingMem;

use crate::headers::Mac;

const WAYS: usize = 4;
const BUCKETS: usize = 1024;
const ENTRY: usize = 16;
/// Bytes of memory that the table takes.
pub const BYTES: usize = WAYS * BUCKETS * ENTRY;
/// An entry is forgotten when its address was not seen for so long, seconds.
pub const MAX_AGE: u32 = 300;

/// The table.
#[derive(Debug)]
pub struct Fdb<M> {
    mem: M,
}

fn pack(mac: Mac, port: u16) -> u64 {
    mac.iter().fold(0, |word, &b| word << 8 | u64::from(b)) << 16 | u64::from(port)
}

/// `stamp` 0 is no entry.
fn stamp(now: u32) -> u32 {
    now.wrapping_add(1).max(1)
}

impl<M: RingMem> Fdb<M> {
    /// In zeroed memory or a predecessor's, of [`BYTES`].
    pub fn new(mem: M) -> Self {
        assert!(mem.size() >= BYTES);
        Fdb { mem }
    }

    fn bucket(mac: Mac) -> usize {
        let hash = pack(mac, 0).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        (hash as usize % BUCKETS) * WAYS * ENTRY
    }

    /// Notes that `mac` was seen at `port`. `now` in seconds of a clock that outlives processes.
    pub fn learn(&self, mac: Mac, port: u16, now: u32) {
        let (bucket, word) = (Self::bucket(mac), pack(mac, port));
        let mut oldest = (u32::MAX, bucket);
        for at in (0..WAYS).map(|i| bucket + i * ENTRY) {
            let (found, seen) = (self.mem.load_u64(at), self.mem.load_u32(at + 8));
            if seen != 0 && found >> 16 == word >> 16 {
                if found != word {
                    self.mem.store_u64(at, word);
                }
                if seen != stamp(now) {
                    self.mem.store_u32(at + 8, stamp(now));
                }
                return;
            }
            let key = if seen == 0 { 0 } else { u32::MAX - stamp(now).wrapping_sub(seen) };
            if key < oldest.0 {
                oldest = (key, at);
            }
        }
        // Not an entry until the last store.
        self.mem.store_u32(oldest.1 + 8, 0);
        self.mem.store_u64(oldest.1, word);
        self.mem.store_u32(oldest.1 + 8, stamp(now));
    }

    /// The port at which `mac` was seen not too long ago.
    pub fn find(&self, mac: Mac, now: u32) -> Option<u16> {
        let bucket = Self::bucket(mac);
        (0..WAYS).map(|i| bucket + i * ENTRY).find_map(|at| {
            let (word, seen) = (self.mem.load_u64(at), self.mem.load_u32(at + 8));
            let fresh = seen != 0 && stamp(now).wrapping_sub(seen) <= MAX_AGE;
            (fresh && word >> 16 == pack(mac, 0) >> 16).then_some(word as u16)
        })
    }

    /// Forgets all entries of a port that is no more.
    pub fn forget(&self, port: u16) {
        for at in (0..WAYS * BUCKETS).map(|i| i * ENTRY) {
            if self.mem.load_u32(at + 8) != 0 && self.mem.load_u64(at) as u16 == port {
                self.mem.store_u32(at + 8, 0);
            }
        }
    }

    /// How many entries there are, old ones too.
    pub fn len(&self) -> usize {
        (0..WAYS * BUCKETS).filter(|i| self.mem.load_u32(i * ENTRY + 8) != 0).count()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_kit::ring::HeapMem;
    use std::rc::Rc;

    #[test]
    fn learned_moved_aged_and_kept() {
        let mem = Rc::new(HeapMem::new(BYTES));
        let fdb = Fdb::new(mem.clone());
        let mac = [0, 0x16, 0x3e, 1, 2, 3];
        assert_eq!(fdb.find(mac, 10), None);
        fdb.learn(mac, 3, 10);
        assert_eq!(fdb.find(mac, 10), Some(3));
        fdb.learn(mac, 4, 20);
        assert_eq!((fdb.find(mac, 20), fdb.len()), (Some(4), 1));
        // The next incarnation.
        let fdb = Fdb::new(mem);
        assert_eq!(fdb.find(mac, 20 + MAX_AGE), Some(4));
        assert_eq!(fdb.find(mac, 21 + MAX_AGE), None);
        fdb.forget(4);
        assert!(fdb.is_empty());
    }

    #[test]
    fn a_flood_of_addresses_stays_bounded_and_the_oldest_go() {
        let fdb = Fdb::new(HeapMem::new(BYTES));
        for i in 0..100_000u32 {
            let b = i.to_be_bytes();
            fdb.learn([2, 0, b[0], b[1], b[2], b[3]], 7, i / 1000);
        }
        assert!(fdb.len() <= WAYS * BUCKETS);
        let recent = (99_900..100_000u32).filter(|i| {
            let b = i.to_be_bytes();
            fdb.find([2, 0, b[0], b[1], b[2], b[3]], 100).is_some()
        });
        assert_eq!(recent.count(), 100);
    }
}

//! The console ring (io/console.h) from the backend's end, and the memory that survives the backend.
//!
//! Output: copy new bytes into the history behind `total`; store `total` (Release); store the ring's `out_cons`, which is always
//! `base + total`. Killed before the second store, the bytes are copied again to the same place; killed after it, the third
//! is made up for at the next attach. The history has room for a full ring beyond what is shown, so that bytes
//! that do not count yet never overwrite those that are shown.
//!
//! The guest can write the whole page: its indices are allegations and are used only if they fit ours.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use domain_kit::mem::{Page, SharedMem};
use hv_abi::PAGE_SIZE;
use xen_abi::console::*;

/// Bytes of output that are kept and shown.
pub const SHOWN: u64 = 64 << 10;
/// Bytes of the history.
const HISTORY: u64 = SHOWN + XENCONS_OUT_SIZE as u64;
/// Length of a guest's kept memory.
pub const KEPT_LEN: usize = PAGE_SIZE + (HISTORY as usize).next_multiple_of(PAGE_SIZE);

const MAGIC: u64 = u64::from_le_bytes(*b"bh-cons1");
mod at {
    pub const MAGIC: usize = 0;
    pub const TOTAL: usize = 8;
    pub const BASE: usize = 16;
    pub const IN_PROD: usize = 20;
    pub const GREF: usize = 24;
    pub const PORT: usize = 28;
    pub const HISTORY: usize = super::PAGE_SIZE;
}

/// History and progress of one guest's console.
#[derive(Debug)]
pub struct Kept {
    mem: SharedMem,
}

impl Kept {
    /// Takes up kept memory for this ring. Memory that is fresh, or of another ring, starts anew at the ring's indices.
    pub fn attach(mem: SharedMem, ring: &Page, gref: u32, port: u32) -> Kept {
        let kept = Kept { mem };
        let same = kept.mem.load_u64(at::MAGIC, Acquire) == MAGIC
            && kept.mem.load_u32(at::GREF, Relaxed) == gref
            && kept.mem.load_u32(at::PORT, Relaxed) == port;
        if !same {
            // Invalid until the last store.
            kept.mem.store_u64(at::MAGIC, 0, Release);
            kept.mem.store_u64(at::TOTAL, 0, Relaxed);
            kept.mem.store_u32(at::BASE, load(ring, XENCONS_OUT_CONS_OFFSET), Relaxed);
            kept.mem.store_u32(at::IN_PROD, load(ring, XENCONS_IN_PROD_OFFSET), Relaxed);
            kept.mem.store_u32(at::GREF, gref, Relaxed);
            kept.mem.store_u32(at::PORT, port, Relaxed);
            kept.mem.store_u64(at::MAGIC, MAGIC, Release);
        }
        // What a predecessor counted but did not publish.
        store(ring, XENCONS_OUT_CONS_OFFSET, kept.out_cons());
        store(ring, XENCONS_IN_PROD_OFFSET, kept.mem.load_u32(at::IN_PROD, Acquire));
        kept
    }

    /// Bytes of output taken since the guest's start.
    pub fn total(&self) -> u64 {
        self.mem.load_u64(at::TOTAL, Acquire)
    }

    fn out_cons(&self) -> u32 {
        self.mem.load_u32(at::BASE, Relaxed).wrapping_add(self.total() as u32)
    }

    /// Takes what the guest printed, at most a ring full; bytes taken. Indices that cannot be give nothing.
    pub fn pump(&self, ring: &Page) -> usize {
        let cons = self.out_cons();
        let avail = load(ring, XENCONS_OUT_PROD_OFFSET).wrapping_sub(cons) as usize;
        if avail == 0 || avail > XENCONS_OUT_SIZE {
            return 0;
        }
        let total = self.total();
        let mut chunk = [0u8; 256];
        let mut done = 0;
        while done < avail {
            let place = (cons as usize).wrapping_add(done) % XENCONS_OUT_SIZE;
            let behind = (total + done as u64) % HISTORY;
            let n =
                chunk.len().min(avail - done).min(XENCONS_OUT_SIZE - place).min((HISTORY - behind) as usize);
            ring.mem.copy_out(ring.base + XENCONS_OUT_OFFSET + place, &mut chunk[..n]);
            self.mem.copy_in(at::HISTORY + behind as usize, &chunk[..n]);
            done += n;
        }
        self.mem.store_u64(at::TOTAL, total + avail as u64, Release);
        store(ring, XENCONS_OUT_CONS_OFFSET, cons.wrapping_add(avail as u32));
        avail
    }

    /// Gives the guest input; bytes that had room.
    pub fn input(&self, ring: &Page, data: &[u8]) -> usize {
        let prod = self.mem.load_u32(at::IN_PROD, Relaxed);
        let used = prod.wrapping_sub(load(ring, XENCONS_IN_CONS_OFFSET)) as usize;
        if used >= XENCONS_IN_SIZE {
            return 0;
        }
        let n = data.len().min(XENCONS_IN_SIZE - used);
        for (i, byte) in data[..n].iter().enumerate() {
            let place = (prod as usize).wrapping_add(i) % XENCONS_IN_SIZE;
            ring.mem.copy_in(ring.base + XENCONS_IN_OFFSET + place, &[*byte]);
        }
        let prod = prod.wrapping_add(n as u32);
        self.mem.store_u32(at::IN_PROD, prod, Release);
        store(ring, XENCONS_IN_PROD_OFFSET, prod);
        n
    }

    /// Output from `offset` on, at most `most` bytes: the offset of the first byte given, which is later than asked
    /// for if that is no longer kept, and the bytes.
    pub fn read(&self, offset: u64, most: usize) -> (u64, Vec<u8>) {
        let total = self.total();
        let start = offset.clamp(total.saturating_sub(SHOWN), total);
        let mut out = vec![0; ((total - start) as usize).min(most)];
        let mut done = 0;
        while done < out.len() {
            let place = (start + done as u64) % HISTORY;
            let n = (out.len() - done).min((HISTORY - place) as usize);
            self.mem.copy_out(at::HISTORY + place as usize, &mut out[done..done + n]);
            done += n;
        }
        (start, out)
    }
}

fn load(ring: &Page, offset: usize) -> u32 {
    ring.mem.load_u32(ring.base + offset, Acquire)
}

fn store(ring: &Page, offset: usize, value: u32) {
    ring.mem.store_u32(ring.base + offset, value, Release);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn page() -> Page {
        Page::new(Arc::new(SharedMem::create("ring", PAGE_SIZE).unwrap().0), 0)
    }

    /// A guest that prints; gives the bytes that had room.
    fn print(ring: &Page, data: &[u8]) -> usize {
        let (prod, cons) = (load(ring, XENCONS_OUT_PROD_OFFSET), load(ring, XENCONS_OUT_CONS_OFFSET));
        let n = data.len().min(XENCONS_OUT_SIZE - prod.wrapping_sub(cons) as usize);
        for (i, byte) in data[..n].iter().enumerate() {
            let place = prod.wrapping_add(i as u32) as usize % XENCONS_OUT_SIZE;
            ring.mem.copy_in(ring.base + XENCONS_OUT_OFFSET + place, &[*byte]);
        }
        store(ring, XENCONS_OUT_PROD_OFFSET, prod.wrapping_add(n as u32));
        n
    }

    fn kept(ring: &Page, fd: &std::os::fd::OwnedFd) -> Kept {
        Kept::attach(SharedMem::map(fd, KEPT_LEN).unwrap(), ring, 8, 3)
    }

    proptest! {
        /// Output in pieces, the backend killed between any two stores of a pump (bytes copied but not counted; counted but not
        /// published) and started again: what is read is what was printed, once.
        #[test]
        fn nothing_lost_nothing_doubled(start in any::<u32>(), pieces in proptest::collection::vec((1usize..3000, 0u8..4), 1..60)) {
            let ring = page();
            store(&ring, XENCONS_OUT_PROD_OFFSET, start);
            store(&ring, XENCONS_OUT_CONS_OFFSET, start);
            let (_, fd) = SharedMem::create("kept", KEPT_LEN).unwrap();
            let (mut printed, mut read) = (Vec::new(), Vec::new());
            let mut next = 0u64;
            for (len, kill) in pieces {
                let data: Vec<u8> = (0..len).map(|i| (printed.len() + i) as u8 ^ ((printed.len() + i) >> 8) as u8).collect();
                let n = print(&ring, &data);
                printed.extend_from_slice(&data[..n]);
                let me = kept(&ring, &fd);
                match kill {
                    // Killed before anything counts: only bytes that do not count changed.
                    0 => {
                        let total = me.total();
                        let behind = (total % HISTORY) as usize;
                        let n = XENCONS_OUT_SIZE.min(HISTORY as usize - behind);
                        me.mem.copy_in(at::HISTORY + behind, &vec![0xee; n]);
                    }
                    // Killed after the count, before the ring's index: as if that store had not been made.
                    1 => {
                        let before = load(&ring, XENCONS_OUT_CONS_OFFSET);
                        me.pump(&ring);
                        store(&ring, XENCONS_OUT_CONS_OFFSET, before);
                    }
                    _ => {
                        me.pump(&ring);
                    }
                }
                drop(me);
                let me = kept(&ring, &fd);
                let (offset, bytes) = me.read(next, usize::MAX);
                prop_assert_eq!(offset, next);
                next += bytes.len() as u64;
                read.extend(bytes);
            }
            let me = kept(&ring, &fd);
            me.pump(&ring);
            read.extend(me.read(next, usize::MAX).1);
            prop_assert!(read == printed);
        }

        /// XSA-155-like: whatever the guest writes into the page, the backend takes at most a ring full and never panics.
        #[test]
        fn xsa_155_indices_are_allegations(words in proptest::collection::vec((0usize..1024, any::<u32>()), 1..50)) {
            let ring = page();
            let (_, fd) = SharedMem::create("kept", KEPT_LEN).unwrap();
            let me = kept(&ring, &fd);
            for (word, value) in words {
                ring.mem.store_u32(word * 4, value, Relaxed);
                prop_assert!(me.pump(&ring) <= XENCONS_OUT_SIZE);
                prop_assert!(me.input(&ring, &[1; 4096]) <= XENCONS_IN_SIZE);
            }
        }
    }

    #[test]
    fn old_output_makes_room() {
        let ring = page();
        let (_, fd) = SharedMem::create("kept", KEPT_LEN).unwrap();
        let me = kept(&ring, &fd);
        for i in 0..100u8 {
            assert_eq!(print(&ring, &[i; 2000]), 2000);
            assert_eq!(me.pump(&ring), 2000);
        }
        let (offset, bytes) = me.read(0, usize::MAX);
        assert_eq!((offset, bytes.len() as u64), (200_000 - SHOWN, SHOWN));
        assert_eq!((bytes[0], *bytes.last().unwrap()), (67, 99));
        assert_eq!(me.read(u64::MAX, 10), (200_000, vec![]));
    }

    #[test]
    fn input_waits_for_room() {
        let ring = page();
        let (_, fd) = SharedMem::create("kept", KEPT_LEN).unwrap();
        let me = kept(&ring, &fd);
        assert_eq!(me.input(&ring, &[7; 2000]), 1024);
        assert_eq!(me.input(&ring, &[8; 10]), 0);
        store(&ring, XENCONS_IN_CONS_OFFSET, 5);
        assert_eq!(me.input(&ring, &[8; 10]), 5);
        assert_eq!(load(&ring, XENCONS_IN_PROD_OFFSET), 1029);
        drop(me);
        // A predecessor that was killed before it published.
        store(&ring, XENCONS_IN_PROD_OFFSET, 1024);
        kept(&ring, &fd);
        assert_eq!(load(&ring, XENCONS_IN_PROD_OFFSET), 1029);
    }
}

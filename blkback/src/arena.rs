//! Where in a queue's buffers each request's data lie: a buddy allocator over offsets, without memory of its own per request.
//!
//! Blocks are powers of two of pages and aligned to their size, so none crosses a [`BUFFER_CHUNK`]. The lowest fitting block is
//! taken first: at low depth the same few pages are used again and again, and stay in the processor's cache. When nothing fits,
//! the request waits for others to end; each request has one block, so waiting ends.

use crate::disk::attachment::BUFFER_CHUNK;

const PAGE: usize = 4096;
/// Blocks of 2^0 to 2^8 pages.
const ORDERS: usize = (BUFFER_CHUNK / PAGE).ilog2() as usize + 1;

/// See the module.
#[derive(Debug)]
pub struct Arena {
    /// For each order a bit for each of its blocks: free, and not part of a larger free one.
    free: [Vec<u64>; ORDERS],
    pages_used: usize,
}

fn order_of(len: usize) -> usize {
    len.div_ceil(PAGE).next_power_of_two().ilog2() as usize
}

impl Arena {
    /// Of `chunks` chunks, all free.
    pub fn new(chunks: usize) -> Self {
        let mut free = std::array::from_fn(|order| {
            let blocks = chunks << (ORDERS - 1 - order);
            vec![0u64; blocks.div_ceil(64)]
        });
        for chunk in 0..chunks {
            free[ORDERS - 1][chunk / 64] |= 1 << (chunk % 64);
        }
        Arena { free, pages_used: 0 }
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.pages_used * PAGE
    }

    /// Takes a block of at least `len` bytes (1 to [`BUFFER_CHUNK`]); its offset in bytes, or `None` if nothing fits now.
    pub fn take(&mut self, len: usize) -> Option<u32> {
        if len == 0 || len > BUFFER_CHUNK {
            return None;
        }
        let order = order_of(len);
        let (found, word) = (order..ORDERS)
            .find_map(|o| self.free[o].iter().position(|word| *word != 0).map(|word| (o, word)))?;
        let mut block = word * 64 + self.free[found][word].trailing_zeros() as usize;
        self.free[found][block / 64] &= !(1 << (block % 64));
        for o in (order..found).rev() {
            block *= 2;
            self.free[o][(block + 1) / 64] |= 1 << ((block + 1) % 64);
        }
        self.pages_used += 1 << order;
        Some((block << order) as u32 * PAGE as u32)
    }

    /// Gives back what [`Arena::take`] gave for `len` bytes.
    pub fn give(&mut self, offset: u32, len: usize) {
        let mut order = order_of(len);
        let mut block = (offset as usize / PAGE) >> order;
        self.pages_used -= 1 << order;
        while order < ORDERS - 1 {
            let buddy = block ^ 1;
            let (word, bit) = (buddy / 64, 1u64 << (buddy % 64));
            if self.free[order][word] & bit == 0 {
                break;
            }
            self.free[order][word] &= !bit;
            block /= 2;
            order += 1;
        }
        debug_assert_eq!(self.free[order][block / 64] & 1 << (block % 64), 0, "given twice");
        self.free[order][block / 64] |= 1 << (block % 64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn whole_chunks_and_single_pages() {
        let mut arena = Arena::new(2);
        assert_eq!(arena.take(BUFFER_CHUNK), Some(0));
        assert_eq!(arena.take(512), Some(BUFFER_CHUNK as u32));
        assert_eq!(arena.take(BUFFER_CHUNK), None);
        assert_eq!(arena.take(BUFFER_CHUNK + 1), None);
        assert_eq!(arena.take(0), None);
        arena.give(0, BUFFER_CHUNK);
        assert_eq!(arena.take(BUFFER_CHUNK), Some(0));
        arena.give(0, BUFFER_CHUNK);
        arena.give(BUFFER_CHUNK as u32, 512);
        assert_eq!(arena.used(), 0);
        assert_eq!(arena.take(BUFFER_CHUNK / 2 + 1), Some(0), "merged again");
    }

    proptest! {
        /// Blocks never overlap, never cross a chunk, and all come back.
        #[test]
        fn blocks_are_disjoint(steps in proptest::collection::vec((any::<bool>(), 1usize..=BUFFER_CHUNK, any::<u32>()), 1..200)) {
            let mut arena = Arena::new(3);
            let mut held: Vec<(u32, usize)> = Vec::new();
            for (take, len, which) in steps {
                let len = if len.is_multiple_of(3) { len } else { len % 50_000 + 1 };
                if take || held.is_empty() {
                    if let Some(at) = arena.take(len) {
                        let end = at as usize + len;
                        prop_assert!(end <= 3 * BUFFER_CHUNK && (at as usize).is_multiple_of(PAGE));
                        prop_assert_eq!(at as usize / BUFFER_CHUNK, (end - 1) / BUFFER_CHUNK);
                        prop_assert!(held.iter().all(|&(o, l)| o as usize >= end || at as usize >= o as usize + l));
                        held.push((at, len));
                    }
                } else {
                    let (at, len) = held.swap_remove(which as usize % held.len());
                    arena.give(at, len);
                }
            }
            for (at, len) in held {
                arena.give(at, len);
            }
            prop_assert_eq!(arena.used(), 0);
            prop_assert_eq!((0..4).filter_map(|_| arena.take(BUFFER_CHUNK)).count(), 3);
        }
    }
}

//! A ring of several granted pages, which need not lie side by side where they are mapped.

use std::sync::Arc;

use hv_abi::PAGE_SIZE;

use super::RingMem;
use crate::mem::SharedMem;

/// Pages of a mapping, in the order of the ring.
#[derive(Clone, Debug)]
pub struct Pages {
    mem: Arc<SharedMem>,
    /// Byte offset of each page's start in `mem`.
    bases: Vec<usize>,
    /// They lie side by side: one copy does for all.
    flat: bool,
}

impl Pages {
    /// Pages of `mem` that start at these byte offsets.
    ///
    /// # Panics
    /// If there is none, or one is not a whole page of `mem`.
    pub fn new(mem: Arc<SharedMem>, bases: Vec<usize>) -> Self {
        assert!(!bases.is_empty(), "no pages");
        assert!(bases.iter().all(|b| b.is_multiple_of(PAGE_SIZE) && b + PAGE_SIZE <= mem.len()), "{bases:?}");
        let flat = bases.windows(2).all(|pair| pair[0] + PAGE_SIZE == pair[1]);
        Pages { mem, bases, flat }
    }

    /// An aligned field never crosses a page.
    #[inline]
    fn field(&self, offset: usize) -> usize {
        self.bases[offset / PAGE_SIZE] + offset % PAGE_SIZE
    }

    /// Calls `each` with (offset in `mem`, offset in the caller's bytes, length) for the pieces of a range.
    #[inline]
    fn pieces(&self, offset: usize, len: usize, mut each: impl FnMut(usize, usize, usize)) {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.size()),
            "access of {len} bytes at {offset} outside {} pages",
            self.bases.len()
        );
        if self.flat {
            return each(self.bases[0] + offset, 0, len);
        }
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let n = (len - done).min(PAGE_SIZE - at % PAGE_SIZE);
            each(self.field(at), done, n);
            done += n;
        }
    }
}

impl RingMem for Pages {
    fn size(&self) -> usize {
        self.bases.len() * PAGE_SIZE
    }
    #[inline]
    fn load_u32(&self, offset: usize) -> u32 {
        RingMem::load_u32(&*self.mem, self.field(offset))
    }
    #[inline]
    fn store_u32(&self, offset: usize, value: u32) {
        RingMem::store_u32(&*self.mem, self.field(offset), value);
    }
    #[inline]
    fn load_u64(&self, offset: usize) -> u64 {
        RingMem::load_u64(&*self.mem, self.field(offset))
    }
    #[inline]
    fn store_u64(&self, offset: usize, value: u64) {
        RingMem::store_u64(&*self.mem, self.field(offset), value);
    }
    #[inline]
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        let len = into.len();
        self.pieces(offset, len, |at, done, n| self.mem.copy_out(at, &mut into[done..done + n]));
    }
    #[inline]
    fn copy_in(&self, offset: usize, from: &[u8]) {
        self.pieces(offset, from.len(), |at, done, n| self.mem.copy_in(at, &from[done..done + n]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_may_cross_pages_that_lie_anywhere() {
        let (mem, _fd) = SharedMem::create("pages", 4 * PAGE_SIZE).unwrap();
        let mem = Arc::new(mem);
        for order in [[0, 1, 2], [2, 0, 3]] {
            let pages = Pages::new(mem.clone(), order.map(|p| p * PAGE_SIZE).into());
            let bytes: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
            pages.copy_in(3000, &bytes);
            let mut back = vec![0; 5000];
            pages.copy_out(3000, &mut back);
            assert_eq!(back, bytes);
            let mut first = [0; 1];
            mem.copy_out(order[1] * PAGE_SIZE, &mut first);
            assert_eq!(first[0], (PAGE_SIZE - 3000) as u8);
            pages.store_u32(2 * PAGE_SIZE, 7);
            assert_eq!(RingMem::load_u32(&*mem, order[2] * PAGE_SIZE), 7);
        }
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn beyond_the_end() {
        let (mem, _fd) = SharedMem::create("pages", PAGE_SIZE).unwrap();
        Pages::new(Arc::new(mem), vec![0]).copy_in(PAGE_SIZE - 1, &[0; 2]);
    }
}

//! A part of shared memory: several rings' journals, or several queues' packets, lie in one memfd.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use domain_kit::mem::SharedMem;
use domain_kit::ring::RingMem;

/// `len` bytes of a mapping, from `base` (a multiple of 8) on.
#[derive(Clone, Debug)]
pub struct Span {
    mem: Arc<SharedMem>,
    base: usize,
    len: usize,
}

impl Span {
    /// # Panics
    /// If it does not lie inside the mapping.
    pub fn new(mem: Arc<SharedMem>, base: usize, len: usize) -> Span {
        assert!(base.is_multiple_of(8) && base.checked_add(len).is_some_and(|end| end <= mem.len()));
        Span { mem, base, len }
    }

    /// The mapping under it.
    pub fn mem(&self) -> &SharedMem {
        &self.mem
    }

    /// Where `offset` is in the mapping.
    pub fn absolute(&self, offset: usize) -> usize {
        self.base + offset
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> usize {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} outside a span"
        );
        self.base + offset
    }
}

impl RingMem for Span {
    fn size(&self) -> usize {
        self.len
    }
    #[inline]
    fn load_u32(&self, offset: usize) -> u32 {
        SharedMem::load_u32(&self.mem, self.at(offset, 4), Ordering::Acquire)
    }
    #[inline]
    fn store_u32(&self, offset: usize, value: u32) {
        SharedMem::store_u32(&self.mem, self.at(offset, 4), value, Ordering::Release);
    }
    #[inline]
    fn load_u64(&self, offset: usize) -> u64 {
        SharedMem::load_u64(&self.mem, self.at(offset, 8), Ordering::Acquire)
    }
    #[inline]
    fn store_u64(&self, offset: usize, value: u64) {
        SharedMem::store_u64(&self.mem, self.at(offset, 8), value, Ordering::Release);
    }
    #[inline]
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        SharedMem::copy_out(&self.mem, self.at(offset, into.len()), into);
    }
    #[inline]
    fn copy_in(&self, offset: usize, from: &[u8]) {
        SharedMem::copy_in(&self.mem, self.at(offset, from.len()), from);
    }
}

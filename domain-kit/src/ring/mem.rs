//! The memory under rings and journals.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::mem::{Page, SharedMem};

/// Memory that others may change at any time. Loads are Acquire, stores Release; copies are neither, and read or write each
/// byte once. Offsets are bytes; one beyond the end is the caller's bug and panics.
pub trait RingMem {
    /// Length in bytes.
    fn size(&self) -> usize;
    /// Loads an aligned u32.
    fn load_u32(&self, offset: usize) -> u32;
    /// Stores an aligned u32.
    fn store_u32(&self, offset: usize, value: u32);
    /// Loads an aligned u64.
    fn load_u64(&self, offset: usize) -> u64;
    /// Stores an aligned u64, indivisibly.
    fn store_u64(&self, offset: usize, value: u64);
    /// Copies bytes out.
    fn copy_out(&self, offset: usize, into: &mut [u8]);
    /// Copies bytes in.
    fn copy_in(&self, offset: usize, from: &[u8]);
}

impl RingMem for SharedMem {
    fn size(&self) -> usize {
        self.len()
    }
    #[inline]
    fn load_u32(&self, offset: usize) -> u32 {
        SharedMem::load_u32(self, offset, Ordering::Acquire)
    }
    #[inline]
    fn store_u32(&self, offset: usize, value: u32) {
        SharedMem::store_u32(self, offset, value, Ordering::Release);
    }
    #[inline]
    fn load_u64(&self, offset: usize) -> u64 {
        SharedMem::load_u64(self, offset, Ordering::Acquire)
    }
    #[inline]
    fn store_u64(&self, offset: usize, value: u64) {
        SharedMem::store_u64(self, offset, value, Ordering::Release);
    }
    #[inline]
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        SharedMem::copy_out(self, offset, into);
    }
    #[inline]
    fn copy_in(&self, offset: usize, from: &[u8]) {
        SharedMem::copy_in(self, offset, from);
    }
}

/// `len` bytes of a mapping, from `base` (a multiple of 8) on: several rings' journals, or several queues' packets, lie in
/// one memfd.
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
}

/// [`RingMem`] for a part of a mapping, which has `mem`, `base` and this size.
macro_rules! part_of_mapping {
    ($ty:ty, $what:literal, |$part:ident| $size:expr) => {
        impl $ty {
            #[inline]
            fn at(&self, offset: usize, len: usize) -> usize {
                let $part = self;
                assert!(
                    offset.checked_add(len).is_some_and(|end| end <= $size),
                    "access of {len} bytes at {offset} outside a {}",
                    $what
                );
                self.base + offset
            }
        }

        impl RingMem for $ty {
            fn size(&self) -> usize {
                let $part = self;
                $size
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
    };
}

part_of_mapping!(Page, "page", |_page| hv_abi::PAGE_SIZE);
part_of_mapping!(Span, "span", |span| span.len);

macro_rules! forward {
    ($($ty:ty),*) => {$(
        impl<M: RingMem + ?Sized> RingMem for $ty {
            fn size(&self) -> usize {
                (**self).size()
            }
            #[inline]
            fn load_u32(&self, offset: usize) -> u32 {
                (**self).load_u32(offset)
            }
            #[inline]
            fn store_u32(&self, offset: usize, value: u32) {
                (**self).store_u32(offset, value);
            }
            #[inline]
            fn load_u64(&self, offset: usize) -> u64 {
                (**self).load_u64(offset)
            }
            #[inline]
            fn store_u64(&self, offset: usize, value: u64) {
                (**self).store_u64(offset, value);
            }
            #[inline]
            fn copy_out(&self, offset: usize, into: &mut [u8]) {
                (**self).copy_out(offset, into);
            }
            #[inline]
            fn copy_in(&self, offset: usize, from: &[u8]) {
                (**self).copy_in(offset, from);
            }
        }
    )*};
}
forward!(&M, Arc<M>, std::rc::Rc<M>);

/// Ordinary memory as [`RingMem`], for tests and models. Copies need not be aligned.
#[derive(Debug)]
pub struct HeapMem {
    words: Vec<AtomicU32>,
}

impl HeapMem {
    /// `len` zero bytes, rounded up to whole 8 bytes.
    pub fn new(len: usize) -> Self {
        HeapMem { words: (0..len.next_multiple_of(8) / 4).map(|_| AtomicU32::new(0)).collect() }
    }

    /// A copy of all bytes.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size()];
        self.copy_out(0, &mut bytes);
        bytes
    }
}

impl RingMem for HeapMem {
    fn size(&self) -> usize {
        self.words.len() * 4
    }
    fn load_u32(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4), "unaligned");
        self.words[offset / 4].load(Ordering::Acquire)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4), "unaligned");
        self.words[offset / 4].store(value, Ordering::Release);
    }
    // Two halves: good enough where one thread runs at a time, which models and unit tests do.
    fn load_u64(&self, offset: usize) -> u64 {
        u64::from(self.load_u32(offset)) | u64::from(self.load_u32(offset + 4)) << 32
    }
    fn store_u64(&self, offset: usize, value: u64) {
        self.store_u32(offset, value as u32);
        self.store_u32(offset + 4, (value >> 32) as u32);
    }
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        for (at, byte) in (offset..).zip(into) {
            *byte = self.words[at / 4].load(Ordering::Relaxed).to_le_bytes()[at % 4];
        }
    }
    fn copy_in(&self, offset: usize, from: &[u8]) {
        let mut at = offset;
        let mut rest = from;
        while let Some((&first, tail)) = rest.split_first() {
            if at.is_multiple_of(4) && rest.len() >= 4 {
                let (word, tail) = rest.split_at(4);
                let mut bytes = [0; 4];
                bytes.copy_from_slice(word);
                self.words[at / 4].store(u32::from_le_bytes(bytes), Ordering::Relaxed);
                (at, rest) = (at + 4, tail);
            } else {
                let mut bytes = self.words[at / 4].load(Ordering::Relaxed).to_le_bytes();
                bytes[at % 4] = first;
                self.words[at / 4].store(u32::from_le_bytes(bytes), Ordering::Relaxed);
                (at, rest) = (at + 1, tail);
            }
        }
    }
}

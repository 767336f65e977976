//! Memory shared with other processes. Nothing here ever makes a reference to it: bytes move by raw copies, words by
//! atomics, and every access is checked against the mapping's length.
#![expect(unsafe_code, reason = "mappings shared with other processes")]

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A mapping of a sealed memfd (one that cannot shrink, so that no access can fault).
#[derive(Debug)]
pub struct Shm {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping stays valid until drop, and all accesses are raw copies or atomics.
unsafe impl Send for Shm {}
// SAFETY: as above; concurrent access is what the mapping is for.
unsafe impl Sync for Shm {}

impl Shm {
    /// Maps `len` bytes of `fd` for reading and writing, without reserving memory for holes.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn map(fd: impl AsFd, len: usize) -> nix::Result<Shm> {
        let size = std::num::NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE,
                fd,
                0,
            )?
        };
        Ok(Shm { base: base.cast(), len })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    fn range(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len as u64)?;
        if end > self.len as u64 {
            return None;
        }
        // SAFETY: offset + len lies inside the mapping.
        Some(unsafe { self.base.as_ptr().add(offset as usize) })
    }

    /// Copies `len` bytes from `src` at `src_offset` to `self` at `offset`. `None` (and nothing is copied) when a range is
    /// not inside its mapping.
    pub fn copy_from(&self, offset: u64, src: &Shm, src_offset: u64, len: usize) -> Option<()> {
        let to = self.range(offset, len)?;
        let from = src.range(src_offset, len)?;
        // SAFETY: both ranges were checked and stay mapped; `copy` allows overlap. Others may change the bytes meanwhile:
        // the result is then some mixture of bytes, which is what a grant copy promises.
        unsafe { std::ptr::copy(from, to, len) };
        Some(())
    }

    /// The 32-bit word at a byte offset that is a multiple of 4.
    pub fn word(&self, offset: u64) -> Option<&AtomicU32> {
        if !offset.is_multiple_of(4) {
            return None;
        }
        let at = self.range(offset, 4)?.cast::<u32>();
        // SAFETY: inside the mapping, aligned (mappings begin at a page), and only ever accessed as an atomic.
        Some(unsafe { AtomicU32::from_ptr(at) })
    }

    #[cfg(test)]
    pub(crate) fn load(&self, offset: u64) -> Option<u32> {
        self.word(offset).map(|w| w.load(std::sync::atomic::Ordering::Acquire))
    }
}

impl Drop for Shm {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody keeps a pointer into it.
        let _cannot_fail = unsafe { munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        let fd = crate::sys::sealed_memfd(c"t", 8192).unwrap();
        let (a, b) = (Shm::map(&fd, 8192).unwrap(), Shm::map(&fd, 4096).unwrap());
        a.word(4096).unwrap().store(7, std::sync::atomic::Ordering::Relaxed);
        assert!(b.copy_from(0, &a, 4096, 4096).is_some());
        assert_eq!(b.load(0), Some(7));
        assert!(b.copy_from(1, &a, 0, 4096).is_none());
        assert!(b.copy_from(u64::MAX, &a, 0, 2).is_none());
        assert!(b.word(4096).is_none());
        assert!(b.word(2).is_none());
    }
}

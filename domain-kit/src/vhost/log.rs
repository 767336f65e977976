//! Which of the guest's pages were written here, for a VMM that moves the guest away while it runs (vhost-user's LOG_SHMFD).
//!
//! One bit for each page of 4096 bytes of guest-physical memory. The frontend gives the bitmap (SET_LOG_BASE), and turns logging on and
//! off by the feature F_LOG_ALL while rings run. Whoever writes says so after the write: a write that meets logging turned off was
//! before the frontend's first pass over all memory.

use std::fs::File;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, fence};
use std::sync::{Mutex, PoisonError};

use super::memory::must_not_shrink;
use crate::mem::SharedMem;

/// Bytes of guest memory that a bit stands for.
pub const LOG_PAGE: u64 = 4096;
/// Longest bitmap, bytes: 8 TiB of guest memory.
const MAX_BYTES: u64 = 1 << 28;

/// See the module.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: AtomicBool,
    bitmap: Mutex<Option<Bitmap>>,
}

#[derive(Debug)]
struct Bitmap {
    mem: SharedMem,
    offset: usize,
    len: usize,
}

impl DirtyLog {
    /// Whether writes are noted from now on.
    pub fn set_on(&self, on: bool) {
        self.on.store(on, Release);
    }

    /// Takes the frontend's bitmap of `len` bytes at `offset` of a file.
    ///
    /// # Errors
    /// One line: it is longer than its file, or its file can be made shorter.
    pub fn set_bitmap(&self, file: &File, offset: u64, len: u64) -> Result<(), String> {
        must_not_shrink(file)?;
        let there = file.metadata().map_err(|e| format!("dirty log: {e}"))?.len();
        let end = offset.checked_add(len).filter(|end| len > 0 && *end <= there.min(MAX_BYTES));
        let end = end.ok_or("the dirty log is empty, too long or longer than its file")?;
        let mem = SharedMem::map(file, end as usize).map_err(|e| format!("mapping the dirty log: {e}"))?;
        let bitmap = Bitmap { mem, offset: offset as usize, len: len as usize };
        *self.bitmap.lock().unwrap_or_else(PoisonError::into_inner) = Some(bitmap);
        Ok(())
    }

    /// Notes that `len` bytes at a guest-physical address were written.
    pub fn wrote(&self, gpa: u64, len: u64) {
        // The write comes before the question.
        fence(SeqCst);
        if !self.on.load(Acquire) || len == 0 {
            return;
        }
        let bitmap = self.bitmap.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(bitmap) = bitmap.as_ref() else { return };
        for page in gpa / LOG_PAGE..=(gpa.saturating_add(len - 1)) / LOG_PAGE {
            let byte = page / 8;
            // What the frontend gave no bit for, it does not move.
            if byte >= bitmap.len as u64 {
                return;
            }
            bitmap.mem.or_u8(bitmap.offset + byte as usize, 1 << (page % 8), Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::sealed_memfd;

    #[test]
    fn each_page_that_was_touched_has_its_bit() {
        let file: File = sealed_memfd("log", 4096).unwrap().into();
        let log = DirtyLog::default();
        let look = SharedMem::map(&file, 4096).unwrap();
        let bits = |at: usize| look.load_u8(at, Relaxed);
        log.wrote(0, 1);
        log.set_on(true);
        log.wrote(0, 1);
        log.set_bitmap(&file, 64, 16).unwrap();
        assert_eq!(bits(64), 0, "off, and without a bitmap");
        log.wrote(3 * LOG_PAGE - 1, 2);
        log.wrote(9 * LOG_PAGE, LOG_PAGE);
        log.wrote(12 * LOG_PAGE, 0);
        assert_eq!((bits(64), bits(65)), (0b1100, 0b10));
        // Beyond the end, and at the end of all addresses.
        log.wrote(127 * LOG_PAGE, 5 * LOG_PAGE);
        log.wrote(u64::MAX, u64::MAX);
        assert_eq!((bits(79), bits(80)), (0x80, 0));
        log.set_on(false);
        log.wrote(0, 1);
        assert_eq!(bits(64), 0b1100);
    }

    #[test]
    fn a_bitmap_that_does_not_fit_is_refused() {
        let file: File = sealed_memfd("log", 4096).unwrap().into();
        let log = DirtyLog::default();
        for (offset, len) in [(0, 0), (0, 4097), (4096, 1), (u64::MAX, 2)] {
            assert!(log.set_bitmap(&file, offset, len).is_err(), "{offset} {len}");
        }
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(4096).unwrap();
        assert!(log.set_bitmap(&plain, 0, 4096).unwrap_err().contains("sealed"));
    }
}

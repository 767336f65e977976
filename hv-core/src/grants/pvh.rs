//! A PVH domain's memory and its version 1 grant table.
//!
//! An entry is pinned while someone maps or copies its page: by compare-and-swap hv-core sets GTF_reading (any use) and
//! GTF_writing (writable use) in the shared entry, which the guest must not withdraw while they are set. How often it is
//! pinned is counted here and not in guest memory; the last pin's end clears the bits. While an entry is pinned its page is
//! the one of the first pin, whatever the guest writes there.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use hv_abi::{HIGH_RAM_START, LOW_RAM_MAX, PAGE_SIZE, RamInfo};
use xen_abi::grant_table::*;

use crate::sys::{self, shm::Shm};

/// The grantee, read-only and type bits of an entry's first word (flags, then domid).
fn allows(word: u32, domid: u16, write: bool) -> bool {
    let flags = word as u16;
    (word >> 16) as u16 == domid
        && flags & GTF_TYPE_MASK == GTF_PERMIT_ACCESS
        && !(write && flags & GTF_READONLY != 0)
}

/// The first word of a shared entry; in tests one that a guest changes at any moment.
pub(crate) trait EntryWord {
    fn load(&self) -> u32;
    fn swap_if(&self, old: u32, new: u32) -> Result<(), u32>;
    fn clear(&self, bits: u32);
}

impl EntryWord for AtomicU32 {
    fn load(&self) -> u32 {
        AtomicU32::load(self, Ordering::Acquire)
    }
    fn swap_if(&self, old: u32, new: u32) -> Result<(), u32> {
        self.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }
    fn clear(&self, bits: u32) {
        self.fetch_and(!bits, Ordering::AcqRel);
    }
}

/// Marks the entry as in use, if it allows that. A guest that keeps changing it is refused after a few attempts.
fn mark(word: &impl EntryWord, domid: u16, write: bool) -> Result<(), i16> {
    const ATTEMPTS: u32 = 5;
    let mut seen = word.load();
    for _ in 0..ATTEMPTS {
        if !allows(seen, domid, write) {
            return Err(GNTST_GENERAL_ERROR);
        }
        let bits = if write { GTF_READING | GTF_WRITING } else { GTF_READING };
        match word.swap_if(seen, seen | u32::from(bits)) {
            Ok(()) => return Ok(()),
            Err(now) => seen = now,
        }
    }
    Err(GNTST_GENERAL_ERROR)
}

/// A pinned entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Active {
    domid: u16,
    /// Byte offset of its page in RAM.
    page: u64,
    readers: u32,
    writers: u32,
}

/// Pins of one table, apart from where it lies.
#[derive(Debug, Default)]
pub(crate) struct Pins(HashMap<u32, Active>);

impl Pins {
    /// Pins `gref` for `domid`. `page_of` reads the entry's frame and gives its offset in RAM, and is asked only when the
    /// entry was not pinned.
    pub(crate) fn pin(
        &mut self,
        gref: u32,
        word: &impl EntryWord,
        domid: u16,
        write: bool,
        page_of: impl FnOnce() -> Option<u64>,
    ) -> Result<u64, i16> {
        if let Some(active) = self.0.get_mut(&gref) {
            if active.domid != domid {
                return Err(GNTST_GENERAL_ERROR);
            }
            if write && active.writers == 0 {
                mark(word, domid, true)?;
            }
            let count = if write { &mut active.writers } else { &mut active.readers };
            *count = count.checked_add(1).ok_or(GNTST_NO_SPACE)?;
            return Ok(active.page);
        }
        mark(word, domid, write)?;
        let Some(page) = page_of() else {
            word.clear(u32::from(GTF_READING | GTF_WRITING));
            return Err(GNTST_BAD_PAGE);
        };
        self.0.insert(gref, Active { domid, page, readers: (!write).into(), writers: write.into() });
        Ok(page)
    }

    /// Ends one pin of that kind.
    pub(crate) fn unpin(&mut self, gref: u32, word: &impl EntryWord, write: bool) {
        let Some(active) = self.0.get_mut(&gref) else { return };
        let count = if write { &mut active.writers } else { &mut active.readers };
        *count = count.saturating_sub(1);
        let (readers, writers) = (active.readers, active.writers);
        if write && writers == 0 {
            word.clear(GTF_WRITING.into());
        }
        if readers == 0 && writers == 0 {
            word.clear(GTF_READING.into());
            self.0.remove(&gref);
        }
    }

    /// How many entries are pinned.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// A PVH domain's memory.
#[derive(Debug)]
pub struct Pvh {
    /// Guest RAM.
    pub ram: Arc<OwnedFd>,
    /// The grant frames.
    pub frames: Arc<OwnedFd>,
    /// Sizes.
    pub info: RamInfo,
    ram_map: OnceLock<Shm>,
    table: Shm,
    pins: Mutex<Pins>,
}

impl Pvh {
    /// Makes zeroed RAM of `ram_bytes` and `grant_frames` pages of grant table.
    ///
    /// # Errors
    /// As memfd_create(2) and mmap(2).
    pub fn new(ram_bytes: u64, grant_frames: u32) -> nix::Result<Pvh> {
        let table_bytes = grant_frames as usize * PAGE_SIZE;
        let ram = Arc::new(sys::sealed_memfd(c"guest-ram", ram_bytes)?);
        let frames = Arc::new(sys::sealed_memfd(c"grant-frames", table_bytes as u64)?);
        let table = Shm::map(&frames, table_bytes)?;
        let low_bytes = ram_bytes.min(LOW_RAM_MAX);
        let info = RamInfo { ram_bytes, low_bytes, grant_frames, pad: 0 };
        Ok(Pvh { ram, frames, info, ram_map: OnceLock::new(), table, pins: Mutex::default() })
    }

    /// RAM mapped here, without memory being reserved for it.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn ram_map(&self) -> nix::Result<&Shm> {
        if let Some(map) = self.ram_map.get() {
            return Ok(map);
        }
        let map = Shm::map(&self.ram, self.info.ram_bytes as usize)?;
        Ok(self.ram_map.get_or_init(|| map))
    }

    /// Byte offset in RAM of a guest frame, if it is RAM.
    pub fn frame_offset(&self, gfn: u32) -> Option<u64> {
        let address = u64::from(gfn) * PAGE_SIZE as u64;
        let (low, all) = (self.info.low_bytes, self.info.ram_bytes);
        if address < low {
            return Some(address);
        }
        let offset = address.checked_sub(HIGH_RAM_START)?.checked_add(low)?;
        (offset < all).then_some(offset)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Pins a grant for `domid`; gives its page's offset in RAM.
    ///
    /// # Errors
    /// A negative GNTST_*: bad gref, not granted or read-only, not RAM.
    pub fn pin(&self, gref: u32, domid: u16, write: bool) -> Result<u64, i16> {
        let at = u64::from(gref) * size_of::<GrantEntryV1>() as u64;
        let (Some(word), Some(frame)) = (self.table.word(at), self.table.word(at + 4)) else {
            return Err(GNTST_BAD_GNTREF);
        };
        self.lock().pin(gref, word, domid, write, || self.frame_offset(frame.load(Ordering::Acquire)))
    }

    /// Ends a pin.
    pub fn unpin(&self, gref: u32, write: bool) {
        if let Some(word) = self.table.word(u64::from(gref) * size_of::<GrantEntryV1>() as u64) {
            self.lock().unpin(gref, word, write);
        }
    }

    /// How many entries are pinned.
    pub fn pinned(&self) -> usize {
        self.lock().len()
    }
}

#[cfg(test)]
#[path = "pvh_tests.rs"]
mod tests;

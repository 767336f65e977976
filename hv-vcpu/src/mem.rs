//! Guest-physical memory as this process sees it. One of the modules that hold `unsafe`.
//!
//! Guest RAM is one memfd, mapped in at most two pieces (below and above the hole under 4 GiB). Xen's own pages
//! (shared_info, grant-table frames) live in memory of their own ([`SharedPages`]); when the guest asks for one
//! at a guest frame inside RAM, it is mapped over the RAM there with `MAP_FIXED`, so KVM's memory slot shows it
//! without a change of slots. A frame outside of RAM gets a slot of its own (see `platform`).
//!
//! Guest memory changes under us at any time. So there are never references to it, only copies through raw
//! pointers and single atomic words; whatever is copied out is judged on the copy.
#![expect(unsafe_code, reason = "maps guest RAM and copies to and from it")]

use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

/// Bytes in a page (and in a grant-table frame).
pub const PAGE_SIZE: u64 = 4096;
/// Bytes in a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Why guest memory could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The range is not (wholly) memory.
    #[error("guest memory {gpa:#x}+{len:#x} does not exist; raise `memory`")]
    OutOfRange {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// The system refused a mapping.
    #[error("guest memory can't be mapped: {0}; free some memory or lower `memory`")]
    Map(#[from] nix::errno::Errno),
    /// A file could not be read into guest memory.
    #[error("{0}")]
    Read(#[from] std::io::Error),
}

/// A piece of address space mapped from a file, unmapped on drop.
struct Mapping {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory owned by this value; every access goes through raw copies or atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above; there are no references into it that could be aliased.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: impl AsFd, offset: u64, len: u64) -> Result<Self, MemError> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        let len = std::num::NonZeroUsize::new(len as usize).ok_or(nix::errno::Errno::EINVAL)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let addr = unsafe { mmap(None, len, prot, flags, file, offset as i64)? };
        Ok(Self { addr: addr.cast(), len: len.get() })
    }

    /// As [`Self::new`], at an address that lets the system use huge pages: each page that KVM has to look up and map by
    /// itself costs an exit of the guest. It is not asked to (see the README: a guest was seen to break with them).
    fn new_huge(file: impl AsFd, offset: u64, len: u64) -> Result<Self, MemError> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
        let room = usize::try_from(len).ok().and_then(|len| len.checked_add(HUGE_PAGE));
        let room = room.and_then(std::num::NonZeroUsize::new).ok_or(nix::errno::Errno::EINVAL)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let base = unsafe { mmap_anonymous(None, room, ProtFlags::PROT_NONE, flags)? }.cast::<u8>();
        let skip = base.as_ptr().align_offset(HUGE_PAGE);
        let (len, left) = (len as usize, HUGE_PAGE - skip);
        // SAFETY: skip + len + left is the size of the mapping above, so what is kept and what is given back are its
        // parts; nothing refers to either.
        let addr = unsafe {
            let addr = base.add(skip);
            libc::munmap(base.as_ptr().cast(), skip);
            libc::munmap(addr.add(len).as_ptr().cast(), left);
            addr
        };
        let map = Self { addr, len };
        map.replace(0, len as u64, file, offset)?;
        Ok(map)
    }

    /// Maps `file` at `offset` over `len` bytes at `at` of this mapping.
    fn replace(&self, at: u64, len: u64, file: impl AsFd, offset: u64) -> Result<(), MemError> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.len as u64);
        if !fits || !at.is_multiple_of(PAGE_SIZE) || len == 0 {
            return Err(MemError::OutOfRange { gpa: at, len });
        }
        // SAFETY: [at, at + len) lies inside of this mapping, which is ours; what it showed before stays alive in
        // its own file, and nobody holds a reference into it.
        let got = unsafe {
            libc::mmap(
                self.addr.as_ptr().add(at as usize).cast(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_fd().as_raw_fd(),
                offset as i64,
            )
        };
        if got == libc::MAP_FAILED { Err(nix::errno::Errno::last().into()) } else { Ok(()) }
    }

    fn ptr(&self, at: u64, len: usize) -> Option<*mut u8> {
        let end = usize::try_from(at).ok()?.checked_add(len)?;
        // SAFETY: at + len was just checked to lie inside of the mapping.
        (end <= self.len).then(|| unsafe { self.addr.as_ptr().add(at as usize) })
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Option<()> {
        let src = self.ptr(at, buf.len())?;
        // SAFETY: src..src+len is mapped; buf is ours and can't overlap a mapping that no reference points into.
        // The guest may change the bytes meanwhile: any mix of old and new is a value that we check later.
        unsafe { std::ptr::copy_nonoverlapping(src, buf.as_mut_ptr(), buf.len()) };
        Some(())
    }

    fn write(&self, at: u64, buf: &[u8]) -> Option<()> {
        let dst = self.ptr(at, buf.len())?;
        // SAFETY: as in `read`, in the other direction.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), dst, buf.len()) };
        Some(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and nothing refers to it any more.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.len) };
    }
}

macro_rules! atomics {
    ($($name:ident $ty:ty;)*) => {$(
        /// An atomic word at `at` bytes from the start; `None` outside of the memory or if not aligned.
        pub fn $name(&self, at: u64) -> Option<&$ty> {
            let ptr = self.ptr_for_atomic(at, size_of::<$ty>())?;
            if !ptr.cast::<$ty>().is_aligned() {
                return None;
            }
            // SAFETY: the word is mapped for as long as `self` lives, aligned, and shared only as an atomic.
            Some(unsafe { <$ty>::from_ptr(ptr.cast()) })
        }
    )*};
}

/// Pages that belong to Xen's side and can be shown to the guest: shared_info and grant-table frames.
pub struct SharedPages {
    file: File,
    map: Mapping,
}

impl SharedPages {
    /// Makes `pages` zeroed pages.
    pub fn new(name: &str, pages: u64) -> Result<Self, MemError> {
        let file = new_memfd(name, pages * PAGE_SIZE)?;
        Self::from_file(file, pages)
    }

    /// Uses the first `pages` pages of a memfd made by another.
    pub fn from_file(file: File, pages: u64) -> Result<Self, MemError> {
        if file.metadata()?.len() < pages * PAGE_SIZE {
            return Err(MemError::OutOfRange { gpa: 0, len: pages * PAGE_SIZE });
        }
        let map = Mapping::new(&file, 0, pages * PAGE_SIZE)?;
        Ok(Self { file, map })
    }

    /// The number of pages.
    pub fn pages(&self) -> u64 {
        self.map.len as u64 / PAGE_SIZE
    }

    /// The address in this process of page `page`, for KVM.
    pub fn hva(&self, page: u64) -> Option<u64> {
        Some(self.ptr_for_atomic(page.checked_mul(PAGE_SIZE)?, PAGE_SIZE as usize)? as u64)
    }

    /// Copies out of the pages.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> Option<()> {
        self.map.read(at, buf)
    }

    /// Copies into the pages.
    pub fn write(&self, at: u64, buf: &[u8]) -> Option<()> {
        self.map.write(at, buf)
    }

    fn ptr_for_atomic(&self, at: u64, len: usize) -> Option<*mut u8> {
        self.map.ptr(at, len)
    }

    atomics! {
        u8_at AtomicU8;
        u16_at AtomicU16;
        u64_at AtomicU64;
    }
}

/// A sealed memfd of `len` bytes.
fn new_memfd(name: &str, len: u64) -> Result<File, MemError> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(len)?;
    // Sealed against resizing: a mapping can then never fault beyond the end.
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// A piece of guest RAM.
struct Region {
    gpa: u64,
    len: u64,
    file_offset: u64,
    map: Mapping,
}

/// A page of [`SharedPages`] shown outside of RAM.
struct Extra {
    gpa: u64,
    addr: usize,
    len: u64,
}

/// Where a piece of RAM lies, for KVM's memory slots.
#[derive(Debug, Clone, Copy)]
pub struct RamPiece {
    /// Guest-physical start.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Address in this process.
    pub hva: u64,
}

/// Guest RAM and what is shown beside it.
pub struct GuestMemory {
    file: File,
    regions: Vec<Region>,
    /// Pages outside of RAM. The memory behind them is never unmapped while the guest lives.
    extra: Mutex<Vec<Extra>>,
}

impl GuestMemory {
    /// Guest RAM of its own, not shared with hv-core.
    pub fn anonymous(pieces: &[(u64, u64)]) -> Result<Self, MemError> {
        let total = pieces.iter().map(|&(_, len)| len).sum();
        Self::from_file(new_memfd("guest-ram", total)?, pieces)
    }

    /// Guest RAM from a memfd; `pieces` are (guest-physical start, length), laid out in the file one after another.
    pub fn from_file(file: File, pieces: &[(u64, u64)]) -> Result<Self, MemError> {
        let size = file.metadata()?.len();
        let mut regions = Vec::new();
        let mut file_offset = 0;
        for &(gpa, len) in pieces {
            if file_offset + len > size {
                return Err(MemError::OutOfRange { gpa, len });
            }
            let map = Mapping::new_huge(&file, file_offset, len)?;
            regions.push(Region { gpa, len, file_offset, map });
            file_offset += len;
        }
        Ok(Self { file, regions, extra: Mutex::new(Vec::new()) })
    }

    /// The pieces of RAM.
    pub fn pieces(&self) -> impl Iterator<Item = RamPiece> + '_ {
        self.regions.iter().map(|r| RamPiece { gpa: r.gpa, len: r.len, hva: r.map.addr.as_ptr() as u64 })
    }

    fn find(&self, gpa: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|r| {
            let at = gpa.checked_sub(r.gpa)?;
            (at < r.len).then_some((r, at))
        })
    }

    /// Whether the page at guest frame `gfn` is RAM.
    pub fn is_ram(&self, gfn: u64) -> bool {
        gfn.checked_mul(PAGE_SIZE).is_some_and(|gpa| self.find(gpa).is_some())
    }

    /// Copies out of guest memory.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemError> {
        let err = MemError::OutOfRange { gpa, len: buf.len() as u64 };
        if let Some((region, at)) = self.find(gpa) {
            return region.map.read(at, buf).ok_or(err);
        }
        let ptr = self.extra_ptr(gpa, buf.len()).ok_or(err)?;
        // SAFETY: `extra_ptr` checked the bounds, and such pages stay mapped for the guest's life.
        unsafe { std::ptr::copy_nonoverlapping(ptr, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    /// Copies into guest memory.
    pub fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), MemError> {
        let err = MemError::OutOfRange { gpa, len: buf.len() as u64 };
        if let Some((region, at)) = self.find(gpa) {
            return region.map.write(at, buf).ok_or(err);
        }
        let ptr = self.extra_ptr(gpa, buf.len()).ok_or(err)?;
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), ptr, buf.len()) };
        Ok(())
    }

    fn extra_ptr(&self, gpa: u64, len: usize) -> Option<*mut u8> {
        let extra = self.extra.lock().unwrap_or_else(|e| e.into_inner());
        extra.iter().find_map(|x| {
            let at = gpa.checked_sub(x.gpa)?;
            let end = at.checked_add(len as u64)?;
            (end <= x.len).then(|| (x.addr + at as usize) as *mut u8)
        })
    }

    fn ptr_for_atomic(&self, gpa: u64, len: usize) -> Option<*mut u8> {
        match self.find(gpa) {
            Some((region, at)) => region.map.ptr(at, len),
            None => self.extra_ptr(gpa, len),
        }
    }

    atomics! {
        u8_at AtomicU8;
        u32_at AtomicU32;
        u64_at AtomicU64;
    }

    /// Reads `len` bytes of `file` from its start to guest memory at `gpa`.
    pub fn load_file(&self, gpa: u64, file: &File, len: u64) -> Result<(), MemError> {
        use std::os::unix::fs::FileExt;
        let mut buf = vec![0; 64 << 10];
        let mut done = 0;
        while done < len {
            let n = buf.len().min((len - done) as usize);
            file.read_exact_at(&mut buf[..n], done)?;
            self.write(gpa + done, &buf[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    /// Shows `page` of `pages` at guest frame `gfn`, which has to be RAM.
    pub fn overlay(&self, gfn: u64, pages: &SharedPages, page: u64) -> Result<(), MemError> {
        let (region, at) = self.find_frame(gfn)?;
        if page >= pages.pages() {
            return Err(MemError::OutOfRange { gpa: page * PAGE_SIZE, len: PAGE_SIZE });
        }
        region.map.replace(at, PAGE_SIZE, &pages.file, page * PAGE_SIZE)
    }

    /// Shows RAM again at guest frame `gfn`.
    pub fn remove_overlay(&self, gfn: u64) -> Result<(), MemError> {
        let (region, at) = self.find_frame(gfn)?;
        region.map.replace(at, PAGE_SIZE, &self.file, region.file_offset + at)
    }

    /// Gives the memory behind guest frame `gfn` back to the system; it reads as zero afterwards.
    pub fn discard(&self, gfn: u64) -> Result<(), MemError> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let (region, at) = self.find_frame(gfn)?;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, (region.file_offset + at) as i64, PAGE_SIZE as i64)?;
        Ok(())
    }

    fn find_frame(&self, gfn: u64) -> Result<(&Region, u64), MemError> {
        let gpa = gfn.checked_mul(PAGE_SIZE);
        gpa.and_then(|gpa| self.find(gpa))
            .ok_or(MemError::OutOfRange { gpa: gfn.wrapping_mul(PAGE_SIZE), len: PAGE_SIZE })
    }

    /// Notes that a page of `pages` is shown at `gfn` outside of RAM (its KVM slot is the caller's).
    pub fn add_extra(&self, gfn: u64, pages: &'static SharedPages, page: u64) -> Result<(), MemError> {
        let gpa = gfn.wrapping_mul(PAGE_SIZE);
        let addr = pages.hva(page).ok_or(MemError::OutOfRange { gpa, len: PAGE_SIZE })? as usize;
        let mut extra = self.extra.lock().unwrap_or_else(|e| e.into_inner());
        extra.push(Extra { gpa, addr, len: PAGE_SIZE });
        Ok(())
    }

    /// Forgets a page noted by [`Self::add_extra`].
    pub fn remove_extra(&self, gfn: u64) {
        let mut extra = self.extra.lock().unwrap_or_else(|e| e.into_inner());
        extra.retain(|x| x.gpa != gfn.wrapping_mul(PAGE_SIZE));
    }
}

/// Gives freed heap memory back to the system, so that an idle runner stays small.
pub fn trim_heap() {
    // SAFETY: malloc_trim has no preconditions.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn ram_lies_where_huge_pages_can() {
        let mem = GuestMemory::anonymous(&[(0, 5 << 20), (0x1_0000_0000, 4096)]).unwrap();
        for piece in mem.pieces() {
            assert_eq!(piece.hva % HUGE_PAGE as u64, 0);
            mem.write(piece.gpa + piece.len - 4, b"last").unwrap();
        }
    }

    #[test]
    fn overlay_shows_and_hides_a_page() {
        let mem = GuestMemory::anonymous(&[(0, 0x10000), (0x1_0000_0000, 0x4000)]).unwrap();
        let pages = SharedPages::new("test", 2).unwrap();
        mem.write(0x3000, b"ram").unwrap();
        pages.write(PAGE_SIZE, b"xen").unwrap();
        mem.overlay(3, &pages, 1).unwrap();
        let mut got = [0; 3];
        mem.read(0x3000, &mut got).unwrap();
        assert_eq!(&got, b"xen");
        mem.u64_at(0x3008).unwrap().store(7, Ordering::SeqCst);
        assert_eq!(pages.u64_at(PAGE_SIZE + 8).unwrap().load(Ordering::SeqCst), 7);
        mem.remove_overlay(3).unwrap();
        mem.read(0x3000, &mut got).unwrap();
        assert_eq!(&got, b"ram");
        mem.discard(3).unwrap();
        mem.read(0x3000, &mut got).unwrap();
        assert_eq!(&got, &[0; 3]);
        assert!(mem.overlay(3, &pages, 2).is_err());
        assert!(mem.overlay(u64::MAX, &pages, 0).is_err());
        mem.write(0x1_0000_3fff, &[1]).unwrap();
        assert!(mem.write(0x1_0000_3fff, &[1, 2]).is_err());
        assert!(mem.read(0xffff, &mut [0; 2]).is_err());
        assert!(mem.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(mem.u64_at(0x3001).is_none());
        assert!(mem.u64_at(0xfffc).is_none());
    }
}

//! Opening a raw disk, and the fence.
//!
//! I/O of a dead incarnation outlives it: io_uring's exit work is asynchronous, and its requests pin the open file description
//! they were made on. Every incarnation therefore gets a description of its own (hv-core opens the path afresh at each
//! `ResourceOpen` and keeps none) and locks it exclusively before it replays, serves or reuses anything: while anything of the
//! predecessor is in flight, its description lives, and so does its lock.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};

use super::attachment::{Buffers, Discard, Disk, DiskQueue, Fence, Geometry};
use super::uring::UringQueue;
use crate::request::SECTOR;

/// Why there is no disk to serve. One line, for the device's error node.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It cannot be opened.
    #[error("disk cannot be opened: {0}; check the path in the host file")]
    Open(String),
    /// Someone else holds it.
    #[error("disk is in use by another process; stop that, or use another disk")]
    InUse,
    /// No sector fits.
    #[error("disk is too small: {0} bytes, and a sector has {1}; use a larger one")]
    TooSmall(u64, u32),
    /// Neither file nor block device.
    #[error("disk is neither a regular file nor a block device")]
    Kind,
    /// The lock failed otherwise.
    #[error("disk cannot be locked: {0}")]
    Lock(io::Error),
    /// It takes `O_DIRECT`, which cannot be taken back, but not sectors of this size.
    #[error(
        "direct I/O in sectors of {0} bytes fails on this storage; set cache = \"writeback\" or sector_size = 4096"
    )]
    Direct(usize),
}

/// How the host's page cache is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Cache {
    /// Not at all (`O_DIRECT`), if the storage can; flushes reach the medium.
    #[default]
    None,
    /// Reads and writes go through it; flushes reach the medium.
    Writeback,
    /// Reads come from it; each write is on the medium when it is answered.
    Writethrough,
}

/// An open, fenced raw disk.
#[derive(Debug)]
pub struct Source {
    /// The only descriptor of the only description that this incarnation has. Holds the lock.
    file: Flock<File>,
    sectors: AtomicU64,
    /// All but `sectors`.
    geometry: Geometry,
    cache: Cache,
    /// Whether it is open with `O_DIRECT`.
    direct: bool,
    drain: Duration,
}

/// Fences `fd` and looks at what it is. Waits at most `patience` for a predecessor's I/O to drain. A read-only disk is locked
/// shared: several may serve it, and none has writes to fence.
///
/// # Errors
/// [`SourceError`].
pub fn open(fd: OwnedFd, read_only: bool, cache: Cache, patience: Duration) -> Result<Source, SourceError> {
    open_sectors(fd, read_only, cache, None, patience)
}

/// The same with logical sectors of `wanted` bytes (512 or 4096) for the guest; `None`: a device's own, and 512 for a file.
///
/// # Errors
/// [`SourceError`].
pub fn open_sectors(
    fd: OwnedFd,
    read_only: bool,
    cache: Cache,
    wanted: Option<u32>,
    patience: Duration,
) -> Result<Source, SourceError> {
    let began = Instant::now();
    let kind = SFlag::from_bits_truncate(fstat(&fd).map_err(|e| SourceError::Open(e.to_string()))?.st_mode)
        & SFlag::S_IFMT;
    if kind != SFlag::S_IFREG && kind != SFlag::S_IFBLK {
        return Err(SourceError::Kind);
    }
    let how = if read_only { FlockArg::LockSharedNonblock } else { FlockArg::LockExclusiveNonblock };
    let mut file = File::from(fd);
    let mut pause = Duration::from_micros(100);
    let file = loop {
        match Flock::lock(file, how) {
            Ok(locked) => break locked,
            Err((back, Errno::EWOULDBLOCK)) => {
                if began.elapsed() >= patience {
                    return Err(SourceError::InUse);
                }
                file = back;
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(2));
            }
            Err((_, e)) => return Err(SourceError::Lock(e.into())),
        }
    };
    let drain = began.elapsed();
    let bytes = size(&file).map_err(|e| SourceError::Open(e.to_string()))?;
    let block = kind == SFlag::S_IFBLK;
    let own = if block { rustix::fs::ioctl_blksszget(&*file).unwrap_or(512) } else { 512 };
    let logical = wanted.unwrap_or(if own == 4096 { own } else { 512 });
    let sectors = whole_sectors(bytes, logical);
    if sectors == 0 {
        return Err(SourceError::TooSmall(bytes, logical));
    }
    let direct = cache == Cache::None && make_direct(&file, logical as usize)?;
    if cache == Cache::None && !direct {
        tracing::warn!(
            logical,
            "the storage has no direct I/O for sectors of this size: the page cache is used"
        );
    }
    let physical = physical_sector(&file, block, sectors * SECTOR).max(logical);
    let secure = !read_only && overwrites_in_place(&*file, block);
    let discard = (!read_only).then_some(Discard { granularity: physical, alignment: 0, secure });
    let geometry = Geometry { sectors, read_only, logical, physical, discard };
    Ok(Source { file, sectors: sectors.into(), geometry, cache, direct, drain })
}

/// Units of 512 bytes of as many logical sectors as fit.
pub(super) fn whole_sectors(bytes: u64, logical: u32) -> u64 {
    bytes / u64::from(logical) * (u64::from(logical) / SECTOR)
}

/// Whether bytes written over others take their place on the medium, as far as the host can tell: devices, and file systems that do not
/// copy on write. What a flash translation layer does below is not seen.
pub(super) fn overwrites_in_place(file: impl AsFd, block: bool) -> bool {
    // linux/magic.h: ext2, ext3 and ext4 share one.
    const EXT4: i64 = 0xef53;
    const TMPFS: i64 = 0x0102_1994;
    block || rustix::fs::fstatfs(file).is_ok_and(|fs| [EXT4, TMPFS].contains(&(fs.f_type)))
}

/// Works for block devices too, where fstat tells no size.
fn size(file: &File) -> io::Result<u64> {
    (&mut &*file).seek(SeekFrom::End(0))
}

/// Whether the storage itself says that direct I/O is in sectors of this size or smaller; `None`: it does not say.
fn says_direct(file: &File, sector: usize) -> Option<bool> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let said = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let told = StatxFlags::from_bits_retain(said.stx_mask).contains(StatxFlags::DIOALIGN);
    let fits = |unit: u32| unit > 0 && sector.is_multiple_of(unit as usize);
    told.then_some(fits(said.stx_dio_offset_align) && fits(said.stx_dio_mem_align))
}

/// Switches the description to `O_DIRECT` and tries it: a read of one sector that is aligned to no more than its size.
///
/// # Errors
/// It does not work and cannot be taken back: domains may set that flag of a file, but not clear it (hv-core's `seccomp`).
fn make_direct(file: &File, sector: usize) -> Result<bool, SourceError> {
    let Ok(flags) = fcntl(file, FcntlArg::F_GETFL) else { return Ok(false) };
    let flags = OFlag::from_bits_retain(flags);
    if says_direct(file, sector) == Some(false)
        || fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)).is_err()
    {
        return Ok(false);
    }
    let mut memory = vec![0u8; 8192 + 2 * sector];
    // Aligned to the sector and to nothing more; with one sector in the file its first is read.
    let start = memory.as_ptr().align_offset(8192) + sector;
    let offset = if size(file).is_ok_and(|bytes| bytes >= 2 * sector as u64) { sector as u64 } else { 0 };
    let fine = matches!(file.read_at(&mut memory[start..start + sector], offset), Ok(n) if n == sector);
    if !fine && fcntl(file, FcntlArg::F_SETFL(flags)).is_err() {
        return Err(SourceError::Direct(sector));
    }
    Ok(fine)
}

/// Bytes that the storage writes at once without reading: what guests should align to.
fn physical_sector(file: &File, block: bool, bytes: u64) -> u32 {
    let told = if block {
        rustix::fs::ioctl_blkpbszget(file).unwrap_or(512)
    } else {
        file.metadata().map_or(512, |m| m.blksize().min(4096) as u32)
    };
    // blkif.h: the disk's size is a multiple of it.
    if told.is_power_of_two() && told >= 512 && bytes.is_multiple_of(told.into()) { told } else { 512 }
}

impl Source {
    /// For the descriptor alone.
    pub(super) fn fd(&self) -> &impl AsFd {
        &*self.file
    }

    /// Whether each write is to be on the medium when it completes.
    pub(super) fn write_through(&self) -> bool {
        self.cache == Cache::Writethrough
    }

    /// Whether the page cache is passed by.
    pub fn direct(&self) -> bool {
        self.direct
    }
}

impl Disk for Source {
    fn geometry(&self) -> Geometry {
        Geometry { sectors: self.sectors.load(Relaxed), ..self.geometry }
    }

    fn fence(&self) -> Fence {
        let how = if self.geometry.read_only {
            "flock, shared: there are no writes"
        } else {
            "flock: I/O in flight pins the dead owner's lock"
        };
        Fence { how, drain: self.drain }
    }

    fn look_again(&self) -> io::Result<bool> {
        let sectors = whole_sectors(size(&self.file)?, self.geometry.logical);
        if sectors == 0 {
            return Ok(false);
        }
        Ok(self.sectors.swap(sectors, Relaxed) != sectors)
    }

    fn grow(&self, bytes: u64) -> io::Result<()> {
        let now = size(&self.file)?;
        match (self.file.metadata()?.is_file(), bytes >= now) {
            (_, false) => Err(io::ErrorKind::InvalidInput.into()),
            (false, _) if bytes != now => Err(io::ErrorKind::Unsupported.into()),
            (true, _) if bytes > now => self.file.set_len(bytes).and_then(|()| self.file.sync_all()),
            _ => Ok(()),
        }
    }

    fn settle(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn queue(
        self: Arc<Self>,
        buffers: Arc<dyn Buffers>,
        depth: u32,
    ) -> io::Result<Box<dyn DiskQueue + Send>> {
        Ok(Box::new(UringQueue::new(self, buffers, depth)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn reopen(path: &std::path::Path) -> OwnedFd {
        File::options().read(true).write(true).open(path).unwrap().into()
    }

    fn plain(path: &std::path::Path, read_only: bool, patience: Duration) -> Result<Source, SourceError> {
        open(reopen(path), read_only, Cache::None, patience)
    }

    #[test]
    fn a_second_owner_waits_and_is_told() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[0; 5000]).unwrap();
        let first = plain(file.path(), false, Duration::ZERO).unwrap();
        assert_eq!(first.geometry().sectors, 9);
        assert_eq!(first.geometry().physical, 512, "the size is no multiple of more");
        let busy = plain(file.path(), false, Duration::from_millis(5));
        assert!(matches!(busy, Err(SourceError::InUse)));
        assert!(matches!(plain(file.path(), true, Duration::ZERO), Err(SourceError::InUse)));
        let path = file.path().to_owned();
        let (says, hears) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || {
            says.send(()).unwrap();
            plain(&path, false, Duration::from_secs(5))
        });
        hears.recv().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        drop(first);
        let second = waiter.join().unwrap().unwrap();
        assert!(second.fence().drain >= Duration::from_millis(10));
    }

    #[test]
    fn readers_share() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[0; 512]).unwrap();
        let _a = plain(file.path(), true, Duration::ZERO).unwrap();
        let _b = plain(file.path(), true, Duration::ZERO).unwrap();
    }

    #[test]
    fn too_small_and_not_a_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(plain(file.path(), false, Duration::ZERO), Err(SourceError::TooSmall(0, 512))));
        let null = File::open("/dev/null").unwrap().into();
        assert!(matches!(open(null, false, Cache::None, Duration::ZERO), Err(SourceError::Kind)));
    }

    #[test]
    fn the_cache_is_used_as_asked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 16).unwrap();
        for cache in [Cache::None, Cache::Writeback, Cache::Writethrough] {
            let source = open(reopen(file.path()), false, cache, Duration::ZERO).unwrap();
            let flags = fcntl(&*source.file, FcntlArg::F_GETFL).unwrap();
            let direct = OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT);
            assert_eq!(direct, source.direct());
            if cache != Cache::None {
                assert!(!direct);
            } else if !direct {
                println!("the file system of temporary files has no direct I/O");
            }
        }
    }

    #[test]
    fn sectors_of_4096_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let four = |bytes| {
            file.as_file().set_len(bytes).unwrap();
            open_sectors(reopen(file.path()), false, Cache::None, Some(4096), Duration::ZERO)
        };
        assert!(matches!(four(4095), Err(SourceError::TooSmall(4095, 4096))));
        let source = four(3 * 4096 + 512).unwrap();
        let geometry = source.geometry();
        assert_eq!((geometry.sectors, geometry.logical, geometry.physical), (24, 4096, 4096));
        file.as_file().set_len(4 * 4096 + 4095).unwrap();
        assert!(source.look_again().unwrap());
        assert_eq!(source.geometry().sectors, 32, "whole ones");
    }

    /// A secure discard writes over what is there, so the file keeps its blocks; a plain one gives them back.
    #[test]
    fn a_secure_discard_overwrites_and_a_plain_one_frees() {
        use crate::disk::attachment::{BUFFER_CHUNK, DiskRequest, Operation, Tag};
        const LEN: u64 = 3 << 20;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![0xee; LEN as usize + 4096]).unwrap();
        file.as_file().sync_all().unwrap();
        let source = Arc::new(plain(file.path(), false, Duration::ZERO).unwrap());
        let secure = source.geometry().discard.unwrap().secure;
        let blocks = || file.as_file().metadata().unwrap().blocks();
        let (mem, _) = domain_kit::mem::SharedMem::create("b", BUFFER_CHUNK).unwrap();
        let mut queue = source.queue(Arc::new(mem), 4).unwrap();
        let mut discard = |secure| {
            let operation = Operation::Discard { secure };
            queue.submit(Tag(0), &DiskRequest { operation, offset: 512, len: LEN, buffer: 0 });
            let mut done = Vec::new();
            while done.is_empty() {
                queue.wait(&[], Some(Duration::from_secs(5))).unwrap();
                queue.completed(&mut done);
            }
            file.as_file().sync_all().unwrap();
            done[0].1
        };
        let before = blocks();
        if !secure {
            println!("the file system of temporary files may copy on write: secure discards are refused");
            assert_eq!(discard(true), Err(crate::disk::attachment::DiskError(Errno::EOPNOTSUPP as i32)));
            return;
        }
        assert_eq!(discard(true), Ok(()));
        assert_eq!(blocks(), before);
        let bytes = std::fs::read(file.path()).unwrap();
        assert!(bytes[..512].iter().chain(&bytes[512 + LEN as usize..]).all(|b| *b == 0xee));
        assert!(bytes[512..512 + LEN as usize].iter().all(|b| *b == 0));
        assert_eq!(discard(false), Ok(()));
        assert!(blocks() < before / 2, "{} of {before} blocks left", blocks());
    }

    #[test]
    fn growth_is_seen() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 16).unwrap();
        let source = plain(file.path(), false, Duration::ZERO).unwrap();
        assert!(!source.look_again().unwrap());
        file.as_file().set_len(1 << 17).unwrap();
        assert!(source.look_again().unwrap());
        assert_eq!(source.geometry().sectors, 256);
    }
}

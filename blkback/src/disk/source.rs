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
    #[error("disk is too small: {0} bytes, and a sector has 512; use a larger one")]
    TooSmall(u64),
    /// Neither file nor block device.
    #[error("disk is neither a regular file nor a block device")]
    Kind,
    /// The lock failed otherwise.
    #[error("disk cannot be locked: {0}")]
    Lock(io::Error),
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
    let sectors = bytes / SECTOR;
    if sectors == 0 {
        return Err(SourceError::TooSmall(bytes));
    }
    let direct = cache == Cache::None && make_direct(&file);
    if cache == Cache::None && !direct {
        tracing::warn!("the storage has no direct I/O for 512-byte sectors: the page cache is used");
    }
    let block = kind == SFlag::S_IFBLK;
    let physical = physical_sector(&file, block, bytes);
    let discard = (!read_only).then_some(Discard { granularity: physical, alignment: 0, secure: false });
    let geometry = Geometry { sectors, read_only, logical: 512, physical, discard };
    Ok(Source { file, sectors: sectors.into(), geometry, cache, direct, drain })
}

/// Works for block devices too, where fstat tells no size.
fn size(file: &File) -> io::Result<u64> {
    (&mut &*file).seek(SeekFrom::End(0))
}

/// Switches the description to `O_DIRECT` and tries it: a read of one 512-byte sector that is aligned to no more than that.
fn make_direct(file: &File) -> bool {
    let Ok(flags) = fcntl(file, FcntlArg::F_GETFL) else { return false };
    let flags = OFlag::from_bits_retain(flags);
    if fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)).is_err() {
        return false;
    }
    let sector = SECTOR as usize;
    let mut memory = vec![0u8; 8192 + sector];
    // Aligned to 512 and to nothing more; with one sector in the file its first is read.
    let start = memory.as_ptr().align_offset(4096) + sector;
    let offset = if size(file).is_ok_and(|bytes| bytes >= 2 * SECTOR) { SECTOR } else { 0 };
    let fine = matches!(file.read_at(&mut memory[start..start + sector], offset), Ok(n) if n == sector);
    if !fine && let Err(error) = fcntl(file, FcntlArg::F_SETFL(flags)) {
        tracing::error!(%error, "O_DIRECT cannot be taken back");
    }
    fine
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
        let sectors = size(&self.file)? / SECTOR;
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
        Ok(Box::new(UringQueue::new(self, buffers, depth)?))
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
        assert!(matches!(plain(file.path(), false, Duration::ZERO), Err(SourceError::TooSmall(0))));
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

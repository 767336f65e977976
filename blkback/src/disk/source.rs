//! Opening the disk, and the fence.
//!
//! I/O of a dead incarnation outlives it: io_uring's exit work is asynchronous, and its requests pin the open file description
//! they were made on. Every incarnation therefore gets a description of its own (hv-core opens the path afresh at each
//! `ResourceOpen` and keeps none) and locks it exclusively before it replays, serves or reuses anything: while anything of the
//! predecessor is in flight, its description lives, and so does its lock.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{SFlag, fstat};

use crate::request::{DiskShape, SECTOR};

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

/// An open, fenced disk.
#[derive(Debug)]
pub struct Source {
    /// The only descriptor of the only description that this incarnation has. Holds the lock.
    pub file: Flock<File>,
    /// What requests are judged by.
    pub shape: DiskShape,
    /// How long the fence took: the drain of the predecessor's I/O.
    pub drain: Duration,
}

/// Fences `fd` and looks at what it is. Waits at most `patience` for a predecessor's I/O to drain. A read-only disk is locked
/// shared: several may serve it, and none has writes to fence.
///
/// # Errors
/// [`SourceError`].
pub fn open(fd: OwnedFd, read_only: bool, patience: Duration) -> Result<Source, SourceError> {
    let began = Instant::now();
    let kind = SFlag::from_bits_truncate(fstat(&fd).map_err(|e| SourceError::Open(e.to_string()))?.st_mode)
        & SFlag::S_IFMT;
    if kind != SFlag::S_IFREG && kind != SFlag::S_IFBLK {
        return Err(SourceError::Kind);
    }
    let how = if read_only { FlockArg::LockSharedNonblock } else { FlockArg::LockExclusiveNonblock };
    let mut file = File::from(fd);
    let mut pause = Duration::from_micros(100);
    let mut file = loop {
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
    // Works for block devices too, where fstat tells no size.
    let bytes = file.seek(SeekFrom::End(0)).map_err(|e| SourceError::Open(e.to_string()))?;
    let sectors = bytes / SECTOR;
    if sectors == 0 {
        return Err(SourceError::TooSmall(bytes));
    }
    Ok(Source { file, shape: DiskShape { sectors, read_only }, drain })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn reopen(path: &std::path::Path) -> OwnedFd {
        File::options().read(true).write(true).open(path).unwrap().into()
    }

    #[test]
    fn a_second_owner_waits_and_is_told() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[0; 5000]).unwrap();
        let first = open(reopen(file.path()), false, Duration::ZERO).unwrap();
        assert_eq!(first.shape.sectors, 9);
        let busy = open(reopen(file.path()), false, Duration::from_millis(5));
        assert!(matches!(busy, Err(SourceError::InUse)));
        assert!(matches!(open(reopen(file.path()), true, Duration::ZERO), Err(SourceError::InUse)));
        let path = file.path().to_owned();
        let waiter = std::thread::spawn(move || open(reopen(&path), false, Duration::from_secs(5)));
        std::thread::sleep(Duration::from_millis(20));
        drop(first);
        let second = waiter.join().unwrap().unwrap();
        assert!(second.drain >= Duration::from_millis(10));
    }

    #[test]
    fn readers_share() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[0; 512]).unwrap();
        let _a = open(reopen(file.path()), true, Duration::ZERO).unwrap();
        let _b = open(reopen(file.path()), true, Duration::ZERO).unwrap();
    }

    #[test]
    fn too_small_and_not_a_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(open(reopen(file.path()), false, Duration::ZERO), Err(SourceError::TooSmall(0))));
        let null = File::open("/dev/null").unwrap().into();
        assert!(matches!(open(null, false, Duration::ZERO), Err(SourceError::Kind)));
    }
}

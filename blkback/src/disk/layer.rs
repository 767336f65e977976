//! What disks are made of: layers of bytes, one on top of the other.
//!
//! ```text
//!   guest ─► qcow2 ─► luks ─► file        the disk
//!              └────► qcow2 ─► file       its backing file, approved by dom0, read-only
//! ```
//! A layer is called from several threads at once. Its calls block; [`super::pool`] gives them threads.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use nix::fcntl::{FallocateFlags, Flock, fallocate};

use super::source::overwrites_in_place;

/// A run of bytes and whether this layer itself has them (a backing file's bytes are not its own).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes from the asked offset on that are alike.
    pub len: u64,
    /// Here, as data or as zeroes; if not, in the backing file.
    pub own: bool,
}

/// Bytes that can be read and, mostly, written.
pub trait Layer: Send + Sync + std::fmt::Debug {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// True if there is not a byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads. Beyond the end there are zeroes.
    ///
    /// # Errors
    /// The medium's; `InvalidData` if what holds the layer's bytes together is damaged.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes. Once it is answered, no kill of this process loses it; [`Layer::flush`] protects it from power failures.
    ///
    /// # Errors
    /// As for [`Layer::read`], and `StorageFull`.
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// Reads as zeroes afterwards.
    ///
    /// # Errors
    /// As for [`Layer::write`].
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The bytes are not needed any more: they read as before or as zeroes afterwards.
    ///
    /// # Errors
    /// As for [`Layer::write`].
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// What was answered before is on the medium afterwards.
    ///
    /// # Errors
    /// The medium's. Nothing is promised then.
    fn flush(&self) -> io::Result<()>;

    /// Makes it longer; the new bytes are zeroes. Shorter is refused.
    ///
    /// # Errors
    /// As for [`Layer::write`]; `Unsupported` if it has the length that it has.
    fn grow(&self, len: u64) -> io::Result<()>;

    /// Flushes, and leaves the medium as tidy as it can be: at the end of service.
    ///
    /// # Errors
    /// As for [`Layer::flush`].
    fn settle(&self) -> io::Result<()> {
        self.flush()
    }

    /// Bytes written over others take their place on the medium: see [`overwrites_in_place`].
    fn overwrites(&self) -> bool {
        false
    }

    /// Writing beyond the end makes it longer, and what is skipped reads as zeroes.
    fn zero_beyond_end(&self) -> bool {
        false
    }

    /// What is at `offset`; at most `len` bytes are looked at.
    ///
    /// # Errors
    /// As for [`Layer::read`].
    fn extent(&self, _offset: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent { len, own: true })
    }
}

/// A file or a block device, locked.
#[derive(Debug)]
pub struct FileLayer {
    file: Flock<File>,
    len: AtomicU64,
    device: bool,
    overwrites: bool,
    no_punch: AtomicBool,
}

impl FileLayer {
    /// `bytes` is its length as found at opening; a device keeps it.
    pub fn new(file: Flock<File>, bytes: u64, device: bool) -> Self {
        let overwrites = overwrites_in_place(&*file, device);
        FileLayer { file, len: bytes.into(), device, overwrites, no_punch: false.into() }
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = (signed(offset)?, signed(len)?);
        Ok(fallocate(self.file.as_fd(), how, offset, len)?)
    }
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Layer for FileLayer {
    fn len(&self) -> u64 {
        self.len.load(Relaxed)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match self.file.read_at(&mut into[done..], offset + done as u64) {
                Ok(0) => {
                    into[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(from.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        if self.device && end > self.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(from, offset)?;
        self.len.fetch_max(end, Relaxed);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if self.fallocate(punch, offset, len).is_err() && self.fallocate(zero, offset, len).is_err() {
            let zeroes = vec![0; len.min(1 << 20) as usize];
            let mut done = 0;
            while done < len {
                let n = (len - done).min(zeroes.len() as u64) as usize;
                self.write(offset + done, &zeroes[..n])?;
                done += n as u64;
            }
        }
        // A hole beyond the end is no length.
        if !self.device && offset + len > self.len() {
            self.grow(offset + len)?;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 || self.no_punch.load(Relaxed) {
            return Ok(());
        }
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if self.fallocate(punch, offset, len).is_err() {
            // Not of this file system or device: a hint that is not taken.
            self.no_punch.store(true, Relaxed);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn overwrites(&self) -> bool {
        self.overwrites
    }

    fn zero_beyond_end(&self) -> bool {
        !self.device
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        if self.device {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if len < self.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.file.set_len(len)?;
        self.len.fetch_max(len, Relaxed);
        Ok(())
    }
}

/// No medium: a drive that is empty.
#[derive(Debug)]
pub struct Empty;

impl Layer for Empty {
    fn len(&self) -> u64 {
        0
    }
    fn read(&self, _offset: u64, _into: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn write(&self, _offset: u64, _from: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn write_zeroes(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn grow(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

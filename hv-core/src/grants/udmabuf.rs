//! dma-bufs of exactly the granted pages, and the proof that one is gone.
//!
//! A udmabuf cannot be taken back from who holds it. So a pin ends only when the kernel no longer knows the dma-buf: its
//! inode is not in debugfs' `dma_buf/bufinfo`. Without debugfs the holder's open files and mappings are looked through,
//! which does not see a descriptor in flight in a socket; hv-core reports that debugfs is missing.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use hv_abi::PAGE_SIZE;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};

use crate::sys::{self, UdmabufItem};

/// The host's udmabuf device and dma-buf list.
#[derive(Debug)]
pub struct DmaBufs {
    device: Option<File>,
    debugfs: Option<OwnedFd>,
}

/// Joins pages (byte offsets) that follow each other.
pub fn runs(pages: &[u64]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &page in pages {
        match runs.last_mut() {
            Some((start, len)) if *start + *len == page => *len += PAGE_SIZE as u64,
            _ => runs.push((page, PAGE_SIZE as u64)),
        }
    }
    runs
}

/// True if `bufinfo` lists a dma-buf with this inode. Columns: size, flags, mode, count, exporter, inode, name.
fn lists(bufinfo: &str, ino: u64) -> bool {
    bufinfo.lines().any(|line| {
        let mut columns = line.split_whitespace();
        let size = columns.next();
        size.is_some_and(|s| s.bytes().all(|b| b.is_ascii_digit()))
            && columns.nth(4).and_then(|c| c.parse::<u64>().ok()) == Some(ino)
    })
}

impl DmaBufs {
    /// Opens what there is.
    pub fn open() -> DmaBufs {
        let device = File::options().read(true).write(true).open("/dev/udmabuf").ok();
        // An own instance, attached nowhere: no mount of the host's is needed or changed.
        let debugfs = sys::detached_fs(c"debugfs").ok();
        let mut bufs = DmaBufs { device, debugfs };
        if bufs.bufinfo().is_err() {
            bufs.debugfs = None;
        }
        bufs
    }

    /// True if grants of PVH domains can be mapped.
    pub fn available(&self) -> bool {
        self.device.is_some()
    }

    /// True if the kernel tells which dma-bufs there are.
    pub fn listed(&self) -> bool {
        self.debugfs.is_some()
    }

    fn bufinfo(&self) -> io::Result<String> {
        let debugfs = self.debugfs.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let fd = openat(debugfs, "dma_buf/bufinfo", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text)?;
        Ok(text)
    }

    /// A dma-buf of these pages of `ram` (byte offsets), in this order.
    ///
    /// # Errors
    /// `Unsupported` without a device; else as the driver.
    pub fn create(&self, ram: &OwnedFd, pages: &[u64]) -> io::Result<OwnedFd> {
        let device = self.device.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let memfd = ram.as_raw_fd() as u32;
        let items: Vec<UdmabufItem> = runs(pages)
            .into_iter()
            .map(|(offset, size)| UdmabufItem { memfd, pad: 0, offset, size })
            .collect();
        sys::udmabuf_create(device.as_fd(), &items)
    }

    /// Whether the dma-buf of this inode is gone; `holder` is the only process that was ever given it, if it lives.
    pub fn gone(&self, ino: u64, holder: Option<i32>) -> bool {
        if let Ok(text) = self.bufinfo() {
            return !lists(&text, ino);
        }
        match holder {
            None => true,
            Some(pid) => !holds(pid, ino).unwrap_or(true),
        }
    }
}

/// The inode of a dma-buf.
pub fn inode(fd: impl AsFd) -> nix::Result<u64> {
    Ok(fstat(fd)?.st_ino)
}

/// Whether a process has a dma-buf open or mapped. A process that is gone holds nothing.
fn holds(pid: i32, ino: u64) -> io::Result<bool> {
    let gone_is_false = |e: io::Error| if e.kind() == io::ErrorKind::NotFound { Ok(false) } else { Err(e) };
    let listing = match std::fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(listing) => listing,
        Err(e) => return gone_is_false(e),
    };
    for entry in listing {
        let path = entry?.path();
        let is_dmabuf = std::fs::read_link(&path)
            .is_ok_and(|l| l.as_os_str().as_encoded_bytes().starts_with(b"/dmabuf:"));
        if is_dmabuf && std::fs::metadata(&path).is_ok_and(|m| m.ino() == ino) {
            return Ok(true);
        }
    }
    match std::fs::read_to_string(format!("/proc/{pid}/maps")) {
        Ok(maps) => Ok(maps.lines().any(|line| maps_inode(line) == Some(ino) && line.contains("/dmabuf:"))),
        Err(e) => gone_is_false(e),
    }
}

/// The inode column of a line of /proc/PID/maps.
fn maps_inode(line: &str) -> Option<u64> {
    line.split_whitespace().nth(4)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_pages_become_one_run_in_order() {
        let p = PAGE_SIZE as u64;
        assert_eq!(runs(&[0, p, 2 * p, 9 * p, 8 * p]), [(0, 3 * p), (9 * p, p), (8 * p, p)]);
        assert_eq!(runs(&[p, p]), [(p, p), (p, p)], "the same page twice stays two pages");
        assert!(runs(&[]).is_empty());
    }

    #[test]
    fn bufinfo_is_read_by_column() {
        let text = "\nDma-buf Objects:\nsize    \tflags   \tmode    \tcount   \texp_name\tino     \tname\n\
            00131072\t00000002\t00080007\t00000002\tudmabuf\t00004711\t<none>\n\
            \tAttached Devices:\nTotal 0 devices attached\n\n\nTotal 1 objects, 131072 bytes\n";
        assert!(lists(text, 4711));
        assert!(!lists(text, 131_072));
        assert!(!lists(text, 2));
    }

    #[test]
    fn a_line_of_maps_is_read_by_column() {
        let line = "7f00-7f01 rw-s 00000000 00:0e 4711                       /dmabuf:";
        assert_eq!(maps_inode(line), Some(4711));
    }
}

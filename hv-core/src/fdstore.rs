//! The fd store: descriptors that a domain keeps across its incarnations. hv-core never maps, reads or polls them.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hv_abi::{FdInfo, Name, fd_kind};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{SFlag, fstat};

/// One entry.
#[derive(Clone, Debug)]
pub struct Entry {
    /// An [`fd_kind`].
    pub kind: u32,
    /// The owner's mark.
    pub tag: u64,
    /// What is stored.
    pub fd: Arc<OwnedFd>,
}

/// A domain's store.
#[derive(Debug)]
pub struct FdStore {
    entries: BTreeMap<[u8; hv_abi::NAME_LEN], Entry>,
    limit: u32,
}

/// Checks that a descriptor is of the kind that it is said to be, by what the kernel says of it. A dma-buf is none of them.
///
/// # Errors
/// `EINVAL` it is not.
pub fn check_kind(fd: impl AsFd, kind: u32) -> Result<(), Errno> {
    let link = crate::sys::fd_link(&fd).map_err(|_| Errno::EINVAL)?;
    let link = link.as_os_str().as_encoded_bytes();
    let file_type = SFlag::from_bits_truncate(fstat(&fd)?.st_mode) & SFlag::S_IFMT;
    let fits = match kind {
        // Only shmem files know seals, and only memfds have this name and no directory.
        fd_kind::MEMFD => {
            link.starts_with(b"/memfd:")
                && fcntl(&fd, FcntlArg::F_GET_SEALS).is_ok()
                && file_type == SFlag::S_IFREG
        }
        fd_kind::EVENTFD => link == b"anon_inode:[eventfd]",
        fd_kind::SOCKET => file_type == SFlag::S_IFSOCK,
        // /dev/net/tun is misc device 10:200 (Documentation/admin-guide/devices.txt).
        fd_kind::TAP => {
            file_type == SFlag::S_IFCHR && fstat(&fd)?.st_rdev == nix::sys::stat::makedev(10, 200)
        }
        _ => false,
    };
    if fits { Ok(()) } else { Err(Errno::EINVAL) }
}

impl FdStore {
    /// An empty store of at most `limit` entries.
    pub fn new(limit: u32) -> Self {
        FdStore { entries: BTreeMap::new(), limit }
    }

    /// Whether something can be stored under this name.
    pub fn has_room(&self, name: &Name) -> bool {
        self.entries.contains_key(&name.0) || self.entries.len() < self.limit as usize
    }

    /// Stores; gives back what was under that name, for the caller to close outside of any lock.
    ///
    /// # Errors
    /// `ENOSPC` it is full; the descriptor comes back to be closed.
    pub fn put(&mut self, name: &Name, entry: Entry) -> Result<Option<Entry>, (Errno, Entry)> {
        if !self.has_room(name) {
            return Err((Errno::ENOSPC, entry));
        }
        Ok(self.entries.insert(name.0, entry))
    }

    /// Looks up.
    pub fn get(&self, name: &Name) -> Option<&Entry> {
        self.entries.get(&name.0)
    }

    /// Takes out, for the caller to close outside of any lock.
    pub fn delete(&mut self, name: &Name) -> Option<Entry> {
        self.entries.remove(&name.0)
    }

    /// What is in it from there on, by name.
    pub fn list(&self, from: Bound<[u8; hv_abi::NAME_LEN]>) -> impl Iterator<Item = FdInfo> {
        let rest = self.entries.range((from, Bound::Unbounded));
        rest.map(|(name, e)| FdInfo { name: Name(*name), kind: e.kind, pad: 0, tag: e.tag })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Takes all sockets out: a descriptor in flight in one of them could be what nobody may keep.
    pub fn take_sockets(&mut self) -> Vec<Entry> {
        let (sockets, rest) = self.take_map().into_iter().partition(|(_, e)| e.kind == fd_kind::SOCKET);
        self.entries = rest;
        let sockets: BTreeMap<_, _> = sockets;
        sockets.into_values().collect()
    }

    /// Takes everything out.
    pub fn take_all(&mut self) -> Vec<Entry> {
        self.take_map().into_values().collect()
    }

    fn take_map(&mut self) -> BTreeMap<[u8; hv_abi::NAME_LEN], Entry> {
        std::mem::take(&mut self.entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_what_the_kernel_says() {
        let memfd = crate::sys::sealed_memfd(c"x", 4096).unwrap();
        let eventfd = crate::sys::eventfd().unwrap();
        let (socket, _other) = crate::sys::sock::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let fds = [memfd.as_fd(), eventfd.as_fd(), socket.as_fd(), file.as_fd(), null.as_fd()];
        for (i, fd) in fds.iter().enumerate() {
            for kind in 0..6 {
                let right = (i as u32) + 1 == kind && kind <= 3;
                assert_eq!(check_kind(fd, kind).is_ok(), right, "fd {i} as kind {kind}");
            }
        }
    }

    #[test]
    fn quota_counts_names() {
        let mut store = FdStore::new(1);
        let entry = || Entry { kind: fd_kind::EVENTFD, tag: 0, fd: Arc::new(crate::sys::eventfd().unwrap()) };
        let (a, b) = (Name::new("a").unwrap(), Name::new("b").unwrap());
        assert!(store.put(&a, entry()).unwrap().is_none());
        assert!(store.put(&a, entry()).unwrap().is_some(), "replacing needs no room");
        assert_eq!(store.put(&b, entry()).unwrap_err().0, Errno::ENOSPC);
        assert!(store.delete(&a).is_some());
        assert!(store.put(&b, entry()).is_ok());
    }
}

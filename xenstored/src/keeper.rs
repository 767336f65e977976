//! Where a connection's socket outlives the process.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use crate::store::ConnId;

/// Keeps dups of client sockets.
pub trait FdKeeper {
    /// Keeps a dup of `fd` under the connection's name. Called before the connection enters the journal.
    ///
    /// # Errors
    /// When it can't be kept; the client is refused then.
    fn put(&mut self, id: ConnId, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Takes a client from the listening socket and keeps it, as [`FdKeeper::put`] does.
    ///
    /// # Errors
    /// `WouldBlock` if nobody waits, `StorageFull` if no more can be kept, else accept(2)'s.
    fn accept(&mut self, id: ConnId, listener: &UnixListener) -> io::Result<OwnedFd> {
        // The stream stays blocking: its calls carry MSG_DONTWAIT.
        let fd = OwnedFd::from(listener.accept()?.0);
        self.put(id, fd.as_fd())?;
        Ok(fd)
    }

    /// Drops a connection's dup.
    fn remove(&mut self, id: ConnId);

    /// All that is kept, at start.
    ///
    /// # Errors
    /// When the keeper can't be asked.
    fn all(&mut self) -> io::Result<Vec<(ConnId, OwnedFd)>>;
}

/// Keeps nothing: sockets die with the process (standalone mode), or are inherited at a live update.
#[derive(Default)]
pub struct NoKeeper {
    /// Those of the predecessor.
    pub inherited: Vec<(ConnId, OwnedFd)>,
}

impl FdKeeper for NoKeeper {
    fn put(&mut self, _id: ConnId, _fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    fn remove(&mut self, _id: ConnId) {}

    fn all(&mut self) -> io::Result<Vec<(ConnId, OwnedFd)>> {
        Ok(std::mem::take(&mut self.inherited))
    }
}

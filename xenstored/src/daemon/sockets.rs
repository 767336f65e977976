//! Clients on sockets come.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{CONNS, Daemon, DaemonError, Link};
use crate::domains::Domains;
use crate::keeper::FdKeeper;
use crate::store::ConnId;

impl<K: FdKeeper, D: Domains> Daemon<K, D> {
    pub(super) fn take_up_sockets(&mut self) -> Result<(), DaemonError> {
        let mut kept: BTreeMap<ConnId, OwnedFd> = self.keeper.all()?.into_iter().collect();
        let known: Vec<ConnId> =
            self.engine.store.conns().filter(|(_, c)| c.domid.is_none()).map(|(id, _)| id).collect();
        for id in known {
            match kept.remove(&id) {
                Some(fd) => self.add_socket(id, fd)?,
                None => self.engine.close(id)?,
            }
        }
        for (id, fd) in kept {
            // Killed between the keeping of the socket and its record in the journal.
            if id == self.engine.store.next_conn() && self.engine.open_socket()? == Some(id) {
                self.add_socket(id, fd)?;
            } else {
                self.keeper.remove(id);
            }
        }
        self.drop_closed();
        Ok(())
    }

    fn add_socket(&mut self, id: ConnId, fd: OwnedFd) -> Result<(), DaemonError> {
        let interest = EpollFlags::EPOLLIN;
        self.epoll.add(&fd, EpollEvent::new(interest, CONNS + id.0))?;
        let link = Link::Socket { fd, interest, ended: false, blocked: false, gated: false };
        self.links.insert(id, link);
        self.flush(id)?;
        self.wake(id);
        Ok(())
    }

    pub(super) fn accept(&mut self) -> Result<(), DaemonError> {
        loop {
            let Some(listener) = &self.listener else { return Ok(()) };
            let id = self.engine.store.next_conn();
            match self.keeper.accept(id, listener) {
                Ok(fd) => self.admitted(id, fd)?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
                Err(e) if e.kind() == io::ErrorKind::StorageFull => {
                    tracing::error!("a client is refused: its socket can't be kept");
                    // Left in the backlog it would be asked for again and again.
                    let _ = listener.accept();
                }
                Err(e) => {
                    // Out of descriptors or memory: the client waits in the backlog.
                    tracing::error!(error = %e, "accept failed");
                    std::thread::sleep(Duration::from_millis(10));
                    return Ok(());
                }
            }
        }
    }

    /// A new client that another thread hands over.
    pub(super) fn admit(&mut self, fd: OwnedFd) -> Result<(), DaemonError> {
        let id = self.engine.store.next_conn();
        if let Err(e) = self.keeper.put(id, fd.as_fd()) {
            tracing::error!(error = %e, "a client is refused: its socket can't be kept");
            return Ok(());
        }
        self.admitted(id, fd)
    }

    /// A client whose socket is kept becomes a connection.
    fn admitted(&mut self, id: ConnId, fd: OwnedFd) -> Result<(), DaemonError> {
        match self.engine.open_socket() {
            Ok(Some(id)) => self.add_socket(id, fd)?,
            Ok(None) => {
                tracing::error!("a client is refused: all connection slots are taken");
                self.keeper.remove(id);
            }
            Err(e) => {
                tracing::error!(error = %e, "a client is refused");
                self.keeper.remove(id);
            }
        }
        Ok(())
    }
}

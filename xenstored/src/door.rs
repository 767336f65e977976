//! Clients that come by no listener: other threads of the process hand the event loop one end of a socket pair.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// The other threads' side.
#[derive(Clone)]
pub struct Door {
    clients: Sender<OwnedFd>,
    wake: Arc<EventFd>,
}

/// The event loop's side.
pub(crate) struct Clients {
    clients: Receiver<OwnedFd>,
    wake: Arc<EventFd>,
}

/// Both sides.
///
/// # Errors
/// As eventfd(2).
pub(crate) fn door() -> io::Result<(Door, Clients)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    Ok((Door { clients: sender, wake: Arc::clone(&wake) }, Clients { clients: receiver, wake }))
}

impl Door {
    /// Hands over one end of a socket pair, to be served as a client of the listening socket is; false if the loop has ended.
    pub fn client(&self, socket: OwnedFd) -> bool {
        let taken = self.clients.send(socket).is_ok();
        // A full counter is awake too.
        let _ = self.wake.write(1);
        taken
    }
}

impl Clients {
    /// Readable while one waits.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Those that wait.
    pub(crate) fn take(&self) -> Vec<OwnedFd> {
        let _ = self.wake.read();
        self.clients.try_iter().collect()
    }
}

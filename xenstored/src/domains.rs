//! Where the daemon learns of domains and gets their rings.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use domain_kit::evtchn::Port;
use domain_kit::xs::SharedPage;

use crate::store::Class;

/// A domain as hv-core tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Which.
    pub domid: u16,
    /// Serial number of its creation.
    pub instance: u64,
    /// Grant and port of its store ring, once it has set them.
    pub ring: Option<(u32, u32)>,
    /// Which quota it gets.
    pub class: Class,
    /// It has shut itself down.
    pub shutdown: bool,
    /// It is being taken down: as good as gone.
    pub dying: bool,
}

/// A ring that is mapped and bound.
pub struct Ring {
    /// The page.
    pub page: Arc<dyn SharedPage>,
    /// The port.
    pub port: Port,
}

/// The source of domains.
pub trait Domains {
    /// Readable when the list may have changed.
    fn changed_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Takes the notification behind [`Domains::changed_fd`].
    fn clear(&mut self);

    /// All domains.
    ///
    /// # Errors
    /// When hv-core can't be asked.
    fn list(&mut self) -> io::Result<Vec<Seen>>;

    /// Maps a domain's ring page and binds its port; the same again after a restart.
    ///
    /// # Errors
    /// When the grant or the port is not what the domain said.
    fn attach(&mut self, seen: &Seen) -> io::Result<Ring>;

    /// A domain's ring is no longer used; it was dropped before.
    fn detach(&mut self, domid: u16);
}

/// No domains: standalone mode.
pub struct NoDomains;

impl Domains for NoDomains {
    fn changed_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn clear(&mut self) {}

    fn list(&mut self) -> io::Result<Vec<Seen>> {
        Ok(Vec::new())
    }

    fn attach(&mut self, _seen: &Seen) -> io::Result<Ring> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn detach(&mut self, _domid: u16) {}
}

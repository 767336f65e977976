//! The control ring, seen from the frontend: one request at a time.

use std::time::Duration;

use domain_kit::evtchn::Port;
use domain_kit::mem::Page;
use domain_kit::ring::{FrontRing, RingError, RingLayout, RingMem};
use xen_abi::PAGE_SIZE;
use xen_abi::io::netif::*;
use zerocopy::{FromBytes, IntoBytes};

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CtrlError {
    /// An index that no honest backend writes.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// An answer to another request.
    #[error("the backend answered request {0}, which is not the one it was asked")]
    Mismatch(u16),
    /// No answer.
    #[error("no answer on the control ring within {0:?}")]
    Timeout(Duration),
    /// The backend refused, with this `XEN_NETIF_CTRL_STATUS_*`.
    #[error("the backend refused with status {0}")]
    Refused(u32),
}

/// The ring.
#[derive(Debug)]
pub struct Ctrl {
    ring: FrontRing<Page>,
    /// For what a request points at, with its grant reference.
    shared: (Page, u32),
    port: Port,
    id: u16,
}

/// How long a backend may take; it may be restarted meanwhile.
const TIMEOUT: Duration = Duration::from_secs(10);

impl Ctrl {
    pub(super) fn new(ring: Page, shared: (Page, u32), port: Port) -> Ctrl {
        let layout = RingLayout::new(1, CTRL_ENTRY_SIZE, size_of::<XenNetifCtrlResponse>());
        Ctrl { ring: FrontRing::init(ring, layout), shared, port, id: 0 }
    }

    /// Sends a request (`XEN_NETIF_CTRL_TYPE_*`) and gives the data of its answer.
    ///
    /// # Errors
    /// [`CtrlError`].
    pub fn call(&mut self, kind: u16, data: [u32; 3]) -> Result<u32, CtrlError> {
        self.id = self.id.wrapping_add(1);
        let request = XenNetifCtrlRequest { id: self.id, r#type: kind, data };
        self.ring.put(request.as_bytes());
        if self.ring.push() {
            self.port.notify();
        }
        while !self.ring.final_check()? {
            if !self.port.wait(Some(TIMEOUT)).unwrap_or(false) {
                return Err(CtrlError::Timeout(TIMEOUT));
            }
        }
        let mut bytes = [0; size_of::<XenNetifCtrlResponse>()];
        self.ring.take(&mut bytes);
        let response = XenNetifCtrlResponse::read_from_bytes(&bytes).unwrap_or_default();
        match response.status {
            _ if response.id != self.id => Err(CtrlError::Mismatch(response.id)),
            XEN_NETIF_CTRL_STATUS_SUCCESS => Ok(response.data),
            status => Err(CtrlError::Refused(status)),
        }
    }

    /// The same for a request that points at bytes (at most a page): data is their grant reference, `count`, `offset`.
    ///
    /// # Errors
    /// [`CtrlError`].
    pub fn call_with(&mut self, kind: u16, bytes: &[u8], count: u32, offset: u32) -> Result<u32, CtrlError> {
        self.shared.0.copy_in(0, &bytes[..bytes.len().min(PAGE_SIZE)]);
        self.call(kind, [self.shared.1, count, offset])
    }
}

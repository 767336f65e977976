//! Paths and nodes.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xen_abi::io::blkif::node::PROTOCOL;
use xen_abi::xenbus::XenbusState;

use super::backend::DeviceError;
use crate::Domain;
use crate::mem::Page;
use crate::xs::{RingTransport, XsClient, XsErrno, XsError, XsOps};

/// What the node `protocol` of a frontend says that wants vhost-user in the place of rings; and the backend's own node with the approved resource
/// that leads to the frontend's socket.
pub const VHOST_USER: &str = "vhost-user";

/// Names one device of a backend: whose, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceKey {
    /// The frontend's domid.
    pub frontend: u16,
    /// The device's number among the frontend's devices of that kind.
    pub id: u32,
}

impl fmt::Display for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.frontend, self.id)
    }
}

/// A device as its nodes describe it.
#[derive(Clone)]
pub struct DeviceNode {
    /// Which.
    pub key: DeviceKey,
    /// The backend's directory.
    pub back: String,
    /// The frontend's directory.
    pub front: String,
    /// The store.
    pub xs: XsClient,
}

impl fmt::Debug for DeviceNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceNode").field("back", &self.back).finish()
    }
}

impl DeviceNode {
    /// The frontend's node of this name as text; `None` if there is none.
    ///
    /// # Errors
    /// The store's.
    pub fn front_node(&self, name: &str) -> Result<Option<String>, XsError> {
        self.xs.read_opt(&format!("{}/{name}", self.front))
    }

    /// The frontend's node of this name as a number. `None` if there is none or it is not one (then logged).
    ///
    /// # Errors
    /// The store's.
    pub fn front_number<T: FromStr>(&self, name: &str) -> Result<Option<T>, XsError> {
        Ok(number(&self.front, name, self.front_node(name)?))
    }

    /// The backend's own node of this name as text; `None` if there is none.
    ///
    /// # Errors
    /// The store's.
    pub fn back_node(&self, name: &str) -> Result<Option<String>, XsError> {
        self.xs.read_opt(&format!("{}/{name}", self.back))
    }

    /// The backend's own node of this name as a number. `None` as in [`DeviceNode::front_number`].
    ///
    /// # Errors
    /// The store's.
    pub fn back_number<T: FromStr>(&self, name: &str) -> Result<Option<T>, XsError> {
        Ok(number(&self.back, name, self.back_node(name)?))
    }

    /// The approved resource of the frontend's socket, if the frontend wants vhost-user.
    ///
    /// # Errors
    /// The store's; the toolstack did not approve it.
    pub fn vhost_user(&self) -> Result<Option<String>, DeviceError> {
        if self.front_node(PROTOCOL)?.as_deref().map(str::trim) != Some(VHOST_USER) {
            return Ok(None);
        }
        let resource = self.back_node(VHOST_USER)?;
        resource
            .map(Some)
            .ok_or_else(|| DeviceError::Failed("vhost-user is not approved for this device".into()))
    }
}

pub(super) fn number<T: FromStr>(dir: &str, name: &str, text: Option<String>) -> Option<T> {
    let text = text?;
    let value = text.trim().parse().ok();
    if value.is_none() {
        tracing::warn!(node = format!("{dir}/{name}"), "not a number in range");
    }
    value
}

pub(super) fn state(xs: &impl XsOps, dir: &str) -> Result<XenbusState, XsError> {
    match xs.read_opt(&format!("{dir}/state")) {
        // A node that is gone together with its parents: what the store looks at then is a node that is not ours to read.
        Err(e) if e.is(XsErrno::EACCES) => Ok(XenbusState::Unknown),
        text => Ok(text?.map_or(XenbusState::Unknown, |text| XenbusState::parse(&text))),
    }
}

/// A domain's own directory.
pub(super) fn home(domid: u16) -> String {
    format!("/local/domain/{domid}")
}

/// Connects to the store over the domain's own ring; waits up to `timeout` for a store to appear.
///
/// # Errors
/// The store's; [`XsError::Timeout`] if there is no xenstore domain by then.
pub fn connect_store(domain: &Domain, timeout: Duration) -> Result<XsClient, XsError> {
    let deadline = Instant::now() + timeout;
    loop {
        match domain.store_ring() {
            Ok(Some((region, port))) => {
                let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
                let tx = port.tx().ok_or(XsError::Protocol("the store's port cannot notify"))?;
                let ring = RingTransport::new(
                    Arc::new(Page::new(region.mem.clone(), 0)),
                    own(port.rx())?,
                    own(tx)?,
                )?;
                return XsClient::connect(ring, deadline.saturating_duration_since(Instant::now()));
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the store's ring is not to be had yet"),
        }
        if Instant::now() >= deadline {
            return Err(XsError::Timeout(timeout));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

//! One device, seen from its frontend.

use std::str::FromStr;
use std::time::{Duration, Instant};

use xen_abi::xenbus::XenbusState;

use super::nodes::{home, number, state};
use crate::xs::{WatchSet, XsClient, XsError, XsOps};

/// A device of this domain's. What the backend writes is its word alone.
pub struct Frontend {
    xs: XsClient,
    watches: WatchSet,
    /// The frontend's own directory.
    pub path: String,
    /// The backend's directory.
    pub backend: String,
    /// The backend's domid.
    pub backend_domid: u16,
}

impl Frontend {
    /// Finds device `id` of `kind` ("vbd", "vif") of domain `domid`, and watches its backend.
    ///
    /// # Errors
    /// The store's; ENOENT if there is no such device.
    pub fn open(xs: &XsClient, domid: u16, kind: &str, id: u32) -> Result<Self, XsError> {
        let path = format!("{}/device/{kind}/{id}", home(domid));
        let backend = xs.read_string(&format!("{path}/backend"))?;
        let said = xs.read_string(&format!("{path}/backend-id"))?;
        let backend_domid =
            said.trim().parse().map_err(|_| XsError::Protocol("backend-id is not a domid"))?;
        let watches = xs.watch_set()?;
        watches.watch(&format!("{backend}/state"), "backend")?;
        Ok(Frontend { xs: xs.clone(), watches, path, backend, backend_domid })
    }

    /// Numbers of this domain's devices of a kind.
    ///
    /// # Errors
    /// The store's.
    pub fn list(xs: &XsClient, domid: u16, kind: &str) -> Result<Vec<u32>, XsError> {
        match xs.directory(&format!("{}/device/{kind}", home(domid))) {
            Ok(names) => Ok(names.iter().filter_map(|n| n.parse().ok()).collect()),
            Err(e) if e.is_not_found() => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }

    /// The store.
    pub fn xs(&self) -> &XsClient {
        &self.xs
    }

    /// The backend's state now.
    ///
    /// # Errors
    /// The store's.
    pub fn backend_state(&self) -> Result<XenbusState, XsError> {
        state(&self.xs, &self.backend)
    }

    /// The frontend's own state now.
    ///
    /// # Errors
    /// The store's.
    pub fn own_state(&self) -> Result<XenbusState, XsError> {
        state(&self.xs, &self.path)
    }

    /// Waits until the backend is in one of `states`; pauses of the store are waited for.
    ///
    /// # Errors
    /// [`XsError::Timeout`]; the store's other than pauses.
    pub fn wait_backend(&self, states: &[XenbusState], timeout: Duration) -> Result<XenbusState, XsError> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.backend_state() {
                Ok(found) if states.contains(&found) => return Ok(found),
                Ok(_) | Err(XsError::Disconnected | XsError::Timeout(_)) => {}
                Err(e) => return Err(e),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(XsError::Timeout(timeout));
            }
            self.watches.next_timeout(left.min(Duration::from_millis(500)));
        }
    }

    /// The backend's node of this name as text; `None` if there is none.
    ///
    /// # Errors
    /// The store's.
    pub fn backend_node(&self, name: &str) -> Result<Option<String>, XsError> {
        self.xs.read_opt(&format!("{}/{name}", self.backend))
    }

    /// The backend's node of this name as a number; `None` if there is none or it is not one.
    ///
    /// # Errors
    /// The store's.
    pub fn backend_number<T: FromStr>(&self, name: &str) -> Result<Option<T>, XsError> {
        Ok(number(&self.backend, name, self.backend_node(name)?))
    }

    /// The frontend's own node of this name.
    ///
    /// # Errors
    /// The store's.
    pub fn own_node(&self, name: &str) -> Result<Option<String>, XsError> {
        self.xs.read_opt(&format!("{}/{name}", self.path))
    }

    /// Publishes own nodes and the state that tells of them, in one transaction.
    ///
    /// # Errors
    /// The store's.
    pub fn publish(&self, nodes: &[(&str, String)], to: XenbusState) -> Result<(), XsError> {
        self.xs.transaction(|tx| {
            for (name, value) in nodes {
                tx.write(&format!("{}/{name}", self.path), value)?;
            }
            tx.write(&format!("{}/state", self.path), to.as_str())
        })
    }

    /// Says goodbye: Closing, then Closed once the backend has let go (or `timeout` is over).
    ///
    /// # Errors
    /// The store's.
    pub fn close(&self, timeout: Duration) -> Result<(), XsError> {
        use XenbusState::{Closed, Closing, InitWait, Unknown};
        self.publish(&[], Closing)?;
        match self.wait_backend(&[Closing, Closed, InitWait, Unknown], timeout) {
            Ok(_) | Err(XsError::Timeout(_)) => {}
            Err(e) => return Err(e),
        }
        self.publish(&[], Closed)
    }
}

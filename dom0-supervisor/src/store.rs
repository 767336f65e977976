//! What dom0 needs of xenstore, and the real one over dom0's own ring.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use domain_kit::Domain;
use domain_kit::mem::Page;
use domain_kit::xs::{RingTransport, XsClient, XsErrno, XsError, XsOps};

/// One change. Absolute paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Makes or overwrites a node and sets its permissions, the owner first, as `n5`, `r7`.
    Put {
        /// Which.
        path: String,
        /// Its value.
        value: String,
        /// Who may.
        perms: Vec<String>,
    },
    /// Overwrites a node that exists; one that is missing stays missing.
    Set {
        /// Which.
        path: String,
        /// Its value.
        value: String,
    },
    /// Removes a node and all below it, if it is there.
    Remove {
        /// Which.
        path: String,
    },
}

/// Why the store did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It does not answer (now).
    #[error("xenstore: {0}")]
    Unavailable(String),
    /// It said no.
    #[error("xenstore: {0}")]
    Refused(String),
}

/// The store, blocking, every call with a deadline.
pub trait Store: Send + Sync {
    /// All of the changes or none.
    ///
    /// # Errors
    /// [`StoreError`].
    fn apply(&self, changes: &[Change]) -> Result<(), StoreError>;
    /// A node's value as text.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read(&self, path: &str) -> Result<Option<String>, StoreError>;
}

/// How long a call may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// xenstored over dom0's own ring. The ring can be made once the xenstore domain exists, so the connection is made at the first
/// use; a restart of xenstored is only a pause.
pub struct RingStore {
    domain: Arc<Domain>,
    client: Mutex<Option<XsClient>>,
}

impl RingStore {
    /// Nothing is connected yet.
    pub fn new(domain: Arc<Domain>) -> Self {
        RingStore { domain, client: Mutex::new(None) }
    }

    fn client(&self) -> Result<XsClient, StoreError> {
        let mut slot = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*slot {
            return Ok(client.clone());
        }
        let unavailable = |e: &dyn std::fmt::Display| StoreError::Unavailable(e.to_string());
        let ring = self.domain.store_ring().map_err(|e| unavailable(&e))?;
        let Some((region, port)) = ring else {
            return Err(StoreError::Unavailable("there is no xenstore domain yet".into()));
        };
        let own = |fd: Option<std::os::fd::BorrowedFd<'_>>| {
            fd.ok_or(std::io::ErrorKind::InvalidData.into()).and_then(|fd| fd.try_clone_to_owned())
        };
        let rx = own(Some(port.rx())).map_err(|e| unavailable(&e))?;
        let tx = own(port.tx()).map_err(|e: std::io::Error| unavailable(&e))?;
        let ring = RingTransport::new(Arc::new(Page::new(region.mem.clone(), 0)), rx, tx)
            .map_err(|e| unavailable(&e))?;
        let client = XsClient::connect(ring, TIMEOUT).map_err(|e| unavailable(&e))?;
        client.set_timeout(TIMEOUT);
        *slot = Some(client.clone());
        Ok(client)
    }
}

fn refused(e: XsError) -> StoreError {
    match e {
        XsError::Timeout(_)
        | XsError::Disconnected
        | XsError::Io(_)
        | XsError::Closed
        | XsError::RingError(_) => StoreError::Unavailable(e.to_string()),
        e if e.is(XsErrno::EAGAIN) => StoreError::Unavailable("too many conflicts".into()),
        e => StoreError::Refused(e.to_string()),
    }
}

fn apply_one(tx: &impl XsOps, change: &Change) -> Result<(), XsError> {
    match change {
        Change::Put { path, value, perms } => {
            tx.write(path, value)?;
            let perms: Vec<&str> = perms.iter().map(String::as_str).collect();
            tx.set_perms(path, &perms)
        }
        Change::Set { path, value } => {
            if tx.exists(path)? {
                tx.write(path, value)?;
            }
            Ok(())
        }
        Change::Remove { path } => match tx.rm(path) {
            Err(e) if e.is_not_found() => Ok(()),
            result => result,
        },
    }
}

impl Store for RingStore {
    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        self.client()?
            .transaction(|tx| changes.iter().try_for_each(|change| apply_one(tx, change)))
            .map_err(refused)
    }

    fn read(&self, path: &str) -> Result<Option<String>, StoreError> {
        self.client()?.read_opt(path).map_err(refused)
    }
}

//! What dom0 needs of hv-core. [`crate::hv_grpc`] is the real one.

use std::time::Duration;

use proto::blkback::Commit;
use proto::hvcore::{CreateDomainRequest, Domain, Resource, VersionReply};
use proto::qemu::{QemuSaved, QemuSizes, QemuStatus};

/// Why hv-core did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HvError {
    /// No such domain (any more).
    #[error("no such domain")]
    NotFound,
    /// It is there already.
    #[error("{0}")]
    AlreadyExists(String),
    /// hv-core says no, and would again.
    #[error("{0}")]
    Refused(String),
    /// No answer in time, or no room: trying again can help.
    #[error("hv-core: {0}")]
    Busy(String),
    /// The connection is gone: dom0 is about to end too.
    #[error("the connection to hv-core is gone")]
    Gone,
}

/// hv-core's control API, blocking, every call with a deadline of its own. See `proto/bulkhead/hvcore.proto` for the meaning.
pub trait Hv: Send + Sync {
    /// Version, memory, what is missing.
    ///
    /// # Errors
    /// [`HvError`].
    fn version(&self) -> Result<VersionReply, HvError>;
    /// All domains.
    ///
    /// # Errors
    /// [`HvError`].
    fn list(&self) -> Result<Vec<Domain>, HvError>;
    /// Makes a domain and starts its process.
    ///
    /// # Errors
    /// [`HvError`].
    fn create(&self, request: CreateDomainRequest) -> Result<Domain, HvError>;
    /// Takes a domain down.
    ///
    /// # Errors
    /// [`HvError`]; [`HvError::NotFound`] if it is gone.
    fn destroy(&self, domid: u16, instance: u64) -> Result<(), HvError>;
    /// Gives it another specification from its next incarnation on.
    ///
    /// # Errors
    /// [`HvError`].
    fn update(&self, domid: u16, instance: u64, request: CreateDomainRequest) -> Result<(), HvError>;
    /// Has the service at this socket finish what it does and take nothing new.
    ///
    /// # Errors
    /// [`HvError::Busy`] it did not within that time, or does not answer.
    fn drain(&self, control_socket: &str, within: Duration) -> Result<(), HvError>;
    /// Approves resources of a domain, in place of those of the same names, and withdraws others.
    ///
    /// # Errors
    /// [`HvError`].
    fn approve(
        &self,
        domid: u16,
        instance: u64,
        add: Vec<Resource>,
        remove: Vec<String>,
    ) -> Result<(), HvError>;
    /// Asks the blkback at this socket to put everything on the medium.
    ///
    /// # Errors
    /// [`HvError::Busy`] it does not answer; [`HvError::Refused`] it has no disk, and why.
    fn settle_disk(&self, control_socket: &str) -> Result<(), HvError>;
    /// Asks the blkback at this socket how far a commit is; all zero if none is under way.
    ///
    /// # Errors
    /// As [`Hv::settle_disk`].
    fn disk_commit(&self, control_socket: &str) -> Result<Commit, HvError>;
    /// Asks the blkback at this socket how long its disk is, after making it `grow` bytes long if that is not 0.
    ///
    /// # Errors
    /// As [`Hv::settle_disk`].
    fn disk_bytes(&self, control_socket: &str, grow: u64) -> Result<u64, HvError>;
    /// Asks the qemu-bridge at this socket how its guest is, after stopping its processors (`Some(true)`) or letting them go on.
    ///
    /// # Errors
    /// [`HvError::Busy`] it does not answer; [`HvError::Refused`] QEMU does not, and why.
    fn qemu(&self, control_socket: &str, pause: Option<bool>) -> Result<QemuStatus, HvError>;
    /// Asks the qemu-bridge at this socket to reset its guest in place.
    ///
    /// # Errors
    /// As [`Hv::qemu`].
    fn qemu_reset(&self, control_socket: &str) -> Result<QemuStatus, HvError>;
    /// Asks the qemu-bridge at this socket to write its guest into an approved file, with this description. It stays stopped then.
    ///
    /// # Errors
    /// As [`Hv::qemu`]; the guest goes on.
    fn qemu_save(
        &self,
        control_socket: &str,
        resource: &str,
        description: &str,
    ) -> Result<QemuSaved, HvError>;
    /// Asks the qemu-bridge at this socket what its machine has.
    ///
    /// # Errors
    /// As [`Hv::qemu`].
    fn qemu_sizes(&self, control_socket: &str) -> Result<QemuSizes, HvError>;
    /// Asks the qemu-bridge at this socket for what its guest's display shows, as PNG.
    ///
    /// # Errors
    /// As [`Hv::qemu`].
    fn screenshot(&self, control_socket: &str) -> Result<Vec<u8>, HvError>;
    /// Sends its process a signal.
    ///
    /// # Errors
    /// [`HvError`].
    fn kill(&self, domid: u16, instance: u64, signal: u32) -> Result<(), HvError>;
    /// Starts the process of a FAILED or SHUTDOWN domain.
    ///
    /// # Errors
    /// [`HvError`].
    fn start(&self, domid: u16, instance: u64) -> Result<Domain, HvError>;
    /// Has the domain announced its xenstore ring? (That is a first sign of life of any guest.)
    ///
    /// # Errors
    /// [`HvError`].
    fn has_store_ring(&self, domid: u16) -> Result<bool, HvError>;
}

/// The domain with this uuid.
///
/// # Errors
/// [`Hv::list`]'s.
pub fn find_by_uuid(hv: &dyn Hv, uuid: &str) -> Result<Option<Domain>, HvError> {
    Ok(hv.list()?.into_iter().find(|d| d.uuid.eq_ignore_ascii_case(uuid)))
}

/// The domain with this number and creation.
///
/// # Errors
/// [`Hv::list`]'s.
pub fn find_instance(hv: &dyn Hv, domid: u16, instance: u64) -> Result<Option<Domain>, HvError> {
    Ok(hv.list()?.into_iter().find(|d| d.domid == u32::from(domid) && d.instance == instance))
}

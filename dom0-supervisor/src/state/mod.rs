//! What dom0 wants and what it has begun: the private record. Nothing that a guest or a backend can write (xenstore) is ever
//! taken in its place (XSA-175, XSA-178).

mod file;
mod records;

pub use file::{StateError, StateFile};
pub use records::{
    DiskChange, Failure, Guest, MadeOf, OwnDisk, Phase, RunningDomain, Saga, SagaKind, State, VifChange,
    guest_uuid_text, private_backend_name, private_backend_uuid, service_uuid,
};

/// Where [`State`] is kept. The real one is [`StateFile`]; tests put one in memory that fails at chosen steps.
pub trait Persist: Send {
    /// Keeps `state` for good: when this returns it survives SIGKILL and a loss of power.
    ///
    /// # Errors
    /// Those of the file system; the former state is then still there.
    fn save(&mut self, state: &State) -> Result<(), StateError>;
}

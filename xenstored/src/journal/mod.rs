//! The journal: shared memory from which the next process goes on where this one was killed.
//!
//! Two things live in it. The [`log`] holds the store: a snapshot, and one checksummed record for each event since
//! ([`crate::store::Event`]); its state is rebuilt by running the events again, and each record carries a checksum of the
//! output its event caused, so a replay that differs is noticed. The [`slots`] hold what moves between events: how many
//! bytes came in and went out of each connection. What is large, the nodes and the watches, is not in the snapshot but in
//! the [`arena`], which is put back to what it was at the snapshot before events are run again.

pub mod arena;
pub mod layout;
pub mod log;
pub mod mem;
pub mod slots;

/// The journal can't be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A record or a header is not what was written.
    #[error("the journal is damaged: {0}")]
    Damaged(String),
    /// It was written by a version that carries requests out differently.
    #[error("the journal was written by a version with behaviour {found}, this one has {ours}")]
    Behaviour {
        /// In the journal.
        found: u64,
        /// This binary's.
        ours: u64,
    },
    /// It was written by a version that lays the journal out differently.
    #[error("the journal has another version's layout; export it with that version")]
    Layout,
    /// No room for the first snapshot.
    #[error(transparent)]
    Full(#[from] log::Full),
}

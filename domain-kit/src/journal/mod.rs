//! The ring journal: what a backend must remember so that SIGKILL between any two of its stores loses nothing.
//!
//! It lies in a memfd of the fd store, is written by one thread alone, and is never seen by the frontend. SIGKILL keeps the
//! program order of stores, so an entry is valid once its state word, stored last, says so. One entry for each slot of the
//! ring:
//!
//! ```text
//!   free ──take──► taken ──start──► running ──respond──► answered ──push──► free
//!                    ▲                 │
//!                    └── recovery ─────┘   (attempts + 1 if the process died of its own fault)
//! ```
//!
//! Order of stores, each a possible last one:
//!
//! 1. `take`: request bytes, index, checksum; then the state word; for the whole batch then `req_cons`. Entries with
//!    `req_index >= req_cons` were never begun: recovery drops them and takes them from the ring again.
//!    Bytes kept beside a request are complete once their length, stored last, says so (`take_with`, or `keep` later).
//! 2. `start`: the state word. Only running entries can be blamed for a crash.
//! 3. `respond`: `resp_index` and `aux`; then the state word with the status in it. From here on it never runs again.
//! 4. `push`: response bytes into the ring; the journalled publish (from, to) in one word; the ring's `rsp_prod`; then the
//!    entries become free.
//!
//! Recovery reads the ring's `rsp_prod`, which the frontend can write: it must equal the journalled `from` or `to`, else the
//! ring fails. Answered entries at or beyond it are published again from their journalled status, the others are answered.
//! What is unanswered comes back in request order. The number of entries must be exactly `req_cons - rsp_prod`; a journal
//! that does not add up fails the ring rather than answering wrongly.
//!
//! [`JournaledRing`] is ring and journal in one; blkback (requests run again) and netback (at most once: unanswered transmit
//! requests are answered, receive slots are used again) differ only in what they do with [`JournaledRing::reattach`]'s list.

mod format;
mod recover;
mod ring;
mod store;

pub use format::{IDENTITY_WORDS, MAX_ATTEMPTS, RingFormat, Shape};
pub use recover::Recovered;
pub use ring::JournaledRing;
pub use store::{RingJournal, Slot};

use crate::ring::RingError;

/// Why a ring cannot be served (any more). The ring's error state: nothing of it is touched again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// The memory holds no journal, or one of another kind.
    #[error("journal: {0}")]
    Header(&'static str),
    /// The journal contradicts itself.
    #[error("journal damaged: {what} (entry {slot})")]
    Damaged {
        /// What does not fit.
        what: &'static str,
        /// Which entry; the number of entries if it concerns all.
        slot: u32,
    },
    /// The frontend wrote the ring's `rsp_prod`, which is the backend's.
    #[error("rsp_prod {found} is neither {from} nor {to}: the frontend wrote it")]
    ForeignRspProd {
        /// What the ring says.
        found: u32,
        /// Published before the last publish.
        from: u32,
        /// Published by the last publish.
        to: u32,
    },
    /// The frontend broke the ring protocol.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// An earlier incarnation already gave the ring up.
    #[error("the ring failed earlier, see the log of an earlier incarnation")]
    FailedEarlier,
}

#[cfg(test)]
mod tests;

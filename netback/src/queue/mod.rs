//! A vif's two rings, journalled: [`tx::TxQueue`] from the frontend to the TAP, [`rx::RxQueue`] the other way.
//!
//! Neither knows where packets go or how granted pages are reached; that is [`World`], so that a model can run the
//! same code and crash it at every step. Both are at-most-once: whatever happens, no packet is delivered twice. A kill
//! loses at most the one packet that was between two systems at that moment:
//!
//! * tx: each packet is marked as handed over in the journal just before the write to the TAP. What was taken off the
//!   ring but not yet handed over is sent by the next incarnation, what was handed over is only answered.
//! * rx: packets are read from the TAP into memory that outlives the incarnation and are noted in the journal before
//!   anything else, so only one that is being read can be lost. Slots that were taken and not answered are used again.

use std::io;

use domain_kit::grants::CopyBatch;
use domain_kit::hypercall::HvError;
use domain_kit::journal::JournalError;
use domain_kit::ring::RingMem;

use crate::slots::FatalTx;

pub mod rx;
pub mod tx;

/// Bytes of the packet memory of a vif: one half for each direction.
pub const ARENA_BYTES: usize = 4 << 20;
const HALF: usize = ARENA_BYTES / 2;
/// Bytes before each packet in the arena; the virtio_net_hdr ends where the packet starts, and packets are aligned.
const HEADROOM: usize = 16;

/// What surrounds a queue.
pub trait World {
    /// The packet memory's type.
    type Arena: RingMem;
    /// The packet memory, [`ARENA_BYTES`] long, which hv-core copies from and to. It outlives the incarnation.
    fn arena(&self) -> &Self::Arena;
    /// The frontend's domid and the number under which hv-core knows the packet memory.
    fn copy_ids(&self) -> (u16, u32);
    /// Reads one packet, header first, to `offset` of the arena; `None` if none waits.
    ///
    /// # Errors
    /// The device is gone.
    fn receive(&mut self, offset: usize, len: usize) -> io::Result<Option<usize>>;
    /// Writes one packet, header first, from `offset` of the arena; `None` if the device is full.
    ///
    /// # Errors
    /// The device refuses the packet.
    fn send(&mut self, offset: usize, len: usize) -> io::Result<Option<usize>>;
    /// Carries out grant copies.
    ///
    /// # Errors
    /// The hypercall's; not those of single entries.
    fn copy(&mut self, batch: &mut CopyBatch) -> Result<(), HvError>;
}

/// Why a queue stops.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Ring or journal are not to be trusted; the ring is marked as failed for later incarnations too.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The frontend published nonsense; the ring is marked as failed.
    #[error(transparent)]
    Fatal(#[from] FatalTx),
    /// What netback itself keeps beside the journal does not fit.
    #[error("the queue's record is damaged: {0}")]
    Record(&'static str),
    /// hv-core refused as a whole.
    #[error("grant copy: {0}")]
    Copy(#[from] HvError),
    /// The TAP is gone.
    #[error("reading from the TAP: {0}")]
    Tap(io::Error),
}

/// What a round of work did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Something was done; ask again before sleeping.
    pub worked: bool,
    /// The frontend wants an event.
    pub notify: bool,
}

/// True if index `a` comes before `b` on a free-running ring.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

//! A vif's rings, journalled: [`tx::TxQueue`] from the frontend to the switch, [`rx::RxQueue`] the other way; a vif has one pair
//! or several, and perhaps a control ring ([`ctrl::CtrlQueue`]).
//!
//! None knows where packets go or how granted pages are reached; that is [`World`] and [`Copier`], so that a model can run the
//! same code and crash it at every step. All are at-most-once: whatever happens, no packet is delivered twice. A kill
//! loses at most the one packet that was between two systems at that moment:
//!
//! * tx: each packet is marked as handed over in the journal just before the next system can see it. What was taken off the
//!   ring but not yet handed over is sent by the next incarnation, what was handed over is only answered.
//! * rx: a packet that comes is marked at its source (the sender's tx journal, or the uplink's spool) just before the first
//!   of its slots is answered. Slots that were taken and not answered are used again; a packet of which only some were
//!   answered is finished with an error, so that the frontend drops it.

use std::io;

use domain_kit::grants::CopyBatch;
use domain_kit::hypercall::HvError;
use domain_kit::journal::JournalError;
use domain_kit::ring::RingMem;
use hv_abi::CopyEntry;

use crate::offload::{MAX_HEADERS, Meta};
use crate::slots::FatalTx;
use crate::spool::DamagedSpool;

pub mod ctrl;
pub mod rx;
pub mod tx;

/// Bytes of the packet memory of a queue: the first half for what waits for the frontend, then what it sends, then
/// [`SCRATCH_BYTES`] for packets made here.
pub const ARENA_BYTES: usize = 4 << 20;
pub(crate) const HALF: usize = ARENA_BYTES / 2;
/// Bytes at the arena's end where the switch makes packets: segments of a large one.
pub const SCRATCH_BYTES: usize = 256 << 10;
/// First byte of the scratch.
pub const SCRATCH: usize = ARENA_BYTES - SCRATCH_BYTES;

/// A packet in an arena. Its virtio_net_hdr stands in the bytes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// First byte: of the Ethernet header.
    pub at: usize,
    /// Bytes.
    pub len: usize,
    /// Checksum and segmentation.
    pub meta: Meta,
    /// What of it is not there yet.
    pub away: Away,
}

impl Frame {
    /// Bytes of it that are in the arena.
    pub fn here(&self) -> usize {
        if self.away.is_nothing() { self.len } else { self.len.min(MAX_HEADERS) }
    }
}

/// The end of a packet that is still in its sender's pages: some entries of a list of copies, which would bring it to its place in
/// the arena, in order. Everything that anybody looks at, the first [`MAX_HEADERS`] bytes, is before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Away {
    /// The first of them.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Away {
    /// The packet is all there.
    pub const NOTHING: Away = Away { first: 0, count: 0 };

    /// True if so.
    pub fn is_nothing(self) -> bool {
        self.count == 0
    }

    /// The entries, out of the list of all.
    pub fn of(self, all: &[CopyEntry]) -> &[CopyEntry] {
        all.get(self.first as usize..(self.first + self.count) as usize).unwrap_or_default()
    }
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fate {
    /// Handed on.
    Sent,
    /// Nobody took it, or it was not allowed.
    #[default]
    Dropped,
    /// It made no sense.
    Refused,
}

/// Who carries out grant copies.
pub trait Copier {
    /// Carries them out.
    ///
    /// # Errors
    /// The hypercall's; not those of single entries.
    fn copy(&mut self, batch: &mut CopyBatch) -> Result<(), HvError>;
}

/// What surrounds a tx queue.
pub trait World: Copier {
    /// The packet memory's type.
    type Arena: RingMem;
    /// The packet memory, [`ARENA_BYTES`] long, which hv-core copies from and to. It outlives the incarnation.
    fn arena(&self) -> &Self::Arena;
    /// The frontend's domid and the number under which hv-core knows the packet memory.
    fn copy_ids(&self) -> (u16, u32);
    /// Where the packet memory begins in what hv-core knows under that number.
    fn buffer_base(&self) -> u64 {
        0
    }
    /// Whether the end of large packets is to stay where it is for now.
    fn leaves_away(&mut self) -> bool {
        false
    }
    /// Hands packets on, those of one destination in order, and says in `fates` (as many) what became of each. `commit(i)` is
    /// called just before anybody can see packet `i`. `away`: what the frames' [`Away`] is about; the same when this returns.
    fn forward(
        &mut self,
        frames: &[Frame],
        away: &mut Vec<CopyEntry>,
        fates: &mut [Fate],
        commit: &mut dyn FnMut(usize),
    );
    /// Changes the frontend's multicast filter; false if it is full.
    fn multicast(&mut self, add: bool, address: [u8; 6]) -> bool;
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
    /// The notes of waiting packets do not fit.
    #[error(transparent)]
    Spool(#[from] DamagedSpool),
    /// hv-core refused as a whole.
    #[error("grant copy: {0}")]
    Copy(#[from] HvError),
    /// hv-core refused a batch as a whole of which this queue's packets were a part.
    #[error("grant copy: refused; see the log")]
    CopyOfAll,
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
    /// Bytes handed on.
    pub bytes: usize,
    /// Many packets, and most of them for nothing: nobody could take them, or they made no sense.
    pub wasted: bool,
}

/// True if index `a` comes before `b` on a free-running ring.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

//! The data path of one ring: requests off the ring, through the disk, responses back, each step journalled.
//!
//! The engine knows neither grants nor files: it meets the guest's pages at [`GuestPages`] and storage at [`DiskQueue`], which
//! meet each other in buffers that the engine hands out and never looks into. It is the very code that the model test crashes
//! at every step.
//!
//! ```text
//!  ring ─take─► (indirect: guest.indirect ─► keep) ─► queue ─dispatch─►
//!     read:    disk read ─► guest.store ─► respond
//!     write:   guest.fetch ─► disk write ─► respond
//!     flush:   disk flush ─► (guest.fetch ─► disk write, FUA) ─► respond
//!     barrier: alone on the device ([`gate`]): as a flush
//!     discard: disk discard ─► respond
//! ```

pub mod gate;
mod run;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain_kit::journal::{JournalError, JournaledRing, Slot};
use domain_kit::ring::RingMem;
use xen_abi::io::blkif::Abi;

use crate::arena::Arena;
use crate::disk::attachment::{BUFFER_CHUNK, Completions, DiskQueue};
use crate::limit::Limiter;
use crate::request::{BlkifFormat, Prepared};
use crate::stats::Stats;
use gate::Seat;

/// Chunks of buffer memory that requests of one ring have at the same time.
pub const ARENA_CHUNKS: usize = 8;
/// Bytes of the buffers of one ring: the requests', and a chunk where indirect pages are copied to.
pub const BUFFERS_BYTES: usize = (ARENA_CHUNKS + 1) * BUFFER_CHUNK;

/// Direction of a transfer between guest and buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Guest to buffer.
    Fetch,
    /// Buffer to guest.
    Store,
}

/// The page with the segments of an indirect request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndirectPage {
    /// Whose.
    pub slot: Slot,
    /// Its grant.
    pub gref: u32,
    /// Bytes wanted from its start.
    pub len: u32,
}

/// The guest's pages.
pub trait GuestPages {
    /// Copies the segments of each of `slots`, whose requests are `requests[slot]`, between the guest and the requests' buffers.
    /// Slots for which that failed (a bad grant) are appended to `failed`.
    fn transfer(
        &mut self,
        direction: Direction,
        slots: &[Slot],
        requests: &[Prepared],
        failed: &mut Vec<Slot>,
    );

    /// Copies indirect pages, each once, and hands each copy to `each`; `None` if its grant is bad.
    fn indirect(&mut self, pages: &[IndirectPage], each: &mut dyn FnMut(Slot, Option<&[u8]>));

    /// Nothing was asked for a while, and nothing is in flight: gives memory back that can be had again.
    fn idle(&mut self) {}
}

/// Where a running request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// The disk reads.
    Reading,
    /// The disk writes; then it is done.
    Writing,
    /// The disk flushes; then it is done.
    Flushing,
    /// The disk flushes; then data is to be written.
    FlushBeforeWrite,
    /// The disk discards.
    Discarding,
}

/// What a round left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Polled {
    /// The frontend is to be notified.
    pub notify: bool,
    /// There may be more to do at once.
    pub more: bool,
}

/// A hook called with each request before it runs, in tests of poison requests.
pub type FaultHook = Box<dyn FnMut(&Prepared) + Send>;

/// What a full file system under the disk means to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum NoSpace {
    /// The write fails.
    #[default]
    Report,
    /// The guest's disk stops until there is room again.
    Stop,
}

/// Time between two tries of a write that found no room.
pub const NO_SPACE_RETRY: Duration = Duration::from_millis(500);

/// See the module.
pub struct Engine<R, J, G, D> {
    ring: JournaledRing<R, J, BlkifFormat>,
    abi: Abi,
    guest: G,
    disk: D,
    arena: Arena,
    requests: Vec<Prepared>,
    phases: Vec<Phase>,
    /// When each was taken, or taken up again.
    began: Vec<Instant>,
    /// Indirect requests whose segments could not be had.
    unreadable: Vec<bool>,
    queue: VecDeque<Slot>,
    running: u32,
    /// What runs must run alone: a barrier, or a request suspected of having crashed a predecessor.
    exclusive: bool,
    /// Among the device's rings.
    seat: Seat,
    /// The next request waits until it is alone on the device.
    wants_alone: bool,
    read_only: bool,
    paused: bool,
    no_space: NoSpace,
    limiter: Arc<Limiter>,
    /// No room on the medium, or a limit: nothing starts before then.
    stopped_until: Option<Instant>,
    /// A write found no room, and none has succeeded since.
    no_room: bool,
    stats: Arc<Stats>,
    fault: Option<FaultHook>,
    enospc_logged: bool,
    answered: u64,
    /// Start of this round.
    now: Instant,
    // Kept for their memory.
    taken: Vec<Slot>,
    indirect: Vec<IndirectPage>,
    extra: Vec<u8>,
    done: Completions,
    fetch: Vec<Slot>,
    store: Vec<Slot>,
    failed: Vec<Slot>,
}

impl<R: RingMem, J: RingMem, G: GuestPages, D: DiskQueue> Engine<R, J, G, D> {
    /// Serves `ring`. `unanswered` is what [`JournaledRing::reattach`] gave, empty for a new ring.
    pub fn new(
        ring: JournaledRing<R, J, BlkifFormat>,
        abi: Abi,
        unanswered: Vec<Slot>,
        guest: G,
        disk: D,
        stats: Arc<Stats>,
    ) -> Self {
        let slots = ring.ring().layout().size as usize;
        stats.replayed.add(unanswered.len() as u64);
        let now = Instant::now();
        let mut engine = Engine {
            ring,
            abi,
            guest,
            disk,
            arena: Arena::new(ARENA_CHUNKS),
            requests: (0..slots).map(|_| Prepared::default()).collect(),
            phases: vec![Phase::Idle; slots],
            began: vec![now; slots],
            unreadable: vec![false; slots],
            queue: VecDeque::with_capacity(slots),
            running: 0,
            exclusive: false,
            seat: Seat::default(),
            wants_alone: false,
            read_only: false,
            paused: false,
            no_space: NoSpace::Report,
            limiter: Arc::default(),
            stopped_until: None,
            no_room: false,
            stats,
            fault: None,
            enospc_logged: false,
            answered: 0,
            now,
            taken: Vec::with_capacity(slots),
            indirect: Vec::new(),
            extra: Vec::new(),
            done: Vec::with_capacity(slots),
            fetch: Vec::with_capacity(slots),
            store: Vec::with_capacity(slots),
            failed: Vec::with_capacity(slots),
        };
        engine.taken.extend(unanswered);
        engine.accept();
        engine
    }

    /// Installs a hook that sees each request before it runs.
    pub fn set_fault_hook(&mut self, hook: FaultHook) {
        self.fault = Some(hook);
    }

    /// What is done when the medium is full.
    pub fn set_no_space(&mut self, choice: NoSpace) {
        self.no_space = choice;
    }

    /// Refuses writes of this ring, even if others may write the disk.
    pub fn set_read_only(&mut self, read_only: bool) {
        self.read_only = read_only;
    }

    /// Nothing was asked for a while, and nothing is in flight: gives memory back that can be had again.
    pub fn idle(&mut self) {
        if self.running == 0 {
            self.disk.idle();
            self.guest.idle();
        }
    }

    /// This ring's part in the order among the device's rings; without it, it is the only one.
    pub fn set_seat(&mut self, seat: Seat) {
        self.seat = seat;
    }

    /// Requests and bytes per second, shared with the device's other rings.
    pub fn set_limiter(&mut self, limiter: Arc<Limiter>) {
        self.limiter = limiter;
    }

    /// While paused, nothing new is taken off the ring.
    pub fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Requests taken and not answered.
    pub fn in_flight(&self) -> u32 {
        self.ring.in_flight()
    }

    /// Requests that the disk works on.
    pub fn running(&self) -> u32 {
        self.running
    }

    /// When the last round began.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Requests answered by this incarnation.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// The ring.
    pub fn ring(&self) -> &JournaledRing<R, J, BlkifFormat> {
        &self.ring
    }

    /// The disk.
    pub fn disk(&mut self) -> &mut D {
        &mut self.disk
    }

    /// The guest's pages.
    pub fn guest(&mut self) -> &mut G {
        &mut self.guest
    }

    /// Takes the engine apart: when the ring is closed.
    pub fn into_parts(self) -> (G, D) {
        (self.guest, self.disk)
    }

    /// One round: completions, new requests, the disk, responses.
    ///
    /// # Errors
    /// The ring failed: it must not be served any more.
    pub fn round(&mut self) -> Result<Polled, JournalError> {
        self.now = Instant::now();
        let mut more = self.complete();
        if !self.paused {
            let taken = self.ring.take(usize::MAX, &mut self.taken)?;
            if taken > 0 {
                self.stats.requests.add(taken as u64);
                self.accept();
                more = true;
            }
        }
        more |= self.dispatch();
        if self.running == 0 && !self.wants_alone {
            self.seat.leave();
        }
        let notify = self.ring.push();
        Ok(Polled { notify, more })
    }

    /// Whether a round would find something, as far as can be told cheaply. The frontend is not asked for an event.
    ///
    /// # Errors
    /// As [`Engine::round`].
    pub fn has_work(&mut self) -> Result<bool, JournalError> {
        let waiting = !self.paused && self.ring.waiting()? > 0;
        Ok(waiting || self.disk.ready())
    }

    /// To be asked before sleeping: false if requests wait after all. If true, the next request raises an event.
    ///
    /// # Errors
    /// As [`Engine::round`].
    pub fn may_sleep(&mut self) -> Result<bool, JournalError> {
        Ok(self.paused || !self.ring.final_check()?)
    }

    /// How long may be slept at most, if something is due.
    pub fn due(&self) -> Option<Duration> {
        self.stopped_until.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// A round, what it queued handed over, and, if it left nothing to do, the check that must come before sleeping.
    ///
    /// # Errors
    /// As [`Engine::round`].
    pub fn poll(&mut self) -> Result<Polled, JournalError> {
        let mut polled = self.round()?;
        self.disk.kick();
        if !polled.more {
            polled.more = !self.may_sleep()?;
        }
        Ok(polled)
    }
}

//! The data path of one ring: requests off the ring, through the disk, responses back, each step journalled.
//!
//! The engine knows neither grants nor files: it meets the guest's pages at [`GuestPages`] and storage at [`Disk`], which
//! meet each other in per-slot buffers that the engine never sees. It is the very code that the model test crashes at every step.
//!
//! ```text
//!  ring ─take─► queue ─dispatch─► read:    disk.read ─► guest.store ─► respond
//!                                 write:   guest.fetch ─► disk.write ─► respond
//!                                 flush:   disk.flush ─► (write) ─► respond
//!                                 barrier: alone: disk.flush ─► (write ─► disk.flush) ─► respond
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use domain_kit::journal::{JournalError, JournaledRing, MAX_ATTEMPTS, Slot};
use domain_kit::ring::RingMem;
use xen_abi::io::blkif::{Abi, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY};

use crate::request::{BlkifFormat, DiskShape, Kind, Prepared};
use crate::stats::Stats;

/// Why the disk could not do an operation: an errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskError(pub i32);

/// Storage. Each slot has one buffer and at most one operation under way.
pub trait Disk {
    /// What requests are judged by.
    fn shape(&self) -> DiskShape;
    /// Queues a read of the disk into the slot's buffer.
    fn read(&mut self, slot: Slot, offset: u64, len: u32);
    /// Queues a write of the slot's buffer to the disk.
    fn write(&mut self, slot: Slot, offset: u64, len: u32);
    /// Queues a flush: all writes that were completed before are on the medium when it completes.
    fn flush(&mut self, slot: Slot);
    /// Hands over what was queued.
    fn submit(&mut self);
    /// Takes what has completed.
    fn completed(&mut self, into: &mut Vec<(Slot, Result<(), DiskError>)>);
}

/// Direction of a transfer between guest and slot buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Guest to buffer.
    Fetch,
    /// Buffer to guest.
    Store,
}

/// The guest's pages.
pub trait GuestPages {
    /// Copies the segments of each of `slots`, whose requests are `requests[slot]`, between the guest and the slots' buffers.
    /// Slots for which that failed (a bad grant) are appended to `failed`.
    fn transfer(
        &mut self,
        direction: Direction,
        slots: &[Slot],
        requests: &[Prepared],
        failed: &mut Vec<Slot>,
    );
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
    /// The disk writes a barrier's data; then it flushes.
    WriteBeforeFlush,
}

/// What a round left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Polled {
    /// The frontend is to be notified.
    pub notify: bool,
    /// There may be more to do at once. If not, the next request raises an event, and the next completion makes the disk
    /// ready.
    pub more: bool,
}

/// A hook called with each request before it runs, in tests of poison requests.
pub type FaultHook = Box<dyn FnMut(&Prepared) + Send>;

/// See the module.
pub struct Engine<R, J, G, D> {
    ring: JournaledRing<R, J, BlkifFormat>,
    abi: Abi,
    guest: G,
    disk: D,
    requests: Vec<Prepared>,
    phases: Vec<Phase>,
    queue: VecDeque<Slot>,
    running: u32,
    /// What runs must run alone: a barrier, or a request suspected of having crashed a predecessor.
    exclusive: bool,
    paused: bool,
    stats: Arc<Stats>,
    fault: Option<FaultHook>,
    enospc_logged: bool,
    answered: u64,
    // Kept for their memory.
    taken: Vec<Slot>,
    done: Vec<(Slot, Result<(), DiskError>)>,
    fetch: Vec<Slot>,
    store: Vec<Slot>,
    failed: Vec<Slot>,
}

impl<R: RingMem, J: RingMem, G: GuestPages, D: Disk> Engine<R, J, G, D> {
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
        stats.replayed.fetch_add(unanswered.len() as u64, Relaxed);
        Engine {
            ring,
            abi,
            guest,
            disk,
            requests: (0..slots).map(|_| Prepared::default()).collect(),
            phases: vec![Phase::Idle; slots],
            queue: unanswered.into(),
            running: 0,
            exclusive: false,
            paused: false,
            stats,
            fault: None,
            enospc_logged: false,
            answered: 0,
            taken: Vec::with_capacity(slots),
            done: Vec::with_capacity(slots),
            fetch: Vec::with_capacity(slots),
            store: Vec::with_capacity(slots),
            failed: Vec::with_capacity(slots),
        }
    }

    /// Installs a hook that sees each request before it runs.
    pub fn set_fault_hook(&mut self, hook: FaultHook) {
        self.fault = Some(hook);
    }

    /// While paused, nothing new is taken off the ring.
    pub fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Requests taken and not answered.
    pub fn in_flight(&self) -> u32 {
        self.ring.in_flight()
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
    pub fn poll(&mut self) -> Result<Polled, JournalError> {
        let mut more = self.complete();
        if !self.paused {
            let taken = self.ring.take(usize::MAX, &mut self.taken)?;
            self.stats.requests.fetch_add(taken as u64, Relaxed);
            self.queue.extend(self.taken.drain(..));
            more |= taken > 0;
        }
        more |= self.dispatch();
        self.disk.submit();
        let notify = self.ring.push();
        if !more && !self.paused {
            more = self.ring.final_check()?;
        }
        Ok(Polled { notify, more })
    }

    /// Takes the disk's completions through their next phase.
    fn complete(&mut self) -> bool {
        self.disk.completed(&mut self.done);
        if self.done.is_empty() {
            return false;
        }
        let mut done = std::mem::take(&mut self.done);
        for (slot, result) in done.drain(..) {
            let i = slot.0 as usize;
            let phase = std::mem::take(&mut self.phases[i]);
            if let Err(DiskError(errno)) = result {
                self.disk_failed(slot, errno);
                continue;
            }
            match phase {
                Phase::Reading => self.store.push(slot),
                Phase::FlushBeforeWrite => self.fetch.push(slot),
                Phase::WriteBeforeFlush => {
                    self.phases[i] = Phase::Flushing;
                    self.disk.flush(slot);
                }
                Phase::Writing => {
                    self.stats.written(self.requests[i].len);
                    self.finish(slot, BLKIF_RSP_OKAY);
                }
                Phase::Flushing => {
                    self.stats.flushes.fetch_add(1, Relaxed);
                    self.finish(slot, BLKIF_RSP_OKAY);
                }
                Phase::Idle => tracing::error!(slot = slot.0, "a completion for nothing"),
            }
        }
        self.done = done;
        self.store_reads();
        self.start_writes();
        true
    }

    fn store_reads(&mut self) {
        if self.store.is_empty() {
            return;
        }
        self.guest.transfer(Direction::Store, &self.store, &self.requests, &mut self.failed);
        let mut store = std::mem::take(&mut self.store);
        for slot in store.drain(..) {
            if self.failed.contains(&slot) {
                self.refuse(slot, "its pages cannot be written");
            } else {
                self.stats.read(self.requests[slot.0 as usize].len);
                self.finish(slot, BLKIF_RSP_OKAY);
            }
        }
        self.store = store;
        self.failed.clear();
    }

    fn start_writes(&mut self) {
        if self.fetch.is_empty() {
            return;
        }
        self.guest.transfer(Direction::Fetch, &self.fetch, &self.requests, &mut self.failed);
        let mut fetch = std::mem::take(&mut self.fetch);
        for slot in fetch.drain(..) {
            if self.failed.contains(&slot) {
                self.refuse(slot, "its pages cannot be read");
                continue;
            }
            let request = &self.requests[slot.0 as usize];
            self.phases[slot.0 as usize] =
                if request.kind == Kind::Barrier { Phase::WriteBeforeFlush } else { Phase::Writing };
            self.disk.write(slot, request.offset, request.len);
        }
        self.fetch = fetch;
        self.failed.clear();
    }

    /// Starts what may start, in request order.
    fn dispatch(&mut self) -> bool {
        let mut moved = false;
        while let Some(&slot) = self.queue.front() {
            if self.exclusive {
                break;
            }
            let i = slot.0 as usize;
            let attempts = self.ring.attempts(slot);
            if attempts >= MAX_ATTEMPTS {
                self.queue.pop_front();
                tracing::error!(
                    index = self.ring.req_index(slot),
                    attempts,
                    "poison request: answered with an error"
                );
                self.stats.poisoned.fetch_add(1, Relaxed);
                self.ring.respond(slot, BLKIF_RSP_ERROR, 0);
                moved = true;
                continue;
            }
            if attempts > 0 && self.running > 0 {
                break;
            }
            let shape = self.disk.shape();
            if self.running > 0 && is_barrier(self.ring.request(slot)) {
                break;
            }
            self.queue.pop_front();
            moved = true;
            // From here on a crash is this request's.
            self.ring.start(slot);
            let request = &mut self.requests[i];
            if let Err(refusal) = request.check(self.abi, self.ring.request(slot), &shape) {
                tracing::debug!(index = self.ring.req_index(slot), %refusal, "request refused");
                self.stats.refused.fetch_add(1, Relaxed);
                self.ring.respond(slot, refusal.status(), 0);
                continue;
            }
            if let Some(fault) = &mut self.fault {
                fault(request);
            }
            self.exclusive = attempts > 0 || request.kind == Kind::Barrier;
            self.running += 1;
            match request.kind {
                Kind::Read => {
                    self.phases[i] = Phase::Reading;
                    self.disk.read(slot, request.offset, request.len);
                }
                Kind::Write => self.fetch.push(slot),
                Kind::Flush | Kind::Barrier => {
                    self.phases[i] = if request.len > 0 { Phase::FlushBeforeWrite } else { Phase::Flushing };
                    self.disk.flush(slot);
                }
            }
        }
        self.start_writes();
        moved
    }

    fn finish(&mut self, slot: Slot, status: i16) {
        self.ring.respond(slot, status, 0);
        self.answered += 1;
        self.running -= 1;
        self.exclusive = false;
    }

    fn refuse(&mut self, slot: Slot, why: &str) {
        tracing::warn!(index = self.ring.req_index(slot), why, "request failed");
        self.stats.refused.fetch_add(1, Relaxed);
        self.finish(slot, BLKIF_RSP_ERROR);
    }

    fn disk_failed(&mut self, slot: Slot, errno: i32) {
        self.stats.errors.fetch_add(1, Relaxed);
        let error = std::io::Error::from_raw_os_error(errno);
        let offset = self.requests[slot.0 as usize].offset;
        if error.kind() != std::io::ErrorKind::StorageFull {
            tracing::error!(offset, %error, "disk error: answered to that request alone");
        } else if !std::mem::replace(&mut self.enospc_logged, true) {
            tracing::error!(
                offset,
                "the file system under the disk is full: writes fail until there is room"
            );
        }
        self.finish(slot, BLKIF_RSP_ERROR);
    }
}

/// The operation is the first byte in every ABI.
fn is_barrier(slot: &[u8]) -> bool {
    slot.first() == Some(&xen_abi::io::blkif::BLKIF_OP_WRITE_BARRIER)
}

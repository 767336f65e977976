//! From the frontend's tx ring to the switch.

use std::collections::VecDeque;
use std::sync::Arc;

use domain_kit::grants::CopyBatch;
use domain_kit::journal::{
    IDENTITY_WORDS, JournalError, JournaledRing, MAX_ATTEMPTS, RingFormat, Shape, Slot,
};
use domain_kit::ring::{RingLayout, RingMem};
use hv_abi::{CopyEntry, MAX_COPY_ENTRIES};
use xen_abi::io::netif::*;

use super::{Away, Fate, Frame, HALF, Progress, QueueError, SCRATCH, World, before};
use crate::offload::{self, MAX_HEADERS, Meta, VNET_HDR_LEN};
use crate::slots::{self, Kind, KindScanner, MAX_DATA_SLOTS, TxItem, TxPacket};
use crate::spool::HEADROOM;
use crate::stats::Stats;

/// From so many packets on, a run of which more than half were for nothing is [`Progress::wasted`].
const MANY: u32 = 32;
/// Packets for which one round of grant copies is made.
const MAX_BATCH: usize = 128;
/// The end of a packet that is longer may stay in the frontend's pages until it is known whom it is for.
const LARGE: usize = 4096;
/// Bytes of the arena that a packet takes at most.
const MAX_TX: usize = HEADROOM + 65536;
/// First byte of the arena's half for this direction.
const ARENA_START: usize = HALF;
const ARENA_END: usize = SCRATCH;
/// Journal's user area: every packet that begins before this request index was handed over (or refused).
const U_HANDED: usize = 0;
/// Then a word for each slot of the ring: the index of the request in it that began a packet which was handed over. Packets are
/// handed over in the order of their destinations, not of the ring.
const U_MARKS: usize = 8;
/// Kept beside each request: its [`Kind`].
const EXTRA_SIZE: u32 = 8;

/// Requests and responses of the tx ring.
#[derive(Clone, Copy, Debug)]
pub struct TxFormat;

impl RingFormat for TxFormat {
    fn req_size(&self) -> usize {
        TX_ENTRY_SIZE
    }
    fn rsp_size(&self) -> usize {
        size_of::<NetifTxResponse>()
    }
    fn response(&self, request: &[u8], status: i16, _aux: u32, out: &mut [u8]) {
        // Of an extra-info slot these are other bytes of the frontend's; it ignores them by the status.
        let slot = slot_of(request);
        out[..2].copy_from_slice(&slot.request().id.to_le_bytes());
        out[2..].copy_from_slice(&status.to_le_bytes());
    }
}

fn slot_of(bytes: &[u8]) -> TxSlot {
    let mut slot = TxSlot::default();
    slot.0.copy_from_slice(bytes);
    slot
}

/// The ring's layout.
pub fn layout() -> RingLayout {
    RingLayout::new(1, TX_ENTRY_SIZE, size_of::<NetifTxResponse>())
}

/// The journal's shape for a ring of this layout.
pub fn shape(layout: &RingLayout) -> Shape {
    Shape {
        entries: layout.size,
        req_size: layout.req_size as u32,
        extra_size: EXTRA_SIZE,
        user_size: U_MARKS as u32 + 4 * layout.size,
    }
}

/// What one packet's slots ask for.
#[derive(Debug)]
enum Task {
    /// To be answered with an error.
    Refuse,
    /// A dead incarnation handed it over.
    Done,
    Multicast {
        add: bool,
        address: [u8; 6],
    },
    Send(TxPacket),
}

/// A packet between the ring and the switch.
#[derive(Debug)]
struct Job {
    slots: usize,
    task: Task,
    /// Where its bytes are.
    arena: usize,
    /// Its entries in the batch of copies.
    copies: std::ops::Range<usize>,
    away: Away,
}

/// The tx direction of one queue.
#[derive(Debug)]
pub struct TxQueue<R, J> {
    ring: JournaledRing<R, J, TxFormat>,
    handed_at: usize,
    /// Taken and not handed over, in ring order; begins at a packet's first slot.
    pending: VecDeque<Slot>,
    scanner: KindScanner,
    /// Of `pending`, first requests of packets that a dead incarnation handed over: they are answered when it is their turn.
    marked: Vec<u32>,
    /// How many of `pending` are done one packet at a time, because one of them crashed us.
    careful: usize,
    jobs: Vec<Job>,
    frames: Vec<Frame>,
    fates: Vec<Fate>,
    /// For each frame the index of its job's first request.
    firsts: Vec<u32>,
    copy: CopyBatch,
    /// The copies of what [`World::leaves_away`].
    away: Vec<CopyEntry>,
    raw: Vec<TxSlot>,
    /// Packets of this run: all, and those that nobody got.
    counts: (u32, u32),
    stats: Arc<Stats>,
}

impl<R: RingMem, J: RingMem> TxQueue<R, J> {
    /// Starts on a ring that a frontend has just connected.
    ///
    /// # Errors
    /// [`JournaledRing::create`]'s.
    pub fn create(
        ring: R,
        layout: RingLayout,
        journal: J,
        identity: [u32; IDENTITY_WORDS],
        stats: Arc<Stats>,
    ) -> Result<Self, QueueError> {
        let ring = JournaledRing::create(ring, layout, journal, shape(&layout), identity, TxFormat)?;
        let this = Self::new(ring, stats);
        this.set_handed(this.ring.ring().req_cons());
        for slot in 0..layout.size {
            // No index of this slot.
            this.ring.journal().mem().store_u32(mark_at(this.handed_at, slot, layout.size), slot + 1);
        }
        Ok(this)
    }

    /// Goes on where a dead incarnation stopped.
    ///
    /// # Errors
    /// [`JournaledRing::reattach`]'s; [`QueueError::Record`].
    pub fn reattach(
        ring: R,
        layout: RingLayout,
        journal: J,
        own_fault: bool,
        stats: Arc<Stats>,
    ) -> Result<Self, QueueError> {
        let (ring, unanswered) =
            JournaledRing::reattach(ring, layout, journal, shape(&layout), TxFormat, own_fault)?;
        let mut this = Self::new(ring, stats);
        let handed = this.handed();
        if before(this.ring.ring().req_cons(), handed) {
            this.ring.fail();
            return Err(QueueError::Record("handed over more than was taken"));
        }
        for slot in unanswered {
            let index = this.ring.req_index(slot);
            let kind = this.ring.extra(slot).first().copied().and_then(Kind::from_u8);
            if before(index, handed) {
                // Sent, or about to be: never again. Whoever needs it sends it again.
                let status = if kind == Some(Kind::Extra) { NETIF_RSP_NULL } else { NETIF_RSP_OKAY };
                this.ring.respond(slot, status, 0);
                this.stats.tx_recovered.add(1);
            } else {
                let mark = mark_at(this.handed_at, index, layout.size);
                if kind == Some(Kind::First) && this.ring.journal().mem().load_u32(mark) == index {
                    this.marked.push(index);
                }
                this.scanner.next(&slot_of(this.ring.request(slot)));
                if this.ring.attempts(slot) > 0 {
                    this.careful = usize::MAX;
                }
                this.pending.push_back(slot);
            }
        }
        this.careful = this.careful.min(this.pending.len());
        Ok(this)
    }

    fn new(ring: JournaledRing<R, J, TxFormat>, stats: Arc<Stats>) -> Self {
        TxQueue {
            handed_at: ring.journal().user_offset() + U_HANDED,
            ring,
            pending: VecDeque::new(),
            scanner: KindScanner::default(),
            marked: Vec::new(),
            careful: 0,
            jobs: Vec::new(),
            frames: Vec::new(),
            fates: Vec::new(),
            firsts: Vec::new(),
            copy: CopyBatch::default(),
            away: Vec::new(),
            raw: Vec::new(),
            counts: (0, 0),
            stats,
        }
    }

    fn handed(&self) -> u32 {
        self.ring.journal().mem().load_u32(self.handed_at)
    }

    fn set_handed(&self, index: u32) {
        self.ring.journal().mem().store_u32(self.handed_at, index);
    }

    /// The identity given to [`TxQueue::create`].
    pub fn identity(&self) -> [u32; IDENTITY_WORDS] {
        self.ring.journal().identity()
    }

    /// Takes what waits and hands it over, until about `budget` bytes are sent; more by one packet at most. What is left is
    /// done by the next call.
    ///
    /// # Errors
    /// [`QueueError`]; the queue must not be used any more.
    pub fn run(&mut self, world: &mut impl World, budget: usize) -> Result<Progress, QueueError> {
        let mut taken = Vec::new();
        let mut scanner = self.scanner;
        self.ring.take_with(usize::MAX, &mut taken, |request| [scanner.next(&slot_of(request)) as u8])?;
        self.scanner = scanner;
        self.pending.extend(taken);
        let mut progress = Progress { worked: !self.pending.is_empty() && budget > 0, ..Progress::default() };
        self.counts = (0, 0);
        while !self.pending.is_empty() && progress.bytes < budget {
            progress.bytes += self.batch(world, budget - progress.bytes)?;
            progress.notify |= self.ring.push();
        }
        progress.wasted = self.counts.0 >= MANY && self.counts.1 * 2 > self.counts.0;
        // What recovery answered, with nothing else to do.
        progress.notify |= self.ring.push();
        Ok(progress)
    }

    /// True if slots were taken and wait for their turn.
    pub fn waiting(&self) -> bool {
        !self.pending.is_empty()
    }

    /// One round of grant copies and what follows from it; gives the bytes handed on.
    fn batch(&mut self, world: &mut impl World, budget: usize) -> Result<usize, QueueError> {
        self.raw.clear();
        for &slot in &self.pending {
            self.raw.push(slot_of(self.ring.request(slot)));
        }
        let leave = world.leaves_away();
        self.gather(world.copy_ids(), world.buffer_base(), budget, leave)?;
        if !self.copy.entries.is_empty() {
            world.copy(&mut self.copy)?;
        }
        let mut jobs = std::mem::take(&mut self.jobs);
        let sent = self.hand_over(&mut jobs, world);
        self.answer(&jobs);
        self.jobs = jobs;
        Ok(sent)
    }

    /// Makes jobs of as many packets as fit one round; `leave`: of large ones only what has to be looked at is copied.
    fn gather(
        &mut self,
        (domid, buffer): (u16, u32),
        base: u64,
        budget: usize,
        leave: bool,
    ) -> Result<(), QueueError> {
        self.jobs.clear();
        self.copy.clear();
        self.away.clear();
        let limit = if self.careful > 0 { 1 } else { MAX_BATCH };
        let (mut at, mut arena, mut bytes) = (0, ARENA_START, 0);
        while bytes < budget
            && at < self.raw.len()
            && self.jobs.len() < limit
            && self.copy.entries.len() + MAX_DATA_SLOTS <= MAX_COPY_ENTRIES
            && arena + MAX_TX <= ARENA_END
        {
            let first = self.pending[at];
            self.ring.start(first);
            let slots = slots::extent(&self.raw[at..]).inspect_err(|_| self.ring.fail())?;
            let mut job = Job {
                slots,
                task: Task::Refuse,
                arena: arena + HEADROOM,
                copies: self.copy.entries.len()..0,
                away: Away { first: self.away.len() as u32, count: 0 },
            };
            if self.marked.contains(&self.ring.req_index(first)) {
                job.task = Task::Done;
            } else if self.ring.attempts(first) >= MAX_ATTEMPTS {
                tracing::error!(domid, "a packet that crashed netback {MAX_ATTEMPTS} times is dropped");
                self.stats.poisoned.add(1);
            } else {
                match slots::parse(&self.raw[at..at + slots]) {
                    Ok(TxItem::Multicast { add, address }) => job.task = Task::Multicast { add, address },
                    Ok(TxItem::Packet(packet)) => {
                        let mut to = base + job.arena as u64;
                        // Bytes that are copied now.
                        let mut now = if leave && packet.len > LARGE { MAX_HEADERS } else { packet.len };
                        for f in packet.fragments.iter().filter(|f| f.len > 0) {
                            let head = now.min(f.len.into()) as u16;
                            now -= usize::from(head);
                            for (list, offset, len) in [
                                (&mut self.copy.entries, f.offset, head),
                                (&mut self.away, f.offset + head, f.len - head),
                            ] {
                                if len > 0 {
                                    let (gref, buffer_offset) = (f.gref, to);
                                    list.push(CopyEntry {
                                        domid,
                                        flags: 0,
                                        gref,
                                        offset,
                                        len,
                                        buffer,
                                        buffer_offset,
                                    });
                                    to += u64::from(len);
                                }
                            }
                        }
                        arena = ((to - base) as usize).next_multiple_of(64);
                        bytes += packet.len;
                        job.task = Task::Send(packet);
                    }
                    Err(bad) => tracing::debug!(domid, %bad, "tx packet refused"),
                }
            }
            job.copies.end = self.copy.entries.len();
            job.away.count = self.away.len() as u32 - job.away.first;
            self.jobs.push(job);
            at += slots;
        }
        Ok(())
    }

    /// Hands a round's packets over; what was refused becomes [`Task::Refuse`]. Gives the bytes of all.
    fn hand_over(&mut self, jobs: &mut [Job], world: &mut impl World) -> usize {
        self.frames.clear();
        self.firsts.clear();
        let (mut next, mut bytes) = (0, 0);
        for job in jobs.iter_mut() {
            let first = next;
            next += job.slots;
            match &job.task {
                Task::Refuse | Task::Done => {}
                Task::Multicast { add, address } => {
                    if !world.multicast(*add, *address) {
                        job.task = Task::Refuse;
                    }
                }
                Task::Send(packet) => {
                    let copied =
                        self.copy.statuses.get(job.copies.clone()).is_some_and(|s| s.iter().all(|&s| s == 0));
                    let meta = copied.then(|| prepare(packet, job.arena, world.arena())).flatten();
                    if let Some(meta) = meta {
                        crate::fault::look(packet.len);
                        bytes += packet.len;
                        self.frames.push(Frame { at: job.arena, len: packet.len, meta, away: job.away });
                        self.firsts.push(self.ring.req_index(self.pending[first]));
                    } else {
                        job.task = Task::Refuse;
                    }
                }
            }
        }
        self.fates.clear();
        self.fates.resize(self.frames.len(), Fate::default());
        let (journal, at, firsts) = (self.ring.journal().mem(), self.handed_at, &self.firsts);
        let size = self.ring.ring().layout().size;
        if !self.frames.is_empty() {
            world.forward(&self.frames, &mut self.away, &mut self.fates, &mut |i| {
                journal.store_u32(mark_at(at, firsts[i], size), firsts[i]);
            });
        }
        bytes
    }

    /// Answers a round's slots.
    fn answer(&mut self, jobs: &[Job]) {
        // Also those that were refused or dropped are over, before the first of their slots is answered: what is left of a
        // packet of which some are answered must not be taken for a packet's begin.
        let slots: usize = jobs.iter().map(|job| job.slots).sum();
        if let Some(&last) = slots.checked_sub(1).and_then(|last| self.pending.get(last)) {
            self.set_handed(self.ring.req_index(last).wrapping_add(1));
        }
        let (handed, mut frames) = (self.handed(), 0);
        self.marked.retain(|&index| !before(index, handed));
        for job in jobs {
            let status = match &job.task {
                Task::Multicast { .. } => NETIF_RSP_OKAY,
                Task::Done => {
                    self.stats.tx_recovered.add(1);
                    NETIF_RSP_OKAY
                }
                Task::Refuse => {
                    self.stats.tx_errors.add(1);
                    NETIF_RSP_ERROR
                }
                Task::Send(packet) => {
                    let fate = self.fates.get(frames).copied().unwrap_or_default();
                    frames += 1;
                    match fate {
                        Fate::Sent => {
                            self.stats.tx_packets.add(1);
                            self.stats.tx_bytes.add(packet.len as u64);
                            NETIF_RSP_OKAY
                        }
                        Fate::Dropped => {
                            self.stats.tx_dropped.add(1);
                            NETIF_RSP_DROPPED
                        }
                        Fate::Refused => {
                            self.stats.tx_errors.add(1);
                            NETIF_RSP_ERROR
                        }
                    }
                }
            };
            self.counts.0 += 1;
            self.counts.1 += u32::from(status != NETIF_RSP_OKAY);
            let mut scanner = KindScanner::default();
            for _ in 0..job.slots {
                let Some(slot) = self.pending.pop_front() else { break };
                self.careful = self.careful.saturating_sub(1);
                let kind = scanner.next(&slot_of(self.ring.request(slot)));
                self.ring.respond(slot, if kind == Kind::Extra { NETIF_RSP_NULL } else { status }, 0);
            }
        }
    }

    /// To be asked before sleeping; see [`JournaledRing::final_check`].
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn final_check(&self) -> Result<bool, JournalError> {
        self.ring.final_check()
    }
}

/// Where the mark of a request's slot is, in a ring of `size` slots; `handed_at` is where [`U_HANDED`] is.
fn mark_at(handed_at: usize, index: u32, size: u32) -> usize {
    handed_at - U_HANDED + U_MARKS + 4 * (index % size) as usize
}

/// Puts the virtio_net_hdr before a copied packet and its pseudo-header's sum into it. Gives what is true of it, which can be
/// less than what the frontend said; `None`: refused.
fn prepare(packet: &TxPacket, at: usize, arena: &impl RingMem) -> Option<Meta> {
    let mut headers = [0; MAX_HEADERS];
    let headers = &mut headers[..packet.len.min(MAX_HEADERS)];
    arena.copy_out(at, headers);
    match offload::to_tap(packet.meta, headers, packet.len) {
        Ok(out) => {
            arena.copy_in(at - VNET_HDR_LEN, &out.hdr.to_bytes());
            if let Some((offset, value)) = out.patch {
                arena.copy_in(at + offset, &value);
            }
            Some(offload::from_tap(out.hdr))
        }
        Err(bad) => {
            tracing::debug!(%bad, "tx packet refused");
            None
        }
    }
}

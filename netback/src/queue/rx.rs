//! To the frontend's rx ring.
//!
//! Whoever has packets for a frontend delivers them itself, from its own arena and with its own hypercall channel, under the
//! queue's lock; nothing is handed between threads. What finds no slots is copied to the queue's backlog, which is bounded
//! and outlives the incarnation; what does not fit there either is dropped (XSA-392).
//!
//! Before the first slot of a packet is answered, the journal's user area gets the index of its first response and their
//! number. So recovery knows whether a packet was answered in part.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use domain_kit::grants::CopyBatch;
use domain_kit::journal::{IDENTITY_WORDS, JournalError, JournaledRing, RingFormat, Shape, Slot};
use domain_kit::ring::{RingLayout, RingMem};
use hv_abi::{COPY_TO_GRANT, CopyEntry, MAX_COPY_ENTRIES};
use xen_abi::io::netif::*;

use super::{ARENA_BYTES, Copier, Frame, HALF, Progress, QueueError};
use crate::offload::VNET_HDR_LEN;
use crate::slots::{PacketHash, RxPart, RxShape};
use crate::spool::{self, Spool};
use crate::stats::Stats;

/// Packets that wait for slots at most.
const MAX_BACKLOG: usize = 512;
/// Packets of the backlog for which one round of grant copies is made.
const MAX_BATCH: usize = 128;
/// User area: the packet being answered: index of its first response, their number, [`PLACING`].
const U_PLACING: usize = 0;
const U_BACKLOG: usize = 8;
const PLACING: u64 = 1 << 63;
/// [`RingFormat`]'s `aux`: the response is extra info; then its kind, whether more follows, and what does not fit `status`.
const AUX_EXTRA: u32 = 1 << 31;
const AUX_MORE: u32 = 1 << 30;
const AUX_TYPE: u32 = 24;

/// Requests and responses of the rx ring. `status` is the response's; `aux` its flags, or, for extra info, what
/// [`pack_extra`] makes of it.
#[derive(Clone, Copy, Debug)]
pub struct RxFormat;

fn pack_extra(extra: Extra, more: bool) -> (i16, u32) {
    let info = NetifExtraInfo::new(extra, more);
    let (status, rest) = match extra {
        Extra::Gso { size, gso_type, features: _ } => (size, u32::from(gso_type)),
        Extra::Xdp { headroom } => (headroom, 0),
        Extra::Hash { hash_type, algorithm, value } => {
            (value as u16, value >> 16 | u32::from(hash_type & 0xf) << 16 | u32::from(algorithm & 0xf) << 20)
        }
        // Not for frontends.
        Extra::McastAdd(_) | Extra::McastDel(_) => (0, 0),
    };
    let more = if more { AUX_MORE } else { 0 };
    (status as i16, AUX_EXTRA | more | u32::from(info.r#type) << AUX_TYPE | rest)
}

fn unpack_extra(status: i16, aux: u32) -> NetifExtraInfo {
    let status = status as u16;
    let extra = match (aux >> AUX_TYPE & 0x3f) as u8 {
        XEN_NETIF_EXTRA_TYPE_GSO => Extra::Gso { size: status, gso_type: aux as u8, features: 0 },
        XEN_NETIF_EXTRA_TYPE_HASH => Extra::Hash {
            hash_type: (aux >> 16 & 0xf) as u8,
            algorithm: (aux >> 20 & 0xf) as u8,
            value: u32::from(status) | aux << 16,
        },
        _ => Extra::Xdp { headroom: status },
    };
    NetifExtraInfo::new(extra, aux & AUX_MORE != 0)
}

impl RingFormat for RxFormat {
    fn req_size(&self) -> usize {
        RX_ENTRY_SIZE
    }
    fn rsp_size(&self) -> usize {
        size_of::<NetifRxResponse>()
    }
    fn response(&self, request: &[u8], status: i16, aux: u32, out: &mut [u8]) {
        let slot: RxSlot = if aux & AUX_EXTRA != 0 {
            unpack_extra(status, aux).into()
        } else {
            let id = u16::from_le_bytes([request[0], request[1]]);
            NetifRxResponse { id, offset: 0, flags: aux as u16, status }.into()
        };
        out.copy_from_slice(&slot.0);
    }
}

/// The ring's layout.
pub fn layout() -> RingLayout {
    RingLayout::new(1, RX_ENTRY_SIZE, size_of::<NetifRxResponse>())
}

/// The journal's shape for a ring of this layout.
pub fn shape(layout: &RingLayout) -> Shape {
    Shape {
        entries: layout.size,
        req_size: layout.req_size as u32,
        extra_size: 0,
        user_size: (U_BACKLOG + spool::notes_bytes(MAX_BACKLOG)) as u32,
    }
}

/// Where packets come from.
#[derive(Debug)]
pub struct Source<'a, A> {
    /// The arena they lie in.
    pub arena: &'a A,
    /// hv-core's number for it.
    pub buffer: u32,
    /// Where the arena begins in what hv-core knows under that number.
    pub base: u64,
    /// What the packets' [`Away`](super::Away) is about.
    pub away: &'a [CopyEntry],
}

/// hv-core's number for an arena, and where that begins in it.
pub type Buffer = (u32, u64);

/// A packet for the frontend, already such as it can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxFrame {
    /// Where it lies.
    pub frame: Frame,
    /// Its hash, if the frontend asked for hashes.
    pub hash: Option<PacketHash>,
}

/// What a frontend and its domain are to rx queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxTarget {
    /// The frontend.
    pub domid: u16,
    /// Bytes that stay free at the start of each page.
    pub headroom: usize,
}

/// What a delivery did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Packets dropped: no slots, and the backlog is full.
    pub dropped: usize,
    /// The frontend wants an event.
    pub notify: bool,
}

/// What is for one queue in a round of deliveries, see [`deliver_round`].
#[derive(Debug)]
pub struct Share<'a, R, J, A> {
    /// The queue.
    pub queue: &'a mut RxQueue<R, J, A>,
    /// The packets, in order.
    pub frames: &'a [RxFrame],
    /// How many of them are delivered.
    pub placed: usize,
    /// What is not delivered must be in the arena as a whole before there can be another round.
    pub wants_whole: bool,
    /// Once all are delivered, kept or dropped, or the queue must not be used any more.
    pub over: Option<Result<Delivery, QueueError>>,
}

/// Gives packets to several queues, each in order, with one round of grant copies for as much of all as one call can carry; what is
/// not [`Share::over`] then wants another round. `commit(share, i)` is called just before packet `i` of a share can be seen or is
/// kept.
pub fn deliver_round<R: RingMem, J: RingMem, A: RingMem>(
    copier: &mut impl Copier,
    batch: &mut CopyBatch,
    from: &Source<'_, impl RingMem>,
    shares: &mut [Share<'_, R, J, A>],
    commit: &mut dyn FnMut(usize, usize),
) {
    batch.clear();
    let mut plans = Vec::with_capacity(shares.len());
    for share in shares.iter_mut() {
        let plan = if share.queue.backlog.waiting().is_empty() {
            share.queue.plan(batch, (from.buffer, from.base), from.away, &share.frames[share.placed..])
        } else {
            Ok(Planned::default())
        };
        plans.push(plan);
    }
    let copied = if batch.entries.is_empty() { Ok(()) } else { copier.copy(batch) };
    for (number, (share, plan)) in shares.iter_mut().zip(plans).enumerate() {
        let plan = match (plan, &copied) {
            (Err(error), _) => {
                share.over = Some(Err(error));
                continue;
            }
            (Ok(plan), Err(_)) if plan.packets > 0 => {
                share.over = Some(Err(QueueError::CopyOfAll));
                continue;
            }
            (Ok(plan), _) => plan,
        };
        let mut at = share.placed;
        let rest = (|| {
            for frame in &share.frames[at..at + plan.packets] {
                if !frame.frame.away.is_nothing() && !share.queue.all_copied(frame, &batch.statuses) {
                    // Whose fault it is shows when it is copied in two steps; what is the sender's takes no slot.
                    share.wants_whole = true;
                    return Ok(None);
                }
                commit(number, at);
                share.queue.answer(frame, &batch.statuses)?;
                at += 1;
            }
            if plan.full && at < share.frames.len() {
                return Ok(None);
            }
            let rest = &share.frames[at..];
            // What is kept must be there; what is dropped need not.
            if rest
                .iter()
                .any(|f| !f.frame.away.is_nothing() && share.queue.backlog.room_for(f.frame.len).is_some())
            {
                share.wants_whole = true;
                return Ok(None);
            }
            share.queue.settle(copier, from, &share.frames[at..], &mut |i| commit(number, at + i)).map(Some)
        })();
        share.placed = at;
        share.over = rest.transpose();
    }
    if let Err(error) = copied {
        // Each of the shares it was for says so too.
        tracing::error!(%error, "grant copy");
    }
}

/// What [`RxQueue::plan`] found room for.
#[derive(Clone, Copy, Debug, Default)]
struct Planned {
    packets: usize,
    /// The batch has no room for more; else the frontend has no slots for the next packet.
    full: bool,
}

/// The rx direction of one queue. `A` is the backlog's arena.
#[derive(Debug)]
pub struct RxQueue<R, J, A> {
    ring: JournaledRing<R, J, RxFormat>,
    user: usize,
    arena: A,
    buffer: Buffer,
    target: RxTarget,
    /// Taken and not answered, in ring order.
    have: VecDeque<Slot>,
    backlog: Spool,
    /// How many of the backlog go one at a time, because one of them crashed us.
    careful: usize,
    copy: CopyBatch,
    /// Of planned packets, the last first, with their entries in the batch of copies.
    parts: Vec<(RxPart, Range<usize>)>,
    taken: Vec<Slot>,
    stats: Arc<Stats>,
}

fn backlog_range() -> std::ops::Range<usize> {
    0..HALF
}

impl<R: RingMem, J: RingMem, A: RingMem> RxQueue<R, J, A> {
    /// Starts on a ring that a frontend has just connected. `arena` is [`ARENA_BYTES`] long, hv-core knows it as `buffer`.
    ///
    /// # Errors
    /// [`JournaledRing::create`]'s.
    pub fn create(
        ring: R,
        layout: RingLayout,
        journal: J,
        identity: [u32; IDENTITY_WORDS],
        (arena, buffer): (A, Buffer),
        target: RxTarget,
        stats: Arc<Stats>,
    ) -> Result<Self, QueueError> {
        let ring = JournaledRing::create(ring, layout, journal, shape(&layout), identity, RxFormat)?;
        let user = ring.journal().user_offset();
        ring.journal().mem().store_u64(user + U_PLACING, 0);
        let backlog = Spool::create(ring.journal().mem(), user + U_BACKLOG, MAX_BACKLOG, backlog_range());
        Ok(Self::new(ring, (arena, buffer), target, backlog, stats))
    }

    /// Goes on where a dead incarnation stopped.
    ///
    /// # Errors
    /// [`JournaledRing::reattach`]'s; [`QueueError::Spool`].
    pub fn reattach(
        ring: R,
        layout: RingLayout,
        journal: J,
        own_fault: bool,
        (arena, buffer): (A, Buffer),
        target: RxTarget,
        stats: Arc<Stats>,
    ) -> Result<Self, QueueError> {
        let (ring, unanswered) =
            JournaledRing::reattach(ring, layout, journal, shape(&layout), RxFormat, own_fault)?;
        let user = ring.journal().user_offset();
        let (notes, range) = (ring.journal().mem(), backlog_range());
        let backlog = Spool::recover(notes, user + U_BACKLOG, MAX_BACKLOG, range, &arena, own_fault)
            .inspect_err(|_| ring.fail())?;
        let mut this = Self::new(ring, (arena, buffer), target, backlog, stats);
        this.have = unanswered.into();
        this.careful = if own_fault { this.backlog.waiting().len() } else { 0 };
        this.finish_partial()?;
        Ok(this)
    }

    fn new(
        ring: JournaledRing<R, J, RxFormat>,
        (arena, buffer): (A, Buffer),
        target: RxTarget,
        backlog: Spool,
        stats: Arc<Stats>,
    ) -> Self {
        assert!(arena.size() >= ARENA_BYTES);
        RxQueue {
            user: ring.journal().user_offset(),
            ring,
            arena,
            buffer,
            target,
            have: VecDeque::new(),
            backlog,
            careful: 0,
            copy: CopyBatch::default(),
            parts: Vec::new(),
            taken: Vec::new(),
            stats,
        }
    }

    /// A packet of which only some slots are answered becomes so many errors, each a packet of one slot: nothing of it was
    /// published yet, and what a slot behind the first one means (extra info, more data) follows from those before it.
    fn finish_partial(&mut self) -> Result<(), QueueError> {
        let placing = self.ring.journal().mem().load_u64(self.user + U_PLACING);
        if placing & PLACING == 0 {
            return Ok(());
        }
        let (start, slots) = (placing as u32, (placing >> 32) as u16);
        let answered = self.ring.ring().rsp_prod_pvt().wrapping_sub(start);
        if answered == 0 || answered >= u32::from(slots) {
            return Ok(());
        }
        if !self.ring.answer_otherwise(answered as usize, NETIF_RSP_ERROR, 0) {
            self.ring.fail();
            return Err(QueueError::Record("a part of a packet was published"));
        }
        for _ in answered..u32::from(slots) {
            let Some(slot) = self.have.pop_front() else {
                self.ring.fail();
                return Err(QueueError::Record("a packet's slots are missing"));
            };
            self.ring.respond(slot, NETIF_RSP_ERROR, 0);
        }
        self.stats.rx_errors.add(1);
        Ok(())
    }

    /// Publishes what was answered and keeps, or drops, the packets that found no slots.
    fn settle(
        &mut self,
        copier: &mut impl Copier,
        from: &Source<'_, impl RingMem>,
        rest: &[RxFrame],
        commit: &mut dyn FnMut(usize),
    ) -> Result<Delivery, QueueError> {
        let mut delivery = Delivery { notify: self.ring.push(), dropped: 0 };
        if rest.is_empty() {
            return Ok(delivery);
        }
        for (i, frame) in rest.iter().enumerate() {
            commit(i);
            if !self.keep(from.arena, &frame.frame) {
                delivery.dropped += 1;
            }
        }
        self.stats.rx_dropped.add(delivery.dropped as u64);
        // Asks for an event for the next slot; there may be some by now.
        if self.final_check()? {
            delivery.notify |= self.flush(copier)?.notify;
        }
        Ok(delivery)
    }

    /// Copies a packet to the backlog; false if there is no room.
    fn keep(&mut self, from: &impl RingMem, frame: &Frame) -> bool {
        let Some(to) = self.backlog.room_for(frame.len).filter(|_| frame.away.is_nothing()) else {
            return false;
        };
        let mut chunk = [0; 2048];
        // With its virtio_net_hdr.
        let (mut source, mut target) = (frame.at - VNET_HDR_LEN, to - VNET_HDR_LEN);
        let mut left = frame.len + VNET_HDR_LEN;
        while left > 0 {
            let n = left.min(chunk.len());
            from.copy_out(source, &mut chunk[..n]);
            self.arena.copy_in(target, &chunk[..n]);
            (source, target, left) = (source + n, target + n, left - n);
        }
        self.backlog.note(self.ring.journal().mem(), &self.arena, frame.len);
        true
    }

    /// Delivers what waits, as far as the frontend has slots.
    ///
    /// # Errors
    /// [`QueueError`]; the queue must not be used any more.
    pub fn flush(&mut self, copier: &mut impl Copier) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        loop {
            let waiting: Vec<RxFrame> = self
                .backlog
                .waiting()
                .iter()
                .take(if self.careful > 0 { 1 } else { MAX_BATCH })
                .map(|&frame| RxFrame { frame, hash: None })
                .collect();
            if waiting.is_empty() {
                break;
            }
            let first = self.backlog.handed();
            let buffer = self.buffer;
            let n = self.place_kept(copier, buffer, &waiting)?;
            self.backlog.handed_to(first + n);
            self.careful = self.careful.saturating_sub(n);
            if n == 0 {
                break;
            }
            progress.worked = true;
        }
        self.backlog.rewind(self.ring.journal().mem());
        // Also what recovery found, with nothing else to do.
        progress.notify |= self.ring.push();
        Ok(progress)
    }

    fn place_kept(
        &mut self,
        copier: &mut impl Copier,
        buffer: Buffer,
        frames: &[RxFrame],
    ) -> Result<usize, QueueError> {
        let (base, first) = (self.backlog.base(), self.backlog.handed());
        let mut batch = std::mem::take(&mut self.copy);
        batch.clear();
        let planned = self.plan(&mut batch, buffer, &[], frames)?.packets;
        if planned > 0 {
            copier.copy(&mut batch)?;
        }
        for (i, frame) in frames.iter().enumerate().take(planned) {
            spool::mark_handed(self.ring.journal().mem(), base, first + i);
            self.answer(frame, &batch.statuses)?;
        }
        self.copy = batch;
        Ok(planned)
    }

    fn shape_of(&self, frame: &RxFrame) -> RxShape {
        let RxFrame { frame, hash } = *frame;
        RxShape { len: frame.len, meta: frame.meta, hash, headroom: self.target.headroom }
    }

    /// Takes slots for as many packets as there are and as fit the batch, and adds the copies of their bytes. Nothing is answered
    /// yet.
    fn plan(
        &mut self,
        batch: &mut CopyBatch,
        buffer: Buffer,
        all_away: &[CopyEntry],
        frames: &[RxFrame],
    ) -> Result<Planned, QueueError> {
        self.parts.clear();
        let mut planned = Planned::default();
        for frame in frames {
            let shape = self.shape_of(frame);
            let slots = shape.slots();
            // Each end of a slot or a piece begins another copy at most.
            if batch.entries.len() + slots + 1 + frame.frame.away.count as usize > MAX_COPY_ENTRIES {
                planned.full = true;
                break;
            }
            let needed = self.parts.len() + slots;
            if needed > self.have.len() {
                self.taken.clear();
                self.ring.take(needed - self.have.len(), &mut self.taken)?;
                self.have.extend(self.taken.iter());
            }
            if needed > self.have.len() {
                break;
            }
            let mut away = frame.frame.away.of(all_away);
            let start = buffer.1 + frame.frame.at as u64;
            let here = frame.frame.here();
            for index in 0..slots {
                let part = shape.part(index);
                let first = batch.entries.len();
                if let RxPart::Data { offset, len, .. } = part {
                    let page = gref(self.ring.request(self.have[self.parts.len()]));
                    let (mut at, end) = (offset, offset + len);
                    while at < end {
                        let to = (self.target.headroom + at - offset) as u16;
                        if at < here {
                            let len = end.min(here) - at;
                            batch.entries.push(CopyEntry {
                                domid: self.target.domid,
                                flags: COPY_TO_GRANT,
                                gref: page,
                                offset: to,
                                len: len as u16,
                                buffer: buffer.0,
                                buffer_offset: start + at as u64,
                            });
                            at += len;
                            continue;
                        }
                        let Some(source) = away.first() else {
                            return Err(QueueError::Record("a packet's end is missing"));
                        };
                        // Where it would be copied to says which bytes it is.
                        let done = (start + at as u64).checked_sub(source.buffer_offset).map(|n| n as usize);
                        let Some((done, left)) =
                            done.and_then(|n| Some((n, usize::from(source.len).checked_sub(n)?)))
                        else {
                            return Err(QueueError::Record("a packet's end is in disorder"));
                        };
                        let len = left.min(end - at);
                        let piece =
                            CopyEntry { offset: source.offset + done as u16, len: len as u16, ..*source };
                        batch.entries.push(piece.to_other(self.target.domid, page, to));
                        if len == left {
                            away = &away[1..];
                        }
                        at += len;
                    }
                }
                self.parts.push((part, first..batch.entries.len()));
            }
            planned.packets += 1;
        }
        self.parts.reverse();
        Ok(planned)
    }

    /// Answers the slots of the next planned packet, after the batch was carried out.
    fn answer(&mut self, frame: &RxFrame, statuses: &[i16]) -> Result<(), QueueError> {
        let slots = self.shape_of(frame).slots();
        let start = self.ring.ring().rsp_prod_pvt();
        let placing = PLACING | (slots as u64) << 32 | u64::from(start);
        self.ring.journal().mem().store_u64(self.user + U_PLACING, placing);
        for _ in 0..slots {
            let (Some((part, entries)), Some(slot)) = (self.parts.pop(), self.have.pop_front()) else {
                return Err(QueueError::Record("fewer slots than planned"));
            };
            match part {
                RxPart::Extra { extra, more } => {
                    let (status, aux) = pack_extra(extra, more);
                    self.ring.respond(slot, status, aux);
                }
                RxPart::Data { len, flags, .. } => {
                    let copied = done(&entries, statuses);
                    if !copied {
                        self.stats.rx_errors.add(1);
                    }
                    let status = if copied { (self.target.headroom + len) as i16 } else { NETIF_RSP_ERROR };
                    self.ring.respond(slot, status, flags.into());
                }
            }
        }
        self.stats.rx_packets.add(1);
        self.stats.rx_bytes.add(frame.frame.len as u64);
        Ok(())
    }

    /// Whether all copies of the next planned packet were done.
    fn all_copied(&self, frame: &RxFrame, statuses: &[i16]) -> bool {
        let parts = self.parts.iter().rev().take(self.shape_of(frame).slots());
        parts.clone().all(|(part, entries)| matches!(part, RxPart::Extra { .. }) || done(entries, statuses))
    }

    /// Another headroom, at most [`crate::slots::MAX_HEADROOM`], from the next packet on.
    pub fn set_headroom(&mut self, headroom: usize) {
        self.target.headroom = headroom.min(crate::slots::MAX_HEADROOM);
    }

    /// What the frontend is.
    pub fn target(&self) -> RxTarget {
        self.target
    }

    /// Packets that wait for slots.
    pub fn waiting(&self) -> usize {
        self.backlog.waiting().len()
    }

    /// To be asked before sleeping while packets wait: asks for an event for the next slot. True if there are enough
    /// for the next packet already.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn final_check(&mut self) -> Result<bool, JournalError> {
        let Some(&frame) = self.backlog.waiting().first() else { return Ok(false) };
        let needed = self.shape_of(&RxFrame { frame, hash: None }).slots();
        loop {
            if self.have.len() >= needed {
                return Ok(true);
            }
            self.taken.clear();
            self.ring.take(needed - self.have.len(), &mut self.taken)?;
            self.have.extend(self.taken.iter());
            if self.have.len() >= needed {
                return Ok(true);
            }
            if !self.ring.final_check()? {
                return Ok(false);
            }
        }
    }
}

/// Whether there are copies, and all were done.
fn done(entries: &Range<usize>, statuses: &[i16]) -> bool {
    !entries.is_empty() && statuses.get(entries.clone()).is_some_and(|s| s.iter().all(|&status| status == 0))
}

fn gref(request: &[u8]) -> u32 {
    u32::from_le_bytes([request[4], request[5], request[6], request[7]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_info_comes_back_from_the_journal() {
        for extra in [
            Extra::Gso { size: 0xfedc, gso_type: XEN_NETIF_GSO_TYPE_TCPV6, features: 0 },
            Extra::Xdp { headroom: 256 },
            Extra::Hash { hash_type: 3, algorithm: 1, value: 0xfedc_ba98 },
        ] {
            for more in [false, true] {
                let (status, aux) = pack_extra(extra, more);
                assert_eq!(unpack_extra(status, aux), NetifExtraInfo::new(extra, more));
            }
        }
    }
}

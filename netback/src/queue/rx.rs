//! From the TAP to the frontend's rx ring.
//!
//! Packets are read into the arena and noted in the journal's user area: a count, and for each packet where it lies
//! and at which response index its first slot is answered. The latter is stored before the first of its slots is
//! answered; since responses go out in ring order, the ring's own position tells after a kill how much of which packet
//! was answered, and the rest follows.

use std::collections::VecDeque;
use std::sync::Arc;

use domain_kit::grants::CopyBatch;
use domain_kit::journal::{
    IDENTITY_WORDS, JournalError, JournaledRing, MAX_ATTEMPTS, RingFormat, Shape, Slot,
};
use domain_kit::ring::{RingLayout, RingMem};
use hv_abi::{COPY_TO_GRANT, CopyEntry, MAX_COPY_ENTRIES};
use xen_abi::io::netif::*;

use super::{HALF, HEADROOM, Progress, QueueError, World};
use crate::offload::{self, Family, Meta, VNET_HDR_LEN, VnetHdr};
use crate::slots::{MAX_DATA_SLOTS, MAX_RX_PACKET, MIN_PACKET, RxPart, rx_part, rx_slots};
use crate::stats::Stats;
use crate::tap::Offloads;

/// Packets read and not yet delivered, at most.
const MAX_PACKETS: usize = 128;
/// Bytes of the arena that must be free to read a packet.
const MAX_READ: usize = HEADROOM + MAX_RX_PACKET;
const ARENA_END: usize = HALF;
/// Journal's user area: number of packets noted.
const U_COUNT: usize = 0;
/// Then the notes: offset u32, length u32 (0: dropped), response index u32, 1 if that is set u32.
const U_NOTES: usize = 8;
const NOTE: usize = 16;
const N_LEN: usize = 4;
const N_START: usize = 8;
const ASSIGNED: u64 = 1 << 32;
/// [`RingFormat`]'s `aux`: the response is extra info.
const AUX_EXTRA: u32 = 1 << 31;

/// Requests and responses of the rx ring. `status` is the response's; `aux` its flags, or, for extra info, the kind of
/// segmentation with `status` as its size.
#[derive(Clone, Copy, Debug)]
pub struct RxFormat;

impl RingFormat for RxFormat {
    fn req_size(&self) -> usize {
        RX_ENTRY_SIZE
    }
    fn rsp_size(&self) -> usize {
        size_of::<NetifRxResponse>()
    }
    fn response(&self, request: &[u8], status: i16, aux: u32, out: &mut [u8]) {
        let slot: RxSlot = if aux & AUX_EXTRA != 0 {
            let extra = Extra::Gso { size: status as u16, gso_type: aux as u8, features: 0 };
            NetifExtraInfo::new(extra, false).into()
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
        user_size: (U_NOTES + MAX_PACKETS * NOTE) as u32,
    }
}

/// A packet read and not yet delivered.
#[derive(Clone, Copy, Debug)]
struct Packet {
    /// Its note's number.
    note: usize,
    arena: usize,
    len: usize,
    meta: Meta,
    /// Slots of it that an earlier incarnation answered.
    answered: usize,
}

impl Packet {
    fn slots(&self) -> usize {
        rx_slots(self.len, self.meta)
    }
}

/// The rx direction of one queue.
#[derive(Debug)]
pub struct RxQueue<R, J> {
    ring: JournaledRing<R, J, RxFormat>,
    user: usize,
    offloads: Offloads,
    /// Taken and not answered, in ring order.
    have: VecDeque<Slot>,
    packets: VecDeque<Packet>,
    /// Slots that `packets` still need.
    needed: usize,
    /// Notes written since the arena was empty.
    notes: usize,
    /// First free byte of the arena.
    free: usize,
    /// The frontend has no slots for what waits.
    blocked: bool,
    /// How many of `packets` are delivered one at a time, because one of them crashed us.
    careful: usize,
    copy: CopyBatch,
    stats: Arc<Stats>,
}

impl<R: RingMem, J: RingMem> RxQueue<R, J> {
    /// Starts on a ring that a frontend has just connected.
    ///
    /// # Errors
    /// [`JournaledRing::create`]'s.
    pub fn create(
        ring: R,
        layout: RingLayout,
        journal: J,
        identity: [u32; IDENTITY_WORDS],
        offloads: Offloads,
        stats: Arc<Stats>,
    ) -> Result<Self, QueueError> {
        let ring = JournaledRing::create(ring, layout, journal, shape(&layout), identity, RxFormat)?;
        let this = Self::new(ring, offloads, stats);
        this.store(U_COUNT, 0);
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
        offloads: Offloads,
        arena: &impl RingMem,
        stats: Arc<Stats>,
    ) -> Result<Self, QueueError> {
        let (ring, unanswered) =
            JournaledRing::reattach(ring, layout, journal, shape(&layout), RxFormat, own_fault)?;
        let mut this = Self::new(ring, offloads, stats);
        this.have = unanswered.into();
        this.find_packets(arena).inspect_err(|_| this.ring.fail())?;
        let blamed = this.have.front().is_some_and(|&slot| this.ring.attempts(slot) >= MAX_ATTEMPTS);
        if blamed && let Some(packet) = this.packets.front().copied().filter(|p| p.answered == 0) {
            tracing::error!("a packet that crashed netback {MAX_ATTEMPTS} times is dropped");
            this.stats.poisoned.add(1);
            this.store(U_NOTES + packet.note * NOTE + N_LEN, 0);
            this.packets.pop_front();
            this.needed -= packet.slots();
        }
        if this.have.iter().any(|&slot| this.ring.attempts(slot) > 0) {
            this.careful = this.packets.len();
        }
        Ok(this)
    }

    fn new(ring: JournaledRing<R, J, RxFormat>, offloads: Offloads, stats: Arc<Stats>) -> Self {
        RxQueue {
            user: ring.journal().user_offset(),
            ring,
            offloads,
            have: VecDeque::new(),
            packets: VecDeque::new(),
            needed: 0,
            notes: 0,
            free: 0,
            blocked: false,
            careful: 0,
            copy: CopyBatch::default(),
            stats,
        }
    }

    fn load(&self, at: usize) -> u32 {
        self.ring.journal().mem().load_u32(self.user + at)
    }

    fn store(&self, at: usize, value: u32) {
        self.ring.journal().mem().store_u32(self.user + at, value);
    }

    /// Finds the packets that a dead incarnation had read and not delivered.
    fn find_packets(&mut self, arena: &impl RingMem) -> Result<(), QueueError> {
        let count = self.load(U_COUNT) as usize;
        if count > MAX_PACKETS {
            return Err(QueueError::Record("too many packets noted"));
        }
        let position = self.ring.ring().rsp_prod_pvt();
        for note in 0..count {
            let at = U_NOTES + note * NOTE;
            let (offset, len) = (self.load(at) as usize, self.load(at + N_LEN) as usize);
            self.notes = note + 1;
            if len == 0 {
                continue;
            }
            if offset < HEADROOM || offset + len > ARENA_END || !(MIN_PACKET..=MAX_RX_PACKET).contains(&len) {
                return Err(QueueError::Record("a packet lies outside its memory"));
            }
            self.free = self.free.max(offset + len).next_multiple_of(64);
            let mut packet = Packet { note, arena: offset, len, meta: read_meta(arena, offset), answered: 0 };
            let start = self.ring.journal().mem().load_u64(self.user + at + N_START);
            if start & ASSIGNED != 0 {
                let answered = position.wrapping_sub(start as u32) as i32;
                if answered >= packet.slots() as i32 {
                    continue;
                }
                packet.answered = answered.max(0) as usize;
                if packet.answered > 0 && !self.packets.is_empty() {
                    return Err(QueueError::Record("two packets are partly answered"));
                }
            }
            self.needed += packet.slots() - packet.answered;
            self.packets.push_back(packet);
        }
        Ok(())
    }

    /// Delivers what waits, as far as the frontend has slots.
    ///
    /// # Errors
    /// [`QueueError`]; the queue must not be used any more.
    pub fn run(&mut self, world: &mut impl World) -> Result<Progress, QueueError> {
        let mut progress = Progress { worked: self.fill(world)?, notify: false };
        while self.deliver(world)? {
            progress.worked = true;
            progress.notify |= self.ring.push();
        }
        if self.packets.is_empty() && self.notes > 0 {
            self.store(U_COUNT, 0);
            self.notes = 0;
            self.free = 0;
        }
        // What recovery found, with nothing else to do.
        progress.notify |= self.ring.push();
        Ok(progress)
    }

    /// Slots that can be had now.
    fn available(&self) -> Result<usize, QueueError> {
        let waiting =
            self.ring.ring().unconsumed().inspect_err(|_| self.ring.fail()).map_err(JournalError::from)?;
        Ok(self.have.len() + waiting as usize)
    }

    /// Reads packets, but never more than one beyond what the frontend has slots for.
    fn fill(&mut self, world: &mut impl World) -> Result<bool, QueueError> {
        let mut worked = false;
        self.blocked = false;
        // Bounded also if nothing of it can be delivered: tx has its turn too.
        for _ in 0..MAX_PACKETS {
            if self.notes == MAX_PACKETS || self.free + MAX_READ > ARENA_END {
                break;
            }
            if self.needed >= self.available()? {
                self.blocked = true;
                break;
            }
            let arena = self.free + HEADROOM;
            let read =
                world.receive(arena - VNET_HDR_LEN, VNET_HDR_LEN + MAX_RX_PACKET).map_err(QueueError::Tap)?;
            let Some(read) = read else { break };
            worked = true;
            let len = read.saturating_sub(VNET_HDR_LEN);
            if !(MIN_PACKET..=MAX_RX_PACKET).contains(&len) {
                self.stats.rx_dropped.add(1);
                continue;
            }
            let packet =
                Packet { note: self.notes, arena, len, meta: read_meta(world.arena(), arena), answered: 0 };
            let slots = packet.slots();
            if slots > MAX_DATA_SLOTS || (slots > 1 && !self.offloads.sg) {
                self.stats.rx_dropped.add(1);
                continue;
            }
            let at = U_NOTES + self.notes * NOTE;
            self.store(at, arena as u32);
            self.store(at + N_LEN, len as u32);
            self.ring.journal().mem().store_u64(self.user + at + N_START, 0);
            self.notes += 1;
            self.store(U_COUNT, self.notes as u32);
            self.free = (arena + len).next_multiple_of(64);
            self.needed += slots;
            self.packets.push_back(packet);
        }
        Ok(worked)
    }

    /// One round of grant copies and what follows from it; false if nothing could be done.
    fn deliver(&mut self, world: &mut impl World) -> Result<bool, QueueError> {
        self.copy.clear();
        let (domid, buffer) = world.copy_ids();
        let mut parts: Vec<(RxPart, Option<usize>)> = Vec::new();
        let mut count = 0;
        let mut position = self.ring.ring().rsp_prod_pvt();
        let limit = if self.careful > 0 { 1 } else { MAX_PACKETS };
        for i in 0..self.packets.len().min(limit) {
            let packet = self.packets[i];
            let slots = packet.slots() - packet.answered;
            if self.copy.entries.len() + slots > MAX_COPY_ENTRIES {
                break;
            }
            let want = (parts.len() + slots).saturating_sub(self.have.len());
            if want > 0 {
                let mut taken = Vec::with_capacity(want);
                self.ring.take(want, &mut taken)?;
                self.have.extend(taken);
            }
            if parts.len() + slots > self.have.len() {
                self.blocked = true;
                break;
            }
            if packet.answered == 0 {
                let start = u64::from(position) | ASSIGNED;
                let at = self.user + U_NOTES + packet.note * NOTE + N_START;
                self.ring.journal().mem().store_u64(at, start);
            }
            position = position.wrapping_add(slots as u32);
            self.ring.start(self.have[parts.len()]);
            let meta = self.finish_checksum(world.arena(), packet);
            for index in packet.answered..packet.slots() {
                let part = rx_part(packet.len, meta, index);
                let mut entry = None;
                if let RxPart::Data { offset, len, .. } = part {
                    entry = Some(self.copy.entries.len());
                    self.copy.entries.push(CopyEntry {
                        domid,
                        flags: COPY_TO_GRANT,
                        gref: gref(self.ring.request(self.have[parts.len()])),
                        offset: 0,
                        len: len as u16,
                        buffer,
                        buffer_offset: (packet.arena + offset) as u64,
                    });
                }
                parts.push((part, entry));
            }
            count += 1;
        }
        if count == 0 {
            return Ok(false);
        }
        world.copy(&mut self.copy)?;
        for (part, entry) in parts {
            let Some(slot) = self.have.pop_front() else { break };
            let copied = entry.is_none_or(|i| self.copy.statuses.get(i) == Some(&0));
            match part {
                RxPart::Extra(gso) => {
                    let kind = if gso.family == Family::V4 {
                        XEN_NETIF_GSO_TYPE_TCPV4
                    } else {
                        XEN_NETIF_GSO_TYPE_TCPV6
                    };
                    self.ring.respond(slot, gso.size as i16, AUX_EXTRA | u32::from(kind));
                }
                RxPart::Data { len, flags, .. } => {
                    if !copied {
                        self.stats.rx_errors.add(1);
                    }
                    let status = if copied { len as i16 } else { NETIF_RSP_ERROR };
                    self.ring.respond(slot, status, flags.into());
                }
            }
            self.needed -= 1;
        }
        self.careful = self.careful.saturating_sub(count);
        for packet in self.packets.drain(..count) {
            self.stats.rx_packets.add(1);
            self.stats.rx_bytes.add(packet.len as u64);
        }
        Ok(true)
    }

    /// Finishes the checksum of a packet for a frontend that cannot; gives what it is to be told.
    fn finish_checksum(&self, arena: &impl RingMem, packet: Packet) -> Meta {
        let mut meta = packet.meta;
        if !meta.csum_blank {
            return meta;
        }
        let mut ethertype = [0; 2];
        arena.copy_out(packet.arena + 12, &mut ethertype);
        let can = if ethertype == [0x86, 0xdd] { self.offloads.csum_ipv6 } else { self.offloads.csum };
        if !can && meta.gso.is_none() {
            let mut bytes = vec![0; packet.len];
            arena.copy_out(packet.arena, &mut bytes);
            if let Ok((at, value)) = offload::finish_checksum(&bytes) {
                arena.copy_in(packet.arena + at, &value);
            }
            meta.csum_blank = false;
        }
        meta
    }

    /// True if the frontend has no slots for what waits (or may wait): the TAP is then not to be read, and
    /// [`RxQueue::final_check`] asks for an event.
    pub fn blocked(&self) -> bool {
        self.blocked
    }

    /// To be asked before sleeping while [`RxQueue::blocked`]: takes what slots there are, so that the next one raises an event.
    /// True if there is something to do after all.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn final_check(&mut self) -> Result<bool, JournalError> {
        let mut taken = Vec::new();
        self.ring.take(self.needed.saturating_sub(self.have.len()), &mut taken)?;
        self.have.extend(taken);
        match self.packets.front() {
            Some(packet) if self.have.len() >= packet.slots() - packet.answered => Ok(true),
            _ => self.ring.final_check(),
        }
    }
}

fn gref(request: &[u8]) -> u32 {
    u32::from_le_bytes([request[4], request[5], request[6], request[7]])
}

fn read_meta(arena: &impl RingMem, packet: usize) -> Meta {
    let mut header = [0; VNET_HDR_LEN];
    arena.copy_out(packet - VNET_HDR_LEN, &mut header);
    offload::from_tap(VnetHdr::from_bytes(&header))
}

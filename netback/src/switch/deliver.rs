//! From a decision to the receiver: into a vif's queue, whole or in segments, to the uplink, or to all.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use domain_kit::ring::RingMem;

use super::port::{Port, lock};
use super::settings::Denied;
use super::{Lane, Origin, Switch, Table, Verdict};
use crate::headers::{ETH_LEN, Headers};
use crate::offload::{self, Family, MAX_HEADERS, VNET_HDR_LEN, VnetHdr};
use crate::queue::rx::{RxFrame, Share, Source, deliver_round};
use crate::queue::{Away, Fate, Frame, QueueError, SCRATCH, SCRATCH_BYTES};
use crate::segment;
use crate::slots::{MAX_DATA_SLOTS, RxShape};
use crate::spool::HEADROOM;
use domain_kit::ring::Span;
use xen_abi::PAGE_SIZE;

/// Packets of a batch for one queue of a vif.
pub(super) struct Run<'t> {
    port: &'t Port,
    queue: usize,
    frames: Vec<RxFrame>,
    /// Which of the batch they are.
    numbers: Vec<usize>,
    /// How many are delivered.
    placed: usize,
}

impl<'t> Run<'t> {
    /// Of one packet, number `i` of its batch.
    pub(super) fn new(port: &'t Port, queue: usize, i: usize, frame: RxFrame) -> Run<'t> {
        Run { port, queue, frames: vec![frame], numbers: vec![i], placed: 0 }
    }

    /// One more.
    pub(super) fn push(&mut self, i: usize, frame: RxFrame) {
        self.frames.push(frame);
        self.numbers.push(i);
    }

    /// Fetches what is away of packets that are not delivered yet; those of which it does not come are refused.
    fn complete(&mut self, lane: &mut Lane, fates: &mut [Fate]) {
        let away = |frame: &RxFrame| Some(frame.frame.away).filter(|away| !away.is_nothing());
        let which: Vec<Away> = self.frames.iter().skip(self.placed).filter_map(away).collect();
        let mut came = lane.fetch(&which).into_iter();
        let frames = std::mem::take(&mut self.frames);
        let numbers = std::mem::take(&mut self.numbers);
        for (k, (mut frame, i)) in frames.into_iter().zip(numbers).enumerate() {
            if k >= self.placed && !frame.frame.away.is_nothing() {
                if !came.next().unwrap_or(false) {
                    fates[i] = Fate::Refused;
                    continue;
                }
                frame.frame.away = Away::NOTHING;
            }
            self.push(i, frame);
        }
    }

    /// The vif's slot, and the queue.
    pub(super) fn to(&self) -> (u16, usize) {
        (self.port.slot, self.queue)
    }
}

/// A queue that nobody else delivers to at the moment.
fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl Switch {
    /// Delivers packets of the lane's arena to the queues they are for, and empties `runs`.
    pub(super) fn deliver(
        &self,
        runs: &mut Vec<Run<'_>>,
        lane: &mut Lane,
        fates: &mut [Fate],
        commit: &mut dyn FnMut(usize),
    ) {
        runs.retain(|run| {
            let port = run.port;
            let Some(handle) = port.queues.get(run.queue) else { return false };
            if !port.settings().link {
                port.stats.rx_dropped.add(run.frames.len() as u64);
                return false;
            }
            // Before anybody can answer it.
            self.captures.add(port.id, true, &lane.arena, run.frames.iter().map(|rx| &rx.frame));
            let Some(vhost) = &handle.vhost else { return true };
            let sent = vhost.deliver(&lane.arena, &run.frames, &port.stats, &mut |k| commit(run.numbers[k]));
            let sent = sent.unwrap_or_else(|error| {
                port.fail(error.to_string());
                0
            });
            run.numbers.iter().take(sent).for_each(|&i| fates[i] = Fate::Sent);
            false
        });
        while !runs.is_empty() {
            deliver_rings(runs, lane, fates, commit);
        }
    }

    /// Delivers packets of the lane's arena to one queue; says how many were not dropped.
    fn give(&self, port: &Port, queue: usize, lane: &mut Lane, frames: Vec<RxFrame>) -> usize {
        let mut fates = vec![Fate::default(); frames.len()];
        let run = Run { port, queue, numbers: (0..frames.len()).collect(), frames, placed: 0 };
        self.deliver(&mut vec![run], lane, &mut fates, &mut |_| {});
        fates.iter().filter(|&&fate| fate == Fate::Sent).count()
    }

    /// Cuts a large packet for a frontend that cannot take it whole.
    pub(super) fn give_segments(
        &self,
        port: &Port,
        queue: usize,
        lane: &mut Lane,
        frame: &Frame,
        commit: &mut dyn FnMut(),
    ) -> Fate {
        let mut packet = vec![0; frame.len];
        lane.arena.copy_out(frame.at, &mut packet);
        let Some(segments) = frame.meta.gso.and_then(|gso| segment::segment(&packet, gso)) else {
            return Fate::Refused;
        };
        let mut run = Vec::with_capacity(segments.len());
        let mut at = SCRATCH;
        for bytes in &segments {
            if at + HEADROOM + bytes.len() > SCRATCH + SCRATCH_BYTES {
                return Fate::Dropped;
            }
            run.push(RxFrame { frame: put(&lane.arena, at, bytes), hash: None });
            at = (at + HEADROOM + bytes.len()).next_multiple_of(64);
        }
        commit();
        match self.give(port, queue, lane, run) {
            0 => Fate::Dropped,
            _ => Fate::Sent,
        }
    }

    pub(super) fn to_uplink(&self, lane: &Lane, frame: &Frame) -> Fate {
        let tap = self.uplink.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(tap) = tap else { return Fate::Dropped };
        let from = lane.arena.absolute(frame.at - VNET_HDR_LEN);
        match tap.write(lane.arena.mem(), from, VNET_HDR_LEN + frame.len) {
            Ok(Some(_)) => {
                self.stats.rx_packets.add(1);
                self.stats.rx_bytes.add(frame.len as u64);
                Fate::Sent
            }
            Ok(None) => {
                self.stats.rx_dropped.add(1);
                Fate::Dropped
            }
            Err(error) => {
                tracing::debug!(%error, "the TAP refused a packet");
                self.stats.rx_errors.add(1);
                Fate::Refused
            }
        }
    }

    /// To all that may want it. The sender's own mark stands already.
    pub(super) fn flood(&self, table: &Table, origin: Origin<'_>, lane: &mut Lane, frame: &Frame) {
        let mut bytes = [0; MAX_HEADERS];
        let bytes = &mut bytes[..frame.len.min(MAX_HEADERS)];
        lane.arena.copy_out(frame.at, bytes);
        let h = Headers::parse(bytes);
        let (dst, from) = (
            h.dst(),
            match origin {
                Origin::Vif(port) => Some((port.slot, port.settings())),
                Origin::Uplink => None,
            },
        );
        if from.is_some() {
            self.to_uplink(lane, frame);
        }
        // Finished once for all: one receiver's needs must not change the bytes under another's blank checksum.
        let mut frame = *frame;
        if frame.meta.gso.is_none() && frame.meta.csum_blank {
            finish(&lane.arena, &mut frame);
        }
        let frame = &frame;
        for (&slot, port) in &table.ports {
            let settings = port.settings();
            let wanted = match &from {
                Some((own, mine)) => slot != *own && self.may_talk(mine, &settings),
                None => true,
            };
            let heard = if h.is_multicast() {
                port.groups.read().unwrap_or_else(PoisonError::into_inner).lets(dst)
            } else {
                // Unknown, and of a locked vif everything is known.
                !settings.locked()
            };
            if !wanted || !heard {
                continue;
            }
            match to_port(table, slot, frame, bytes) {
                Verdict::Port { queue, hash, frame, segment: false, .. } => {
                    self.give(port, queue, lane, vec![RxFrame { frame, hash }]);
                }
                Verdict::Port { queue, frame, .. } => {
                    self.give_segments(port, queue, lane, &frame, &mut || {});
                }
                _ => {}
            }
        }
    }

    pub(super) fn answer(&self, origin: Origin<'_>, lane: &mut Lane, bytes: &[u8]) {
        if bytes.len() > SCRATCH_BYTES - HEADROOM {
            return;
        }
        let frame = put(&lane.arena, SCRATCH, bytes);
        match origin {
            Origin::Vif(port) => {
                self.give(port, 0, lane, vec![RxFrame { frame, hash: None }]);
            }
            Origin::Uplink => {
                self.to_uplink(lane, &frame);
            }
        }
    }
}

/// One round of grant copies for as many queues as are free; those that others deliver to at the moment come next time.
/// Whoever holds a queue waits for no other, so nobody waits for ever.
fn deliver_rings(
    runs: &mut Vec<Run<'_>>,
    lane: &mut Lane,
    fates: &mut [Fate],
    commit: &mut dyn FnMut(usize),
) {
    let mut locked: Vec<(usize, MutexGuard<'_, _>)> = Vec::with_capacity(runs.len());
    for (number, run) in runs.iter().enumerate() {
        let queue = &run.port.queues[run.queue].queue;
        let guard = if locked.is_empty() { Some(lock(queue)) } else { try_lock(queue) };
        locked.extend(guard.map(|guard| (number, guard)));
    }
    let arena = lane.arena.clone();
    let away = std::mem::take(&mut lane.away);
    let base = arena.absolute(0) as u64;
    let source = Source { arena: &arena, buffer: lane.buffer, base, away: &away };
    let mut copies = std::mem::take(&mut lane.copies);
    // Given up, or over in this round; then whether the frontend is to be notified, or why the queue fails.
    let mut over: Vec<(usize, Result<bool, String>)> = Vec::new();
    let (mut shares, mut numbers) = (Vec::with_capacity(locked.len()), Vec::with_capacity(locked.len()));
    for (number, guard) in &mut locked {
        let run = &runs[*number];
        match guard.as_mut() {
            Some(queue) => {
                shares.push(Share {
                    queue,
                    frames: &run.frames,
                    placed: run.placed,
                    wants_whole: false,
                    over: None,
                });
                numbers.push(*number);
            }
            None => over.push((*number, Ok(false))),
        }
    }
    deliver_round(lane, &mut copies, &source, &mut shares, &mut |share, i| {
        commit(runs[numbers[share]].numbers[i]);
    });
    let mut broken = Vec::new();
    let outcomes: Vec<_> =
        shares.into_iter().map(|share| (share.placed, share.wants_whole, share.over)).collect();
    let mut incomplete = Vec::new();
    for (&number, (placed, wants_whole, result)) in numbers.iter().zip(outcomes) {
        let run = &mut runs[number];
        run.placed = placed;
        if wants_whole {
            incomplete.push(number);
        }
        match result {
            None => {}
            Some(Ok(delivery)) => {
                let sent = run.frames.len() - delivery.dropped;
                run.numbers.iter().take(sent).for_each(|&i| fates[i] = Fate::Sent);
                over.push((number, Ok(delivery.notify)));
            }
            Some(Err(error)) => {
                run.numbers.iter().take(placed).for_each(|&i| fates[i] = Fate::Sent);
                // hv-core's trouble is not the frontend's fault, but nothing can be delivered with it.
                if !matches!(error, QueueError::Copy(_) | QueueError::CopyOfAll) {
                    broken.push(number);
                }
                over.push((number, Err(error.to_string())));
            }
        }
    }
    for (number, guard) in &mut locked {
        if broken.contains(number) {
            guard.take();
        }
    }
    lane.copies = copies;
    lane.away = away;
    drop(locked);
    for number in incomplete {
        runs[number].complete(lane, fates);
    }
    for (number, result) in &over {
        let port = runs[*number].port;
        match result {
            Ok(notify) => port.queues[runs[*number].queue].notify(*notify, &port.stats),
            Err(why) => port.fail(why.clone()),
        }
    }
    let mut number = 0;
    runs.retain(|_| {
        number += 1;
        !over.iter().any(|(done, _)| *done == number - 1)
    });
}

/// Writes a finished packet to the scratch.
fn put(arena: &Span, at: usize, bytes: &[u8]) -> Frame {
    arena.copy_in(at + HEADROOM - VNET_HDR_LEN, &VnetHdr::default().to_bytes());
    arena.copy_in(at + HEADROOM, bytes);
    Frame { at: at + HEADROOM, len: bytes.len(), meta: offload::Meta::default(), away: Away::NOTHING }
}

/// Finishes a blank checksum.
pub(super) fn finish(arena: &Span, frame: &mut Frame) {
    let mut packet = vec![0; frame.len];
    arena.copy_out(frame.at, &mut packet);
    if let Ok((at, value)) = offload::finish_checksum(&packet) {
        arena.copy_in(frame.at + at, &value);
    }
    frame.meta.csum_blank = false;
    frame.meta.data_validated = true;
    arena.copy_in(frame.at - VNET_HDR_LEN, &VnetHdr::validated().to_bytes());
}

/// Makes a packet such as a port can take it, and chooses its queue.
pub(super) fn to_port(table: &Table, slot: u16, frame: &Frame, bytes: &[u8]) -> Verdict {
    let Some(port) = table.ports.get(&slot) else { return Verdict::Drop(Denied::NoWay) };
    let offloads = &port.offloads;
    let h = Headers::parse(bytes);
    let (queue, hash) = port.hash().queue(&h, port.queues.len());
    let frame = *frame;
    let csum = if offload::is_ipv6(bytes) { offloads.csum_ipv6 } else { offloads.csum };
    if let Some(gso) = frame.meta.gso {
        let can = offloads.sg
            && csum
            && match gso.family {
                Family::V4 => offloads.gso_tcpv4,
                Family::V6 => offloads.gso_tcpv6,
            };
        // Segments of more than a page for one that takes a page at most are of no use to it.
        if !can && !offloads.sg && usize::from(gso.size) + MAX_HEADERS + port.headroom() > PAGE_SIZE {
            port.stats.rx_dropped.add(1);
            return Verdict::Unfit;
        }
        if !can {
            return Verdict::Port { slot, queue, hash: None, frame, segment: true, finish: false };
        }
    } else if frame.len > port.settings().mtu as usize + ETH_LEN + 4 {
        port.stats.rx_dropped.add(1);
        return Verdict::Unfit;
    }
    let finish = frame.meta.csum_blank && !csum;
    let shape = RxShape { len: frame.len, meta: frame.meta, hash, headroom: port.headroom() };
    if shape.data_slots() > MAX_DATA_SLOTS || (shape.data_slots() > 1 && !offloads.sg) {
        port.stats.rx_dropped.add(1);
        return Verdict::Unfit;
    }
    Verdict::Port { slot, queue, hash, frame, segment: false, finish }
}

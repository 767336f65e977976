//! The queue from the guest, and the thread that serves it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain_kit::ring::{RingMem, Span};
use domain_kit::vhost::queue::{Chain, Queue, QueueError, Segment};
use domain_kit::vhost::session::{Call, clear_kick};

use super::{HDR, Shared};
use crate::offload::{self, MAX_HEADERS, VNET_HDR_LEN, VnetHdr};
use crate::queue::{Away, Fate, Frame, SCRATCH};
use crate::slots::{MAX_RX_PACKET, MIN_PACKET};
use crate::spool::HEADROOM;
use crate::switch::port::{Port, lock};
use crate::switch::{Lane, Origin};
use crate::worker::Control;

/// Packets handed to the switch at once.
const BATCH: usize = 32;

/// The thread that serves what the guest sends, and fires its interrupts.
pub(super) struct TxWork {
    queue: Queue,
    kick: OwnedFd,
    call: Arc<Call>,
    shared: Arc<Shared>,
    port: Arc<Port>,
    chain: Chain,
}

impl TxWork {
    pub(super) fn new(
        queue: Queue,
        kick: OwnedFd,
        call: Arc<Call>,
        shared: Arc<Shared>,
        port: Arc<Port>,
    ) -> TxWork {
        TxWork { queue, kick, call, shared, port, chain: Chain::default() }
    }

    pub(super) fn run(&mut self, control: &Control, lane: &mut Lane) {
        // What a predecessor did may not have been told.
        self.call.fire();
        let rx_kick = lock(&self.shared.rx_kick).as_ref().and_then(|kick| kick.try_clone().ok());
        let mut broken = false;
        while !control.stopping() {
            if control.resting() {
                control.sleep(&[], None);
                continue;
            }
            let (budget, wait) = self.budget();
            let mut worked = false;
            if budget > 0 && !broken {
                match self.round(lane, budget) {
                    Ok(any) => worked |= any,
                    Err(error) => {
                        tracing::error!(id = %self.shared.id, %error, "the queue is not served any more");
                        broken = true;
                    }
                }
            }
            worked |= self.shared.rx.settle(&self.shared.stats, self.shared.id);
            if worked || (budget > 0 && !broken && self.queue.ask_for_kicks()) {
                continue;
            }
            let mut fds = vec![self.kick.as_fd(), self.shared.rx.woken()];
            fds.extend(rx_kick.iter().map(AsFd::as_fd));
            control.sleep(&fds, wait);
            clear_kick(&self.kick);
            self.shared.rx.clear();
            rx_kick.iter().for_each(clear_kick);
        }
        *lock(&self.shared.tx_next) = self.queue.next_avail();
    }

    fn budget(&self) -> (usize, Option<Duration>) {
        match lock(&self.port.bucket).as_mut() {
            None => (usize::MAX, None),
            Some(bucket) => match bucket.budget(Instant::now()) {
                0 => (0, Some(bucket.wait())),
                budget => (budget, None),
            },
        }
    }

    /// Takes packets and hands them on; true if there were any.
    fn round(&mut self, lane: &mut Lane, budget: usize) -> Result<bool, QueueError> {
        self.queue.no_kicks();
        let mut heads: Vec<u16> = Vec::with_capacity(BATCH);
        // For each frame, how many heads are over when it is.
        let mut ends: Vec<usize> = Vec::with_capacity(BATCH);
        let mut frames: Vec<Frame> = Vec::with_capacity(BATCH);
        let (mut at, mut bytes) = (0, 0);
        while heads.len() < BATCH && bytes < budget && at + HEADROOM + MAX_RX_PACKET <= SCRATCH {
            let Some(head) = self.queue.take()? else { break };
            heads.push(head);
            let frame = match self.queue.chain(head, &mut self.chain) {
                Ok(()) => fetch(&self.chain, &lane.arena, at + HEADROOM),
                Err(error) => {
                    tracing::debug!(%error, "a packet is refused");
                    None
                }
            };
            match frame {
                Some(frame) => {
                    bytes += frame.len;
                    at = (frame.at + frame.len).next_multiple_of(64);
                    frames.push(frame);
                    ends.push(heads.len());
                }
                None => self.shared.stats.tx_errors.add(1),
            }
        }
        if heads.is_empty() {
            return Ok(false);
        }
        let mut fates = vec![Fate::default(); frames.len()];
        let mut given = 0;
        let (queue, port, switch) = (&mut self.queue, &self.port, &self.shared.switch);
        let mut give_to = |end: usize, queue: &mut Queue| {
            while given < end {
                queue.give(heads[given], 0);
                given += 1;
            }
        };
        switch.forward(Origin::Vif(port), lane, &frames, &mut fates, &mut |i| give_to(ends[i], queue));
        give_to(heads.len(), queue);
        for (frame, fate) in frames.iter().zip(&fates) {
            let stats = &self.shared.stats;
            match fate {
                Fate::Sent => {
                    stats.tx_packets.add(1);
                    stats.tx_bytes.add(frame.len as u64);
                }
                Fate::Dropped => stats.tx_dropped.add(1),
                Fate::Refused => stats.tx_errors.add(1),
            }
        }
        if let Some(bucket) = lock(&self.port.bucket).as_mut() {
            bucket.take(bytes);
        }
        if self.queue.must_notify() {
            self.call.fire();
            self.shared.stats.notifies.add(1);
        }
        Ok(true)
    }
}

/// Copies a packet out of the guest's memory and judges its header. `None`: it makes no sense.
fn fetch(chain: &Chain, arena: &Span, at: usize) -> Option<Frame> {
    let all: usize = chain.readable.iter().map(|s| s.len).sum();
    let len = all.checked_sub(HDR).filter(|len| (MIN_PACKET..=MAX_RX_PACKET).contains(len))?;
    let mut header = [0; HDR];
    let mut done = 0;
    for segment in &chain.readable {
        let Segment { place, len } = segment;
        // The header's part of this segment, then the packet's.
        let of_header = HDR.saturating_sub(done).min(*len);
        place.mem.copy_out(place.offset, &mut header[done.min(HDR)..done.min(HDR) + of_header]);
        let rest = len - of_header;
        if rest > 0 {
            let to = arena.absolute(at + done + of_header - HDR);
            arena.mem().copy_from(to, &place.mem, place.offset + of_header, rest);
        }
        done += len;
    }
    let mut tap = [0; VNET_HDR_LEN];
    tap.copy_from_slice(&header[..VNET_HDR_LEN]);
    let meta = offload::from_tap(VnetHdr::from_bytes(&tap));
    let mut headers = [0; MAX_HEADERS];
    let headers = &mut headers[..len.min(MAX_HEADERS)];
    arena.copy_out(at, headers);
    // What the guest says of its packet is judged by the packet's own headers.
    let out = offload::to_tap(meta, headers, len).ok()?;
    arena.copy_in(at - VNET_HDR_LEN, &out.hdr.to_bytes());
    if let Some((offset, value)) = out.patch {
        arena.copy_in(at + offset, &value);
    }
    crate::fault::look(len);
    Some(Frame { at, len, meta: offload::from_tap(out.hdr), away: Away::NOTHING })
}

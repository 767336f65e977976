//! The queue to the guest: everybody delivers into it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use domain_kit::mem::SharedMem;
use domain_kit::ring::{RingMem, Span};
use domain_kit::vhost::queue::{Chain, Queue, QueueError, Segment};
use domain_kit::vhost::session::Call;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::HDR;
use crate::connection::VifId;
use crate::offload::VNET_HDR_LEN;
use crate::queue::rx::RxFrame;
use crate::stats::Stats;
use crate::switch::port::lock;

/// What waits for a guest without buffers: as for Xen's rings.
const WAIT_PACKETS: usize = 512;
const WAIT_BYTES: usize = 2 << 20;
/// Most buffers of one packet.
const MAX_BUFFERS: u16 = 64;

/// The queue to the guest.
struct RxState {
    queue: Queue,
    call: Arc<Call>,
    mergeable: bool,
    /// The guest takes blank checksums.
    csum: bool,
    chain: Chain,
    /// Packets, their headers first.
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    /// The driver is to be told.
    told: bool,
}

/// A packet's bytes, header first, wherever they lie.
enum Packet<'a> {
    Arena { mem: &'a SharedMem, at: usize, len: usize },
    Own(&'a [u8]),
}

impl Packet<'_> {
    fn len(&self) -> usize {
        match self {
            Packet::Arena { len, .. } => *len,
            Packet::Own(bytes) => bytes.len(),
        }
    }

    fn copy(&self, from: usize, to: &Segment, offset: usize, len: usize) {
        let (mem, at) = (&to.place.mem, to.place.offset + offset);
        match self {
            Packet::Arena { mem: source, at: base, .. } => mem.copy_from(at, source, base + from, len),
            Packet::Own(bytes) => mem.copy_in(at, &bytes[from..from + len]),
        }
    }
}

impl RxState {
    /// Puts a packet into the guest's buffers; false if there are none now.
    ///
    /// # Errors
    /// The driver broke the protocol.
    fn put(&mut self, header: &[u8; VNET_HDR_LEN], packet: &Packet<'_>) -> Result<bool, QueueError> {
        let mut header = *header;
        // Congestion marks were not offered, nor checksums that nobody may leave out.
        header[1] &= 0x7f;
        if !self.csum {
            header[0] = 0;
        }
        let (mut copied, mut buffers) = (0, 0);
        let mut first: Option<Segment> = None;
        let mut heads: Vec<u16> = Vec::new();
        while copied < packet.len() || buffers == 0 {
            let more = if buffers == 0 || (self.mergeable && buffers < MAX_BUFFERS) {
                self.queue.take()?
            } else {
                tracing::debug!("a packet is longer than the guest's buffer");
                heads.iter().for_each(|_| self.queue.put_back());
                return Ok(true);
            };
            let Some(head) = more else {
                heads.iter().for_each(|_| self.queue.put_back());
                return Ok(false);
            };
            heads.push(head);
            if let Err(error) = self.queue.chain(head, &mut self.chain) {
                tracing::debug!(%error, "the guest's buffer");
                self.chain = Chain::default();
            }
            let mut skip = if buffers == 0 { HDR } else { 0 };
            let mut written = skip;
            for segment in &self.chain.writable {
                let mut offset = 0;
                if skip > 0 {
                    if first.is_none() {
                        if segment.len < HDR {
                            break;
                        }
                        first = Some(segment.clone());
                    }
                    offset = skip;
                    skip = 0;
                }
                let n = (segment.len - offset).min(packet.len() - copied);
                packet.copy(copied, segment, offset, n);
                (copied, written) = (copied + n, written + n);
            }
            self.queue.wrote(&self.chain.writable, written as u64);
            self.queue.stage(buffers, head, written as u32);
            buffers += 1;
        }
        if let Some(segment) = first {
            segment.place.mem.copy_in(segment.place.offset, &header);
            segment.place.mem.copy_in(segment.place.offset + VNET_HDR_LEN, &buffers.to_le_bytes());
            self.queue.memory().log().wrote(segment.place.gpa, HDR as u64);
        }
        self.queue.show(buffers);
        Ok(true)
    }

    /// Delivers what waits.
    fn flush(&mut self) -> Result<bool, QueueError> {
        let mut any = false;
        while let Some(packet) = self.waiting.pop_front() {
            let mut header = [0; VNET_HDR_LEN];
            header.copy_from_slice(&packet[..VNET_HDR_LEN]);
            if !self.put(&header, &Packet::Own(&packet[VNET_HDR_LEN..]))? {
                self.waiting.push_front(packet);
                break;
            }
            self.waiting_bytes -= packet.len();
            any = true;
        }
        if any && self.queue.must_notify() {
            self.told = true;
        }
        Ok(any)
    }
}

/// To the guest: everybody delivers here, under a lock.
pub struct VhostRx {
    state: Mutex<Option<RxState>>,
    /// Wakes the vif's own thread.
    wake: EventFd,
}

impl std::fmt::Debug for VhostRx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VhostRx")
    }
}

impl VhostRx {
    pub(super) fn new() -> std::io::Result<VhostRx> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(VhostRx { state: Mutex::new(None), wake: EventFd::from_value_and_flags(0, flags)? })
    }

    /// Packets go to this queue from now on. `csum`: the guest takes blank checksums.
    pub(super) fn start(&self, queue: Queue, call: Arc<Call>, mergeable: bool, csum: bool) {
        let (chain, waiting) = (Chain::default(), VecDeque::new());
        // What a predecessor delivered may not have been told.
        let state = RxState { queue, call, mergeable, csum, chain, waiting, waiting_bytes: 0, told: true };
        *lock(&self.state) = Some(state);
        self.awake();
    }

    /// Nobody delivers to the queue when this returns; gives where it stands.
    pub(super) fn stop(&self) -> u16 {
        lock(&self.state).take().map_or(0, |state| state.queue.next_avail())
    }

    /// Delivers what waited for buffers, and fires the guest's interrupt; true if there may be more to do. For the vif's own thread.
    pub(super) fn settle(&self, stats: &Stats, id: VifId) -> bool {
        let mut guard = lock(&self.state);
        let Some(state) = guard.as_mut() else { return false };
        let mut worked = false;
        if !state.waiting.is_empty() {
            match state.flush() {
                Ok(any) => worked = any || (!state.waiting.is_empty() && state.queue.ask_for_kicks()),
                Err(error) => {
                    tracing::error!(%id, %error, "nothing is delivered any more");
                    guard.take();
                    return false;
                }
            }
        }
        let call = std::mem::take(&mut state.told).then(|| state.call.clone());
        drop(guard);
        if let Some(call) = call {
            call.fire();
            stats.notifies.add(1);
        }
        worked
    }

    /// Becomes readable when [`VhostRx::settle`] has something to do.
    pub(super) fn woken(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// What is readable now is known.
    pub(super) fn clear(&self) {
        let _nothing_there_is_fine = self.wake.read();
    }

    fn awake(&self) {
        let _full_is_awake_too = self.wake.write(1);
    }

    /// Delivers packets of an arena; says how many were not dropped. `commit(i)` is called just before the guest can see packet `i`.
    ///
    /// # Errors
    /// The driver broke the protocol: nothing is delivered any more.
    pub fn deliver(
        &self,
        arena: &Span,
        run: &[RxFrame],
        stats: &Stats,
        commit: &mut dyn FnMut(usize),
    ) -> Result<usize, QueueError> {
        let mut guard = lock(&self.state);
        let Some(state) = guard.as_mut() else { return Ok(0) };
        let result = (|| {
            let mut delivered = 0;
            for (i, RxFrame { frame, .. }) in run.iter().enumerate() {
                commit(i);
                let mut header = [0; VNET_HDR_LEN];
                arena.copy_out(frame.at - VNET_HDR_LEN, &mut header);
                let packet = Packet::Arena { mem: arena.mem(), at: arena.absolute(frame.at), len: frame.len };
                let there = state.waiting.is_empty() && state.put(&header, &packet)?;
                if !there {
                    let len = VNET_HDR_LEN + frame.len;
                    if state.waiting.len() >= WAIT_PACKETS || state.waiting_bytes + len > WAIT_BYTES {
                        stats.rx_dropped.add(1);
                        continue;
                    }
                    let mut bytes = vec![0; len];
                    bytes[..VNET_HDR_LEN].copy_from_slice(&header);
                    arena.copy_out(frame.at, &mut bytes[VNET_HDR_LEN..]);
                    state.waiting.push_back(bytes);
                    state.waiting_bytes += len;
                }
                stats.rx_packets.add(1);
                stats.rx_bytes.add(frame.len as u64);
                delivered += 1;
            }
            Ok(delivered)
        })();
        if state.queue.must_notify() {
            state.told = true;
        }
        if state.told || !state.waiting.is_empty() {
            self.awake();
        }
        if result.is_err() {
            guard.take();
        }
        result
    }
}

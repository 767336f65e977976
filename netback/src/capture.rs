//! Copies of a vif's packets for `bh capture`: what its guest sends, before any rule, and what reaches its guest.
//!
//! The threads of the data path only copy into a queue of bounded length; a reader that is too slow misses packets and is told how
//! many. Without a capture they look at one number for each batch.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use domain_kit::ring::RingMem;
use proto::toolstack::{CapturedPacket, CapturedPackets};
use tokio::sync::Notify;

use crate::connection::VifId;
use crate::queue::Frame;
use crate::switch::port::lock;

/// Most captures at a time.
pub const MAX_CAPTURES: usize = 8;
/// Bytes that wait for the reader of one capture at most, and what is counted for a packet beside its bytes.
const MAX_WAITING: usize = 2 << 20;
const PACKET: usize = 64;
/// Bytes of one message, but for the packet that makes it full.
const MAX_MESSAGE: usize = 1 << 20;

#[derive(Debug, Default)]
struct Waiting {
    packets: VecDeque<CapturedPacket>,
    bytes: usize,
    dropped: u64,
    ended: bool,
}

/// One capture.
#[derive(Debug)]
pub struct Capture {
    vif: VifId,
    snap: usize,
    waiting: Mutex<Waiting>,
    filled: Notify,
}

impl Capture {
    fn add(&self, arena: &impl RingMem, frame: &Frame, to_guest: bool, unix_ns: u64) {
        let len = frame.here().min(self.snap);
        let mut waiting = lock(&self.waiting);
        // Once some were missed, all are until the reader is told where.
        if waiting.dropped > 0 || waiting.bytes + len + PACKET > MAX_WAITING {
            waiting.dropped += 1;
            return;
        }
        let mut data = vec![0; len];
        arena.copy_out(frame.at, &mut data);
        waiting.bytes += len + PACKET;
        let packet = CapturedPacket { unix_ns, to_guest, length: frame.len as u32, data };
        waiting.packets.push_back(packet);
    }

    /// What waits, up to the length of a message; `None`: nothing for now. `Err` when the vif is not served any more.
    fn take(&self) -> Result<Option<CapturedPackets>, Ended> {
        let mut waiting = lock(&self.waiting);
        if waiting.packets.is_empty() && waiting.dropped == 0 {
            return if waiting.ended { Err(Ended) } else { Ok(None) };
        }
        let mut out = CapturedPackets::default();
        let mut bytes = 0;
        while bytes < MAX_MESSAGE
            && let Some(packet) = waiting.packets.pop_front()
        {
            bytes += packet.data.len() + PACKET;
            out.packets.push(packet);
        }
        waiting.bytes -= bytes;
        // What was missed came after all that waited.
        if out.packets.is_empty() {
            out.dropped = std::mem::take(&mut waiting.dropped);
        }
        Ok(Some(out))
    }

    /// The next packets, when there are some.
    ///
    /// # Errors
    /// [`Ended`].
    pub async fn next(&self) -> Result<CapturedPackets, Ended> {
        loop {
            let filled = self.filled.notified();
            if let Some(packets) = self.take()? {
                return Ok(packets);
            }
            filled.await;
        }
    }
}

/// The vif is not served any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended;

/// The captures of all vifs.
#[derive(Debug, Default)]
pub struct Captures {
    count: AtomicUsize,
    list: RwLock<Vec<Arc<Capture>>>,
}

impl Captures {
    /// Begins one, of `snap` bytes of each packet; `None` if there are [`MAX_CAPTURES`]. It lasts until the answer is dropped.
    pub fn begin(self: &Arc<Self>, vif: VifId, snap: usize) -> Option<Running> {
        let capture = Arc::new(Capture { vif, snap, waiting: Mutex::default(), filled: Notify::new() });
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        if list.len() >= MAX_CAPTURES {
            return None;
        }
        list.push(capture.clone());
        self.count.store(list.len(), Ordering::Relaxed);
        Some(Running { all: self.clone(), capture })
    }

    /// Ends those of a vif, which is not served any more.
    pub fn end(&self, vif: VifId) {
        for capture in self.list.read().unwrap_or_else(PoisonError::into_inner).iter() {
            if capture.vif == vif {
                lock(&capture.waiting).ended = true;
                capture.filled.notify_one();
            }
        }
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    /// Copies packets, if somebody wants them.
    pub fn add<'a>(
        &self,
        vif: VifId,
        to_guest: bool,
        arena: &impl RingMem,
        frames: impl Iterator<Item = &'a Frame> + Clone,
    ) {
        if !self.any() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
        for capture in self.list.read().unwrap_or_else(PoisonError::into_inner).iter() {
            if capture.vif == vif {
                frames.clone().for_each(|frame| capture.add(arena, frame, to_guest, now));
                capture.filled.notify_one();
            }
        }
    }
}

/// A capture that goes on until this is dropped.
#[derive(Debug)]
pub struct Running {
    all: Arc<Captures>,
    capture: Arc<Capture>,
}

impl std::ops::Deref for Running {
    type Target = Capture;

    fn deref(&self) -> &Capture {
        &self.capture
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut list = self.all.list.write().unwrap_or_else(PoisonError::into_inner);
        list.retain(|capture| !Arc::ptr_eq(capture, &self.capture));
        self.all.count.store(list.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::Meta;
    use domain_kit::ring::HeapMem;

    const VIF: VifId = VifId { frontend: 5, handle: 0 };

    #[test]
    fn bounded_and_it_says_what_is_missing() {
        let all = Arc::new(Captures::default());
        let arena = HeapMem::new(1 << 16);
        arena.copy_in(64, &[7; 1000]);
        let frame = Frame { at: 64, len: 1000, meta: Meta::default(), away: crate::queue::Away::NOTHING };
        all.add(VIF, true, &arena, [frame].iter());
        let whole = all.begin(VIF, usize::MAX).unwrap();
        let short = all.begin(VIF, 100).unwrap();
        let other = all.begin(VifId { handle: 1, ..VIF }, 100).unwrap();
        for _ in 0..10_000 {
            all.add(VIF, false, &arena, [frame].iter());
        }
        assert!(lock(&whole.waiting).bytes <= MAX_WAITING);
        let (mut got, mut dropped, mut messages) = (0, 0, 0);
        while let Some(packets) = whole.take().unwrap() {
            assert!(packets.packets.len() * 1000 <= MAX_MESSAGE + 1000);
            assert!(packets.packets.iter().all(|p| p.data == [7; 1000] && p.length == 1000 && !p.to_guest));
            (got, dropped, messages) = (got + packets.packets.len(), dropped + packets.dropped, messages + 1);
        }
        assert_eq!((got as u64 + dropped, messages), (10_000, 3));
        assert!(got > 1900 && lock(&whole.waiting).bytes == 0, "{got}");
        // After the gap it goes on.
        all.add(VIF, true, &arena, [frame].iter());
        assert_eq!(whole.take().unwrap().unwrap().packets.len(), 1);
        let first = short.take().unwrap().unwrap();
        assert_eq!((first.packets[0].data.len(), first.packets[0].length), (100, 1000));
        assert_eq!(other.take(), Ok(None));
        all.end(VIF);
        assert_eq!((whole.take(), other.take()), (Err(Ended), Ok(None)));
        let more: Vec<_> = (3..MAX_CAPTURES).map(|_| all.begin(VIF, 1).unwrap()).collect();
        assert!(all.begin(VIF, 1).is_none());
        drop((whole, short, other, more));
        assert_eq!(all.count.load(Ordering::Relaxed), 0);
    }
}

//! A split virtqueue from the device's end (virtio 1.2, 2.7).

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use super::memory::{GuestMemory, Place};
use super::{F_EVENT_IDX, F_INDIRECT_DESC, MAX_QUEUE_SIZE};

/// Bytes of a descriptor.
const DESC: usize = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
/// Bytes before a ring's entries: flags and idx.
const HEAD: usize = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;
/// Most segments of a request.
pub const MAX_SEGMENTS: usize = 1024;

/// Why a queue cannot be served any more: the driver broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Its size is no power of two up to [`MAX_QUEUE_SIZE`].
    #[error("the queue's size {0} is not possible")]
    Size(u16),
    /// An address outside the guest's memory, or not aligned.
    #[error("the {0} ring lies outside the guest's memory or is not aligned")]
    Address(&'static str),
    /// More requests than the queue has room for.
    #[error("the driver's index is {0} ahead")]
    Index(u16),
    /// A request that names a descriptor that is not there.
    #[error("descriptor {0} does not exist")]
    Head(u16),
}

/// Why one request cannot be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// Its descriptors are not as virtio wants them.
    #[error("{0}")]
    Malformed(&'static str),
}

/// A piece of a request's memory.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Where.
    pub place: Place,
    /// Bytes.
    pub len: usize,
}

/// A request's memory: what the device reads, then what it writes.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// The driver wrote it.
    pub readable: Vec<Segment>,
    /// The device is to write it.
    pub writable: Vec<Segment>,
}

/// Where a queue is, as the frontend says.
#[derive(Clone, Copy, Debug, Default)]
pub struct QueueAddresses {
    /// Descriptors.
    pub size: u16,
    /// The frontend's address of the descriptor table.
    pub desc: u64,
    /// Of the available ring.
    pub avail: u64,
    /// Of the used ring.
    pub used: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Queue {
    memory: Arc<GuestMemory>,
    size: u16,
    desc: Place,
    avail: Place,
    used: Place,
    next_avail: u16,
    next_used: u16,
    /// The used index at the last look whether the driver wants to be told.
    told: u16,
    event_idx: bool,
    indirect: bool,
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn descriptor(table: &Place, index: u16) -> Descriptor {
    let mut bytes = [0; DESC];
    table.mem.copy_out(table.offset + DESC * usize::from(index), &mut bytes);
    let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let mut addr = [0; 8];
    addr.copy_from_slice(&bytes[..8]);
    let len = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    Descriptor { addr: u64::from_le_bytes(addr), len, flags: short(12), next: short(14) }
}

impl Queue {
    /// Serves the queue at these addresses from `next_avail` on.
    ///
    /// # Errors
    /// [`QueueError`].
    pub fn new(
        memory: Arc<GuestMemory>,
        at: &QueueAddresses,
        features: u64,
        next_avail: u16,
    ) -> Result<Queue, QueueError> {
        let size = at.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size(size));
        }
        let n = u64::from(size);
        let place = |what, addr: u64, len: u64, align: u64| {
            let found = memory.at_user(addr, len).filter(|place| (place.offset as u64).is_multiple_of(align));
            found.ok_or(QueueError::Address(what))
        };
        let desc = place("descriptor", at.desc, 16 * n, 16)?;
        let avail = place("available", at.avail, 6 + 2 * n, 2)?;
        let used = place("used", at.used, 6 + 8 * n, 4)?;
        let mut queue = Queue {
            memory,
            size,
            desc,
            avail,
            used,
            next_avail,
            next_used: 0,
            told: 0,
            event_idx: features & F_EVENT_IDX != 0,
            indirect: features & F_INDIRECT_DESC != 0,
        };
        queue.next_used = queue.used_idx();
        queue.told = queue.next_used;
        Ok(queue)
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Notes that the device wrote `len` bytes of a request's memory, from its segments' first byte on.
    pub fn wrote(&self, segments: &[Segment], len: u64) {
        let mut left = len;
        for segment in segments {
            let n = left.min(segment.len as u64);
            self.memory.log().wrote(segment.place.gpa, n);
            left -= n;
        }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The index of the request that is taken next.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Goes on from another index.
    pub fn set_next_avail(&mut self, index: u16) {
        self.next_avail = index;
    }

    /// The used ring's index as it stands in memory.
    pub fn used_idx(&self) -> u16 {
        self.used.mem.load_u16(self.used.offset + 2, Acquire)
    }

    fn avail_idx(&self) -> u16 {
        self.avail.mem.load_u16(self.avail.offset + 2, Acquire)
    }

    /// Whether the driver has made a request available that was not taken.
    pub fn has_work(&self) -> bool {
        self.avail_idx() != self.next_avail
    }

    /// The head of the next request; `None` if there is none.
    ///
    /// # Errors
    /// [`QueueError`]: the queue is not to be served any more.
    pub fn take(&mut self) -> Result<Option<u16>, QueueError> {
        let ahead = self.avail_idx().wrapping_sub(self.next_avail);
        if ahead == 0 {
            return Ok(None);
        }
        if ahead > self.size {
            return Err(QueueError::Index(ahead));
        }
        let slot = usize::from(self.next_avail % self.size);
        let head = self.avail.mem.load_u16(self.avail.offset + HEAD + 2 * slot, Relaxed);
        if head >= self.size {
            return Err(QueueError::Head(head));
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// The last request that was taken is taken again later.
    pub fn put_back(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// A request's segments, each descriptor copied once.
    ///
    /// # Errors
    /// [`ChainError`]: that request's alone.
    pub fn chain(&self, head: u16, into: &mut Chain) -> Result<(), ChainError> {
        into.readable.clear();
        into.writable.clear();
        let bad = |what| Err(ChainError::Malformed(what));
        let (mut table, mut entries, mut index, mut is_indirect) =
            (self.desc.clone(), self.size, head, false);
        // As many steps as there are descriptors: a loop ends here.
        let mut left = usize::from(entries);
        loop {
            if index >= entries {
                return bad("a descriptor beyond the table");
            }
            if left == 0 {
                return bad("a loop of descriptors");
            }
            left -= 1;
            let d = descriptor(&table, index);
            if d.flags & DESC_F_INDIRECT != 0 {
                if is_indirect || !self.indirect || d.flags & DESC_F_NEXT != 0 {
                    return bad("an indirect table where none may be");
                }
                let count = d.len as usize / DESC;
                if !(d.len as usize).is_multiple_of(DESC) || count == 0 || count > MAX_SEGMENTS {
                    return bad("an indirect table of an impossible length");
                }
                let Some(place) = self.memory.at_gpa(d.addr, d.len.into()) else {
                    return bad("an indirect table outside the guest's memory");
                };
                (table, entries, index, is_indirect) = (place, count as u16, 0, true);
                left = count;
                continue;
            }
            let Some(place) = self.memory.at_gpa(d.addr, d.len.into()) else {
                return bad("a segment outside the guest's memory");
            };
            let segment = Segment { place, len: d.len as usize };
            if d.flags & DESC_F_WRITE != 0 {
                into.writable.push(segment);
            } else if into.writable.is_empty() {
                into.readable.push(segment);
            } else {
                return bad("a segment to read behind one to write");
            }
            if into.readable.len() + into.writable.len() > MAX_SEGMENTS {
                return bad("too many segments");
            }
            if d.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = d.next;
        }
    }

    /// Hands a request back, `written` bytes of whose memory were written. The driver sees it at once.
    pub fn give(&mut self, head: u16, written: u32) {
        let slot = self.used.offset + HEAD + 8 * usize::from(self.next_used % self.size);
        self.used.mem.store_u32(slot, head.into(), Relaxed);
        self.used.mem.store_u32(slot + 4, written, Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        self.used.mem.store_u16(self.used.offset + 2, self.next_used, Release);
        self.wrote_used(slot - self.used.offset, 8);
        self.wrote_used(2, 2);
    }

    /// Notes that the device wrote a part of the used ring.
    fn wrote_used(&self, offset: usize, len: u64) {
        self.memory.log().wrote(self.used.gpa + offset as u64, len);
    }

    /// Notes that all of the used ring was written: a predecessor may have been killed before it noted its last entry.
    pub fn log_used(&self) {
        self.wrote_used(0, (HEAD + 8 * usize::from(self.size) + 2) as u64);
    }

    /// Writes entries of several buffers without showing them; [`Queue::show`] does. For requests that span buffers.
    pub fn stage(&self, nth: u16, head: u16, written: u32) {
        let slot = self.used.offset + HEAD + 8 * usize::from(self.next_used.wrapping_add(nth) % self.size);
        self.used.mem.store_u32(slot, head.into(), Relaxed);
        self.used.mem.store_u32(slot + 4, written, Relaxed);
        self.wrote_used(slot - self.used.offset, 8);
    }

    /// Shows `count` staged entries to the driver at once.
    pub fn show(&mut self, count: u16) {
        self.next_used = self.next_used.wrapping_add(count);
        self.used.mem.store_u16(self.used.offset + 2, self.next_used, Release);
        self.wrote_used(2, 2);
    }

    /// Whether the driver wants to be told of what was handed back since the last such question.
    pub fn must_notify(&mut self) -> bool {
        let (old, new) = (self.told, self.next_used);
        if old == new {
            return false;
        }
        self.told = new;
        // The index must be visible before the driver's wish is read (2.7.7.2).
        fence(SeqCst);
        if !self.event_idx {
            return self.avail.mem.load_u16(self.avail.offset, Relaxed) & AVAIL_F_NO_INTERRUPT == 0;
        }
        let event = self.avail.mem.load_u16(self.avail.offset + HEAD + 2 * usize::from(self.size), Relaxed);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Asks the driver to kick with its next request; true if there is one by now.
    pub fn ask_for_kicks(&self) -> bool {
        if self.event_idx {
            let event = self.used.offset + HEAD + 8 * usize::from(self.size);
            self.used.mem.store_u16(event, self.next_avail, Relaxed);
            self.wrote_used(event - self.used.offset, 2);
        } else {
            self.used.mem.store_u16(self.used.offset, 0, Relaxed);
            self.wrote_used(0, 2);
        }
        fence(SeqCst);
        self.has_work()
    }

    /// Kicks are not needed for now.
    pub fn no_kicks(&self) {
        if !self.event_idx {
            self.used.mem.store_u16(self.used.offset, USED_F_NO_NOTIFY, Relaxed);
            self.wrote_used(0, 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mem::sealed_memfd;
    use crate::vhost::memory::RegionInfo;

    const BYTES: usize = 64 << 10;
    const SIZE: u16 = 16;
    const AT: QueueAddresses = QueueAddresses { size: SIZE, desc: 0, avail: 0x1000, used: 0x2000 };

    fn memory() -> Arc<GuestMemory> {
        let info = RegionInfo { gpa: 0, len: BYTES as u64, user: 0, offset: 0 };
        Arc::new(GuestMemory::map(&[(info, sealed_memfd("guest", BYTES).unwrap().into())]).unwrap())
    }

    fn put(memory: &GuestMemory, at: u64, bytes: &[u8]) {
        let place = memory.at_gpa(at, bytes.len() as u64).unwrap();
        place.mem.copy_in(place.offset, bytes);
    }

    fn describe(memory: &GuestMemory, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let bytes =
            [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        put(memory, 16 * index, &bytes);
    }

    fn offer(memory: &GuestMemory, index: u16, head: u16) {
        put(memory, AT.avail + 4 + 2 * u64::from(index % SIZE), &head.to_le_bytes());
        put(memory, AT.avail + 2, &index.wrapping_add(1).to_le_bytes());
    }

    #[test]
    fn a_request_is_taken_and_given_back() {
        let memory = memory();
        let mut queue = Queue::new(memory.clone(), &AT, F_INDIRECT_DESC, 0).unwrap();
        assert_eq!(queue.take(), Ok(None));
        // A table elsewhere, of one segment to read and one to write.
        describe(&memory, 3, 0x3000, 32, DESC_F_INDIRECT, 0);
        describe(&memory, 0x300, 0x4000, 100, DESC_F_NEXT, 1);
        describe(&memory, 0x301, 0x5000, 200, DESC_F_WRITE, 0);
        offer(&memory, 0, 3);
        assert!(queue.has_work());
        assert_eq!(queue.take(), Ok(Some(3)));
        let mut chain = Chain::default();
        queue.chain(3, &mut chain).unwrap();
        let found =
            |segments: &[Segment]| segments.iter().map(|s| (s.place.offset, s.len)).collect::<Vec<_>>();
        assert_eq!(
            (found(&chain.readable), found(&chain.writable)),
            (vec![(0x4000, 100)], vec![(0x5000, 200)])
        );
        queue.give(3, 200);
        assert_eq!(queue.used_idx(), 1);
        assert!(queue.must_notify() && !queue.must_notify());
        assert!(!queue.ask_for_kicks());
    }

    /// Data, used element, used index, and the wish for kicks: each is in a page of its own here.
    #[test]
    fn what_the_device_writes_is_logged() {
        let file: std::fs::File = sealed_memfd("log", 4096).unwrap().into();
        let log = Arc::new(crate::vhost::log::DirtyLog::default());
        log.set_bitmap(&file, 0, 4096).unwrap();
        log.set_on(true);
        let info = RegionInfo { gpa: 1 << 20, len: BYTES as u64, user: 0, offset: 0 };
        let map = GuestMemory::map(&[(info, sealed_memfd("guest", BYTES).unwrap().into())]).unwrap();
        let memory = Arc::new(map.with_log(log));
        // The used ring's entries begin in the page behind that of its index.
        let at = QueueAddresses { used: 0x2ffc, ..AT };
        let mut queue = Queue::new(memory.clone(), &at, F_EVENT_IDX, 0).unwrap();
        let look = crate::mem::SharedMem::map(&file, 4096).unwrap();
        let page = |n: usize| look.load_u8(32 + n / 8, Relaxed) & (1 << (n % 8)) != 0;
        queue.stage(0, 3, 1);
        assert_eq!((page(2), page(3)), (false, true));
        queue.show(1);
        assert!(page(2));
        let segments = [0x4ff0u64, 0x8000]
            .map(|at| Segment { place: memory.at_gpa((1 << 20) + at, 0x20).unwrap(), len: 0x20 });
        queue.wrote(&segments, 0x10);
        assert_eq!((page(4), page(5), page(8)), (true, false, false));
        queue.wrote(&segments, 0x21);
        assert_eq!((page(5), page(8), page(9)), (true, true, false));
    }

    #[test]
    fn what_a_driver_may_not_say_is_refused() {
        let memory = memory();
        let mut queue = Queue::new(memory.clone(), &AT, F_INDIRECT_DESC, 0).unwrap();
        let mut chain = Chain::default();
        // In a circle; beyond the table; outside the memory; to read behind one to write; a table in a table.
        describe(&memory, 0, 0, 1, DESC_F_NEXT, 1);
        describe(&memory, 1, 0, 1, DESC_F_NEXT, 0);
        assert!(queue.chain(0, &mut chain).is_err());
        describe(&memory, 0, 0, 1, DESC_F_NEXT, SIZE);
        assert!(queue.chain(0, &mut chain).is_err());
        describe(&memory, 0, BYTES as u64 - 1, 2, 0, 0);
        assert!(queue.chain(0, &mut chain).is_err());
        describe(&memory, 0, 0, 1, DESC_F_NEXT | DESC_F_WRITE, 1);
        describe(&memory, 1, 0, 1, 0, 0);
        assert!(queue.chain(0, &mut chain).is_err());
        describe(&memory, 0, 0x3000, 16, DESC_F_INDIRECT, 0);
        describe(&memory, 0x300, 0x3000, 16, DESC_F_INDIRECT, 0);
        assert!(queue.chain(0, &mut chain).is_err());
        // More than fits, and a head that is none.
        put(&memory, AT.avail + 2, &(SIZE + 1).to_le_bytes());
        assert_eq!(queue.take(), Err(QueueError::Index(SIZE + 1)));
        offer(&memory, 0, SIZE);
        assert_eq!(queue.take(), Err(QueueError::Head(SIZE)));
        for bad in [
            QueueAddresses { size: 12, ..AT },
            QueueAddresses { size: 0, ..AT },
            QueueAddresses { desc: 8, ..AT },
            QueueAddresses { used: BYTES as u64 - 4, ..AT },
            QueueAddresses { avail: u64::MAX - 1, ..AT },
        ] {
            assert!(Queue::new(memory.clone(), &bad, 0, 0).is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// Whatever the rings and tables hold: it ends, inside the guest's memory.
        #[test]
        fn any_memory(
            tables in proptest::collection::vec((0u64..BYTES as u64 + 64, 0u32..600, 0u16..8, 0u16..20), 16),
            heads in proptest::collection::vec(0u16..18, 16), ahead in 0u16..18, from in any::<u16>(), features in any::<u64>(),
        ) {
            let memory = memory();
            for (i, (addr, len, flags, next)) in (0u64..).zip(&tables) {
                describe(&memory, i, *addr, *len, *flags, *next);
                // Such tables are also where indirect ones may point to.
                describe(&memory, 0x300 + i, *addr, *len, *flags, *next);
            }
            for (i, head) in (0u64..).zip(&heads) {
                put(&memory, AT.avail + 4 + 2 * i, &head.to_le_bytes());
            }
            put(&memory, AT.avail + 2, &from.wrapping_add(ahead).to_le_bytes());
            let mut queue = Queue::new(memory, &AT, features, from).unwrap();
            let mut chain = Chain::default();
            let mut taken = 0;
            while let Ok(Some(head)) = queue.take() {
                taken += 1;
                prop_assert!(taken <= SIZE);
                if queue.chain(head, &mut chain).is_ok() {
                    prop_assert!(chain.readable.len() + chain.writable.len() <= MAX_SEGMENTS);
                    for segment in chain.readable.iter().chain(&chain.writable) {
                        prop_assert!(segment.place.offset + segment.len <= BYTES);
                    }
                }
                queue.give(head, 1);
            }
            queue.must_notify();
            queue.ask_for_kicks();
        }
    }
}

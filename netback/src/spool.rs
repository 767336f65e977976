//! Packets that wait in memory which outlives the incarnation, with notes that say where they lie and how far they were
//! handed on.
//!
//! The order of stores makes it at-most-once: a packet's bytes, its note, then the count; and before anybody can see a
//! packet the mark that it was handed on. A kill in between loses that one packet, and none comes twice.
//!
//! Used for what was read from the uplink and not yet forwarded, and for what waits for a frontend's slots. The memory with
//! the notes is passed to each call, so that it can be a part of another structure (the journal's user area).

use domain_kit::journal::MAX_ATTEMPTS;
use domain_kit::ring::RingMem;

use crate::offload::{self, Meta, VNET_HDR_LEN, VnetHdr};
use crate::queue::{Away, Frame};
use crate::slots::{MAX_RX_PACKET, MIN_PACKET};

/// Bytes before each packet; the virtio_net_hdr ends where the packet starts, and packets are aligned.
pub const HEADROOM: usize = 16;
/// Bytes that must be free to take one more packet of any size.
pub const MAX_ENTRY: usize = HEADROOM + MAX_RX_PACKET;

const COUNT: usize = 0;
const HANDED: usize = 4;
/// How often a packet crashed us while it was the next (u16), and which it was (u16).
const BLAME: usize = 8;
const NOTES: usize = 16;
const NOTE: usize = 8;
/// In a note's length: the packet was handed on, out of its turn.
const MARK: u32 = 1 << 31;

/// Bytes of notes for `packets` packets.
pub const fn notes_bytes(packets: usize) -> usize {
    NOTES + packets * NOTE
}

/// What recovery of a spool found to be impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the spool's notes are damaged: {0}")]
pub struct DamagedSpool(pub &'static str);

/// The state beside the notes.
#[derive(Debug)]
pub struct Spool {
    /// Offset of the notes in their memory.
    base: usize,
    max: usize,
    /// The arena's range for packets.
    start: usize,
    end: usize,
    free: usize,
    frames: Vec<Frame>,
    /// Those that recovery found handed on out of their turn.
    marked: Vec<usize>,
    handed: usize,
}

impl Spool {
    /// An empty one: notes for `max` packets at `base` of `notes`, packets in `range` of the arena.
    pub fn create(notes: &impl RingMem, base: usize, max: usize, range: std::ops::Range<usize>) -> Spool {
        notes.store_u32(base + COUNT, 0);
        notes.store_u32(base + HANDED, 0);
        notes.store_u32(base + BLAME, 0);
        Spool {
            base,
            max,
            start: range.start,
            end: range.end,
            free: range.start,
            frames: Vec::new(),
            marked: Vec::new(),
            handed: 0,
        }
    }

    /// Goes on with what a dead incarnation left. After its own fault the first packet is blamed; the third time it is dropped.
    ///
    /// # Errors
    /// [`DamagedSpool`].
    pub fn recover(
        notes: &impl RingMem,
        base: usize,
        max: usize,
        range: std::ops::Range<usize>,
        arena: &impl RingMem,
        own_fault: bool,
    ) -> Result<Spool, DamagedSpool> {
        let count = notes.load_u32(base + COUNT) as usize;
        let handed = notes.load_u32(base + HANDED) as usize;
        let mut spool = Spool {
            base,
            max,
            start: range.start,
            end: range.end,
            free: range.start,
            frames: Vec::new(),
            marked: Vec::new(),
            handed,
        };
        if count == 0 {
            // Killed between emptying the count and the mark.
            return Ok(Spool::create(notes, base, max, range));
        }
        if count > max || handed > count {
            return Err(DamagedSpool("counts"));
        }
        for i in 0..count {
            let at = base + NOTES + i * NOTE;
            let (offset, note) = (notes.load_u32(at) as usize, notes.load_u32(at + 4));
            let len = (note & !MARK) as usize;
            let inside =
                offset >= range.start + HEADROOM && offset.checked_add(len).is_some_and(|e| e <= range.end);
            if !inside || !(MIN_PACKET..=MAX_RX_PACKET).contains(&len) {
                return Err(DamagedSpool("a packet lies outside its memory"));
            }
            spool.free = spool.free.max((offset + len).next_multiple_of(64));
            spool.frames.push(Frame { at: offset, len, meta: read_meta(arena, offset), away: Away::NOTHING });
            if note & MARK != 0 && i >= handed {
                spool.marked.push(i);
            }
        }
        while spool.marked.contains(&spool.handed) {
            spool.hand(notes, spool.handed);
        }
        let handed = spool.handed;
        let blame = notes.load_u32(base + BLAME);
        if own_fault && handed < count {
            let before = if blame >> 16 == handed as u32 { blame & 0xffff } else { 0 };
            notes.store_u32(base + BLAME, (handed as u32) << 16 | (before + 1));
            if before + 1 >= u32::from(MAX_ATTEMPTS) {
                tracing::error!("a packet that crashed netback {MAX_ATTEMPTS} times is dropped");
                spool.hand(notes, handed);
            }
        }
        Ok(spool)
    }

    /// Where the next packet may be put (its first byte; the header goes before it), if one of any size has room.
    pub fn room(&self) -> Option<usize> {
        self.room_for(MAX_RX_PACKET)
    }

    /// The same for a packet of `len` bytes.
    pub fn room_for(&self, len: usize) -> Option<usize> {
        let fits = self.frames.len() < self.max && self.free + HEADROOM + len <= self.end;
        fits.then_some(self.free + HEADROOM)
    }

    /// Notes a packet that was put where [`Spool::room`] said, its virtio_net_hdr before it.
    pub fn note(&mut self, notes: &impl RingMem, arena: &impl RingMem, len: usize) {
        let at = self.free + HEADROOM;
        let note = self.base + NOTES + self.frames.len() * NOTE;
        notes.store_u32(note, at as u32);
        notes.store_u32(note + 4, len as u32);
        self.frames.push(Frame { at, len, meta: read_meta(arena, at), away: Away::NOTHING });
        notes.store_u32(self.base + COUNT, self.frames.len() as u32);
        self.free = (at + len).next_multiple_of(64);
    }

    /// What waits.
    pub fn waiting(&self) -> &[Frame] {
        &self.frames[self.handed.min(self.frames.len())..]
    }

    /// What waits with the numbers (from the start of the notes), without what was handed on out of its turn.
    pub fn unmarked(&self) -> Vec<(usize, Frame)> {
        let all = self.frames.iter().copied().enumerate().skip(self.handed);
        all.filter(|(i, _)| !self.marked.contains(i)).collect()
    }

    /// How many packets before the waiting ones were handed on; [`Spool::hand`] counts with them.
    pub fn handed(&self) -> usize {
        self.handed
    }

    /// Marks all packets up to number `index` (from the start of the notes) as handed on.
    pub fn hand(&mut self, notes: &impl RingMem, index: usize) {
        mark_handed(notes, self.base, index);
        self.handed = index + 1;
    }

    /// Where the notes are, for [`mark_handed`].
    pub fn base(&self) -> usize {
        self.base
    }

    /// After [`mark_handed`] was used on the notes alone.
    pub fn handed_to(&mut self, handed: usize) {
        self.handed = handed;
    }

    /// Begins anew if nothing waits.
    pub fn rewind(&mut self, notes: &impl RingMem) {
        if self.handed >= self.frames.len() && !self.frames.is_empty() {
            // The count first: a mark without packets is nothing, packets without a mark would come twice.
            notes.store_u32(self.base + COUNT, 0);
            notes.store_u32(self.base + HANDED, 0);
            self.frames.clear();
            self.marked.clear();
            (self.handed, self.free) = (0, self.start);
        }
    }
}

/// Marks all packets up to number `index` as handed on, in the notes alone.
pub fn mark_handed(notes: &impl RingMem, base: usize, index: usize) {
    notes.store_u32(base + HANDED, index as u32 + 1);
}

/// Marks packet number `index` as handed on before those in front of it, in the notes alone. [`Spool::hand`] must follow once
/// all up to it are.
pub fn mark_one(notes: &impl RingMem, base: usize, index: usize) {
    let at = base + NOTES + index * NOTE + 4;
    notes.store_u32(at, notes.load_u32(at) | MARK);
}

fn read_meta(arena: &impl RingMem, packet: usize) -> Meta {
    let mut header = [0; VNET_HDR_LEN];
    arena.copy_out(packet - VNET_HDR_LEN, &mut header);
    offload::from_tap(VnetHdr::from_bytes(&header))
}

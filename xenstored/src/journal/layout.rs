//! Where things are in the journal's memory.
//!
//! ```text
//! 0            superblock: magic, versions, the active half, the request being carried out
//! SLOT_HEADS   one head per connection slot: how far its input and output got, and the kernel's mmsghdrs
//! SLOT_INPUT   one input ring buffer per slot
//! half 0       a snapshot, then one record per event since
//! half 1       the same; one of the two is active
//! sums         a checksum for each of the arena's pages, as of the active snapshot
//! undo index   which page each of the following is
//! undo pages   pages of the arena as they were at the active snapshot, if they were changed since
//! arena        the tree and the watches, in place
//! ```
#![forbid(unsafe_code)]

/// "BHXSJRN" and the layout's version.
pub const MAGIC: u64 = u64::from_le_bytes(*b"BHXSJRN3");
/// How requests are carried out: raised whenever the same events would give another state or other output, because
/// the journal runs events again. A journal with another number is refused unless a clean end left no event in it.
pub const BEHAVIOUR: u64 = 4;

/// Superblock words.
pub mod sb {
    /// [`super::MAGIC`], stored last when a journal is made.
    pub const MAGIC: usize = 0;
    /// [`super::BEHAVIOUR`].
    pub const BEHAVIOUR: usize = 8;
    /// Bytes of each half.
    pub const HALF: usize = 16;
    /// `epoch << 1 | half` of the active half.
    pub const ACTIVE: usize = 24;
    /// Connection whose request is being carried out, or 0.
    pub const EXEC_CONN: usize = 32;
    /// That request's input position.
    pub const EXEC_AT: usize = 40;
    /// `epoch << 32 | count` of the undo pages; of another epoch than the active one, there are none.
    pub const UNDO: usize = 48;
    /// Connection whose live update is under way, or 0.
    pub const LIVE_CONN: usize = 56;
    /// That request's input position.
    pub const LIVE_AT: usize = 64;
}

/// Most connections at a time.
pub const SLOTS: u32 = 8192;
/// Bytes of a slot's head.
pub const HEAD: usize = 512;
/// Bytes of a slot's input buffer; more than the largest request, and a power of two.
pub const INPUT: usize = 8192;
/// Start of the slot heads.
pub const SLOT_HEADS: usize = 4096;
/// Start of the input buffers.
pub const SLOT_INPUT: usize = SLOT_HEADS + SLOTS as usize * HEAD;
/// Start of the first half.
pub const HALVES: usize = SLOT_INPUT + SLOTS as usize * INPUT;

/// Words of a half.
pub mod half {
    /// Bytes of committed records.
    pub const TAIL: usize = 0;
    /// Which compaction made it.
    pub const EPOCH: usize = 8;
    /// First record.
    pub const RECORDS: usize = 64;
}

/// Bytes before a record's body: length (u32), crc32c (u32), serial number (u64).
pub const RECORD_HEAD: usize = 16;

/// Bytes of the arena's pages, the unit of undoing and of checksums.
pub const PAGE: usize = 1024;
/// The arena's size in halves.
pub const ARENA_HALVES: u64 = 4;

/// Where the parts behind the halves are.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    /// Start of the checksums (u32 each).
    pub sums: usize,
    /// Start of the undo index (u32 each).
    pub undo_index: usize,
    /// Start of the undo pages.
    pub undo: usize,
    /// Start of the arena.
    pub arena: usize,
    /// Bytes of the arena.
    pub arena_len: usize,
}

impl Parts {
    /// For halves of `half_size` bytes.
    pub fn new(half_size: u64) -> Self {
        let arena_len = (ARENA_HALVES * half_size) as usize;
        let words = (arena_len / PAGE * 4).next_multiple_of(4096);
        let sums = HALVES + 2 * half_size as usize;
        let undo_index = sums + words;
        let undo = undo_index + words;
        Self { sums, undo_index, undo, arena: undo + arena_len, arena_len }
    }

    /// Bytes of everything.
    pub fn end(&self) -> usize {
        self.arena + self.arena_len
    }
}

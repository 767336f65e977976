//! Where things are in the journal's memory.
//!
//! ```text
//! 0            superblock: magic, versions, the active half, the request being carried out
//! SLOT_HEADS   one head per connection slot: how far its input and output got, and the kernel's mmsghdrs
//! SLOT_INPUT   one input ring buffer per slot
//! half 0       a snapshot, then one record per event since
//! half 1       the same; one of the two is active
//! ```

/// "BHXSJRN" and the layout's version.
pub const MAGIC: u64 = u64::from_le_bytes(*b"BHXSJRN1");
/// How requests are carried out: raised whenever the same events would give another state or other output, because
/// the journal runs events again. A journal with another number is refused unless a clean end left no event in it.
pub const BEHAVIOUR: u64 = 1;

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
}

/// Most connections at a time.
pub const SLOTS: u32 = 4096;
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

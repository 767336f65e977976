//! The journal's stores, each in the order that recovery relies on.

use std::sync::atomic::{Ordering, compiler_fence};

use super::JournalError;
use super::format::*;
use crate::ring::RingMem;

/// Number of a journal entry, below [`Shape::entries`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// The journal of one ring. One thread writes it.
#[derive(Debug)]
pub struct RingJournal<M> {
    pub(super) mem: M,
    pub(super) shape: Shape,
}

impl<M: RingMem> RingJournal<M> {
    /// Makes an empty journal in zeroed or old memory, for a ring whose next request and response both have index `start`.
    /// `identity` is the owner's: it says which connection this is the journal of.
    ///
    /// # Errors
    /// [`JournalError::Header`] if the memory is too small.
    pub fn create(
        mem: M,
        shape: Shape,
        identity: [u32; IDENTITY_WORDS],
        start: u32,
    ) -> Result<Self, JournalError> {
        if mem.size() < shape.bytes() {
            return Err(JournalError::Header("the memory is too small"));
        }
        // Invalid until all of it is written.
        mem.store_u64(H_MAGIC, 0);
        compiler_fence(Ordering::SeqCst);
        mem.store_u32(H_VERSION, VERSION);
        mem.store_u32(H_ENTRIES, shape.entries);
        mem.store_u32(H_REQ_SIZE, shape.req_size);
        mem.store_u32(H_EXTRA_SIZE, shape.extra_size);
        mem.store_u32(H_USER_SIZE, shape.user_size);
        for (i, word) in identity.into_iter().enumerate() {
            mem.store_u32(H_IDENTITY + 4 * i, word);
        }
        mem.store_u32(H_CRC, header_crc(&mem));
        mem.store_u32(H_REQ_CONS, start);
        mem.store_u64(H_PUBLISH, u64::from(start) | u64::from(start) << 32);
        mem.store_u32(H_FAILED, 0);
        for slot in 0..shape.entries {
            mem.store_u32(shape.entry(slot) + E_STATE, 0);
        }
        mem.store_u64(H_MAGIC, MAGIC);
        Ok(RingJournal { mem, shape })
    }

    /// What a journal says of itself: its shape, and the identity given to [`RingJournal::create`].
    ///
    /// # Errors
    /// [`JournalError::Header`] if this is no journal.
    pub fn peek(mem: &M) -> Result<(Shape, [u32; IDENTITY_WORDS]), JournalError> {
        if mem.size() < HEADER_BYTES {
            return Err(JournalError::Header("the memory is too small"));
        }
        if mem.load_u64(H_MAGIC) != MAGIC {
            return Err(JournalError::Header("no journal (magic)"));
        }
        if mem.load_u32(H_VERSION) != VERSION {
            return Err(JournalError::Header("of another version"));
        }
        if mem.load_u32(H_CRC) != header_crc(mem) {
            return Err(JournalError::Header("the header's checksum is wrong"));
        }
        let shape = Shape {
            entries: mem.load_u32(H_ENTRIES),
            req_size: mem.load_u32(H_REQ_SIZE),
            extra_size: mem.load_u32(H_EXTRA_SIZE),
            user_size: mem.load_u32(H_USER_SIZE),
        };
        Ok((shape, std::array::from_fn(|i| mem.load_u32(H_IDENTITY + 4 * i))))
    }

    /// Opens a predecessor's journal. Its entries are judged by recovery.
    ///
    /// # Errors
    /// [`JournalError::Header`] if this is no journal of that shape, [`JournalError::FailedEarlier`].
    pub fn open(mem: M, shape: Shape) -> Result<Self, JournalError> {
        if mem.size() < shape.bytes() {
            return Err(JournalError::Header("the memory is too small"));
        }
        if Self::peek(&mem)?.0 != shape {
            return Err(JournalError::Header("of another ring's shape"));
        }
        if mem.load_u32(H_FAILED) != 0 {
            return Err(JournalError::FailedEarlier);
        }
        Ok(RingJournal { mem, shape })
    }

    /// The identity given to [`RingJournal::create`].
    pub fn identity(&self) -> [u32; IDENTITY_WORDS] {
        std::array::from_fn(|i| self.mem.load_u32(H_IDENTITY + 4 * i))
    }

    /// The journal's sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The memory under it.
    pub fn mem(&self) -> &M {
        &self.mem
    }

    /// Byte offset of the owner's own area of [`Shape::user_size`] bytes.
    pub fn user_offset(&self) -> usize {
        self.shape.user()
    }

    /// Marks the ring as failed for every later incarnation.
    pub fn fail(&self) {
        self.mem.store_u32(H_FAILED, 1);
    }

    /// Requests with an index below this have been begun.
    pub fn req_cons(&self) -> u32 {
        self.mem.load_u32(H_REQ_CONS)
    }

    /// The journalled publish (from, to).
    pub fn published(&self) -> (u32, u32) {
        let word = self.mem.load_u64(H_PUBLISH);
        (word as u32, (word >> 32) as u32)
    }

    pub(super) fn word(&self, slot: Slot) -> u32 {
        self.mem.load_u32(self.shape.entry(slot.0) + E_STATE)
    }

    pub(super) fn set_word(&self, slot: Slot, word: Word) {
        self.mem.store_u32(self.shape.entry(slot.0) + E_STATE, word.pack());
    }

    pub(super) fn field(&self, slot: Slot, field: usize) -> u32 {
        self.mem.load_u32(self.shape.entry(slot.0) + field)
    }

    pub(super) fn write_entry(&self, slot: Slot, req_index: u32, request: &[u8], extra: &[u8]) {
        debug_assert_eq!(request.len(), self.shape.req_size as usize);
        let at = self.shape.entry(slot.0);
        // What freed the entry stays before what fills it.
        compiler_fence(Ordering::SeqCst);
        self.mem.copy_in(at + E_REQUEST, request);
        if extra.is_empty() {
            self.mem.store_u32(at + E_EXTRA_LEN, 0);
        } else {
            self.write_extra(slot, extra);
        }
        self.mem.store_u32(at + E_REQ_INDEX, req_index);
        self.mem.store_u32(at + E_CRC, entry_crc(req_index, request));
        self.set_word(slot, Word::new(State::Taken, 0));
    }

    /// The length is stored last: until then there is nothing.
    pub(super) fn write_extra(&self, slot: Slot, extra: &[u8]) {
        let at = self.shape.entry(slot.0);
        debug_assert!(extra.len() <= self.shape.extra_size as usize);
        self.mem.copy_in(self.shape.extra(slot.0), extra);
        self.mem.store_u32(at + E_EXTRA_CRC, crc32c::crc32c(extra));
        self.mem.store_u32(at + E_EXTRA_LEN, extra.len() as u32);
    }

    pub(super) fn commit(&self, req_cons: u32) {
        self.mem.store_u32(H_REQ_CONS, req_cons);
    }

    pub(super) fn write_answer(&self, slot: Slot, resp_index: u32, attempts: u8, status: i16, aux: u32) {
        let at = self.shape.entry(slot.0);
        self.mem.store_u32(at + E_RESP_INDEX, resp_index);
        self.mem.store_u32(at + E_AUX, aux);
        self.set_word(slot, Word { state: State::Answered, attempts, status });
    }

    pub(super) fn write_publish(&self, from: u32, to: u32) {
        self.mem.store_u64(H_PUBLISH, u64::from(from) | u64::from(to) << 32);
    }

    /// Copies an entry's request into `into` (of [`Shape::req_size`] bytes).
    pub(super) fn read_request(&self, slot: Slot, into: &mut [u8]) {
        self.mem.copy_out(self.shape.entry(slot.0) + E_REQUEST, into);
    }

    /// How many bytes are kept beside an entry's request; at most [`Shape::extra_size`].
    pub(super) fn extra_len(&self, slot: Slot) -> usize {
        self.field(slot, E_EXTRA_LEN).min(self.shape.extra_size) as usize
    }

    /// Those bytes.
    pub(super) fn read_extra(&self, slot: Slot, into: &mut Vec<u8>) {
        into.clear();
        let len = self.extra_len(slot);
        if len > 0 {
            into.resize(len, 0);
            self.mem.copy_out(self.shape.extra(slot.0), into);
        }
    }
}

pub(super) fn entry_crc(req_index: u32, request: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&req_index.to_le_bytes()), request)
}

fn header_crc(mem: &impl RingMem) -> u32 {
    let mut bytes = [0; H_STATIC_END - H_ENTRIES];
    mem.copy_out(H_ENTRIES, &mut bytes);
    crc32c::crc32c(&bytes)
}

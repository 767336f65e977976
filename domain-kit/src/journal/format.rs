//! Where everything lies in a journal.

/// Executions ended by the service's own fault after which a request is not tried again.
pub const MAX_ATTEMPTS: u8 = 3;

/// How responses of a ring are made from what the journal holds.
pub trait RingFormat {
    /// Bytes of a request.
    fn req_size(&self) -> usize;
    /// Bytes of a response.
    fn rsp_size(&self) -> usize;
    /// Writes the response to `request`; `out` is zeroed and exactly [`RingFormat::rsp_size`] bytes.
    fn response(&self, request: &[u8], status: i16, aux: u32, out: &mut [u8]);
}

/// The sizes of a journal; the same ones must be given again to open it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Entries: the ring's slots.
    pub entries: u32,
    /// Bytes of a request.
    pub req_size: u32,
    /// Bytes kept beside each request (copied indirect segments), may be 0.
    pub extra_size: u32,
    /// Bytes for the owner's own use at the end ([`super::RingJournal::user_offset`]), may be 0.
    pub user_size: u32,
}

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"BHRINGJ\0");
pub(super) const VERSION: u32 = 2;

// The header. Static part, covered by the checksum:
pub(super) const H_MAGIC: usize = 0;
pub(super) const H_VERSION: usize = 8;
pub(super) const H_CRC: usize = 12;
pub(super) const H_ENTRIES: usize = 16;
pub(super) const H_REQ_SIZE: usize = 20;
pub(super) const H_EXTRA_SIZE: usize = 24;
pub(super) const H_USER_SIZE: usize = 28;
pub(super) const H_IDENTITY: usize = 32;
/// Words of identity.
pub const IDENTITY_WORDS: usize = 6;
pub(super) const H_STATIC_END: usize = H_IDENTITY + 4 * IDENTITY_WORDS;
// Moving part, a cache line each:
pub(super) const H_REQ_CONS: usize = 64;
pub(super) const H_PUBLISH: usize = 128;
pub(super) const H_FAILED: usize = 192;
pub(super) const HEADER_BYTES: usize = 256;

// An entry.
pub(super) const E_STATE: usize = 0;
pub(super) const E_REQ_INDEX: usize = 4;
pub(super) const E_RESP_INDEX: usize = 8;
pub(super) const E_AUX: usize = 12;
pub(super) const E_EXTRA_LEN: usize = 16;
pub(super) const E_CRC: usize = 20;
pub(super) const E_EXTRA_CRC: usize = 24;
pub(super) const E_REQUEST: usize = 32;

impl Shape {
    pub(super) fn stride(&self) -> usize {
        (E_REQUEST + self.req_size as usize).next_multiple_of(64)
    }

    pub(super) fn entry(&self, slot: u32) -> usize {
        HEADER_BYTES + slot as usize * self.stride()
    }

    pub(super) fn extra(&self, slot: u32) -> usize {
        self.entry(self.entries) + slot as usize * (self.extra_size as usize).next_multiple_of(8)
    }

    pub(super) fn user(&self) -> usize {
        self.extra(self.entries)
    }

    /// Bytes of memory the journal takes.
    pub fn bytes(&self) -> usize {
        (self.user() + self.user_size as usize).next_multiple_of(8)
    }
}

/// What an entry is. The codes differ in four bits each, so that a damaged byte is not another state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free = 0,
    Taken = 0x1d,
    Running = 0x2b,
    Answered = 0x36,
}

/// An entry's state word: state, attempts and status change together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word {
    pub state: State,
    pub attempts: u8,
    pub status: i16,
}

impl Word {
    pub fn new(state: State, attempts: u8) -> Self {
        Word { state, attempts, status: 0 }
    }

    pub fn pack(self) -> u32 {
        self.state as u32 | u32::from(self.attempts) << 8 | u32::from(self.status as u16) << 16
    }

    pub fn unpack(word: u32) -> Option<Self> {
        let state = match word & 0xff {
            0 => State::Free,
            0x1d => State::Taken,
            0x2b => State::Running,
            0x36 => State::Answered,
            _ => return None,
        };
        Some(Word { state, attempts: (word >> 8) as u8, status: (word >> 16) as u16 as i16 })
    }
}

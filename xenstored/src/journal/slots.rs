//! Connection slots: what outlives the process of a connection's byte streams.
//!
//! Positions run freely from 0 in each life of a connection (its *tag*). Bytes move by a fixed sequence, so that
//! a kill between any two stores loses none and repeats none:
//!
//! 1. *arm*: note the position the call starts from, with `msg_len` unset;
//! 2. the call: the kernel moves the bytes and stores their count before it returns;
//! 3. *settle*: position := armed position + count, then unset `msg_len`. Doing this twice changes nothing.
//!
//! For rings the same positions are stored before the shared index is advanced.
#![forbid(unsafe_code)]

use super::layout::{HEAD, INPUT, SLOT_HEADS, SLOT_INPUT};
use super::mem::{Mem, UNSET};

const TAG: usize = 0;
const RECEIVED: usize = 8;
const SENT: usize = 16;
const RX_ARMED: usize = 24;
const TX_ARMED: usize = 32;
const POISON_AT: usize = 40;
const POISON_COUNT: usize = 48;
const RX_HDR: usize = 64;
const TX_HDR: usize = 128;

/// One slot.
#[derive(Clone, Copy)]
pub struct Slot<'a> {
    mem: &'a Mem,
    head: usize,
    input: usize,
}

impl<'a> Slot<'a> {
    /// The slot with this number.
    pub fn new(mem: &'a Mem, index: u32) -> Self {
        let index = index as usize;
        Self { mem, head: SLOT_HEADS + index * HEAD, input: SLOT_INPUT + index * INPUT }
    }

    /// Whose life of a connection the slot holds; 0 for none.
    pub fn tag(&self) -> u64 {
        self.mem.load_u64(self.head + TAG)
    }

    /// Makes the slot ready for a connection; valid once the tag is stored.
    pub fn init(&self, tag: u64) {
        self.mem.store_u64(self.head + TAG, 0);
        for word in [RECEIVED, SENT, RX_ARMED, TX_ARMED, POISON_AT, POISON_COUNT] {
            self.mem.store_u64(self.head + word, 0);
        }
        self.mem.clear_msg_len(self.head + RX_HDR);
        self.mem.clear_msg_len(self.head + TX_HDR);
        // The kernel must not fault on these pages with a fatal signal pending.
        for page in (0..INPUT).step_by(4096) {
            self.mem.write(self.input + page, &[0]);
        }
        self.mem.store_u64(self.head + TAG, tag);
    }

    /// Ends what a predecessor's calls began.
    pub fn settle(&self) {
        self.settle_rx();
        self.settle_tx();
    }

    /// Input position up to which bytes are in the buffer.
    pub fn received(&self) -> u64 {
        self.mem.load_u64(self.head + RECEIVED)
    }

    /// Output position up to which bytes were handed over.
    pub fn sent(&self) -> u64 {
        self.mem.load_u64(self.head + SENT)
    }

    /// Sets the input position: ring bytes are in the buffer.
    pub fn set_received(&self, position: u64) {
        self.mem.store_u64(self.head + RECEIVED, position);
    }

    /// Sets the output position: the bytes are in the ring, or nobody is left to read them.
    pub fn set_sent(&self, position: u64) {
        self.mem.store_u64(self.head + SENT, position);
    }

    /// Free pieces of the input buffer, given what was consumed.
    pub fn room(&self, consumed: u64) -> [(usize, usize); 2] {
        let received = self.received();
        let free = INPUT - (received - consumed) as usize;
        self.pieces(received, free)
    }

    fn pieces(&self, position: u64, len: usize) -> [(usize, usize); 2] {
        let start = position as usize % INPUT;
        let first = len.min(INPUT - start);
        [(self.input + start, first), (self.input, len - first)]
    }

    /// Copies input bytes out.
    pub fn read_input(&self, position: u64, into: &mut [u8]) {
        let [(a, n), (b, _)] = self.pieces(position, into.len());
        let (first, second) = into.split_at_mut(n);
        self.mem.read(a, first);
        if !second.is_empty() {
            self.mem.read(b, second);
        }
    }

    /// Copies bytes of a ring in at the input position; they count once [`Slot::set_received`] is called.
    pub fn write_input(&self, position: u64, from: &[u8]) {
        let [(a, n), (b, _)] = self.pieces(position, from.len());
        let (first, second) = from.split_at(n);
        self.mem.write(a, first);
        if !second.is_empty() {
            self.mem.write(b, second);
        }
    }

    /// Before a receive: returns where its mmsghdr is.
    pub fn arm_rx(&self) -> usize {
        self.mem.store_u64(self.head + RX_ARMED, self.received());
        self.head + RX_HDR
    }

    /// After a receive, or after a restart: the count, if a call ended.
    pub fn settle_rx(&self) -> Option<u32> {
        self.settle_one(RX_HDR, RX_ARMED, RECEIVED)
    }

    /// Before a send: returns where its mmsghdr is.
    pub fn arm_tx(&self) -> usize {
        self.mem.store_u64(self.head + TX_ARMED, self.sent());
        self.head + TX_HDR
    }

    /// After a send, or after a restart: the count, if a call ended.
    pub fn settle_tx(&self) -> Option<u32> {
        self.settle_one(TX_HDR, TX_ARMED, SENT)
    }

    fn settle_one(&self, hdr: usize, armed: usize, position: usize) -> Option<u32> {
        let n = self.mem.msg_len(self.head + hdr);
        if n == UNSET {
            return None;
        }
        let from = self.mem.load_u64(self.head + armed);
        self.mem.store_u64(self.head + position, from + u64::from(n));
        self.mem.clear_msg_len(self.head + hdr);
        Some(n)
    }

    /// Counts one more death by the request at this input position; returns how many there are.
    pub fn blame(&self, position: u64) -> u64 {
        let known = self.mem.load_u64(self.head + POISON_AT) == position;
        let count = if known { self.mem.load_u64(self.head + POISON_COUNT) + 1 } else { 1 };
        // Count first: a kill between the two forgets a death, never invents one.
        self.mem.store_u64(self.head + POISON_COUNT, if known { count } else { 0 });
        self.mem.store_u64(self.head + POISON_AT, position);
        self.mem.store_u64(self.head + POISON_COUNT, count);
        count
    }
}

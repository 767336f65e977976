//! What waits to be sent to a client.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Output bytes of a connection. Positions count from the start of the connection (or its last reset).
#[derive(Debug, Default)]
pub struct OutQueue {
    /// Position of the first byte in `bytes`.
    base: u64,
    bytes: VecDeque<u8>,
    /// Where each message ends.
    ends: VecDeque<u64>,
    /// Where the first message that is not handed over whole begins.
    whole_at: u64,
}

impl OutQueue {
    /// A queue as a snapshot recorded it; its messages count as one.
    pub fn restore(base: u64, bytes: &[u8]) -> Self {
        let end = base + bytes.len() as u64;
        let ends = if bytes.is_empty() { VecDeque::new() } else { VecDeque::from([end]) };
        Self { base, bytes: bytes.iter().copied().collect(), ends, whole_at: base }
    }

    /// Position after the last byte.
    pub fn end(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Position of the first byte that is still here.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Messages that are not handed over whole.
    pub fn messages(&self) -> usize {
        self.ends.len()
    }

    /// Bytes left of a message of which some were handed over.
    pub fn partial(&self) -> usize {
        match (self.ends.front(), self.whole_at) {
            (Some(end), at) if at < self.base => (*end - self.base) as usize,
            _ => 0,
        }
    }

    /// Ends a message.
    pub fn end_message(&mut self) {
        self.ends.push_back(self.end());
    }

    /// Appends bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Forgets everything before `position`.
    pub fn drop_until(&mut self, position: u64) {
        let n = position.saturating_sub(self.base).min(self.bytes.len() as u64);
        self.bytes.drain(..n as usize);
        self.base += n;
        while self.ends.front().is_some_and(|end| *end <= self.base) {
            self.whole_at = self.ends.pop_front().unwrap_or(self.base);
        }
        if self.bytes.is_empty() && self.bytes.capacity() > 16 << 10 {
            self.bytes = VecDeque::new();
        }
    }

    /// The bytes from `base` on, in two pieces.
    pub fn pending(&self) -> (&[u8], &[u8]) {
        self.bytes.as_slices()
    }
}

/// Path and token: what names a watch of a connection.
pub type WatchKey = (Arc<[u8]>, Box<[u8]>);
/// Where in the output the event is that stands for all others of the watch.
pub type Folded = BTreeMap<WatchKey, u64>;

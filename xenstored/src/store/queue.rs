//! What waits to be sent to a client.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Output bytes of a connection. Positions count from the start of the connection (or its last reset).
#[derive(Debug, Default)]
pub struct OutQueue {
    /// Position of the first byte in `bytes`.
    base: u64,
    bytes: VecDeque<u8>,
}

impl OutQueue {
    /// A queue as a snapshot recorded it.
    pub fn restore(base: u64, bytes: &[u8]) -> Self {
        Self { base, bytes: bytes.iter().copied().collect() }
    }

    /// Position after the last byte.
    pub fn end(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Position of the first byte that is still here.
    pub fn base(&self) -> u64 {
        self.base
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

//! For tests of poison packets: `--fault LENGTH` makes the service panic when it is about to send a packet of that length.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// No packet is so long.
static LEN: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Sets the length, bytes from the Ethernet header on.
pub fn set_len(len: usize) {
    LEN.store(len, Relaxed);
}

/// Looks at a packet that is about to be sent.
pub fn look(len: usize) {
    if len == LEN.load(Relaxed) {
        panic!("--fault: a packet of {len} bytes");
    }
}

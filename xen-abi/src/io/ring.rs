//! `io/ring.h`: the shared header of a ring and how many entries fit behind it.
//!
//! All four indices run freely modulo 2^32; a slot is `index & (size - 1)`.

use crate::PAGE_SIZE;

/// Byte offset of `req_prod`, written by the frontend.
pub const REQ_PROD_OFFSET: usize = core::mem::offset_of!(SringHeader, req_prod);
/// Byte offset of `req_event`, written by the backend: notify when `req_prod` passes it.
pub const REQ_EVENT_OFFSET: usize = core::mem::offset_of!(SringHeader, req_event);
/// Byte offset of `rsp_prod`, written by the backend.
pub const RSP_PROD_OFFSET: usize = core::mem::offset_of!(SringHeader, rsp_prod);
/// Byte offset of `rsp_event`, written by the frontend: notify when `rsp_prod` passes it.
pub const RSP_EVENT_OFFSET: usize = core::mem::offset_of!(SringHeader, rsp_event);
/// Byte offset of the first entry.
pub const RING_OFFSET: usize = size_of::<SringHeader>();

abi! { "io/ring.h";
    /// The first 64 bytes of a ring. A fresh one has `req_event` and `rsp_event` 1, all else 0.
    pub struct SringHeader [64] {
        req_prod: u32 = 0,
        req_event: u32 = 4,
        rsp_prod: u32 = 8,
        rsp_event: u32 = 12,
        _pvt: [u8; 4] = 16,
        _pad: [u8; 44] = 20,
    }
}

/// Entries of a ring of `pages` pages whose larger half has `entry_size` bytes: as many as fit, rounded down to
/// a power of two. 0 if none fits or `entry_size` is 0.
pub const fn ring_size(pages: usize, entry_size: usize) -> u32 {
    let bytes = pages.saturating_mul(PAGE_SIZE);
    if entry_size == 0 || bytes <= RING_OFFSET {
        return 0;
    }
    let fit = (bytes - RING_OFFSET) / entry_size;
    // Indices are 32 bits wide, so more than 2^31 entries can't be told apart.
    if fit == 0 {
        0
    } else if fit >= 1 << 31 {
        1 << 31
    } else {
        1 << fit.ilog2()
    }
}

/// Byte offset, from the ring's start, of the slot that free-running `index` falls on. `size` is a power of two.
pub const fn entry_offset(index: u32, size: u32, entry_size: usize) -> usize {
    RING_OFFSET + (index & size.wrapping_sub(1)) as usize * entry_size
}

/// Whether moving a producer index from `old` to `new` passes `event`, so that the peer must be notified.
pub const fn must_notify(old: u32, new: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_match_xen() {
        assert_eq!(ring_size(1, 112), 32); // blkif, 64-bit
        assert_eq!(ring_size(1, 108), 32); // blkif, 32-bit
        assert_eq!(ring_size(1, 12), 256); // netif tx
        assert_eq!(ring_size(1, 8), 256); // netif rx
        assert_eq!(ring_size(16, 112), 512);
        assert_eq!((ring_size(0, 8), ring_size(1, 0), ring_size(1, 4096)), (0, 0, 0));
        assert_eq!(entry_offset(u32::MAX, 32, 112), 64 + 31 * 112);
    }

    #[test]
    fn notify_across_the_wrap() {
        assert!(must_notify(0, 1, 1));
        assert!(!must_notify(1, 2, 1));
        assert!(must_notify(u32::MAX, 1, 0));
        assert!(!must_notify(5, 5, 5));
        assert!(!must_notify(5, 7, 8));
    }
}

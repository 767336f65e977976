//! Xen's shared rings (`io/ring.h`): requests one way, responses back in the same slots.
//!
//! | type | whose |
//! |---|---|
//! | [`BackRing`] | the backend's end: takes requests, puts responses |
//! | [`FrontRing`] | the frontend's end: puts requests, takes responses |
//! | [`RingMem`] | the memory under both, touched by atomics and copies alone |
//! | [`Pages`] | the memory of a ring of several granted pages |
//!
//! All indices run freely modulo 2^32. The peer owns half of the shared page and can write all of it at any time, so each end
//! keeps its own indices privately, reads of the peer's only what it must, once, and checks it: an index that no honest peer
//! could have written is a [`RingError`], after which the ring is not touched again (XSA-38's class). An entry is copied out
//! once and judged on the copy (XSA-155).

mod back;
mod front;
mod mem;
mod pages;

pub use back::BackRing;
pub use front::FrontRing;
pub use mem::{HeapMem, RingMem, Span};
pub use pages::Pages;

use xen_abi::io::ring::{RING_OFFSET, ring_size};

/// The sizes of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Slots, a power of two.
    pub size: u32,
    /// Bytes from one slot to the next: the larger of request and response.
    pub entry_size: usize,
    /// Bytes of a request.
    pub req_size: usize,
    /// Bytes of a response.
    pub rsp_size: usize,
}

impl RingLayout {
    /// The layout of a ring of `pages` pages with these entries (bytes).
    pub fn new(pages: usize, req_size: usize, rsp_size: usize) -> Self {
        let entry_size = req_size.max(rsp_size);
        RingLayout { size: ring_size(pages, entry_size), entry_size, req_size, rsp_size }
    }

    /// A ring of fewer slots than fit in a page, for models.
    pub fn with_size(self, size: u32) -> Self {
        assert!(size.is_power_of_two() && size <= self.size, "{size} slots in a ring of {}", self.size);
        RingLayout { size, ..self }
    }

    /// Bytes of shared memory it takes.
    pub fn bytes(&self) -> usize {
        RING_OFFSET + self.size as usize * self.entry_size
    }
}

/// The peer broke the ring protocol. The ring must not be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The frontend claims more requests than there are slots.
    #[error("req_prod {req_prod} is more than {size} beyond the last response ({rsp_prod})")]
    TooManyRequests {
        /// What it claims.
        req_prod: u32,
        /// The backend's own response index.
        rsp_prod: u32,
        /// Slots.
        size: u32,
    },
    /// The frontend took requests back that were already taken off the ring.
    #[error("req_prod {req_prod} is behind the requests already taken ({req_cons})")]
    RequestsTakenBack {
        /// What it claims.
        req_prod: u32,
        /// The backend's own request index.
        req_cons: u32,
    },
    /// The backend claims more responses than there are requests.
    #[error("rsp_prod {rsp_prod} is more than the {pending} pending requests beyond {rsp_cons}")]
    TooManyResponses {
        /// What it claims.
        rsp_prod: u32,
        /// The frontend's own response index.
        rsp_cons: u32,
        /// Requests without a response.
        pending: u32,
    },
}

#[cfg(test)]
mod tests;

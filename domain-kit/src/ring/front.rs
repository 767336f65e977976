//! The frontend's end of a ring.

use std::sync::atomic::{Ordering, fence};

use xen_abi::io::ring::{
    REQ_EVENT_OFFSET, REQ_PROD_OFFSET, RING_OFFSET, RSP_EVENT_OFFSET, RSP_PROD_OFFSET, entry_offset,
    must_notify,
};

use super::{RingError, RingLayout, RingMem};

/// The frontend's end: `req_prod_pvt` and `rsp_cons` are private, as in `struct name_front_ring`.
#[derive(Debug)]
pub struct FrontRing<M> {
    mem: M,
    layout: RingLayout,
    req_prod_pvt: u32,
    /// What was last stored to the shared `req_prod`.
    req_prod: u32,
    rsp_cons: u32,
}

impl<M: RingMem> FrontRing<M> {
    /// Makes a new, empty ring in the memory (`XEN_FRONT_RING_INIT`); all of its bytes are written.
    ///
    /// # Panics
    /// If the memory is too small for the layout.
    pub fn init(mem: M, layout: RingLayout) -> Self {
        assert!(layout.size.is_power_of_two() && layout.bytes() <= mem.size(), "{layout:?} does not fit");
        let zeros = [0; 64];
        let mut at = 0;
        while at < mem.size() {
            let n = zeros.len().min(mem.size() - at);
            mem.copy_in(at, &zeros[..n]);
            at += n;
        }
        debug_assert!(RING_OFFSET <= mem.size());
        mem.store_u32(REQ_EVENT_OFFSET, 1);
        mem.store_u32(RSP_EVENT_OFFSET, 1);
        FrontRing { mem, layout, req_prod_pvt: 0, req_prod: 0, rsp_cons: 0 }
    }

    /// The ring's sizes.
    pub fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// The memory under it.
    pub fn mem(&self) -> &M {
        &self.mem
    }

    /// Slots that a request can still be put into.
    pub fn free(&self) -> u32 {
        self.layout.size - self.pending()
    }

    /// Requests put and not yet answered, as far as responses were taken.
    pub fn pending(&self) -> u32 {
        self.req_prod_pvt.wrapping_sub(self.rsp_cons)
    }

    /// Index of the next request.
    pub fn req_prod_pvt(&self) -> u32 {
        self.req_prod_pvt
    }

    /// Index of the next response to take.
    pub fn rsp_cons(&self) -> u32 {
        self.rsp_cons
    }

    /// Puts a request into the next slot; the backend sees it after [`FrontRing::push`]. Gives its index.
    ///
    /// # Panics
    /// If the ring is full or the request is not exactly [`RingLayout::req_size`] bytes.
    pub fn put(&mut self, request: &[u8]) -> u32 {
        assert_eq!(request.len(), self.layout.req_size);
        assert_ne!(self.free(), 0, "the ring is full");
        let index = self.req_prod_pvt;
        self.mem.copy_in(entry_offset(index, self.layout.size, self.layout.entry_size), request);
        self.req_prod_pvt = index.wrapping_add(1);
        index
    }

    /// Publishes the requests put so far (`RING_PUSH_REQUESTS_AND_CHECK_NOTIFY`); true if the backend wants an event.
    pub fn push(&mut self) -> bool {
        let (old, new) = (self.req_prod, self.req_prod_pvt);
        if old == new {
            return false;
        }
        self.mem.store_u32(REQ_PROD_OFFSET, new);
        self.req_prod = new;
        fence(Ordering::SeqCst);
        must_notify(old, new, self.mem.load_u32(REQ_EVENT_OFFSET))
    }

    /// How many responses wait to be taken. Reads `rsp_prod` once.
    ///
    /// # Errors
    /// If `rsp_prod` claims responses to requests that were never pushed.
    pub fn unconsumed(&self) -> Result<u32, RingError> {
        let rsp_prod = self.mem.load_u32(RSP_PROD_OFFSET);
        let waiting = rsp_prod.wrapping_sub(self.rsp_cons);
        let pending = self.req_prod.wrapping_sub(self.rsp_cons);
        if waiting > pending {
            return Err(RingError::TooManyResponses { rsp_prod, rsp_cons: self.rsp_cons, pending });
        }
        Ok(waiting)
    }

    /// Takes the next response off: copies it out, exactly once. Only after [`FrontRing::unconsumed`] said there is one.
    ///
    /// # Panics
    /// If `into` is not [`RingLayout::rsp_size`] bytes.
    pub fn take(&mut self, into: &mut [u8]) -> u32 {
        assert_eq!(into.len(), self.layout.rsp_size);
        let index = self.rsp_cons;
        self.mem.copy_out(entry_offset(index, self.layout.size, self.layout.entry_size), into);
        self.rsp_cons = index.wrapping_add(1);
        index
    }

    /// To be asked before sleeping (`RING_FINAL_CHECK_FOR_RESPONSES`): true if responses wait after all. If false, the next
    /// response will raise an event.
    ///
    /// # Errors
    /// As [`FrontRing::unconsumed`].
    pub fn final_check(&self) -> Result<bool, RingError> {
        if self.unconsumed()? > 0 {
            return Ok(true);
        }
        self.mem.store_u32(RSP_EVENT_OFFSET, self.rsp_cons.wrapping_add(1));
        fence(Ordering::SeqCst);
        Ok(self.unconsumed()? > 0)
    }
}

#[cfg(test)]
impl<M> FrontRing<M> {
    /// Moves an empty ring's start, to test wraps.
    pub(super) fn req_prod_start(&mut self, start: u32) {
        (self.req_prod_pvt, self.req_prod, self.rsp_cons) = (start, start, start);
    }
}

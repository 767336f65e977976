//! The backend's end of a ring.

use std::sync::atomic::{Ordering, fence};

use xen_abi::io::ring::{
    REQ_EVENT_OFFSET, REQ_PROD_OFFSET, RSP_EVENT_OFFSET, RSP_PROD_OFFSET, entry_offset, must_notify,
};

use super::{RingError, RingLayout, RingMem};

/// The backend's end: `req_cons` and `rsp_prod_pvt` are private, as in `struct name_back_ring`.
#[derive(Debug)]
pub struct BackRing<M> {
    mem: M,
    layout: RingLayout,
    req_cons: u32,
    rsp_prod_pvt: u32,
    /// What was last stored to the shared `rsp_prod`; the shared word itself can be written by the frontend.
    rsp_prod: u32,
}

impl<M: RingMem> BackRing<M> {
    /// Takes the backend's end of a ring whose requests are taken up to `req_cons` and answered (and published) up to
    /// `rsp_prod`, both as the backend itself knows them. 0 and 0 for a new ring.
    ///
    /// # Panics
    /// If the memory is too small for the layout.
    pub fn attach(mem: M, layout: RingLayout, req_cons: u32, rsp_prod: u32) -> Self {
        assert!(layout.size.is_power_of_two() && layout.bytes() <= mem.size(), "{layout:?} does not fit");
        BackRing { mem, layout, req_cons, rsp_prod_pvt: rsp_prod, rsp_prod }
    }

    /// The ring's sizes.
    pub fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// The memory under it.
    pub fn mem(&self) -> &M {
        &self.mem
    }

    /// Index of the next request to take.
    pub fn req_cons(&self) -> u32 {
        self.req_cons
    }

    /// Index of the next response to put.
    pub fn rsp_prod_pvt(&self) -> u32 {
        self.rsp_prod_pvt
    }

    /// Index up to which responses are published.
    pub fn rsp_prod(&self) -> u32 {
        self.rsp_prod
    }

    /// Requests taken and not yet given a response.
    pub fn in_flight(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod_pvt)
    }

    /// The shared `rsp_prod`, as whoever wrote it last left it. For recovery only.
    pub fn shared_rsp_prod(&self) -> u32 {
        self.mem.load_u32(RSP_PROD_OFFSET)
    }

    /// How many requests wait to be taken. Reads `req_prod` once.
    ///
    /// # Errors
    /// If `req_prod` is one that no honest frontend writes.
    pub fn unconsumed(&self) -> Result<u32, RingError> {
        let req_prod = self.mem.load_u32(REQ_PROD_OFFSET);
        let size = self.layout.size;
        if req_prod.wrapping_sub(self.rsp_prod_pvt) > size {
            return Err(RingError::TooManyRequests { req_prod, rsp_prod: self.rsp_prod_pvt, size });
        }
        let waiting = req_prod.wrapping_sub(self.req_cons);
        if waiting > size {
            return Err(RingError::RequestsTakenBack { req_prod, req_cons: self.req_cons });
        }
        Ok(waiting)
    }

    /// Takes the next request off: copies it out, exactly once. Only after [`BackRing::unconsumed`] said there is one.
    ///
    /// # Panics
    /// If `into` is not [`RingLayout::req_size`] bytes.
    pub fn take(&mut self, into: &mut [u8]) -> u32 {
        assert_eq!(into.len(), self.layout.req_size);
        let index = self.req_cons;
        self.mem.copy_out(entry_offset(index, self.layout.size, self.layout.entry_size), into);
        self.req_cons = index.wrapping_add(1);
        index
    }

    /// Puts the next response into its slot; the frontend sees it after [`BackRing::push`]. Gives its index.
    ///
    /// # Panics
    /// If it is not exactly [`RingLayout::rsp_size`] bytes (so that no byte of the slot's response part stays unwritten,
    /// XSA-216), or if no request is unanswered.
    pub fn put(&mut self, response: &[u8]) -> u32 {
        assert_eq!(response.len(), self.layout.rsp_size);
        assert_ne!(self.in_flight(), 0, "a response without a request");
        let index = self.rsp_prod_pvt;
        self.mem.copy_in(entry_offset(index, self.layout.size, self.layout.entry_size), response);
        self.rsp_prod_pvt = index.wrapping_add(1);
        index
    }

    /// Puts another response in the place of one that was put and not published. For recovery.
    ///
    /// # Panics
    /// If the response at `index` is published or was never put, or has the wrong length.
    pub fn replace(&mut self, index: u32, response: &[u8]) {
        assert_eq!(response.len(), self.layout.rsp_size);
        let unpublished = self.rsp_prod_pvt.wrapping_sub(self.rsp_prod);
        assert!(index.wrapping_sub(self.rsp_prod) < unpublished, "response {index} is not to be changed");
        self.mem.copy_in(entry_offset(index, self.layout.size, self.layout.entry_size), response);
    }

    /// Publishes the responses put so far (`RING_PUSH_RESPONSES_AND_CHECK_NOTIFY`); true if the frontend wants an event.
    pub fn push(&mut self) -> bool {
        let (old, new) = (self.rsp_prod, self.rsp_prod_pvt);
        if old == new {
            return false;
        }
        // Release: the frontend sees responses before the index.
        self.mem.store_u32(RSP_PROD_OFFSET, new);
        self.rsp_prod = new;
        // The frontend sees the index before rsp_event is read.
        fence(Ordering::SeqCst);
        must_notify(old, new, self.mem.load_u32(RSP_EVENT_OFFSET))
    }

    /// To be asked before sleeping (`RING_FINAL_CHECK_FOR_REQUESTS`): true if requests wait after all. If false, the next
    /// request will raise an event.
    ///
    /// # Errors
    /// As [`BackRing::unconsumed`].
    pub fn final_check(&self) -> Result<bool, RingError> {
        if self.unconsumed()? > 0 {
            return Ok(true);
        }
        self.mem.store_u32(REQ_EVENT_OFFSET, self.req_cons.wrapping_add(1));
        fence(Ordering::SeqCst);
        Ok(self.unconsumed()? > 0)
    }
}

//! A backend's ring with its journal.

use super::format::*;
use super::{JournalError, RingFormat, RingJournal, Slot};
use crate::ring::{BackRing, RingLayout, RingMem};

/// A back ring whose every step is journalled: `R` is the shared ring's memory, `J` the journal's.
#[derive(Debug)]
pub struct JournaledRing<R, J, F> {
    ring: BackRing<R>,
    journal: RingJournal<J>,
    format: F,
    /// Private copies of the requests, by slot: what everything is judged by.
    requests: Vec<u8>,
    attempts: Vec<u8>,
    req_index: Vec<u32>,
    free: Vec<Slot>,
    unpublished: Vec<Slot>,
    response: Vec<u8>,
}

impl<R: RingMem, J: RingMem, F: RingFormat> JournaledRing<R, J, F> {
    /// The shape of the journal for such a ring.
    pub fn shape(layout: &RingLayout, extra_size: u32, user_size: u32) -> Shape {
        Shape { entries: layout.size, req_size: layout.req_size as u32, extra_size, user_size }
    }

    /// Starts on a ring that a frontend has just connected. `extra_size` and `user_size` as in [`Shape`].
    ///
    /// The frontend's own `rsp_prod` says where the ring starts (as Linux's backends do; 0 for a new ring).
    ///
    /// # Errors
    /// [`JournalError::Header`] if the journal's memory is too small, [`JournalError::Ring`].
    pub fn create(
        ring: R,
        layout: RingLayout,
        journal: J,
        shape: Shape,
        identity: [u32; IDENTITY_WORDS],
        format: F,
    ) -> Result<Self, JournalError> {
        let start = BackRing::attach(&ring, layout, 0, 0).shared_rsp_prod();
        let journal = RingJournal::create(journal, shape, identity, start)?;
        let ring = BackRing::attach(ring, layout, start, start);
        if let Err(e) = ring.unconsumed() {
            journal.fail();
            return Err(e.into());
        }
        Ok(Self::new(ring, journal, format))
    }

    /// Goes on where a dead incarnation stopped. Gives the unanswered requests in request order; what was answered and may not
    /// have been seen is put again, and published by the next [`JournaledRing::push`].
    ///
    /// The next steps of the caller: deal with the list, then poll the ring, and notify the frontend once.
    ///
    /// # Errors
    /// [`JournalError`]; the ring is then marked as failed.
    pub fn reattach(
        ring: R,
        layout: RingLayout,
        journal: J,
        shape: Shape,
        format: F,
        own_fault: bool,
    ) -> Result<(Self, Vec<Slot>), JournalError> {
        let journal = RingJournal::open(journal, shape)?;
        let shared = BackRing::attach(&ring, layout, 0, 0).shared_rsp_prod();
        let found = journal.recover(shared, own_fault).inspect_err(|_| journal.fail())?;
        let ring = BackRing::attach(ring, layout, found.req_cons, found.rsp_prod);
        let mut this = Self::new(ring, journal, format);
        this.free.retain(|slot| !found.republish.contains(slot) && !found.unanswered.contains(slot));
        let size = this.req_size();
        for &slot in found.republish.iter().chain(&found.unanswered) {
            let i = slot.0 as usize;
            this.journal.read_request(slot, &mut this.requests[i * size..(i + 1) * size]);
            this.req_index[i] = this.journal.field(slot, E_REQ_INDEX);
            this.attempts[i] = Word::unpack(this.journal.word(slot)).map_or(0, |w| w.attempts);
        }
        for slot in found.republish {
            let status = Word::unpack(this.journal.word(slot)).map_or(0, |w| w.status);
            let aux = this.journal.field(slot, E_AUX);
            this.put(slot, status, aux);
        }
        Ok((this, found.unanswered))
    }

    fn new(ring: BackRing<R>, journal: RingJournal<J>, format: F) -> Self {
        let entries = journal.shape().entries;
        assert_eq!(format.req_size(), ring.layout().req_size);
        assert_eq!(format.rsp_size(), ring.layout().rsp_size);
        JournaledRing {
            requests: vec![0; entries as usize * format.req_size()],
            attempts: vec![0; entries as usize],
            req_index: vec![0; entries as usize],
            free: (0..entries).rev().map(Slot).collect(),
            unpublished: Vec::with_capacity(entries as usize),
            response: vec![0; format.rsp_size()],
            ring,
            journal,
            format,
        }
    }

    fn req_size(&self) -> usize {
        self.ring.layout().req_size
    }

    /// The journal.
    pub fn journal(&self) -> &RingJournal<J> {
        &self.journal
    }

    /// The ring.
    pub fn ring(&self) -> &BackRing<R> {
        &self.ring
    }

    /// Gives the ring up, for every later incarnation too.
    pub fn fail(&self) {
        self.journal.fail();
    }

    /// Takes up to `max` waiting requests: copies each out once, journals it, and appends its slot to `into`. `extra` makes the
    /// bytes to keep beside a request (at most [`Shape::extra_size`]; longer is cut), see [`JournaledRing::take`].
    ///
    /// # Errors
    /// [`JournalError::Ring`] if the frontend broke the protocol; the ring is then marked as failed.
    pub fn take_with<E: AsRef<[u8]>>(
        &mut self,
        max: usize,
        into: &mut Vec<Slot>,
        mut extra: impl FnMut(&[u8]) -> E,
    ) -> Result<usize, JournalError> {
        let waiting = self.ring.unconsumed().inspect_err(|_| self.journal.fail())? as usize;
        // A frontend may guess answers that it has not seen; the journal holds no more than its entries.
        let count = waiting.min(max).min(self.free.len());
        let size = self.req_size();
        for _ in 0..count {
            let Some(slot) = self.free.pop() else { break };
            let i = slot.0 as usize;
            let request = &mut self.requests[i * size..(i + 1) * size];
            let index = self.ring.take(request);
            let kept = extra(request);
            let kept = kept.as_ref();
            let most = self.journal.shape().extra_size as usize;
            self.journal.write_entry(slot, index, request, &kept[..kept.len().min(most)]);
            self.req_index[i] = index;
            self.attempts[i] = 0;
            into.push(slot);
        }
        if count > 0 {
            self.journal.commit(self.ring.req_cons());
        }
        Ok(count)
    }

    /// The same with nothing beside the requests.
    ///
    /// # Errors
    /// As [`JournaledRing::take_with`].
    pub fn take(&mut self, max: usize, into: &mut Vec<Slot>) -> Result<usize, JournalError> {
        self.take_with(max, into, |_| [])
    }

    /// The private copy of a request.
    pub fn request(&self, slot: Slot) -> &[u8] {
        let size = self.req_size();
        &self.requests[slot.0 as usize * size..][..size]
    }

    /// What was kept beside it.
    pub fn extra(&self, slot: Slot) -> Vec<u8> {
        let mut extra = Vec::new();
        self.journal.read_extra(slot, &mut extra);
        extra
    }

    /// The same into memory that is used again.
    pub fn kept_bytes(&self, slot: Slot, into: &mut Vec<u8>) {
        self.journal.read_extra(slot, into);
    }

    /// How many bytes are kept beside it.
    pub fn kept(&self, slot: Slot) -> usize {
        self.journal.extra_len(slot)
    }

    /// Keeps bytes beside a request that was taken without; at most [`Shape::extra_size`], longer is cut. To be called before
    /// [`JournaledRing::start`], once: what later incarnations find is all of it or nothing.
    pub fn keep(&self, slot: Slot, bytes: &[u8]) {
        let most = self.journal.shape().extra_size as usize;
        self.journal.write_extra(slot, &bytes[..bytes.len().min(most)]);
    }

    /// How many requests wait to be taken.
    ///
    /// # Errors
    /// As [`JournaledRing::take_with`].
    pub fn waiting(&self) -> Result<u32, JournalError> {
        Ok(self.ring.unconsumed().inspect_err(|_| self.journal.fail())?)
    }

    /// Its index in the ring.
    pub fn req_index(&self, slot: Slot) -> u32 {
        self.req_index[slot.0 as usize]
    }

    /// How often it was running when the service died of its own fault; from [`MAX_ATTEMPTS`] on it must not run again.
    pub fn attempts(&self, slot: Slot) -> u8 {
        self.attempts[slot.0 as usize]
    }

    /// Marks a request as running. Must come before anything that its content can make go wrong.
    pub fn start(&self, slot: Slot) {
        self.journal.set_word(slot, Word::new(State::Running, self.attempts(slot)));
    }

    /// Answers a request: from here on it never runs again. The frontend sees it after [`JournaledRing::push`].
    ///
    /// # Panics
    /// If the slot holds no unanswered request (a bug).
    pub fn respond(&mut self, slot: Slot, status: i16, aux: u32) {
        debug_assert!(
            !self.free.contains(&slot) && !self.unpublished.contains(&slot),
            "{slot:?} answered twice"
        );
        self.journal.write_answer(slot, self.ring.rsp_prod_pvt(), self.attempts(slot), status, aux);
        self.put(slot, status, aux);
    }

    /// Answers the last `count` of the requests that were answered and not published otherwise than before; false if there are
    /// not so many. For recovery: it may be killed anywhere and done again.
    #[must_use]
    pub fn answer_otherwise(&mut self, count: usize, status: i16, aux: u32) -> bool {
        let Some(first) = self.unpublished.len().checked_sub(count) else { return false };
        for i in first..self.unpublished.len() {
            let slot = self.unpublished[i];
            let index = self.journal.field(slot, E_RESP_INDEX);
            self.journal.write_answer(slot, index, self.attempts(slot), status, aux);
            self.format(slot, status, aux);
            self.ring.replace(index, &self.response);
        }
        true
    }

    fn format(&mut self, slot: Slot, status: i16, aux: u32) {
        self.response.fill(0);
        let size = self.req_size();
        let request = &self.requests[slot.0 as usize * size..][..size];
        self.format.response(request, status, aux, &mut self.response);
    }

    fn put(&mut self, slot: Slot, status: i16, aux: u32) {
        self.format(slot, status, aux);
        self.ring.put(&self.response);
        self.unpublished.push(slot);
    }

    /// Publishes what was answered; true if the frontend wants an event.
    pub fn push(&mut self) -> bool {
        if self.unpublished.is_empty() {
            return false;
        }
        self.journal.write_publish(self.ring.rsp_prod(), self.ring.rsp_prod_pvt());
        let notify = self.ring.push();
        for slot in self.unpublished.drain(..) {
            self.journal.set_word(slot, Word::new(State::Free, 0));
            self.free.push(slot);
        }
        notify
    }

    /// Requests taken and not answered.
    pub fn in_flight(&self) -> u32 {
        self.ring.in_flight()
    }

    /// To be asked before sleeping: true if requests wait after all, see [`BackRing::final_check`].
    ///
    /// # Errors
    /// As [`JournaledRing::take_with`].
    pub fn final_check(&self) -> Result<bool, JournalError> {
        Ok(self.ring.final_check().inspect_err(|_| self.journal.fail())?)
    }
}

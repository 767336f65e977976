//! Recovery: from a dead incarnation's journal to what the next one must do.

use super::format::*;
use super::store::entry_crc;
use super::{JournalError, RingJournal, Slot};
use crate::ring::RingMem;

/// What recovery found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Next request to take from the ring.
    pub req_cons: u32,
    /// The ring's `rsp_prod`, checked.
    pub rsp_prod: u32,
    /// Answered but not seen by the frontend: to be published again, in this order.
    pub republish: Vec<Slot>,
    /// Unanswered, in request order.
    pub unanswered: Vec<Slot>,
}

impl<M: RingMem> RingJournal<M> {
    /// Judges the journal against the ring's `rsp_prod` and brings its entries into a state to go on from. `own_fault`: the
    /// predecessor died of its own fault, so what was running is blamed. May itself be killed anywhere and run again.
    ///
    /// # Errors
    /// [`JournalError`]; the ring must then not be served.
    pub fn recover(&self, rsp_prod: u32, own_fault: bool) -> Result<Recovered, JournalError> {
        let (from, to) = self.published();
        if rsp_prod != from && rsp_prod != to {
            return Err(JournalError::ForeignRspProd { found: rsp_prod, from, to });
        }
        let req_cons = self.req_cons();
        let entries = self.shape.entries;
        let mut answered = Vec::new();
        let mut unanswered = Vec::new();
        let mut request = vec![0; self.shape.req_size as usize];
        let mut extra = Vec::new();
        for slot in (0..entries).map(Slot) {
            let damaged = |what| JournalError::Damaged { what, slot: slot.0 };
            let word = Word::unpack(self.word(slot)).ok_or(damaged("unknown state"))?;
            if word.state == State::Free {
                continue;
            }
            let req_index = self.field(slot, E_REQ_INDEX);
            let extra_len = self.field(slot, E_EXTRA_LEN);
            if extra_len > self.shape.extra_size {
                return Err(damaged("too many segments"));
            }
            self.read_request(slot, &mut request);
            if self.field(slot, E_CRC) != entry_crc(req_index, &request) {
                return Err(damaged("checksum"));
            }
            self.read_extra(slot, &mut extra);
            if !extra.is_empty() && self.field(slot, E_EXTRA_CRC) != crc32c::crc32c(&extra) {
                return Err(damaged("checksum of what is kept beside it"));
            }
            if req_index.wrapping_sub(req_cons) as i32 >= 0 {
                if word.state != State::Taken {
                    return Err(damaged("run before it was taken"));
                }
                self.set_word(slot, Word::new(State::Free, 0));
                continue;
            }
            match word.state {
                State::Answered => {
                    let resp_index = self.field(slot, E_RESP_INDEX);
                    if rsp_prod.wrapping_sub(resp_index) as i32 > 0 {
                        self.set_word(slot, Word::new(State::Free, 0));
                    } else {
                        answered.push((resp_index.wrapping_sub(rsp_prod), slot));
                    }
                }
                State::Taken | State::Running => {
                    if word.state == State::Running {
                        let attempts = word.attempts.saturating_add(u8::from(own_fault));
                        self.set_word(slot, Word::new(State::Taken, attempts));
                    }
                    unanswered.push((req_cons.wrapping_sub(req_index), slot));
                }
                State::Free => {}
            }
        }
        let damaged = |what| JournalError::Damaged { what, slot: entries };
        answered.sort_unstable();
        if answered.iter().zip(0..).any(|((position, _), want)| *position != want) {
            return Err(damaged("answers are not consecutive"));
        }
        unanswered.sort_unstable_by(|a, b| b.cmp(a));
        if unanswered.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(damaged("a request is there twice"));
        }
        if answered.len() + unanswered.len() != req_cons.wrapping_sub(rsp_prod) as usize {
            return Err(damaged("requests and answers do not add up"));
        }
        if (answered.len() as u32) < to.wrapping_sub(rsp_prod) {
            return Err(damaged("a published answer is missing"));
        }
        Ok(Recovered {
            req_cons,
            rsp_prod,
            republish: answered.into_iter().map(|(_, slot)| slot).collect(),
            unanswered: unanswered.into_iter().map(|(_, slot)| slot).collect(),
        })
    }
}

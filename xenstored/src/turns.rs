//! Turns for clients whose transactions conflict.
//!
//! A transaction that reads what others change at the same time fails and is tried again. If all try again at once, one
//! commits and the rest fail once more. So a client whose commit failed takes turns for a while: its next transaction starts
//! when no other of those clients has one open. Each turn is short, they come in the order of asking, and whoever had no
//! conflict waits for nobody. An unprivileged client's turn makes no privileged one wait (XSA-206).
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use xen_abi::xs_wire::XsMsgType as Op;

use crate::store::{ConnId, ConnMap};
use crate::wire::Header;

/// The longest turn.
const TURN: Duration = Duration::from_millis(10);
/// How long a client takes turns after a conflict, or after it had to wait for its turn.
const CAREFUL: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy)]
struct Turn {
    id: ConnId,
    privileged: bool,
    until: Instant,
    /// Its transaction was started.
    begun: bool,
}

/// See the module's description.
#[derive(Debug, Default)]
pub struct Turns {
    holder: Option<Turn>,
    queue: VecDeque<(ConnId, bool)>,
    careful: ConnMap<(Instant, u32)>,
}

impl Turns {
    /// Whether a client's next request may run now; if not, it is told when (`after`, `forget`, `expired`).
    pub fn may_run(&mut self, id: ConnId, privileged: bool, head: &Header, now: Instant) -> bool {
        if self.careful.is_empty() || head.op() != Some(Op::TransactionStart) {
            return true;
        }
        match self.careful.get(&id) {
            None => return true,
            Some((until, _)) if *until < now => {
                self.careful.remove(&id);
                return true;
            }
            Some(_) => {}
        }
        match &mut self.holder {
            Some(turn) if turn.id == id => {
                turn.begun = true;
                true
            }
            Some(turn) if turn.until > now && (turn.privileged || !privileged) => {
                if !self.queue.iter().any(|(waiting, _)| *waiting == id) {
                    self.queue.push_back((id, privileged));
                }
                false
            }
            Some(turn) if turn.until > now => true,
            _ => {
                self.queue.retain(|(waiting, _)| *waiting != id);
                self.holder = Some(Turn { id, privileged, until: now + TURN, begun: true });
                true
            }
        }
    }

    /// After a client's requests ran: `conflicts` commits in a row failed, `open` transactions are left. Returns whose
    /// turn it is now, if that changed.
    pub fn after(&mut self, id: ConnId, conflicts: u32, open: bool, now: Instant) -> Option<ConnId> {
        if conflicts > 0 && self.careful.get(&id).is_none_or(|(_, known)| *known != conflicts) {
            self.careful.insert(id, (now + CAREFUL, conflicts));
        } else if conflicts == 0
            && let Some((_, known)) = self.careful.get_mut(&id)
        {
            *known = 0;
        }
        let done = self.holder.is_some_and(|turn| turn.id == id && turn.begun && !open);
        if done { self.next(now) } else { None }
    }

    /// The client is gone. Returns whose turn it is now, if that changed.
    pub fn forget(&mut self, id: ConnId, now: Instant) -> Option<ConnId> {
        self.careful.remove(&id);
        self.queue.retain(|(waiting, _)| *waiting != id);
        if self.holder.is_some_and(|turn| turn.id == id) { self.next(now) } else { None }
    }

    /// Ends a turn that took too long. Returns whose it is now.
    pub fn expired(&mut self) -> Option<ConnId> {
        let until = self.holder?.until;
        let now = Instant::now();
        if now >= until { self.next(now) } else { None }
    }

    /// When the turn ends, if somebody waits for that.
    pub fn deadline(&self) -> Option<Instant> {
        self.holder.filter(|_| !self.queue.is_empty()).map(|turn| turn.until)
    }

    fn next(&mut self, now: Instant) -> Option<ConnId> {
        let next = self.queue.pop_front();
        self.holder = next.map(|(id, privileged)| Turn { id, privileged, until: now + TURN, begun: false });
        let (id, _) = next?;
        if let Some((until, _)) = self.careful.get_mut(&id) {
            *until = now + CAREFUL;
        }
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Header {
        Header { kind: Op::TransactionStart.raw(), req_id: 0, tx_id: 0, len: 1 }
    }

    #[test]
    fn turns_come_in_order_and_end() {
        let now = Instant::now();
        let (mut turns, head) = (Turns::default(), start());
        let [a, b, c, d] = [1, 2, 3, 4].map(ConnId);
        for id in [a, b, c] {
            assert_eq!(turns.after(id, 1, false, now), None);
        }
        assert!(turns.may_run(a, true, &head, now));
        assert!(!turns.may_run(b, true, &head, now) && !turns.may_run(c, true, &head, now));
        assert!(!turns.may_run(b, true, &head, now), "asking twice takes no second place");
        assert!(turns.may_run(d, true, &head, now), "no conflict, no waiting");
        assert_eq!(turns.after(a, 0, true, now), None, "still open");
        assert_eq!(turns.after(a, 0, false, now), Some(b));
        assert_eq!(turns.forget(b, now), Some(c));
        assert!(turns.may_run(c, true, &head, now));
        assert!(!turns.may_run(a, true, &head, now + TURN / 2));
        assert!(turns.may_run(a, true, &head, now + TURN), "a turn ends");
        assert!(turns.may_run(b, true, &head, now + 2 * CAREFUL));
    }

    #[test]
    fn the_unprivileged_make_nobody_privileged_wait() {
        let now = Instant::now();
        let (mut turns, head) = (Turns::default(), start());
        let (guest, dom0) = (ConnId(1), ConnId(2));
        turns.after(guest, 1, false, now);
        turns.after(dom0, 1, false, now);
        assert!(turns.may_run(guest, false, &head, now));
        assert!(turns.may_run(dom0, true, &head, now));
    }
}

//! Life-cycle events: a bounded backlog with serial numbers, for dom0's `WatchEvents`.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use proto::hvcore::Event;
use proto::hvcore::event::Kind;
use tokio::sync::watch;

/// Events kept for a watcher that comes late.
pub const BACKLOG: usize = 1024;
/// Longest detail, bytes.
const DETAIL_MAX: usize = 256;

struct Log {
    next_seq: u64,
    backlog: VecDeque<Event>,
}

/// The log.
pub struct Events {
    log: Mutex<Log>,
    newest: watch::Sender<u64>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("newest", &*self.newest.borrow()).finish()
    }
}

impl Default for Events {
    fn default() -> Self {
        let log = Log { next_seq: 1, backlog: VecDeque::with_capacity(BACKLOG) };
        Events { log: Mutex::new(log), newest: watch::Sender::new(0) }
    }
}

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

impl Events {
    /// Logs an event. `of` is (domid, instance, generation).
    pub fn push(&self, kind: Kind, of: (u16, u64, u32), name: &str, detail: &str) {
        let mut detail = detail.to_owned();
        if detail.len() > DETAIL_MAX {
            detail.truncate((0..=DETAIL_MAX).rev().find(|&n| detail.is_char_boundary(n)).unwrap_or(0));
        }
        if kind == Kind::Violation {
            tracing::warn!(domid = of.0, generation = of.2, name, "violation: {detail}");
        } else {
            tracing::info!(domid = of.0, generation = of.2, name, kind = kind.as_str_name(), "{detail}");
        }
        let mut log = self.log.lock().unwrap_or_else(|e| e.into_inner());
        let seq = log.next_seq;
        log.next_seq += 1;
        if log.backlog.len() == BACKLOG {
            log.backlog.pop_front();
        }
        log.backlog.push_back(Event {
            seq,
            unix_ms: unix_ms(),
            kind: kind.into(),
            domid: of.0.into(),
            instance: of.1,
            generation: of.2,
            name: name.into(),
            detail,
            lost: 0,
        });
        drop(log);
        self.newest.send_replace(seq);
    }

    /// At most `max` events after `seq`; the first tells how many before it are lost.
    pub fn after(&self, seq: u64, max: usize) -> Vec<Event> {
        let log = self.log.lock().unwrap_or_else(|e| e.into_inner());
        let mut events: Vec<Event> = log.backlog.iter().filter(|e| e.seq > seq).take(max).cloned().collect();
        if let Some(first) = events.first_mut() {
            first.lost = first.seq - seq - 1;
        }
        events
    }

    /// Tells the newest serial number, now and at every change.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_told() {
        let events = Events::default();
        for _ in 0..BACKLOG + 10 {
            events.push(Kind::Created, (1, 1, 1), "x", &"ü".repeat(300));
        }
        let first = &events.after(3, 1)[0];
        assert_eq!((first.seq, first.lost), (11, 7));
        assert!(first.detail.len() <= DETAIL_MAX);
        assert_eq!(events.after(BACKLOG as u64 + 9, 10).len(), 1);
        assert!(events.after(BACKLOG as u64 + 10, 10).is_empty());
    }
}

//! What happened: hv-core's life-cycle events and dom0's own, kept and told on.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use proto::toolstack::Event;
use tokio::sync::broadcast;

/// Events kept for those who ask later.
const KEPT: usize = 1024;
/// Events that a slow watcher may be behind.
const BEHIND: usize = 512;

/// The log.
#[derive(Debug)]
pub struct Events {
    inner: Mutex<Inner>,
    live: broadcast::Sender<Event>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    kept: VecDeque<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Events { inner: Mutex::default(), live: broadcast::channel(BEHIND).0 }
    }
}

/// Unix time in milliseconds.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

impl Events {
    /// Adds one; number and, if 0, time are filled in.
    pub fn add(&self, mut event: Event) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.next += 1;
        event.seq = inner.next;
        if event.unix_ms == 0 {
            event.unix_ms = unix_ms();
        }
        if inner.kept.len() >= KEPT {
            inner.kept.pop_front();
        }
        inner.kept.push_back(event.clone());
        // Under the lock, so that a watcher that reads `kept` and then the channel misses none. No watcher is no error.
        let _ = self.live.send(event);
    }

    /// One of dom0's own.
    pub fn tell(&self, kind: &str, name: &str, domid: u16, detail: impl Into<String>) {
        let detail = detail.into();
        tracing::info!(kind, name, domid, detail, "event");
        self.add(Event {
            kind: kind.into(),
            name: name.into(),
            domid: domid.into(),
            detail,
            ..Event::default()
        });
    }

    /// What is kept with a number above `after`, and what comes.
    pub fn watch(&self, after: u64) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept: Vec<Event> = inner.kept.iter().filter(|e| e.seq > after).cloned().collect();
        if let Some(first) = kept.first_mut()
            // A number beyond ours is that of an earlier dom0: everything is new then.
            && after < first.seq
        {
            first.lost += first.seq - after - 1;
        }
        if after > inner.next {
            kept = inner.kept.iter().cloned().collect();
        }
        (kept, self.live.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_events_are_bounded_and_gaps_told() {
        let events = Events::default();
        for n in 0..KEPT + 10 {
            events.tell("operation", "g", 1, n.to_string());
        }
        let (kept, _) = events.watch(0);
        assert_eq!(kept.len(), KEPT);
        assert_eq!(kept[0].lost, 10);
        let last = kept.last().unwrap().seq;
        assert!(events.watch(last).0.is_empty());
        assert_eq!(events.watch(last - 1).0.len(), 1);
        assert_eq!(events.watch(last + 1000).0.len(), KEPT, "an earlier dom0's number");
    }
}

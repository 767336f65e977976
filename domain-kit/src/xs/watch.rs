//! Watches of a client: sets with a queue and an fd each, set again after every reconnection.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::XsError;
use super::client::Inner;
use super::ops::nul;
use super::wire::Op;

/// Events a set keeps before it folds them: a slow consumer costs detail, never memory or a wake-up.
const QUEUE_MAX: usize = 4096;

/// How long dropping a set waits for each of its watches to be removed.
const DROP_TIMEOUT: Duration = Duration::from_millis(500);

/// One watch event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// The path that changed: the watched path or one below it, relative if the watch was.
    /// Equal to the watched path when the watch was (re-)established or events were folded.
    pub path: String,
    /// The token given to [`WatchSet::watch`].
    pub token: String,
}

/// Queue and fd that a set shares with the reader thread.
pub(crate) struct Queue {
    events: Mutex<VecDeque<WatchEvent>>,
    ready: Condvar,
    fd: EventFd,
}

impl Queue {
    fn push(&self, event: WatchEvent, watched: &str) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() >= QUEUE_MAX {
            // Watches may fire spuriously: an event on the watched path itself stands for all below it.
            let folded = WatchEvent { path: watched.to_owned(), token: event.token };
            if !events.iter().rev().take(QUEUE_MAX).any(|e| *e == folded) {
                events.retain(|e| e.token != folded.token);
                events.push_back(folded);
            }
        } else {
            events.push_back(event);
        }
        self.ready.notify_all();
        // Level-triggered: a full counter is readable too.
        let _ = self.fd.write(1);
    }
}

struct Entry {
    path: String,
    token: String,
    queue: Weak<Queue>,
}

/// All watches of a client, by the token that stands on the wire.
#[derive(Default)]
pub(crate) struct Registry {
    next: AtomicU64,
    entries: Mutex<BTreeMap<String, Entry>>,
}

impl Registry {
    fn add(&self, path: &str, token: &str, queue: &Arc<Queue>) -> String {
        let wire = format!("bh{}", self.next.fetch_add(1, Ordering::Relaxed));
        let entry = Entry { path: path.to_owned(), token: token.to_owned(), queue: Arc::downgrade(queue) };
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).insert(wire.clone(), entry);
        wire
    }

    fn remove(&self, wire: &str) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).remove(wire);
    }

    /// Hands an event to its set. Unknown tokens are late events of a removed watch.
    pub(crate) fn deliver(&self, path: &str, wire: &str) {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(wire)
            && let Some(queue) = entry.queue.upgrade()
        {
            let event = WatchEvent { path: path.to_owned(), token: entry.token.clone() };
            queue.push(event, &entry.path);
        }
    }

    /// Path and wire token of every watch, to set them again.
    pub(crate) fn all(&self) -> Vec<(String, String)> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().map(|(wire, e)| (e.path.clone(), wire.clone())).collect()
    }
}

/// A set of watches with one queue and one fd, for one event loop. Dropping it removes its watches.
pub struct WatchSet {
    client: Arc<Inner>,
    queue: Arc<Queue>,
    /// (path, user token, wire token)
    watches: Mutex<Vec<(String, String, String)>>,
}

impl WatchSet {
    pub(crate) fn new(client: Arc<Inner>) -> Result<Self, XsError> {
        let fd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let queue = Arc::new(Queue { events: Mutex::new(VecDeque::new()), ready: Condvar::new(), fd });
        Ok(Self { client, queue, watches: Mutex::new(Vec::new()) })
    }

    /// Watches `path` and everything below it. The watch fires once at once.
    ///
    /// # Errors
    /// EEXIST if the set already has this path with this token, EINVAL, ENOSPC (quota).
    pub fn watch(&self, path: &str, token: &str) -> Result<(), XsError> {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        if watches.iter().any(|(p, t, _)| p == path && t == token) {
            return Err(XsError::Errno(super::XsErrno::EEXIST));
        }
        let wire = self.client.watches.add(path, token, &self.queue);
        let sent = nul(path).and_then(|p| self.client.call(Op::Watch, 0, &[&p, &nul(&wire)?]));
        match sent {
            // Set by the reconnection that ran meanwhile.
            Err(XsError::Errno(super::XsErrno::EEXIST)) | Ok(_) => {
                watches.push((path.to_owned(), token.to_owned(), wire));
                Ok(())
            }
            Err(e) => {
                self.client.watches.remove(&wire);
                Err(e)
            }
        }
    }

    /// Removes a watch. Events of it that are queued already stay queued.
    ///
    /// # Errors
    /// ENOENT if the set has no such watch.
    pub fn unwatch(&self, path: &str, token: &str) -> Result<(), XsError> {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = watches.iter().position(|(p, t, _)| p == path && t == token) else {
            return Err(XsError::Errno(super::XsErrno::ENOENT));
        };
        let (path, _, wire) = watches.swap_remove(at);
        self.client.watches.remove(&wire);
        self.client.call(Op::Unwatch, 0, &[&nul(&path)?, &nul(&wire)?]).map(drop)
    }

    /// Takes the next event without waiting.
    pub fn try_next(&self) -> Option<WatchEvent> {
        let mut events = self.queue.events.lock().unwrap_or_else(PoisonError::into_inner);
        let event = events.pop_front();
        if events.is_empty() {
            // Under the lock, so a push after this makes the fd readable again.
            let _ = self.queue.fd.read();
        }
        event
    }

    /// Waits up to `timeout` for the next event.
    pub fn next_timeout(&self, timeout: Duration) -> Option<WatchEvent> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(event) = self.try_next() {
                return Some(event);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let events = self.queue.events.lock().unwrap_or_else(PoisonError::into_inner);
            if events.is_empty() {
                let _unused = self.queue.ready.wait_timeout(events, left);
            }
        }
    }
}

impl AsFd for WatchSet {
    /// Readable while an event is queued (level-triggered; [`WatchSet::try_next`] clears it).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.fd.as_fd()
    }
}

impl Drop for WatchSet {
    fn drop(&mut self) {
        let watches = std::mem::take(&mut *self.watches.lock().unwrap_or_else(PoisonError::into_inner));
        for (_, _, wire) in &watches {
            self.client.watches.remove(wire);
        }
        for (path, _, wire) in &watches {
            let (Ok(path), Ok(wire)) = (nul(path), nul(wire)) else { continue };
            // If the server is away its events go nowhere: nobody waits for long to be tidy.
            if let Err(XsError::Timeout(_) | XsError::Disconnected | XsError::Closed) =
                self.client.call_within(DROP_TIMEOUT, Op::Unwatch, 0, &[&path, &wire])
            {
                return;
            }
        }
    }
}

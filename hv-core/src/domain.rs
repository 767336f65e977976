//! One incarnation's hypercall channels, and restart delays.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};

use crate::ports::Peer;
use crate::spec::RestartPolicy;

/// One life of a domain's process, as the hypercall server sees it.
#[derive(Debug)]
pub struct Incarnation {
    /// The domain.
    pub peer: Peer,
    /// Which life.
    pub generation: u32,
    /// Most channels.
    most: usize,
    channels: Mutex<Channels>,
}

#[derive(Debug, Default)]
struct Channels {
    ended: bool,
    next: u64,
    sockets: HashMap<u64, Arc<OwnedFd>>,
}

impl Incarnation {
    /// Without a channel yet; it will have at most so many.
    pub fn new(peer: Peer, generation: u32, most: u32) -> Self {
        Incarnation { peer, generation, most: most as usize, channels: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Channels> {
        self.channels.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Adds a channel, whose thread must call [`Incarnation::remove`] when it ends.
    ///
    /// # Errors
    /// `ESTALE` this life is over, `ENOSPC` too many.
    pub fn add(&self, socket: Arc<OwnedFd>) -> Result<u64, Errno> {
        let mut channels = self.lock();
        if channels.ended {
            return Err(Errno::ESTALE);
        }
        if channels.sockets.len() >= self.most {
            return Err(Errno::ENOSPC);
        }
        channels.next += 1;
        let id = channels.next;
        channels.sockets.insert(id, socket);
        Ok(id)
    }

    /// A channel's thread has done its last call. True: the life is over and this was the last thread.
    pub fn remove(&self, id: u64) -> bool {
        let mut channels = self.lock();
        channels.sockets.remove(&id);
        channels.ended && channels.sockets.is_empty()
    }

    /// Ends this life: no new calls, waiting threads wake. True: no thread is left.
    pub fn end(&self) -> bool {
        let mut channels = self.lock();
        channels.ended = true;
        for socket in channels.sockets.values() {
            let _may_be_closed = shutdown(socket.as_raw_fd(), Shutdown::Both);
        }
        channels.sockets.is_empty()
    }

    /// True once [`Incarnation::end`] was called.
    pub fn ended(&self) -> bool {
        self.lock().ended
    }
}

/// When the next incarnation starts.
#[derive(Debug, Default)]
pub struct Backoff {
    in_row: u32,
    recent: VecDeque<Instant>,
}

impl Backoff {
    /// The process died at `now`: how long to wait, or `None` if the burst limit is used up or the policy has no restart.
    pub fn next(&mut self, policy: &RestartPolicy, now: Instant) -> Option<Duration> {
        if !policy.restart {
            return None;
        }
        if policy.burst != 0 {
            let window = Duration::from_millis(policy.burst_window_ms.into());
            while self.recent.front().is_some_and(|t| now.duration_since(*t) > window) {
                self.recent.pop_front();
            }
            if self.recent.len() >= policy.burst as usize {
                return None;
            }
            self.recent.push_back(now);
        }
        let wait = u64::from(policy.backoff_ms) << self.in_row.min(20);
        self.in_row += 1;
        Some(Duration::from_millis(wait.min(policy.backoff_max_ms.into())))
    }

    /// A request was served: the next wait is the first again.
    pub fn served(&mut self) {
        self.in_row = 0;
    }

    /// dom0 starts it again: forget all.
    pub fn reset(&mut self) {
        *self = Backoff::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Option<Duration> {
        Some(Duration::from_millis(n))
    }

    #[test]
    fn waits_double_until_served() {
        let policy =
            RestartPolicy { restart: true, backoff_ms: 10, backoff_max_ms: 35, burst: 0, burst_window_ms: 0 };
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        assert_eq!([0; 4].map(|_| backoff.next(&policy, now)), [ms(10), ms(20), ms(35), ms(35)]);
        backoff.served();
        assert_eq!(backoff.next(&policy, now), ms(10));
        assert_eq!(backoff.next(&RestartPolicy { restart: false, ..policy }, now), None);
    }

    #[test]
    fn bursts_end_in_failure_and_slow_deaths_do_not() {
        let policy = RestartPolicy {
            restart: true,
            backoff_ms: 0,
            backoff_max_ms: 0,
            burst: 2,
            burst_window_ms: 1000,
        };
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        let at = |ms| now + Duration::from_millis(ms);
        assert!(backoff.next(&policy, at(0)).is_some());
        assert!(backoff.next(&policy, at(500)).is_some());
        assert!(backoff.next(&policy, at(900)).is_none());
        assert!(backoff.next(&policy, at(1100)).is_some(), "the first has left the window");
    }

    #[test]
    fn a_life_that_is_over_takes_no_channel() {
        let life = Incarnation::new(Peer { domid: 1, instance: 1 }, 1, 1);
        let (a, _b) = crate::sys::sock::pair().unwrap();
        let a = Arc::new(a);
        let id = life.add(a.clone()).unwrap();
        assert_eq!(life.add(a), Err(Errno::ENOSPC), "no more than it may have");
        assert!(!life.end(), "a thread is left");
        let (c, _d) = crate::sys::sock::pair().unwrap();
        assert_eq!(life.add(Arc::new(c)), Err(Errno::ESTALE));
        assert!(life.remove(id));
    }
}

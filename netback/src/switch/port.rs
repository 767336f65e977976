//! A vif as the switch sees it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use domain_kit::mem::Page;
use serde::{Deserialize, Serialize};

use super::settings::{Bucket, Settings};
use crate::connection::VifId;
use crate::hash::HashConfig;
use crate::headers::Mac;
use crate::queue::rx::RxQueue;
use crate::stats::Stats;
use crate::tap::Offloads;
use crate::vhost::VhostRx;
use crate::worker::Ports;
use domain_kit::ring::Span;

/// Groups that a frontend can have in its filter.
pub const MAX_GROUPS: usize = 64;

/// A frontend's multicast filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// It asked for it (request-multicast-control); else all groups reach it.
    pub on: bool,
    /// The groups.
    pub list: Vec<Mac>,
}

impl Groups {
    /// Adds or removes one; false if there are [`MAX_GROUPS`].
    pub fn change(&mut self, add: bool, group: Mac) -> bool {
        self.list.retain(|&g| add || g != group);
        if add && !self.list.contains(&group) {
            if self.list.len() >= MAX_GROUPS {
                return false;
            }
            self.list.push(group);
        }
        true
    }

    /// Whether a packet to this group reaches the frontend. Broadcast always does.
    pub fn lets(&self, group: Mac) -> bool {
        !self.on || group == crate::headers::BROADCAST || self.list.contains(&group)
    }
}

/// A vif's rx queue, to which everybody delivers under its lock.
#[derive(Debug)]
pub struct RxHandle {
    /// `None`: given up.
    pub queue: Mutex<Option<RxQueue<Page, Span, Span>>>,
    /// To notify the frontend. By Xen's rings only.
    pub ports: Option<Arc<Ports>>,
    /// In the place of both: a virtqueue.
    pub vhost: Option<Arc<VhostRx>>,
}

impl RxHandle {
    /// Of a ring.
    pub fn ring(queue: RxQueue<Page, Span, Span>, ports: Arc<Ports>) -> RxHandle {
        RxHandle { queue: Mutex::new(Some(queue)), ports: Some(ports), vhost: None }
    }

    /// Of a virtqueue.
    pub fn vhost(rx: Arc<VhostRx>) -> RxHandle {
        RxHandle { queue: Mutex::new(None), ports: None, vhost: Some(rx) }
    }

    /// Tells the frontend of what was delivered.
    pub fn notify(&self, wanted: bool, stats: &Stats) {
        if let Some(ports) = &self.ports {
            ports.notify_rx(wanted, stats);
        }
    }
}

/// Called once when a port breaks.
type Failed = Box<dyn Fn(String) + Send + Sync>;

/// A connected vif.
pub struct Port {
    /// Its number in the switch, from 1.
    pub slot: u16,
    /// Whose it is.
    pub id: VifId,
    /// What its frontend can take.
    pub offloads: Offloads,
    /// Its queues.
    pub queues: Vec<RxHandle>,
    /// The toolstack's settings, and those that are in force: with addresses that the domain itself gave.
    settings: RwLock<(Arc<Settings>, Arc<Settings>)>,
    /// The frontend's hashes.
    pub hash: RwLock<Arc<HashConfig>>,
    /// The frontend's multicast filter.
    pub groups: RwLock<Groups>,
    headroom: AtomicUsize,
    /// What it may send now.
    pub bucket: Mutex<Option<Bucket>>,
    /// Counters.
    pub stats: Arc<Stats>,
    /// Called once when it breaks.
    pub on_failure: Failed,
    failed: AtomicBool,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("slot", &self.slot).field("id", &self.id).finish_non_exhaustive()
    }
}

/// A lock whose holder panicked: the process ends by that anyway.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a port is made of.
#[derive(Debug)]
pub struct PortParts {
    /// See [`Port::slot`].
    pub slot: u16,
    /// See [`Port::id`].
    pub id: VifId,
    /// See [`Port::offloads`].
    pub offloads: Offloads,
    /// See [`Port::queues`].
    pub queues: Vec<RxHandle>,
    /// See [`Port::settings`].
    pub settings: Settings,
    /// See [`Port::hash`].
    pub hash: HashConfig,
    /// See [`Port::groups`].
    pub groups: Groups,
    /// Bytes that stay free at the start of each page.
    pub headroom: usize,
    /// See [`Port::stats`].
    pub stats: Arc<Stats>,
}

impl Port {
    /// Makes one. `on_failure` is called at most once, from any thread.
    pub fn new(parts: PortParts, on_failure: impl Fn(String) + Send + Sync + 'static) -> Port {
        let PortParts { slot, id, offloads, queues, settings, hash, groups, headroom, stats } = parts;
        let bucket = settings.rate.map(|rate| Bucket::new(rate, Instant::now()));
        let settings = Arc::new(settings);
        Port {
            slot,
            id,
            offloads,
            queues,
            settings: RwLock::new((settings.clone(), settings)),
            hash: RwLock::new(Arc::new(hash)),
            groups: RwLock::new(groups),
            headroom: AtomicUsize::new(headroom),
            bucket: Mutex::new(bucket),
            stats,
            on_failure: Box::new(on_failure),
            failed: AtomicBool::new(false),
        }
    }

    /// The settings that are in force now.
    pub fn settings(&self) -> Arc<Settings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// The toolstack's settings.
    pub fn configured(&self) -> Arc<Settings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// New settings of the toolstack's, from the next packet on.
    pub fn set(&self, settings: Settings) {
        let mut bucket = lock(&self.bucket);
        if self.settings().rate != settings.rate {
            *bucket = settings.rate.map(|rate| Bucket::new(rate, Instant::now()));
        }
        let settings = Arc::new(settings);
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = (settings.clone(), settings);
    }

    /// What `with` makes of the toolstack's settings is in force from the next packet on.
    pub fn settle(&self, with: impl FnOnce(&mut Settings)) {
        let mut settings = (*self.configured()).clone();
        with(&mut settings);
        let mut both = self.settings.write().unwrap_or_else(PoisonError::into_inner);
        if *both.1 != settings {
            both.1 = Arc::new(settings);
        }
    }

    /// The hash configuration as it is now.
    pub fn hash(&self) -> Arc<HashConfig> {
        self.hash.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes that stay free at the start of each page.
    pub fn headroom(&self) -> usize {
        self.headroom.load(Ordering::Relaxed)
    }

    /// Another headroom, from the next packet of each queue on.
    pub fn set_headroom(&self, headroom: usize) {
        self.headroom.store(headroom, Ordering::Relaxed);
        for handle in &self.queues {
            if let Some(queue) = lock(&handle.queue).as_mut() {
                queue.set_headroom(headroom);
            }
        }
    }

    /// Gives the port up.
    pub fn fail(&self, why: String) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            (self.on_failure)(why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_bounded() {
        let mut groups = Groups { on: true, list: Vec::new() };
        for i in 0..MAX_GROUPS as u8 {
            assert!(groups.change(true, [1, 0, 0, 0, 0, i]));
            assert!(groups.change(true, [1, 0, 0, 0, 0, i]), "twice is once");
        }
        assert!(!groups.change(true, [3; 6]));
        assert!(groups.lets([1, 0, 0, 0, 0, 5]) && !groups.lets([3; 6]));
        assert!(groups.lets(crate::headers::BROADCAST));
        groups.change(false, [1, 0, 0, 0, 0, 5]);
        assert!(!groups.lets([1, 0, 0, 0, 0, 5]));
        groups.on = false;
        assert!(groups.lets([3; 6]));
    }
}

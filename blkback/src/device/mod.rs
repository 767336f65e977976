//! One connected device: its rings, each with a journal; and the threads that serve them.

pub mod connection;
mod ring;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Acquire};
use std::time::{Duration, Instant};

use domain_kit::grants::GrantError;
use domain_kit::hypercall::{HvError, Hypercall};
use domain_kit::journal::JournalError;
use domain_kit::xenbus::{BackendHandle, DeviceKey};
use domain_kit::{Domain, fdstore};
use nix::errno::Errno;

use crate::disk::attachment::Disk;
use crate::engine::{FaultHook, NoSpace};
use crate::limit::{Limiter, Limits};
use crate::pages::Tags;
use crate::stats::Stats;
use connection::{Connection, Kept, find, journal_name};
pub use ring::RingControl;
use ring::{Common, Ring, StartingRing};
pub use worker::Workers;

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A hypercall failed, or mapping what it gave.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// The ring failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// io_uring or a thread.
    #[error("{0}: {1}")]
    Os(&'static str, io::Error),
    /// Re-attach without a journal.
    #[error("nothing was kept of this connection")]
    NothingKept,
}

impl From<HvError> for AttachError {
    fn from(e: HvError) -> Self {
        AttachError::Grant(e.into())
    }
}

/// Pauses a device from any thread.
#[derive(Clone, Debug)]
pub struct DeviceControl(Vec<Arc<RingControl>>);

impl DeviceControl {
    /// Of these rings.
    pub fn new(rings: Vec<Arc<RingControl>>) -> Self {
        DeviceControl(rings)
    }

    /// While paused, nothing new is taken off the rings.
    pub fn set_paused(&self, paused: bool) {
        self.0.iter().for_each(|ring| ring.set_paused(paused));
    }

    /// Waits until nothing is in flight; false at the deadline.
    pub fn drained(&self, deadline: Instant) -> bool {
        while self.0.iter().any(|ring| ring.in_flight() > 0) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

/// What all devices of the process need.
pub struct Shared {
    /// This domain.
    pub domain: Arc<Domain>,
    /// To tell of failures.
    pub handle: BackendHandle,
    /// Makes the test hook of each ring, see `--fault`.
    pub fault: Option<fn() -> FaultHook>,
    /// What is done when the medium is full.
    pub no_space: NoSpace,
    /// Rings whose predecessor's maps are not all claimed yet: until then hv-core must not be told of service, which drops
    /// the unclaimed.
    pub claiming: Arc<AtomicUsize>,
    /// Serve the rings.
    pub workers: Arc<Workers>,
}

/// Which domain has the domid now, as [`Connection::instance`] tells; `None` if none has, or it goes.
///
/// # Errors
/// The hypercall's.
pub fn instance(hv: &Hypercall, domid: u16) -> Result<Option<u32>, HvError> {
    match hv.dom_info(domid) {
        Ok(info) if info.state == hv_abi::dom_state::DYING => Ok(None),
        Ok(info) => Ok(Some(info.instance as u32)),
        Err(e) if e.is(Errno::ESRCH) || e.is(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The device whose first journal has that name.
fn key_of(name: &str) -> Option<DeviceKey> {
    let (frontend, id) = name.strip_prefix("vbd-")?.split_once('-')?;
    Some(DeviceKey { frontend: frontend.parse().ok()?, id: id.parse().ok()? })
}

/// Connections of which a previous incarnation kept everything, and which the frontend knows to be connected. What was kept of
/// domains that are gone is dropped.
///
/// # Errors
/// The hypercalls'.
pub fn kept(hv: &Hypercall) -> Result<Vec<Connection>, AttachError> {
    let mut found = Vec::new();
    for info in hv.fd_list()? {
        let Some(key) = info.name.as_str().and_then(key_of) else { continue };
        match find(hv, key) {
            Ok(Some(kept)) if instance(hv, key.frontend)? != Some(kept.connection.instance) => {
                tracing::info!(device = %key, "its domain is gone");
                forget(hv, key)?;
            }
            Ok(Some(kept)) if kept.known => found.push(kept.connection),
            Ok(_) => {}
            Err(error) => tracing::error!(device = %key, %error, "a kept journal cannot be read"),
        }
    }
    Ok(found)
}

/// Drops everything that is kept of a device that is not served.
///
/// # Errors
/// The hypercalls'.
pub fn forget(hv: &Hypercall, key: DeviceKey) -> Result<(), AttachError> {
    if let Ok(Some(kept)) = find(hv, key) {
        for ring in &kept.connection.rings {
            close_port_to(hv, key.frontend, ring.remote_port)?;
        }
    }
    for map in hv.grant_list()? {
        if Tags::of_device(map.tag, key.id) && map.domid == key.frontend && map.mine == 0 {
            hv.grant_unmap(map.handle)?;
        }
    }
    delete_journals(hv, key)
}

/// The first ring's journal goes last: it says that there are others.
fn delete_journals(hv: &Hypercall, key: DeviceKey) -> Result<(), AttachError> {
    for ring in (0..connection::MAX_QUEUES).rev() {
        match hv.fd_delete(&journal_name(key, ring)) {
            Err(e) if !e.is(Errno::ENOENT) => return Err(e.into()),
            _ => {}
        }
    }
    Ok(())
}

fn close_port_to(hv: &Hypercall, domid: u16, remote_port: u32) -> Result<(), HvError> {
    for port in hv.port_list()? {
        if port.remote_domid == domid
            && port.remote_port == remote_port
            && port.state == hv_abi::port_state::INTERDOMAIN
        {
            hv.port_close(port.port)?;
        }
    }
    Ok(())
}

/// A device that is served.
#[derive(Debug)]
pub struct Device {
    /// Its connection.
    pub connection: Connection,
    limiter: Arc<Limiter>,
    rings: Vec<Ring>,
}

impl Device {
    /// Serves a connection that a frontend has just offered. Its rings are served from [`Starting::start`] on.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is left behind.
    pub fn connect(
        shared: &Shared,
        disk: &Arc<dyn Disk>,
        connection: Connection,
    ) -> Result<Starting, AttachError> {
        let hv = &shared.domain.hv;
        forget(hv, connection.key)?;
        let common = Common::new(connection.rings.len())?;
        let made = (|| {
            let mut starting = Starting { connection, common, rings: Vec::new() };
            let (connection, common) = (&starting.connection, &starting.common);
            // The first ring's journal says that there are others: it is made last.
            for ring in (0..connection.rings.len() as u32).rev() {
                let name = journal_name(connection.key, ring);
                let memory =
                    fdstore::kept_memory(hv, &name, connection.shape().bytes()).map(|(memory, _)| memory);
                let made = memory.map_err(AttachError::from).and_then(|memory| {
                    StartingRing::new(shared, disk, connection, ring, memory, common, true)
                });
                match made {
                    Ok(ring) => starting.rings.insert(0, ring),
                    Err(e) => return Err((Box::new(starting), e)),
                }
            }
            Ok(starting)
        })();
        made.map_err(|(starting, error)| {
            let key = starting.connection.key;
            starting.abandon(hv);
            if let Err(error) = forget(hv, key) {
                tracing::warn!(device = %key, %error, "forgetting");
            }
            error
        })
    }

    /// Serves again what a previous incarnation served. All rings are taken up before any is served.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn reattach(shared: &Shared, disk: &Arc<dyn Disk>, key: DeviceKey) -> Result<Device, AttachError> {
        let kept = find(&shared.domain.hv, key)?.ok_or(AttachError::NothingKept)?;
        let Kept { connection, journals, limits, .. } = kept;
        let common = Common::new(connection.rings.len())?;
        common.limiter.set(limits);
        let mut starting = Starting { connection, common, rings: Vec::new() };
        for (ring, memory) in (0..).zip(journals) {
            let Starting { connection, common, .. } = &starting;
            match StartingRing::new(shared, disk, connection, ring, memory, common, false) {
                Ok(ring) => starting.rings.push(ring),
                Err(e) => {
                    starting.abandon(&shared.domain.hv);
                    return Err(e);
                }
            }
        }
        starting.start()
    }

    /// To pause it.
    pub fn control(&self) -> DeviceControl {
        DeviceControl(self.rings.iter().map(Ring::control).collect())
    }

    /// Counters of each ring.
    pub fn stats(&self) -> Vec<Arc<Stats>> {
        self.rings.iter().map(Ring::stats).collect()
    }

    /// Requests and bytes per second that it may do now.
    pub fn limits(&self) -> Limits {
        self.limiter.get()
    }

    /// Changes them, for later incarnations too; true if they were others.
    pub fn set_limits(&self, limits: Limits) -> bool {
        if let Some(first) = self.rings.first() {
            first.keep_limits(&limits);
        }
        self.limiter.set(limits)
    }

    /// The frontend knows that it is connected: the next incarnation may serve it before it has seen the store.
    pub fn known(&self) {
        if let Some(first) = self.rings.first() {
            first.known();
        }
    }

    /// Stops serving and lets everything go.
    pub fn close(self, hv: &Hypercall) {
        let key = self.connection.key;
        self.rings.iter().for_each(Ring::stop);
        for ring in self.rings {
            ring.close(hv);
        }
        if let Err(error) = delete_journals(hv, key) {
            tracing::warn!(device = %key, %error, "closing");
        }
    }
}

/// A device whose engines are made and do not run yet.
pub struct Starting {
    connection: Connection,
    common: Common,
    rings: Vec<StartingRing>,
}

impl Starting {
    /// Lets everything go without ever having served.
    pub fn abandon(self, hv: &Hypercall) {
        let key = self.connection.key;
        for ring in self.rings {
            ring.abandon(hv, key);
        }
        if let Err(error) = delete_journals(hv, key) {
            tracing::warn!(device = %key, %error, "abandoning");
        }
    }

    /// Has its rings served.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start(self) -> Result<Device, AttachError> {
        let mut device =
            Device { connection: self.connection, limiter: self.common.limiter, rings: Vec::new() };
        for ring in self.rings {
            match ring.start(device.connection.key) {
                Ok(ring) => device.rings.push(ring),
                Err(e) => {
                    device.rings.iter().for_each(Ring::stop);
                    return Err(e);
                }
            }
        }
        Ok(device)
    }
}

/// Whether all maps of predecessors are claimed.
fn all_claimed(claiming: &AtomicUsize) -> bool {
    claiming.load(Acquire) == 0
}

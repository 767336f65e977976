//! The driver behind [`domain_kit::xenbus`]: offers, connects and closes vifs. It never touches a packet; while
//! xenstored is away nothing changes here and packets flow on.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use domain_kit::Domain;
use domain_kit::control::ServiceControl;
use domain_kit::xenbus::{BackendDriver, BackendHandle, DeviceError, DeviceKey, DeviceNode, Properties};
use proto::service::Counter;

use crate::connection::{self, ConnectError, Connection, VifId};
use crate::forward::{Wiring, WiringError};
use crate::netlink::Netlink;
use crate::nodes;
use crate::stats::Stats;
use crate::tap::Tap;
use crate::worker::{Work, Worker};

/// Counters and thread of a vif that is served.
type Served = (Arc<Stats>, Arc<Worker>);

/// What the gRPC thread sees of the vifs.
#[derive(Debug, Default)]
pub struct Vifs {
    list: Mutex<BTreeMap<VifId, Served>>,
    draining: Mutex<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ServiceControl for Vifs {
    fn statistics(&self) -> Vec<Counter> {
        let list = lock(&self.list);
        let mut counters =
            vec![Counter { name: "vifs_connected".into(), value: list.len() as u64, ..Counter::default() }];
        for (id, (stats, _)) in list.iter() {
            for (name, value, unit) in stats.all() {
                counters.push(Counter {
                    name: name.into(),
                    value,
                    subject: id.to_string(),
                    unit: unit.into(),
                });
            }
        }
        counters
    }

    fn drain(&self, deadline: Duration, resume: bool) -> bool {
        let end = Instant::now() + deadline;
        *lock(&self.draining) = !resume;
        let workers: Vec<Arc<Worker>> = lock(&self.list).values().map(|(_, w)| w.clone()).collect();
        workers.iter().for_each(|worker| worker.drain(!resume));
        resume || workers.iter().all(|w| w.wait_drained(end.saturating_duration_since(Instant::now())))
    }
}

/// A vif that is connected.
#[derive(Debug)]
pub struct Vif {
    connection: Connection,
    /// Until the frontend may be served.
    work: Option<Work>,
    worker: Option<Arc<Worker>>,
}

/// netback's part of xenbus.
#[derive(Debug)]
pub struct NetDriver {
    domain: Arc<Domain>,
    vifs: Arc<Vifs>,
    bus: BackendHandle,
    wiring: Wiring,
    netlink: Option<Netlink>,
    wired: bool,
    taps: BTreeMap<VifId, Arc<Tap>>,
}

impl From<ConnectError> for DeviceError {
    fn from(e: ConnectError) -> Self {
        match e {
            ConnectError::System { .. } => DeviceError::NotReady(e.to_string()),
            e => DeviceError::Failed(e.to_string()),
        }
    }
}

impl NetDriver {
    /// Serves nothing yet.
    pub fn new(domain: Arc<Domain>, vifs: Arc<Vifs>, wiring: Wiring, bus: BackendHandle) -> Self {
        NetDriver { domain, vifs, bus, wiring, netlink: None, wired: false, taps: BTreeMap::new() }
    }

    /// Sets this domain's network up, once.
    ///
    /// # Errors
    /// [`WiringError`].
    pub fn wire(&mut self) -> Result<&mut Netlink, WiringError> {
        let netlink = match self.netlink.take() {
            Some(netlink) => netlink,
            None => Netlink::open()?,
        };
        let netlink = self.netlink.insert(netlink);
        if !self.wired {
            self.wiring.prepare(netlink)?;
            self.wired = true;
        }
        Ok(netlink)
    }

    fn id(key: DeviceKey) -> Result<VifId, DeviceError> {
        VifId::try_from(key).map_err(|_| DeviceError::Failed(format!("vif {} is out of range", key.id)))
    }

    /// The vif's TAP, wired in.
    fn tap(&mut self, node: &DeviceNode) -> Result<Arc<Tap>, DeviceError> {
        let id = Self::id(node.key)?;
        let not_ready = |e: WiringError| DeviceError::NotReady(e.to_string());
        self.wire().map_err(not_ready)?;
        let tap = match self.taps.get(&id) {
            Some(tap) => tap.clone(),
            None => connection::tap(&self.domain.hv, id)?,
        };
        self.taps.insert(id, tap.clone());
        let (mtu, ip) = nodes::network(node)?;
        let wiring = self.wiring.clone();
        let netlink = self.wire().map_err(not_ready)?;
        wiring.attach(netlink, tap.name(), mtu, ip).map_err(not_ready)?;
        Ok(tap)
    }

    fn serve(&self, id: VifId, work: Work) -> std::io::Result<Arc<Worker>> {
        let bus = self.bus.clone();
        let draining = *lock(&self.vifs.draining);
        let stats = work.stats.clone();
        let worker = Worker::start(&id.to_string(), work, draining, move |error| {
            tracing::error!(%id, %error, "the vif is given up");
            bus.failed(id.into(), error.to_string());
        })?;
        let worker = Arc::new(worker);
        lock(&self.vifs.list).insert(id, (stats, worker.clone()));
        Ok(worker)
    }

    fn take_over(&mut self, id: VifId) -> Result<Option<Vif>, ConnectError> {
        let own_fault = self.domain.predecessor_crashed();
        let found = connection::reattach(&self.domain.hv, id, own_fault, Arc::default())?;
        let Some((connection, work)) = found else { return Ok(None) };
        self.taps.insert(id, work.world.tap.clone());
        let worker = self.serve(id, work).map_err(connection::system("starting a thread"))?;
        Ok(Some(Vif { connection, work: None, worker: Some(worker) }))
    }
}

impl BackendDriver for NetDriver {
    type Device = Vif;
    const KIND: &'static str = "vif";

    fn resume(&mut self) -> Vec<(DeviceKey, Vif)> {
        let known = match connection::known(&self.domain.hv) {
            Ok(known) => known,
            Err(error) => {
                tracing::error!(%error, "what the predecessor served is not to be had");
                return Vec::new();
            }
        };
        let mut vifs = Vec::new();
        for id in known {
            match self.take_over(id) {
                Ok(Some(vif)) => vifs.push((id.into(), vif)),
                Ok(None) => tracing::info!(%id, "the predecessor had not finished connecting"),
                Err(error) => {
                    tracing::error!(%id, %error, "a vif cannot be taken over");
                    self.bus.failed(id.into(), error.to_string());
                }
            }
        }
        vifs
    }

    fn kept(&mut self) -> Vec<DeviceKey> {
        match connection::with_tap(&self.domain.hv) {
            Ok(ids) => ids.into_iter().map(DeviceKey::from).collect(),
            Err(error) => {
                tracing::error!(%error, "what the predecessor offered is not to be had");
                Vec::new()
            }
        }
    }

    fn offer(&mut self, node: &DeviceNode) -> Result<Properties, DeviceError> {
        self.tap(node)?;
        Ok(nodes::features())
    }

    fn connect(&mut self, node: &DeviceNode, reattach: bool) -> Result<(Vif, Properties), DeviceError> {
        let id = Self::id(node.key)?;
        if reattach && let Some(vif) = self.take_over(id)? {
            return Ok((vif, Vec::new()));
        }
        let params = nodes::params(node)?;
        let tap = self.tap(node)?;
        let (connection, work) = connection::connect(&self.domain.hv, id, &params, tap, Arc::default())?;
        let mut vif = Vif { connection, work: Some(work), worker: None };
        if reattach {
            self.connected(node, &mut vif);
        }
        Ok((vif, Vec::new()))
    }

    fn connected(&mut self, node: &DeviceNode, vif: &mut Vif) {
        let (Ok(id), Some(mut work)) = (Self::id(node.key), vif.work.take()) else { return };
        work.kick = true;
        // From here on a next incarnation takes it over without asking the store.
        let kept = connection::keep(&self.domain.hv, id, &vif.connection).map_err(|e| e.to_string());
        match kept.and_then(|()| self.serve(id, work).map_err(|e| e.to_string())) {
            Ok(worker) => vif.worker = Some(worker),
            Err(why) => self.bus.failed(node.key, why),
        }
    }

    fn disconnect(&mut self, key: DeviceKey, mut vif: Vif) {
        let Ok(id) = Self::id(key) else { return };
        lock(&self.vifs.list).remove(&id);
        if let Some(worker) = vif.worker.take() {
            worker.stop();
        }
        drop(vif.work.take());
        vif.connection.close(&self.domain.hv, id);
        self.forget(key);
    }

    fn forget(&mut self, key: DeviceKey) {
        let Ok(id) = Self::id(key) else { return };
        self.taps.remove(&id);
        connection::forget(&self.domain.hv, id);
    }
}

//! The driver behind [`domain_kit::xenbus`]: offers, connects and closes vifs. It never touches a packet; while
//! xenstored is away nothing changes here and packets flow on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use domain_kit::Domain;
use domain_kit::control::ServiceControl;
use domain_kit::xenbus::{BackendDriver, BackendHandle, DeviceError, DeviceKey, DeviceNode, Properties};
use proto::service::Counter;

use crate::capture::Captures;
use crate::connection::{self, ConnectError, Connection, VifId, kept_memory};
use crate::forward::{TAP_MAC, Wiring, WiringError};
use crate::netlink::Netlink;
use crate::nodes;
use crate::stats::Stats;
use crate::switch::port::{Port, lock};
use crate::switch::settings::Settings;
use crate::switch::{Gateway, Memory, Plan, RULES_BYTES, Switch, dhcp, fdb};
use crate::tap::Tap;
use crate::uplink::{self, UplinkWork};
use crate::vhost::{self, VhostVif};
use crate::worker::{Work, Worker};
use domain_kit::ring::Span;

const FDB_ENTRY: &str = "switch-learned";
const LEASES_ENTRY: &str = "dhcp-leases";
const RULES_ENTRY: &str = "switch-rules";

/// A vif that is served, with its threads.
type Served = (Arc<Port>, Vec<Arc<Worker>>);

/// What the gRPC thread sees of the vifs.
#[derive(Debug, Default)]
pub struct Vifs {
    list: Mutex<BTreeMap<VifId, Served>>,
    switch: Mutex<Option<Arc<Switch>>>,
    uplink: Mutex<Option<Arc<Worker>>>,
    /// What is asked of those by vhost-user.
    vhost: Mutex<BTreeMap<VifId, VhostControl>>,
    draining: Mutex<bool>,
    /// Who wants copies of packets.
    pub(crate) captures: Arc<Captures>,
}

/// A vif by vhost-user, as the gRPC thread sees it.
type VhostControl = (Arc<Stats>, crate::vhost::Drain);

fn counter(name: &str, value: u64, subject: &str, unit: &str) -> Counter {
    Counter { name: name.into(), value, subject: subject.into(), unit: unit.into() }
}

fn counters(stats: &Stats, subject: &str) -> impl Iterator<Item = Counter> {
    stats.all().into_iter().map(move |(name, value, unit)| counter(name, value, subject, unit))
}

impl Vifs {
    /// Whether a vif is connected.
    pub(crate) fn serves(&self, id: VifId) -> bool {
        lock(&self.list).contains_key(&id)
    }

    fn workers(&self) -> Vec<Arc<Worker>> {
        let list = lock(&self.list);
        let vhost = lock(&self.vhost);
        let by_vhost = vhost.values().filter_map(|(_, drain)| drain.worker());
        let all = list.values().flat_map(|(_, workers)| workers.clone());
        all.chain(lock(&self.uplink).clone()).chain(by_vhost).collect()
    }
}

impl ServiceControl for Vifs {
    fn statistics(&self) -> Vec<Counter> {
        let list = lock(&self.list);
        let vhost = lock(&self.vhost);
        let mut out = vec![counter("vifs_connected", (list.len() + vhost.len()) as u64, "", "")];
        if let Some(switch) = &*lock(&self.switch) {
            out.push(counter("addresses_learned", switch.learned() as u64, "", ""));
            out.push(counter("addresses_leased", switch.leased() as u64, "", ""));
            let uplink = switch.stats.all().into_iter();
            out.extend(uplink.map(|(name, value, unit)| counter(&format!("uplink_{name}"), value, "", unit)));
        }
        for (id, (port, _)) in list.iter() {
            let id = id.to_string();
            out.push(counter("queues", port.queues.len() as u64, &id, ""));
            out.extend(counters(&port.stats, &id));
        }
        for (id, (stats, _)) in vhost.iter() {
            out.extend(counters(stats, &id.to_string()));
        }
        out
    }

    fn drain(&self, deadline: Duration, resume: bool) -> bool {
        let end = Instant::now() + deadline;
        *lock(&self.draining) = !resume;
        lock(&self.vhost).values().for_each(|(_, drain)| drain.rest(!resume));
        let workers = self.workers();
        workers.iter().for_each(|worker| worker.drain(!resume));
        resume || workers.iter().all(|w| w.wait_drained(end.saturating_duration_since(Instant::now())))
    }
}

/// A vif that is served or about to be.
#[derive(Debug)]
pub enum Device {
    /// By Xen's rings.
    Rings(Vif),
    /// By vhost-user.
    Vhost(VhostVif),
}

/// A vif that is connected by Xen's rings.
#[derive(Debug)]
pub struct Vif {
    connection: Connection,
    /// Until the frontend may be served.
    work: Vec<Work>,
    workers: Vec<Arc<Worker>>,
}

/// netback's part of xenbus.
#[derive(Debug)]
pub struct NetDriver {
    domain: Arc<Domain>,
    vifs: Arc<Vifs>,
    bus: BackendHandle,
    wiring: Wiring,
    queues: usize,
    netlink: Option<Netlink>,
    wired: bool,
    switch: Option<Arc<Switch>>,
    tap: Option<Arc<Tap>>,
}

impl From<ConnectError> for DeviceError {
    fn from(e: ConnectError) -> Self {
        match e {
            ConnectError::System { .. } => DeviceError::NotReady(e.to_string()),
            e => DeviceError::Failed(e.to_string()),
        }
    }
}

fn not_ready(e: impl std::fmt::Display) -> DeviceError {
    DeviceError::NotReady(e.to_string())
}

impl NetDriver {
    /// Serves nothing yet. A vif may have `queues` queues.
    pub fn new(
        domain: Arc<Domain>,
        vifs: Arc<Vifs>,
        wiring: Wiring,
        queues: usize,
        bus: BackendHandle,
    ) -> Self {
        NetDriver { domain, vifs, bus, wiring, queues, netlink: None, wired: false, switch: None, tap: None }
    }

    /// The switch, with what a predecessor had learned.
    pub fn switch(&mut self) -> Result<Arc<Switch>, ConnectError> {
        if let Some(switch) = &self.switch {
            return Ok(switch.clone());
        }
        let span = |entry, bytes| {
            kept_memory(&self.domain.hv, entry, bytes).map(|(_, mem)| Span::new(mem, 0, bytes))
        };
        let memory = Memory {
            fdb: span(FDB_ENTRY, fdb::BYTES)?,
            leases: span(LEASES_ENTRY, dhcp::BYTES)?,
            rules: span(RULES_ENTRY, RULES_BYTES)?,
        };
        let wiring = &self.wiring;
        let dns = wiring.dns.iter().filter_map(|ip| match ip {
            IpAddr::V4(ip) => Some(*ip),
            IpAddr::V6(_) => None,
        });
        let plan = Plan {
            routed: wiring.gateway.filter(|_| wiring.mode.is_routed()).map(|g| Gateway {
                mac: TAP_MAC,
                ipv4: (g.address, g.prefix),
                ipv6: wiring.gateway6.map(|g| (g.address, g.prefix)),
                dhcp: wiring.dhcp.then(|| dhcp::Options { dns: dns.collect() }),
                ra: wiring.ra,
            }),
            isolated: wiring.mode == crate::forward::Mode::Isolated,
        };
        let switch = Arc::new(Switch::new(plan, memory).with_captures(self.vifs.captures.clone()));
        *lock(&self.vifs.switch) = Some(switch.clone());
        Ok(self.switch.insert(switch).clone())
    }

    /// Opens the uplink's TAP, once: guests' packets can go there.
    fn tap(&mut self) -> Result<Arc<Tap>, ConnectError> {
        if let Some(tap) = &self.tap {
            return Ok(tap.clone());
        }
        let tap = uplink::tap(&self.domain.hv)?;
        self.switch()?.set_uplink(tap.clone());
        Ok(self.tap.insert(tap).clone())
    }

    /// Starts the uplink's thread, once.
    fn uplink(&mut self) -> Result<(), ConnectError> {
        if lock(&self.vifs.uplink).is_some() {
            return Ok(());
        }
        let (switch, tap) = (self.switch()?, self.tap()?);
        let mut work = UplinkWork::open(&self.domain.hv, tap, switch, self.domain.predecessor_crashed())?;
        let draining = *lock(&self.vifs.draining);
        let worker = Worker::start("uplink", draining, move |control| {
            if let Err(error) = work.run(control) {
                // The next incarnation makes a new one; without it this domain is of no use.
                tracing::error!(%error, "the uplink's TAP failed");
                std::process::exit(1);
            }
        })
        .map_err(connection::system("starting a thread"))?;
        *lock(&self.vifs.uplink) = Some(Arc::new(worker));
        Ok(())
    }

    /// Sets this domain's network up, once.
    ///
    /// # Errors
    /// [`DeviceError::NotReady`] with the reason.
    pub fn wire(&mut self) -> Result<&mut Netlink, DeviceError> {
        self.uplink()?;
        let netlink = match self.netlink.take() {
            Some(netlink) => netlink,
            None => Netlink::open().map_err(not_ready)?,
        };
        let netlink = self.netlink.insert(netlink);
        if !self.wired {
            self.wiring.prepare(netlink, uplink::NAME).map_err(not_ready)?;
            self.wired = true;
        }
        Ok(netlink)
    }

    fn id(key: DeviceKey) -> Result<VifId, DeviceError> {
        VifId::try_from(key).map_err(|_| DeviceError::Failed(format!("vif {} is out of range", key.id)))
    }

    /// The vif's settings, with the routes that they need.
    fn settings(&mut self, node: &DeviceNode) -> Result<Settings, DeviceError> {
        let settings = nodes::settings(node)?;
        let wiring = self.wiring.clone();
        let netlink = self.wire()?;
        let addresses = settings.ipv4.iter().copied().map(IpAddr::V4);
        for guest in addresses.chain(settings.ipv6.iter().copied().map(IpAddr::V6)) {
            wiring.route_to(netlink, uplink::NAME, guest).map_err(|e: WiringError| not_ready(e))?;
        }
        Ok(settings)
    }

    /// Tells the bus that a vif has to be given up.
    fn failed(&self, id: VifId) -> impl Fn(String) + Send + Sync + 'static {
        let bus = self.bus.clone();
        move |why| {
            tracing::error!(%id, why, "the vif is given up");
            bus.failed(id.into(), why);
        }
    }

    /// Others can send to the vif.
    fn attach(&self, vif: &Vif) {
        if let Some(switch) = &self.switch {
            switch.attach(vif.connection.port.clone());
        }
    }

    /// Starts the threads of a vif: what it sends flows.
    fn serve(&self, vif: &mut Vif) -> std::io::Result<()> {
        let port = vif.connection.port.clone();
        let draining = *lock(&self.vifs.draining);
        for mut work in vif.work.drain(..) {
            let failing = port.clone();
            let name = format!("{}-q{}", port.id, work.index);
            let worker = Worker::start(&name, draining, move |control| {
                if let Err(error) = work.run(control) {
                    failing.fail(error.to_string());
                }
            })?;
            vif.workers.push(Arc::new(worker));
        }
        lock(&self.vifs.list).insert(port.id, (port, vif.workers.clone()));
        Ok(())
    }

    /// The vif by vhost-user, if its frontend asks for that and the toolstack approved it.
    fn vhost(&mut self, node: &DeviceNode) -> Result<Option<VhostVif>, DeviceError> {
        let Some(resource) = node.vhost_user()? else { return Ok(None) };
        let id = Self::id(node.key)?;
        let settings = self.settings(node)?;
        let switch = self.switch()?;
        let draining = *lock(&self.vifs.draining);
        let vif = VhostVif::serve(&self.domain, id, resource, settings, &switch, draining)?;
        self.note_vhost(id, &vif);
        Ok(Some(vif))
    }

    fn note_vhost(&self, id: VifId, vif: &VhostVif) {
        lock(&self.vifs.vhost).insert(id, (vif.stats(), vif.drain()));
    }

    fn resume_vhost(&mut self) -> Vec<(DeviceKey, Device)> {
        let Ok(switch) = self.switch() else { return Vec::new() };
        let known = vhost::known(&self.domain.hv).unwrap_or_else(|error| {
            tracing::error!(%error, "what the predecessor served is not to be had");
            Vec::new()
        });
        let mut vifs = Vec::new();
        for id in known {
            let draining = *lock(&self.vifs.draining);
            match VhostVif::resume(&self.domain, id, &switch, draining) {
                Ok(Some(vif)) => {
                    self.note_vhost(id, &vif);
                    vifs.push((id.into(), Device::Vhost(vif)));
                }
                Ok(None) => vhost::forget(&self.domain.hv, id),
                Err(error) => tracing::error!(%id, %error, "a vif cannot be taken over"),
            }
        }
        vifs
    }

    /// A predecessor's vif: others can send to it, and it is not served yet.
    fn take_over(&mut self, id: VifId) -> Result<Option<Vif>, ConnectError> {
        let own_fault = self.domain.predecessor_crashed();
        let switch = self.switch()?;
        let found = connection::reattach(&self.domain.hv, id, own_fault, &switch, self.failed(id))?;
        let Some((connection, work)) = found else { return Ok(None) };
        let vif = Vif { connection, work, workers: Vec::new() };
        self.attach(&vif);
        Ok(Some(vif))
    }
}

impl BackendDriver for NetDriver {
    type Device = Device;
    const KIND: &'static str = "vif";

    fn resume(&mut self) -> Vec<(DeviceKey, Device)> {
        let known = match connection::known(&self.domain.hv) {
            Ok(known) => known,
            Err(error) => {
                tracing::error!(%error, "what the predecessor served is not to be had");
                return Vec::new();
            }
        };
        if let Err(error) = self.tap() {
            tracing::error!(%error, "no uplink yet");
        }
        let mut vifs: Vec<(DeviceKey, Vif)> = Vec::new();
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
        // All are there before any of them sends: a packet to one that is not there yet would be lost.
        for (key, vif) in &mut vifs {
            if let Err(error) = self.serve(vif) {
                self.bus.failed(*key, format!("starting a thread: {error}"));
            }
        }
        let mut all: Vec<_> = vifs.into_iter().map(|(key, vif)| (key, Device::Rings(vif))).collect();
        all.extend(self.resume_vhost());
        // The last: what came from outside meanwhile waits in the TAP.
        if let Err(error) = self.uplink() {
            tracing::error!(%error, "no uplink yet");
        }
        all
    }

    fn kept(&mut self) -> Vec<DeviceKey> {
        match connection::kept(&self.domain.hv) {
            Ok(ids) => ids.into_iter().map(DeviceKey::from).collect(),
            Err(error) => {
                tracing::error!(%error, "what the predecessor offered is not to be had");
                Vec::new()
            }
        }
    }

    fn offer(&mut self, node: &DeviceNode) -> Result<Properties, DeviceError> {
        self.settings(node)?;
        Ok(nodes::features(self.queues))
    }

    fn connect(&mut self, node: &DeviceNode, reattach: bool) -> Result<(Device, Properties), DeviceError> {
        let id = Self::id(node.key)?;
        if let Some(vif) = self.vhost(node)? {
            if reattach {
                vif.keep(&self.domain.hv).map_err(not_ready)?;
            }
            return Ok((Device::Vhost(vif), Vec::new()));
        }
        if reattach && let Some(mut vif) = self.take_over(id)? {
            self.serve(&mut vif).map_err(connection::system("starting a thread"))?;
            return Ok((Device::Rings(vif), Vec::new()));
        }
        let params = nodes::params(node, self.queues)?;
        let settings = self.settings(node)?;
        let switch = self.switch()?;
        let (connection, work) =
            connection::connect(&self.domain.hv, id, params, settings, &switch, self.failed(id))?;
        let vif = Vif { connection, work, workers: Vec::new() };
        // Before anybody is told that it is connected: whoever waits for that may send to it. What it sends itself waits until
        // the next incarnation would know of the connection, so that none of it goes out twice.
        self.attach(&vif);
        let mut vif = Device::Rings(vif);
        if reattach {
            self.connected(node, &mut vif);
        }
        Ok((vif, Vec::new()))
    }

    fn connected(&mut self, node: &DeviceNode, vif: &mut Device) {
        let vif = match vif {
            Device::Rings(vif) => vif,
            Device::Vhost(vif) => {
                if let Err(error) = vif.keep(&self.domain.hv) {
                    self.bus.failed(node.key, error.to_string());
                }
                return;
            }
        };
        let id = vif.connection.port.id;
        vif.work.iter_mut().for_each(|work| work.kick = true);
        // From here on a next incarnation takes it over without asking the store.
        let kept = connection::keep(&self.domain.hv, id, &vif.connection).map_err(|e| e.to_string());
        if let Err(why) = kept.and_then(|()| self.serve(vif).map_err(|e| e.to_string())) {
            self.bus.failed(node.key, why);
        }
    }

    fn live(&mut self, node: &DeviceNode, vif: &mut Device) -> Result<(), DeviceError> {
        let vif = match vif {
            Device::Rings(vif) => vif,
            Device::Vhost(vif) => {
                vif.set(self.settings(node)?);
                return Ok(());
            }
        };
        let port = vif.connection.port.clone();
        let headroom = nodes::headroom(node)?;
        if headroom != port.headroom() {
            port.set_headroom(headroom);
            vif.connection.kept.update(|record| record.params.headroom = headroom);
        }
        let settings = self.settings(node)?;
        if settings != *port.configured() {
            tracing::info!(id = %port.id, "new settings");
            vif.connection.kept.update(|record| record.settings.clone_from(&settings));
            if let Some(switch) = &self.switch {
                switch.settings_changed(port.slot, settings);
            }
        }
        Ok(())
    }

    fn disconnect(&mut self, key: DeviceKey, vif: Device) {
        let Ok(id) = Self::id(key) else { return };
        let mut vif = match vif {
            Device::Rings(vif) => vif,
            Device::Vhost(vif) => {
                lock(&self.vifs.vhost).remove(&id);
                return vif.close(&self.domain.hv);
            }
        };
        lock(&self.vifs.list).remove(&id);
        self.vifs.captures.end(id);
        for worker in vif.workers.drain(..) {
            worker.stop();
        }
        vif.work.clear();
        if let Some(switch) = &self.switch {
            switch.detach(vif.connection.port.slot);
        }
        // Not attached, perhaps.
        vif.connection.port.queues.iter().for_each(|q| drop(lock(&q.queue).take()));
        vif.connection.close(&self.domain.hv, id);
    }

    fn forget(&mut self, key: DeviceKey) {
        if let Ok(id) = Self::id(key) {
            connection::forget(&self.domain.hv, id);
            vhost::forget(&self.domain.hv, id);
        }
    }
}

//! The guest's disks and NICs: xenbus frontends whose data path is vhost-user.
//!
//! ```text
//!   own state      backend's state    what is done
//!   Initialising   InitWait           QEMU listens at the device's socket; `protocol` = "vhost-user"; Initialised
//!   Initialised    Connected          (the backend has dialled in) plugged into the machine; Connected
//!   Connected      Closing, Closed    unplugged: the guest is asked to let go; when it has, Closed
//!   (gone)                            the same, by force of the toolstack
//! ```
//! What is plugged is asked of QEMU, never remembered: a new incarnation goes on where the last one was. Devices that are there before the
//! guest starts are plugged in the order of their numbers, so that the guest's names of them stay the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain_kit::Domain;
use domain_kit::xenbus::{Frontend, VHOST_USER, XenbusState};
use domain_kit::xs::{WatchSet, XsClient, XsError, XsOps};
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::qmp::{PATIENCE, Qmp, QmpError};
use crate::resize::Resize;
use crate::save::{self, Restore};
use crate::usb::{LookError, Usb};

/// Between two looks if nothing was told.
const LOOK: Duration = Duration::from_secs(2);
/// While something is on its way.
const SOON: Duration = Duration::from_millis(50);
/// How long the devices that are there at first may take until the guest starts.
const COLD: Duration = Duration::from_secs(60);
/// A backend that dies while its device is plugged in comes back within this.
const PLUG: Duration = Duration::from_secs(30);

/// Before a root port's number, in the machine's command line.
const PORT: &str = "port";

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Vbd,
    Vif,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Vbd => "vbd",
            Kind::Vif => "vif",
        }
    }
}

/// Names a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    kind: Kind,
    id: u32,
}

impl Key {
    /// As QEMU knows it.
    fn name(self) -> String {
        format!("{}{}", self.kind.word(), self.id)
    }

    fn of(name: &str) -> Option<Key> {
        let kind = if name.starts_with("vbd") { Kind::Vbd } else { Kind::Vif };
        Some(Key { kind, id: name.strip_prefix(kind.word())?.parse().ok()? })
    }

    fn chardev(self) -> String {
        format!("{}-c", self.name())
    }

    fn netdev(self) -> String {
        format!("{}-n", self.name())
    }
}

/// Why a device is not where it should be.
#[derive(Debug, thiserror::Error)]
enum DeviceError {
    #[error(transparent)]
    Store(#[from] XsError),
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Hypercall(#[from] domain_kit::HvError),
}

impl From<LookError> for DeviceError {
    fn from(e: LookError) -> DeviceError {
        match e {
            LookError::Qmp(e) => DeviceError::Qmp(e),
            LookError::Store(e) => DeviceError::Store(e),
        }
    }
}

/// Keeps the machine's devices as xenstore has them.
pub struct Devices {
    domain: Arc<Domain>,
    machine: Arc<Machine>,
    xs: XsClient,
    watches: WatchSet,
    /// Backend states that are watched.
    watched: BTreeSet<String>,
    /// What was said of a device's error last.
    errors: BTreeMap<Key, String>,
    /// The guest is to go on from there.
    restore: Option<Restore>,
    usb: Usb,
    resize: Resize,
}

impl Devices {
    /// For a domain whose nodes are there.
    ///
    /// # Errors
    /// The store's.
    pub fn new(domain: Arc<Domain>, machine: Arc<Machine>, xs: XsClient) -> Result<Devices, XsError> {
        let watches = xs.watch_set()?;
        for node in ["device", "usb", "memory/target", "cpu"] {
            watches.watch(node, node)?;
        }
        let (usb, resize) = (Usb::new(&xs), Resize::default());
        let (watched, errors) = (BTreeSet::new(), BTreeMap::new());
        Ok(Devices { domain, machine, xs, watches, watched, errors, restore: None, usb, resize })
    }

    /// Plugs what is there, starts the guest if it was never started, and follows the store from then on.
    ///
    /// # Errors
    /// The devices that are there at first cannot be had, or QEMU is gone.
    pub fn run(mut self) -> anyhow::Result<()> {
        let state = self.machine.look()?;
        let deadline = Instant::now() + COLD;
        let mut starting = matches!(state.as_str(), "prelaunch" | "inmigrate");
        if state == "inmigrate" {
            self.restore = Some(Restore::open(&self.domain.hv)?);
        } else if state == "paused" && save::begun(&self.domain.hv)? {
            // Our predecessor was killed just before.
            save::go_on(&self.domain.hv, &self.machine)?;
        }
        loop {
            // Events that came before this look are in it.
            while self.watches.try_next().is_some() {}
            let settled = match self.look(starting) {
                Ok(settled) => settled,
                Err(DeviceError::Qmp(why @ (QmpError::Closed | QmpError::Garbage(_)))) => {
                    return Err(why.into());
                }
                Err(error) => {
                    tracing::debug!(%error, "looking at the devices");
                    false
                }
            };
            if starting && settled {
                match self.restore.take() {
                    Some(mut restore) => restore.load(&self.domain.hv, &self.machine)?,
                    None => self.machine.resume()?,
                }
                starting = false;
                tracing::info!(
                    after_ms = self.domain.started.elapsed().as_millis() as u64,
                    "the guest starts"
                );
            }
            if starting && Instant::now() > deadline {
                let late: Vec<String> =
                    self.errors.iter().map(|(k, e)| format!("{}: {e}", k.name())).collect();
                let late =
                    if late.is_empty() { "their backends do not come".into() } else { late.join("; ") };
                anyhow::bail!("the guest's devices cannot be plugged in: {late}");
            }
            self.watches.next_timeout(if settled { LOOK } else { SOON });
        }
    }

    fn home(&self) -> String {
        format!("/local/domain/{}", self.domain.domid())
    }

    /// One look at all devices; true if none is on its way.
    fn look(&mut self, in_order: bool) -> Result<bool, DeviceError> {
        let mut wanted = BTreeSet::new();
        for kind in [Kind::Vbd, Kind::Vif] {
            let ids = Frontend::list(&self.xs, self.domain.domid(), kind.word())?;
            wanted.extend(ids.into_iter().map(|id| Key { kind, id }));
        }
        let plugged = self.plugged()?;
        let mut settled = true;
        for key in &wanted {
            match self.bring(*key, plugged.contains(key)) {
                Ok(done) => {
                    settled &= done;
                    if done {
                        self.say_error(*key, None);
                    }
                }
                Err(DeviceError::Qmp(why @ (QmpError::Closed | QmpError::Garbage(_)))) => {
                    return Err(why.into());
                }
                Err(error) => {
                    settled = false;
                    self.say_error(*key, Some(error.to_string()));
                }
            }
            if in_order && !settled {
                return Ok(false);
            }
        }
        for key in plugged.difference(&wanted) {
            self.unplug(*key)?;
            settled = false;
        }
        settled &= self.usb.look(&self.domain.hv, &self.xs, self.machine.qmp())?;
        match self.resize.look(&self.xs, self.machine.qmp()) {
            // The guest may take its time.
            Ok(done) => settled &= done || !in_order,
            Err(LookError::Qmp(error @ QmpError::Refused { .. })) => {
                tracing::warn!(%error, "the machine cannot be made larger or smaller");
            }
            Err(e) => return Err(e.into()),
        }
        let known = self.chardevs()?;
        for key in known.iter().filter(|key| !plugged.contains(key) && !wanted.contains(key)) {
            self.take_away(*key)?;
        }
        Ok(settled)
    }

    /// The text in the device's error node, as Linux's frontends write theirs.
    fn say_error(&mut self, key: Key, why: Option<String>) {
        if self.errors.get(&key) == why.as_ref() {
            return;
        }
        let path = format!("{}/error/device/{}/{}/error", self.home(), key.kind.word(), key.id);
        match why {
            Some(why) => {
                tracing::warn!(device = key.name(), why, "not plugged in");
                let _best_effort = self.xs.write(&path, &why);
                self.errors.insert(key, why);
            }
            None => {
                self.errors.remove(&key);
                let _absent_is_fine = self.xs.rm(&path);
            }
        }
    }

    /// Devices that the machine has.
    fn plugged(&self) -> Result<BTreeSet<Key>, QmpError> {
        let list = self.machine.qmp().call("qom-list", json!({ "path": "/machine/peripheral" }))?;
        Ok(names(&list, "name").filter_map(Key::of).collect())
    }

    /// Sockets at which QEMU listens.
    fn chardevs(&self) -> Result<BTreeSet<Key>, QmpError> {
        let list = self.machine.qmp().call("query-chardev", json!({}))?;
        Ok(names(&list, "label").filter_map(|label| Key::of(label.strip_suffix("-c")?)).collect())
    }

    /// Brings one device a step further; true if it is where it belongs.
    fn bring(&mut self, key: Key, plugged: bool) -> Result<bool, DeviceError> {
        use XenbusState::{Closed, Closing, Connected, InitWait, Initialised, Initialising};
        let front = Frontend::open(&self.xs, self.domain.domid(), key.kind.word(), key.id)?;
        if self.watched.insert(front.backend.clone()) {
            self.watches.watch(&format!("{}/state", front.backend), "backend")?;
        }
        let (own, back) = (front.own_state()?, front.backend_state()?);
        match (own, back) {
            (Initialising, InitWait) => {
                if !self.chardevs()?.contains(&key) {
                    self.listen(key)?;
                }
                front.publish(&[("protocol", VHOST_USER.into())], Initialised)?;
                Ok(false)
            }
            (Initialised, Connected) => {
                if !plugged {
                    self.plug(key, &front)?;
                }
                front.publish(&[], Connected)?;
                Ok(true)
            }
            (Connected | Initialised, Closing | Closed) => {
                if plugged {
                    self.unplug(key)?;
                } else {
                    self.take_away(key)?;
                    front.publish(&[], Closed)?;
                    self.watched.remove(&front.backend);
                }
                Ok(false)
            }
            (Connected, Connected) if !plugged => {
                // The guest itself ejected it.
                self.take_away(key)?;
                front.publish(&[], Closing)?;
                Ok(false)
            }
            (Closing, Closing | Closed) => {
                front.publish(&[], Closed)?;
                Ok(true)
            }
            (Connected, _) | (Closed, _) => Ok(true),
            _ => Ok(false),
        }
    }

    /// Has QEMU listen for the device's backend, at a name inside its own network namespace. (Its vhost-user NICs refuse a listening
    /// socket that was handed over as a descriptor.)
    fn listen(&self, key: Key) -> Result<(), DeviceError> {
        let address = json!({ "path": key.name(), "abstract": true, "tight": true });
        let data = json!({ "addr": { "type": "unix", "data": address }, "server": true, "wait": false });
        self.machine.qmp().call(
            "chardev-add",
            json!({ "id": key.chardev(), "backend": { "type": "socket", "data": data } }),
        )?;
        Ok(())
    }

    fn plug(&self, key: Key, front: &Frontend) -> Result<(), DeviceError> {
        let qmp = self.machine.qmp();
        let mut device = match key.kind {
            Kind::Vbd => json!({
                "driver": "vhost-user-blk-pci",
                "id": key.name(),
                "chardev": key.chardev(),
                "bootindex": key.id,
            }),
            Kind::Vif => {
                let netdev = json!({ "type": "vhost-user", "id": key.netdev(), "chardev": key.chardev() });
                match qmp.call_with("netdev_add", netdev, None, PLUG) {
                    Ok(_) => {}
                    // From an attempt that ended half-way. There is no list of netdevs to look at.
                    Err(QmpError::Refused { text, .. }) if text.contains("uplicate") => {}
                    Err(e) => return Err(e.into()),
                }
                let mac = front.own_node("mac")?.unwrap_or_default();
                // Without "status": a backend that is away for a moment is no pulled cable.
                let mut device = json!({
                    "driver": "virtio-net-pci",
                    "id": key.name(),
                    "netdev": key.netdev(),
                    "mac": mac,
                    "status": false,
                    "romfile": "",
                });
                if self.machine.accel() == "tcg" {
                    // QEMU 7.2 leaves MSI-X of a vhost-user NIC to KVM's irqchip, also where there is no KVM, and ends by SIGSEGV when the
                    // guest unmasks a vector (virtio_pci_vector_unmask). With a line interrupt it does not.
                    device["vectors"] = 0.into();
                }
                device
            }
        };
        if let Some(place) = self.restore.as_ref().and_then(|r| r.place(&key.name())) {
            device["addr"] = place.into();
        } else if let Some(port) = free_port(qmp)? {
            device["bus"] = port.into();
        }
        qmp.call_with("device_add", device, None, PLUG)?;
        tracing::info!(device = key.name(), "plugged in");
        Ok(())
    }

    /// Asks the guest to let go; QEMU removes the device when it has.
    fn unplug(&self, key: Key) -> Result<(), DeviceError> {
        match self.machine.qmp().call("device_del", json!({ "id": key.name() })) {
            // Asked already.
            Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// What is behind a device that is gone.
    fn take_away(&self, key: Key) -> Result<(), DeviceError> {
        let qmp = self.machine.qmp();
        if key.kind == Kind::Vif {
            match qmp.call_with("netdev_del", json!({ "id": key.netdev() }), None, PATIENCE) {
                Ok(_) | Err(QmpError::Refused { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if self.chardevs()?.contains(&key) {
            qmp.call("chardev-remove", json!({ "id": key.chardev() }))?;
            tracing::info!(device = key.name(), "taken away");
        }
        Ok(())
    }
}

/// A port of a PCI Express machine that has no device; `None` if the machine is none.
pub(crate) fn free_port(qmp: &Qmp) -> Result<Option<String>, QmpError> {
    let list = qmp.call("qom-list", json!({ "path": "/machine/peripheral" }))?;
    let mut ports: BTreeSet<u32> = names(&list, "name").filter_map(port).collect();
    let count = ports.len();
    if count == 0 {
        return Ok(None);
    }
    // (query-pci does not know what is behind a port before the guest's firmware has numbered the buses.)
    for name in names(&list, "name").filter(|name| port(name).is_none()) {
        let at = json!({ "path": format!("/machine/peripheral/{name}"), "property": "parent_bus" });
        let bus = match qmp.call("qom-get", at) {
            Ok(bus) => bus,
            // Gone meanwhile, or on no bus.
            Err(QmpError::Refused { .. }) => continue,
            Err(e) => return Err(e),
        };
        if let Some(taken) = bus.as_str().and_then(|bus| bus.split('/').find_map(port)) {
            ports.remove(&taken);
        }
    }
    match ports.first() {
        Some(free) => Ok(Some(format!("{PORT}{free}"))),
        None => Err(QmpError::Refused {
            command: "device_add".into(),
            text: format!("all {count} ports of the machine are taken"),
        }),
    }
}

/// The number of a root port of this name.
fn port(name: &str) -> Option<u32> {
    name.strip_prefix(PORT)?.parse().ok()
}

fn names<'a>(list: &'a Value, field: &'a str) -> impl Iterator<Item = &'a str> {
    list.as_array().into_iter().flatten().filter_map(move |item| item[field].as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_known_by_their_names() {
        assert_eq!(port("port15"), Some(15));
        assert_eq!("/machine/peripheral/port3/port3".split('/').find_map(port), Some(3));
        for other in ["port", "portx", "vbd0", "", "peripheral"] {
            assert_eq!(port(other), None, "{other}");
        }
    }

    #[test]
    fn names_lead_back() {
        for key in [Key { kind: Kind::Vbd, id: 51712 }, Key { kind: Kind::Vif, id: 0 }] {
            assert_eq!(Key::of(&key.name()), Some(key));
        }
        for other in ["serial0", "vbd", "vbdx", "rng0", ""] {
            assert_eq!(Key::of(other), None, "{other}");
        }
    }
}

//! The xenbus driver: which devices there are, and what their frontends are told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use domain_kit::control::ServiceControl;
use domain_kit::xenbus::{BackendDriver, DeviceError, DeviceKey, DeviceNode, Properties, XenbusState};
use domain_kit::xs::XsOps;
use proto::service::Counter;
use xen_abi::io::blkif::{Abi, VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE, node};

use crate::device::connection::{Connection, MAX_PAGE_ORDER, MAX_QUEUES, RingRefs, journal_name};
use crate::device::{self, AttachError, Device, DeviceControl, Shared, Starting};
use crate::disk::attachment::Disk;
use crate::limit::Limits;
use crate::request::MAX_INDIRECT_SEGMENTS;
use crate::stats::{self, Stats};
use crate::vhost::{self, VhostDevice};

/// The disk of this process, or why there is none (yet).
pub struct DiskState(Mutex<Result<Arc<dyn Disk>, String>>);

impl DiskState {
    /// Not opened yet.
    pub fn new() -> Self {
        DiskState(Mutex::new(Err("disk is not open yet".into())))
    }

    /// What there is now.
    pub fn set(&self, state: Result<Arc<dyn Disk>, String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// The disk.
    ///
    /// # Errors
    /// Why there is none, in one line.
    pub fn get(&self) -> Result<Arc<dyn Disk>, String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Default for DiskState {
    fn default() -> Self {
        Self::new()
    }
}

/// What others than the driver know of a device.
#[derive(Clone, Debug)]
struct Registered {
    stats: Vec<Arc<Stats>>,
    control: DeviceControl,
    /// It shares the disk with other writers, as the toolstack said (`w!`).
    shared_writer: bool,
    read_only: bool,
}

impl Registered {
    fn stopped(&self) -> bool {
        self.stats.iter().any(|ring| ring.no_space.get() > 0)
    }
}

/// All devices, for statistics, drain and limits.
#[derive(Debug, Default)]
pub struct Registry {
    devices: Mutex<BTreeMap<DeviceKey, Registered>>,
    /// Limits that were asked for by gRPC and do not stand in the store yet.
    asked: Mutex<BTreeMap<DeviceKey, Limits>>,
}

/// Toolstack, in the backend's directory: the device's limits, see [`Limits`]. May change at any time.
const LIMITS: [&str; 4] = ["limit-iops", "limit-iops-burst", "limit-bytes", "limit-bytes-burst"];

/// Backend, in its own directory while requests wait for room on the medium: why, for toolstacks.
const STOPPED: &str = "stopped";

impl Registry {
    /// Devices whose requests wait for room on the medium.
    pub fn stopped(&self) -> Vec<DeviceKey> {
        let devices = self.lock();
        devices.iter().filter(|(_, device)| device.stopped()).map(|(key, _)| *key).collect()
    }

    fn add(&self, device: &Device, shared_writer: bool) {
        let registered = Registered {
            stats: device.stats(),
            control: device.control(),
            shared_writer,
            read_only: device.connection.read_only,
        };
        self.lock().insert(device.connection.key, registered);
    }

    fn add_vhost(&self, device: &VhostDevice, shared_writer: bool) {
        let read_only = device.wanted.read_only;
        let registered =
            Registered { stats: device.stats(), control: device.control(), shared_writer, read_only };
        self.lock().insert(device.wanted.key, registered);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<DeviceKey, Registered>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for limits of a device: the driver writes them to its nodes and follows them. False if there is no such device.
    pub fn ask_limits(&self, key: DeviceKey, limits: Limits) -> bool {
        let known = self.lock().contains_key(&key);
        if known {
            self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(key, limits);
        }
        known
    }

    fn asked(&self, key: DeviceKey) -> Option<Limits> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied()
    }

    /// They stand in the store; others may have been asked for meanwhile.
    fn written(&self, key: DeviceKey, limits: Limits) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.get(&key) == Some(&limits) {
            asked.remove(&key);
        }
    }
}

impl ServiceControl for Registry {
    fn statistics(&self) -> Vec<Counter> {
        let devices = self.lock();
        devices
            .iter()
            .flat_map(|(key, device)| {
                let subject = journal_name(*key, 0);
                stats::counters(&device.stats).into_iter().map(move |(name, value, unit)| Counter {
                    name,
                    value,
                    subject: subject.clone(),
                    unit: unit.into(),
                })
            })
            .collect()
    }

    fn drain(&self, deadline: Duration, resume: bool) -> bool {
        let deadline = Instant::now() + deadline;
        let devices: Vec<DeviceControl> = self.lock().values().map(|device| device.control.clone()).collect();
        devices.iter().for_each(|d| d.set_paused(!resume));
        resume || devices.iter().all(|d| d.drained(deadline))
    }
}

/// See [`BackendDriver`].
pub struct Vbd {
    shared: Shared,
    disk: Arc<DiskState>,
    registry: Arc<Registry>,
    /// Made, but not started before the frontend is told.
    starting: BTreeMap<DeviceKey, (Starting, Mode)>,
    read_only: bool,
}

/// A device from connecting on.
pub enum Served {
    /// By Xen's rings, once they are served.
    Rings(Option<Device>),
    /// By vhost-user.
    Vhost(VhostDevice),
}

impl Served {
    fn set_limits(&self, limits: Limits) -> bool {
        match self {
            Served::Rings(device) => device.as_ref().is_some_and(|device| device.set_limits(limits)),
            Served::Vhost(device) => device.set_limits(limits),
        }
    }
}

impl Vbd {
    /// Serves the one disk. `read_only`: to everyone.
    pub fn new(shared: Shared, disk: Arc<DiskState>, registry: Arc<Registry>, read_only: bool) -> Self {
        Vbd { shared, disk, registry, starting: BTreeMap::new(), read_only }
    }

    fn disk(&self) -> Result<Arc<dyn Disk>, DeviceError> {
        self.disk.get().map_err(DeviceError::NotReady)
    }

    fn mode(&self, node: &DeviceNode, disk: &dyn Disk) -> Result<Mode, DeviceError> {
        let text = node.back_node(node::MODE)?;
        let text = text.as_deref().map_or("w", str::trim);
        if self.read_only || disk.geometry().read_only || !text.starts_with('w') {
            return Ok(Mode::ReadOnly);
        }
        Ok(if text == "w!" { Mode::SharedWriter } else { Mode::Writer })
    }

    /// log2 of a ring's pages, as either scheme says it (blkif.h, note 3).
    fn page_order(node: &DeviceNode) -> Result<u32, DeviceError> {
        let order = match node.front_number::<u32>(node::RING_PAGE_ORDER)? {
            Some(order) => order,
            None => match node.front_number::<u32>(node::NUM_RING_PAGES)?.unwrap_or(1) {
                pages if pages.is_power_of_two() => pages.ilog2(),
                pages => {
                    return Err(DeviceError::Failed(format!(
                        "frontend's ring has {pages} pages, no power of two"
                    )));
                }
            },
        };
        if order > MAX_PAGE_ORDER {
            let most = 1 << MAX_PAGE_ORDER;
            return Err(DeviceError::Failed(format!(
                "frontend's ring has 2^{order} pages, more than were offered ({most})"
            )));
        }
        Ok(order)
    }

    fn ring_refs(node: &DeviceNode, prefix: &str, order: u32) -> Result<RingRefs, DeviceError> {
        let number = |name: String| -> Result<Option<u32>, DeviceError> { Ok(node.front_number(&name)?) };
        let missing =
            |what: &str| DeviceError::Failed(format!("frontend's {prefix}{what} is missing or no number"));
        let mut grefs = Vec::new();
        let sole = if order == 0 { number(format!("{prefix}{}", node::RING_REF))? } else { None };
        match sole {
            Some(gref) => grefs.push(gref),
            None => {
                for i in 0..1 << order {
                    let name = format!("{}{i}", node::RING_REF);
                    grefs.push(number(format!("{prefix}{name}"))?.ok_or_else(|| missing(&name))?);
                }
            }
        }
        let remote_port = number(format!("{prefix}{}", node::EVENT_CHANNEL))?;
        Ok(RingRefs { grefs, remote_port: remote_port.ok_or_else(|| missing(node::EVENT_CHANNEL))? })
    }

    fn connection(&self, node: &DeviceNode, disk: &dyn Disk) -> Result<Connection, DeviceError> {
        let protocol = node.front_node(node::PROTOCOL)?;
        let abi = match protocol.as_deref() {
            None => Abi::NATIVE,
            Some(name) => Abi::from_protocol(name.trim())
                .ok_or_else(|| DeviceError::Failed(format!("frontend's protocol {name:?} is not known")))?,
        };
        let order = Self::page_order(node)?;
        let queues = node.front_number::<u32>(node::MULTI_QUEUE_NUM_QUEUES)?.unwrap_or(1);
        if queues == 0 || queues > MAX_QUEUES {
            return Err(DeviceError::Failed(format!(
                "frontend has {queues} queues, and 1 to {MAX_QUEUES} were offered"
            )));
        }
        let rings = match queues {
            1 => vec![Self::ring_refs(node, "", order)?],
            _ => (0..queues)
                .map(|i| Self::ring_refs(node, &format!("queue-{i}/"), order))
                .collect::<Result<_, _>>()?,
        };
        let instance = device::instance(&self.shared.domain.hv, node.key.frontend)
            .map_err(|e| DeviceError::NotReady(e.to_string()))?
            .ok_or_else(|| DeviceError::NotReady(format!("there is no domain {}", node.key.frontend)))?;
        Ok(Connection {
            instance,
            key: node.key,
            rings,
            abi,
            persistent: node.front_number::<u32>(node::FEATURE_PERSISTENT)?.unwrap_or(0) != 0,
            read_only: self.mode(node, disk)? == Mode::ReadOnly,
        })
    }

    /// The device by vhost-user, if its frontend asks for that and the toolstack approved it.
    fn vhost(&self, node: &DeviceNode, disk: &Arc<dyn Disk>) -> Result<Option<VhostDevice>, DeviceError> {
        let Some(resource) = node.vhost_user()? else { return Ok(None) };
        let mode = self.mode(node, &**disk)?;
        self.sole_writer(node.key, mode)?;
        let instance = device::instance(&self.shared.domain.hv, node.key.frontend)
            .map_err(|e| DeviceError::NotReady(e.to_string()))?
            .ok_or_else(|| DeviceError::NotReady(format!("there is no domain {}", node.key.frontend)))?;
        let wanted = vhost::Wanted { key: node.key, instance, read_only: mode == Mode::ReadOnly, resource };
        let Shared { domain, no_space, .. } = &self.shared;
        let device =
            VhostDevice::serve(domain, disk, *no_space, wanted, Limits::default()).map_err(failed)?;
        self.registry.add_vhost(&device, mode == Mode::SharedWriter);
        Ok(Some(device))
    }

    /// A disk that is written belongs to one guest, unless all who write it were said to share it.
    fn sole_writer(&self, key: DeviceKey, mode: Mode) -> Result<(), DeviceError> {
        if mode == Mode::ReadOnly {
            return Ok(());
        }
        let devices = self.registry.lock();
        let other = devices.iter().find(|(other, device)| {
            let sharing = mode == Mode::SharedWriter && (device.shared_writer || device.read_only);
            other.frontend != key.frontend && !sharing
        });
        match other {
            Some((other, _)) => Err(DeviceError::NotReady(format!(
                "disk is attached to domain {} already and is writable; give it read-only, or another disk",
                other.frontend
            ))),
            None => Ok(()),
        }
    }
}

/// Who may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    ReadOnly,
    Writer,
    /// `w!`: together with others of its kind.
    SharedWriter,
}

fn failed(e: AttachError) -> DeviceError {
    DeviceError::Failed(e.to_string())
}

impl BackendDriver for Vbd {
    type Device = Served;
    const KIND: &'static str = "vbd";

    fn resume(&mut self) -> Vec<(DeviceKey, Served)> {
        let Ok(disk) = self.disk.get() else { return Vec::new() };
        let kept = device::kept(&self.shared.domain.hv).unwrap_or_else(|error| {
            tracing::error!(%error, "what a predecessor kept cannot be listed");
            Vec::new()
        });
        let mut served = Vec::new();
        for connection in kept {
            match Device::reattach(&self.shared, &disk, connection.key) {
                Ok(device) => {
                    let drain_ms = disk.fence().drain.as_millis() as u64;
                    tracing::info!(device = %connection.key, drain_ms, "served again");
                    self.registry.add(&device, false);
                    served.push((connection.key, Served::Rings(Some(device))));
                }
                // The store's turn will come to it again and say why.
                Err(error) => tracing::error!(device = %connection.key, %error, "cannot be served again"),
            }
        }
        let kept = vhost::kept(&self.shared.domain.hv).unwrap_or_else(|error| {
            tracing::error!(%error, "what a predecessor kept cannot be listed");
            Vec::new()
        });
        for (wanted, limits) in kept {
            let key = wanted.key;
            match VhostDevice::serve(&self.shared.domain, &disk, self.shared.no_space, wanted, limits) {
                Ok(device) => {
                    self.registry.add_vhost(&device, false);
                    served.push((key, Served::Vhost(device)));
                }
                Err(error) => tracing::error!(device = %key, %error, "cannot be served again"),
            }
        }
        served
    }

    fn offer(&mut self, node: &DeviceNode) -> Result<Properties, DeviceError> {
        let disk = self.disk()?;
        let mode = self.mode(node, &*disk)?;
        self.sole_writer(node.key, mode)?;
        let mut features = vec![
            // As Linux's hotplug scripts say it, which toolstacks wait for.
            (node::HOTPLUG_STATUS, "connected".into()),
            (node::FEATURE_FLUSH_CACHE, "1".into()),
            (node::FEATURE_BARRIER, "1".into()),
            (node::FEATURE_PERSISTENT, "1".into()),
            (node::MAX_RING_PAGE_ORDER, MAX_PAGE_ORDER.to_string()),
            (node::MAX_RING_PAGES, (1 << MAX_PAGE_ORDER).to_string()),
            (node::MULTI_QUEUE_MAX_QUEUES, MAX_QUEUES.to_string()),
            (node::FEATURE_MAX_INDIRECT_SEGMENTS, MAX_INDIRECT_SEGMENTS.to_string()),
        ];
        let wanted = node.back_number::<u32>(node::DISCARD_ENABLE)?.unwrap_or(1) != 0;
        match disk.geometry().discard.filter(|_| wanted && mode != Mode::ReadOnly) {
            Some(discard) => features.extend([
                (node::FEATURE_DISCARD, "1".into()),
                (node::DISCARD_GRANULARITY, discard.granularity.to_string()),
                (node::DISCARD_ALIGNMENT, discard.alignment.to_string()),
                (node::DISCARD_SECURE, u32::from(discard.secure).to_string()),
            ]),
            None => features.push((node::FEATURE_DISCARD, "0".into())),
        }
        Ok(features)
    }

    fn connect(&mut self, node: &DeviceNode, reattach: bool) -> Result<(Served, Properties), DeviceError> {
        let disk = self.disk()?;
        let mode = self.mode(node, &*disk)?;
        let vhost = self.vhost(node, &disk)?;
        if reattach {
            if let Some(device) = vhost {
                device.known();
                return Ok((Served::Vhost(device), Vec::new()));
            }
            let device = Device::reattach(&self.shared, &disk, node.key).map_err(failed)?;
            device.known();
            self.registry.add(&device, mode == Mode::SharedWriter);
            return Ok((Served::Rings(Some(device)), Vec::new()));
        }
        let geometry = disk.geometry();
        let mut info = if mode == Mode::ReadOnly { VDISK_READONLY } else { 0 };
        if node.back_node(node::DEVICE_TYPE)?.is_some_and(|kind| kind.trim() == "cdrom") {
            info |= VDISK_CDROM;
        }
        if node.back_number::<u32>(node::REMOVABLE)?.unwrap_or(0) != 0 {
            info |= VDISK_REMOVABLE;
        }
        let served = match vhost {
            Some(device) => Served::Vhost(device),
            None => {
                let connection = self.connection(node, &*disk)?;
                self.sole_writer(node.key, mode)?;
                let starting = Device::connect(&self.shared, &disk, connection).map_err(failed)?;
                self.starting.insert(node.key, (starting, mode));
                Served::Rings(None)
            }
        };
        Ok((
            served,
            vec![
                (node::SECTORS, geometry.sectors.to_string()),
                (node::SECTOR_SIZE, geometry.logical.to_string()),
                (node::PHYSICAL_SECTOR_SIZE, geometry.physical.to_string()),
                (node::INFO, info.to_string()),
            ],
        ))
    }

    fn connected(&mut self, node: &DeviceNode, served: &mut Served) {
        if let Served::Vhost(device) = served {
            device.known();
            return;
        }
        let Some((starting, mode)) = self.starting.remove(&node.key) else { return };
        match starting.start() {
            Ok(device) => {
                device.known();
                self.registry.add(&device, mode == Mode::SharedWriter);
                *served = Served::Rings(Some(device));
            }
            Err(error) => self.shared.handle.failed(node.key, error.to_string()),
        }
    }

    fn live(&mut self, node: &DeviceNode, served: &mut Served) -> Result<(), DeviceError> {
        if matches!(served, Served::Rings(None)) {
            return Ok(());
        }
        if let Some(asked) = self.registry.asked(node.key) {
            let Limits { iops, iops_burst, bytes, bytes_burst } = asked;
            node.xs.transaction(|tx| {
                for (name, value) in LIMITS.iter().zip([iops, iops_burst, bytes, bytes_burst]) {
                    tx.write(&format!("{}/{name}", node.back), value.to_string())?;
                }
                Ok(())
            })?;
            self.registry.written(node.key, asked);
        }
        let mut said = [0; 4];
        for (value, name) in said.iter_mut().zip(LIMITS) {
            *value = node.back_number(name)?.unwrap_or(0);
        }
        let [iops, iops_burst, bytes, bytes_burst] = said;
        let limits = Limits { iops, iops_burst, bytes, bytes_burst };
        if served.set_limits(limits) {
            tracing::info!(device = %node.key, ?limits, "limits");
        }
        let disk = self.disk()?;
        let shared_writer = self.mode(node, &*disk)? == Mode::SharedWriter;
        let mut stopped = false;
        if let Some(registered) = self.registry.lock().get_mut(&node.key) {
            registered.shared_writer = shared_writer;
            stopped = registered.stopped();
        }
        let path = format!("{}/{STOPPED}", node.back);
        match (stopped, node.back_node(STOPPED)?.is_some()) {
            (true, false) => {
                node.xs.write(&path, "the file system under the disk is full: its requests wait for room")?;
            }
            (false, true) => node.xs.rm(&path)?,
            _ => {}
        }
        let sectors = disk.geometry().sectors;
        if node.back_number::<u64>(node::SECTORS)?.is_some_and(|told| told != sectors) {
            tracing::info!(device = %node.key, sectors, "the disk has another size");
            // The state is written again for the frontend's watch: it then reads the size anew (Linux's blkfront does).
            node.xs.transaction(|tx| {
                tx.write(&format!("{}/{}", node.back, node::SECTORS), sectors.to_string())?;
                tx.write(&format!("{}/state", node.back), XenbusState::Connected.as_str())
            })?;
        }
        Ok(())
    }

    fn disconnect(&mut self, key: DeviceKey, served: Served) {
        self.registry.lock().remove(&key);
        let hv = &self.shared.domain.hv;
        match (served, self.starting.remove(&key)) {
            (Served::Vhost(device), _) => device.close(hv),
            (Served::Rings(Some(device)), _) => device.close(hv),
            (Served::Rings(None), Some((starting, _))) => starting.abandon(hv),
            (Served::Rings(None), None) => self.forget(key),
        }
    }

    fn forget(&mut self, key: DeviceKey) {
        let hv = &self.shared.domain.hv;
        for error in [device::forget(hv, key), vhost::forget(hv, key)].into_iter().filter_map(Result::err) {
            tracing::warn!(device = %key, %error, "forgetting");
        }
    }
}

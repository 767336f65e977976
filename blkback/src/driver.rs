//! The xenbus driver: which devices there are, and what their frontends are told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use domain_kit::control::ServiceControl;
use domain_kit::xenbus::{BackendDriver, DeviceError, DeviceKey, DeviceNode, Properties};
use proto::service::Counter;
use xen_abi::io::blkif::{Abi, VDISK_READONLY, node};

use crate::device::{self, AttachError, Connection, Device, DeviceControl, Shared, Starting};
use crate::disk::source::Source;
use crate::stats::Stats;

/// The disk of this process, or why there is none (yet).
#[derive(Debug)]
pub struct DiskState(Mutex<Result<Arc<Source>, String>>);

impl DiskState {
    /// Not opened yet.
    pub fn new() -> Self {
        DiskState(Mutex::new(Err("disk is not open yet".into())))
    }

    /// What there is now.
    pub fn set(&self, state: Result<Arc<Source>, String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// The disk.
    ///
    /// # Errors
    /// Why there is none, in one line.
    pub fn get(&self) -> Result<Arc<Source>, String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Default for DiskState {
    fn default() -> Self {
        Self::new()
    }
}

/// All devices, for statistics and drain.
#[derive(Debug, Default)]
pub struct Registry(Mutex<BTreeMap<DeviceKey, (Arc<Stats>, DeviceControl)>>);

impl Registry {
    fn add(&self, device: &Device) {
        self.lock().insert(device.connection.key, (device.stats.clone(), device.control()));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<DeviceKey, (Arc<Stats>, DeviceControl)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServiceControl for Registry {
    fn statistics(&self) -> Vec<Counter> {
        let devices = self.lock();
        devices
            .iter()
            .flat_map(|(key, (stats, _))| {
                stats.counters().map(|(name, value, unit)| Counter {
                    name: name.into(),
                    value,
                    subject: device::journal_name(*key),
                    unit: unit.into(),
                })
            })
            .collect()
    }

    fn drain(&self, deadline: Duration, resume: bool) -> bool {
        let deadline = Instant::now() + deadline;
        let devices: Vec<DeviceControl> = self.lock().values().map(|(_, control)| control.clone()).collect();
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
    starting: BTreeMap<DeviceKey, Starting>,
    read_only: bool,
}

/// A device from connecting on.
pub struct Served(Option<Device>);

impl Vbd {
    /// Serves the one disk. `read_only`: to everyone.
    pub fn new(shared: Shared, disk: Arc<DiskState>, registry: Arc<Registry>, read_only: bool) -> Self {
        Vbd { shared, disk, registry, starting: BTreeMap::new(), read_only }
    }

    fn source(&self) -> Result<Arc<Source>, DeviceError> {
        self.disk.get().map_err(DeviceError::NotReady)
    }

    fn read_only(&self, node: &DeviceNode, source: &Source) -> Result<bool, DeviceError> {
        let writable = node.back_node(node::MODE)?.is_none_or(|mode| mode.trim().starts_with('w'));
        Ok(self.read_only || source.shape.read_only || !writable)
    }

    fn connection(&self, node: &DeviceNode, source: &Source) -> Result<Connection, DeviceError> {
        let missing = |what: &str| DeviceError::Failed(format!("frontend's {what} is missing or no number"));
        let protocol = node.front_node(node::PROTOCOL)?;
        let abi = match protocol.as_deref() {
            None => Abi::NATIVE,
            Some(name) => Abi::from_protocol(name.trim())
                .ok_or_else(|| DeviceError::Failed(format!("frontend's protocol {name:?} is not known")))?,
        };
        if node.front_number::<u32>(node::RING_PAGE_ORDER)?.unwrap_or(0) != 0 {
            return Err(DeviceError::Failed("frontend's ring has more pages than were offered (1)".into()));
        }
        let ring_ref = match node.front_number(node::RING_REF)? {
            Some(gref) => gref,
            None => node.front_number("ring-ref0")?.ok_or_else(|| missing(node::RING_REF))?,
        };
        let instance = device::instance(&self.shared.domain.hv, node.key.frontend)
            .map_err(|e| DeviceError::NotReady(e.to_string()))?
            .ok_or_else(|| DeviceError::NotReady(format!("there is no domain {}", node.key.frontend)))?;
        Ok(Connection {
            instance,
            key: node.key,
            ring_ref,
            remote_port: node
                .front_number(node::EVENT_CHANNEL)?
                .ok_or_else(|| missing(node::EVENT_CHANNEL))?,
            abi,
            persistent: node.front_number::<u32>(node::FEATURE_PERSISTENT)?.unwrap_or(0) != 0,
            read_only: self.read_only(node, source)?,
        })
    }

    fn sole_writer(&self, key: DeviceKey) -> Result<(), DeviceError> {
        let devices = self.registry.lock();
        match devices.keys().find(|other| other.frontend != key.frontend) {
            Some(other) => Err(DeviceError::NotReady(format!(
                "disk is attached to domain {} already and is writable; give it read-only, or another disk",
                other.frontend
            ))),
            None => Ok(()),
        }
    }
}

fn failed(e: AttachError) -> DeviceError {
    DeviceError::Failed(e.to_string())
}

impl BackendDriver for Vbd {
    type Device = Served;
    const KIND: &'static str = "vbd";

    fn resume(&mut self) -> Vec<(DeviceKey, Served)> {
        let Ok(source) = self.disk.get() else { return Vec::new() };
        let kept = device::kept(&self.shared.domain.hv).unwrap_or_else(|error| {
            tracing::error!(%error, "what a predecessor kept cannot be listed");
            Vec::new()
        });
        let mut served = Vec::new();
        for connection in kept {
            match Device::reattach(&self.shared, &source, connection.key) {
                Ok(device) => {
                    tracing::info!(device = %connection.key, drain_ms = source.drain.as_millis() as u64, "served again");
                    self.registry.add(&device);
                    served.push((connection.key, Served(Some(device))));
                }
                // The store's turn will come to it again and say why.
                Err(error) => tracing::error!(device = %connection.key, %error, "cannot be served again"),
            }
        }
        served
    }

    fn offer(&mut self, node: &DeviceNode) -> Result<Properties, DeviceError> {
        let source = self.source()?;
        if !self.read_only(node, &source)? {
            self.sole_writer(node.key)?;
        }
        Ok(vec![
            (node::FEATURE_FLUSH_CACHE, "1".into()),
            (node::FEATURE_BARRIER, "1".into()),
            (node::FEATURE_PERSISTENT, "1".into()),
            (node::MAX_RING_PAGE_ORDER, "0".into()),
        ])
    }

    fn connect(&mut self, node: &DeviceNode, reattach: bool) -> Result<(Served, Properties), DeviceError> {
        let source = self.source()?;
        if reattach {
            let device = Device::reattach(&self.shared, &source, node.key).map_err(failed)?;
            device.known();
            self.registry.add(&device);
            return Ok((Served(Some(device)), Vec::new()));
        }
        let connection = self.connection(node, &source)?;
        if !connection.read_only {
            self.sole_writer(node.key)?;
        }
        let starting = Device::connect(&self.shared, &source, connection).map_err(failed)?;
        self.starting.insert(node.key, starting);
        let info = if connection.read_only { VDISK_READONLY } else { 0 };
        Ok((
            Served(None),
            vec![
                (node::SECTORS, source.shape.sectors.to_string()),
                (node::SECTOR_SIZE, "512".into()),
                (node::PHYSICAL_SECTOR_SIZE, "512".into()),
                (node::INFO, info.to_string()),
            ],
        ))
    }

    fn connected(&mut self, node: &DeviceNode, served: &mut Served) {
        let Some(starting) = self.starting.remove(&node.key) else { return };
        match starting.start() {
            Ok(device) => {
                device.known();
                self.registry.add(&device);
                served.0 = Some(device);
            }
            Err(error) => self.shared.handle.failed(node.key, error.to_string()),
        }
    }

    fn disconnect(&mut self, key: DeviceKey, served: Served) {
        self.registry.lock().remove(&key);
        let hv = &self.shared.domain.hv;
        match (served.0, self.starting.remove(&key)) {
            (Some(device), _) => device.close(hv),
            (None, Some(starting)) => starting.abandon(hv),
            (None, None) => self.forget(key),
        }
    }

    fn forget(&mut self, key: DeviceKey) {
        if let Err(error) = device::forget(&self.shared.domain.hv, key) {
            tracing::warn!(device = %key, %error, "forgetting");
        }
    }
}

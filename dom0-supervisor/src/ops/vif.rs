//! Network devices of a running guest: attach, detach, and a move to another driver domain.
//!
//! A move unplugs the device and plugs it in again, with the same Ethernet address and another number in the store, at another backend.
//! The guest's connections outlive that as they outlive a pulled cable, as soon as the guest gives the device its addresses again. It
//! works also when the old driver domain is gone for good, and leaves other guests alone. For users the vif keeps its number.

use super::create::{conflicts, no_guest};
use super::{Change, Step, nothing, of_guest};
use crate::config::{DomainFile, Name, VifEntry};
use crate::manager::{Manager, OpError};
use crate::state::{Guest, Phase, RunningDomain, Saga, SagaKind, VifChange, guest_uuid_text, service_uuid};
use crate::xs_layout::{self, DevicePaths, XenbusState};

/// Most network devices of a guest.
const MOST: usize = 64;

fn no_vif(guest: &str, id: u32) -> OpError {
    OpError::NotFound(format!("guest {guest} has no vif {id}; see bh network-list {guest}"))
}

impl Manager {
    fn check_backend(&self, backend: &Name) -> Result<(), OpError> {
        match self.host().netback(backend.as_str()) {
            Some(_) => Ok(()),
            None => Err(OpError::NotFound(format!("no [[netback]] {backend} in the host file; add it"))),
        }
    }

    /// Gives a running guest a network device; its number.
    ///
    /// # Errors
    /// One line each; what was begun was undone.
    pub fn attach_vif(&self, guest: &str, mut entry: VifEntry) -> Result<u32, OpError> {
        self.check_backend(&entry.backend)?;
        let host = self.host();
        let (id, number, name) = {
            let mut inner = self.inner();
            let (name, record) = inner.state.find(guest).ok_or_else(|| no_guest(guest))?;
            let (name, mut probe) = (name.clone(), record.clone());
            let at = format!("guest {name}");
            self.may_change_devices(&inner.state, &name, &probe).map_err(|e| e.at(&at))?;
            if probe.config.vif.len() >= MOST {
                return Err(OpError::Failed(format!("{at}: it has {MOST} vifs, which is the most")));
            }
            let taken: Vec<u32> = (0..probe.config.vif.len()).map(|i| probe.vif_id(i)).collect();
            let number = match entry.devid {
                Some(number) if taken.contains(&number) => {
                    return Err(OpError::Exists(format!("{at}: it has a vif {number} already")));
                }
                Some(number) => number,
                None => (0..).find(|n| !taken.contains(n)).unwrap_or(0),
            };
            entry.devid = Some(number);
            entry.mac = Some(entry.mac.unwrap_or_else(|| crate::config::Mac::generated(&probe.uuid, number)));
            // As a guest of its own with this vif alone, beside all others, this one included.
            let (disk, usbdev) = (Vec::new(), Vec::new());
            probe.config = DomainFile { disk, vif: vec![entry.clone()], usbdev, ..probe.config };
            probe.config.check().map_err(OpError::Invalid)?;
            probe.config.name =
                "new-vif".parse().map_err(|e: crate::config::ConfigError| OpError::Invalid(e.0))?;
            probe.uuid = uuid::Uuid::nil();
            conflicts(&inner.state, &host, &probe).map_err(|e| e.at(&at))?;
            let change = VifChange { id: number, backend: entry.backend.clone(), former: None, force: false };
            let id = inner.change(|state| {
                if let Some(guest) = state.guests.get_mut(&name) {
                    guest.config.vif.push(entry);
                    guest.vif_backends.push(None);
                    guest.renumber_vif(number, Some(number));
                }
                state.begin_vif(&name, SagaKind::AttachVif, change)
            })?;
            inner.active.insert(id);
            (id, number, name)
        };
        self.run_claimed(id).map_err(|e| e.at(&format!("guest {name}")))?;
        Ok(number)
    }

    /// Takes a network device from a running guest. Without `force` it waits for the guest to let go, and leaves it if it does not.
    ///
    /// # Errors
    /// One line each.
    pub fn detach_vif(&self, guest: &str, id: u32, force: bool) -> Result<(), OpError> {
        self.change_vif(guest, id, SagaKind::DetachVif, |vif| {
            Ok(VifChange { id, backend: vif.backend.clone(), former: None, force })
        })
    }

    /// Moves a network device of a running guest to another driver domain.
    ///
    /// # Errors
    /// One line each; if the new driver domain does not take it up, the device is at the old one again.
    pub fn move_vif(&self, guest: &str, id: u32, backend: Name) -> Result<(), OpError> {
        self.check_backend(&backend)?;
        self.change_vif(guest, id, SagaKind::MoveVif, |vif| {
            if vif.backend == backend {
                return Err(OpError::Exists(format!("it is at {backend} already")));
            }
            Ok(VifChange { id, backend, former: Some(vif.backend.clone()), force: true })
        })
    }

    /// Pulls the cable of a network device of a running guest, or plugs it in again.
    ///
    /// # Errors
    /// One line each.
    pub fn link_vif(&self, guest: &str, id: u32, up: bool) -> Result<(), OpError> {
        let mut inner = self.inner();
        let (name, record) = inner.state.find(guest).ok_or_else(|| no_guest(guest))?;
        let (name, mut record) = (name.clone(), record.clone());
        let at = format!("guest {name}: vif {id}");
        self.may_change_devices(&inner.state, &name, &record).map_err(|e| e.at(&at))?;
        let index = record.vif_index(id).ok_or_else(|| no_vif(&name, id))?;
        record.config.vif[index].link = up;
        inner.change(|state| {
            if let Some(guest) = state.guests.get_mut(&name) {
                guest.config = record.config.clone();
            }
        })?;
        drop(inner);
        if let (Some(device), Some(domain)) = (device_of(&record, id), record.domain) {
            self.store
                .apply(&xs_layout::link_nodes(&device, domain.domid, up))
                .map_err(|e| OpError::from(e).at(&at))?;
        }
        Ok(())
    }

    /// The guest's domid, the number in the store of a network device of it, and the socket of the driver domain that serves that.
    ///
    /// # Errors
    /// One line each.
    pub fn vif_socket(&self, guest: &str, id: u32) -> Result<(u16, u32, String), OpError> {
        let (name, record) = {
            let state = self.state();
            let (name, record) = state.find(guest).ok_or_else(|| no_guest(guest))?;
            (name.clone(), record.clone())
        };
        let index = record.vif_index(id).ok_or_else(|| no_vif(&name, id))?;
        let at = format!("guest {name}: vif {id}");
        let domain = record.domain.ok_or_else(|| OpError::Failed("it does not run".into()).at(&at))?;
        let backend = &record.config.vif[index].backend;
        let away =
            || OpError::Unavailable(format!("netback {backend} does not run at the moment; see bh services"));
        let device = device_of(&record, id).ok_or_else(away)?;
        let found = self.hv.list()?.into_iter().find(|d| d.domid == u32::from(device.backend_domid));
        let found = found.filter(|d| d.host_pid != 0).ok_or_else(away)?;
        Ok((domain.domid, device.id, found.control_socket))
    }

    fn change_vif(
        &self,
        guest: &str,
        id: u32,
        kind: SagaKind,
        change: impl FnOnce(&VifEntry) -> Result<VifChange, OpError>,
    ) -> Result<(), OpError> {
        let (name, saga) = {
            let mut inner = self.inner();
            let (name, record) = inner.state.find(guest).ok_or_else(|| no_guest(guest))?;
            let at = format!("guest {name}: vif {id}");
            self.may_change_devices(&inner.state, name, record).map_err(|e| e.at(&at))?;
            let index = record.vif_index(id).ok_or_else(|| no_vif(name, id))?;
            let change = change(&record.config.vif[index]).map_err(|e| e.at(&at))?;
            let name = name.clone();
            let saga = inner.change(|state| state.begin_vif(&name, kind, change))?;
            inner.active.insert(saga);
            (name, saga)
        };
        self.run_claimed(saga).map_err(|e| e.at(&format!("guest {name}: vif {id}")))
    }

    pub(super) fn vif_step(&self, step: Step, guest: &Guest, saga: &Saga) -> Result<Change, OpError> {
        let Some(change) = &saga.vif else { return Ok(nothing()) };
        let Some(index) = guest.vif_index(change.id) else { return Ok(nothing()) };
        let device = device_of(guest, change.id);
        match step {
            Step::VifBackend => self.vif_backend(guest, index),
            Step::VifNodes => {
                if let (Some(device), Some(domain)) = (device, guest.domain)
                    && self.store.read(&format!("{}/frontend-id", device.back))?.is_none()
                {
                    self.open_vhost(guest, &device)?;
                    let nodes = xs_layout::nodes_of_one(guest, domain.domid, "vif", device.id);
                    self.store.apply(&nodes)?;
                }
                Ok(nothing())
            }
            Step::VifReady => {
                // On the way back nobody is left to be told.
                if let Some(device) = device.filter(|_| saga.phase == Phase::Do) {
                    self.taken_up(&device)?;
                }
                Ok(nothing())
            }
            Step::VifUnplug => {
                if let Some(device) = device {
                    let force = change.force || saga.phase == Phase::Undo;
                    self.let_go(&device, force, "the guest does not let go of it; --force takes it")?;
                }
                Ok(nothing())
            }
            Step::VifReplug => {
                if let Some(device) = device {
                    self.replug(&device)?;
                }
                Ok(nothing())
            }
            Step::VifRemoveNodes => {
                if let Some(device) = device {
                    self.close_vhost(guest, &device)?;
                    self.store.apply(&xs_layout::remove_both_ends(guest, &device))?;
                }
                Ok(nothing())
            }
            Step::VifSwitch => {
                let to = match (saga.phase, &change.former) {
                    (Phase::Undo, Some(former)) => former.clone(),
                    _ => change.backend.clone(),
                };
                let mut moved = guest.clone();
                moved.config.vif[index].backend = to.clone();
                let backend = match self.vif_domain(&moved, index) {
                    Ok(backend) => Some(backend),
                    // It may be gone for good: the device waits for it.
                    Err(_) if saga.phase == Phase::Undo => None,
                    Err(e) => return Err(e),
                };
                let id = change.id;
                Ok(of_guest(move |guest| {
                    guest.config.vif[index].backend = to;
                    guest.vif_backends[index] = backend;
                    guest.vif_gone = Some(guest.vif_device(index));
                    guest.renumber_vif(id, None);
                }))
            }
            Step::VifForget => {
                let id = change.id;
                Ok(of_guest(move |guest| {
                    // What is left keeps its numbers.
                    for index in 0..guest.config.vif.len() {
                        guest.config.vif[index].devid = Some(guest.vif_id(index));
                    }
                    if let Some(index) = guest.vif_index(id) {
                        guest.vif_gone = Some(guest.vif_device(index));
                        guest.vif_devices.remove(&id);
                        guest.config.vif.remove(index);
                        if index < guest.vif_backends.len() {
                            guest.vif_backends.remove(index);
                        }
                    }
                }))
            }
            _ => Ok(nothing()),
        }
    }

    fn vif_domain(&self, guest: &Guest, index: usize) -> Result<u16, OpError> {
        let name = guest.config.vif[index].backend.as_str();
        let at = format!("vif {}", guest.vif_id(index));
        let domain: RunningDomain = self.service_domain(name).map_err(|e| e.at(&at))?;
        self.make_home(domain, name, &guest_uuid_text(&service_uuid(name)))?;
        Ok(domain.domid)
    }

    fn vif_backend(&self, guest: &Guest, index: usize) -> Result<Change, OpError> {
        let domid = self.vif_domain(guest, index)?;
        Ok(of_guest(move |guest| {
            if let Some(slot) = guest.vif_backends.get_mut(index) {
                *slot = Some(domid);
            }
        }))
    }

    fn replug(&self, device: &DevicePaths) -> Result<(), OpError> {
        let state = self.store.read(&format!("{}/state", device.back))?;
        if XenbusState::parse(state.as_deref()) == XenbusState::Closing {
            self.store.apply(&xs_layout::unplug_device(device, true))?;
        }
        Ok(())
    }
}

fn device_of(guest: &Guest, id: u32) -> Option<DevicePaths> {
    let number = guest.vif_device(guest.vif_index(id)?);
    xs_layout::device_paths(guest).into_iter().find(|device| device.kind == "vif" && device.id == number)
}

//! USB devices of a running QEMU guest: attach, detach, list. dom0 approves a disk's file and writes the device's node; the guest's qemu-bridge
//! has QEMU follow, and says in a node of its own how that went.

use std::time::Instant;

use proto::hvcore::resource::Kind;
use proto::hvcore::{DomainState, Resource};

use super::create::no_guest;
use super::in_use::free;
use super::{Change, Step, nothing, of_guest};
use crate::config::{AccessMode, DomainFile, GuestType, MOST_USB, UsbEntry, UsbKind};
use crate::hv::{HvError, find_instance};
use crate::manager::{Manager, OpError, one_line};
use crate::state::{Guest, Phase, Saga, SagaKind};
use crate::store::Change as StoreChange;
use crate::xs_layout;

/// What qemu-bridge says of a device that is there.
const PLUGGED: &str = "plugged";

/// The approved resource of a disk.
pub fn resource(entry: &UsbEntry) -> Option<Resource> {
    let path = entry.disk()?.display().to_string();
    let kind = if entry.mode == AccessMode::ReadOnly { Kind::FileRo } else { Kind::FileRw };
    Some(Resource { name: entry.resource(), kind: kind.into(), path, mode: 0 })
}

fn label(entry: &UsbEntry) -> String {
    let what = if entry.kind == UsbKind::Qdisk { "disk" } else { "usbdev" };
    format!("{what} {}", entry.id)
}

impl Manager {
    /// Gives a running QEMU guest a USB device.
    ///
    /// # Errors
    /// One line each; what was begun was undone.
    pub fn attach_usb(&self, guest: &str, entry: UsbEntry) -> Result<(), OpError> {
        if let Some(path) = entry.disk().filter(|_| self.sees_host) {
            crate::config::check_disk(&label(&entry), path, entry.mode != AccessMode::ReadOnly)
                .map_err(|e| OpError::Invalid(e.0))?;
        }
        let (saga, at) = {
            let host = self.host();
            let mut inner = self.inner();
            let (name, record) = inner.state.find(guest).ok_or_else(|| no_guest(guest))?;
            let at = format!("guest {name}: {}", label(&entry));
            let say = |e: OpError| e.at(&at);
            may_have(record, &entry).map_err(say)?;
            self.may_change_devices(&inner.state, name, record).map_err(say)?;
            let disks = record.config.disk.iter().filter(|_| entry.kind == UsbKind::Qdisk);
            if record.config.usbdev.iter().any(|e| e.id == entry.id)
                || disks.map(|disk| disk.vdev.name()).any(|vdev| vdev == entry.id)
            {
                return Err(OpError::Exists(format!("{at} is there already; give another id")));
            }
            if record.config.usbdev.len() >= MOST_USB {
                return Err(OpError::Failed(format!(
                    "guest {name} has {MOST_USB} USB devices, which is the most"
                )));
            }
            if let Some(path) = entry.disk() {
                free(&inner.state, &host, path, entry.mode != AccessMode::ReadOnly).map_err(say)?;
            }
            let name = name.clone();
            let saga = inner.change(|state| {
                if let Some(guest) = state.guests.get_mut(&name) {
                    guest.config.usbdev.push(entry.clone());
                }
                state.begin_usb(&name, SagaKind::AttachUsb, entry)
            })?;
            inner.active.insert(saga);
            (saga, at)
        };
        self.run_claimed(saga).map_err(|e| e.at(&at))
    }

    /// Takes a USB device from a running guest.
    ///
    /// # Errors
    /// One line each.
    pub fn detach_usb(&self, guest: &str, id: &str) -> Result<(), OpError> {
        let (saga, at) = {
            let mut inner = self.inner();
            let (name, record) = inner.state.find(guest).ok_or_else(|| no_guest(guest))?;
            let at = format!("guest {name}: usbdev {id}");
            self.may_change_devices(&inner.state, name, record).map_err(|e| e.at(&at))?;
            let entry = record.config.usbdev.iter().find(|e| e.id == id).cloned();
            let entry = entry.ok_or_else(|| {
                OpError::NotFound(format!("guest {name} has no USB device {id}; see bh usb-list {name}"))
            })?;
            let name = name.clone();
            let saga = inner.change(|state| state.begin_usb(&name, SagaKind::DetachUsb, entry))?;
            inner.active.insert(saga);
            (saga, at)
        };
        self.run_claimed(saga).map_err(|e| e.at(&at))
    }

    /// A guest's USB devices, each with what qemu-bridge says of it.
    ///
    /// # Errors
    /// One line each.
    pub fn usb(&self, guest: &str) -> Result<Vec<(UsbEntry, String)>, OpError> {
        let record = {
            let state = self.state();
            state.find(guest).ok_or_else(|| no_guest(guest))?.1.clone()
        };
        let mut out = Vec::new();
        for entry in &record.config.usbdev {
            let said = match record.domain {
                Some(domain) => self.store.read(&xs_layout::usb_said(domain.domid, &entry.id))?,
                None => None,
            };
            out.push((entry.clone(), one_line(said.as_deref().unwrap_or("not plugged in yet"))));
        }
        Ok(out)
    }

    pub(super) fn usb_step(&self, step: Step, guest: &Guest, saga: &Saga) -> Result<Change, OpError> {
        let Some(entry) = &saga.usb else { return Ok(nothing()) };
        match step {
            Step::UsbNodes => {
                if let Some(domain) = guest.domain {
                    if let Some(resource) = resource(entry) {
                        self.hv.approve(domain.domid, domain.instance, vec![resource], Vec::new())?;
                    }
                    self.store.apply(&xs_layout::usb_nodes(domain.domid, std::slice::from_ref(entry)))?;
                }
                Ok(nothing())
            }
            Step::UsbReady => {
                if saga.phase == Phase::Do {
                    self.usb_plugged(guest, entry)?;
                }
                Ok(nothing())
            }
            Step::UsbUnplug => {
                self.usb_unplug(guest, entry, saga.phase == Phase::Undo)?;
                Ok(nothing())
            }
            Step::UsbForget => {
                if let (Some(domain), Some(resource)) = (guest.domain, resource(entry)) {
                    match self.hv.approve(domain.domid, domain.instance, Vec::new(), vec![resource.name]) {
                        Ok(()) | Err(HvError::NotFound) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                let id = entry.id.clone();
                Ok(of_guest(move |guest| guest.config.usbdev.retain(|e| e.id != id)))
            }
            _ => Ok(nothing()),
        }
    }

    fn usb_plugged(&self, guest: &Guest, entry: &UsbEntry) -> Result<(), OpError> {
        let Some(domain) = guest.domain else { return Ok(()) };
        let path = xs_layout::usb_said(domain.domid, &entry.id);
        let began = Instant::now();
        loop {
            match self.store.read(&path)?.as_deref() {
                Some(PLUGGED) => return Ok(()),
                Some(why) => {
                    let why = one_line(why);
                    return Err(OpError::Failed(why.strip_prefix("error: ").unwrap_or(&why).to_owned()));
                }
                None => {}
            }
            self.still_runs(guest)?;
            if began.elapsed() > self.timing.ready {
                return Err(OpError::Failed(format!(
                    "QEMU did not take it up within {} s",
                    self.timing.ready.as_secs()
                )));
            }
            std::thread::sleep(self.timing.poll);
        }
    }

    fn usb_unplug(&self, guest: &Guest, entry: &UsbEntry, force: bool) -> Result<(), OpError> {
        let Some(domain) = guest.domain else { return Ok(()) };
        let remove = StoreChange::Remove { path: xs_layout::usb_wanted(domain.domid, &entry.id) };
        self.store.apply(&[remove])?;
        let path = xs_layout::usb_said(domain.domid, &entry.id);
        let began = Instant::now();
        while self.store.read(&path)?.is_some() && self.still_runs(guest).is_ok() {
            let patience = if force { self.timing.close } else { self.timing.ready };
            if began.elapsed() > patience {
                return if force {
                    Ok(())
                } else {
                    Err(OpError::Failed("QEMU does not let go of it; see bh list".into()))
                };
            }
            std::thread::sleep(self.timing.poll);
        }
        Ok(())
    }

    fn still_runs(&self, guest: &Guest) -> Result<(), OpError> {
        let found = match guest.domain {
            Some(domain) => find_instance(&*self.hv, domain.domid, domain.instance)?,
            None => None,
        };
        match found.map(|d| d.state()) {
            Some(DomainState::Running | DomainState::Restarting) => Ok(()),
            _ => Err(OpError::Failed("the guest ended meanwhile".into())),
        }
    }
}

/// A QEMU guest, and with a controller if the device needs that.
fn may_have(guest: &Guest, entry: &UsbEntry) -> Result<(), OpError> {
    let DomainFile { guest_type, usb, .. } = &guest.config;
    let why = match entry.kind {
        UsbKind::Qdisk if *guest_type != GuestType::Qemu => {
            "only guests of type \"qemu\" can have it; leave backendtype=qdisk out"
        }
        UsbKind::Qdisk => return Ok(()),
        _ if *guest_type != GuestType::Qemu || !usb => {
            "it has no USB; say usb = true in the domain file of a QEMU guest"
        }
        _ => return Ok(()),
    };
    Err(OpError::Failed(why.into()))
}

//! Steps that take something away. Each can be carried out again, and when there is nothing to take away.

use std::time::Instant;

use proto::hvcore::DomainState;

use super::{Change, nothing, of_guest};
use crate::hv::{HvError, find_by_uuid};
use crate::manager::{Manager, OpError};
use crate::state::{Guest, OwnDisk, RunningDomain, guest_uuid_text, private_backend_uuid};
use crate::store::Change as StoreChange;
use crate::xs_layout::{self, XenbusState};

impl Manager {
    /// Has hv-core take the guest's domain down. It may still be dying afterwards, until backends let go.
    pub(super) fn undo_domain(&self, guest: &Guest) -> Result<Change, OpError> {
        self.end_emulator(guest)?;
        // By uuid: a domain that was made just before a kill is in no record.
        if let Some(domain) = find_by_uuid(&*self.hv, &guest_uuid_text(&guest.uuid))?
            && domain.state() != DomainState::Dying
        {
            let running = super::steps_do::numbers(&domain)?;
            match self.hv.destroy(running.domid, running.instance) {
                Ok(()) | Err(HvError::NotFound) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(nothing())
    }

    /// Asks the backends to let go of the devices and gives each a little time: a backend that hangs delays, it does not hinder.
    pub(super) fn undo_devices(&self, guest: &Guest) -> Result<Change, OpError> {
        let devices = xs_layout::device_paths(guest);
        let changes: Vec<StoreChange> = devices.iter().flat_map(xs_layout::close_device).collect();
        let reused = guest.domain.is_some_and(|running| self.reused(running).unwrap_or(true));
        if changes.is_empty() || reused {
            return Ok(nothing());
        }
        self.store.apply(&changes)?;
        let deadline = Instant::now() + self.timing.close;
        for device in &devices {
            loop {
                let state = self.store.read(&format!("{}/state", device.back))?;
                let closed = state.is_none() || XenbusState::parse(state.as_deref()) == XenbusState::Closed;
                if closed || Instant::now() > deadline {
                    break;
                }
                std::thread::sleep(self.timing.poll);
            }
        }
        Ok(nothing())
    }

    /// Removes the nodes of the guest and of its devices at their backends.
    pub(super) fn undo_nodes(&self, guest: &Guest) -> Result<Change, OpError> {
        for device in xs_layout::device_paths(guest) {
            self.close_vhost(guest, &device)?;
        }
        if let Some(running) = guest.domain {
            let mut changes: Vec<StoreChange> =
                xs_layout::device_paths(guest).iter().flat_map(xs_layout::remove_device).collect();
            if !self.reused(running)? {
                changes.extend(xs_layout::remove_guest_nodes(guest, running.domid));
            }
            self.store.apply(&changes)?;
        }
        Ok(of_guest(|guest| {
            guest.domain = None;
            // The next one knows nothing of what was moved.
            guest.vif_devices.clear();
            guest.vif_gone = None;
        }))
    }

    /// Ends the guest's own driver domains.
    pub(super) fn undo_backends(&self, guest: &Guest) -> Result<Change, OpError> {
        for (index, disk) in guest.config.disk.iter().enumerate() {
            if !disk.has_own_backend() {
                continue;
            }
            let uuid = guest_uuid_text(&private_backend_uuid(&guest.uuid, disk.vdev.name()));
            let recorded = guest.disk_backends.get(index).cloned().flatten();
            let mut homes: Vec<RunningDomain> = recorded
                .filter(|own: &OwnDisk| own.private)
                .map(|own| RunningDomain { domid: own.domid, instance: own.instance })
                .into_iter()
                .collect();
            if let Some(domain) = find_by_uuid(&*self.hv, &uuid)? {
                let running = super::steps_do::numbers(&domain)?;
                if domain.state() != DomainState::Dying {
                    match self.hv.destroy(running.domid, running.instance) {
                        Ok(()) | Err(HvError::NotFound) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                if !homes.contains(&running) {
                    homes.push(running);
                }
            }
            for home in homes {
                if !self.reused(home)? {
                    self.store.apply(&xs_layout::remove_service_nodes(home.domid))?;
                }
                self.known().homes.remove(&(home.domid, home.instance));
            }
        }
        Ok(of_guest(|guest| {
            for (own, disk) in guest.disk_backends.iter_mut().zip(&guest.config.disk) {
                if disk.has_own_backend() {
                    *own = None;
                }
            }
        }))
    }

    /// Another domain has the number by now: its nodes are not ours to remove.
    fn reused(&self, running: RunningDomain) -> Result<bool, OpError> {
        let all = self.hv.list()?;
        Ok(all.iter().any(|d| d.domid == u32::from(running.domid) && d.instance != running.instance))
    }

    /// Waits until hv-core has nothing left of the guest's domain and of its own backends.
    pub(super) fn await_gone(&self, guest: &Guest) -> Result<Change, OpError> {
        let uuids =
            [guest.uuid, crate::specs_qemu::emulator_uuid(&guest.uuid)].map(|uuid| guest_uuid_text(&uuid));
        let deadline = Instant::now() + self.timing.gone;
        loop {
            let all = self.hv.list()?;
            let left = all.into_iter().find(|d| uuids.iter().any(|uuid| d.uuid.eq_ignore_ascii_case(uuid)));
            let Some(domain) = left else { return Ok(nothing()) };
            if Instant::now() > deadline {
                return Err(OpError::Timeout(format!(
                    "domain {} is still dying: {} of its pages are mapped by others; it is tried again",
                    domain.domid, domain.mapped_pages
                )));
            }
            std::thread::sleep(self.timing.poll);
        }
    }
}

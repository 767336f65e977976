//! What operations on QEMU guests have beside the others': a second domain, and sockets that are approved for a device's backend.

use std::time::Duration;

use proto::hvcore::resource::Kind;
use proto::hvcore::{Domain, DomainState, Resource};

use super::steps_do::numbers;
use crate::config::GuestType;
use crate::hv::{HvError, find_by_uuid, find_instance};
use crate::manager::{Manager, OpError};
use crate::specs_qemu as specs;
use crate::state::{Guest, guest_uuid_text};
use crate::xs_layout::{self, DevicePaths};

/// The file that a guest is saved into, while it is.
const SAVE: &str = "save";

impl Manager {
    fn emulator(&self, guest: &Guest) -> Result<Option<Domain>, OpError> {
        Ok(find_by_uuid(&*self.hv, &guest_uuid_text(&specs::emulator_uuid(&guest.uuid)))?)
    }

    /// The qemu-bridge of a guest that runs.
    ///
    /// # Errors
    /// One line each.
    pub(crate) fn bridge(&self, guest: &str) -> Result<(String, Domain), OpError> {
        let state = self.state();
        let (name, record) = state.find(guest).ok_or_else(|| super::no_guest(guest))?;
        if record.config.guest_type != GuestType::Qemu {
            return Err(OpError::Failed(format!("guest {name}: only guests of type \"qemu\" can do that")));
        }
        let found = match record.domain {
            Some(own) => find_instance(&*self.hv, own.domid, own.instance)?,
            None => None,
        };
        let found = found.filter(|d| matches!(d.state(), DomainState::Running | DomainState::Restarting));
        found
            .map(|d| (name.clone(), d))
            .ok_or_else(|| OpError::Failed(format!("guest {name}: it does not run")))
    }

    /// Stops a QEMU guest's processors, or lets them go on; QEMU's word for its state.
    ///
    /// # Errors
    /// One line each.
    pub fn pause_guest(&self, guest: &str, pause: bool) -> Result<String, OpError> {
        let (name, bridge) = self.bridge(guest)?;
        let status = self.hv.qemu(&bridge.control_socket, Some(pause));
        status.map(|s| s.state).map_err(|e| OpError::from(e).at(&format!("guest {name}")))
    }

    /// Resets a QEMU guest in place; QEMU's word for its state.
    ///
    /// # Errors
    /// One line each.
    pub fn reset_guest(&self, guest: &str) -> Result<String, OpError> {
        let (name, bridge) = self.bridge(guest)?;
        let status = self.hv.qemu_reset(&bridge.control_socket);
        self.events.tell("operation", &name, bridge.domid as u16, "reset".to_owned());
        status.map(|s| s.state).map_err(|e| OpError::from(e).at(&format!("guest {name}")))
    }

    /// Stops a QEMU guest and writes it into an empty file; it stays stopped. Bytes, and how long it took.
    ///
    /// # Errors
    /// One line each; the guest goes on.
    pub fn save_guest(&self, guest: &str, path: &str) -> Result<(u64, Duration), OpError> {
        let (name, bridge) = self.bridge(guest)?;
        let at = |e: OpError| e.at(&format!("guest {name}"));
        let state = self.state();
        if state.saga_of(&name).is_some() {
            return Err(at(OpError::Busy("another operation is under way; see bh list".into())));
        }
        let (_, record) = state.find(&name).ok_or_else(|| super::no_guest(guest))?;
        let mut config = record.config.clone();
        config.uuid = Some(record.uuid);
        let description = serde_json::to_string(&config)
            .map_err(|e| at(OpError::Failed(format!("its configuration: {e}"))))?;
        let running = numbers(&bridge)?;
        let file = Resource { name: SAVE.into(), kind: Kind::FileRw.into(), path: path.to_owned(), mode: 0 };
        self.hv.approve(running.domid, running.instance, vec![file], Vec::new()).map_err(|e| at(e.into()))?;
        let saved = self.hv.qemu_save(&bridge.control_socket, SAVE, &description);
        // A domain that went away has it no more.
        let _gone = self.hv.approve(running.domid, running.instance, Vec::new(), vec![SAVE.into()]);
        let saved = saved.map_err(|e| at(e.into()))?;
        self.events.tell("operation", &name, running.domid, "saved".to_owned());
        Ok((saved.bytes, Duration::from_millis(saved.took_ms)))
    }

    /// What a QEMU guest's display shows, as PNG.
    ///
    /// # Errors
    /// One line each.
    pub fn screenshot(&self, guest: &str) -> Result<Vec<u8>, OpError> {
        let (name, bridge) = self.bridge(guest)?;
        let png = self.hv.screenshot(&bridge.control_socket);
        png.map_err(|e| OpError::from(e).at(&format!("guest {name}")))
    }

    /// QEMU's own word for a guest that runs; `None` if there is nothing to add.
    pub(crate) fn qemu_word(&self, guest: &Guest, domain: &Domain) -> Option<&'static str> {
        if guest.config.guest_type != GuestType::Qemu || domain.state() != DomainState::Running {
            return None;
        }
        match self.hv.qemu(&domain.control_socket, None).ok()?.state.as_str() {
            "paused" => Some("paused"),
            "postmigrate" => Some("saved"),
            "inmigrate" => Some("restoring"),
            "silent" => Some("silent"),
            _ => None,
        }
    }

    /// QEMU's domain, made if it is not there; where its monitor is.
    pub(super) fn make_emulator(&self, guest: &Guest) -> Result<String, OpError> {
        let kvm = domain_kit::os::cpu_can_virtualize();
        let request = specs::emulator(&self.host(), guest, kvm);
        let uuid = request.uuid.clone();
        self.make_domain(&uuid, request)?;
        let domain = self.emulator(guest)?;
        domain.map(|d| d.control_socket).ok_or_else(|| OpError::Failed("QEMU's domain went away".into()))
    }

    /// Starts QEMU, if that was not done.
    pub(super) fn start_emulator(&self, guest: &Guest) -> Result<(), OpError> {
        if guest.config.guest_type != GuestType::Qemu {
            return Ok(());
        }
        let domain =
            self.emulator(guest)?.ok_or_else(|| OpError::Failed("QEMU's domain went away".into()))?;
        if domain.state() == DomainState::Created {
            let running = numbers(&domain)?;
            self.hv.start(running.domid, running.instance)?;
        }
        Ok(())
    }

    /// How QEMU ended, if it did.
    pub(super) fn emulator_ended(&self, guest: &Guest) -> Result<Option<String>, OpError> {
        if guest.config.guest_type != GuestType::Qemu {
            return Ok(None);
        }
        let failed = self.emulator(guest)?.filter(|d| d.state() == DomainState::Failed);
        Ok(failed.map(|d| format!("QEMU ended: {}", self.end_of(&d))))
    }

    /// Ends QEMU.
    pub(super) fn end_emulator(&self, guest: &Guest) -> Result<(), OpError> {
        if guest.config.guest_type != GuestType::Qemu {
            return Ok(());
        }
        let Some(domain) = self.emulator(guest)?.filter(|d| d.state() != DomainState::Dying) else {
            return Ok(());
        };
        let running = numbers(&domain)?;
        match self.hv.destroy(running.domid, running.instance) {
            Ok(()) | Err(HvError::NotFound) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Approves the way to a device's frontend for its backend, before its nodes tell of it.
    pub(super) fn open_vhost(&self, guest: &Guest, device: &DevicePaths) -> Result<(), OpError> {
        if guest.config.guest_type != GuestType::Qemu {
            return Ok(());
        }
        let backend = self.backend_of(device)?.ok_or_else(|| {
            OpError::Failed(format!("{}: backend {} is gone", super::steps_do::label(device), device.backend))
        })?;
        let backend = numbers(&backend)?;
        let socket = specs::vhost_socket(&guest.uuid, device.kind, device.id);
        self.hv.approve(backend.domid, backend.instance, vec![socket], Vec::new())?;
        Ok(())
    }

    /// The sockets of all devices of a guest that was not started yet.
    pub(super) fn open_all_vhost(&self, guest: &Guest) -> Result<(), OpError> {
        if guest.config.guest_type != GuestType::Qemu {
            return Ok(());
        }
        let Some(own) = guest.domain else { return Ok(()) };
        let domain = find_instance(&*self.hv, own.domid, own.instance)?;
        // Approved already.
        if domain.is_none_or(|d| d.state() != DomainState::Created) {
            return Ok(());
        }
        xs_layout::device_paths(guest).iter().try_for_each(|device| self.open_vhost(guest, device))
    }

    /// Withdraws it again.
    pub(super) fn close_vhost(&self, guest: &Guest, device: &DevicePaths) -> Result<(), OpError> {
        if guest.config.guest_type != GuestType::Qemu {
            return Ok(());
        }
        let ok = |result: Result<(), HvError>| match result {
            Ok(()) | Err(HvError::NotFound) => Ok(()),
            Err(e) => Err(OpError::from(e)),
        };
        if let Some(backend) = self.backend_of(device)? {
            let backend = numbers(&backend)?;
            let name = specs::vhost_resource(&guest.uuid, device.kind, device.id);
            ok(self.hv.approve(backend.domid, backend.instance, Vec::new(), vec![name]))?;
        }
        Ok(())
    }

    fn backend_of(&self, device: &DevicePaths) -> Result<Option<Domain>, OpError> {
        let all = self.hv.list()?;
        let there = |d: &Domain| {
            d.domid == u32::from(device.backend_domid)
                && d.name == device.backend
                && d.state() != DomainState::Dying
        };
        Ok(all.into_iter().find(there))
    }
}

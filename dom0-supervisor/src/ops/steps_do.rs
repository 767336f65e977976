//! Steps that make something. Each can be carried out again after a kill.

use std::time::Instant;

use proto::hvcore::{Domain, DomainState};

use super::{Change, of_guest};
use crate::config::GuestType;
use crate::hv::{HvError, find_by_uuid, find_instance};
use crate::manager::{Manager, OpError, one_line};
use crate::specs;
use crate::state::{Guest, OwnDisk, RunningDomain, guest_uuid_text, private_backend_uuid, service_uuid};
use crate::xs_layout::{self, DevicePaths, XenbusState};

pub(crate) fn numbers(domain: &Domain) -> Result<RunningDomain, OpError> {
    let domid = u16::try_from(domain.domid)
        .map_err(|_| OpError::Failed("hv-core gave an impossible domid".into()))?;
    Ok(RunningDomain { domid, instance: domain.instance })
}

impl Manager {
    /// Every disk and vif gets its driver domain; those of the guest's own are made.
    pub(super) fn do_backends(&self, guest: &Guest) -> Result<Change, OpError> {
        let mut disks = Vec::new();
        for (index, disk) in guest.config.disk.iter().enumerate() {
            let vdev = disk.vdev.name();
            let name = guest.disk_backend_name(index);
            let own = match disk.has_own_backend() {
                true => {
                    let uuid = guest_uuid_text(&private_backend_uuid(&guest.uuid, vdev));
                    let request = specs::private_blkback(&self.host(), guest, index)
                        .ok_or_else(|| OpError::Failed(format!("disk {vdev} has no path")))?;
                    let domain =
                        self.make_domain(&uuid, request).map_err(|e| e.at(&format!("disk {vdev}")))?;
                    OwnDisk { domid: domain.domid, instance: domain.instance, private: true }
                }
                false => {
                    let domain = self.service_domain(&name).map_err(|e| e.at(&format!("disk {vdev}")))?;
                    OwnDisk { domid: domain.domid, instance: domain.instance, private: false }
                }
            };
            let uuid =
                if own.private { private_backend_uuid(&guest.uuid, vdev) } else { service_uuid(&name) };
            self.make_home(
                RunningDomain { domid: own.domid, instance: own.instance },
                &name,
                &guest_uuid_text(&uuid),
            )?;
            disks.push(Some(own));
        }
        let mut vifs = Vec::new();
        for (index, vif) in guest.config.vif.iter().enumerate() {
            let name = vif.backend.as_str();
            let domain = self.service_domain(name).map_err(|e| e.at(&format!("vif {index}")))?;
            self.make_home(domain, name, &guest_uuid_text(&service_uuid(name)))?;
            vifs.push(Some(domain.domid));
        }
        Ok(of_guest(move |guest| {
            guest.disk_backends = disks;
            guest.vif_backends = vifs;
        }))
    }

    pub(super) fn service_domain(&self, name: &str) -> Result<RunningDomain, OpError> {
        let uuid = guest_uuid_text(&service_uuid(name));
        let Some(domain) = find_by_uuid(&*self.hv, &uuid)? else {
            // Whatever was wrong with it may be right by now, and someone asks.
            return self.make_service_now(name).map_err(|e| match e {
                OpError::Killed | OpError::Unavailable(_) => e,
                e => OpError::Failed(format!("service {name} does not run: {e}")),
            });
        };
        if domain.state() == DomainState::Failed {
            let how = self.end_of(&domain);
            return Err(OpError::Failed(format!("service {name} has failed ({how}); bh restart {name}")));
        }
        numbers(&domain)
    }

    /// The domain of this uuid, made if it is not there. One that is going is waited for.
    pub(super) fn make_domain(
        &self,
        uuid: &str,
        request: proto::hvcore::CreateDomainRequest,
    ) -> Result<RunningDomain, OpError> {
        let deadline = Instant::now() + self.timing.gone;
        loop {
            match find_by_uuid(&*self.hv, uuid)? {
                Some(domain) if domain.state() != DomainState::Dying => return numbers(&domain),
                Some(domain) if Instant::now() > deadline => {
                    return Err(OpError::Failed(format!(
                        "domain {} of the same uuid is still dying: something holds its memory",
                        domain.domid
                    )));
                }
                Some(_) => std::thread::sleep(self.timing.poll),
                None => match self.hv.create(request.clone()) {
                    Ok(domain) => return numbers(&domain),
                    // Between the look and the call an earlier call of ours was carried out late.
                    Err(HvError::AlreadyExists(_)) if Instant::now() < deadline => {
                        std::thread::sleep(self.timing.poll);
                    }
                    Err(e) => return Err(e.into()),
                },
            }
        }
    }

    /// The guest's own domain.
    pub(super) fn do_domain(&self, guest: &Guest) -> Result<Change, OpError> {
        let mut request = specs::guest(&self.host(), guest);
        if guest.config.guest_type == GuestType::Qemu {
            let monitor = self.make_emulator(guest)?;
            request.resources.push(crate::specs_qemu::monitor(&monitor));
            request.resources.extend(crate::specs_qemu::restored(guest));
        }
        let domain = self.make_domain(&guest_uuid_text(&guest.uuid), request)?;
        let now = crate::events::unix_ms();
        Ok(of_guest(move |guest| {
            guest.domain = Some(domain);
            guest.boots += 1;
            guest.started_unix_ms = now;
        }))
    }

    /// The guest's nodes, in one transaction.
    pub(super) fn do_nodes(&self, guest: &Guest) -> Result<Change, OpError> {
        self.open_all_vhost(guest)?;
        self.write_guest_nodes(guest)?;
        Ok(super::nothing())
    }

    /// Lets the guest run.
    pub(super) fn do_start(&self, guest: &Guest) -> Result<Change, OpError> {
        let found = match guest.domain {
            Some(running) => find_instance(&*self.hv, running.domid, running.instance)?,
            None => None,
        };
        let Some(domain) = found else {
            return Err(OpError::Failed("its domain went away before it started".into()));
        };
        // Anything else: it was started before a kill, and what became of it is seen in the next step.
        if domain.state() == DomainState::Created {
            self.start_emulator(guest)?;
            let running = numbers(&domain)?;
            self.hv.start(running.domid, running.instance)?;
        }
        Ok(super::nothing())
    }

    /// Writes a guest's nodes unless they are there; true if they were written.
    pub(crate) fn write_guest_nodes(&self, guest: &Guest) -> Result<bool, OpError> {
        let Some(domain) = guest.domain else { return Ok(false) };
        let (marker, value) = xs_layout::guest_marker(guest, domain.domid);
        if self.store.read(&marker)?.as_deref() == Some(value.as_str()) {
            return Ok(false);
        }
        self.store.apply(&xs_layout::guest_nodes(guest, domain.domid))?;
        Ok(true)
    }

    /// Waits until the devices' backends have taken them up.
    pub(super) fn do_ready(&self, guest: &Guest) -> Result<Change, OpError> {
        let Some(running) = guest.domain else { return Err(OpError::Failed("it has no domain".into())) };
        let devices = xs_layout::device_paths(guest);
        let began = Instant::now();
        loop {
            let Some(domain) = find_instance(&*self.hv, running.domid, running.instance)? else {
                return Err(OpError::Failed("its domain went away while it started".into()));
            };
            if let Some(how) = self.emulator_ended(guest)? {
                return Err(OpError::Failed(how));
            }
            match domain.state() {
                DomainState::Failed => return Err(self.runner_ended(guest, running)),
                // It crashed before it was a guest: what the domain file says of crashes is about guests.
                DomainState::Shutdown
                    if domain.shutdown_reason == xen_abi::sched::SHUTDOWN_CRASH && !self.served(running) =>
                {
                    return Err(self.runner_ended(guest, running));
                }
                // Came up and went: what follows is the reconciler's.
                DomainState::Shutdown => return Ok(super::nothing()),
                _ => {}
            }
            let mut late = None;
            for device in &devices {
                if !self.device_ready(device)? {
                    late = Some(device);
                }
            }
            // A program that is a guest need not use xenstore: that it says it serves is as good a sign.
            let says_so = guest.config.guest_type == GuestType::Process && self.served(running);
            let alive = says_so
                || began.elapsed() >= self.timing.sign_of_life
                || self.hv.has_store_ring(running.domid)?;
            if late.is_none() && alive {
                // Its next domain boots.
                return Ok(of_guest(|guest| guest.restore = None));
            }
            if began.elapsed() > self.timing.ready
                && let Some(device) = late
            {
                return Err(OpError::Failed(format!(
                    "{}: backend {} did not take it up within {} s; see bh services",
                    label(device),
                    device.backend,
                    self.timing.ready.as_secs()
                )));
            }
            std::thread::sleep(self.timing.poll);
        }
    }

    fn served(&self, running: RunningDomain) -> bool {
        self.known().served.contains(&(running.domid, running.instance))
    }

    fn runner_ended(&self, guest: &Guest, running: RunningDomain) -> OpError {
        let runner = match guest.config.guest_type {
            GuestType::Pvh => "hv-vcpu",
            GuestType::Process => "its program",
            GuestType::Qemu => "qemu-bridge",
        };
        // The process may still be on its way out, and hv-core adds what it said last a moment later.
        let end = Instant::now() + self.timing.poll * 20;
        loop {
            let found = find_instance(&*self.hv, running.domid, running.instance).ok().flatten();
            let told = found.as_ref().is_some_and(|d| d.last_exit.contains(": "));
            if told || Instant::now() > end {
                let how = found.map_or_else(|| "no reason known".into(), |d| self.end_of(&d));
                // What a runner says begins with its own name; how it was ended then matters to nobody.
                let words = how.split_once(": ").map_or(how.as_str(), |(_, words)| words);
                let words = words.strip_prefix(&format!("{runner}: ")).unwrap_or(words);
                return OpError::Failed(format!("{runner} ended: {words}"));
            }
            std::thread::sleep(self.timing.poll);
        }
    }

    pub(super) fn device_ready(&self, device: &DevicePaths) -> Result<bool, OpError> {
        let state = self.store.read(&format!("{}/state", device.back))?;
        let state = XenbusState::parse(state.as_deref());
        if (XenbusState::InitWait..=XenbusState::Connected).contains(&state) {
            return Ok(true);
        }
        if let Some(text) = self.store.read(&xs_layout::device_error_path(device))? {
            return Err(OpError::Failed(format!("{}: {}", label(device), one_line(&text))));
        }
        let all = self.hv.list()?;
        if let Some(backend) = all.iter().find(|d| d.domid == u32::from(device.backend_domid))
            && backend.state() == DomainState::Failed
        {
            let how = self.end_of(backend);
            return Err(OpError::Failed(format!(
                "{}: backend {} failed: {how}",
                label(device),
                device.backend
            )));
        }
        Ok(false)
    }
}

/// For messages.
pub(super) fn label(device: &DevicePaths) -> String {
    match device.kind {
        "vbd" => format!("disk {}", device.name),
        kind => format!("{kind} {}", device.name),
    }
}

//! Services: those that the host file wants against those that run.
//!
//! ```text
//!   missing ──make──► runs ──host file: another restart policy, limits, program, socket──► updated, its process restarted
//!      ▲    refused:   │
//!      │    later,     ├──host file: another disk, uplink, addresses; unused──► drained, destroyed ──► missing
//!      │    ever more  ├──the same, in use──► kept as it is, with a warning, until its guests are gone
//!      └──── rarely    └──not in the host file any more──► unused: drained, destroyed; in use: kept, with a warning
//! ```
//! What a running service was made of is in the state file, so that a dom0 that reads a changed host file sees it.

use std::time::{Duration, Instant};

use proto::hvcore::{CreateDomainRequest, Domain, DomainState, resource};
use uuid::Uuid;

use crate::config::DiskSource;
use crate::hv::{HvError, find_by_uuid};
use crate::manager::{Manager, OpError};
use crate::ops::numbers;
use crate::specs::{self, Service, ServiceKind};
use crate::state::{MadeOf, RunningDomain, State, private_backend_name, private_backend_uuid};
use crate::view::{is_guest, recorded};
use crate::xs_layout::{self, home};

/// A service that can't be made is tried again after this, then after twice as long, up to the second.
const RETRY: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How long a service that is removed may take to finish what it does.
const DRAIN: Duration = Duration::from_secs(2);

const FINGERPRINTS: Uuid = Uuid::from_u128(0x6275_6c6b_6865_6164_0000_6d61_6465_6f66);

/// What a service is made of, for comparing.
fn made_of(instance: u64, service: &Service) -> MadeOf {
    use prost::Message;
    let whole = &service.request;
    let mut life = CreateDomainRequest {
        program: String::new(),
        env: Vec::new(),
        restart: None,
        limits: None,
        ..whole.clone()
    };
    life.resources.retain(|r| r.kind() != resource::Kind::Listener);
    if service.kind != ServiceKind::Netback {
        // netback's say what its namespace looks like, which its guests depend on; of blkback's, guests know the size of sectors.
        life.args.retain(|arg| arg.starts_with("--sector-size="));
    }
    let print = |request: &CreateDomainRequest| Uuid::new_v5(&FINGERPRINTS, &request.encode_to_vec());
    MadeOf { instance, life: print(&life), all: print(whole) }
}

impl Manager {
    /// One pass over all services. `domains` is older than the state that is looked at here.
    pub(crate) fn reconcile_services(&self, domains: &[Domain]) {
        let wanted = specs::services(&self.host());
        for service in &wanted {
            let there = domains.iter().find(|d| d.uuid.eq_ignore_ascii_case(&service.request.uuid));
            let result = match there {
                Some(domain) => self.keep_service(service, domain, domains),
                None if self.waits(&service.name) => continue,
                None => self.make_service(service).map(Some),
            };
            let result = result.and_then(|domain| {
                let Some(domain) = domain else { return Ok(()) };
                self.make_dom0_nodes()?;
                self.make_home(domain, &service.name, &service.request.uuid)
            });
            match result {
                Ok(()) => self.forget_trouble(&service.name),
                // Its domain is there; the store is on its way.
                Err(OpError::Unavailable(_)) if there.is_some() => {}
                Err(e) => self.note_trouble(&service.name, &e),
            }
        }
        let state = self.state();
        for domain in domains.iter().filter(|d| d.domid != 0 && !is_guest(d)) {
            let known = wanted.iter().any(|s| s.request.uuid.eq_ignore_ascii_case(&domain.uuid))
                || is_private_backend(domain, &state, domains);
            if known || domain.state() == DomainState::Dying {
                continue;
            }
            match self.remove_service(domain, domains) {
                Ok(()) => self.forget_trouble(&domain.name),
                Err(OpError::Unavailable(_)) => {}
                Err(e) => self.note_trouble(&domain.name, &e),
            }
        }
    }

    /// It could not be made a moment ago.
    fn waits(&self, name: &str) -> bool {
        self.known().service_retry.get(name).is_some_and(|r| r.0 > Instant::now())
    }

    fn forget_trouble(&self, name: &str) {
        let mut known = self.known();
        known.service_notes.remove(name);
        known.service_retry.remove(name);
    }

    fn note_trouble(&self, name: &str, e: &OpError) {
        let text = e.to_string();
        let mut known = self.known();
        let wait = known.service_retry.get(name).map_or(RETRY, |r| (r.1 * 2).min(RETRY_MAX));
        known.service_retry.insert(name.to_owned(), (Instant::now() + wait, wait));
        let before = known.service_notes.insert(name.to_owned(), text.clone());
        drop(known);
        if before.as_deref() != Some(text.as_str()) {
            self.events.tell("warning", name, 0, text);
        }
    }

    /// Why a service is not as the host file has it, and for one that is missing when it is tried again.
    pub(crate) fn service_note(&self, name: &str, missing: bool) -> String {
        let known = self.known();
        let Some(note) = known.service_notes.get(name) else { return String::new() };
        let left = known.service_retry.get(name).map(|r| r.0.saturating_duration_since(Instant::now()));
        match left {
            Some(left) if missing => {
                format!("{note}; tried again in {} s, at once by bh restart {name}", left.as_secs() + 1)
            }
            _ => note.clone(),
        }
    }

    fn make_service(&self, service: &Service) -> Result<RunningDomain, OpError> {
        if self.sees_host
            && let Some(disk) = &service.disk
        {
            crate::config::check_disk_files("", disk).map_err(|e| OpError::Invalid(e.0))?;
        }
        let domain = match self.hv.create(service.request.clone()) {
            // Someone who asked for it was quicker.
            Err(HvError::AlreadyExists(text)) => {
                find_by_uuid(&*self.hv, &service.request.uuid)?.ok_or(OpError::Exists(text))?
            }
            made => made?,
        };
        let running = numbers(&domain)?;
        self.record_service(&service.name, Some(made_of(running.instance, service)))?;
        Ok(running)
    }

    fn record_service(&self, name: &str, made: Option<MadeOf>) -> Result<(), OpError> {
        self.inner().change(|state| match made {
            Some(made) => state.services.insert(name.to_owned(), made),
            None => state.services.remove(name),
        })?;
        Ok(())
    }

    /// Makes a service of the host file now, however often it was refused before: someone asks for it.
    ///
    /// # Errors
    /// `NotFound`: the host file has none of that name; why it can't be made.
    pub(crate) fn make_service_now(&self, name: &str) -> Result<RunningDomain, OpError> {
        let host = self.host();
        let service = specs::services(&host).into_iter().find(|s| s.name == name);
        let service =
            service.ok_or_else(|| OpError::NotFound(format!("no service {name:?}; see bh services")))?;
        match self.make_service(&service) {
            Ok(running) => {
                self.forget_trouble(name);
                Ok(running)
            }
            Err(e) => {
                self.note_trouble(name, &e);
                Err(e)
            }
        }
    }

    /// A service of the host file that has a domain: is it as the file says? `None`: it is on its way out.
    fn keep_service(
        &self,
        service: &Service,
        domain: &Domain,
        domains: &[Domain],
    ) -> Result<Option<RunningDomain>, OpError> {
        if domain.state() == DomainState::Dying {
            return Ok(None);
        }
        let running = numbers(domain)?;
        let wanted = made_of(running.instance, service);
        let recorded = self.inner().state.services.get(&service.name).cloned();
        let Some(recorded) = recorded.filter(|r| r.instance == running.instance) else {
            // The record was lost: what runs is taken for what was wanted.
            self.record_service(&service.name, Some(wanted))?;
            return Ok(Some(running));
        };
        if recorded.all == wanted.all {
            return Ok(Some(running));
        }
        if recorded.life == wanted.life {
            self.hv.update(running.domid, running.instance, service.request.clone())?;
            match domain.state() {
                DomainState::Failed | DomainState::Shutdown => {
                    drop(self.hv.start(running.domid, running.instance)?)
                }
                _ => self.hv.kill(running.domid, running.instance, 9)?,
            }
            self.record_service(&service.name, Some(wanted))?;
            self.tell(service, running, "restarted: the host file has changed");
            return Ok(Some(running));
        }
        let users = self.users(domain, domains)?;
        if !users.is_empty() {
            return Err(OpError::Busy(format!(
                "the host file has changed, but it is in use by {}: it stays as it was until they are gone",
                users.join(", ")
            )));
        }
        self.end_service(domain)?;
        self.tell(service, running, "ended, to be made anew: the host file has changed");
        Ok(None)
    }

    fn tell(&self, service: &Service, running: RunningDomain, text: &str) {
        self.events.tell("operation", &service.name, running.domid, text);
    }

    /// A service that nobody wants any more.
    fn remove_service(&self, domain: &Domain, domains: &[Domain]) -> Result<(), OpError> {
        let users = self.users(domain, domains)?;
        if !users.is_empty() {
            return Err(OpError::Busy(format!(
                "not in the host file any more, but in use by {}: it is removed when they are gone",
                users.join(", ")
            )));
        }
        self.end_service(domain)?;
        self.record_service(&domain.name, None)?;
        self.events.tell(
            "operation",
            &domain.name,
            domain.domid as u16,
            "removed: not in the host file any more",
        );
        Ok(())
    }

    fn end_service(&self, domain: &Domain) -> Result<(), OpError> {
        let running = numbers(domain)?;
        // One that hangs is ended all the same: nobody uses it.
        if domain.host_pid != 0
            && let Err(e) = self.hv.drain(&domain.control_socket, DRAIN)
        {
            tracing::warn!(service = domain.name, error = %e, "draining");
        }
        match self.hv.destroy(running.domid, running.instance) {
            Ok(()) | Err(HvError::NotFound) => {}
            Err(e) => return Err(e.into()),
        }
        self.store.apply(&xs_layout::remove_service_nodes(running.domid))?;
        self.known().homes.remove(&(running.domid, running.instance));
        Ok(())
    }

    /// The guests that a service serves, by name.
    fn users(&self, service: &Domain, domains: &[Domain]) -> Result<Vec<String>, OpError> {
        let state = self.state();
        let name = service.name.as_str();
        let all = service
            .roles
            .iter()
            .any(|r| *r == proto::hvcore::Role::Xenstore as i32 || *r == proto::hvcore::Role::Console as i32);
        let names = |guest: &crate::state::Guest| {
            let disk = |d: &crate::config::DiskEntry| matches!(d.source(), Some(DiskSource::Service(n)) if n.as_str() == name);
            guest.config.disk.iter().any(disk) || guest.config.vif.iter().any(|v| v.backend.as_str() == name)
        };
        let mut users: Vec<String> =
            state.guests.iter().filter(|(_, g)| all || names(g)).map(|(n, _)| format!("guest {n}")).collect();
        for guest in domains.iter().filter(|d| is_guest(d) && !recorded(&state, d)) {
            let uses = |kind: &str| {
                let path = format!("{}/backend/{kind}/{}", home(service.domid as u16), guest.domid);
                self.store.read(&path).map(|found| found.is_some())
            };
            if all || uses("vbd")? || uses("vif")? {
                users.push(format!("guest {}", guest.name));
            }
        }
        Ok(users)
    }
}

/// A driver domain of one guest's own, of a guest that dom0 knows or one that only runs.
fn is_private_backend(domain: &Domain, state: &State, domains: &[Domain]) -> bool {
    let of_known = state.guests.iter().any(|(name, guest)| {
        is_emulator(domain, &guest.uuid)
            || guest.config.disk.iter().any(|disk| {
                let vdev = disk.vdev.name();
                domain.name == private_backend_name(name, vdev)
                    && domain.uuid.eq_ignore_ascii_case(&private_backend_uuid(&guest.uuid, vdev).to_string())
            })
    });
    of_known || domains.iter().any(|guest| is_guest(guest) && private_of(domain, guest))
}

/// True if it is QEMU's domain of the guest with this uuid.
fn is_emulator(domain: &Domain, guest: &Uuid) -> bool {
    domain.uuid.eq_ignore_ascii_case(&crate::specs_qemu::emulator_uuid(guest).to_string())
}

/// True if `backend` is a driver domain of this guest's own, judged by name and uuid alone.
pub(crate) fn private_of(backend: &Domain, guest: &Domain) -> bool {
    let Ok(uuid) = guest.uuid.parse::<Uuid>() else { return false };
    if is_emulator(backend, &uuid) {
        return true;
    }
    let prefix = private_backend_name(&guest.name, "");
    let Some(vdev) = backend.name.strip_prefix(&prefix) else { return false };
    backend.uuid.eq_ignore_ascii_case(&private_backend_uuid(&uuid, vdev).to_string())
}

#[cfg(test)]
mod tests;

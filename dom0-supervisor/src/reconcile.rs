//! Desired against actual: services that are missing are made, operations that lie are taken up, guests that ended get what
//! their domain file says. One pass looks at everything; what takes long runs in threads of its own.

use std::sync::{Arc, PoisonError};

use proto::hvcore::{Domain, DomainState};

use crate::config::{DomainFile, Lifecycle, OnEvent};
use crate::events::unix_ms;
use crate::hv::find_instance;
use crate::manager::{Manager, OpError};
use crate::specs;
use crate::state::{Guest, RunningDomain, SagaKind};
use crate::xs_layout;

/// A guest that ends sooner after its start than this, so often in a row, is not started again.
const QUICK_MS: u64 = 10_000;
const QUICK_ENDS: u32 = 5;

/// sched.h: what a domain says when it shuts down.
mod reason {
    pub const POWEROFF: u32 = xen_abi::sched::SHUTDOWN_POWEROFF;
    pub const REBOOT: u32 = xen_abi::sched::SHUTDOWN_REBOOT;
    pub const SUSPEND: u32 = xen_abi::sched::SHUTDOWN_SUSPEND;
}

impl Manager {
    /// One pass. Errors of single services and guests are told as events and notes; they do not end the pass.
    ///
    /// # Errors
    /// hv-core does not answer.
    pub fn reconcile(self: &Arc<Self>) -> Result<(), OpError> {
        // A user's reload makes passes of its own.
        let _one_at_a_time = self.pass.lock().unwrap_or_else(PoisonError::into_inner);
        let domains = self.hv.list()?;
        self.reconcile_services(&domains);
        self.reconcile_sagas();
        // Looked at after the sagas were, so that a guest whose operation just ended is seen as it is now.
        let domains = self.hv.list()?;
        let state = self.state();
        for (name, guest) in &state.guests {
            if state.saga_of(name).is_none()
                && let Err(e) = self.reconcile_guest(name, guest, &domains)
            {
                tracing::warn!(guest = name, error = %e, "reconciling a guest");
            }
        }
        Ok(())
    }

    pub(crate) fn make_dom0_nodes(&self) -> Result<(), OpError> {
        if !self.known().dom0_nodes {
            self.store.apply(&xs_layout::dom0_nodes())?;
            self.known().dom0_nodes = true;
        }
        Ok(())
    }

    /// The home of a service in the store, once in a life of dom0.
    pub(crate) fn make_home(&self, domain: RunningDomain, name: &str, uuid: &str) -> Result<(), OpError> {
        let key = (domain.domid, domain.instance);
        if self.known().homes.contains(&key) {
            return Ok(());
        }
        self.store.apply(&xs_layout::service_nodes(domain.domid, name, uuid))?;
        self.known().homes.insert(key);
        Ok(())
    }

    /// Operations that nobody carries out: an earlier dom0's, or those that gave up for a while.
    fn reconcile_sagas(self: &Arc<Self>) {
        let all: Vec<(u64, String)> =
            self.inner().state.sagas.iter().map(|(id, saga)| (*id, saga.guest.clone())).collect();
        for (id, guest) in all {
            if !self.claim(id) {
                continue;
            }
            let this = Arc::clone(self);
            let spawned = std::thread::Builder::new().name(format!("op-{id}")).spawn(move || {
                match this.run_claimed(id) {
                    Ok(()) | Err(OpError::Busy(_) | OpError::Killed) => {}
                    Err(e) => tracing::warn!(guest, error = %e, "operation"),
                }
            });
            if let Err(e) = spawned {
                self.inner().active.remove(&id);
                tracing::error!(error = %e, "no thread for an operation; it is tried again");
            }
        }
    }

    fn reconcile_guest(
        self: &Arc<Self>,
        name: &str,
        guest: &Guest,
        domains: &[Domain],
    ) -> Result<(), OpError> {
        let found = guest.domain.and_then(|running| {
            let same = |d: &&Domain| d.domid == u32::from(running.domid) && d.instance == running.instance;
            domains.iter().find(same)
        });
        let Some(domain) = found else {
            // hv-core itself started anew, or someone else took the domain down.
            if let Some(running) = guest.domain
                && find_instance(&*self.hv, running.domid, running.instance)?.is_some()
            {
                return Ok(());
            }
            self.events.tell("warning", name, 0, "its domain is gone; the record is removed");
            return self.begin(name, SagaKind::Destroy, Some("its domain is gone".into()));
        };
        let (end, how) = match domain.state() {
            DomainState::Shutdown => match domain.shutdown_reason {
                reason::POWEROFF => (Lifecycle::Poweroff, "powered off".to_owned()),
                reason::REBOOT => (Lifecycle::Reboot, "rebooted".to_owned()),
                // Nobody asked for it and nothing can resume it.
                reason::SUSPEND => (Lifecycle::Crash, "suspended itself".to_owned()),
                code => (Lifecycle::Crash, format!("crashed (shutdown reason {code})")),
            },
            DomainState::Failed => (Lifecycle::Crash, format!("its runner ended: {}", self.end_of(domain))),
            DomainState::Dying => {
                return self.begin(name, SagaKind::Destroy, Some("its domain is being taken down".into()));
            }
            _ => {
                if self.write_guest_nodes(guest)? {
                    self.events.tell(
                        "warning",
                        name,
                        domain.domid as u16,
                        "its xenstore nodes were missing; made again",
                    );
                }
                return Ok(());
            }
        };
        if guest.preserved.is_some() {
            return Ok(());
        }
        let quick = unix_ms().saturating_sub(guest.started_unix_ms) < QUICK_MS;
        let ends = if quick { guest.quick_ends + 1 } else { 0 };
        let mut action = guest.config.action(end);
        let mut note = how.clone();
        if action == OnEvent::Restart && ends >= QUICK_ENDS {
            action = OnEvent::Preserve;
            note =
                format!("{how}; {QUICK_ENDS} times within seconds of its start, so it is not started again");
        }
        self.events.tell("operation", name, domain.domid as u16, format!("{note}: {}", word(action)));
        match action {
            OnEvent::Destroy => self.begin(name, SagaKind::Destroy, Some(note)),
            OnEvent::Preserve => {
                self.inner().change(|state| {
                    if let Some(guest) = state.guests.get_mut(name) {
                        guest.preserved = Some(note);
                    }
                })?;
                Ok(())
            }
            OnEvent::Restart => {
                let id = {
                    let mut inner = self.inner();
                    if inner.state.saga_of(name).is_some() {
                        return Ok(());
                    }
                    inner.change(|state| {
                        if let Some(guest) = state.guests.get_mut(name) {
                            guest.quick_ends = ends;
                        }
                        state.begin(name, SagaKind::Reboot, Some(note))
                    })?
                };
                tracing::debug!(saga = id, guest = name, "reboot");
                self.reconcile_sagas();
                Ok(())
            }
        }
    }

    fn begin(self: &Arc<Self>, name: &str, kind: SagaKind, why: Option<String>) -> Result<(), OpError> {
        {
            let mut inner = self.inner();
            if inner.state.saga_of(name).is_some() {
                return Ok(());
            }
            inner.change(|state| state.begin(name, kind, why))?;
        }
        self.reconcile_sagas();
        Ok(())
    }

    /// Makes the guests of the host file's `domain_dir` that say `autostart`. Done once in a life of hv-core; each in a
    /// thread of its own.
    pub fn autostart(self: &Arc<Self>) {
        let host = self.host();
        let Some(dir) = &host.domain_dir else { return };
        let mut files: Vec<_> = match std::fs::read_dir(dir) {
            Ok(entries) => entries.filter_map(|e| e.ok().map(|e| e.path())).collect(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return,
            Err(e) => {
                return self.events.tell("warning", "dom0", 0, format!("domain_dir {}: {e}", dir.display()));
            }
        };
        files.retain(|path| path.extension().is_some_and(|e| e == "toml"));
        files.sort();
        for path in files {
            let source = path.display().to_string();
            let file = std::fs::read_to_string(&path)
                .map_err(|e| format!("{source}: {e}"))
                .and_then(|text| DomainFile::parse(&text, &source).map_err(|e| e.0));
            match file {
                Ok(file) if !file.autostart => {}
                Ok(file) => {
                    let this = Arc::clone(self);
                    let spawned = std::thread::Builder::new().name("autostart".into()).spawn(move || {
                        let name = file.name.to_string();
                        if let Err(e) = this.create_guest(file) {
                            this.events.tell("warning", &name, 0, format!("autostart: {e}"));
                        }
                    });
                    if let Err(e) = spawned {
                        self.events.tell("warning", &source, 0, format!("autostart: {e}"));
                    }
                }
                Err(e) => self.events.tell("warning", "dom0", 0, format!("autostart: {e}")),
            }
        }
    }

    /// True once every service of the host file has a domain.
    pub fn services_made(&self) -> bool {
        let Ok(domains) = self.hv.list() else { return false };
        specs::services(&self.host()).iter().all(|service| {
            domains.iter().any(|d| d.uuid.eq_ignore_ascii_case(&service.request.uuid))
                || self.known().service_notes.contains_key(&service.name)
        })
    }
}

fn word(action: OnEvent) -> &'static str {
    match action {
        OnEvent::Destroy => "removing it",
        OnEvent::Restart => "starting it again",
        OnEvent::Preserve => "keeping it as it is",
    }
}

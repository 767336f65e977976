//! Beginning operations: what is refused at once, and the record that makes the rest survive a kill.

use std::path::PathBuf;

use super::in_use::{files, free};
use crate::config::{AccessMode, DiskSource, DomainFile, GuestType, check_guest_files};
use crate::events::unix_ms;
use crate::manager::{Manager, OpError};
use crate::state::{Guest, Phase, SagaKind, State};

/// Most guests of a host.
const MAX_GUESTS: usize = 1024;

impl Manager {
    /// Makes and starts a guest from the text of a domain file; returns its name when it runs.
    ///
    /// # Errors
    /// One line each: what is wrong with the file or the host, or why it failed (it was undone then).
    pub fn create(&self, text: &str, source: &str) -> Result<String, OpError> {
        let file = DomainFile::parse(text, source).map_err(|e| OpError::Invalid(e.0))?;
        self.create_guest(file)
    }

    /// The same for a guest that goes on from a file of [`Manager::save_guest`]'s.
    ///
    /// # Errors
    /// As [`Manager::create`].
    pub fn restore(&self, text: &str, source: &str, file: PathBuf) -> Result<String, OpError> {
        let config = DomainFile::parse(text, source).map_err(|e| OpError::Invalid(e.0))?;
        if config.guest_type != GuestType::Qemu {
            return Err(OpError::Invalid(format!("{source}: only guests of type \"qemu\" can be restored")));
        }
        self.make_guest(config, Some(file))
    }

    /// The same with a parsed file.
    ///
    /// # Errors
    /// As [`Manager::create`].
    pub fn create_guest(&self, file: DomainFile) -> Result<String, OpError> {
        self.make_guest(file, None)
    }

    fn make_guest(&self, file: DomainFile, restore: Option<PathBuf>) -> Result<String, OpError> {
        let name = file.name.to_string();
        if self.sees_host {
            check_guest_files(&file).map_err(|e| OpError::Invalid(format!("guest {name}: {e}")))?;
        }
        self.check_host(&file).map_err(|e| e.at(&format!("guest {name}")))?;
        let guest = Guest { restore, ..Guest::new(file, unix_ms()) };
        let id = {
            let mut inner = self.inner();
            conflicts(&inner.state, &self.host(), &guest).map_err(|e| e.at(&format!("guest {name}")))?;
            let id = inner.change(|state| {
                state.guests.insert(name.clone(), guest);
                state.begin(&name, SagaKind::Create, None)
            })?;
            // Under the same lock, or a pass of the reconciler takes it up first.
            inner.active.insert(id);
            id
        };
        self.run_claimed(id).map_err(|e| e.at(&format!("guest {name}")))?;
        Ok(name)
    }

    /// The services that its disks name, and the files if they can be seen from here.
    pub(super) fn check_disks(&self, file: &DomainFile) -> Result<(), OpError> {
        let host = self.host();
        for disk in &file.disk {
            if let Some(DiskSource::Service(name)) = disk.source() {
                let Some(entry) = host.blkback(name.as_str()) else {
                    let text = format!(
                        "disk {}: no [[blkback]] {name} in the host file; add it or give a path",
                        disk.vdev.name()
                    );
                    return Err(OpError::Invalid(text));
                };
                if disk.mode != AccessMode::ReadOnly && entry.mode == AccessMode::ReadOnly {
                    let text = format!("disk {}: {name} is read-only; give mode = \"ro\"", disk.vdev.name());
                    return Err(OpError::Invalid(text));
                }
            }
        }
        Ok(())
    }

    /// What of the host this guest needs.
    fn check_host(&self, file: &DomainFile) -> Result<(), OpError> {
        self.check_disks(file)?;
        let host = self.host();
        for (index, vif) in file.vif.iter().enumerate() {
            if host.netback(vif.backend.as_str()).is_none() {
                let text = format!("vif {index}: no [[netback]] {} in the host file; add it", vif.backend);
                return Err(OpError::Invalid(text));
            }
        }
        if file.guest_type != GuestType::Process {
            let version = self.hv.version()?;
            let granted = file.guest_type == GuestType::Pvh;
            let pages_shared = granted && (!file.disk.is_empty() || !file.vif.is_empty());
            if pages_shared && let Some(missing) = version.missing.iter().find(|m| m.contains("udmabuf")) {
                return Err(OpError::Failed(format!(
                    "{missing}; without it a PVH guest can have no disk or vif: use a kernel with CONFIG_UDMABUF, or type = \"process\""
                )));
            }
            let free = version.memory_free_bytes;
            if free != 0 && file.ram_bytes() > free {
                return Err(OpError::Failed(format!(
                    "memory {} MiB is more than the {} MiB that are free",
                    file.ram_bytes() >> 20,
                    free >> 20
                )));
            }
        }
        Ok(())
    }

    /// Ends a guest at once and removes it.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if it is being removed already; `Timeout` if it takes long (it goes on).
    pub fn destroy(&self, guest: &str) -> Result<(), OpError> {
        if self.inner().state.find(guest).is_none() {
            let unmanaged = self.find_unmanaged(guest)?.ok_or_else(|| no_guest(guest))?;
            return self
                .destroy_unmanaged(&unmanaged)
                .map_err(|e| e.at(&format!("guest {}", unmanaged.name)));
        }
        self.finish_device_operation(guest)?;
        let (name, id, wait) = {
            let mut inner = self.inner();
            let Some((name, _)) = inner.state.find(guest) else { return Err(no_guest(guest)) };
            let name = name.clone();
            match inner.state.saga_of(&name).map(|(id, saga)| (id, saga.clone())) {
                None => {
                    let id = inner.change(|state| state.begin(&name, SagaKind::Destroy, None))?;
                    inner.active.insert(id);
                    (name, id, false)
                }
                Some((id, saga)) if saga.phase == Phase::Do && saga.kind != SagaKind::Destroy => {
                    inner.change(|state| {
                        if let Some(saga) = state.sagas.get_mut(&id) {
                            saga.phase = Phase::Undo;
                            saga.step = 0;
                            saga.why = Some("destroyed by the administrator".into());
                        }
                    })?;
                    (name, id, true)
                }
                Some((id, _)) => (name, id, true),
            }
        };
        let done = match if wait { self.run(id) } else { self.run_claimed(id) } {
            // Another thread carries it out: wait for it.
            Err(OpError::Busy(_)) => self.await_saga(id),
            // An undone operation is what was asked for here.
            Err(OpError::Failed(_)) if self.inner().state.find(&name).is_none() => Ok(()),
            done => done,
        };
        done.map_err(|e| e.at(&format!("guest {name}")))
    }

    pub(super) fn await_saga(&self, id: u64) -> Result<(), OpError> {
        let deadline = std::time::Instant::now() + self.timing.ready + self.timing.gone;
        while self.inner().state.sagas.contains_key(&id) {
            if std::time::Instant::now() > deadline {
                return Err(OpError::Timeout("it is still being removed; see bh list".into()));
            }
            std::thread::sleep(self.timing.poll);
        }
        Ok(())
    }

    /// Asks a guest to power off or reboot, by its `control/shutdown` node.
    ///
    /// # Errors
    /// `NotFound`; `Failed` if it does not run.
    pub fn request_shutdown(&self, guest: &str, reboot: bool) -> Result<(), OpError> {
        let state = self.state();
        let Some((name, record)) = state.find(guest) else { return Err(no_guest(guest)) };
        let Some(domain) = record.domain else {
            return Err(OpError::Failed(format!("guest {name} does not run")));
        };
        if state.saga_of(name).is_some() {
            return Err(OpError::Busy(format!("guest {name}: another operation is under way; see bh list")));
        }
        let path = format!("{}/control/shutdown", crate::xs_layout::home(domain.domid));
        let value = if reboot { "reboot" } else { "poweroff" };
        self.store.apply(&[crate::store::Change::Set { path, value: value.into() }])?;
        self.events.tell("operation", name, domain.domid, format!("asked to {value}"));
        Ok(())
    }
}

pub(crate) fn no_guest(guest: &str) -> OpError {
    OpError::NotFound(format!("no guest {guest:?}; see bh list"))
}

/// Name, uuid, MACs and writable disks belong to one guest each.
pub(super) fn conflicts(state: &State, host: &crate::config::HostFile, new: &Guest) -> Result<(), OpError> {
    let name = new.config.name.as_str();
    if state.guests.contains_key(name) {
        return Err(OpError::Exists("it exists already; bh destroy it first or give another name".into()));
    }
    if state.guests.len() >= MAX_GUESTS {
        return Err(OpError::Failed(format!("there are {MAX_GUESTS} guests, which is the most")));
    }
    for (other, guest) in &state.guests {
        if guest.uuid == new.uuid {
            return Err(OpError::Exists(format!(
                "uuid {} is that of guest {other}; leave uuid out",
                new.uuid
            )));
        }
        for index in 0..new.config.vif.len() {
            let mac = new.mac(index);
            if (0..guest.config.vif.len()).any(|i| guest.mac(i) == mac) {
                return Err(OpError::Exists(format!(
                    "mac {mac} is that of guest {other}; give another or leave mac out"
                )));
            }
        }
        for disk in &new.config.disk {
            for theirs in &guest.config.disk {
                let vdev = disk.vdev.name();
                if let (Some(DiskSource::Service(a)), Some(DiskSource::Service(b))) =
                    (disk.source(), theirs.source())
                    && a == b
                    && !shareable(disk.mode, theirs.mode)
                {
                    return Err(OpError::Exists(format!(
                        "disk {vdev}: {a} is in use by guest {other}; several guests share a disk that all read, or by mode \"w!\" at all of them"
                    )));
                }
            }
        }
    }
    for disk in &new.config.disk {
        for (file, written) in files(disk) {
            free(state, host, file, written).map_err(|e| e.at(&format!("disk {}", disk.vdev.name())))?;
        }
    }
    for entry in &new.config.usbdev {
        if let Some(file) = entry.disk() {
            let written = entry.mode != AccessMode::ReadOnly;
            free(state, host, file, written).map_err(|e| e.at(&format!("usbdev {}", entry.id)))?;
        }
    }
    Ok(())
}

/// xl's rule: what nobody writes, or what each names as written by several.
fn shareable(a: AccessMode, b: AccessMode) -> bool {
    !writes(a, b) || (a, b) == (AccessMode::Shared, AccessMode::Shared)
}

fn writes(a: AccessMode, b: AccessMode) -> bool {
    a != AccessMode::ReadOnly || b != AccessMode::ReadOnly
}

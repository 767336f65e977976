//! Disks of a running guest: attach, detach, snapshot, length.
//!
//! A snapshot is a restart of blkback: with the new image approved and its next command line set, the process is killed, and the
//! next one serves the new image on top of the old. The guest sees a pause; what was not answered at that moment goes to the new
//! image.

use std::path::{Path, PathBuf};
use std::time::Instant;

use proto::hvcore::resource::Kind;
use proto::hvcore::{Domain, DomainState};

use super::create::{conflicts, no_guest};
use super::{Change, Step, nothing, of_guest};
use crate::config::{DiskEntry, DiskLimits, DomainFile, UsbKind, check_disk, check_guest_files};
use crate::hv::{HvError, find_by_uuid, find_instance};
use crate::manager::{Manager, OpError};
use crate::specs;
use crate::state::{
    DiskChange, Guest, OwnDisk, Phase, RunningDomain, Saga, SagaKind, guest_uuid_text, private_backend_uuid,
    service_uuid,
};
use crate::xs_layout::{self, DevicePaths, XenbusState};

fn no_disk(guest: &str, vdev: &str) -> OpError {
    OpError::NotFound(format!("guest {guest} has no disk {vdev:?}; see bh block-list {guest}"))
}

fn index_of(guest: &Guest, entry: &DiskEntry) -> Option<usize> {
    guest.config.disk.iter().position(|disk| disk.vdev.number() == entry.vdev.number())
}

/// Whether QEMU itself serves this disk.
fn is_qdisk(guest: &Guest, vdev: &str) -> bool {
    guest.config.usbdev.iter().any(|e| e.kind == UsbKind::Qdisk && e.id == vdev)
}

impl Manager {
    /// Gives a running guest a disk.
    ///
    /// # Errors
    /// One line each; what was begun was undone.
    pub fn attach_disk(&self, guest: &str, entry: DiskEntry) -> Result<(), OpError> {
        entry.check().map_err(OpError::Invalid)?;
        let (name, id) = {
            let host = self.host();
            let mut inner = self.inner();
            let (name, record) = inner.state.find(guest).ok_or_else(|| no_guest(guest))?;
            let (name, mut probe) = (name.clone(), record.clone());
            let at = format!("guest {name}");
            self.may_change_devices(&inner.state, &name, &probe).map_err(|e| e.at(&at))?;
            if index_of(&probe, &entry).is_some() || is_qdisk(&probe, entry.vdev.name()) {
                return Err(OpError::Exists(format!("{at}: it has a disk {} already", entry.vdev.name())));
            }
            if probe.config.disk.len() >= 64 {
                return Err(OpError::Failed(format!("{at}: it has 64 disks, which is the most")));
            }
            // As a guest of its own with this disk alone, beside all others, this one included.
            let (vif, usbdev) = (Vec::new(), Vec::new());
            probe.config = DomainFile { disk: vec![entry.clone()], vif, usbdev, ..probe.config };
            probe.config.name =
                "new-disk".parse().map_err(|e: crate::config::ConfigError| OpError::Invalid(e.0))?;
            probe.uuid = uuid::Uuid::nil();
            if self.sees_host {
                check_guest_files(&probe.config).map_err(|e| OpError::Invalid(format!("{at}: {e}")))?;
            }
            self.check_disks(&probe.config).map_err(|e| e.at(&at))?;
            conflicts(&inner.state, &host, &probe).map_err(|e| e.at(&at))?;
            let change = DiskChange { entry: entry.clone(), next: None, force: false };
            let id = inner.change(|state| {
                if let Some(guest) = state.guests.get_mut(&name) {
                    guest.config.disk.push(entry);
                    guest.disk_backends.push(None);
                }
                state.begin_disk(&name, SagaKind::AttachDisk, change)
            })?;
            inner.active.insert(id);
            (name, id)
        };
        self.run_claimed(id).map_err(|e| e.at(&format!("guest {name}")))
    }

    /// Takes a disk from a running guest. Without `force` it waits for the guest to let go, and leaves it if it does not.
    ///
    /// # Errors
    /// One line each.
    pub fn detach_disk(&self, guest: &str, vdev: &str, force: bool) -> Result<(), OpError> {
        if self.state().find(guest).is_some_and(|(_, record)| is_qdisk(record, vdev)) {
            if force {
                let why = format!(
                    "guest {guest}: disk {vdev}: QEMU lets go of its own disks only with the guest; leave --force out"
                );
                return Err(OpError::Invalid(why));
            }
            return self.detach_usb(guest, vdev);
        }
        self.change_disk(guest, vdev, SagaKind::DetachDisk, |entry| {
            Ok(DiskChange { entry: entry.clone(), next: None, force })
        })
    }

    /// Puts the image `path`, a file that is empty, on top of a disk: what the disk was is its backing file.
    ///
    /// # Errors
    /// One line each; what was begun was undone.
    pub fn snapshot_disk(&self, guest: &str, vdev: &str, path: PathBuf) -> Result<(), OpError> {
        self.change_disk(guest, vdev, SagaKind::SnapshotDisk, |entry| {
            let next = entry.after_snapshot(&path).map_err(OpError::Failed)?;
            Ok(DiskChange { entry: entry.clone(), next: Some(next), force: false })
        })
    }

    /// Puts a disk's image into its backing file while the guest runs; the backing file is the disk then.
    ///
    /// # Errors
    /// One line each; what was begun was undone, and the disk is as it was.
    pub fn commit_disk(&self, guest: &str, vdev: &str) -> Result<(), OpError> {
        self.change_disk(guest, vdev, SagaKind::CommitDisk, |entry| {
            let next = entry.after_commit().map_err(OpError::Failed)?;
            Ok(DiskChange { entry: entry.clone(), next: Some(next), force: false })
        })
    }

    /// Puts a medium into a cdrom drive, in place of one that may be in it; or, with `None`, takes it out.
    ///
    /// # Errors
    /// One line each; what was begun was undone.
    pub fn change_medium(&self, guest: &str, vdev: &str, path: Option<PathBuf>) -> Result<(), OpError> {
        if let Some(path) = path.as_deref().filter(|_| self.sees_host) {
            check_disk("medium", path, false).map_err(|e| OpError::Invalid(e.0))?;
        }
        let change = |path: Option<&Path>| {
            self.change_disk(guest, vdev, SagaKind::ChangeMedium, |entry| {
                let next = entry.with_medium(path).map_err(OpError::Failed)?;
                Ok(DiskChange { entry: entry.clone(), next: Some(next), force: false })
            })
        };
        let full = self.state().find(guest).is_some_and(|(_, guest)| {
            guest.config.disk.iter().any(|d| d.vdev.name() == vdev && !d.is_empty_drive())
        });
        // The guest must see that the old one is gone, or it takes the new one's bytes for the old one's.
        if full && path.is_some() {
            change(None)?;
        }
        change(path.as_deref())
    }

    /// What a running guest may do with a disk in a second, from now on.
    ///
    /// # Errors
    /// One line each.
    pub fn limit_disk(&self, guest: &str, vdev: &str, limits: DiskLimits) -> Result<(), OpError> {
        limits.check().map_err(OpError::Invalid)?;
        let mut inner = self.inner();
        let (name, record) = inner.state.find(guest).ok_or_else(|| no_guest(guest))?;
        let (name, mut record) = (name.clone(), record.clone());
        self.may_change_devices(&inner.state, &name, &record).map_err(|e| e.at(&format!("guest {name}")))?;
        let index = record.config.disk.iter().position(|disk| disk.vdev.name() == vdev);
        let index = index.ok_or_else(|| no_disk(&name, vdev))?;
        let disk = &mut record.config.disk[index];
        DiskLimits {
            iops: disk.iops,
            iops_burst: disk.iops_burst,
            bandwidth: disk.bandwidth,
            bandwidth_burst: disk.bandwidth_burst,
        } = limits;
        inner.change(|state| {
            if let Some(guest) = state.guests.get_mut(&name) {
                guest.config = record.config.clone();
            }
        })?;
        drop(inner);
        if let Some(device) = device_of(&record, index) {
            self.store.apply(&xs_layout::limit_nodes(&device, &record.config.disk[index]))?;
        }
        Ok(())
    }

    fn change_disk(
        &self,
        guest: &str,
        vdev: &str,
        kind: SagaKind,
        change: impl FnOnce(&DiskEntry) -> Result<DiskChange, OpError>,
    ) -> Result<(), OpError> {
        let (name, id) = {
            let mut inner = self.inner();
            let (name, record) = inner.state.find(guest).ok_or_else(|| no_guest(guest))?;
            let at = format!("guest {name}");
            self.may_change_devices(&inner.state, name, record).map_err(|e| e.at(&at))?;
            let entry = record.config.disk.iter().find(|disk| disk.vdev.name() == vdev);
            let entry = entry.ok_or_else(|| no_disk(name, vdev))?;
            let change = change(entry).map_err(|e| e.at(&format!("{at}: disk {vdev}")))?;
            let name = name.clone();
            let id = inner.change(|state| state.begin_disk(&name, kind, change))?;
            inner.active.insert(id);
            (name, id)
        };
        self.run_claimed(id).map_err(|e| e.at(&format!("guest {name}: disk {vdev}")))
    }

    pub(super) fn may_change_devices(
        &self,
        state: &crate::state::State,
        name: &str,
        guest: &Guest,
    ) -> Result<(), OpError> {
        if state.saga_of(name).is_some() {
            return Err(OpError::Busy("another operation is under way; see bh list".into()));
        }
        if guest.domain.is_none() || guest.preserved.is_some() {
            return Err(OpError::Failed("it does not run".into()));
        }
        Ok(())
    }

    /// Makes a disk of a running guest `bytes` long.
    ///
    /// # Errors
    /// One line each.
    pub fn resize_disk(&self, guest: &str, vdev: &str, bytes: u64) -> Result<u64, OpError> {
        let (name, backend) = self.disk_backend(guest, vdev)?;
        let at = format!("guest {name}: disk {vdev}");
        self.hv.disk_bytes(&backend.control_socket, bytes).map_err(|e| OpError::from(e).at(&at))
    }

    /// Length of a disk, if its backend tells.
    pub fn disk_length(&self, guest: &str, vdev: &str) -> Result<u64, OpError> {
        let (_, backend) = self.disk_backend(guest, vdev)?;
        Ok(self.hv.disk_bytes(&backend.control_socket, 0)?)
    }

    fn disk_backend(&self, guest: &str, vdev: &str) -> Result<(String, Domain), OpError> {
        let state = self.state();
        let (name, record) = state.find(guest).ok_or_else(|| no_guest(guest))?;
        let index = record.config.disk.iter().position(|disk| disk.vdev.name() == vdev);
        let index = index.ok_or_else(|| no_disk(name, vdev))?;
        let own = record.disk_backends.get(index).cloned().flatten();
        let own =
            own.ok_or_else(|| OpError::Failed(format!("guest {name}: disk {vdev} has no backend yet")))?;
        let found = find_instance(&*self.hv, own.domid, own.instance)?;
        let gone =
            || OpError::Failed(format!("guest {name}: the backend of disk {vdev} is gone; see bh services"));
        Ok((name.clone(), found.ok_or_else(gone)?))
    }

    /// Brings an operation on a device of this guest to its end: another is waiting.
    pub(super) fn finish_device_operation(&self, guest: &str) -> Result<(), OpError> {
        let id = {
            let inner = self.inner();
            let Some((name, _)) = inner.state.find(guest) else { return Ok(()) };
            let found = inner.state.saga_of(name).filter(|(_, saga)| saga.kind.of_device()).map(|(id, _)| id);
            found.map(|id| (id, name.clone()))
        };
        if let Some((_, name)) = &id {
            self.known().stopping_disks.insert(name.clone());
        }
        let result = self.end_disk_operation(id.as_ref().map(|(id, _)| *id));
        if let Some((_, name)) = &id {
            self.known().stopping_disks.remove(name);
        }
        result
    }

    /// Somebody waits for the operation on a disk of this guest to end.
    fn stopping_disk(&self, guest: &str) -> bool {
        self.known().stopping_disks.contains(guest)
    }

    fn end_disk_operation(&self, id: Option<u64>) -> Result<(), OpError> {
        match id.map(|id| (id, self.run(id))) {
            Some((id, Err(OpError::Busy(_)))) => self.await_saga(id),
            // Undone is at an end too.
            Some((_, Err(OpError::Failed(_)) | Ok(()))) | None => Ok(()),
            Some((_, Err(e))) => Err(e),
        }
    }

    pub(super) fn disk_step(&self, step: Step, guest: &Guest, saga: &Saga) -> Result<Change, OpError> {
        let Some(change) = &saga.disk else { return Ok(nothing()) };
        let Some(index) = index_of(guest, &change.entry) else { return Ok(nothing()) };
        match step {
            Step::DiskBackend => self.disk_make_backend(guest, index),
            Step::DiskNodes => {
                if let Some(device) = device_of(guest, index)
                    && let Some(domain) = guest.domain
                    && self.store.read(&format!("{}/frontend-id", device.back))?.is_none()
                {
                    self.open_vhost(guest, &device)?;
                    self.store.apply(&xs_layout::nodes_of_one(guest, domain.domid, "vbd", device.id))?;
                }
                Ok(nothing())
            }
            Step::DiskReady => self.disk_ready(guest, index),
            Step::DiskUnplug => {
                // What is undone was attached by nobody else: it need not be asked for twice.
                self.disk_unplug(guest, index, change.force || saga.phase == Phase::Undo)
            }
            Step::DiskReplug => {
                if let Some(device) = device_of(guest, index)
                    && state_of(self, &device.back)? == XenbusState::Closing
                {
                    self.store.apply(&xs_layout::unplug_device(&device, true))?;
                }
                Ok(nothing())
            }
            Step::DiskRemoveNodes => {
                if let Some(device) = device_of(guest, index) {
                    self.close_vhost(guest, &device)?;
                    self.store.apply(&xs_layout::remove_both_ends(guest, &device))?;
                }
                Ok(nothing())
            }
            Step::DiskRemoveBackend => self.disk_remove_backend(guest, index),
            Step::DiskForget => {
                let number = change.entry.vdev.number();
                Ok(of_guest(move |guest| {
                    if let Some(index) = guest.config.disk.iter().position(|d| d.vdev.number() == number) {
                        guest.config.disk.remove(index);
                        if index < guest.disk_backends.len() {
                            guest.disk_backends.remove(index);
                        }
                    }
                }))
            }
            Step::SnapshotPrepare => {
                self.disk_settle(guest, index)?;
                self.disk_serve(guest, index, change.next.as_ref().unwrap_or(&change.entry), None)
            }
            Step::SnapshotSwitch => {
                self.disk_switch(guest, index)?;
                self.medium_seen(guest, index, saga)
            }
            Step::SnapshotBack => {
                let set = self.disk_serve(guest, index, &change.entry, None)?;
                let mut back = guest.clone();
                back.config.disk[index] = change.entry.clone();
                self.disk_switch(&back, index)?;
                let _nothing_else = self.medium_seen(&back, index, saga)?;
                Ok(set)
            }
            Step::CommitPrepare => {
                self.disk_settle(guest, index)?;
                self.disk_serve(guest, index, &change.entry, Some("--commit"))
            }
            Step::CommitWait => self.commit_wait(guest, index),
            Step::CommitPivot => self.disk_serve(
                guest,
                index,
                change.next.as_ref().unwrap_or(&change.entry),
                Some("--committed"),
            ),
            _ => Ok(nothing()),
        }
    }

    /// Everything that can be in the image is.
    fn disk_settle(&self, guest: &Guest, index: usize) -> Result<(), OpError> {
        let backend = self.own_backend(guest, index)?;
        if let Err(error) = self.hv.settle_disk(&backend.control_socket) {
            tracing::warn!(%error, "before the change");
        }
        Ok(())
    }

    /// After a medium was changed: the nodes say so, and the guest has been told before the next change.
    fn medium_seen(&self, guest: &Guest, index: usize, saga: &Saga) -> Result<Change, OpError> {
        if let Some(device) = device_of(guest, index).filter(|_| saga.kind == SagaKind::ChangeMedium) {
            let disk = &guest.config.disk[index];
            self.store.apply(&xs_layout::medium_nodes(&device, disk))?;
            let sectors = format!("{}/sectors", device.back);
            let began = Instant::now();
            // Only a connected device has been told anything. A guest that is slow learns it later.
            while began.elapsed() < self.timing.close
                && state_of(self, &device.back)? == XenbusState::Connected
                && self.store.read(&sectors)?.is_some_and(|told| (told == "0") != disk.is_empty_drive())
            {
                std::thread::sleep(self.timing.poll);
            }
        }
        Ok(nothing())
    }

    /// Waits for as long as it takes; a destroy of the guest ends it.
    fn commit_wait(&self, guest: &Guest, index: usize) -> Result<Change, OpError> {
        loop {
            if self.stopping_disk(guest.config.name.as_str()) {
                return Err(OpError::Failed("given up for another operation".into()));
            }
            let backend = self.own_backend(guest, index)?;
            match self.hv.disk_commit(&backend.control_socket) {
                Ok(commit) if !commit.failed.is_empty() => {
                    return Err(OpError::Failed(format!(
                        "its backing file cannot take it in: {}",
                        commit.failed
                    )));
                }
                Ok(commit) if commit.finished => return Ok(nothing()),
                Err(HvError::Gone) => return Err(OpError::Killed),
                Err(HvError::Refused(why)) => return Err(OpError::Failed(why)),
                // Not done, or its process is being restarted.
                Ok(_) | Err(_) => std::thread::sleep(self.timing.poll),
            }
        }
    }

    fn disk_make_backend(&self, guest: &Guest, index: usize) -> Result<Change, OpError> {
        let vdev = guest.config.disk[index].vdev.name();
        let name = guest.disk_backend_name(index);
        let private = guest.config.disk[index].has_own_backend();
        let (domain, uuid) = match specs::private_blkback(&self.host(), guest, index) {
            Some(request) => {
                let uuid = private_backend_uuid(&guest.uuid, vdev);
                (self.make_domain(&guest_uuid_text(&uuid), request), uuid)
            }
            None => (self.service_domain(&name), service_uuid(&name)),
        };
        let RunningDomain { domid, instance } = domain.map_err(|e| e.at(&format!("disk {vdev}")))?;
        self.make_home(RunningDomain { domid, instance }, &name, &guest_uuid_text(&uuid))?;
        Ok(of_guest(move |guest| {
            if let Some(slot) = guest.disk_backends.get_mut(index) {
                *slot = Some(OwnDisk { domid, instance, private });
            }
        }))
    }

    fn disk_ready(&self, guest: &Guest, index: usize) -> Result<Change, OpError> {
        if let Some(device) = device_of(guest, index) {
            self.taken_up(&device)?;
        }
        Ok(nothing())
    }

    /// Waits until a device's backend has taken it up.
    pub(super) fn taken_up(&self, device: &DevicePaths) -> Result<(), OpError> {
        let began = Instant::now();
        while !self.device_ready(device)? {
            if began.elapsed() > self.timing.ready {
                return Err(OpError::Failed(format!(
                    "{}: backend {} did not take it up within {} s; see bh services",
                    super::steps_do::label(device),
                    device.backend,
                    self.timing.ready.as_secs()
                )));
            }
            std::thread::sleep(self.timing.poll);
        }
        Ok(())
    }

    /// Asks both ends to let go and waits; with `force` only for a little.
    fn disk_unplug(&self, guest: &Guest, index: usize, force: bool) -> Result<Change, OpError> {
        if let Some(device) = device_of(guest, index) {
            let stays = "the guest does not let go of it (is it mounted?); unmount it there, or --force";
            self.let_go(&device, force, stays)?;
        }
        Ok(nothing())
    }

    /// Asks both ends of a device to let go and waits; with `force` only for a little. `stays`: what is said when they do not.
    pub(super) fn let_go(&self, device: &DevicePaths, force: bool, stays: &str) -> Result<(), OpError> {
        let over = |state| matches!(state, XenbusState::Unknown | XenbusState::Closed);
        if over(state_of(self, &device.back)?) {
            return Ok(());
        }
        self.store.apply(&xs_layout::unplug_device(device, false))?;
        let began = Instant::now();
        let patience = if force { self.timing.close } else { self.timing.ready };
        loop {
            if over(state_of(self, &device.back)?) {
                return Ok(());
            }
            if began.elapsed() > patience {
                return if force { Ok(()) } else { Err(OpError::Failed(stays.into())) };
            }
            std::thread::sleep(self.timing.poll);
        }
    }

    fn disk_remove_backend(&self, guest: &Guest, index: usize) -> Result<Change, OpError> {
        let disk = &guest.config.disk[index];
        if !disk.has_own_backend() {
            return Ok(nothing());
        }
        let uuid = guest_uuid_text(&private_backend_uuid(&guest.uuid, disk.vdev.name()));
        if let Some(domain) = find_by_uuid(&*self.hv, &uuid)? {
            let RunningDomain { domid, instance } = super::numbers(&domain)?;
            if domain.state() != DomainState::Dying {
                match self.hv.destroy(domid, instance) {
                    Ok(()) | Err(HvError::NotFound) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            self.store.apply(&xs_layout::remove_service_nodes(domid))?;
            self.known().homes.remove(&(domid, instance));
        } else if let Some(own) = guest.disk_backends.get(index).cloned().flatten() {
            // Destroyed before a kill.
            let all = self.hv.list()?;
            if !all.iter().any(|d| d.domid == u32::from(own.domid)) {
                self.store.apply(&xs_layout::remove_service_nodes(own.domid))?;
            }
        }
        Ok(nothing())
    }

    fn own_backend(&self, guest: &Guest, index: usize) -> Result<Domain, OpError> {
        let uuid = private_backend_uuid(&guest.uuid, guest.config.disk[index].vdev.name());
        let found = find_by_uuid(&*self.hv, &guest_uuid_text(&uuid))?;
        found.ok_or_else(|| OpError::Failed("its backend is gone; see bh services".into()))
    }

    /// Sets what the backend's next process serves. Resources first: names and resources belong together by a hash, so that a process
    /// that is killed between the two calls finds what its command line names.
    fn disk_serve(
        &self,
        guest: &Guest,
        index: usize,
        entry: &DiskEntry,
        how: Option<&str>,
    ) -> Result<Change, OpError> {
        let backend = self.own_backend(guest, index)?;
        let RunningDomain { domid, instance } = super::numbers(&backend)?;
        let mut next = guest.clone();
        next.config.disk[index] = entry.clone();
        let mut request = specs::private_blkback(&self.host(), &next, index)
            .ok_or_else(|| OpError::Failed("it has no backend of its own".into()))?;
        request.args.extend(how.map(str::to_owned));
        // What was written until now has changes of its tables in blkback's log, which go to it once it is a backing file; and what
        // is committed goes there.
        if let Some(below) = entry.backing.first() {
            let name = domain_kit::resource_of("disk", &below.path.display().to_string());
            request
                .resources
                .iter_mut()
                .filter(|r| r.name == name)
                .for_each(|r| r.kind = Kind::FileRw.into());
        }
        self.hv.approve(domid, instance, request.resources.clone(), Vec::new())?;
        self.hv.update(domid, instance, request)?;
        let entry = entry.clone();
        Ok(of_guest(move |guest| {
            if let Some(slot) = guest.config.disk.get_mut(index) {
                *slot = entry;
            }
        }))
    }

    /// Ends the backend's process and waits until the next one has its disk.
    fn disk_switch(&self, guest: &Guest, index: usize) -> Result<(), OpError> {
        let backend = self.own_backend(guest, index)?;
        let RunningDomain { domid, instance } = super::numbers(&backend)?;
        self.hv.kill(domid, instance, 9)?;
        let began = Instant::now();
        loop {
            let now = find_instance(&*self.hv, domid, instance)?
                .ok_or_else(|| OpError::Failed("its backend is gone; see bh services".into()))?;
            if now.generation > backend.generation && now.state() == DomainState::Running {
                match self.hv.disk_bytes(&now.control_socket, 0) {
                    Ok(_) => return Ok(()),
                    Err(HvError::Refused(why)) => return Err(OpError::Failed(why)),
                    Err(HvError::Gone) => return Err(OpError::Killed),
                    Err(_) => {}
                }
            }
            if began.elapsed() > self.timing.ready {
                return Err(OpError::Failed("its backend does not come back; see bh services".into()));
            }
            std::thread::sleep(self.timing.poll);
        }
    }
}

fn device_of(guest: &Guest, index: usize) -> Option<DevicePaths> {
    let number = guest.config.disk[index].vdev.number();
    xs_layout::device_paths(guest).into_iter().find(|device| device.kind == "vbd" && device.id == number)
}

fn state_of(manager: &Manager, dir: &str) -> Result<XenbusState, OpError> {
    Ok(XenbusState::parse(manager.store.read(&format!("{dir}/state"))?.as_deref()))
}

//! What `bh` is shown: desired state, hv-core's table and the store put together.

use proto::hvcore::{Domain, DomainState, Role};
use proto::toolstack::{Device, Disk, Failure, Guest as GuestView, InfoReply, ServiceInfo, Vif};

use crate::config::{GuestType, UsbKind};
use crate::manager::{Manager, OpError};
use crate::specs;
use crate::state::{Guest, Phase, SagaKind, State, private_backend_name, private_backend_uuid};
use crate::xs_layout::{self, DevicePaths, XenbusState, device_paths};

/// Failed operations that are told at a glance.
const FAILURES: usize = 5;

/// hv-core's word for a state.
fn state_word(state: DomainState) -> &'static str {
    match state {
        DomainState::Created => "created",
        DomainState::Running => "running",
        DomainState::Restarting => "restarting",
        DomainState::Failed => "failed",
        DomainState::Shutdown => "shutdown",
        DomainState::Dying => "dying",
    }
}

impl Manager {
    /// Guests, or the one that is named.
    ///
    /// # Errors
    /// `NotFound`; hv-core's.
    pub fn guests(&self, which: Option<&str>) -> Result<Vec<GuestView>, OpError> {
        let state = self.state();
        let domains = self.hv.list()?;
        let mut out: Vec<GuestView> = match which {
            Some(text) => match state.find(text) {
                Some((name, guest)) => vec![self.guest_view(&state, name, guest, &domains)],
                None => {
                    vec![unmanaged(&self.find_unmanaged(text)?.ok_or_else(|| crate::ops::no_guest(text))?)]
                }
            },
            None => state.guests.iter().map(|(name, g)| self.guest_view(&state, name, g, &domains)).collect(),
        };
        if which.is_none() {
            out.extend(domains.iter().filter(|d| is_guest(d) && !recorded(&state, d)).map(unmanaged));
        }
        out.sort_by_key(|g| (g.domid == 0, g.domid));
        Ok(out)
    }

    fn guest_view(&self, state: &State, name: &str, guest: &Guest, domains: &[Domain]) -> GuestView {
        let domain = guest.domain.and_then(|running| {
            domains.iter().find(|d| d.domid == u32::from(running.domid) && d.instance == running.instance)
        });
        let saga = state.saga_of(name).map(|(_, saga)| saga).filter(|saga| !saga.kind.of_device());
        let word = match (saga, domain.map(Domain::state)) {
            (Some(saga), _) if saga.phase == Phase::Undo || saga.kind == SagaKind::Destroy => "destroying",
            (Some(saga), _) if saga.kind == SagaKind::Reboot => "rebooting",
            (Some(_), _) => "creating",
            (None, Some(DomainState::Failed)) => "crashed",
            (None, Some(DomainState::Shutdown))
                if domain.is_some_and(|d| d.shutdown_reason == xen_abi::sched::SHUTDOWN_CRASH) =>
            {
                "crashed"
            }
            (None, Some(s)) => domain.and_then(|d| self.qemu_word(guest, d)).unwrap_or(state_word(s)),
            (None, None) => "gone",
        };
        let note = match (saga, &guest.preserved) {
            (Some(saga), _) => saga.why.clone().unwrap_or_default(),
            (None, Some(note)) => note.clone(),
            (None, None) => String::new(),
        };
        GuestView {
            name: name.into(),
            uuid: guest.uuid.to_string(),
            domid: guest.domain.map_or(0, |d| d.domid.into()),
            instance: guest.domain.map_or(0, |d| d.instance),
            state: word.into(),
            r#type: match guest.config.guest_type {
                GuestType::Pvh => "pvh".into(),
                GuestType::Process => "process".into(),
                // Named where everybody looks: its backends see more than a PVH guest's.
                GuestType::Qemu if guest.config.whole_memory => "qemu (whole memory)".into(),
                GuestType::Qemu => "qemu".into(),
            },
            generation: domain.map_or(0, |d| d.generation),
            restarts: domain.map_or(0, |d| d.restarts),
            host_pid: domain.map_or(0, |d| d.host_pid),
            vcpus: if guest.config.guest_type != GuestType::Process { guest.vcpus_now() } else { 0 },
            memory_bytes: guest.memory_mib() << 20,
            devices: self.device_views(guest),
            created_unix_ms: guest.created_unix_ms,
            note,
            boots: guest.boots,
        }
    }

    /// A guest's disks.
    ///
    /// # Errors
    /// `NotFound`; hv-core's.
    pub fn disks(&self, guest: &str) -> Result<Vec<Disk>, OpError> {
        let served_by_qemu = self.usb(guest)?.into_iter().filter(|(entry, _)| entry.kind == UsbKind::Qdisk);
        let state = self.state();
        let (name, guest) = state.find(guest).ok_or_else(|| crate::ops::no_guest(guest))?;
        let devices = self.device_views(guest);
        let disks = guest.config.disk.iter().enumerate().map(|(index, disk)| {
            let device = devices.iter().find(|d| d.r#type == "vbd" && d.id == disk.vdev.number());
            let length = self.disk_length(name, disk.vdev.name());
            let files = disk.files().into_iter().map(|file| format!("{}:{}", file.format, file.name));
            Disk {
                vdev: disk.vdev.name().into(),
                backend: guest.disk_backend_name(index),
                files: files.collect(),
                mode: disk.mode.word().into(),
                bytes: *length.as_ref().unwrap_or(&0),
                frontend_state: device.map(|d| d.frontend_state.clone()).unwrap_or_default(),
                backend_state: device.map(|d| d.backend_state.clone()).unwrap_or_default(),
                note: self.disk_note(guest, disk.vdev.number(), length.err()),
            }
        });
        let by_qemu = served_by_qemu.map(|(entry, said)| Disk {
            vdev: entry.id.clone(),
            backend: "qemu".into(),
            files: entry
                .disk()
                .map(|path| format!("{}:{}", entry.format.word(), path.display()))
                .into_iter()
                .collect(),
            mode: entry.mode.word().into(),
            note: said,
            ..Disk::default()
        });
        Ok(disks.chain(by_qemu).collect())
    }

    /// What is wrong with a disk, as its backend's error node, the guest's, or the backend itself says.
    fn disk_note(&self, guest: &Guest, number: u32, unknown_length: Option<OpError>) -> String {
        let devices = device_paths(guest);
        let device = devices.iter().find(|d| d.kind == "vbd" && d.id == number);
        let said = |path: String| self.store.read(&path).ok().flatten().filter(|text| !text.is_empty());
        // What was wrong with a device that works now is no news: a process that found it working left the node alone.
        let works = |d: &&DevicePaths| {
            [&d.front, &d.back].iter().all(|end| said(format!("{end}/state")).as_deref() == Some("4"))
        };
        let by_backend = device.filter(|d| !works(d)).and_then(|d| said(xs_layout::device_error_path(d)));
        // Not an error: it goes on by itself.
        let stopped = device.and_then(|d| said(format!("{}/stopped", d.back)));
        let by_guest = device
            .and_then(|d| said(xs_layout::frontend_error_path(d)))
            // The guest's own words: one line of them.
            .map(|text| {
                format!("the guest says: {}", text.chars().take(200).collect::<String>())
                    .replace(char::is_control, " ")
            });
        let length = unknown_length.map(|e| e.to_string());
        by_backend.or(stopped).or(length).or(by_guest).unwrap_or_default()
    }

    /// The network devices of a guest.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn vifs(&self, guest: &str) -> Result<Vec<Vif>, OpError> {
        let state = self.state();
        let (_, guest) = state.find(guest).ok_or_else(|| crate::ops::no_guest(guest))?;
        let devices = self.device_views(guest);
        let vifs = guest.config.vif.iter().enumerate().map(|(index, vif)| {
            let devid = guest.vif_device(index);
            let device = devices.iter().find(|d| d.r#type == "vif" && d.id == devid);
            Vif {
                id: guest.vif_id(index),
                devid,
                backend: vif.backend.to_string(),
                mac: guest.mac(index).to_string(),
                ip: vif.ip.iter().map(ToString::to_string).collect(),
                frontend_state: device.map(|d| d.frontend_state.clone()).unwrap_or_default(),
                backend_state: device.map(|d| d.backend_state.clone()).unwrap_or_default(),
                link: vif.link,
            }
        });
        Ok(vifs.collect())
    }

    fn device_views(&self, guest: &Guest) -> Vec<Device> {
        // A store that does not answer costs this view the states, not the list.
        let read = |path: String| {
            let text = self.store.read(&path).ok().flatten();
            XenbusState::parse(text.as_deref()).word().to_owned()
        };
        let devices = device_paths(guest);
        devices
            .iter()
            .map(|d| Device {
                r#type: d.kind.into(),
                name: d.name.clone(),
                id: d.id,
                backend: d.backend.clone(),
                backend_domid: d.backend_domid.into(),
                frontend_state: read(format!("{}/state", d.front)),
                backend_state: read(format!("{}/state", d.back)),
                mac: guest
                    .vif_index_of_device(d.id)
                    .filter(|_| d.kind == "vif")
                    .map(|index| guest.mac(index).to_string())
                    .unwrap_or_default(),
                path: disk_path(guest, d.kind, d.id),
            })
            .collect()
    }

    /// Services: those of the host file, guests' own backends, dom0 itself, and what else runs that is no guest.
    ///
    /// # Errors
    /// hv-core's.
    pub fn services(&self) -> Result<Vec<ServiceInfo>, OpError> {
        let state = self.state();
        let domains = self.hv.list()?;
        let mut out = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for service in specs::services(&self.host()) {
            let domain = domains.iter().find(|d| d.uuid.eq_ignore_ascii_case(&service.request.uuid));
            seen.extend(domain.map(|d| d.instance));
            let note = self.service_note(&service.name, domain.is_none());
            out.push(self.service_view(
                &service.name,
                service.kind.word(),
                domain,
                &service.request.uuid,
                note,
            ));
        }
        for (name, guest) in &state.guests {
            for disk in guest.config.disk.iter().filter(|d| d.has_own_backend()) {
                let uuid = private_backend_uuid(&guest.uuid, disk.vdev.name()).to_string();
                let domain = domains.iter().find(|d| d.uuid.eq_ignore_ascii_case(&uuid));
                seen.extend(domain.map(|d| d.instance));
                let backend = private_backend_name(name, disk.vdev.name());
                let mut view = self.service_view(&backend, "blkback", domain, &uuid, String::new());
                view.guest = name.clone();
                out.push(view);
            }
        }
        for (name, guest) in state.guests.iter().filter(|(_, g)| g.config.guest_type == GuestType::Qemu) {
            let uuid = crate::specs_qemu::emulator_uuid(&guest.uuid).to_string();
            let Some(domain) = domains.iter().find(|d| d.uuid.eq_ignore_ascii_case(&uuid)) else { continue };
            seen.insert(domain.instance);
            let mut view = self.service_view(&domain.name, "qemu", Some(domain), &uuid, String::new());
            view.guest = name.clone();
            out.push(view);
        }
        for domain in &domains {
            if seen.contains(&domain.instance) || is_guest(domain) {
                continue;
            }
            let (name, kind, note) = match domain.domid {
                0 => ("dom0-supervisor", "dom0", String::new()),
                _ => (domain.name.as_str(), "other", self.service_note(&domain.name, false)),
            };
            out.push(self.service_view(name, kind, Some(domain), &domain.uuid, note));
        }
        out.sort_by_key(|s| (s.state == "missing", s.domid));
        Ok(out)
    }

    fn service_view(
        &self,
        name: &str,
        kind: &str,
        domain: Option<&Domain>,
        uuid: &str,
        note: String,
    ) -> ServiceInfo {
        let mut view = ServiceInfo {
            name: name.into(),
            kind: kind.into(),
            uuid: uuid.into(),
            note,
            ..ServiceInfo::default()
        };
        match domain {
            None => view.state = "missing".into(),
            Some(domain) => {
                view.domid = domain.domid;
                view.instance = domain.instance;
                view.state = state_word(domain.state()).into();
                view.generation = domain.generation;
                view.restarts = domain.restarts;
                view.host_pid = domain.host_pid;
                view.last_exit = domain.last_exit.clone();
                view.created_unix_ms = domain.created_unix_ms;
                if domain.state() == DomainState::Failed && view.note.is_empty() {
                    view.note = format!("{}; bh restart {name} starts it again", self.end_of(domain));
                }
            }
        }
        view
    }

    /// Host and state, at a glance.
    ///
    /// # Errors
    /// hv-core's.
    pub fn info(&self) -> Result<InfoReply, OpError> {
        let version = self.hv.version()?;
        let state = self.state();
        let services = self.services()?;
        let bad = services.iter().filter(|s| matches!(s.state.as_str(), "missing" | "failed"));
        Ok(InfoReply {
            version: env!("CARGO_PKG_VERSION").into(),
            hvcore_version: version.version,
            hvcore_pid: version.host_pid,
            missing: version.missing,
            memory_total_bytes: version.memory_total_bytes,
            memory_free_bytes: version.memory_free_bytes,
            guests: state.guests.len() as u32,
            services: services.len() as u32,
            failed_services: bad.map(|s| s.name.clone()).collect(),
            problems: services
                .iter()
                .filter(|s| !s.note.is_empty())
                .map(|s| format!("service {}: {}", s.name, s.note))
                .collect(),
            failures: state
                .failures
                .iter()
                .rev()
                .take(FAILURES)
                .map(|f| Failure { unix_ms: f.unix_ms, guest: f.guest.clone(), what: f.what.clone() })
                .collect(),
            host_file: String::new(),
            state_dir: self.host().state_dir.display().to_string(),
            dom0_generation: services.iter().find(|s| s.kind == "dom0").map_or(0, |s| s.generation),
            operations: state.sagas.values().map(describe).collect(),
        })
    }
}

fn describe(saga: &crate::state::Saga) -> String {
    let kind = match (saga.phase, saga.kind) {
        (Phase::Undo, _) => "undoing",
        (Phase::Do, SagaKind::AttachDisk) => "attaching a disk to",
        (_, SagaKind::DetachDisk) => "detaching a disk from",
        (_, SagaKind::SnapshotDisk) => "making a snapshot for",
        (_, SagaKind::CommitDisk) => "committing an image of",
        (_, SagaKind::ChangeMedium) => "changing a medium of",
        (Phase::Do, SagaKind::AttachVif) => "attaching a vif to",
        (_, SagaKind::DetachVif) => "detaching a vif from",
        (_, SagaKind::MoveVif) => "moving a vif of",
        (Phase::Do, SagaKind::AttachUsb) => "attaching a USB device to",
        (_, SagaKind::DetachUsb) => "detaching a USB device from",
        (_, SagaKind::Create) => "creating",
        (_, SagaKind::Destroy) => "destroying",
        (_, SagaKind::Reboot) => "rebooting",
    };
    format!("{kind} guest {}, {} of {} steps done", saga.guest, saga.step, crate::ops::steps(saga).len())
}

fn disk_path(guest: &Guest, kind: &str, id: u32) -> String {
    let disk = guest.config.disk.iter().find(|d| kind == "vbd" && d.vdev.number() == id);
    let files = disk.map(|d| d.files()).unwrap_or_default();
    files.into_iter().map(|file| file.name).collect::<Vec<_>>().join(" <- ")
}

pub(crate) fn is_guest(domain: &Domain) -> bool {
    domain.roles.iter().any(|r| *r == Role::Pvh as i32 || *r == Role::ProcessGuest as i32)
}

pub(crate) fn recorded(state: &State, domain: &Domain) -> bool {
    state.guests.values().any(|g| domain.uuid.eq_ignore_ascii_case(&g.uuid.to_string()))
}

/// A guest that runs without a record: the state directory was lost. It can be looked at and destroyed.
fn unmanaged(domain: &Domain) -> GuestView {
    GuestView {
        name: domain.name.clone(),
        uuid: domain.uuid.clone(),
        domid: domain.domid,
        instance: domain.instance,
        state: "unmanaged".into(),
        r#type: if domain.ram_bytes > 0 { "pvh".into() } else { "process".into() },
        generation: domain.generation,
        restarts: domain.restarts,
        host_pid: domain.host_pid,
        memory_bytes: domain.ram_bytes,
        created_unix_ms: domain.created_unix_ms,
        note: "no record of it: the state directory was lost; bh destroy and bh create make it anew".into(),
        ..GuestView::default()
    }
}

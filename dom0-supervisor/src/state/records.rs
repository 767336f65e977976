//! What the state file holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::{DiskEntry, DiskSource, DomainFile, GuestType, Mac, Name, UsbEntry};

/// Everything that must outlive dom0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Guests by name.
    pub guests: BTreeMap<String, Guest>,
    /// Operations under way, by number.
    pub sagas: BTreeMap<u64, Saga>,
    /// What services were made of, by name.
    pub services: BTreeMap<String, MadeOf>,
    /// Number of the next operation.
    pub next_saga: u64,
    /// The last failed operations, newest last, at most [`State::MAX_FAILURES`].
    pub failures: Vec<Failure>,
}

/// What a service's domain was made of, as fingerprints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeOf {
    /// hv-core's serial number of its creation.
    pub instance: u64,
    /// What holds for the life of its domain.
    pub life: Uuid,
    /// All of it.
    pub all: Uuid,
}

/// A guest that dom0 wants to exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Its domain file.
    pub config: DomainFile,
    /// Its identity, for all of its domains.
    pub uuid: Uuid,
    /// Its domain of now.
    #[serde(default)]
    pub domain: Option<RunningDomain>,
    /// The driver domain of each disk, in the order of `config.disk`; `None` until it is known.
    #[serde(default)]
    pub disk_backends: Vec<Option<OwnDisk>>,
    /// The driver domain of each vif, in the order of `config.vif`.
    #[serde(default)]
    pub vif_backends: Vec<Option<u16>>,
    /// Numbers in the store of the vifs whose domain of now knows them by another than their own, by that.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vif_devices: BTreeMap<u32, u32>,
    /// The number in the store of the vif that its domain of now lost last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vif_gone: Option<u32>,
    /// Unix time, milliseconds.
    pub created_unix_ms: u64,
    /// How often it was started.
    #[serde(default)]
    pub boots: u32,
    /// When its domain of now was made, unix milliseconds.
    #[serde(default)]
    pub started_unix_ms: u64,
    /// Starts in a row that ended within seconds.
    #[serde(default)]
    pub quick_ends: u32,
    /// How it ended, if it is preserved for looking at.
    #[serde(default)]
    pub preserved: Option<String>,
    /// The file of a saved guest that its first domain goes on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<PathBuf>,
    /// MiB that it was given while it ran; as its file says if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Processors that it was given while it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
}

/// A domain by number and creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningDomain {
    /// Its domid.
    pub domid: u16,
    /// hv-core's serial number of its creation.
    pub instance: u64,
}

/// The backend of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnDisk {
    /// The driver domain.
    pub domid: u16,
    /// Its creation.
    pub instance: u64,
    /// It was made for this guest and goes with it.
    pub private: bool,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SagaKind {
    /// Make and start a guest.
    Create,
    /// Remove a guest.
    Destroy,
    /// Give a guest a new domain.
    Reboot,
    /// Give a running guest a disk.
    AttachDisk,
    /// Take a disk from a running guest.
    DetachDisk,
    /// Put a new image on top of a running guest's disk.
    SnapshotDisk,
    /// Put a running guest's image into its backing file, which is the disk then.
    CommitDisk,
    /// Put a medium into a running guest's drive, or take it out.
    ChangeMedium,
    /// Give a running guest a network device.
    AttachVif,
    /// Take a network device from a running guest.
    DetachVif,
    /// Move a network device of a running guest to another driver domain.
    MoveVif,
    /// Give a running guest a USB device.
    AttachUsb,
    /// Take a USB device from a running guest.
    DetachUsb,
}

impl SagaKind {
    /// It is about one device of a guest that stays as it is otherwise.
    pub fn of_device(self) -> bool {
        !matches!(self, SagaKind::Create | SagaKind::Destroy | SagaKind::Reboot)
    }
}

/// Where an operation goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// To its end.
    Do,
    /// Back: what was done is taken away again.
    Undo,
}

/// An operation of several steps. `step` steps are done (or, in [`Phase::Undo`], undone) for certain; the next one may have been
/// begun, so every step can be carried out again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saga {
    /// Which guest.
    pub guest: String,
    /// What.
    pub kind: SagaKind,
    /// Where to.
    pub phase: Phase,
    /// Steps behind it.
    pub step: usize,
    /// Why it is undone, or why a guest is destroyed.
    #[serde(default)]
    pub why: Option<String>,
    /// What a disk's operation is about.
    #[serde(default)]
    pub disk: Option<DiskChange>,
    /// What a network device's operation is about.
    #[serde(default)]
    pub vif: Option<VifChange>,
    /// The USB device that an operation is about.
    #[serde(default)]
    pub usb: Option<UsbEntry>,
}

/// What an operation on a network device changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VifChange {
    /// The device's number.
    pub id: u32,
    /// The driver domain that it is to have, or has.
    pub backend: Name,
    /// The one that it had before a move.
    #[serde(default)]
    pub former: Option<Name>,
    /// Do not wait for the guest to let go.
    #[serde(default)]
    pub force: bool,
}

/// What an operation on a disk changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskChange {
    /// The disk as it was, or as it is attached.
    pub entry: DiskEntry,
    /// The disk as it is after a snapshot, a commit, or with another medium.
    #[serde(default)]
    pub next: Option<DiskEntry>,
    /// Do not wait for the guest to let go.
    #[serde(default)]
    pub force: bool,
}

/// An operation that failed and was undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Unix time, milliseconds.
    pub unix_ms: u64,
    /// Which guest.
    pub guest: String,
    /// One line.
    pub what: String,
}

impl State {
    /// Failures kept.
    pub const MAX_FAILURES: usize = 32;

    /// The operation under way on a guest.
    pub fn saga_of(&self, guest: &str) -> Option<(u64, &Saga)> {
        self.sagas.iter().find(|(_, saga)| saga.guest == guest).map(|(id, saga)| (*id, saga))
    }

    /// Begins an operation; the caller saves.
    pub fn begin(&mut self, guest: &str, kind: SagaKind, why: Option<String>) -> u64 {
        let id = self.next_saga;
        self.next_saga += 1;
        let guest = guest.to_owned();
        let saga = Saga { guest, kind, phase: Phase::Do, step: 0, why, disk: None, vif: None, usb: None };
        self.sagas.insert(id, saga);
        id
    }

    /// Begins an operation on a disk; the caller saves.
    pub fn begin_disk(&mut self, guest: &str, kind: SagaKind, disk: DiskChange) -> u64 {
        let id = self.begin(guest, kind, None);
        if let Some(saga) = self.sagas.get_mut(&id) {
            saga.disk = Some(disk);
        }
        id
    }

    /// Begins an operation on a network device; the caller saves.
    pub fn begin_vif(&mut self, guest: &str, kind: SagaKind, vif: VifChange) -> u64 {
        let id = self.begin(guest, kind, None);
        if let Some(saga) = self.sagas.get_mut(&id) {
            saga.vif = Some(vif);
        }
        id
    }

    /// Begins an operation on a USB device; the caller saves.
    pub fn begin_usb(&mut self, guest: &str, kind: SagaKind, usb: UsbEntry) -> u64 {
        let id = self.begin(guest, kind, None);
        if let Some(saga) = self.sagas.get_mut(&id) {
            saga.usb = Some(usb);
        }
        id
    }

    /// Notes a failure, forgetting the oldest beyond the limit.
    pub fn note_failure(&mut self, guest: &str, what: String, unix_ms: u64) {
        if self.failures.len() >= Self::MAX_FAILURES {
            self.failures.remove(0);
        }
        self.failures.push(Failure { unix_ms, guest: guest.to_owned(), what });
    }

    /// Finds a guest by name, domid in decimal, or uuid.
    pub fn find(&self, text: &str) -> Option<(&String, &Guest)> {
        if let Some(found) = self.guests.get_key_value(text) {
            return Some(found);
        }
        if let Ok(domid) = text.parse::<u16>() {
            return self.guests.iter().find(|(_, g)| g.domain.is_some_and(|d| d.domid == domid));
        }
        let uuid = text.parse::<Uuid>().ok()?;
        self.guests.iter().find(|(_, g)| g.uuid == uuid)
    }
}

impl Guest {
    /// A guest that was not started yet.
    pub fn new(config: DomainFile, unix_ms: u64) -> Guest {
        let uuid = config.uuid.unwrap_or_else(random_uuid);
        Guest {
            uuid,
            domain: None,
            disk_backends: vec![None; config.disk.len()],
            vif_backends: vec![None; config.vif.len()],
            vif_devices: BTreeMap::new(),
            vif_gone: None,
            created_unix_ms: unix_ms,
            boots: 0,
            started_unix_ms: 0,
            quick_ends: 0,
            preserved: None,
            restore: None,
            memory: None,
            vcpus: None,
            config,
        }
    }

    /// RAM that it has or is to have, MiB.
    pub fn memory_mib(&self) -> u64 {
        self.memory.or(self.config.memory).unwrap_or(0)
    }

    /// Processors that it has or is to have.
    pub fn vcpus_now(&self) -> u32 {
        self.vcpus.unwrap_or_else(|| self.config.vcpus())
    }

    /// Name of the driver domain of disk `index`.
    pub fn disk_backend_name(&self, index: usize) -> String {
        let disk = &self.config.disk[index];
        match disk.source() {
            Some(DiskSource::Service(name)) => name.to_string(),
            _ => private_backend_name(self.config.name.as_str(), disk.vdev.name()),
        }
    }

    /// Ethernet address of vif `index`.
    pub fn mac(&self, index: usize) -> Mac {
        self.config.vif[index].mac.unwrap_or_else(|| Mac::generated(&self.uuid, self.vif_id(index)))
    }

    /// Number of vif `index`.
    pub fn vif_id(&self, index: usize) -> u32 {
        self.config.vif[index].devid.unwrap_or(index as u32)
    }

    /// Where the vif of this number is in the list.
    pub fn vif_index(&self, id: u32) -> Option<usize> {
        (0..self.config.vif.len()).find(|&index| self.vif_id(index) == id)
    }

    /// Number in the store of vif `index`: its own, unless it was moved, or came when another one had that.
    pub fn vif_device(&self, index: usize) -> u32 {
        let id = self.vif_id(index);
        self.vif_devices.get(&id).copied().unwrap_or(id)
    }

    /// Where the vif with this number in the store is in the list.
    pub fn vif_index_of_device(&self, device: u32) -> Option<usize> {
        (0..self.config.vif.len()).find(|&index| self.vif_device(index) == device)
    }

    /// Gives the vif of this number a new number in the store: `wanted`, or else the lowest, that no vif has and the last one that went
    /// did not have. A guest may not have looked at the removal yet, and nothing in xenbus says when it has: it would take a new device
    /// of the same number for the old one. qemu-bridge, whose numbers are QEMU's too, keeps them.
    pub fn renumber_vif(&mut self, id: u32, wanted: Option<u32>) {
        if self.config.guest_type == GuestType::Qemu {
            return;
        }
        let others: Vec<u32> = (0..self.config.vif.len())
            .filter(|&index| self.vif_id(index) != id)
            .map(|index| self.vif_device(index))
            .collect();
        let free = |number: &u32| !others.contains(number) && self.vif_gone != Some(*number);
        let Some(device) = wanted.into_iter().chain(0..).find(free) else { return };
        if device == id {
            self.vif_devices.remove(&id);
        } else {
            self.vif_devices.insert(id, device);
        }
    }
}

/// A random (version 4) uuid. std's hasher keys come from the kernel by system call; the usual crates look for /dev/random,
/// which a sandbox has not.
fn random_uuid() -> Uuid {
    use std::hash::{BuildHasher, RandomState};
    let half = || RandomState::new().hash_one(std::time::Instant::now()).to_ne_bytes();
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&half());
    bytes[8..].copy_from_slice(&half());
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

const SERVICES: Uuid = Uuid::from_u128(0x6275_6c6b_6865_6164_0000_7365_7276_6963);

/// The uuid of a service's domain: always the same, so that the next dom0 finds it.
pub fn service_uuid(name: &str) -> Uuid {
    Uuid::new_v5(&SERVICES, name.as_bytes())
}

/// The uuid of a guest's own driver domain.
pub fn private_backend_uuid(guest: &Uuid, vdev: &str) -> Uuid {
    Uuid::new_v5(guest, format!("blkback-{vdev}").as_bytes())
}

/// The name of a guest's own driver domain.
pub fn private_backend_name(guest: &str, vdev: &str) -> String {
    format!("blkback-{guest}-{vdev}")
}

/// As hv-core and xenstore spell it.
pub fn guest_uuid_text(uuid: &Uuid) -> String {
    uuid.hyphenated().to_string()
}

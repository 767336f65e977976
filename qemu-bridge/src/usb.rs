//! USB devices that QEMU emulates, and virtio disks that it serves itself: plugged and unplugged as the toolstack's nodes have them.
//!
//! ```text
//!   usb/ID = "tablet", "keyboard", "mouse",                        the toolstack's
//!            "disk FORMAT MODE RESOURCE", "qdisk …" (no USB: virtio)
//!   data/usb/ID = "plugged", or why not                            ours; gone when the device is
//! ```
//! What is plugged is asked of QEMU, never remembered. A disk's file is opened by hv-core, locked here (the lock is that of the open file, which
//! QEMU shares from then on), and handed to QEMU's own block layer as a descriptor. A plug that fails half-way is taken back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;

use domain_kit::xs::{XsClient, XsError, XsOps};
use domain_kit::{HvError, Hypercall};
use serde_json::{Value, json};

use crate::devices::free_port;
use crate::qmp::{Qmp, QmpError};

/// QEMU's name of the controller, as its command line has it.
const CONTROLLER: &str = "xhci";
/// The toolstack's nodes, below the domain's home.
const WANTED: &str = "usb";
/// Ours.
const SAID: &str = "data/usb";
/// Before an identifier, in QEMU's names.
const PREFIX: &str = "usb-";
/// Behind it, for the block layer's node.
const NODE: &str = "-b";

/// The toolstack's word for a disk that is on the PCI bus.
const QDISK: &str = "qdisk";
/// Formats of images, as QEMU and the toolstack call them.
const FORMATS: [&str; 6] = ["raw", "qcow2", "vdi", "vhdx", "vmdk", "vpc"];

/// Why a device is not there.
#[derive(Debug, thiserror::Error)]
enum UsbError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("{0}")]
    Other(String),
}

/// What a node of the toolstack's wants.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    /// A device without anything behind it, by QEMU's name.
    Plain(&'static str),
    Disk {
        /// QEMU's name of the device.
        driver: &'static str,
        format: &'static str,
        read_only: bool,
        resource: String,
    },
}

impl Wanted {
    fn parse(text: &str) -> Option<Wanted> {
        let words: Vec<&str> = text.split(' ').collect();
        Some(match words[..] {
            ["tablet"] => Wanted::Plain("usb-tablet"),
            ["keyboard"] => Wanted::Plain("usb-kbd"),
            ["mouse"] => Wanted::Plain("usb-mouse"),
            [kind @ ("disk" | QDISK), format, mode, resource] => {
                let driver = if kind == QDISK { "virtio-blk-pci" } else { "usb-storage" };
                let format = *FORMATS.iter().find(|known| **known == format)?;
                let read_only = match mode {
                    "ro" => true,
                    "rw" => false,
                    _ => return None,
                };
                Wanted::Disk { driver, format, read_only, resource: resource.into() }
            }
            _ => return None,
        })
    }
}

fn label(id: &str) -> String {
    format!("{PREFIX}{id}")
}

fn node(id: &str) -> String {
    format!("{PREFIX}{id}{NODE}")
}

fn ids<'a>(list: &'a Value, field: &'a str, behind: &'a str) -> impl Iterator<Item = String> + 'a {
    list.as_array().into_iter().flatten().filter_map(move |item| {
        Some(item[field].as_str()?.strip_prefix(PREFIX)?.strip_suffix(behind)?.to_owned())
    })
}

/// What was said of each device.
#[derive(Debug, Default)]
pub struct Usb(BTreeMap<String, String>);

impl Usb {
    /// What a predecessor said.
    pub fn new(xs: &XsClient) -> Usb {
        let ids = xs.directory(SAID).unwrap_or_default();
        Usb(ids.into_iter().map(|id| (id, String::new())).collect())
    }

    /// One look at all devices; true if none is on its way.
    ///
    /// # Errors
    /// QEMU is gone, or the store is.
    pub fn look(&mut self, hv: &Hypercall, xs: &XsClient, qmp: &Qmp) -> Result<bool, LookError> {
        let wanted: BTreeSet<String> = match xs.directory(WANTED) {
            Ok(ids) => ids.into_iter().collect(),
            Err(e) if e.is_not_found() => BTreeSet::new(),
            Err(e) => return Err(e.into()),
        };
        if wanted.is_empty() && self.0.is_empty() {
            return Ok(true);
        }
        let list = qmp.call("qom-list", json!({ "path": "/machine/peripheral" }))?;
        let plugged: BTreeSet<String> = ids(&list, "name", "").collect();
        let nodes = qmp.call("query-named-block-nodes", json!({ "flat": true }))?;
        let nodes: BTreeSet<String> = ids(&nodes, "node-name", NODE).collect();
        let mut settled = true;
        for id in &wanted {
            if plugged.contains(id) {
                self.say(xs, id, "plugged")?;
                continue;
            }
            // What is left of an attempt that ended half-way, or of a device of that name before.
            if nodes.contains(id) && !take_away(qmp, id)? {
                settled = false;
                continue;
            }
            match plug(hv, xs, qmp, id) {
                Ok(()) => self.say(xs, id, "plugged")?,
                Err(UsbError::Qmp(why @ (QmpError::Closed | QmpError::Garbage(_) | QmpError::Silent(_)))) => {
                    return Err(why.into());
                }
                // Tried again at each look: what is wrong with a file may be mended.
                Err(why) => self.say(xs, id, &format!("error: {why}"))?,
            }
        }
        for id in plugged.difference(&wanted) {
            settled = false;
            match qmp.call("device_del", json!({ "id": label(id) })) {
                // Asked already.
                Ok(_) | Err(QmpError::Refused { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let gone: Vec<String> = nodes.iter().chain(self.0.keys()).cloned().collect();
        for id in gone.iter().filter(|id| !wanted.contains(*id) && !plugged.contains(*id)) {
            if nodes.contains(id) && !take_away(qmp, id)? {
                settled = false;
                continue;
            }
            if self.0.remove(id).is_some() {
                let _absent_is_fine = xs.rm(&format!("{SAID}/{id}"));
                tracing::info!(device = id, "USB: taken away");
            }
        }
        Ok(settled)
    }

    fn say(&mut self, xs: &XsClient, id: &str, what: &str) -> Result<(), XsError> {
        if self.0.get(id).is_none_or(|said| said != what) {
            xs.write(&format!("{SAID}/{id}"), what)?;
            tracing::info!(device = id, what, "USB");
            self.0.insert(id.to_owned(), what.to_owned());
        }
        Ok(())
    }
}

/// Why a look ended early.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// QEMU.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The store.
    #[error(transparent)]
    Store(#[from] XsError),
}

/// Takes the block layer's node away; false if something still uses it, as a device does for a moment after it is gone.
fn take_away(qmp: &Qmp, id: &str) -> Result<bool, QmpError> {
    match qmp.call("blockdev-del", json!({ "node-name": node(id) })) {
        Ok(_) => Ok(true),
        Err(QmpError::Refused { .. }) => Ok(false),
        Err(e) => Err(e),
    }
}

fn plug(hv: &Hypercall, xs: &XsClient, qmp: &Qmp, id: &str) -> Result<(), UsbError> {
    let text = xs.read_string(&format!("{WANTED}/{id}")).map_err(|e| UsbError::Other(e.to_string()))?;
    let wanted = Wanted::parse(&text).ok_or_else(|| UsbError::Other(format!("{text:?} is no device")))?;
    let bus = format!("{CONTROLLER}.0");
    match wanted {
        Wanted::Plain(driver) => {
            qmp.call("device_add", json!({ "driver": driver, "id": label(id), "bus": bus }))?;
        }
        Wanted::Disk { driver, format, read_only, resource } => {
            let bus = if driver == "usb-storage" { Some(bus) } else { free_port(qmp)? };
            let (_, fd) = hv.resource_open(&resource).map_err(unopened)?;
            let file = File::from(fd);
            lock(&file, read_only)?;
            add_node(qmp, id, &file, format, read_only)?;
            let mut device = json!({ "driver": driver, "id": label(id), "drive": node(id) });
            if let Some(bus) = bus {
                device["bus"] = bus.into();
            }
            if let Err(error) = qmp.call("device_add", device) {
                let _tried_again_later = take_away(qmp, id);
                return Err(error.into());
            }
        }
    }
    Ok(())
}

fn unopened(error: HvError) -> UsbError {
    let why = error.errno().map_or_else(|| error.to_string(), |errno| errno.desc().to_owned());
    UsbError::Other(format!("its file cannot be opened: {why}"))
}

/// A disk that is written is nobody else's.
fn lock(file: &File, read_only: bool) -> Result<(), UsbError> {
    let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
    locked.map_err(|e| match e {
        TryLockError::WouldBlock => UsbError::Other("its file is in use (locked by another program)".into()),
        TryLockError::Error(e) => UsbError::Other(format!("its file cannot be locked: {e}")),
    })
}

fn add_node(qmp: &Qmp, id: &str, file: &File, format: &str, read_only: bool) -> Result<(), UsbError> {
    let meta = file.metadata().map_err(|e| UsbError::Other(e.to_string()))?;
    let driver = if meta.file_type().is_block_device() { "host_device" } else { "file" };
    let added =
        qmp.call_with("add-fd", json!({ "opaque": label(id) }), Some(file.as_fd()), crate::qmp::PATIENCE)?;
    let set = added["fdset-id"].as_u64().ok_or(QmpError::Garbage("add-fd without a set"))?;
    let below = json!({
        "driver": driver,
        "filename": format!("/dev/fdset/{set}"),
        "read-only": read_only,
        // The lock is ours. QEMU's own (of the kind that fcntl sets) would be beside it.
        "locking": "off",
    });
    let mut wanted =
        json!({ "driver": format, "node-name": node(id), "read-only": read_only, "file": below });
    if matches!(format, "qcow2" | "vmdk") {
        // Whatever its header names is not in QEMU's sandbox.
        wanted["backing"] = Value::Null;
    }
    let done = qmp.call("blockdev-add", wanted);
    // The block layer has its own by now.
    let _gone_with_it = qmp.call("remove-fd", json!({ "fdset-id": set }));
    done?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_read_strictly() {
        assert_eq!(Wanted::parse("tablet"), Some(Wanted::Plain("usb-tablet")));
        let disk =
            |driver, format| Some(Wanted::Disk { driver, format, read_only: true, resource: "usb-a".into() });
        assert_eq!(Wanted::parse("disk raw ro usb-a"), disk("usb-storage", "raw"));
        assert_eq!(Wanted::parse("qdisk vdi ro usb-a"), disk("virtio-blk-pci", "vdi"));
        for odd in [
            "",
            "host",
            "disk",
            "disk raw ro",
            "disk nbd ro x",
            "vdisk raw ro x",
            "disk raw w x",
            "disk raw ro x y",
        ] {
            assert_eq!(Wanted::parse(odd), None, "{odd}");
        }
    }

    #[test]
    fn names_lead_back() {
        let list = json!([{ "name": "usb-a" }, { "name": "usb-a-b" }, { "name": "xhci" }, { "x": 1 }]);
        assert_eq!(ids(&list, "name", NODE).collect::<Vec<_>>(), ["a"]);
        assert_eq!(ids(&json!([{ "name": label("k") }]), "name", "").collect::<Vec<_>>(), ["k"]);
    }

    #[test]
    fn a_locked_file_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (first, second) = (open(), open());
        lock(&first, false).unwrap();
        assert!(lock(&second, true).unwrap_err().to_string().contains("in use"));
        drop(first);
        lock(&second, true).unwrap();
        lock(&open(), true).unwrap();
    }
}

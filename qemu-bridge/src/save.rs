//! Saving the guest into a file, and going on from one. The state is QEMU's migration stream, memory included.
//!
//! ```text
//!   save:    stop ──► migrate into the file ──► the file's head     any failure: the guest goes on
//!   restore: inmigrate ──devices plugged──► migrate-incoming ──► paused ──► running
//! ```
//! A guest that was saved stays stopped: who asked knows whether the file has its name yet. A restore that was begun is marked in the fd
//! store until the guest runs, so that the next incarnation lets it go on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use domain_kit::saved::{Saved, SavedError, finish, state_at};
use domain_kit::{HvError, Hypercall};
use hv_abi::fd_kind;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::qmp::{PATIENCE, Qmp, QmpError};

/// The approved file to go on from.
pub const RESTORE: &str = "restore";
/// In the fd store: a restore was begun.
const MARK: &str = "restoring";
/// QEMU's name of the descriptor.
const FD: &str = "saved";
/// Bytes a second: as fast as the file takes them.
const BANDWIDTH: u64 = 1 << 40;
/// Between two looks at QEMU's progress.
const LOOK: Duration = Duration::from_millis(10);
/// Without progress for so long it has failed.
const STUCK: Duration = Duration::from_secs(60);

/// Why a guest was not saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// QEMU.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The file.
    #[error(transparent)]
    File(#[from] SavedError),
    /// hv-core.
    #[error(transparent)]
    Hypercall(#[from] HvError),
    /// Something else, in one line.
    #[error("{0}")]
    Failed(String),
}

impl From<std::io::Error> for SaveError {
    fn from(e: std::io::Error) -> Self {
        SaveError::File(SavedError::Io(e))
    }
}

/// A saved file's description.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    /// The toolstack's.
    guest: Value,
    /// Place of each device on the PCI bus (slot and function): the guest finds them where they were.
    devices: BTreeMap<String, u8>,
    /// QEMU's version.
    qemu: String,
}

/// What was saved.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Length of the file.
    pub bytes: u64,
    /// From the processors' stop on.
    pub took: Duration,
}

/// Stops the guest and writes it into an empty file; it stays stopped.
///
/// # Errors
/// [`SaveError`]; the guest goes on, if it ran.
pub fn save(machine: &Machine, mut file: File, guest: &str) -> Result<Done, SaveError> {
    let guest = serde_json::from_str(guest).map_err(|e| SaveError::Failed(format!("description: {e}")))?;
    if file.metadata()?.len() != 0 {
        return Err(SaveError::Failed("the file is not empty".into()));
    }
    let was = machine.look()?;
    if !matches!(was.as_str(), "running" | "paused" | "postmigrate") {
        return Err(SaveError::Failed(format!("a guest in state {was:?} cannot be saved")));
    }
    let began = Instant::now();
    let written = machine.pause().map_err(SaveError::from).and_then(|()| {
        let devices = places(machine.qmp())?;
        let qemu = machine.version().to_owned();
        let description = serde_json::to_string(&Description { guest, devices, qemu })
            .map_err(|e| SaveError::Failed(e.to_string()))?;
        file.seek(SeekFrom::Start(state_at(description.len())))?;
        let qmp = machine.qmp();
        qmp.call("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH }))?;
        qmp.give_fd(FD, file.as_fd())?;
        qmp.call("migrate", json!({ "uri": format!("fd:{FD}") }))?;
        await_written(qmp)?;
        Ok(finish(&file, &description)?)
    });
    match written {
        Ok(bytes) => {
            let done = Done { bytes, took: began.elapsed() };
            tracing::info!(bytes, took_ms = done.took.as_millis() as u64, "the guest was saved");
            Ok(done)
        }
        Err(why) => {
            tracing::error!(%why, "the guest was not saved");
            if was == "running" {
                machine.resume()?;
            }
            Err(why)
        }
    }
}

/// What keeps a guest with this device from being saved: nobody plugs it in again, in the same place, for the one that goes on.
fn not_saved(device: &str) -> Option<&'static str> {
    match device {
        _ if device.starts_with("usb-") => Some(
            "a guest with USB devices or disks of QEMU's own cannot be saved: bh usb-detach or block-detach first",
        ),
        _ if device.starts_with("port") => Some("a guest on a q35 machine cannot be saved"),
        "mem0" => Some("a guest with maxmem cannot be saved"),
        _ if device.starts_with("cpu-") => Some("a guest that was given processors cannot be saved"),
        _ => None,
    }
}

/// Where on the PCI bus each device that was plugged in is.
fn places(qmp: &Qmp) -> Result<BTreeMap<String, u8>, QmpError> {
    let list = qmp.call("qom-list", json!({ "path": "/machine/peripheral" }))?;
    let mut places = BTreeMap::new();
    for item in list.as_array().into_iter().flatten() {
        let (Some(name), Some(kind)) = (item["name"].as_str(), item["type"].as_str()) else { continue };
        if !kind.starts_with("child<") {
            continue;
        }
        if let Some(what) = not_saved(name) {
            return Err(QmpError::Refused { command: "save".into(), text: what.into() });
        }
        let path = format!("/machine/peripheral/{name}");
        match qmp.call("qom-get", json!({ "path": path, "property": "addr" })) {
            Ok(addr) => {
                let addr = addr.as_u64().and_then(|a| u8::try_from(a).ok());
                places.insert(name.to_owned(), addr.ok_or(QmpError::Garbage("a device in no place"))?);
            }
            // On no PCI bus.
            Err(QmpError::Refused { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(places)
}

/// What `query-migrate` says, until QEMU has written everything.
fn await_written(qmp: &Qmp) -> Result<(), SaveError> {
    let (mut last, mut moved) = (0, Instant::now());
    loop {
        let now = qmp.call("query-migrate", json!({}))?;
        match now["status"].as_str().unwrap_or_default() {
            "completed" => return Ok(()),
            "failed" | "cancelled" => {
                let why = now["error-desc"].as_str().unwrap_or("the file may be on a full disk");
                let why: String = why.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                return Err(SaveError::Failed(format!("QEMU could not write the state: {why}")));
            }
            _ => {}
        }
        let written = now["ram"]["transferred"].as_u64().unwrap_or(0);
        if written != last {
            (last, moved) = (written, Instant::now());
        }
        if moved.elapsed() > STUCK {
            let _over_meanwhile = qmp.call("migrate_cancel", json!({}));
            return Err(SaveError::Failed(format!("nothing was written for {} s", STUCK.as_secs())));
        }
        std::thread::sleep(LOOK);
    }
}

/// Ends a save that is under way, so that the guest can go on. (Whoever asked for it may be gone, or was this process's predecessor.)
///
/// # Errors
/// [`QmpError`].
pub fn abandon(machine: &Machine) -> Result<(), QmpError> {
    let qmp = machine.qmp();
    let began = Instant::now();
    let mut told = false;
    // Before the guest's start this is about a state that is read.
    while machine.state() != "inmigrate" && began.elapsed() < PATIENCE {
        let now = qmp.call("query-migrate", json!({}))?;
        if !matches!(now["status"].as_str(), Some("setup" | "active" | "device" | "cancelling")) {
            break;
        }
        if !std::mem::replace(&mut told, true) {
            tracing::warn!("the guest is not saved after all");
            qmp.call("migrate_cancel", json!({}))?;
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// A file that the guest goes on from.
#[derive(Debug)]
pub struct Restore {
    file: File,
    saved: Saved,
    devices: BTreeMap<String, u8>,
}

impl Restore {
    /// Opens the approved file.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn open(hv: &Hypercall) -> Result<Restore, SaveError> {
        Restore::of(File::from(hv.resource_open(RESTORE)?.1))
    }

    fn of(file: File) -> Result<Restore, SaveError> {
        let saved = Saved::open(&file)?;
        let description: Description = serde_json::from_str(&saved.description)
            .map_err(|e| SaveError::Failed(format!("the saved guest's description: {e}")))?;
        saved.check_state(&file)?;
        Ok(Restore { file, saved, devices: description.devices })
    }

    /// Where a device was, as QEMU is told it.
    pub fn place(&self, device: &str) -> Option<String> {
        self.devices.get(device).map(|at| format!("{:x}.{:x}", at >> 3, at & 7))
    }

    /// Has QEMU read the state, and the guest go on. If another incarnation began it, it is waited for.
    ///
    /// # Errors
    /// [`SaveError`]; a QEMU that cannot make anything of the state ends.
    pub fn load(&mut self, hv: &Hypercall, machine: &Machine) -> Result<(), SaveError> {
        let began = Instant::now();
        let qmp = machine.qmp();
        hv.fd_put(MARK, fd_kind::MEMFD, 0, &domain_kit::mem::sealed_memfd(MARK, 4096)?)?;
        self.file.seek(SeekFrom::Start(self.saved.state_at))?;
        qmp.give_fd(FD, self.file.as_fd())?;
        match qmp.call("migrate-incoming", json!({ "uri": format!("fd:{FD}") })) {
            Ok(_) => {}
            Err(QmpError::Refused { text, .. }) if text.contains("already") => {}
            Err(e) => return Err(e.into()),
        }
        while machine.look()? == "inmigrate" {
            if began.elapsed() > STUCK * 10 {
                return Err(SaveError::Failed("QEMU does not come to the end of the saved state".into()));
            }
            std::thread::sleep(LOOK);
        }
        go_on(hv, machine)?;
        tracing::info!(
            took_ms = began.elapsed().as_millis() as u64,
            "the guest goes on from where it was saved"
        );
        Ok(())
    }
}

/// Whether a restore was begun whose guest may still be stopped.
///
/// # Errors
/// hv-core's.
pub fn begun(hv: &Hypercall) -> Result<bool, HvError> {
    match hv.fd_get(MARK) {
        Ok(_) => Ok(true),
        Err(e) if e.is(Errno::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Lets a guest go on whose state was read.
///
/// # Errors
/// [`SaveError`].
pub fn go_on(hv: &Hypercall, machine: &Machine) -> Result<(), SaveError> {
    machine.resume()?;
    match hv.fd_delete(MARK) {
        Err(e) if !e.is(Errno::ENOENT) => Err(e.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn file(description: &str) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"state", state_at(description.len())).unwrap();
        finish(&file, description).unwrap();
        file
    }

    #[test]
    fn what_nobody_plugs_in_again_is_not_saved() {
        for device in ["usb-stick", "port0", "mem0", "cpu-1-0-0"] {
            assert!(not_saved(device).is_some(), "{device}");
        }
        for device in ["vbd51712", "vif0", "xhci"] {
            assert_eq!(not_saved(device), None, "{device}");
        }
    }

    #[test]
    fn devices_are_where_they_were() {
        let text = "{\"guest\":{},\"devices\":{\"vbd51712\":40,\"vif0\":49},\"qemu\":\"7.2.0\"}";
        let restore = Restore::of(file(text)).unwrap();
        assert_eq!(restore.place("vbd51712").as_deref(), Some("5.0"));
        assert_eq!(restore.place("vif0").as_deref(), Some("6.1"));
        assert_eq!(restore.place("vif1"), None);
    }

    #[test]
    fn descriptions_that_make_no_sense_are_refused() {
        for text in ["", "[]", "{}", "{\"guest\":1,\"devices\":{\"a\":256},\"qemu\":\"\"}"] {
            assert!(Restore::of(file(text)).is_err(), "{text}");
        }
        assert!(Restore::of(tempfile::tempfile().unwrap()).unwrap_err().to_string().contains("not finished"));
    }
}

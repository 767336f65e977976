//! Memory and processors of a running guest: as the toolstack's nodes have them, which are Xen's.
//!
//! `memory/target` (KiB): what is more than the machine began with is a virtio-mem device's, whose size the guest's driver follows.
//! `cpu/N/availability`: as many processors as say "online" are plugged in; those that the machine began with stay.

use std::collections::BTreeSet;

use domain_kit::xs::{XsClient, XsError, XsOps};
use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError};
use crate::usb::LookError;

/// QEMU's name of the device, as its command line has it.
const MEMORY: &str = "mem0";
/// Before a processor's number, in QEMU's names.
const PROCESSOR: &str = "cpu-";

/// What the machine has now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes that the guest can use.
    pub memory: u64,
    /// Processors that are plugged in.
    pub vcpus: u32,
}

/// Asks QEMU.
///
/// # Errors
/// [`QmpError`].
pub fn sizes(qmp: &Qmp) -> Result<Sizes, QmpError> {
    let summary = qmp.call("query-memory-size-summary", json!({}))?;
    let bytes = |field: &str| summary[field].as_u64().unwrap_or(0);
    let vcpus = qmp.call("query-cpus-fast", json!({}))?.as_array().map_or(0, Vec::len);
    Ok(Sizes { memory: bytes("base-memory").saturating_add(bytes("plugged-memory")), vcpus: vcpus as u32 })
}

/// What was asked for last.
#[derive(Debug, Default)]
pub struct Resize {
    target: Option<u64>,
    online: Option<usize>,
}

impl Resize {
    /// One look; true if nothing is on its way.
    ///
    /// # Errors
    /// QEMU is gone, or the store is.
    pub fn look(&mut self, xs: &XsClient, qmp: &Qmp) -> Result<bool, LookError> {
        let target = xs.read_opt("memory/target")?.and_then(|text| text.parse::<u64>().ok());
        if target.is_some() && target != self.target {
            let result = memory(qmp, target.unwrap_or(0).saturating_mul(1024));
            // What is refused is not asked for again and again.
            if matches!(result, Ok(()) | Err(QmpError::Refused { .. })) {
                self.target = target;
            }
            result?;
        }
        let online = online(xs)?;
        if self.online == Some(online) {
            return Ok(true);
        }
        let result = processors(qmp, online);
        if matches!(result, Ok(true) | Err(QmpError::Refused { .. })) {
            self.online = Some(online);
        }
        Ok(result?)
    }
}

fn online(xs: &XsClient) -> Result<usize, XsError> {
    let mut count = 0;
    for cpu in xs.directory("cpu")? {
        let is = xs.read_opt(&format!("cpu/{cpu}/availability"))?;
        count += usize::from(is.as_deref() == Some("online"));
    }
    Ok(count)
}

fn memory(qmp: &Qmp, target: u64) -> Result<(), QmpError> {
    let devices = qmp.call("query-memory-devices", json!({}))?;
    let device = devices.as_array().into_iter().flatten().map(|d| &d["data"]).find(|d| d["id"] == MEMORY);
    let Some(device) = device else { return Ok(()) };
    let base = qmp.call("query-memory-size-summary", json!({}))?["base-memory"].as_u64().unwrap_or(0);
    let number = |field: &str| device[field].as_u64().unwrap_or(0);
    let wanted = requested(target, base, number("max-size"), number("block-size"));
    if wanted != number("requested-size") {
        let path = format!("/machine/peripheral/{MEMORY}");
        qmp.call("qom-set", json!({ "path": path, "property": "requested-size", "value": wanted }))?;
        tracing::info!(mib = wanted >> 20, "memory beside the machine's own");
    }
    Ok(())
}

/// Bytes of the device for so much memory in all: whole blocks, never more than the target.
fn requested(target: u64, base: u64, most: u64, block: u64) -> u64 {
    let more = target.saturating_sub(base).min(most);
    more.checked_rem(block).map_or(0, |rest| more - rest)
}

/// Plugs processors in, or asks the guest to let go of one; true if there are as many as wanted, or there is no other to be had.
fn processors(qmp: &Qmp, wanted: usize) -> Result<bool, QmpError> {
    let slots = qmp.call("query-hotpluggable-cpus", json!({}))?;
    let slots: Vec<&Value> = slots.as_array().into_iter().flatten().collect();
    let number = |slot: &Value| {
        let part = |name: &str| slot["props"][name].as_u64().unwrap_or(0);
        (part("socket-id"), part("core-id"), part("thread-id"))
    };
    let present = slots.iter().filter(|slot| slot["qom-path"].is_string()).count();
    if present < wanted {
        let mut free: Vec<&&Value> = slots.iter().filter(|slot| !slot["qom-path"].is_string()).collect();
        free.sort_by_key(|slot| number(slot));
        for slot in free.into_iter().take(wanted - present) {
            let mut device = slot["props"].clone();
            let (socket, core, thread) = number(slot);
            device["driver"] = slot["type"].clone();
            device["id"] = format!("{PROCESSOR}{socket}-{core}-{thread}").into();
            qmp.call("device_add", device)?;
        }
        tracing::info!(from = present, to = wanted, "processors");
        return Ok(true);
    }
    if present > wanted {
        // The machine's own have no name, and stay.
        let named: BTreeSet<String> = slots
            .iter()
            .filter_map(|slot| slot["qom-path"].as_str()?.strip_prefix("/machine/peripheral/"))
            .filter(|name| name.starts_with(PROCESSOR))
            .map(str::to_owned)
            .collect();
        for name in named.iter().rev().take(present - wanted) {
            match qmp.call("device_del", json!({ "id": name })) {
                // Asked already.
                Ok(_) | Err(QmpError::Refused { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        return Ok(named.is_empty());
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_asked_for_in_whole_blocks() {
        const MIB: u64 = 1 << 20;
        assert_eq!(requested(320 * MIB, 256 * MIB, 256 * MIB, 2 * MIB), 64 * MIB);
        assert_eq!(requested(321 * MIB, 256 * MIB, 256 * MIB, 2 * MIB), 64 * MIB);
        assert_eq!(requested(1024 * MIB, 256 * MIB, 256 * MIB, 2 * MIB), 256 * MIB);
        assert_eq!(requested(16 * MIB, 256 * MIB, 256 * MIB, 2 * MIB), 0);
        assert_eq!(requested(u64::MAX, 0, u64::MAX, 0), 0);
    }
}

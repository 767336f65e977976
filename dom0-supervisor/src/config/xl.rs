//! Disks in the syntax of xl (Xen's `xl-disk-configuration(5)`): `target, format, vdev, access` by position, or `key=value` in any order,
//! `target=` last. What else xl knows is refused by name.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use super::{AccessMode, ConfigError, DevType, DiskEntry, Format};

/// The values of a disk, by their keys.
///
/// # Errors
/// One line.
pub(super) fn xl_values(text: &str) -> Result<BTreeMap<&'static str, &str>, ConfigError> {
    let bad = |what: String| ConfigError::new(format!("disk {text:?}: {what}"));
    let mut values = BTreeMap::new();
    let mut positions = ["target", "format", "vdev", "access"].into_iter();
    let mut rest = Some(text);
    while let Some(now) = rest {
        // A target may hold commas.
        if let Some(target) = now.trim_start().strip_prefix("target=") {
            values.insert("target", target.trim());
            break;
        }
        let (item, after) = match now.split_once(',') {
            Some((item, after)) => (item.trim(), Some(after)),
            None => (now.trim(), None),
        };
        rest = after;
        let known = ["format", "vdev", "access", "devtype", "backend", "backendtype"];
        match item.split_once('=').map(|(key, value)| (key.trim(), value.trim())) {
            Some((key, value)) if known.contains(&key) => {
                if values.insert(known[known.iter().position(|k| *k == key).unwrap_or(0)], value).is_some() {
                    return Err(bad(format!("{key} is there twice")));
                }
            }
            Some((key, _)) => return Err(bad(format!("{key} is not known here"))),
            None if item == "discard" || item == "direct-io-safe" => {}
            None if item == "cdrom" => drop(values.insert("devtype", item)),
            None if ["no-discard", "colo"].contains(&item) => {
                return Err(bad(format!("{item} is not supported")));
            }
            None => match positions.next() {
                Some(key) if !item.is_empty() => drop(values.insert(key, item)),
                Some(_) => {}
                None => return Err(bad(format!("{item:?} is one too many"))),
            },
        }
    }
    Ok(values)
}

/// A disk that blkback serves.
impl FromStr for DiskEntry {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = |what: String| ConfigError::new(format!("disk {text:?}: {what}"));
        let values = xl_values(text)?;
        let get = |key: &str| values.get(key).copied().filter(|value| !value.is_empty());
        let devtype = match get("devtype") {
            None | Some("disk") => DevType::Disk,
            Some("cdrom") => DevType::Cdrom,
            Some(kind) => {
                return Err(bad(format!("devtype {kind:?} is not supported, only \"disk\" and \"cdrom\"")));
            }
        };
        if let Some(kind) = get("backendtype").filter(|kind| *kind != "phy") {
            return Err(bad(format!("backendtype {kind:?} is not supported here; leave it out")));
        }
        let format = match get("format") {
            None | Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => return Err(bad(format!("format {other:?} is not supported, only raw and qcow2"))),
        };
        let mode = match get("access") {
            _ if devtype == DevType::Cdrom => AccessMode::ReadOnly,
            None | Some("rw" | "w") => AccessMode::ReadWrite,
            Some("ro" | "r") => AccessMode::ReadOnly,
            Some("w!") => AccessMode::Shared,
            Some(other) => return Err(bad(format!("access {other:?} must be ro, r, rw, w or w!"))),
        };
        let vdev = get("vdev").ok_or_else(|| bad("vdev is missing".into()))?.parse()?;
        let backend = get("backend").map(str::parse).transpose()?;
        let path = get("target").map(PathBuf::from);
        let entry = DiskEntry { vdev, backend, path, devtype, mode, format, ..DiskEntry::default() };
        entry.check().map_err(ConfigError::new)?;
        Ok(entry)
    }
}

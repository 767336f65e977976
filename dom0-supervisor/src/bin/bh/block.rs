//! `bh block-…`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use dom0_supervisor::config::{DiskEntry, UsbEntry};
use proto::toolstack::*;
use serde_json::json;

use crate::client::{Dom0, Failure};
use crate::commands::{print_json, say};
use crate::table::{Table, or_dash};

/// How long dom0 may take: a guest is asked to let go, a backend is made.
const WITHIN: Duration = Duration::from_secs(60);

pub async fn list(dom0: &Dom0, guest: String, json: bool) -> Result<(), Failure> {
    let request = GuestRef { guest };
    let reply = dom0.call(|mut c| {
        let request = request.clone();
        async move { c.list_disks(request).await }
    });
    let disks = reply.await?.disks;
    if json {
        let disks: Vec<_> = disks
            .iter()
            .map(|d| {
                json!({ "vdev": d.vdev, "backend": d.backend, "files": d.files, "mode": d.mode, "bytes": d.bytes,
                    "frontend_state": d.frontend_state, "backend_state": d.backend_state, "note": d.note })
            })
            .collect();
        return print_json(&json!({ "disks": disks }));
    }
    let mut table =
        Table::new(&["VDEV", "BACKEND", "MODE", ">BYTES", "FRONTEND", "BACKEND STATE", "FILES", "NOTE"]);
    for d in &disks {
        table.row(vec![
            d.vdev.clone(),
            d.backend.clone(),
            d.mode.clone(),
            or_dash(d.bytes),
            d.frontend_state.clone(),
            d.backend_state.clone(),
            or_dash(d.files.join(" <- ")),
            d.note.clone(),
        ]);
    }
    Ok(table.print()?)
}

pub async fn attach(dom0: &Dom0, guest: String, disk: String, json: bool) -> Result<(), Failure> {
    let vdev = match UsbEntry::qdisk(&disk).map_err(|e| Failure::Input(e.0))? {
        Some(entry) => entry.id,
        None => DiskEntry::parse(&disk).map_err(|e| Failure::Input(e.0))?.vdev.name().to_owned(),
    };
    let request = AttachDiskRequest { guest: guest.clone(), disk };
    dom0.once(WITHIN, |mut c| async move { c.attach_disk(request).await }).await?;
    say(
        json,
        &format!("guest {guest} has disk {vdev}"),
        json!({ "guest": guest, "vdev": vdev, "result": "attached" }),
    )
}

pub async fn detach(
    dom0: &Dom0,
    guest: String,
    vdev: String,
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    let request = DetachDiskRequest { guest: guest.clone(), vdev: vdev.clone(), force };
    dom0.once(WITHIN, |mut c| async move { c.detach_disk(request).await }).await?;
    let text = format!("guest {guest} has disk {vdev} no more");
    say(json, &text, json!({ "guest": guest, "vdev": vdev, "result": "detached" }))
}

/// Bytes of `10G` and the like.
fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'K' | 'k') => (&text[..at], 10),
        (at, 'M' | 'm') => (&text[..at], 20),
        (at, 'G' | 'g') => (&text[..at], 30),
        (at, 'T' | 't') => (&text[..at], 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

pub async fn resize(dom0: &Dom0, guest: String, vdev: String, text: &str, json: bool) -> Result<(), Failure> {
    let bytes = size(text)
        .ok_or_else(|| Failure::Input(format!("size {text:?} must be a number, perhaps with K, M, G, T")))?;
    let request = ResizeDiskRequest { guest: guest.clone(), vdev: vdev.clone(), bytes };
    let reply = dom0.once(WITHIN, |mut c| async move { c.resize_disk(request).await }).await?;
    let text = format!("disk {vdev} of guest {guest} has {} bytes", reply.bytes);
    say(json, &text, json!({ "guest": guest, "vdev": vdev, "bytes": reply.bytes }))
}

pub async fn snapshot(
    dom0: &Dom0,
    guest: String,
    vdev: String,
    image: &Path,
    json: bool,
) -> Result<(), Failure> {
    let path = std::path::absolute(image).map_err(|e| Failure::Input(format!("{}: {e}", image.display())))?;
    let text = path.to_str().ok_or_else(|| Failure::Input("the image's path must be plain text".into()))?;
    // Made by who asks, with that one's rights; dom0 sees no files of the host.
    let made = std::fs::File::options().write(true).create_new(true).mode(0o600).open(&path);
    made.map_err(|e| Failure::Input(format!("{text}: {e}")))?;
    let request = SnapshotDiskRequest { guest: guest.clone(), vdev: vdev.clone(), path: text.to_owned() };
    match dom0.once(WITHIN, |mut c| async move { c.snapshot_disk(request).await }).await {
        Ok(_) => {}
        // Whether it is in use now is not known: it stays.
        Err(e) if e.lost() => return Err(e),
        Err(e) => {
            let empty = std::fs::metadata(&path).is_ok_and(|meta| meta.len() == 0);
            if empty && let Err(error) = std::fs::remove_file(&path) {
                writeln!(std::io::stderr(), "bh: {text}: {error}")?;
            }
            return Err(e);
        }
    }
    let words = format!("disk {vdev} of guest {guest} writes to {text} now");
    say(json, &words, json!({ "guest": guest, "vdev": vdev, "image": text }))
}

/// How long a commit may take before `bh` stops waiting for it.
const COMMIT_WITHIN: Duration = Duration::from_secs(24 * 3600);

pub async fn commit(dom0: &Dom0, guest: String, vdev: String, json: bool) -> Result<(), Failure> {
    let request = CommitDiskRequest { guest: guest.clone(), vdev: vdev.clone() };
    dom0.once(COMMIT_WITHIN, |mut c| async move { c.commit_disk(request).await }).await?;
    let text =
        format!("disk {vdev} of guest {guest} is its backing file now; the image above is not used any more");
    say(json, &text, json!({ "guest": guest, "vdev": vdev, "result": "committed" }))
}

pub async fn medium(
    dom0: &Dom0,
    guest: String,
    vdev: String,
    medium: Option<&Path>,
    json: bool,
) -> Result<(), Failure> {
    let path = match medium {
        Some(path) => {
            let path =
                std::path::absolute(path).map_err(|e| Failure::Input(format!("{}: {e}", path.display())))?;
            path.to_str()
                .ok_or_else(|| Failure::Input("the medium's path must be plain text".into()))?
                .to_owned()
        }
        None => String::new(),
    };
    let request = ChangeMediumRequest { guest: guest.clone(), vdev: vdev.clone(), path: path.clone() };
    dom0.once(WITHIN, |mut c| async move { c.change_medium(request).await }).await?;
    let text = match path.as_str() {
        "" => format!("drive {vdev} of guest {guest} is empty"),
        path => format!("drive {vdev} of guest {guest} has {path}"),
    };
    say(json, &text, json!({ "guest": guest, "vdev": vdev, "medium": path }))
}

/// From the command line.
pub fn limits(
    guest: String,
    vdev: String,
    [iops, iops_burst]: [Option<u64>; 2],
    bytes: [Option<String>; 2],
) -> Result<LimitDiskRequest, Failure> {
    let parsed = bytes.map(|text| match text {
        None => Ok(None),
        Some(text) => size(&text).map(Some).ok_or_else(|| {
            Failure::Input(format!("bandwidth {text:?} must be bytes, perhaps with K, M, G, T"))
        }),
    });
    let [bandwidth, bandwidth_burst] = parsed;
    let (bandwidth, bandwidth_burst) = (bandwidth?, bandwidth_burst?);
    Ok(LimitDiskRequest { guest, vdev, iops, iops_burst, bandwidth, bandwidth_burst })
}

pub async fn limit(dom0: &Dom0, request: LimitDiskRequest, json: bool) -> Result<(), Failure> {
    let asked = request.clone();
    dom0.once(WITHIN, |mut c| async move { c.limit_disk(asked).await }).await?;
    let LimitDiskRequest { guest, vdev, iops, iops_burst, bandwidth, bandwidth_burst } = request;
    say(
        json,
        &format!("disk {vdev} of guest {guest} has the limits"),
        json!({ "guest": guest, "vdev": vdev, "iops": iops, "iops_burst": iops_burst, "bandwidth": bandwidth,
            "bandwidth_burst": bandwidth_burst }),
    )
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes() {
        assert_eq!(
            [size("512"), size("3K"), size("2g"), size("1T")].map(Option::unwrap),
            [512, 3072, 2 << 30, 1 << 40]
        );
        for bad in ["", "0", "G", "-1", "1.5G", "99999999999999T", "1X"] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }
}

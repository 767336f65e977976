//! `bh block-…`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use dom0_supervisor::config::DiskEntry;
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
    let entry = DiskEntry::parse(&disk).map_err(|e| Failure::Input(e.0))?;
    let request = AttachDiskRequest { guest: guest.clone(), disk };
    dom0.once(WITHIN, |mut c| async move { c.attach_disk(request).await }).await?;
    let vdev = entry.vdev.name();
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

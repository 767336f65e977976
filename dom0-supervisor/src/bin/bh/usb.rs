//! `bh usb-…`, `mem-set`, `vcpu-set`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dom0_supervisor::config::{AccessMode, ImageFormat, UsbEntry, UsbKind};
use proto::toolstack::*;
use serde_json::json;

use crate::client::{Dom0, Failure};
use crate::commands::{print_json, say};
use crate::table::{Table, or_dash};

/// How long dom0 may take: QEMU or the guest follows.
const WITHIN: Duration = Duration::from_secs(60);

/// What a new USB device is.
#[derive(Args, Debug)]
pub struct Wanted {
    /// tablet, keyboard, mouse, or the path of a disk's image file or block device.
    device: String,
    /// Its name among the guest's USB devices; made from what it is if missing.
    #[arg(long)]
    id: Option<String>,
    /// The guest may only read it.
    #[arg(long)]
    ro: bool,
    /// The image is qcow2; QEMU itself reads it.
    #[arg(long)]
    qcow2: bool,
}

impl Wanted {
    fn entry(self) -> Result<UsbEntry, Failure> {
        let Wanted { device, id, ro, qcow2 } = self;
        let kind = match device.as_str() {
            "tablet" => UsbKind::Tablet,
            "keyboard" => UsbKind::Keyboard,
            "mouse" => UsbKind::Mouse,
            path if path.starts_with('/') => UsbKind::Disk,
            other if other.starts_with("host") || other.contains(':') => {
                return Err(Failure::Input(format!(
                    "{other}: devices of the host are not passed through to guests; give tablet, keyboard, mouse or a path"
                )));
            }
            other => {
                return Err(Failure::Input(format!(
                    "{other}: no such device; give tablet, keyboard, mouse, or an absolute path"
                )));
            }
        };
        let path = (kind == UsbKind::Disk).then(|| PathBuf::from(&device));
        let mode = if ro { AccessMode::ReadOnly } else { AccessMode::ReadWrite };
        let format = if qcow2 { ImageFormat::Qcow2 } else { ImageFormat::Raw };
        let id = id.unwrap_or_else(|| kind.word().into());
        Ok(UsbEntry { id, kind, path, mode, format })
    }
}

pub async fn list(dom0: &Dom0, guest: String, json: bool) -> Result<(), Failure> {
    let request = GuestRef { guest };
    let reply = dom0.call(|mut c| {
        let request = request.clone();
        async move { c.list_usb(request).await }
    });
    let devices = reply.await?.devices;
    if json {
        let devices: Vec<_> = devices
            .iter()
            .map(|d| json!({ "id": d.id, "kind": d.kind, "path": d.path, "read_only": d.read_only, "state": d.state }))
            .collect();
        return print_json(&json!({ "devices": devices }));
    }
    let mut table = Table::new(&["ID", "KIND", "STATE", "MODE", "PATH"]);
    for d in &devices {
        let mode = match (d.path.is_empty(), d.read_only) {
            (true, _) => "-",
            (false, true) => "ro",
            (false, false) => "rw",
        };
        table.row(vec![d.id.clone(), d.kind.clone(), d.state.clone(), mode.into(), or_dash(d.path.clone())]);
    }
    Ok(table.print()?)
}

pub async fn attach(dom0: &Dom0, guest: String, wanted: Wanted, json: bool) -> Result<(), Failure> {
    let entry = wanted.entry()?;
    let usbdev = entry.to_text().map_err(|e| Failure::Input(e.0))?;
    let request = AttachUsbRequest { guest: guest.clone(), usbdev };
    dom0.once(WITHIN, |mut c| async move { c.attach_usb(request).await }).await?;
    let id = entry.id;
    say(json, &format!("guest {guest}: USB device {id} attached"), json!({ "guest": guest, "id": id }))
}

pub async fn detach(dom0: &Dom0, guest: String, id: String, json: bool) -> Result<(), Failure> {
    let request = DetachUsbRequest { guest: guest.clone(), id: id.clone() };
    dom0.once(WITHIN, |mut c| async move { c.detach_usb(request).await }).await?;
    say(json, &format!("guest {guest}: USB device {id} detached"), json!({ "guest": guest, "id": id }))
}

/// Memory in MiB, or processors.
pub async fn resize(
    dom0: &Dom0,
    guest: String,
    memory: Option<u64>,
    vcpus: u32,
    json: bool,
) -> Result<(), Failure> {
    let request = ResizeGuestRequest { guest: guest.clone(), memory_mib: memory.unwrap_or(0), vcpus };
    dom0.once(WITHIN, |mut c| async move { c.resize_guest(request).await }).await?;
    let text = match memory {
        Some(mib) => format!("guest {guest}: {mib} MiB"),
        None => format!("guest {guest}: {vcpus} processors"),
    };
    say(json, &text, json!({ "guest": guest, "memory_mib": memory, "vcpus": (vcpus > 0).then_some(vcpus) }))
}

/// MiB, or with m, g or t behind it.
///
/// # Errors
/// One line.
pub fn mib(text: &str) -> Result<u64, String> {
    let (number, factor) = match text.as_bytes().last() {
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 1 << 10),
        Some(b't' | b'T') => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    let number: Option<u64> = number.parse().ok();
    number
        .and_then(|n| n.checked_mul(factor))
        .ok_or_else(|| format!("{text}: give MiB, or a number with m, g or t"))
}

//! `[[usbdev]]`: USB devices that QEMU emulates for a guest, and disks that it serves itself (xl's `backendtype=qdisk`).

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::xl::xl_values;
use super::{AccessMode, ConfigError};

/// Most USB devices of a guest: the ports of QEMU's controller.
pub const MOST_USB: usize = 8;
/// Longest identifier: QEMU's block layer takes 31 bytes with what stands around it.
const MAX_ID: usize = 16;

/// What a USB device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UsbKind {
    /// A pointer that says where it is, as a display's viewer wants one.
    Tablet,
    /// A keyboard.
    Keyboard,
    /// A mouse.
    Mouse,
    /// A storage device whose bytes are in a file or block device.
    Disk,
    /// The same on the PCI bus, as a virtio disk; it needs no USB controller.
    Qdisk,
}

impl UsbKind {
    /// As in files and on command lines.
    pub fn word(self) -> &'static str {
        match self {
            UsbKind::Tablet => "tablet",
            UsbKind::Keyboard => "keyboard",
            UsbKind::Mouse => "mouse",
            UsbKind::Disk => "disk",
            UsbKind::Qdisk => "qdisk",
        }
    }

    /// Bytes are behind it.
    pub fn is_disk(self) -> bool {
        matches!(self, UsbKind::Disk | UsbKind::Qdisk)
    }
}

/// How an image holds a disk's bytes: what QEMU's own block layer reads and writes. Never probed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// As they are.
    #[default]
    Raw,
    /// QEMU's.
    Qcow2,
    /// VirtualBox's.
    Vdi,
    /// Hyper-V's.
    Vhdx,
    /// VMware's, in one file.
    Vmdk,
    /// Virtual PC's and Azure's (`.vhd`).
    Vpc,
}

impl ImageFormat {
    /// Each.
    pub const ALL: [ImageFormat; 6] = [
        ImageFormat::Raw,
        ImageFormat::Qcow2,
        ImageFormat::Vdi,
        ImageFormat::Vhdx,
        ImageFormat::Vmdk,
        ImageFormat::Vpc,
    ];

    /// As in files and on command lines, and as QEMU calls it.
    pub fn word(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vdi => "vdi",
            ImageFormat::Vhdx => "vhdx",
            ImageFormat::Vmdk => "vmdk",
            ImageFormat::Vpc => "vpc",
        }
    }
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsbEntry {
    /// Its name among the guest's USB devices.
    pub id: String,
    /// What it is.
    pub kind: UsbKind,
    /// A disk's image file or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether the guest may write a disk.
    #[serde(default)]
    pub mode: AccessMode,
    /// How its image is made; QEMU itself reads it.
    #[serde(default)]
    pub format: ImageFormat,
}

impl UsbEntry {
    /// One by itself: the keys of `[[usbdev]]` as TOML, one a line.
    ///
    /// # Errors
    /// One line.
    pub fn parse(text: &str) -> Result<UsbEntry, ConfigError> {
        #[derive(Deserialize)]
        struct File {
            usbdev: UsbEntry,
        }
        let file: File = super::text::parse(&format!("[usbdev]\n{text}"), "usbdev")?;
        file.usbdev.check().map_err(ConfigError::new)?;
        Ok(file.usbdev)
    }

    /// A disk in xl's syntax, if it is one that QEMU is to serve itself (`backendtype=qdisk`). The guest's name for it is only a name here.
    ///
    /// # Errors
    /// One line.
    pub fn qdisk(text: &str) -> Result<Option<UsbEntry>, ConfigError> {
        if text.trim_start().starts_with('{') {
            return Ok(None);
        }
        let bad = |what: String| ConfigError::new(format!("disk {text:?}: {what}"));
        let values = xl_values(text)?;
        let get = |key: &str| values.get(key).copied().filter(|value| !value.is_empty());
        if get("backendtype") != Some("qdisk") {
            return Ok(None);
        }
        if get("backend").is_some() || get("devtype").is_some_and(|kind| kind != "disk") {
            return Err(bad("with backendtype=qdisk there is no backend, and it is a disk".into()));
        }
        let word = get("format").unwrap_or("raw");
        let format = ImageFormat::ALL.into_iter().find(|format| format.word() == word);
        let format = format.ok_or_else(|| {
            let all: Vec<&str> = ImageFormat::ALL.iter().map(|format| format.word()).collect();
            bad(format!("format {word:?} must be one of {}", all.join(", ")))
        })?;
        let mode = match get("access") {
            None | Some("rw" | "w") => AccessMode::ReadWrite,
            Some("ro" | "r") => AccessMode::ReadOnly,
            Some(other) => return Err(bad(format!("access {other:?} must be ro, r, rw or w"))),
        };
        let id = get("vdev").ok_or_else(|| bad("vdev is missing".into()))?.to_owned();
        let entry =
            UsbEntry { id, kind: UsbKind::Qdisk, path: get("target").map(PathBuf::from), mode, format };
        entry.check().map_err(ConfigError::new)?;
        Ok(Some(entry))
    }

    /// As [`UsbEntry::parse`] reads it.
    ///
    /// # Errors
    /// What cannot be written as TOML.
    pub fn to_text(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|e| ConfigError(e.to_string()))
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let id = &self.id;
        let good = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        if id.is_empty() || id.len() > MAX_ID || !id.chars().all(good) {
            return Err(format!("usbdev {id:?}: id must be 1 to {MAX_ID} of a-z A-Z 0-9 _ -"));
        }
        match (self.kind, &self.path) {
            (kind, None) if kind.is_disk() => Err(format!("usbdev {id}: a disk needs path")),
            (kind, Some(path)) if kind.is_disk() && !path.is_absolute() => {
                Err(format!("usbdev {id}: path {path:?} must be absolute"))
            }
            (kind, Some(_)) if kind.is_disk() && self.mode == AccessMode::Shared => {
                Err(format!("usbdev {id}: mode must be \"rw\" or \"ro\""))
            }
            (kind, Some(_)) if kind.is_disk() => Ok(()),
            (_, Some(_)) => Err(format!("usbdev {id}: path is for kind \"disk\" and \"qdisk\"")),
            (_, None) => Ok(()),
        }
    }

    /// The file of a disk.
    pub fn disk(&self) -> Option<&Path> {
        self.path.as_deref().filter(|_| self.kind.is_disk())
    }

    /// The name by which qemu-bridge opens a disk's file.
    pub fn resource(&self) -> String {
        format!("usb-{}", self.id)
    }

    /// What its node says.
    pub fn node(&self) -> String {
        match self.kind {
            kind if kind.is_disk() => {
                let mode = if self.mode == AccessMode::ReadOnly { "ro" } else { "rw" };
                format!("{} {} {mode} {}", kind.word(), self.format.word(), self.resource())
            }
            kind => kind.word().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_qemu_serves_are_told_from_others() {
        let disk = UsbEntry::qdisk("/a.vdi,vdi,vdb,ro,backendtype=qdisk").unwrap().unwrap();
        assert_eq!((disk.node().as_str(), disk.id.as_str()), ("qdisk vdi ro usb-vdb", "vdb"));
        assert_eq!(UsbEntry::parse(&disk.to_text().unwrap()).unwrap(), disk);
        let named = UsbEntry::qdisk("vdev=vdb,backendtype=qdisk,target=/a,b").unwrap().unwrap();
        assert_eq!(named.disk(), Some(Path::new("/a,b")));
        for text in ["/a,raw,xvdb,rw", "/a,raw,xvdb,rw,backendtype=phy", "{vdev = \"xvdb\", path = \"/a\"}"] {
            assert_eq!(UsbEntry::qdisk(text).unwrap(), None, "{text}");
        }
        for (text, want) in [
            ("/a,qed,vdb,rw,backendtype=qdisk", "one of raw, qcow2"),
            ("/a,raw,vdb,w!,backendtype=qdisk", "must be ro"),
            ("/a,raw,,rw,backendtype=qdisk", "vdev is missing"),
            ("a,raw,vdb,rw,backendtype=qdisk", "absolute"),
            ("vdev=vdb,backendtype=qdisk", "needs path"),
            ("/a,raw,vdb,rw,backendtype=qdisk,backend=x", "no backend"),
            ("/a,raw,vdb,rw,cdrom,backendtype=qdisk", "it is a disk"),
        ] {
            let error = UsbEntry::qdisk(text).unwrap_err().0;
            assert!(error.contains(want) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn entries_read_back_and_mistakes_are_told() {
        let disk = UsbEntry::parse("id = \"stick\"\nkind = \"disk\"\npath = \"/a\"\nmode = \"ro\"").unwrap();
        assert_eq!(disk.node(), "disk raw ro usb-stick");
        assert_eq!(UsbEntry::parse(&disk.to_text().unwrap()).unwrap(), disk);
        let tablet = UsbEntry::parse("id = \"t\"\nkind = \"tablet\"").unwrap();
        assert_eq!((tablet.node(), tablet.disk()), ("tablet".into(), None));
        for (text, want) in [
            ("id = \"a.b\"\nkind = \"tablet\"", "1 to 16"),
            ("id = \"12345678901234567\"\nkind = \"tablet\"", "1 to 16"),
            ("id = \"a\"\nkind = \"disk\"", "needs path"),
            ("id = \"a\"\nkind = \"disk\"\npath = \"a\"", "absolute"),
            ("id = \"a\"\nkind = \"mouse\"\npath = \"/a\"", "for kind"),
            ("id = \"a\"\nkind = \"disk\"\npath = \"/a\"\nmode = \"w!\"", "must be"),
            ("id = \"a\"\nkind = \"host\"", "unknown variant"),
        ] {
            let error = UsbEntry::parse(text).unwrap_err().0;
            assert!(error.contains(want) && !error.contains('\n'), "{text}: {error}");
        }
    }
}

//! `[[usbdev]]`: USB devices that QEMU emulates for a guest.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{AccessMode, ConfigError, Format};

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
}

impl UsbKind {
    /// As in files and on command lines.
    pub fn word(self) -> &'static str {
        match self {
            UsbKind::Tablet => "tablet",
            UsbKind::Keyboard => "keyboard",
            UsbKind::Mouse => "mouse",
            UsbKind::Disk => "disk",
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
    pub format: Format,
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
            (UsbKind::Disk, None) => Err(format!("usbdev {id}: a disk needs path")),
            (UsbKind::Disk, Some(path)) if !path.is_absolute() => {
                Err(format!("usbdev {id}: path {path:?} must be absolute"))
            }
            (UsbKind::Disk, Some(_)) if self.mode == AccessMode::Shared => {
                Err(format!("usbdev {id}: mode must be \"rw\" or \"ro\""))
            }
            (UsbKind::Disk, Some(_)) => Ok(()),
            (_, Some(_)) => Err(format!("usbdev {id}: path is for kind \"disk\"")),
            (_, None) => Ok(()),
        }
    }

    /// The file of a disk.
    pub fn disk(&self) -> Option<&Path> {
        self.path.as_deref().filter(|_| self.kind == UsbKind::Disk)
    }

    /// The name by which qemu-bridge opens a disk's file.
    pub fn resource(&self) -> String {
        format!("usb-{}", self.id)
    }

    /// What its node says.
    pub fn node(&self) -> String {
        match self.kind {
            UsbKind::Disk => {
                let mode = if self.mode == AccessMode::ReadOnly { "ro" } else { "rw" };
                format!("disk {} {mode} {}", self.format.word(), self.resource())
            }
            kind => kind.word().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

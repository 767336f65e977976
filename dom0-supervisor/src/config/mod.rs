//! The declarative files: what the host's administrator writes.
//!
//! Reading a file has two steps: [`HostFile::parse`] and [`DomainFile::parse`] take text to checked values and know nothing of the
//! machine; [`check`] then looks at the machine (does the kernel image exist, is the disk long enough).

mod check;
mod disk;
mod domain;
mod host;
mod text;
mod usb;
mod values;
mod xl;

pub use check::{check_disk, check_disk_files, check_file, check_guest_files};
pub use disk::{Backing, DiskEntry, DiskFile, DiskSource, Format, Nbd, Place};
pub(crate) use domain::Q35_PORTS;
pub use domain::{Accel, DomainFile, Firmware, GuestType, Lifecycle, MachineType, OnEvent, VifEntry};
pub use host::{
    BlkbackEntry, ConsoleEntry, HostFile, LimitsEntry, NetbackEntry, NetbackMode, RestartEntry,
    XenstoredEntry,
};
pub use usb::{ImageFormat, MOST_USB, UsbEntry, UsbKind};
pub use values::{AccessMode, DevType, DiskCache, DiskLimits, DiskOptions, Mac, Name, NoSpace, Vdev};

/// Why a file was refused: one line that says where, what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

impl ConfigError {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        ConfigError(text.into())
    }
}

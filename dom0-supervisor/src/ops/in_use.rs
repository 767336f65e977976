//! Whose a file of the host is already: a guest's disk or one of the images below it, a disk that a guest's QEMU serves, a service's of the
//! host file. Locks are what really keeps two writers apart; this gives the better message, and sees images that are only read so far.

use std::path::Path;

use crate::config::{AccessMode, DiskEntry, HostFile, Place, UsbEntry, UsbKind};
use crate::manager::OpError;
use crate::state::State;

/// Refuses a file that another device writes, or, if this one is to write it, that another device has.
///
/// # Errors
/// Whose it is and what to do, in one line.
pub(super) fn free(state: &State, host: &HostFile, path: &Path, writes: bool) -> Result<(), OpError> {
    let clash = |theirs: &Path, they_write: bool| (writes || they_write) && same_file(theirs, path);
    let has = |disk: &DiskEntry| files(disk).any(|(file, written)| clash(file, written));
    let taken = |whose: String| Err(OpError::Exists(format!("{} is {whose}", path.display())));
    for (name, guest) in &state.guests {
        if guest.config.disk.iter().any(&has) {
            return taken(format!("in use by guest {name}; destroy that guest or use another disk"));
        }
        let same =
            |e: &&UsbEntry| e.disk().is_some_and(|theirs| clash(theirs, e.mode != AccessMode::ReadOnly));
        if let Some(entry) = guest.config.usbdev.iter().find(same) {
            return taken(match entry.kind {
                UsbKind::Qdisk => {
                    format!("in use by guest {name}; bh block-detach {name} {} or use another disk", entry.id)
                }
                _ => format!("in use by guest {name} as a USB device; bh usb-detach it or use another disk"),
            });
        }
    }
    match host.blkback.iter().find(|service| has(&service.as_disk())) {
        Some(service) => taken(format!("that of [[blkback]] {0}; write backend = \"{0}\"", service.name)),
        None => Ok(()),
    }
}

/// The files and devices of a disk, each with whether it is written.
pub(super) fn files(disk: &DiskEntry) -> impl Iterator<Item = (&Path, bool)> {
    disk.files().into_iter().filter_map(|file| match file.place {
        Place::Path(path) => Some((path, file.writable)),
        Place::Server(_) | Place::Temporary(_) => None,
    })
}

/// Two names of one file.
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    if a == b {
        return true;
    }
    match (std::fs::metadata(a), std::fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

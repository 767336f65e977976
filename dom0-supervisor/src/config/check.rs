//! What only the machine can tell: files that are missing or too short. Nothing in them is parsed here: guests' disks and
//! kernels are opened for their lengths alone (XSA-443, XSA-508).

use std::fs;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::{ConfigError, DiskEntry, DiskSource, DomainFile};

/// Bytes of a sector: the smallest disk.
const SECTOR: u64 = 512;

/// A regular file of at least one byte that can be read. `what` names it in the error.
///
/// # Errors
/// One line: missing, unreadable, not a file, empty.
pub fn check_file(what: &str, path: &Path) -> Result<(), ConfigError> {
    let file = fs::File::open(path).map_err(|e| {
        ConfigError::new(format!("{what} {}: {}; check the path", path.display(), reason(&e)))
    })?;
    let meta = file.metadata().map_err(|e| ConfigError::new(format!("{what} {}: {e}", path.display())))?;
    if !meta.is_file() {
        return Err(ConfigError::new(format!("{what} {} is not a regular file", path.display())));
    }
    if meta.len() == 0 {
        return Err(ConfigError::new(format!("{what} {} is empty", path.display())));
    }
    Ok(())
}

/// An image file or block device of at least one sector.
///
/// # Errors
/// One line: missing, unreadable, of another kind, shorter than a sector.
pub fn check_disk(what: &str, path: &Path, writable: bool) -> Result<(), ConfigError> {
    let shown = path.display();
    let mut file = fs::File::options().read(true).write(writable).open(path).map_err(|e| {
        ConfigError::new(match e.kind() {
            std::io::ErrorKind::NotFound => {
                format!("{what} {shown} is missing; create it (truncate -s SIZE {shown}) or correct the path")
            }
            std::io::ErrorKind::IsADirectory => {
                format!("{what} {shown} is a directory, not an image file or block device")
            }
            _ => format!("{what} {shown}: {}", reason(&e)),
        })
    })?;
    let meta = file.metadata().map_err(|e| ConfigError::new(format!("{what} {shown}: {e}")))?;
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err(ConfigError::new(format!("{what} {shown} is neither an image file nor a block device")));
    }
    let len = file.seek(SeekFrom::End(0)).map_err(|e| ConfigError::new(format!("{what} {shown}: {e}")))?;
    if len < SECTOR {
        return Err(ConfigError::new(format!(
            "{what} {shown} has {len} bytes, less than a sector ({SECTOR}); make it larger"
        )));
    }
    Ok(())
}

/// Kernel, RAM disk, program and disks of a guest.
///
/// # Errors
/// The first that is wrong.
pub fn check_guest_files(guest: &DomainFile) -> Result<(), ConfigError> {
    let files = [("kernel", &guest.kernel), ("ramdisk", &guest.ramdisk), ("program", &guest.program)];
    for (what, path) in files {
        if let Some(path) = path {
            check_file(what, path)?;
        }
    }
    for (what, path) in guest.usbdev.iter().filter_map(|e| Some((format!("usbdev {}", e.id), e.disk()?))) {
        check_disk(&what, path, false)?;
    }
    for disk in &guest.disk {
        check_disk_files(&format!("disk {}: ", disk.vdev.name()), disk)?;
    }
    Ok(())
}

/// The files of a disk; `at` stands before what is said of them.
///
/// # Errors
/// The first that is wrong.
pub fn check_disk_files(at: &str, disk: &DiskEntry) -> Result<(), ConfigError> {
    if let Some(DiskSource::Path(path)) = disk.source() {
        let what = if at.is_empty() { "disk" } else { at.trim_end() };
        check_disk(what, path, disk.writes_path())?;
    }
    for backing in &disk.backing {
        check_disk(&format!("{at}backing file"), &backing.path, false)?;
    }
    if let Some(key) = &disk.key {
        check_file(&format!("{at}key"), key)?;
    }
    Ok(())
}

fn reason(e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::NotFound => "no such file".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => e.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_disks() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let e = check_file("kernel", &at("missing")).unwrap_err().0;
        assert!(e.starts_with("kernel ") && e.contains("no such file"), "{e}");
        fs::write(at("empty"), "").unwrap();
        assert!(check_file("kernel", &at("empty")).unwrap_err().0.contains("is empty"));
        assert!(check_file("kernel", dir.path()).is_err());
        fs::write(at("short"), [0; 511]).unwrap();
        let e = check_disk("disk xvda:", &at("short"), true).unwrap_err().0;
        assert!(e.contains("511 bytes, less than a sector"), "{e}");
        fs::write(at("ok"), [0; 512]).unwrap();
        check_disk("disk xvda:", &at("ok"), true).unwrap();
        let e = check_disk("disk xvda:", &at("missing"), true).unwrap_err().0;
        assert!(e.contains("is missing; create it"), "{e}");
        assert!(check_disk("disk xvda:", dir.path(), false).is_err());
        assert!(check_disk("disk xvda:", Path::new("/dev/null"), true).unwrap_err().0.contains("neither"));
    }
}

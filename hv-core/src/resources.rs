//! Approved resources: files, devices and listening sockets that dom0 names in a domain's specification.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use hv_abi::resource_kind;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// An approved resource.
#[derive(Clone, Debug)]
pub struct Resource {
    /// A [`resource_kind`].
    pub kind: u32,
    /// Absolute path on the host.
    pub path: String,
    /// Listeners: permission bits.
    pub mode: u32,
    /// Listeners: the socket, kept so that clients queue while the domain's process is dead.
    pub listener: Option<Arc<OwnedFd>>,
}

/// Longest path of a Unix socket (sockaddr_un), without the final NUL.
const SUN_PATH_MAX: usize = 107;

/// Listens at a path; a socket that an earlier owner left there is replaced, anything else is not.
///
/// # Errors
/// In one line.
pub fn listen(path: &str, mode: u32) -> Result<OwnedFd, String> {
    if path.len() > SUN_PATH_MAX {
        return Err(format!("{path}: longer than a socket's path may be ({SUN_PATH_MAX} bytes)"));
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            std::fs::remove_file(path).map_err(|e| format!("{path}: {e}"))?;
        }
        Ok(_) => return Err(format!("{path}: exists and is not a socket")),
        Err(_) => {}
    }
    // hv-core's umask lets nobody else in before the mode is set.
    let listener = UnixListener::bind(path).map_err(|e| format!("{path}: {e}"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o777))
        .map_err(|e| format!("{path}: {e}"))?;
    Ok(listener.into())
}

/// Opens a resource that is not a listener: a new open file description each time, of which hv-core keeps nothing.
/// Symbolic links are followed (disks are named by them); what is there in the end must be of the approved kind.
///
/// # Errors
/// As open(2); `EINVAL` it is of another kind.
pub fn open(kind: u32, path: &str) -> Result<OwnedFd, Errno> {
    let errno = |e: io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
    // Non-blocking, so that a pipe or a tape in that place cannot hold the caller's thread.
    let flags = OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .write(kind != resource_kind::FILE_RO)
        .custom_flags(flags.bits())
        .open(path)
        .map_err(errno)?;
    let file_type = file.metadata().map_err(errno)?.file_type();
    let fits = match kind {
        resource_kind::FILE_RO | resource_kind::FILE_RW => file_type.is_file() || file_type.is_block_device(),
        resource_kind::DEVICE => file_type.is_char_device(),
        _ => false,
    };
    if !fits {
        return Err(Errno::EINVAL);
    }
    let flags = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(file.into())
}

/// The same inside a network namespace: a TAP belongs to the namespace in which /dev/net/tun was opened.
///
/// # Errors
/// As [`open`], and as setns(2).
pub fn open_in_netns(kind: u32, path: &str, netns: &(impl AsFd + Sync)) -> Result<OwnedFd, Errno> {
    std::thread::scope(|scope| {
        // A thread of its own: it ends in the other namespace, so none of ours can be left there.
        let opened = scope.spawn(|| {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
            open(kind, path)
        });
        opened.join().unwrap_or(Err(Errno::EIO))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_open_is_a_new_description() {
        use nix::fcntl::{Flock, FlockArg};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "x").unwrap();
        let path = path.to_str().unwrap();
        let first = open(resource_kind::FILE_RW, path).unwrap();
        let second = open(resource_kind::FILE_RW, path).unwrap();
        let held = Flock::lock(first, FlockArg::LockExclusiveNonblock).unwrap();
        let (second, busy) = Flock::lock(second, FlockArg::LockExclusiveNonblock).unwrap_err();
        assert_eq!(busy, Errno::EWOULDBLOCK);
        drop(held);
        Flock::lock(second, FlockArg::LockExclusiveNonblock).unwrap();
    }

    #[test]
    fn kinds_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().to_str().unwrap();
        assert_eq!(open(resource_kind::FILE_RO, dir).unwrap_err(), Errno::EINVAL);
        assert_eq!(open(resource_kind::FILE_RO, "/dev/null").unwrap_err(), Errno::EINVAL);
        assert!(open(resource_kind::DEVICE, "/dev/null").is_ok());
        assert_eq!(open(resource_kind::FILE_RW, &format!("{dir}/none")).unwrap_err(), Errno::ENOENT);
        let fifo = format!("{dir}/fifo");
        nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(open(resource_kind::FILE_RO, &fifo).unwrap_err(), Errno::EINVAL, "and does not block");
    }

    #[test]
    fn a_stale_socket_is_replaced_but_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s").to_str().unwrap().to_owned();
        drop(listen(&path, 0o600).unwrap());
        drop(listen(&path, 0o600).unwrap());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "x").unwrap();
        assert!(listen(&path, 0o600).unwrap_err().contains("not a socket"));
    }
}

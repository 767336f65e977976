//! Approved resources: files, devices and listening sockets that dom0 names in a domain's specification.

use std::fs::OpenOptions;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use hv_abi::resource_kind;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use uuid::Uuid;

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
    /// Temporary files: the file, which has no name and goes when the resource does.
    pub temporary: Option<Arc<OwnedFd>>,
}

/// A file without a name in the directory `path`.
///
/// # Errors
/// In one line.
pub fn temporary(path: &str) -> Result<OwnedFd, String> {
    let flags = OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).mode(0o600).open(path);
    file.map(OwnedFd::from)
        .map_err(|e| format!("{path}: {e}; it must be a directory of a file system with O_TMPFILE"))
}

/// Longest wait for a server to take a connection.
const CONNECT_WAIT: Duration = Duration::from_secs(10);

/// Whether this names a server: a Unix socket's absolute path, `tcp:` and a numeric address with port, or what [`inside`] knows.
pub fn is_server(path: &str) -> bool {
    if let Some(address) = path.strip_prefix("tcp:") {
        return address.parse::<SocketAddr>().is_ok();
    }
    inside(path).is_some() || (path.starts_with('/') && path.len() <= SUN_PATH_MAX)
}

/// Of `inside:UUID:NAME`, the domain and the name. Its process listens at NAME in the abstract name space, which belongs to its network
/// namespace: nobody else can be there, and no file system is between the two ends.
pub fn inside(path: &str) -> Option<(Uuid, &str)> {
    let (uuid, name) = path.strip_prefix("inside:")?.split_once(':')?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    let fits = !name.is_empty() && name.len() <= SUN_PATH_MAX && name.bytes().all(plain);
    fits.then_some((Uuid::try_parse(uuid).ok()?, name))
}

/// A connection to a server that [`is_server`] knows. Made in the host's network: the domain has none. What is [`inside`] a domain is
/// reached by a thread that is in that domain's network namespace.
fn connect(path: &str) -> io::Result<OwnedFd> {
    if let Some(address) = path.strip_prefix("tcp:") {
        let address = address.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
        return Ok(TcpStream::connect_timeout(&address, CONNECT_WAIT)?.into());
    }
    if let Some((_, name)) = inside(path) {
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
        return Ok(UnixStream::connect_addr(&address)?.into());
    }
    Ok(UnixStream::connect(path)?.into())
}

/// What a socket is called until it listens.
const UNFINISHED: &str = ".new";
/// Longest path of a Unix socket (sockaddr_un), without the final NUL, with room for [`UNFINISHED`].
const SUN_PATH_MAX: usize = 107 - UNFINISHED.len();

/// Listens at a path; a socket that an earlier owner left there is replaced, anything else is not. The path is there from the moment at
/// which it can be connected to, with its mode.
///
/// # Errors
/// In one line.
pub fn listen(path: &str, mode: u32) -> Result<OwnedFd, String> {
    if path.len() > SUN_PATH_MAX {
        return Err(format!("{path}: longer than a socket's path may be ({SUN_PATH_MAX} bytes)"));
    }
    let stale = |path: &str| match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => Err(format!("{path}: exists and is not a socket")),
        Ok(_) => Ok(true),
        Err(_) => Ok(false),
    };
    stale(path)?;
    let unfinished = format!("{path}{UNFINISHED}");
    if stale(&unfinished)? {
        std::fs::remove_file(&unfinished).map_err(|e| format!("{unfinished}: {e}"))?;
    }
    // hv-core's umask lets nobody else in before the mode is set.
    let listener = UnixListener::bind(&unfinished).map_err(|e| format!("{path}: {e}"))?;
    std::fs::set_permissions(&unfinished, std::fs::Permissions::from_mode(mode & 0o777))
        .and_then(|()| std::fs::rename(&unfinished, path))
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
    if kind == resource_kind::CONNECT {
        return connect(path).map_err(errno);
    }
    // Non-blocking, so that a pipe or a tape in that place cannot hold the caller's thread.
    let flags = OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .write(kind != resource_kind::FILE_RO)
        .custom_flags(flags.bits())
        .open(path)
        .map_err(errno)?;
    let file_type = file.metadata().map_err(errno)?.file_type();
    // A device that is written belongs to one: whoever has it mounted or open the same way keeps this out, and this keeps out others.
    let exclusive = kind == resource_kind::FILE_RW && file_type.is_block_device();
    let file = if exclusive {
        drop(file);
        let flags = flags | OFlag::O_EXCL;
        OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(path).map_err(errno)?
    } else {
        file
    };
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

/// A new description of a temporary file.
///
/// # Errors
/// As open(2).
pub fn reopen(temporary: &OwnedFd) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", temporary.as_raw_fd());
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map(OwnedFd::from).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
}

/// How often a caller that waits for one is asked whether it still does.
const GIVE_UP_LOOK: Duration = Duration::from_millis(20);
/// Stack of the thread of an open, bytes.
const STACK: usize = 64 << 10;

/// An owner's opens. open(2) of a file on a server that is away does not come back and cannot be ended: each runs in a thread of
/// its own, so that nobody else waits for it.
#[derive(Clone, Debug)]
pub struct Opens {
    out: Arc<AtomicU32>,
    most: u32,
}

impl Opens {
    /// At most `most` that have not come back.
    pub fn new(most: u32) -> Opens {
        Opens { out: Arc::default(), most }
    }

    /// As [`open`]; `netns`: inside this network namespace (a TAP belongs to that in which /dev/net/tun was opened, an abstract
    /// socket to that in which it was bound). Comes back as soon as `give_up` is true; what the kernel gives later is closed.
    ///
    /// # Errors
    /// As [`open`] and setns(2); `EBUSY` too many have not come back, `ETIMEDOUT` given up, `EAGAIN` no thread.
    pub fn open(
        &self,
        kind: u32,
        path: &str,
        netns: Option<Arc<OwnedFd>>,
        give_up: impl Fn() -> bool,
    ) -> Result<OwnedFd, Errno> {
        self.run(
            {
                let path = path.to_owned();
                move || {
                    // The thread ends in the other namespace, so none of ours can be left there.
                    netns.map_or(Ok(()), |ns| nix::sched::setns(ns, nix::sched::CloneFlags::CLONE_NEWNET))?;
                    open(kind, &path)
                }
            },
            give_up,
        )?
    }

    /// Runs what may hang in the kernel.
    ///
    /// # Errors
    /// As [`Opens::open`], but for the open itself.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
        give_up: impl Fn() -> bool,
    ) -> Result<T, Errno> {
        let counted =
            self.out.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < self.most).then_some(n + 1));
        counted.map_err(|_| Errno::EBUSY)?;
        let (done, result) = std::sync::mpsc::channel();
        let count = self.out.clone();
        let spawned = std::thread::Builder::new().name("open".into()).stack_size(STACK).spawn(move || {
            let result = work();
            count.fetch_sub(1, Ordering::Relaxed);
            // Nobody waits any more: closed here.
            let _given_up = done.send(result);
        });
        if spawned.is_err() {
            self.out.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::EAGAIN);
        }
        loop {
            match result.recv_timeout(GIVE_UP_LOOK) {
                Ok(result) => return Ok(result),
                Err(RecvTimeoutError::Timeout) if give_up() => return Err(Errno::ETIMEDOUT),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Errno::EIO),
            }
        }
    }
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
    fn a_temporary_file_is_reached_afresh_and_has_no_name() {
        use std::io::{Read, Write};
        let dir = tempfile::tempdir().unwrap();
        let held = temporary(dir.path().to_str().unwrap()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        std::fs::File::from(reopen(&held).unwrap()).write_all(b"x").unwrap();
        let mut text = String::new();
        std::fs::File::from(reopen(&held).unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "x", "a description of its own, and the same file");
        assert!(temporary("/nonexistent").unwrap_err().contains("must be a directory"));
    }

    #[test]
    fn servers_are_connected_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(open(resource_kind::CONNECT, path.to_str().unwrap()).is_ok());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", tcp.local_addr().unwrap());
        assert!(is_server(&address) && open(resource_kind::CONNECT, &address).is_ok());
        for bad in ["s", "tcp:localhost:1", "tcp:127.0.0.1", "udp:127.0.0.1:1", ""] {
            assert!(!is_server(bad), "{bad}");
        }
        let uuid = Uuid::from_u128(7);
        assert_eq!(inside(&format!("inside:{uuid}:vif-0")), Some((uuid, "vif-0")));
        for bad in [format!("inside:{uuid}:"), format!("inside:{uuid}:a/b"), "inside::x".into()] {
            assert!(!is_server(&bad), "{bad}");
        }
    }

    #[test]
    fn a_socket_inside_a_domain_is_reached_in_its_network_namespace_alone() {
        let (listening, listens) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let domain = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let netns = OwnedFd::from(std::fs::File::open("/proc/thread-self/ns/net").unwrap());
            let name = std::os::unix::net::SocketAddr::from_abstract_name("vif-0").unwrap();
            let _listener = UnixListener::bind_addr(&name).unwrap();
            listening.send(netns).unwrap();
            let _until_dropped = wait.recv();
        });
        let netns = Arc::new(listens.recv().unwrap());
        let path = format!("inside:{}:vif-0", Uuid::from_u128(7));
        let opens = Opens::new(1);
        assert!(opens.open(resource_kind::CONNECT, &path, Some(netns), || false).is_ok());
        let elsewhere = opens.open(resource_kind::CONNECT, &path, None, || false);
        assert_eq!(elsewhere.unwrap_err(), Errno::ECONNREFUSED);
        drop(done);
        domain.join().unwrap();
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
    fn an_open_that_hangs_is_given_up_and_counted() {
        let opens = Opens::new(3);
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let held = Arc::new(std::sync::Mutex::new(held));
        for _ in 0..3 {
            let held = held.clone();
            let hung = move || held.lock().map(|h| h.recv().is_err()).unwrap_or(true);
            assert_eq!(opens.run(hung, || true).unwrap_err(), Errno::ETIMEDOUT);
        }
        let null = |give_up| opens.open(resource_kind::DEVICE, "/dev/null", None, move || give_up);
        assert_eq!(null(false).unwrap_err(), Errno::EBUSY);
        drop(hold);
        let until = std::time::Instant::now() + Duration::from_secs(10);
        while null(false).is_err() {
            assert!(std::time::Instant::now() < until, "they came back and are not counted any more");
            std::thread::sleep(Duration::from_millis(2));
        }
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

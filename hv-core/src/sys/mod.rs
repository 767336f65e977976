//! The operating system, as far as no safe wrapper exists for it. With [`shm`], the only places of hv-core with `unsafe`.
#![expect(unsafe_code, reason = "raw system calls and received file descriptors")]

pub mod shm;
pub mod sock;

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Takes a descriptor number that a system call returned.
///
/// # Errors
/// The errno behind a negative value.
pub fn take_fd(ret: libc::c_long) -> io::Result<OwnedFd> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system call succeeded, so the number is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(ret as RawFd) })
}

/// Owns the descriptors that arrived with a message.
pub(crate) fn own_received(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel installed this descriptor for us with the message just received; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// A zeroed memfd of `len` bytes that can neither shrink nor grow, and whose seals are final.
///
/// # Errors
/// As memfd_create(2) and ftruncate(2).
pub fn sealed_memfd(name: &CStr, len: u64) -> nix::Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&fd, len as i64)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(fd)
}

/// A non-blocking eventfd at zero.
///
/// # Errors
/// As eventfd(2).
pub fn eventfd() -> nix::Result<OwnedFd> {
    Ok(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?.into())
}

/// Adds 1 to an eventfd. One that is full stays signalled, so nothing is lost.
pub fn kick(fd: impl AsFd) {
    let _full_is_signalled = nix::unistd::write(fd, &1u64.to_ne_bytes());
}

/// Where a descriptor points, as /proc/self/fd tells it ("/memfd:x (deleted)", "anon_inode:\[eventfd\]").
pub fn fd_link(fd: impl AsFd) -> io::Result<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// A pidfd of a child.
///
/// # Errors
/// As pidfd_open(2).
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers.
    take_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends a signal to the process behind a pidfd.
///
/// # Errors
/// As pidfd_send_signal(2); `ESRCH` when it is gone.
pub fn pidfd_kill(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// Landlock's ABI version on this kernel, 0 if there is none.
pub fn landlock_abi() -> u32 {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag the kernel reads no attributes.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    ret.max(0) as u32
}

/// Forks this (single-threaded) process with clone(2) flags and no new stack; `None` in the child.
///
/// # Errors
/// As clone(2).
pub fn fork_with(flags: libc::c_int) -> io::Result<Option<i32>> {
    debug_assert_eq!(flags & libc::CLONE_VM, 0);
    // SAFETY: without CLONE_VM and with a null stack this is fork(2). The callers are the spawner and its children, which
    // never have a second thread, so no lock can be held by a thread that is not there in the child.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_clone,
            (flags | libc::SIGCHLD) as libc::c_ulong,
            0usize,
            0usize,
            0usize,
            0usize,
        )
    };
    match check(ret)? {
        0 => Ok(None),
        pid => Ok(Some(pid as i32)),
    }
}

/// Forks before any thread exists; `None` in the child.
///
/// # Errors
/// As fork(2).
pub fn fork_single_threaded() -> io::Result<Option<i32>> {
    fork_with(0)
}

/// Ends the process at once, without running anything.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: never returns and touches nothing.
    unsafe { libc::_exit(code) }
}

/// prctl(2) with integer arguments only.
///
/// # Errors
/// As prctl(2).
pub fn prctl(option: libc::c_int, arg: libc::c_ulong) -> io::Result<()> {
    const INTEGER_OPTIONS: [libc::c_int; 5] = [
        libc::PR_CAPBSET_DROP,
        libc::PR_SET_NO_NEW_PRIVS,
        libc::PR_SET_PDEATHSIG,
        libc::PR_SET_DUMPABLE,
        libc::PR_SET_KEEPCAPS,
    ];
    assert!(INTEGER_OPTIONS.contains(&option), "only options without pointers");
    // SAFETY: these options take integers.
    check(unsafe { libc::prctl(option, arg, 0, 0, 0) } as libc::c_long).map(drop)
}

/// Sets all capability sets of the thread to nothing (capset(2), version 3).
///
/// # Errors
/// As capset(2).
pub fn drop_thread_caps() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let data = [0u32; 6];
    // SAFETY: both structures are as linux/capability.h has them and live through the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &header, data.as_ptr()) }).map(drop)
}

/// Gives every signal its default action and unblocks all.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: the default action needs no handler; numbers that cannot be set are refused without harm.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let _cannot_fail = nix::sys::signal::SigSet::all().thread_unblock();
}

/// Marks every descriptor from `first` on close-on-exec.
///
/// # Errors
/// As close_range(2).
pub fn cloexec_from(first: u32) -> io::Result<()> {
    // SAFETY: only sets a flag on descriptors.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })
        .map(drop)
}

/// Gives `fd` the number `target` (open across exec); `target` is replaced.
///
/// # Errors
/// As dup2(2).
pub fn dup_to(fd: BorrowedFd<'_>, target: RawFd) -> io::Result<()> {
    // SAFETY: called in the child just before exec, which owns the numbers 0 to 5 by convention.
    check(unsafe { libc::dup2(fd.as_raw_fd(), target) } as libc::c_long).map(drop)
}

/// A duplicate with a number of at least `min`, close-on-exec.
///
/// # Errors
/// As fcntl(2) F_DUPFD_CLOEXEC.
pub fn dup_above(fd: BorrowedFd<'_>, min: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: a plain fcntl.
    take_fd(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, min) } as libc::c_long)
}

/// Runs the program behind `fd` instead of this one. Returns only on failure.
pub fn exec_fd(fd: BorrowedFd<'_>, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(args), pointers(env));
    // SAFETY: both arrays end in null and their strings outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fd.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

const OPEN_TREE_CLONE: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_NOSUID: u64 = 2;
const MOUNT_ATTR_NODEV: u64 = 4;
const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;

/// A detached copy of the mount tree at `path`, to be attached elsewhere by [`attach_mount`].
///
/// # Errors
/// As open_tree(2).
pub fn open_tree(path: &CStr) -> io::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint | libc::AT_RECURSIVE as libc::c_uint;
    // SAFETY: the path is a C string.
    take_fd(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// What a bind mount may not do.
#[derive(Clone, Copy, Debug)]
pub struct MountLimits {
    /// No writing.
    pub read_only: bool,
    /// No device nodes.
    pub no_dev: bool,
}

fn mount_setattr(mount: BorrowedFd<'_>, set: u64, userns: u64) -> io::Result<()> {
    #[repr(C)]
    struct MountAttr {
        attr_set: u64,
        attr_clr: u64,
        propagation: u64,
        userns_fd: u64,
    }
    let attr = MountAttr { attr_set: set, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: userns };
    // SAFETY: `attr` is struct mount_attr of linux/mount.h and lives through the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            (libc::AT_EMPTY_PATH | libc::AT_RECURSIVE) as libc::c_uint,
            &attr,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Limits a detached mount tree.
///
/// # Errors
/// As mount_setattr(2).
pub fn limit_mount(mount: BorrowedFd<'_>, limits: MountLimits) -> io::Result<()> {
    let mut set = MOUNT_ATTR_NOSUID;
    if limits.read_only {
        set |= MOUNT_ATTR_RDONLY;
    }
    if limits.no_dev {
        set |= MOUNT_ATTR_NODEV;
    }
    mount_setattr(mount, set, 0)
}

/// Makes files of host ids 0… in a detached mount appear as those of ids 0… of the user namespace.
///
/// # Errors
/// As mount_setattr(2); `EINVAL` where the file system has no id-mapped mounts.
pub fn idmap_mount(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> io::Result<()> {
    mount_setattr(mount, MOUNT_ATTR_IDMAP, userns.as_raw_fd() as u64)
}

/// Attaches a detached mount at `target`.
///
/// # Errors
/// As move_mount(2).
pub fn attach_mount(mount: BorrowedFd<'_>, target: &CStr) -> io::Result<()> {
    // SAFETY: both paths are C strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// A new detached instance of a file system without options.
///
/// # Errors
/// As fsopen(2), fsconfig(2), fsmount(2).
pub fn detached_fs(kind: &CStr) -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    // SAFETY: the kind is a C string.
    let context = take_fd(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    // SAFETY: this command takes no key and no value.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            std::ptr::null::<u8>(),
            std::ptr::null::<u8>(),
            0,
        )
    })?;
    // SAFETY: plain integers.
    take_fd(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })
}

/// One piece of memory for [`udmabuf_create`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdmabufItem {
    /// The sealed memfd.
    pub memfd: u32,
    /// Zero.
    pub pad: u32,
    /// First byte, a multiple of the page size.
    pub offset: u64,
    /// Bytes, a multiple of the page size.
    pub size: u64,
}

/// A dma-buf of exactly these pieces, in order (UDMABUF_CREATE_LIST, linux/udmabuf.h).
///
/// # Errors
/// As the driver: `EINVAL` too many or unsealed pieces.
pub fn udmabuf_create(device: BorrowedFd<'_>, items: &[UdmabufItem]) -> io::Result<OwnedFd> {
    const UDMABUF_FLAGS_CLOEXEC: u32 = 1;
    // _IOW('u', 0x43, struct udmabuf_create_list), whose size without the list is 8.
    const UDMABUF_CREATE_LIST: libc::c_ulong = 0x4008_7543;
    let mut request = Vec::with_capacity(8 + size_of_val(items));
    request.extend_from_slice(&UDMABUF_FLAGS_CLOEXEC.to_ne_bytes());
    request.extend_from_slice(&(items.len() as u32).to_ne_bytes());
    for item in items {
        request.extend_from_slice(&item.memfd.to_ne_bytes());
        request.extend_from_slice(&0u32.to_ne_bytes());
        request.extend_from_slice(&item.offset.to_ne_bytes());
        request.extend_from_slice(&item.size.to_ne_bytes());
    }
    // SAFETY: the buffer is struct udmabuf_create_list with `count` items behind it; the kernel only reads it.
    take_fd(unsafe { libc::ioctl(device.as_raw_fd(), UDMABUF_CREATE_LIST, request.as_ptr()) } as libc::c_long)
}

/// Brings the loopback interface of the current network namespace up.
///
/// # Errors
/// As the SIOCSIFFLAGS ioctl.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: plain integers.
    let socket = take_fd(
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) } as libc::c_long
    )?;
    // SAFETY: an all-zero ifreq is a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: `request` is a struct ifreq and lives through the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) } as libc::c_long)
        .map(drop)
}

/// The index of a network interface of the current network namespace.
pub fn interface_index(name: &str) -> io::Result<u32> {
    nix::net::if_::if_nametoindex(OsStr::new(name).as_bytes()).map_err(Errno::into)
}

/// CLOCK_MONOTONIC now, nanoseconds.
pub fn monotonic_ns() -> u64 {
    match nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC) {
        Ok(t) => t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64,
        Err(_) => 0,
    }
}

/// A descriptor by its number, which must be open.
pub fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    assert!(fd >= 0, "a descriptor's number");
    // SAFETY: used by the child just before exec for a number that it has just placed and never closes.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

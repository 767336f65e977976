//! Descriptors inherited from hv-core and the few system calls that need `unsafe`.
#![expect(unsafe_code, reason = "inherited descriptors are only known by their numbers")]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// Descriptors that were taken.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes ownership of a descriptor that this process was started with. Each can be taken once.
///
/// # Errors
/// `EBADF` if it is not open or was taken before.
pub fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let bad = || io::Error::from_raw_os_error(nix::libc::EBADF);
    if fd < 3 {
        return Err(bad());
    }
    // SAFETY: the descriptor is only inspected; if it is not open the call fails.
    let probe = unsafe { BorrowedFd::borrow_raw(fd) };
    nix::fcntl::fcntl(probe, nix::fcntl::FcntlArg::F_GETFD)?;
    if !TAKEN.lock().unwrap_or_else(PoisonError::into_inner).insert(fd) {
        return Err(bad());
    }
    nix::fcntl::fcntl(probe, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open (checked) and TAKEN makes this the only owner made from it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a descriptor non-blocking. By fcntl(2): in the sandbox FIONBIO, which the standard library uses, is refused, because it
/// can also turn an event channel's eventfd, whose flags both ends share, into one that blocks.
///
/// # Errors
/// As fcntl(2).
pub fn set_nonblocking(fd: impl std::os::fd::AsFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// dom0's stream to hv-core's control API (descriptor 5), non-blocking, as an event loop wants it.
///
/// # Errors
/// `EBADF`: this is not dom0, or it has been taken before.
pub fn control_stream() -> io::Result<std::os::unix::net::UnixStream> {
    let stream = take_inherited(hv_abi::HVCORE_CONTROL_FD)?;
    set_nonblocking(&stream)?;
    Ok(stream.into())
}

/// Whether the CPU offers VMX or SVM. (A /dev/kvm without is a slow emulation.)
pub fn cpu_can_virtualize() -> bool {
    #[allow(unused_unsafe, reason = "safe in newer toolchains only")]
    // SAFETY: every x86_64 CPU has the CPUID instruction.
    unsafe {
        use std::arch::x86_64::__cpuid;
        let vmx = __cpuid(1).ecx & (1 << 5) != 0;
        let svm = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & (1 << 2) != 0;
        vmx || svm
    }
}

/// Owns a descriptor that the kernel just installed for an SCM_RIGHTS message.
pub(crate) fn own_received(fd: RawFd) -> OwnedFd {
    // SAFETY: recvmsg(2) made this descriptor for us alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

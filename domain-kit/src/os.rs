//! Descriptors inherited from hv-core and the few system calls that need `unsafe`.
#![expect(unsafe_code, reason = "inherited descriptors are only known by their numbers")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bit n is set once descriptor n was taken.
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// Takes ownership of a descriptor that this process was started with. Each can be taken once.
///
/// # Errors
/// `EBADF` if it is not open or was taken before.
pub fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let bad = || io::Error::from_raw_os_error(nix::libc::EBADF);
    if !(3..64).contains(&fd) {
        return Err(bad());
    }
    // SAFETY: the descriptor is only inspected; if it is not open the call fails.
    let probe = unsafe { BorrowedFd::borrow_raw(fd) };
    nix::fcntl::fcntl(probe, nix::fcntl::FcntlArg::F_GETFD)?;
    if TAKEN.fetch_or(1 << fd, Ordering::SeqCst) & (1 << fd) != 0 {
        return Err(bad());
    }
    nix::fcntl::fcntl(probe, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open (checked) and TAKEN makes this the only owner made from it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Owns a descriptor that the kernel just installed for an SCM_RIGHTS message.
pub(crate) fn own_received(fd: RawFd) -> OwnedFd {
    // SAFETY: recvmsg(2) made this descriptor for us alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

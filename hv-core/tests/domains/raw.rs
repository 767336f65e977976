//! What a test needs of descriptors by number, and calls that the filters forbid.
#![expect(unsafe_code, reason = "descriptors by number and raw system calls, in tests only")]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Owns a descriptor that just arrived with a message.
pub fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel installed it for us alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// True if the number is an open descriptor.
pub fn is_open(fd: RawFd) -> bool {
    // SAFETY: only inspected, for the length of this call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).is_ok()
}

/// A system call without arguments.
pub fn call(number: i64) -> i64 {
    // SAFETY: the callers pass calls that touch no memory when all arguments are zero.
    unsafe { nix::libc::syscall(number, 0, 0, 0, 0, 0, 0) }
}

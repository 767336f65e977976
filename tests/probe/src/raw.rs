//! System calls that safe interfaces do not offer, or whose numbers a test chooses.
#![expect(unsafe_code, reason = "raw system calls and io_uring operations, in a test program only")]

use std::ffi::CString;
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::BorrowedFd;

use io_uring::{IoUring, opcode, squeue, types};

/// True if the number is an open descriptor.
pub fn is_open(fd: i32) -> bool {
    // SAFETY: only inspected, for the length of this call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).is_ok()
}

/// A system call with up to three numbers. The test passes no calls that write memory.
pub fn call(number: i64, args: [i64; 3]) -> io::Result<()> {
    // SAFETY: the arguments are small numbers, never addresses; calls that take addresses fail with EFAULT on them.
    let result = unsafe { libc::syscall(number, args[0], args[1], args[2], 0, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn run(entry: &squeue::Entry) -> io::Result<i32> {
    let mut ring = IoUring::new(2)?;
    // SAFETY: what the entry points to outlives this call, which waits for its completion.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let done = ring.completion().next().ok_or(io::ErrorKind::UnexpectedEof)?;
    if done.result() < 0 { Err(io::Error::from_raw_os_error(-done.result())) } else { Ok(done.result()) }
}

/// Opens for reading by io_uring.
pub fn uring_open(path: &str) -> io::Result<()> {
    let path = CString::new(path)?;
    run(&opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).flags(libc::O_RDONLY).build())
        .map(drop)
}

/// A TCP socket made and connected by io_uring.
pub fn uring_connect(to: SocketAddrV4) -> io::Result<()> {
    let fd = run(&opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build())?;
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: to.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*to.ip()).to_be() },
        sin_zero: [0; 8],
    };
    let len = size_of_val(&address) as u32;
    run(&opcode::Connect::new(types::Fd(fd), (&raw const address).cast(), len).build()).map(drop)
}

//! The system calls that need `unsafe`: TAP ioctls, and reads and writes whose buffer is shared memory.
#![expect(unsafe_code, reason = "ioctls take pointers, and shared memory is only reachable by pointers")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use domain_kit::mem::SharedMem;
use nix::libc;

/// `struct ifreq` as TUNSETIFF uses it (linux/if.h): a name, then flags.
#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

// linux/if_tun.h: _IOW('T', n, int) and _IOR.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

fn answer(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches a /dev/net/tun descriptor to the interface `name`, made if there is none. `flags` are IFF_*.
pub(crate) fn tun_set_iff(fd: BorrowedFd<'_>, name: &str, flags: i16) -> io::Result<()> {
    let mut req = IfReq { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    req.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads and writes one struct ifreq, which `req` is in layout and size.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut req) })
}

/// Name of the interface that the descriptor is attached to.
pub(crate) fn tun_get_name(fd: BorrowedFd<'_>) -> io::Result<String> {
    let mut req = IfReq { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
    // SAFETY: TUNGETIFF writes one struct ifreq, which `req` is in layout and size.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut req) })?;
    let len = req.name.iter().position(|&b| b == 0).unwrap_or(req.name.len());
    Ok(String::from_utf8_lossy(&req.name[..len]).into_owned())
}

/// Says which offloads (TUN_F_*) the reader of the TAP can handle.
pub(crate) fn tun_set_offload(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, u64::from(flags)) })
}

/// Sets the length of the virtio_net_hdr before each packet.
pub(crate) fn tun_set_vnet_hdr_size(fd: BorrowedFd<'_>, size: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })
}

/// read(2) into shared memory; `None` when there is nothing to read.
pub(crate) fn read_into(
    fd: BorrowedFd<'_>,
    mem: &SharedMem,
    offset: usize,
    len: usize,
) -> io::Result<Option<usize>> {
    assert!(offset.checked_add(len).is_some_and(|end| end <= mem.len()));
    // SAFETY: the range lies inside the mapping (asserted), which lives as long as `mem`; nobody holds a
    // reference into it.
    let got = unsafe { libc::read(fd.as_raw_fd(), mem.as_ptr().add(offset).cast(), len) };
    usize::try_from(got).map(Some).or_else(|_| would_block())
}

/// write(2) from shared memory; `None` when the device is full.
pub(crate) fn write_from(
    fd: BorrowedFd<'_>,
    mem: &SharedMem,
    offset: usize,
    len: usize,
) -> io::Result<Option<usize>> {
    assert!(offset.checked_add(len).is_some_and(|end| end <= mem.len()));
    // SAFETY: the range lies inside the mapping (asserted), which lives as long as `mem`; the kernel copes with
    // bytes that change while it reads.
    let put = unsafe { libc::write(fd.as_raw_fd(), mem.as_ptr().add(offset).cast_const().cast(), len) };
    usize::try_from(put).map(Some).or_else(|_| would_block())
}

fn would_block<T>() -> io::Result<Option<T>> {
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
        _ => Err(error),
    }
}

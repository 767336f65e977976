//! A TAP interface: netback's side of the packet path into the kernel.
//!
//! One for the domain: towards its uplink, or towards its own kernel that routes. Its descriptor goes to the fd store, so that
//! the interface, its carrier and what is queued in it outlive an incarnation.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use domain_kit::mem::SharedMem;
use nix::libc;
use serde::{Deserialize, Serialize};

use crate::offload::{TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, VNET_HDR_LEN};
use crate::sys;

/// The device that makes TAP interfaces, bound into the sandbox.
pub const TUN_DEVICE: &str = "/dev/net/tun";

/// What a frontend can take without help.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offloads {
    /// Packets whose checksum is still blank (IPv4).
    pub csum: bool,
    /// Packets whose checksum is still blank (IPv6).
    pub csum_ipv6: bool,
    /// TCP segments over IPv4 larger than the MTU.
    pub gso_tcpv4: bool,
    /// TCP segments over IPv6 larger than the MTU.
    pub gso_tcpv6: bool,
    /// Packets of more than one slot.
    pub sg: bool,
}

/// A TAP interface's descriptor.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
}

impl Tap {
    /// Makes the interface `name` in this process's network namespace (or attaches to it, if it is persistent).
    ///
    /// # Errors
    /// open(2)'s for /dev/net/tun (not bound into the sandbox, no permission), TUNSETIFF's (`EBUSY`: another
    /// descriptor is attached; `EPERM`: no CAP_NET_ADMIN here).
    pub fn create(name: &str) -> io::Result<Tap> {
        let tun =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN_DEVICE)?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        sys::tun_set_iff(tun.as_fd(), name, flags as i16)?;
        Self::from_fd(tun.into())
    }

    /// Takes over a descriptor that an earlier incarnation attached.
    ///
    /// # Errors
    /// TUNGETIFF's: it is not an attached TAP.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Tap> {
        let name = sys::tun_get_name(fd.as_fd())?;
        sys::tun_set_vnet_hdr_size(fd.as_fd(), VNET_HDR_LEN as i32)?;
        Ok(Tap { fd, name })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells the kernel that it may leave checksums and segmentation undone; what a frontend cannot take, the switch does.
    ///
    /// # Errors
    /// TUNSETOFFLOAD's.
    pub fn take_all_offloads(&self) -> io::Result<()> {
        sys::tun_set_offload(self.fd.as_fd(), TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
    }

    /// Reads one packet (virtio_net_hdr first) to `offset` of `mem`; `None` when there is none. A packet longer than `len` is
    /// cut by the kernel.
    ///
    /// # Errors
    /// read(2)'s; `EBADFD` when the interface is gone.
    pub fn read(&self, mem: &SharedMem, offset: usize, len: usize) -> io::Result<Option<usize>> {
        sys::read_into(self.fd.as_fd(), mem, offset, len)
    }

    /// Writes one packet (virtio_net_hdr first) from `offset` of `mem`; `None` when the kernel took none.
    ///
    /// # Errors
    /// write(2)'s: `EINVAL` for headers that make no sense, `EIO` when the interface is down.
    pub fn write(&self, mem: &SharedMem, offset: usize, len: usize) -> io::Result<Option<usize>> {
        sys::write_from(self.fd.as_fd(), mem, offset, len)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

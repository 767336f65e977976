//! Moving a network interface into a domain's network namespace, by rtnetlink.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, socket,
};

use crate::sys;

/// linux/rtnetlink.h
const RTM_SETLINK: u16 = 19;
/// linux/netlink.h: NLM_F_REQUEST | NLM_F_ACK
const REQUEST_ACK: u16 = 1 | 4;
/// linux/if_link.h
const IFLA_NET_NS_FD: u16 = 28;
/// linux/netlink.h
const NLMSG_ERROR: u16 = 2;

/// nlmsghdr, ifinfomsg, one attribute: the request to move interface `index` into the namespace behind `netns`.
fn request(index: u32, netns: i32) -> Vec<u8> {
    let mut message = Vec::with_capacity(40);
    message.extend_from_slice(&40u32.to_ne_bytes()); // nlmsg_len
    message.extend_from_slice(&RTM_SETLINK.to_ne_bytes());
    message.extend_from_slice(&REQUEST_ACK.to_ne_bytes());
    message.extend_from_slice(&1u32.to_ne_bytes()); // nlmsg_seq
    message.extend_from_slice(&0u32.to_ne_bytes()); // nlmsg_pid: the kernel
    message.extend_from_slice(&[0; 4]); // ifi_family, padding, ifi_type
    message.extend_from_slice(&index.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // ifi_flags, ifi_change: nothing
    message.extend_from_slice(&8u16.to_ne_bytes()); // rta_len
    message.extend_from_slice(&IFLA_NET_NS_FD.to_ne_bytes());
    message.extend_from_slice(&netns.to_ne_bytes());
    message
}

/// Takes an interface out of a namespace whose domain goes, back to the caller's: a physical one would come back by itself, any
/// other would be gone with the namespace.
///
/// # Errors
/// As [`move_to`], and as setns(2).
pub fn bring_back(name: &str, netns: BorrowedFd<'_>) -> io::Result<()> {
    let own = std::fs::File::open("/proc/thread-self/ns/net")?;
    std::thread::scope(|scope| {
        // A thread of its own: it ends in the other namespace, so none of ours can be left there.
        let moved = scope.spawn(|| {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
            move_to(name, own.as_fd())
        });
        moved.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })
}

/// Moves an interface of the host; it keeps its name.
///
/// # Errors
/// `NotFound` no such interface; else as the kernel.
pub fn move_to(name: &str, netns: BorrowedFd<'_>) -> io::Result<()> {
    let index = sys::interface_index(name)
        .map_err(|_| io::Error::new(io::ErrorKind::NotFound, "no such interface"))?;
    let socket =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let message = request(index, netns.as_raw_fd());
    sendto(socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let len = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // nlmsghdr (16 bytes, type at 4), then nlmsgerr, which begins with a negative errno or 0.
    let kind = answer[..len].get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    let error = answer[..len].get(16..20).map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    match (kind, error) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(errno)) => Err(io::Error::from_raw_os_error(-errno)),
        _ => Err(io::Error::other("rtnetlink answers something odd")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_forty_bytes_and_a_missing_interface_is_told() {
        assert_eq!(request(7, 9).len(), 40);
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = move_to("nosuchif0", null.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}

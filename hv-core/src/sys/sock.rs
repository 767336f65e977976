//! Messages with file descriptors over SOCK_SEQPACKET sockets.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

/// A message as it came in.
#[derive(Debug)]
pub struct Message {
    /// Bytes in the caller's buffer.
    pub len: usize,
    /// Descriptors beside it; dropping them closes them.
    pub fds: Vec<OwnedFd>,
    /// It had more bytes or descriptors than fit; what did not fit is gone.
    pub truncated: bool,
}

/// A connected pair of SOCK_SEQPACKET sockets.
///
/// # Errors
/// As socketpair(2).
pub fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}

/// Receives one message, waiting for it. `Ok(None)`: the peer is gone or the socket was shut down.
///
/// # Errors
/// As recvmsg(2).
pub fn recv(socket: impl AsFd, buffer: &mut [u8], max_fds: usize) -> nix::Result<Option<Message>> {
    let raw = socket.as_fd().as_raw_fd();
    let mut space = vec![0u8; control_space(max_fds)];
    loop {
        space.fill(0);
        let mut into = [IoSliceMut::new(buffer)];
        let message = match recvmsg::<()>(raw, &mut into, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => message,
            Err(Errno::EINTR) => continue,
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(e) => return Err(e),
        };
        let bytes = message.bytes;
        let mut truncated = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        let mut fds = Vec::new();
        match message.cmsgs() {
            Ok(controls) => {
                for control in controls {
                    if let ControlMessageOwned::ScmRights(list) = control {
                        fds.extend(list.into_iter().map(super::own_received));
                    }
                }
            }
            // nix refuses to walk a truncated list. What the kernel installed is in the buffer all the same.
            Err(_) => {
                truncated = true;
                fds.extend(salvage(&space));
            }
        }
        if bytes == 0 && fds.is_empty() && hung_up(socket.as_fd()) {
            return Ok(None);
        }
        return Ok(Some(Message { len: bytes, fds, truncated }));
    }
}

/// Bytes of control buffer for `fds` descriptors.
fn control_space(fds: usize) -> usize {
    // CMSG_SPACE: both header and data are rounded up to 8 bytes.
    16 + (fds * size_of::<RawFd>()).next_multiple_of(8)
}

/// The descriptors in a truncated control buffer: one SCM_RIGHTS header (length, level, type), then the numbers.
fn salvage(space: &[u8]) -> Vec<OwnedFd> {
    let (Some(len), Some(level), Some(kind)) = (space.get(0..8), space.get(8..12), space.get(12..16)) else {
        return Vec::new();
    };
    let len = u64::from_ne_bytes(len.try_into().unwrap_or_default()) as usize;
    let level = i32::from_ne_bytes(level.try_into().unwrap_or_default());
    let kind = i32::from_ne_bytes(kind.try_into().unwrap_or_default());
    if (level, kind) != (nix::libc::SOL_SOCKET, nix::libc::SCM_RIGHTS) || len < 16 {
        return Vec::new();
    }
    let (numbers, _) = space[16..len.min(space.len())].as_chunks::<4>();
    numbers.iter().map(|n| super::own_received(i32::from_ne_bytes(*n))).collect()
}

/// True if the peer has closed its end or the socket was shut down.
fn hung_up(socket: BorrowedFd<'_>) -> bool {
    // nix does not know this flag; `revents` is then `None`, which counts as gone too.
    let rdhup = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
    let mut fds = [PollFd::new(socket, rdhup)];
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(0) => false,
        Ok(_) => fds[0].revents().is_none_or(|r| r.intersects(gone)),
        Err(_) => true,
    }
}

/// Sends one message of several parts with descriptors beside it.
///
/// # Errors
/// As sendmsg(2); `EPIPE` when the peer is gone.
pub fn send(socket: impl AsFd, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) -> nix::Result<()> {
    let slices: Vec<IoSlice<'_>> = parts.iter().map(|p| IoSlice::new(p)).collect();
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(socket.as_fd().as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Descriptors of this process for the same socket; other tests of the process open and close their own meanwhile.
    fn descriptors_of(socket: &OwnedFd) -> usize {
        let name = |path: &std::path::Path| std::fs::read_link(path).ok();
        let wanted = name(format!("/proc/self/fd/{}", socket.as_raw_fd()).as_ref());
        let all = std::fs::read_dir("/proc/self/fd").unwrap();
        all.filter(|entry| name(&entry.as_ref().unwrap().path()) == wanted).count()
    }

    #[test]
    fn too_many_fds_are_closed_and_reported() {
        let (a, b) = pair().unwrap();
        let extra: Vec<BorrowedFd<'_>> = (0..40).map(|_| a.as_fd()).collect();
        send(&a, &[b"x"], &extra).unwrap();
        let mut buffer = [0; 16];
        let message = recv(&b, &mut buffer, 4).unwrap().unwrap();
        assert!(message.truncated);
        assert!(message.fds.len() <= 4, "{}", message.fds.len());
        drop(message);
        assert_eq!(descriptors_of(&a), 1, "nothing leaks");
    }

    #[test]
    fn an_empty_message_is_not_the_end() {
        let (a, b) = pair().unwrap();
        let mut buffer = [0; 16];
        send(&a, &[b""], &[]).unwrap();
        assert_eq!(recv(&b, &mut buffer, 4).unwrap().unwrap().len, 0);
        send(&a, &[b"long message of more than sixteen bytes"], &[]).unwrap();
        assert!(recv(&b, &mut buffer, 4).unwrap().unwrap().truncated);
        drop(a);
        assert!(recv(&b, &mut buffer, 4).unwrap().is_none());
    }
}

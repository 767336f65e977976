//! A look at the frontend's next message before the `vhost` crate reads it: for two things that the crate does not tell.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

/// Request, flags, bytes of the body.
const HEADER: usize = 12;
/// Flags: version 1, no reply wanted.
const VERSION: u32 = 1;

/// What the next message is, if it matters.
#[derive(Debug)]
pub enum Next {
    /// SET_VRING_ENABLE: the queue and the wish.
    Enable(u32, bool),
    /// SET_BACKEND_REQ_FD: where the backend may say something unasked; a descriptor of our own, beside the message's.
    Channel(BackChannel),
    /// Anything else, or none.
    Other,
}

fn word(message: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]])
}

/// Waits for the next message as whoever reads it would, and leaves it there.
pub fn next(stream: &UnixStream) -> Next {
    let mut message = [0; HEADER + 8];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL;
    if recv(stream.as_raw_fd(), &mut message[..HEADER], flags) != Ok(HEADER) {
        return Next::Other;
    }
    let (request, len) = (word(&message, 0), word(&message, 8));
    if request == FrontendReq::SET_BACKEND_REQ_FD as u32 {
        return channel(stream).map_or(Next::Other, Next::Channel);
    }
    if request != FrontendReq::SET_VRING_ENABLE as u32 || len != 8 {
        return Next::Other;
    }
    match recv(stream.as_raw_fd(), &mut message, flags) {
        Ok(n) if n == message.len() => Next::Enable(word(&message, 12), word(&message, 16) == 1),
        _ => Next::Other,
    }
}

/// The one descriptor that comes with the next message.
fn channel(stream: &UnixStream) -> Option<BackChannel> {
    let mut header = [0; HEADER];
    let mut into = [IoSliceMut::new(&mut header)];
    // Room for more than one, so that none stays open that is not looked at.
    let mut space = nix::cmsg_space!([i32; 8]);
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut into, Some(&mut space), flags).ok()?;
    let mut found = Vec::new();
    for control in message.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // Peeked descriptors are new ones too.
            found.extend(fds.into_iter().map(crate::os::own_received));
        }
    }
    found.truncate(1);
    found.pop().map(BackChannel)
}

/// Where a backend says something unasked.
#[derive(Debug)]
pub struct BackChannel(OwnedFd);

impl BackChannel {
    /// Says that the configuration space has changed (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG); the frontend then reads it again. False
    /// if it could not be said now.
    pub fn config_changed(&self) -> bool {
        let words = [BackendReq::CONFIG_CHANGE_MSG as u32, VERSION, 0];
        let message: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // The other end may not read at all.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        send(self.0.as_raw_fd(), &message, flags) == Ok(message.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{IoSlice, Read, Write};

    use nix::sys::socket::{ControlMessage, sendmsg};

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn an_enable_is_seen_before_it_is_read() {
        const ENABLE: u32 = 18;
        const SET_OWNER: u32 = 3;
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes(&[ENABLE, 1, 8, 1, 1])).unwrap();
        assert!(matches!(next(&ours), Next::Enable(1, true)));
        assert!(matches!(next(&ours), Next::Enable(1, true)), "it is still there");
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes(&[SET_OWNER, 1, 0])).unwrap();
        assert!(matches!(next(&ours), Next::Other));
        theirs.shutdown(std::net::Shutdown::Both).unwrap();
        let (_, ours) = UnixStream::pair().unwrap();
        assert!(matches!(next(&ours), Next::Other), "nobody there");
    }

    #[test]
    fn a_channel_is_taken_beside_the_message_that_has_it() {
        const SET_BACKEND_REQ_FD: u32 = 21;
        let (theirs, mut ours) = UnixStream::pair().unwrap();
        let (mut qemu, given) = UnixStream::pair().unwrap();
        let message = bytes(&[SET_BACKEND_REQ_FD, 1, 0]);
        let fds = [given.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(theirs.as_raw_fd(), &[IoSlice::new(&message)], &rights, MsgFlags::empty(), None)
            .unwrap();
        let Next::Channel(channel) = next(&ours) else { panic!("no channel") };
        let mut still = [0; HEADER];
        ours.read_exact(&mut still).unwrap();
        assert_eq!(still.as_slice(), message);
        drop(given);
        assert!(channel.config_changed());
        let mut said = [0; HEADER];
        qemu.read_exact(&mut said).unwrap();
        assert_eq!((word(&said, 0), word(&said, 4), word(&said, 8)), (2, 1, 0));
        drop(qemu);
        assert!(!channel.config_changed(), "nobody there");
        // Without a descriptor it is no channel.
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        theirs.write_all(&message).unwrap();
        assert!(matches!(next(&ours), Next::Other));
    }
}

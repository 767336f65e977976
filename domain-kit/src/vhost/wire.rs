//! A conversation's outside: a connected socket, and hv-core's fd store.
//!
//! ```text
//!   talk-NAME            the conversation's memory          talk-NAME.socket     the connection
//!   talk-NAME.N          descriptor number N of the frontend's: guest memory, kicks, calls
//! ```

use std::io::IoSliceMut;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_abi::fd_kind;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, RecvMsg, UnixAddr, recv, recvmsg};

use super::conversation::{BYTES, Conversation, Wire};
use super::record::{HEAD, MAX_FDS, Message, body_len};
use crate::hypercall::Hypercall;
use crate::mem::SharedMem;

/// How long the rest of a message may take to come once its head is there.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks for it.
const PAUSE: Duration = Duration::from_millis(1);

/// A conversation with a real frontend.
pub type Talk<'a> = Conversation<Socket<'a>, Arc<SharedMem>>;

/// Where a conversation is kept.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// A channel of the talking thread's own.
    pub hv: &'a Hypercall,
    /// The device: `vbd-DOMID-ID`, `vif…`.
    pub device: &'a str,
    /// The frontend's creation (hv-core's `instance`).
    pub instance: u64,
}

impl Place<'_> {
    fn name(&self) -> String {
        format!("talk-{}", self.device)
    }

    fn socket(&self) -> String {
        format!("talk-{}.socket", self.device)
    }

    fn fd(&self, number: u64) -> String {
        format!("talk-{}.{number}", self.device)
    }

    fn numbers(&self) -> Vec<u64> {
        let entries = self.hv.fd_list().unwrap_or_default();
        let number = |name: &str| {
            name.strip_prefix("talk-")?.strip_prefix(self.device)?.strip_prefix('.')?.parse().ok()
        };
        entries.iter().filter_map(|entry| number(entry.name.as_str()?)).collect()
    }

    /// Drops all that is kept of a conversation.
    pub fn forget(&self) {
        // The memory last: what it names is gone before it.
        let numbers = self.numbers().into_iter().map(|n| self.fd(n));
        for name in [self.socket()].into_iter().chain(numbers).chain([self.name()]) {
            delete(self.hv, &name);
        }
    }
}

fn delete(hv: &Hypercall, name: &str) {
    match hv.fd_delete(name) {
        Err(error) if !error.is(Errno::ENOENT) => tracing::warn!(name, %error, "fd store entry stays"),
        _ => {}
    }
}

/// See the module.
#[derive(Debug)]
pub struct Socket<'a> {
    stream: UnixStream,
    mem: Arc<SharedMem>,
    place: Option<Place<'a>>,
}

fn memory() -> Result<(Arc<SharedMem>, OwnedFd), String> {
    let (mem, fd) = SharedMem::create("conversation", BYTES).map_err(|e| format!("making memory: {e}"))?;
    Ok((Arc::new(mem), fd))
}

/// A conversation on a new connection that ends with this process.
///
/// # Errors
/// No memory.
pub fn talk(stream: UnixStream) -> Result<Talk<'static>, String> {
    let (mem, _) = memory()?;
    let wire = Socket { stream, mem: mem.clone(), place: None };
    Ok(Conversation::begin(wire, mem, 0, false))
}

/// A conversation on a new connection that is kept.
///
/// # Errors
/// No memory.
pub fn talk_at(place: Place<'_>, stream: UnixStream) -> Result<Talk<'_>, String> {
    place.forget();
    let (mem, fd) = memory()?;
    let wire = Socket { stream, mem: mem.clone(), place: Some(place) };
    let socket = wire.stream.try_clone().map_err(|e| format!("the connection: {e}"))?;
    let mut talk = Conversation::begin(wire, mem, place.instance, true);
    let hv = place.hv;
    let stored = hv.fd_put(&place.name(), fd_kind::MEMFD, 0, &fd);
    if let Err(error) = stored.and_then(|()| hv.fd_put(&place.socket(), fd_kind::SOCKET, 0, &socket)) {
        tracing::warn!(device = place.device, %error, "the frontend will hear of a restart");
        talk.let_go();
    }
    Ok(talk)
}

/// The conversation that a predecessor left there, if there is one that can be taken up; what else is there is dropped.
pub fn take_up(place: Place<'_>, crashed: bool) -> Option<(Talk<'_>, UnixStream)> {
    let fetched = (|| {
        let memory = place.hv.fd_get(&place.name())?.1;
        Ok::<_, crate::HvError>((memory, place.hv.fd_get(&place.socket())?.1))
    })();
    let talk = match fetched {
        Err(error) if error.is(Errno::ENOENT) => Err(None),
        Err(error) => Err(Some(error.to_string())),
        Ok((memory, socket)) => resume(place, &memory, socket, crashed).map_err(Some),
    };
    match talk {
        Ok(talk) => Some(talk),
        Err(why) => {
            if let Some(why) = why {
                tracing::warn!(device = place.device, why, "the frontend is hung up on");
            }
            place.forget();
            None
        }
    }
}

fn resume<'a>(
    place: Place<'a>,
    memory: &OwnedFd,
    socket: OwnedFd,
    crashed: bool,
) -> Result<(Talk<'a>, UnixStream), String> {
    let len = nix::sys::stat::fstat(memory).map_err(|e| format!("what is kept: {e}"))?.st_size;
    if len != BYTES as i64 {
        return Err(format!("what is kept of the conversation has {len} bytes instead of {BYTES}"));
    }
    let mem = Arc::new(SharedMem::map(memory, BYTES).map_err(|e| format!("what is kept: {e}"))?);
    let stream = UnixStream::from(socket);
    let ours = stream.try_clone().map_err(|e| format!("the connection: {e}"))?;
    let wire = Socket { stream, mem: mem.clone(), place: Some(place) };
    Ok((Conversation::take_up(wire, mem, place.instance, crashed)?, ours))
}

impl Socket<'_> {
    /// Waits until so many bytes can be looked at. False: they never come.
    fn await_bytes(&self, bytes: &mut [u8]) -> Result<bool, String> {
        let mut since = None;
        loop {
            // Sleeps until there is anything; then what is there.
            let seen = match recv(self.stream.as_raw_fd(), bytes, MsgFlags::MSG_PEEK) {
                Ok(0) => return Ok(false),
                Ok(seen) => seen,
                Err(Errno::EINTR) => continue,
                Err(_) => return Ok(false),
            };
            if seen == bytes.len() {
                return Ok(true);
            }
            if since.get_or_insert_with(Instant::now).elapsed() > PATIENCE || self.is_over() {
                return Err("the frontend's message is not whole".into());
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn is_over(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut ask = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        matches!(poll(&mut ask, PollTimeout::ZERO), Ok(1..))
    }
}

/// The descriptors of a received message.
///
/// # Errors
/// There were more.
pub(super) fn fds_of(received: &RecvMsg<'_, '_, UnixAddr>) -> Result<Vec<OwnedFd>, String> {
    let mut fds = Vec::new();
    for message in received.cmsgs().map_err(|e| format!("a message's descriptors: {e}"))? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            fds.extend(numbers.into_iter().map(crate::os::own_received));
        }
    }
    if received.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err("a message with too many descriptors".into());
    }
    Ok(fds)
}

impl Wire for Socket<'_> {
    type Fd = OwnedFd;

    fn look(&mut self) -> Result<Option<Message<OwnedFd>>, String> {
        let mut head = [0; HEAD];
        match self.await_bytes(&mut head) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(_) if self.is_over() => return Ok(None),
            Err(error) => return Err(error),
        }
        let len = body_len(&head).ok_or("a message that is too long")?;
        let mut bytes = vec![0; HEAD + len];
        if !self.await_bytes(&mut bytes)? {
            return Ok(None);
        }
        let mut message = Message::new(&bytes, Vec::new()).ok_or("the frontend's message is not whole")?;
        if !message.brings_fds() {
            return Ok(Some(message));
        }
        // Linux's look at a message without descriptors also sees those of the next one (unix_stream_read_generic goes on to it before
        // it asks whether all bytes are there), hence not for every message.
        let mut space = cmsg_space!([std::os::fd::RawFd; MAX_FDS]);
        message.fds = {
            let mut into = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC;
            let received = recvmsg::<UnixAddr>(self.stream.as_raw_fd(), &mut into, Some(&mut space), flags)
                .map_err(|e| format!("looking at a message: {e}"))?;
            fds_of(&received)?
        };
        Ok(Some(message))
    }

    fn send(&mut self, head: usize, bytes: &[u8], fd: Option<&OwnedFd>) -> bool {
        let sent = self.mem.send_counted(self.stream.as_fd(), head, bytes, fd.map(AsFd::as_fd));
        matches!(sent, Ok(()) | Err(Errno::EINTR))
    }

    fn take(&mut self, head: usize, len: usize) -> bool {
        let mut bytes = vec![0; len];
        let taken = self.mem.recv_counted(self.stream.as_fd(), head, &mut bytes);
        let none = taken.is_ok()
            && self.mem.load_u32(head + crate::mem::MSG_LEN, std::sync::atomic::Ordering::Acquire) == 0;
        matches!(taken, Ok(()) | Err(Errno::EINTR)) && !none
    }

    fn store(&mut self, number: u64, fd: &OwnedFd) -> bool {
        let Some(place) = &self.place else { return true };
        // hv-core knows which it is.
        let put = |kind| place.hv.fd_put(&place.fd(number), kind, 0, fd);
        let stored = put(fd_kind::EVENTFD).or_else(|_| put(fd_kind::MEMFD));
        if let Err(error) = &stored {
            tracing::warn!(device = place.device, %error, "storing a frontend's descriptor");
        }
        stored.is_ok()
    }

    fn fetch(&mut self, number: u64) -> Result<OwnedFd, String> {
        let place = self.place.as_ref().ok_or("nothing is kept")?;
        place.hv.fd_get(&place.fd(number)).map(|(_, fd)| fd).map_err(|e| e.to_string())
    }

    fn stored(&mut self) -> Vec<u64> {
        self.place.as_ref().map(Place::numbers).unwrap_or_default()
    }

    fn drop_stored(&mut self, number: u64) {
        if let Some(place) = &self.place {
            delete(place.hv, &place.fd(number));
        }
    }

    fn let_go(&mut self) {
        if let Some(place) = self.place.take() {
            place.forget();
        }
    }
}

impl Drop for Socket<'_> {
    /// Only a kill leaves a conversation behind.
    fn drop(&mut self) {
        let _gone_already = self.stream.shutdown(Shutdown::Both);
        self.let_go();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read, Write};
    use std::sync::mpsc::channel;

    use nix::sys::eventfd::EventFd;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use vhost::vhost_user::message::FrontendReq as R;

    use super::super::fake;
    use super::*;
    use crate::mem::sealed_memfd;

    fn say(frontend: &UnixStream, request: R, body: &[u8], fds: &[&OwnedFd]) {
        let bytes =
            Message::<()> { request: request as u32, flags: 1, body: body.to_vec(), fds: vec![] }.bytes();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(frontend.as_raw_fd(), &[IoSlice::new(&bytes)], rights, MsgFlags::empty(), None)
            .unwrap();
    }

    /// Several messages are on their way: each is seen with its own descriptors, and taken with no other.
    #[test]
    fn a_message_is_seen_with_its_own_descriptors() {
        let (frontend, backend) = UnixStream::pair().unwrap();
        let memory = [sealed_memfd("a", 4096).unwrap(), sealed_memfd("b", 8192).unwrap()];
        let kick: OwnedFd = EventFd::new().unwrap().into();
        say(&frontend, R::SET_FEATURES, &[0; 8], &[]);
        say(&frontend, R::SET_MEM_TABLE, &[0; 72], &[&memory[0], &memory[1]]);
        say(&frontend, R::SET_VRING_CALL, &[0, 1, 0, 0, 0, 0, 0, 0], &[]);
        say(&frontend, R::SET_VRING_KICK, &[0; 8], &[&kick]);
        let mut talk = talk(backend).unwrap();
        let mut seen = Vec::new();
        for _ in 0..4 {
            let message = talk.next_message().unwrap().unwrap();
            let len = |fd: &OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_size;
            seen.push((message.request, message.fds.iter().map(len).collect::<Vec<_>>()));
            assert!(talk.answer(&message, None).unwrap());
        }
        let expected = [
            (R::SET_FEATURES as u32, vec![]),
            (R::SET_MEM_TABLE as u32, vec![4096, 8192]),
            (R::SET_VRING_CALL as u32, vec![]),
            (R::SET_VRING_KICK as u32, vec![0]),
        ];
        assert_eq!(seen, expected);
    }

    /// Killed before, between and after: descriptors are the same ones, an answer comes once, with its descriptor.
    #[test]
    fn a_kept_conversation_goes_on() {
        let (hv, store) = fake::hypervisor(0, channel().0);
        let place = Place { hv: &hv, device: "vbd-1-2", instance: 3 };
        let (mut frontend, backend) = UnixStream::pair().unwrap();
        let mut talk = talk_at(place, backend).unwrap();
        let kick: OwnedFd = EventFd::from_value(7).unwrap().into();
        say(&frontend, R::SET_VRING_KICK, &[0; 8], &[&kick]);
        let message = talk.next_message().unwrap().unwrap();
        talk.answer(&message, None).unwrap();
        say(&frontend, R::GET_INFLIGHT_FD, &[0; 24], &[]);
        talk.next_message().unwrap().unwrap();
        // As SIGKILL leaves it: seen, not answered.
        std::mem::forget(talk);
        let (mut talk, _) = take_up(place, false).unwrap();
        let said = talk.said().unwrap();
        let [said] = &said[..] else { panic!("{said:?}") };
        let mut count = [0; 8];
        nix::unistd::read(&said.fds[0], &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 7, "the frontend's own descriptor");
        let asked = talk.next_message().unwrap().unwrap();
        assert!(asked.is(R::GET_INFLIGHT_FD));
        let region = sealed_memfd("region", 12288).unwrap();
        let reply = Message { request: asked.request, flags: 5, body: vec![9; 24], fds: vec![region] };
        talk.answer(&asked, Some(&reply)).unwrap();
        assert_eq!(
            store.names(),
            ["talk-vbd-1-2", "talk-vbd-1-2.0", "talk-vbd-1-2.1", "talk-vbd-1-2.socket"]
        );
        std::mem::forget(talk);
        let (mut talk, _) = take_up(place, false).unwrap();
        assert_eq!(talk.said().unwrap().len(), 2);
        let mut bytes = [0; HEAD + 24];
        let mut space = cmsg_space!([std::os::fd::RawFd; 1]);
        let fds = {
            let mut into = [IoSliceMut::new(&mut bytes)];
            let got =
                recvmsg::<UnixAddr>(frontend.as_raw_fd(), &mut into, Some(&mut space), MsgFlags::empty());
            fds_of(&got.unwrap()).unwrap()
        };
        assert_eq!((bytes.to_vec(), fds.len()), (reply.bytes(), 1));
        frontend.set_nonblocking(true).unwrap();
        assert!(frontend.read(&mut [0]).is_err(), "answered once");
        // Another frontend's, and none: what is there is dropped, the frontend is hung up on.
        drop(talk);
        assert!(store.names().is_empty());
        assert_eq!(frontend.read(&mut [0]).unwrap(), 0);
        assert!(take_up(place, false).is_none());
        let (mut frontend, backend) = UnixStream::pair().unwrap();
        std::mem::forget(talk_at(place, backend).unwrap());
        assert!(take_up(Place { instance: 4, ..place }, false).is_none());
        assert!(store.names().is_empty());
        assert!(frontend.write_all(&[0]).is_err() || frontend.read(&mut [0]).unwrap() == 0);
    }

    #[test]
    fn what_is_no_message_ends_the_conversation() {
        let (mut frontend, backend) = UnixStream::pair().unwrap();
        frontend.write_all(&[0xff; 12]).unwrap();
        assert!(talk(backend).unwrap().next_message().unwrap_err().contains("too long"));
        let (mut frontend, backend) = UnixStream::pair().unwrap();
        frontend.write_all(&[1, 0, 0]).unwrap();
        drop(frontend);
        assert!(talk(backend).unwrap().next_message().unwrap().is_none(), "it ended in the middle of one");
    }
}

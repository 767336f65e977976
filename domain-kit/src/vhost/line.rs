//! The line to a frontend: dialled again whenever it hung up.

use std::fmt::Display;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::hypercall::Hypercall;

/// Between two attempts to reach the frontend.
const REDIAL: Duration = Duration::from_millis(100);

/// What the thread that talks on the line and those that end it share.
#[derive(Debug, Default)]
pub struct Line {
    ended: AtomicBool,
    /// The conversation, to be hung up.
    stream: Mutex<Option<UnixStream>>,
}

impl Line {
    /// Hangs up for good: [`Line::keep`] returns.
    pub fn end(&self) {
        self.ended.store(true, Relaxed);
        if let Some(stream) = &*self.stream.lock().unwrap_or_else(PoisonError::into_inner) {
            let _gone_already = stream.shutdown(Shutdown::Both);
        }
    }

    /// Dials by the approved resource and calls `talk` for each connection, until the line is ended. `device` is for the log.
    pub fn keep(
        &self,
        hv: &Hypercall,
        resource: &str,
        device: impl Display,
        mut talk: impl FnMut(UnixStream) -> Result<(), String>,
    ) {
        let mut complained = false;
        while !self.ended.load(Relaxed) {
            let stream = match hv.resource_open(resource) {
                Ok((_, fd)) => UnixStream::from(fd),
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        tracing::warn!(%device, %error, "the frontend cannot be reached; tried again");
                    }
                    std::thread::sleep(REDIAL);
                    continue;
                }
            };
            complained = false;
            self.set(stream.try_clone().ok());
            // Who ended it meanwhile had nothing to hang up.
            if self.ended.load(Relaxed) {
                break;
            }
            let result = talk(stream);
            self.set(None);
            match result {
                Ok(()) => tracing::info!(%device, "the frontend hung up"),
                Err(error) => {
                    tracing::error!(%device, error, "vhost-user");
                    std::thread::sleep(REDIAL);
                }
            }
        }
    }

    fn set(&self, stream: Option<UnixStream>) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read, Write};
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::sync::Arc;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Instant;

    use hv_abi::{RepHeader, ReqHeader, ResourceInfo};
    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair,
    };
    use zerocopy::{FromBytes, FromZeros, IntoBytes};

    use super::*;

    /// An hv-core that knows one call: it refuses the first `refusals`, then hands out connections whose other ends come out of the channel.
    fn hypervisor(refusals: usize, frontends: Sender<UnixStream>) -> Hypercall {
        let made =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (ours, theirs): (OwnedFd, OwnedFd) = made;
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            for call in 0.. {
                let Ok(1..) = recv(theirs.as_raw_fd(), &mut buffer, MsgFlags::empty()) else { return };
                let (request, _) = ReqHeader::read_from_prefix(&buffer[..]).unwrap();
                let status = if call < refusals { -(nix::errno::Errno::ECONNREFUSED as i32) } else { 0 };
                let header = RepHeader { seq: request.seq, status };
                let info = ResourceInfo::new_zeroed();
                let (backend, frontend) = UnixStream::pair().unwrap();
                let fds = [backend.as_raw_fd()];
                let rights = [ControlMessage::ScmRights(&fds)];
                let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(info.as_bytes())];
                let sent = match status {
                    0 => {
                        let _nobody_looks = frontends.send(frontend);
                        sendmsg::<()>(theirs.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None)
                    }
                    _ => sendmsg::<()>(theirs.as_raw_fd(), &parts[..1], &[], MsgFlags::MSG_NOSIGNAL, None),
                };
                if sent.is_err() {
                    return;
                }
            }
        });
        Hypercall::new(ours)
    }

    /// Talks until the other end hangs up; a byte `!` is a broken protocol.
    fn talk(mut stream: UnixStream) -> Result<(), String> {
        let mut byte = [0];
        while let Ok(1) = stream.read(&mut byte) {
            if byte == *b"!" {
                return Err("broken".into());
            }
            stream.write_all(&byte).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    #[test]
    fn a_frontend_that_refuses_hangs_up_or_breaks_the_protocol_is_dialled_again() {
        let (frontends, dialled) = channel();
        let hv = hypervisor(2, frontends);
        let line = Arc::new(Line::default());
        let keeper = {
            let line = Arc::clone(&line);
            std::thread::spawn(move || line.keep(&hv, "vhost-x", "test", talk))
        };
        let began = Instant::now();
        let patience = Duration::from_secs(10);
        for last_words in [&b""[..], b"!", b""] {
            let mut frontend = dialled.recv_timeout(patience).unwrap();
            let mut echo = [0];
            frontend.write_all(b"a").unwrap();
            frontend.read_exact(&mut echo).unwrap();
            assert_eq!(&echo, b"a");
            frontend.write_all(last_words).unwrap();
        }
        assert!(began.elapsed() >= REDIAL * 3, "refusals and broken protocols are waited after");
        // Ended in the middle of a conversation: the frontend is hung up on, and nobody is dialled any more.
        let mut frontend = dialled.recv_timeout(patience).unwrap();
        let mut echo = [0];
        frontend.write_all(b"b").unwrap();
        frontend.read_exact(&mut echo).unwrap();
        line.end();
        assert_eq!(frontend.read(&mut echo).unwrap(), 0);
        keeper.join().unwrap();
        assert!(dialled.try_recv().is_err());
    }

    #[test]
    fn a_line_that_was_ended_before_is_never_taken_up() {
        let (frontends, dialled) = channel();
        let line = Line::default();
        line.end();
        line.keep(&hypervisor(0, frontends), "vhost-x", "test", |_| panic!("nobody is to be talked to"));
        assert!(dialled.try_recv().is_err());
    }
}

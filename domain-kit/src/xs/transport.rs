//! How the client's bytes reach the server: a Unix stream socket here, a shared ring in `ring.rs`.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::XsError;

/// A byte stream to the store. One thread reads, any thread writes (callers serialise their writes).
pub trait Transport: Send + Sync + 'static {
    /// Writes all of `msg`.
    ///
    /// # Errors
    /// [`XsError::Timeout`] when the deadline passed; if part of `msg`
    /// was written, [`Transport::recv`] then fails too and the reader resets the stream.
    fn send(&self, msg: &[u8], deadline: Instant) -> Result<(), XsError>;

    /// Waits for bytes and reads at least one.
    ///
    /// # Errors
    /// [`XsError::Closed`] after [`Transport::close`]; anything else means the stream has to be reset.
    fn recv(&self, buf: &mut [u8]) -> Result<usize, XsError>;

    /// Brings the stream to a message boundary again: afterwards the server knows no watch and no
    /// transaction of ours. Called while nobody sends or receives.
    ///
    /// # Errors
    /// When the server did not take part before the deadline.
    fn reset(&self, deadline: Instant) -> Result<(), XsError>;

    /// Makes a blocked [`Transport::recv`] and every later call return [`XsError::Closed`].
    fn close(&self);
}

/// Wakes a poll: for good (closed) or until the next reset (a message was cut off half-way).
pub(crate) struct Stop {
    flag: AtomicBool,
    broken: AtomicBool,
    fd: EventFd,
}

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        let fd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { flag: AtomicBool::new(false), broken: AtomicBool::new(false), fd })
    }

    pub(crate) fn set(&self) {
        self.flag.store(true, Ordering::Release);
        // The counter can't overflow: it is written once or twice.
        let _ = self.fd.write(1);
    }

    /// Marks the stream as unusable: part of a message was written and the rest never will be.
    pub(crate) fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
        let _ = self.fd.write(1);
    }

    /// A reset begins: what was broken is whole again after it.
    pub(crate) fn mend(&self) {
        self.broken.store(false, Ordering::Release);
        if !self.flag.load(Ordering::Acquire) {
            let _ = self.fd.read();
        }
    }

    /// # Errors
    /// [`XsError::Closed`] or [`XsError::Disconnected`] when the stream may not be used.
    pub(crate) fn check(&self) -> Result<(), XsError> {
        if self.flag.load(Ordering::Acquire) {
            return Err(XsError::Closed);
        }
        if self.broken.load(Ordering::Acquire) {
            return Err(XsError::Disconnected);
        }
        Ok(())
    }
}

/// Waits for `events` on `fd` or for `stop`. `Ok(false)` when the deadline passed first.
pub(crate) fn wait_fd(
    fd: &impl AsFd,
    events: PollFlags,
    stop: &Stop,
    deadline: Option<Instant>,
) -> Result<bool, XsError> {
    loop {
        stop.check()?;
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(false);
                }
                // Round up, or the last millisecond spins.
                PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut fds = [PollFd::new(fd.as_fd(), events), PollFd::new(stop.fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => continue,
            Ok(_) if fds[1].any() == Some(true) => continue,
            Ok(_) => return Ok(true),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
    }
}

/// The Unix socket of a xenstored, reconnected after a loss.
pub struct SocketTransport {
    /// `None`: a stream that was connected by others, and is not to be had again.
    path: Option<PathBuf>,
    stream: Mutex<Option<Arc<UnixStream>>>,
    stop: Stop,
    /// A reset was asked for.
    used: AtomicBool,
}

impl SocketTransport {
    /// Names the socket; the connection is made by the first [`Transport::reset`].
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(path: impl AsRef<Path>) -> Result<Self, XsError> {
        Ok(Self {
            path: Some(path.as_ref().to_owned()),
            stream: Mutex::new(None),
            stop: Stop::new()?,
            used: AtomicBool::new(false),
        })
    }

    /// Over a stream that is connected already. Lost, it stays lost: the client is closed then.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn connected(stream: UnixStream) -> Result<Self, XsError> {
        crate::os::set_nonblocking(&stream)?;
        Ok(Self {
            path: None,
            stream: Mutex::new(Some(Arc::new(stream))),
            stop: Stop::new()?,
            used: AtomicBool::new(false),
        })
    }

    fn stream(&self) -> Result<Arc<UnixStream>, XsError> {
        self.stop.check()?;
        let slot = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        slot.clone().ok_or(XsError::Disconnected)
    }
}

fn lost(e: io::Error) -> XsError {
    match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => XsError::Disconnected,
        _ => XsError::Io(e),
    }
}

impl Transport for SocketTransport {
    fn send(&self, msg: &[u8], deadline: Instant) -> Result<(), XsError> {
        let stream = self.stream()?;
        let mut rest = msg;
        while !rest.is_empty() {
            match (&*stream).write(rest) {
                Ok(0) => return Err(XsError::Disconnected),
                Ok(n) => rest = &rest[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !wait_fd(&*stream, PollFlags::POLLOUT, &self.stop, Some(deadline))? {
                        if rest.len() < msg.len() {
                            self.stop.set_broken();
                        }
                        return Err(XsError::Timeout(Duration::ZERO));
                    }
                }
                Err(e) => return Err(lost(e)),
            }
        }
        Ok(())
    }

    fn recv(&self, buf: &mut [u8]) -> Result<usize, XsError> {
        let stream = self.stream()?;
        loop {
            match nix::sys::socket::recv(stream.as_raw_fd(), buf, nix::sys::socket::MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(XsError::Disconnected),
                Ok(n) => return Ok(n),
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => {
                    wait_fd(&*stream, PollFlags::POLLIN, &self.stop, None)?;
                }
                Err(e) => return Err(lost(e.into())),
            }
        }
    }

    fn reset(&self, deadline: Instant) -> Result<(), XsError> {
        let Some(path) = &self.path else {
            // The first reset is that of a stream that nothing was said on yet.
            if self.used.swap(true, Ordering::Relaxed) {
                self.stop.set();
            }
            return self.stop.check();
        };
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.stop.mend();
        loop {
            self.stop.check()?;
            match UnixStream::connect(path) {
                Ok(stream) => {
                    crate::os::set_nonblocking(&stream)?;
                    *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(stream));
                    return Ok(());
                }
                Err(e) if Instant::now() >= deadline => return Err(e.into()),
                // The server may be between two lives: its socket is refused or not there yet.
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn close(&self) {
        self.stop.set();
    }
}

//! Round trips over two bare eventfds between two processes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use anyhow::Result;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{read, write};

use super::helper::{Helper, Role};

/// One side of it here, the other in a helper process.
#[derive(Debug)]
pub struct PingPong {
    rx: OwnedFd,
    tx: OwnedFd,
    poll: bool,
    /// The other side.
    pub helper: Helper,
}

impl PingPong {
    /// Blocking eventfds, or non-blocking ones waited for by poll(2) as an event loop does.
    ///
    /// # Errors
    /// Those of eventfd(2) and of starting the helper.
    pub fn start(poll: bool) -> Result<PingPong> {
        let flags = if poll { EfdFlags::EFD_NONBLOCK } else { EfdFlags::empty() };
        let make = || EventFd::from_value_and_flags(0, flags | EfdFlags::EFD_CLOEXEC).map(OwnedFd::from);
        let (rx, tx) = (make()?, make()?);
        let role = if poll { Role::EventfdPollPong } else { Role::EventfdPong };
        let helper = Helper::start(role, tx.try_clone()?, rx.try_clone()?)?;
        Ok(PingPong { rx, tx, poll, helper })
    }

    /// Mean round trip of `count`, microseconds.
    ///
    /// # Errors
    /// Those of read(2), write(2), poll(2).
    pub fn round_trips(&self, count: u32) -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            write(&self.tx, &1u64.to_ne_bytes())?;
            take(self.rx.as_fd(), self.poll)?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(count))
    }
}

/// Waits for a kick and takes it.
fn take(rx: BorrowedFd<'_>, by_poll: bool) -> Result<()> {
    let mut count = [0; 8];
    loop {
        if by_poll {
            poll(&mut [PollFd::new(rx, PollFlags::POLLIN)], PollTimeout::NONE)?;
        }
        match read(rx, &mut count) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

/// The helper's side: answers until it is ended.
///
/// # Errors
/// As [`PingPong::round_trips`].
pub fn pong(rx: BorrowedFd<'_>, tx: BorrowedFd<'_>, by_poll: bool) -> Result<()> {
    loop {
        take(rx, by_poll)?;
        write(tx, &1u64.to_ne_bytes())?;
    }
}

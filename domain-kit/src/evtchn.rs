//! Event-channel ports of a process domain.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// One end of an event channel. Underneath, two eventfds that hv-core made (non-blocking, counting): a kick sent while
/// nobody waits stays latched, also across a restart of the receiver. Both ends share each eventfd's flags; that no peer can make it
/// a blocking one, and then its writes wait for ever, is the sandbox's filter (hv-core's `seccomp` module).
#[derive(Debug)]
pub struct Port {
    /// Its number in this domain's space.
    pub port: u32,
    rx: OwnedFd,
    tx: Option<OwnedFd>,
}

impl Port {
    /// From what hv-core handed out. A VIRQ has no `tx`.
    pub fn new(port: u32, rx: OwnedFd, tx: Option<OwnedFd>) -> Self {
        Port { port, rx, tx }
    }

    /// Kicks the other end. Sending to a VIRQ does nothing. A full counter (2^64 - 2 kicks not taken) counts as sent.
    pub fn notify(&self) {
        if let Some(tx) = &self.tx
            && let Err(e) = nix::unistd::write(tx, &1u64.to_ne_bytes())
            && e != Errno::EAGAIN
        {
            tracing::error!(port = self.port, error = %e, "event-channel notify failed");
        }
    }

    /// Takes what is latched; true if there was something.
    pub fn clear(&self) -> bool {
        let mut count = [0; 8];
        matches!(nix::unistd::read(&self.rx, &mut count), Ok(8))
    }

    /// Waits until a kick arrives and takes it; false if `timeout` went by first. `None` waits for ever.
    ///
    /// # Errors
    /// That of poll(2), EINTR excepted.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let deadline = timeout.map(|t| std::time::Instant::now() + t);
        let mut left = timeout;
        loop {
            let wait = match left {
                None => PollTimeout::NONE,
                Some(Duration::ZERO) => PollTimeout::ZERO,
                // Rounded up, so that a rest below a millisecond does not spin.
                Some(l) => PollTimeout::try_from(l.as_millis() + 1).unwrap_or(PollTimeout::MAX),
            };
            // Not looked at before: who waits mostly has to, and each system call counts in a round trip.
            match poll(&mut [PollFd::new(self.rx.as_fd(), PollFlags::POLLIN)], wait) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            if self.clear() {
                return Ok(true);
            }
            left = deadline.map(|d| d.saturating_duration_since(std::time::Instant::now()));
            if left.is_some_and(|l| l.is_zero()) {
                return Ok(false);
            }
        }
    }

    /// The descriptor that becomes readable when a kick arrives.
    pub fn rx(&self) -> BorrowedFd<'_> {
        self.rx.as_fd()
    }

    /// The descriptor to which writing 1 (u64) kicks the other end.
    pub fn tx(&self) -> Option<BorrowedFd<'_>> {
        self.tx.as_ref().map(|fd| fd.as_fd())
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.rx()
    }
}

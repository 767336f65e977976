//! Calls from other threads into the event loop, which alone touches the store.
//!
//! ```no_run
//! # fn f(caller: xenstored::calls::Caller) -> Option<()> {
//! use std::time::Duration;
//! use xenstored::store::Item;
//! let refusals = caller.call(Duration::from_secs(1), |engine| {
//!     let domains = engine.store.domains();
//!     domains.map(|(domid, d)| (domid, d.account.refused(Item::Nodes))).collect::<Vec<_>>()
//! })?;
//! caller.call(Duration::from_secs(1), |engine| engine.set_quota(Some(5), Item::Nodes, false, 2000))?.ok()
//! # }
//! ```
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::engine::Engine;

type Call = Box<dyn FnOnce(&mut Engine) + Send>;

/// Calls that may wait; who comes then is told so at once.
const WAITING: usize = 64;
/// Calls of one round, so that clients of the store do not wait for many.
const ROUND: usize = 8;

/// Makes calls; can be cloned to any thread.
#[derive(Clone)]
pub struct Caller {
    calls: SyncSender<Call>,
    wake: Arc<EventFd>,
}

impl Caller {
    /// Runs `what` in the event loop and waits for its result. It should be short: every client of the store waits for it.
    /// `None` if too many wait already, the daemon ended, or the result is not there after `deadline` (`what` may still run).
    pub fn call<R: Send + 'static>(
        &self,
        deadline: Duration,
        what: impl FnOnce(&mut Engine) -> R + Send + 'static,
    ) -> Option<R> {
        let (answer, result) = sync_channel(1);
        let call = Box::new(move |engine: &mut Engine| {
            // Nobody may be waiting any more.
            let _ = answer.send(what(engine));
        });
        self.calls.try_send(call).ok()?;
        self.wake.write(1).ok()?;
        result.recv_timeout(deadline).ok()
    }
}

/// The event loop's end.
pub(crate) struct Calls {
    caller: Caller,
    waiting: Receiver<Call>,
}

impl Calls {
    pub(crate) fn new() -> io::Result<Self> {
        let (calls, waiting) = sync_channel(WAITING);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        Ok(Self { caller: Caller { calls, wake }, waiting })
    }

    pub(crate) fn caller(&self) -> Caller {
        self.caller.clone()
    }

    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.caller.wake.as_fd()
    }

    /// Carries out what waits.
    pub(crate) fn run(&self, engine: &mut Engine) {
        let _ = self.caller.wake.read();
        for _ in 0..ROUND {
            match self.waiting.try_recv() {
                Ok(call) => call(engine),
                Err(_) => return,
            }
        }
        // There may be more.
        let _ = self.caller.wake.write(1);
    }
}

//! The thread that moves one vif's packets.
//!
//! It sleeps in poll(2) on the TAP, the event channels and a stop signal. The TAP is only polled while the frontend has
//! slots: otherwise packets wait in the TAP's own bounded queue and are dropped there (XSA-392).

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use domain_kit::evtchn::Port;
use domain_kit::grants::CopyBatch;
use domain_kit::hypercall::{HvError, Hypercall};
use domain_kit::mem::{Page, SharedMem};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::queue::rx::RxQueue;
use crate::queue::tx::TxQueue;
use crate::queue::{QueueError, World};
use crate::stats::Stats;
use crate::tap::Tap;

/// The kernel's and hv-core's side of a vif.
#[derive(Debug)]
pub struct VifWorld {
    /// The TAP.
    pub tap: Arc<Tap>,
    /// The packet memory.
    pub arena: SharedMem,
    /// Its number for grant copies.
    pub buffer: u32,
    /// The frontend.
    pub frontend: u16,
    /// A hypercall channel of this thread's own.
    pub hv: Hypercall,
}

impl World for VifWorld {
    type Arena = SharedMem;

    fn arena(&self) -> &SharedMem {
        &self.arena
    }
    fn copy_ids(&self) -> (u16, u32) {
        (self.frontend, self.buffer)
    }
    fn receive(&mut self, offset: usize, len: usize) -> io::Result<Option<usize>> {
        self.tap.read(&self.arena, offset, len)
    }
    fn send(&mut self, offset: usize, len: usize) -> io::Result<Option<usize>> {
        self.tap.write(&self.arena, offset, len)
    }
    fn copy(&mut self, batch: &mut CopyBatch) -> Result<(), HvError> {
        batch.run(&self.hv)
    }
}

/// The event channels of a queue: one for both rings, or one each.
#[derive(Debug)]
pub enum Ports {
    /// "event-channel".
    Shared(Port),
    /// "event-channel-tx", "event-channel-rx".
    Split {
        /// The tx ring's.
        tx: Port,
        /// The rx ring's.
        rx: Port,
    },
}

impl Ports {
    fn tx(&self) -> &Port {
        match self {
            Ports::Shared(port) | Ports::Split { tx: port, .. } => port,
        }
    }

    fn rx(&self) -> &Port {
        match self {
            Ports::Shared(port) | Ports::Split { rx: port, .. } => port,
        }
    }

    /// Numbers of all ports.
    pub fn numbers(&self) -> Vec<u32> {
        match self {
            Ports::Shared(port) => vec![port.port],
            Ports::Split { tx, rx } => vec![tx.port, rx.port],
        }
    }

    fn notify(&self, tx: bool, rx: bool, stats: &Stats) {
        match self {
            Ports::Shared(port) => {
                if tx || rx {
                    port.notify();
                    stats.notifies.add(1);
                }
            }
            Ports::Split { tx: tx_port, rx: rx_port } => {
                for port in [tx.then_some(tx_port), rx.then_some(rx_port)].into_iter().flatten() {
                    port.notify();
                    stats.notifies.add(1);
                }
            }
        }
    }
}

/// All that a worker needs; its own while it runs.
#[derive(Debug)]
pub struct Work {
    /// From the frontend.
    pub tx: TxQueue<Page, SharedMem>,
    /// To the frontend.
    pub rx: RxQueue<Page, SharedMem>,
    /// The other sides.
    pub world: VifWorld,
    /// Event channels.
    pub ports: Ports,
    /// Counters.
    pub stats: Arc<Stats>,
    /// The frontend must be notified once, because a dead incarnation may have forgotten to.
    pub kick: bool,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    wake: EventFd,
    /// Asked to rest, and whether it does.
    drain: Mutex<(bool, bool)>,
    drained: Condvar,
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Starts the thread. `failed` is called from it if the queue has to be given up.
    ///
    /// # Errors
    /// No eventfd or thread could be made.
    pub fn start(
        name: &str,
        work: Work,
        draining: bool,
        failed: impl FnOnce(QueueError) + Send + 'static,
    ) -> io::Result<Worker> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            wake,
            drain: Mutex::new((draining, false)),
            drained: Condvar::new(),
        });
        let mine = shared.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let mut work = work;
            if let Err(error) = work.run(&mine) {
                failed(error);
            }
            mine.rest(true);
        })?;
        Ok(Worker { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Asks it to rest (or to go on); [`Worker::wait_drained`] waits until it does.
    pub fn drain(&self, rest: bool) {
        self.shared.drain.lock().unwrap_or_else(PoisonError::into_inner).0 = rest;
        let _full_is_as_good = self.shared.wake.write(1);
    }

    /// Waits until it rests; false at the deadline.
    pub fn wait_drained(&self, deadline: Duration) -> bool {
        let state = self.shared.drain.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.shared.drained.wait_timeout_while(state, deadline, |(_, rests)| !*rests);
        waited.unwrap_or_else(PoisonError::into_inner).0.1
    }

    /// Ends it; its queues and mappings are dropped when this returns.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let _full_is_as_good = self.shared.wake.write(1);
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic in it has ended the process already.
            let _ended = thread.join();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn rest(&self, rests: bool) {
        self.drain.lock().unwrap_or_else(PoisonError::into_inner).1 = rests;
        self.drained.notify_all();
    }
}

impl Work {
    fn run(&mut self, shared: &Shared) -> Result<(), QueueError> {
        if std::mem::take(&mut self.kick) {
            self.ports.notify(true, true, &self.stats);
        }
        while !shared.stop.load(Ordering::SeqCst) {
            if shared.drain.lock().unwrap_or_else(PoisonError::into_inner).0 {
                shared.rest(true);
                self.sleep(shared, false, false);
                continue;
            }
            shared.rest(false);
            let tx = self.tx.run(&mut self.world)?;
            let rx = self.rx.run(&mut self.world)?;
            self.ports.notify(tx.notify, rx.notify, &self.stats);
            if tx.worked || rx.worked {
                continue;
            }
            let blocked = self.rx.blocked();
            if self.tx.final_check()? || (blocked && self.rx.final_check()?) {
                continue;
            }
            self.sleep(shared, !blocked, true);
        }
        Ok(())
    }

    fn sleep(&self, shared: &Shared, tap: bool, ports: bool) {
        // A descriptor that is asked for nothing still tells of errors; leave those out that are not waited for.
        let mut fds = vec![PollFd::new(shared.wake.as_fd(), PollFlags::POLLIN)];
        if ports {
            fds.push(PollFd::new(self.ports.tx().rx(), PollFlags::POLLIN));
            fds.push(PollFd::new(self.ports.rx().rx(), PollFlags::POLLIN));
        }
        if tap {
            fds.push(PollFd::new(self.world.tap.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "poll");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let _nothing_there_is_fine = shared.wake.read();
        if ports {
            // Before the rings are looked at again, so that a kick that comes now wakes us again.
            self.ports.tx().clear();
            self.ports.rx().clear();
        }
    }
}

//! The thread that runs one queue of a vif: everything that its frontend sends there.
//!
//! What comes for the frontend is delivered by the threads that have it; this one only goes on with what found no slots.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use domain_kit::evtchn::Port as EventPort;
use domain_kit::grants::CopyBatch;
use domain_kit::hypercall::HvError;
use domain_kit::mem::Page;
use hv_abi::CopyEntry;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::connection::Kept;
use crate::hash::HashConfig;
use crate::queue::ctrl::{CtrlQueue, CtrlWorld};
use crate::queue::tx::TxQueue;
use crate::queue::{Copier, Fate, Frame, QueueError, SCRATCH, World};
use crate::stats::Stats;
use crate::switch::port::{Port, lock};
use crate::switch::{Lane, Origin, Switch};
use domain_kit::ring::RingMem;
use domain_kit::ring::Span;

/// Bytes that a queue sends before the other things have their turn.
const ROUND: usize = 4 << 20;

/// How long a queue rests at first whose packets nobody can take, and at most. The next one is then about as good as flow control:
/// a receiver that takes its time has slots again, and a flood to one that takes nothing costs the others little.
const FIRST_REST: Duration = Duration::from_millis(1);
const LONGEST_REST: Duration = Duration::from_millis(8);

/// The rest of a queue that works for nothing.
#[derive(Debug, Default)]
pub struct Rest {
    length: Duration,
    until: Option<Instant>,
}

impl Rest {
    /// Twice as long as the last time if a run was for nothing again, else none.
    fn after(&mut self, wasted: bool, now: Instant) {
        self.length = if wasted { (self.length * 2).clamp(FIRST_REST, LONGEST_REST) } else { Duration::ZERO };
        self.until = wasted.then(|| now + self.length);
    }

    /// What is left of it.
    fn left(&self, now: Instant) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(now)).filter(|left| !left.is_zero())
    }
}

/// The event channels of a queue: one for both rings, or one each.
#[derive(Debug)]
pub enum Ports {
    /// "event-channel".
    Shared(EventPort),
    /// "event-channel-tx", "event-channel-rx".
    Split {
        /// The tx ring's.
        tx: EventPort,
        /// The rx ring's.
        rx: EventPort,
    },
}

impl Ports {
    fn tx(&self) -> &EventPort {
        match self {
            Ports::Shared(port) | Ports::Split { tx: port, .. } => port,
        }
    }

    fn rx(&self) -> &EventPort {
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

    /// Notifies the frontend of rx responses.
    pub fn notify_rx(&self, wanted: bool, stats: &Stats) {
        if wanted {
            self.rx().notify();
            stats.notifies.add(1);
        }
    }

    fn notify_tx(&self, wanted: bool, stats: &Stats) {
        if wanted {
            self.tx().notify();
            stats.notifies.add(1);
        }
    }
}

/// The control ring, which the first queue's thread serves.
#[derive(Debug)]
pub struct CtrlWork {
    /// The ring.
    pub queue: CtrlQueue<Page, Span>,
    /// Its event channel.
    pub port: EventPort,
}

/// All that a worker needs; its own while it runs.
#[derive(Debug)]
pub struct Work {
    /// From the frontend.
    pub tx: TxQueue<Page, Span>,
    /// Packet memory and hypercalls.
    pub lane: Lane,
    /// Event channels.
    pub ports: Arc<Ports>,
    /// The control ring, if this is the first queue and there is one.
    pub ctrl: Option<CtrlWork>,
    /// Which queue of the vif.
    pub index: usize,
    /// The vif.
    pub port: Arc<Port>,
    /// Where packets go.
    pub switch: Arc<Switch>,
    /// What is kept of the vif.
    pub kept: Arc<Kept>,
    /// The frontend must be notified once, because a dead incarnation may have forgotten to.
    pub kick: bool,
    /// It works for nothing and rests.
    pub rest: Rest,
}

/// A work's surroundings without its rings.
struct VifWorld<'a> {
    lane: &'a mut Lane,
    port: &'a Port,
    switch: &'a Switch,
    kept: &'a Kept,
}

impl Copier for VifWorld<'_> {
    fn copy(&mut self, batch: &mut CopyBatch) -> Result<(), HvError> {
        self.lane.copy(batch)
    }
}

impl World for VifWorld<'_> {
    type Arena = Span;

    fn arena(&self) -> &Span {
        &self.lane.arena
    }
    fn copy_ids(&self) -> (u16, u32) {
        (self.port.id.frontend, self.lane.buffer)
    }
    fn buffer_base(&self) -> u64 {
        self.lane.arena.absolute(0) as u64
    }
    fn leaves_away(&mut self) -> bool {
        !self.switch.captures() && self.lane.leaves_away()
    }
    fn forward(
        &mut self,
        frames: &[Frame],
        away: &mut Vec<CopyEntry>,
        fates: &mut [Fate],
        commit: &mut dyn FnMut(usize),
    ) {
        std::mem::swap(&mut self.lane.away, away);
        self.switch.forward(Origin::Vif(self.port), self.lane, frames, fates, commit);
        std::mem::swap(&mut self.lane.away, away);
    }
    fn multicast(&mut self, add: bool, address: [u8; 6]) -> bool {
        let mut groups = self.port.groups.write().unwrap_or_else(PoisonError::into_inner);
        let before = groups.list.len();
        let done = groups.change(add, address);
        if groups.list.len() != before {
            self.kept.update(|record| record.groups.clone_from(&groups));
        }
        done
    }
}

impl CtrlWorld for VifWorld<'_> {
    fn read(&mut self, gref: u32, into: &mut [u8]) -> bool {
        let mut batch = CopyBatch::default();
        batch.entries.push(CopyEntry {
            domid: self.port.id.frontend,
            flags: 0,
            gref,
            offset: 0,
            len: into.len() as u16,
            buffer: self.lane.buffer,
            buffer_offset: self.lane.arena.absolute(SCRATCH) as u64,
        });
        let copied = self.lane.copy(&mut batch).is_ok() && batch.statuses == [0];
        if copied {
            self.lane.arena.copy_out(SCRATCH, into);
        }
        copied
    }
    fn queues(&self) -> usize {
        self.port.queues.len()
    }
    fn config(&self) -> HashConfig {
        (*self.port.hash()).clone()
    }
    fn changed(&mut self, config: HashConfig) {
        self.kept.update(|record| record.hash.clone_from(&config));
        *self.port.hash.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    wake: EventFd,
    /// Asked to rest, and whether it does.
    drain: Mutex<(bool, bool)>,
    drained: Condvar,
}

/// What a thread under [`Worker`] asks and does.
#[derive(Clone, Debug)]
pub struct Control(Arc<Shared>);

impl Control {
    /// True when the thread has to end.
    pub fn stopping(&self) -> bool {
        self.0.stop.load(Ordering::SeqCst)
    }

    /// True if the thread is to rest: it then calls [`Control::sleep`] with nothing else to wait for.
    pub fn resting(&self) -> bool {
        let mut state = lock(&self.0.drain);
        if state.1 != state.0 {
            state.1 = state.0;
            self.0.drained.notify_all();
        }
        state.0
    }

    /// Waits for one of these descriptors, to be woken, or for `timeout`. Says of each whether it is readable.
    pub fn sleep(&self, others: &[std::os::fd::BorrowedFd<'_>], timeout: Option<Duration>) -> Vec<bool> {
        let mut fds = vec![PollFd::new(self.0.wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(others.iter().map(|&fd| PollFd::new(fd, PollFlags::POLLIN)));
        let timeout = timeout.map_or(PollTimeout::NONE, |t| {
            // Rounded up, so that a rest below a millisecond does not spin.
            PollTimeout::try_from(t.as_millis() + 1).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "poll");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        if ready.next() == Some(true) {
            let _nothing_there_is_fine = self.0.wake.read();
        }
        ready.collect()
    }
}

/// A running thread of the data path.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Starts the thread; `draining`: it is to rest until told otherwise.
    ///
    /// # Errors
    /// No eventfd or thread could be made.
    pub fn start(
        name: &str,
        draining: bool,
        run: impl FnOnce(&Control) + Send + 'static,
    ) -> io::Result<Worker> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            wake,
            drain: Mutex::new((draining, false)),
            drained: Condvar::new(),
        });
        let control = Control(shared.clone());
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            run(&control);
            lock(&control.0.drain).1 = true;
            control.0.drained.notify_all();
        })?;
        Ok(Worker { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Asks it to rest (or to go on); [`Worker::wait_drained`] waits until it does.
    pub fn drain(&self, rest: bool) {
        lock(&self.shared.drain).0 = rest;
        let _full_is_as_good = self.shared.wake.write(1);
    }

    /// Waits until it rests; false at the deadline.
    pub fn wait_drained(&self, deadline: Duration) -> bool {
        let state = lock(&self.shared.drain);
        let waited = self.shared.drained.wait_timeout_while(state, deadline, |(_, rests)| !*rests);
        waited.unwrap_or_else(PoisonError::into_inner).0.1
    }

    /// Ends it; what it owned is dropped when this returns.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let _full_is_as_good = self.shared.wake.write(1);
        if let Some(thread) = lock(&self.thread).take() {
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

impl Work {
    /// Runs until it is stopped, or the queue has to be given up.
    ///
    /// # Errors
    /// [`QueueError`].
    pub fn run(&mut self, control: &Control) -> Result<(), QueueError> {
        if std::mem::take(&mut self.kick) {
            self.ports.notify_tx(true, &self.port.stats);
            if matches!(*self.ports, Ports::Split { .. }) {
                self.ports.notify_rx(true, &self.port.stats);
            }
            if let Some(ctrl) = &self.ctrl {
                ctrl.port.notify();
            }
        }
        while !control.stopping() {
            if control.resting() {
                control.sleep(&[], None);
                continue;
            }
            let (budget, wait) = self.budget();
            let mut world =
                VifWorld { lane: &mut self.lane, port: &self.port, switch: &self.switch, kept: &self.kept };
            let mut worked = false;
            if let Some(ctrl) = &mut self.ctrl {
                let progress = ctrl.queue.run(&mut world)?;
                worked |= progress.worked;
                if progress.notify {
                    ctrl.port.notify();
                }
            }
            if budget > 0 {
                let tx = self.tx.run(&mut world, budget)?;
                self.ports.notify_tx(tx.notify, &self.port.stats);
                worked |= tx.worked;
                if tx.worked {
                    self.rest.after(tx.wasted, Instant::now());
                }
                if let Some(bucket) = lock(&self.port.bucket).as_mut() {
                    bucket.take(tx.bytes);
                }
            }
            worked |= self.flush()?;
            if worked && budget > 0 {
                continue;
            }
            if let Some(ctrl) = &self.ctrl
                && ctrl.queue.final_check()?
            {
                continue;
            }
            if budget > 0 && (self.tx.waiting() || self.tx.final_check()?) {
                continue;
            }
            self.sleep(control, wait);
        }
        Ok(())
    }

    /// Bytes that may be sent in this round; if none, how long until there are.
    fn budget(&self) -> (usize, Option<Duration>) {
        if let Some(left) = self.rest.left(Instant::now()) {
            return (0, Some(left));
        }
        match lock(&self.port.bucket).as_mut() {
            None => (ROUND, None),
            Some(bucket) => match bucket.budget(Instant::now()) {
                0 => (0, Some(bucket.wait())),
                budget => (budget.min(ROUND), None),
            },
        }
    }

    /// Delivers what found no slots before.
    fn flush(&mut self) -> Result<bool, QueueError> {
        let handle = &self.port.queues[self.index];
        let mut guard = lock(&handle.queue);
        let Some(rx) = guard.as_mut() else { return Ok(false) };
        let progress = rx.flush(&mut self.lane)?;
        let more = rx.final_check()?;
        drop(guard);
        handle.notify(progress.notify, &self.port.stats);
        Ok(progress.worked || more)
    }

    fn sleep(&self, control: &Control, wait: Option<Duration>) {
        // While it may not send, its kicks wake nobody.
        let tx = (wait.is_none() || matches!(*self.ports, Ports::Shared(_))).then(|| self.ports.tx());
        let ctrl = self.ctrl.iter().map(|ctrl| &ctrl.port);
        let ports: Vec<&EventPort> = tx.into_iter().chain([self.ports.rx()]).chain(ctrl).collect();
        let fds: Vec<_> = ports.iter().map(|port| port.rx()).collect();
        let ready = control.sleep(&fds, wait);
        // Before the rings are looked at again, so that a kick that comes now wakes us again.
        for (port, ready) in ports.into_iter().zip(ready) {
            if ready {
                port.clear();
            }
        }
    }
}

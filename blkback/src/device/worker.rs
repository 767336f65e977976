//! The threads that serve rings: at most one for each processor, so that a thread has several rings when there are many.
//!
//! A ring that has its thread to itself, or nearly so, is served to completion, and its thread looks for work a while before it sleeps. Rings
//! that share a thread take turns, one round each, whenever something came for them; what all of them hand to the disk goes in one
//! system call, and one sleep is for all. A disk whose queues cannot share has a thread for each ring.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use domain_kit::evtchn::Port;
use domain_kit::journal::JournalError;
use domain_kit::poll::Window;
use domain_kit::xenbus::{BackendHandle, DeviceKey};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::ring::{RingControl, RingEngine};
use super::{AttachError, all_claimed};
use crate::disk::attachment::DiskQueue;

/// Time without requests after which a ring's memory is given back.
const IDLE: Duration = Duration::from_secs(2);
/// Longest look for the frontend's next request while nothing is under way: its turn-round.
const LOOK_FOR_REQUESTS: Duration = Duration::from_micros(100);
/// Longest look while the disk works on one request: a fast disk's time. While it works on several there is none: sleeping gathers
/// completions, and the requests that follow them, for one call.
const LOOK_FOR_DISK: Duration = Duration::from_micros(200);
/// A thread with more rings does not look: they are many glances, and somebody always has work.
const LOOK_RINGS: usize = 4;
/// While there is always something to do, what only time brings is looked after once in so many passes over the rings.
const TICK_PASSES: u32 = 256;
/// Most rings of a thread.
const MOST_RINGS: usize = 128;

/// A ring as its thread has it.
pub struct Task {
    /// Its engine, which has not run yet.
    pub engine: RingEngine,
    /// Where its frontend is notified.
    pub port: Port,
    /// Shared with the control thread.
    pub control: Arc<RingControl>,
    /// Counted down when the predecessor's maps are claimed.
    pub claiming: Arc<AtomicUsize>,
    /// Whose it is.
    pub key: DeviceKey,
    /// To tell of failures.
    pub handle: BackendHandle,
    /// Dropped when the ring is no longer served.
    pub done: Sender<()>,
}

/// All threads of the process that serve rings.
pub struct Workers {
    threads: Threads,
    most: usize,
}

/// Those that have not ended.
type Threads = Arc<Mutex<Vec<Arc<Worker>>>>;

impl Default for Workers {
    fn default() -> Self {
        let most = std::thread::available_parallelism().map_or(1, usize::from);
        Workers { threads: Threads::default(), most }
    }
}

struct Worker {
    inbox: Mutex<Inbox>,
    /// There is something in the inbox.
    mail: AtomicBool,
    wake: EventFd,
    shares: bool,
}

#[derive(Default)]
struct Inbox {
    tasks: Vec<Task>,
    /// Rings that the thread has, these included.
    rings: usize,
    /// The thread ends.
    over: bool,
}

impl Worker {
    fn inbox(&self) -> std::sync::MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rings that it has; `None` if it ends.
    fn rings(&self) -> Option<usize> {
        let inbox = self.inbox();
        (!inbox.over).then_some(inbox.rings)
    }

    /// Gives it one more; back, if it ends.
    fn post(&self, task: Task) -> Option<Task> {
        let mut inbox = self.inbox();
        if inbox.over {
            return Some(task);
        }
        inbox.rings += 1;
        inbox.tasks.push(task);
        drop(inbox);
        self.mail.store(true, SeqCst);
        let _full_is_awake_too = self.wake.write(1);
        None
    }
}

impl Workers {
    /// Has a ring served, by a new thread as long as there are fewer than processors, else by the one with the fewest rings.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn serve(&self, mut task: Task, name: &str) -> Result<(), AttachError> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let shares = task.engine.disk().shares();
        if shares {
            let mut candidates: Vec<_> = threads
                .iter()
                .filter(|worker| worker.shares)
                .filter_map(|worker| Some((worker.rings()?, worker)))
                .collect();
            candidates.sort_by_key(|(rings, _)| *rings);
            if candidates.len() >= self.most {
                for (_, worker) in candidates.iter().filter(|(rings, _)| *rings < MOST_RINGS) {
                    match worker.post(task) {
                        Some(back) => task = back,
                        None => return Ok(()),
                    }
                }
            }
        }
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| AttachError::Os("eventfd", e.into()))?;
        let worker = Arc::new(Worker { inbox: Mutex::default(), mail: AtomicBool::new(false), wake, shares });
        // It is there before the thread is, which ends without one.
        let _nobody_ended_it = worker.post(task);
        let (theirs, all) = (worker.clone(), self.threads.clone());
        std::thread::Builder::new()
            .name(name.into())
            .stack_size(256 << 10)
            .spawn(move || {
                run(&theirs);
                // An idle disk keeps no descriptor of a thread that is no more.
                all.lock().unwrap_or_else(PoisonError::into_inner).retain(|w| !Arc::ptr_eq(w, &theirs));
            })
            .map_err(|e| AttachError::Os("thread", e))?;
        threads.push(worker);
        Ok(())
    }
}

/// A ring that is served.
struct Served {
    task: Task,
    /// Counted into `answered` by hv-core.
    served: bool,
    claimed: bool,
    /// At re-attach and at the start: poll the ring whatever latched, then notify once.
    notify_once: bool,
    /// It is to have a turn, whether something came for it or not.
    more: bool,
    /// Its next request raises an event.
    asleep: bool,
    gave_back: bool,
    /// Something was to be done for it last.
    busy: Instant,
}

impl Served {
    fn new(mut task: Task) -> Served {
        if let Err(error) = task.engine.disk().begin() {
            tracing::error!(device = %task.key, %error, "the disk's queue cannot be used");
            task.handle.failed(task.key, format!("the disk's queue: {error}"));
            task.control.stop();
        }
        Served {
            task,
            served: false,
            claimed: false,
            notify_once: true,
            more: true,
            asleep: false,
            gave_back: false,
            busy: Instant::now(),
        }
    }

    /// Something came for it, or may have.
    fn wants_turn(&mut self) -> bool {
        let engine = &mut self.task.engine;
        self.more || !self.asleep || engine.disk().woken() || engine.due().is_some_and(|due| due.is_zero())
    }

    /// One round; false if it is no longer to be served.
    fn turn(&mut self) -> bool {
        let Task { engine, port, control, claiming, key, handle, .. } = &mut self.task;
        if control.is_stopped() {
            return false;
        }
        self.asleep = false;
        engine.set_paused(control.is_paused());
        let polled = match engine.round() {
            Ok(polled) => polled,
            Err(error) => {
                handle.failed(*key, error.to_string());
                return false;
            }
        };
        if polled.notify || std::mem::take(&mut self.notify_once) {
            port.notify();
        }
        control.set_in_flight(engine.in_flight());
        if !self.claimed {
            // One in each round, so that requests do not wait for all.
            self.claimed = !engine.guest().claim_one();
            if self.claimed {
                claiming.fetch_sub(1, Relaxed);
            }
        }
        if !self.served && engine.answered() > 0 && all_claimed(claiming) {
            self.served = true;
            if let Err(error) = engine.guest().served() {
                tracing::warn!(%error, "telling hv-core of service");
            }
        }
        self.more = polled.more || !self.claimed;
        if polled.more {
            self.busy = engine.now();
            self.gave_back = false;
        }
        true
    }

    /// Asks the frontend for an event; false if there is work after all.
    fn sleep(&mut self) -> Result<bool, JournalError> {
        if !self.asleep {
            let engine = &mut self.task.engine;
            self.asleep = engine.may_sleep()?;
            self.more = !self.asleep;
            engine.disk().arm(&[self.task.port.rx(), self.task.control.wake_fd()]);
        }
        Ok(self.asleep)
    }

    /// When it has to have a turn at the latest, and whether that is to give memory back.
    fn due(&self, now: Instant) -> Option<Duration> {
        let quiet = !self.gave_back && self.task.engine.in_flight() == 0;
        let idle = quiet.then(|| IDLE.saturating_sub(now.saturating_duration_since(self.busy)));
        self.task.engine.due().or(idle)
    }

    /// Time has gone by.
    fn tick(&mut self, now: Instant) {
        let engine = &mut self.task.engine;
        self.more |= engine.due().is_some_and(|due| due.is_zero());
        let quiet = now.saturating_duration_since(self.busy) >= IDLE;
        if quiet && !self.gave_back && engine.in_flight() == 0 {
            self.gave_back = true;
            engine.idle();
        }
    }

    /// What the kernel still does ends before buffers and lock may go.
    fn end(self) {
        let Task { engine, control, claiming, key, done, .. } = self.task;
        control.set_in_flight(0);
        if !self.claimed {
            claiming.fetch_sub(1, Relaxed);
        }
        let (mut guest, mut disk) = engine.into_parts();
        disk.finish();
        guest.unmap_all();
        tracing::info!(device = %key, "no longer served");
        drop((guest, disk));
        drop(done);
    }
}

fn fail(ring: &mut Served, error: &JournalError) {
    ring.task.handle.failed(ring.task.key, error.to_string());
    ring.task.control.stop();
    ring.more = true;
}

/// A thread.
fn run(worker: &Worker) {
    let mut rings: Vec<Served> = Vec::new();
    // Of an idle disk, of one that works on one request, and on several.
    let mut windows = [LOOK_FOR_REQUESTS, LOOK_FOR_DISK, Duration::ZERO].map(Window::new);
    let mut passes = 0;
    loop {
        if worker.mail.load(Relaxed) || rings.is_empty() {
            worker.mail.store(false, SeqCst);
            let mut inbox = worker.inbox();
            rings.extend(inbox.tasks.drain(..).map(Served::new));
            if rings.is_empty() {
                inbox.over = true;
                return;
            }
        }
        let (sole, crowded) = (rings.len() == 1, rings.len() > LOOK_RINGS);
        let (mut more, mut running, mut at) = (false, 0, 0);
        while at < rings.len() {
            let ring = &mut rings[at];
            if ring.wants_turn() && !ring.turn() {
                rings.swap_remove(at).end();
                worker.inbox().rings -= 1;
                continue;
            }
            if !ring.more
                && crowded
                && let Err(error) = ring.sleep()
            {
                fail(ring, &error);
            }
            more |= ring.more;
            running += ring.task.engine.running();
            at += 1;
        }
        let Some(first) = rings.first_mut() else { continue };
        if more {
            first.task.engine.disk().kick();
            passes = (passes + 1) % TICK_PASSES;
            if passes == 0 && !sole {
                let now = Instant::now();
                rings.iter_mut().for_each(|ring| ring.tick(now));
            }
            continue;
        }
        let window = &mut windows[running.min(2) as usize];
        let since = Instant::now();
        // With a crowd it goes with the sleep.
        if window.is_open() && !crowded {
            first.task.engine.disk().kick();
        }
        let found = look(&mut rings, window, since) || !all_sleep(&mut rings);
        if !found {
            let timeout = rings.iter().filter_map(|ring| ring.due(since)).min();
            let Some(Task { engine, port, control, key, .. }) = rings.first_mut().map(|r| &mut r.task) else {
                continue;
            };
            let events = [port.rx(), control.wake_fd(), worker.wake.as_fd()];
            if let Err(error) = engine.disk().wait(&events, timeout) {
                tracing::error!(device = %key, %error, "waiting");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let now = Instant::now();
        windows[running.min(2) as usize].learn(now - since);
        rings.iter_mut().for_each(|ring| ring.tick(now));
    }
}

/// Looks for work as long as is worth while.
fn look(rings: &mut [Served], window: &mut Window, since: Instant) -> bool {
    if rings.len() > LOOK_RINGS {
        return rings.iter_mut().any(|ring| ring.task.engine.disk().woken());
    }
    let found = window.look(since, || {
        for ring in rings.iter_mut() {
            match ring.task.engine.has_work() {
                Ok(false) => {}
                Ok(true) => {
                    ring.more = true;
                    return Ok::<_, std::convert::Infallible>(true);
                }
                Err(error) => {
                    fail(ring, &error);
                    return Ok(true);
                }
            }
        }
        Ok(false)
    });
    matches!(found, Ok(true))
}

/// Whether all frontends will raise an event with their next request.
fn all_sleep(rings: &mut [Served]) -> bool {
    let mut all = true;
    for ring in rings {
        match ring.sleep() {
            Ok(asleep) => all &= asleep,
            Err(error) => {
                fail(ring, &error);
                all = false;
            }
        }
    }
    all
}

//! One virtqueue, served by a thread of its own.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain_kit::mem::SharedMem;
use domain_kit::poll::Window;
use domain_kit::vhost::inflight::Inflight;
use domain_kit::vhost::queue::{Chain, Queue, QueueError};
use domain_kit::vhost::session::{Ring, clear_kick};

use super::request::{Request, S_IOERR, S_OK, Verdict};
use crate::arena::Arena;
use crate::device::RingControl;
use crate::disk::attachment::{
    BUFFER_CHUNK, Completions, Disk, DiskError, DiskQueue, DiskRequest, MAX_OPERATION_BYTES, Tag,
};
use crate::engine::{BUFFERS_BYTES, NO_SPACE_RETRY, NoSpace};
use crate::limit::Limiter;
use crate::stats::Stats;

/// Executions that ended in a crash of this process after which a request is given up.
const MAX_ATTEMPTS: u8 = domain_kit::journal::MAX_ATTEMPTS;
/// Time without requests after which memory is given back.
const IDLE: Duration = Duration::from_secs(2);
/// Longest look for work before sleeping.
const LOOK: Duration = Duration::from_micros(50);

/// What a ring's thread needs of its device.
#[derive(Clone)]
pub struct Common {
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// The device's limits.
    pub limiter: Arc<Limiter>,
    /// Writes are refused.
    pub read_only: bool,
    /// What is done when the medium is full.
    pub no_space: NoSpace,
}

/// A request that the disk works on.
#[derive(Debug, Default)]
struct Running {
    request: Request,
    /// Bytes done, bytes of the piece under way, and its buffer.
    done: u64,
    piece: usize,
    buffer: u32,
    began: Option<Instant>,
}

/// Serves one queue.
pub struct RingServer {
    queue: Queue,
    inflight: Option<Inflight>,
    common: Common,
    disk: Box<dyn DiskQueue + Send>,
    buffers: Arc<SharedMem>,
    arena: Arena,
    stats: Arc<Stats>,
    /// Taken, not started.
    pending: VecDeque<u16>,
    running: u32,
    slots: Vec<Running>,
    chain: Chain,
    completions: Completions,
    stopped_until: Option<Instant>,
}

impl RingServer {
    /// Makes what the ring needs.
    ///
    /// # Errors
    /// No memory or descriptors.
    pub fn new(
        common: Common,
        queue: Queue,
        inflight: Option<(Inflight, Vec<u16>)>,
        stats: Arc<Stats>,
    ) -> std::io::Result<RingServer> {
        let buffers = Arc::new(SharedMem::create("vhost-buffers", BUFFERS_BYTES)?.0);
        let depth = queue.size();
        let disk = common.disk.clone().queue(buffers.clone(), depth.into())?;
        let (inflight, again) = inflight.map_or((None, Vec::new()), |(i, again)| (Some(i), again));
        stats.replayed.add(again.len() as u64);
        Ok(RingServer {
            queue,
            inflight,
            common,
            disk,
            buffers,
            arena: Arena::new(BUFFERS_BYTES / BUFFER_CHUNK),
            stats,
            pending: again.into(),
            running: 0,
            slots: std::iter::repeat_with(Running::default).take(depth.into()).collect(),
            chain: Chain::default(),
            completions: Completions::new(),
            stopped_until: None,
        })
    }

    /// Serves until told to stop, or the driver breaks the protocol. Gives the index of the request that is next.
    pub fn run(mut self, ring: &Doorbell, control: &RingControl) -> u16 {
        if let Err(error) = self.disk.begin() {
            tracing::error!(queue = ring.index, %error, "the disk's queue cannot be used");
            return self.queue.next_avail();
        }
        // What a predecessor answered may not have been told.
        ring.call.fire();
        let mut window = Window::new(LOOK);
        let mut idle = false;
        let mut broken = false;
        loop {
            let stop = control.is_stopped();
            if !stop && !control.is_paused() && !broken {
                self.queue.no_kicks();
                if let Err(error) = self.take_all() {
                    tracing::error!(queue = ring.index, %error, "the queue is not served any more");
                    broken = true;
                }
            }
            let mut moved = self.complete();
            moved |= self.dispatch(stop);
            if self.queue.must_notify() {
                ring.call.fire();
            }
            control.set_in_flight(self.running + self.pending.len() as u32);
            if stop && self.running == 0 {
                break;
            }
            if moved {
                idle = false;
                continue;
            }
            let serving = !stop && !broken && !control.is_paused();
            self.disk.kick();
            let since = Instant::now();
            let (disk, queue) = (&mut self.disk, &self.queue);
            let look = window.look(since, || {
                Ok::<_, std::convert::Infallible>(disk.ready() || (serving && queue.has_work()))
            });
            let found = matches!(look, Ok(true)) || (serving && self.queue.ask_for_kicks());
            if !found {
                let quiet = self.running == 0 && self.pending.is_empty();
                let due = self.stopped_until.map(|at| at.saturating_duration_since(Instant::now()));
                let timeout = due.or((quiet && !idle).then_some(IDLE));
                let events = [ring.kick.as_fd(), control.wake_fd()];
                if let Err(error) = self.disk.wait(&events, timeout) {
                    tracing::error!(queue = ring.index, %error, "waiting");
                    std::thread::sleep(Duration::from_millis(10));
                }
                clear_kick(&ring.kick);
                control.clear_wake();
                if quiet && !idle && since.elapsed() >= IDLE {
                    self.disk.idle();
                    idle = true;
                }
            }
            window.learn(since.elapsed());
        }
        self.disk.finish();
        // What waited is taken again by whoever serves next; tracked requests are known by their marks.
        let back = if self.inflight.is_some() { 0 } else { self.pending.len() as u16 };
        self.queue.next_avail().wrapping_sub(back)
    }

    fn take_all(&mut self) -> Result<(), QueueError> {
        while let Some(head) = self.queue.take()? {
            if self.pending.contains(&head) || self.slots[usize::from(head)].began.is_some() {
                return Err(QueueError::Head(head));
            }
            if let Some(inflight) = &mut self.inflight {
                inflight.take(head);
            }
            self.stats.requests.add(1);
            self.pending.push_back(head);
        }
        Ok(())
    }

    fn answer(&mut self, head: u16, status: u8, written: u32) {
        let request = &self.slots[usize::from(head)].request;
        request.set_status(status);
        if written > 0 {
            self.queue.wrote(request.data.segments(), written.into());
        }
        self.queue.wrote(request.status(), 1);
        self.slots[usize::from(head)].began = None;
        let queue = &mut self.queue;
        let mut publish = || {
            queue.give(head, written + 1);
            queue.used_idx()
        };
        match &self.inflight {
            Some(inflight) => inflight.answer(head, publish),
            None => {
                publish();
            }
        }
    }

    /// Starts what may start.
    fn dispatch(&mut self, stop: bool) -> bool {
        let now = Instant::now();
        if let Some(until) = self.stopped_until {
            if now < until && (!stop || self.stats.no_space.get() != 0) {
                return false;
            }
            self.stopped_until = None;
        }
        let mut moved = false;
        while let Some(&head) = self.pending.front() {
            let slot = usize::from(head);
            let attempts = self.inflight.as_ref().map_or(0, |i| i.attempts(head));
            // A suspect runs alone, so that its neighbours are not blamed.
            if attempts > 0 && self.running > 0 {
                break;
            }
            let verdict = match self.queue.chain(head, &mut self.chain) {
                Ok(()) => {
                    let geometry = self.disk.geometry();
                    self.slots[slot].request.check(&self.chain, &geometry, self.common.read_only)
                }
                Err(error) => {
                    tracing::warn!(head, %error, "request refused");
                    self.chain = Chain::default();
                    let geometry = self.disk.geometry();
                    self.slots[slot].request.check(&self.chain, &geometry, true)
                }
            };
            let verdict = if attempts >= MAX_ATTEMPTS {
                tracing::error!(head, attempts, "poison request: answered with an error");
                self.stats.poisoned.add(1);
                Verdict::Answer(S_IOERR, 0)
            } else {
                verdict
            };
            if let Verdict::Answer(status, written) = verdict {
                self.pending.pop_front();
                if status != S_OK {
                    self.stats.refused.add(1);
                }
                self.answer(head, status, written);
                moved = true;
                continue;
            }
            let request = &self.slots[slot].request;
            // A queue that ends leaves nothing behind: whoever moves the guest away does not take what is under way along.
            if !stop && let Err(wait) = self.common.limiter.pass(now, request.len) {
                self.stats.throttled.add(1);
                self.stopped_until = Some(now + wait);
                break;
            }
            self.slots[slot].began = Some(now);
            self.slots[slot].done = 0;
            if !self.start_piece(head) {
                // Without room for its data it waits for others to end.
                self.slots[slot].began = None;
                break;
            }
            self.pending.pop_front();
            self.running += 1;
            moved = true;
            if attempts > 0 {
                break;
            }
        }
        moved
    }

    /// Hands the next piece of a request to the disk; false if there is no room for it now.
    fn start_piece(&mut self, head: u16) -> bool {
        let running = &mut self.slots[usize::from(head)];
        let request = &running.request;
        let left = request.len - running.done;
        let mut len = left;
        if request.has_data() {
            len = left.min(MAX_OPERATION_BYTES as u64);
            let Some(buffer) = self.arena.take(len as usize) else { return false };
            running.buffer = buffer;
            if request.kind == crate::request::Kind::Write {
                request.data.fetch(running.done, len as usize, &self.buffers, buffer as usize);
            }
        }
        running.piece = len as usize;
        let operation = request.operation();
        let offset = request.offset + running.done;
        let request = DiskRequest { operation, offset, len, buffer: running.buffer };
        self.disk.submit(Tag(head.into()), &request);
        true
    }

    /// Takes the disk's completions further.
    fn complete(&mut self) -> bool {
        self.disk.completed(&mut self.completions);
        if self.completions.is_empty() {
            return false;
        }
        let mut done = std::mem::take(&mut self.completions);
        for (Tag(tag), result) in done.drain(..) {
            let head = tag as u16;
            let running = &mut self.slots[usize::from(head)];
            let request = &running.request;
            let has_data = request.has_data();
            if has_data {
                if result.is_ok() && request.kind == crate::request::Kind::Read {
                    request.data.store(running.done, running.piece, &self.buffers, running.buffer as usize);
                }
                self.arena.give(running.buffer, running.piece);
            }
            match result {
                Ok(()) => {
                    running.done += running.piece as u64;
                    if running.done >= running.request.len {
                        self.finish(head, S_OK);
                    } else if !self.start_piece(head) {
                        // Never: this request's own piece was just given back, and the next is no longer.
                        self.finish(head, S_IOERR);
                    }
                }
                Err(DiskError(errno)) => self.failed(head, errno),
            }
        }
        self.completions = done;
        true
    }

    fn finish(&mut self, head: u16, status: u8) {
        let running = &self.slots[usize::from(head)];
        let request = &running.request;
        if status == S_OK {
            let took = running.began.map_or(Duration::ZERO, |at| at.elapsed());
            self.stats.done(request.kind, request.len, took);
            self.stats.no_space.set(0);
        }
        let written = if request.kind == crate::request::Kind::Read { running.done as u32 } else { 0 };
        self.running -= 1;
        self.answer(head, status, written);
    }

    fn failed(&mut self, head: u16, errno: i32) {
        let error = std::io::Error::from_raw_os_error(errno);
        let full = error.kind() == std::io::ErrorKind::StorageFull;
        if full && self.common.no_space == NoSpace::Stop {
            if self.stats.no_space.get() == 0 {
                tracing::error!(
                    "the file system under the disk is full: the guest's disk stops until there is room"
                );
            }
            self.stats.no_space.set(1);
            self.stopped_until = Some(Instant::now() + NO_SPACE_RETRY);
            self.slots[usize::from(head)].began = None;
            self.running -= 1;
            self.pending.push_front(head);
            return;
        }
        self.stats.errors.add(1);
        tracing::error!(offset = self.slots[usize::from(head)].request.offset, %error, "disk error");
        self.finish(head, S_IOERR);
    }
}

/// What is left of a [`Ring`] without its queue.
pub struct Doorbell {
    /// Its number.
    pub index: u16,
    /// Readable when the driver has work.
    pub kick: std::os::fd::OwnedFd,
    /// To tell the driver.
    pub call: Arc<domain_kit::vhost::session::Call>,
}

/// Splits a ring.
pub fn split(ring: Ring) -> (Doorbell, Queue, Option<(Inflight, Vec<u16>)>) {
    let Ring { index, queue, kick, call, inflight, .. } = ring;
    (Doorbell { index, kick, call }, queue, inflight)
}

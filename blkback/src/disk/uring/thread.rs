//! The io_uring of a thread, for all the queues that it uses: what they queued is handed over together, and one sleep is for all.
//!
//! Each queue has a place in it, which is in the user data of its operations; what has completed is put aside by place until the
//! queue asks. It is the thread's own and not the queues', because a queue is made on another thread than the one that uses it.
#![expect(unsafe_code, reason = "io_uring takes addresses; whoever queues an operation answers for them")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::libc;

/// Most queues of a thread.
pub const MAX_QUEUES: usize = 256;
/// Chunks of buffers that each of them may have registered.
pub const MAX_CHUNKS: usize = 16;
/// Most events of a queue.
const MAX_EVENTS: usize = 8;
/// Operations that can be queued before any is handed over, and room for completions; neither is a limit.
const ENTRIES: u32 = 128;
const COMPLETIONS: u32 = 1024;

/// User data: bits 0 to 15 the tag or the event's number, 16 to 31 the place, then this for events, from bit 40 on an errno.
const EVENT: u64 = 1 << 32;
const ERRNO: u32 = 40;
/// User data of what nobody asks for.
const NOBODY: u64 = u64::MAX;

/// A queue's place, and the thread's io_uring that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    ring: u64,
    index: u16,
}

/// One completion: the operation's tag, and its result or a negative errno.
pub type Done = (u32, i32);

#[derive(Default)]
struct Seat {
    taken: bool,
    /// Something came since it last asked.
    woken: bool,
    done: VecDeque<Done>,
    /// Events, by number, whose poll is armed.
    armed: u8,
}

/// See the module.
pub struct ThreadRing {
    ring: IoUring,
    id: u64,
    seats: Vec<Seat>,
    /// Seats with `woken`.
    woken: usize,
    /// Buffers can be registered.
    registers: bool,
}

thread_local! {
    static RING: RefCell<Option<ThreadRing>> = const { RefCell::new(None) };
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

fn build() -> io::Result<IoUring> {
    let modern = IoUring::builder()
        .setup_cqsize(COMPLETIONS)
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(ENTRIES);
    match modern {
        // Linux before 6.1.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_cqsize(COMPLETIONS).build(ENTRIES)
        }
        other => other,
    }
}

impl ThreadRing {
    fn new() -> io::Result<ThreadRing> {
        let ring = build()?;
        let registered = ring.submitter().register_buffers_sparse((MAX_QUEUES * MAX_CHUNKS) as u32);
        if let Err(error) = &registered {
            tracing::warn!(%error, "no registered buffers: I/O is slower");
        }
        let registers = registered.is_ok();
        Ok(ThreadRing { ring, id: NEXT_ID.fetch_add(1, Relaxed), seats: Vec::new(), woken: 0, registers })
    }

    /// A place for one more queue of this thread; whether its buffers can be registered.
    ///
    /// # Errors
    /// Those of io_uring_setup(2); `EMFILE` when all are taken.
    pub fn join() -> io::Result<(Place, bool)> {
        RING.with_borrow_mut(|slot| {
            let ring = match slot {
                Some(ring) => ring,
                None => slot.insert(ThreadRing::new()?),
            };
            let free = ring.seats.iter().position(|seat| !seat.taken);
            let index = free.unwrap_or(ring.seats.len());
            if index == MAX_QUEUES {
                return Err(io::Error::from_raw_os_error(libc::EMFILE));
            }
            if free.is_none() {
                ring.seats.push(Seat::default());
            }
            ring.seats[index].taken = true;
            Ok((Place { ring: ring.id, index: index as u16 }, ring.registers))
        })
    }

    /// Does something with the ring of this thread, which `place` must be in; `None` on another thread than that which took it.
    pub fn with<T>(place: Place, f: impl FnOnce(&mut ThreadRing) -> T) -> Option<T> {
        let found = |slot: &mut Option<ThreadRing>| slot.as_mut().filter(|ring| ring.id == place.ring).map(f);
        RING.try_with(|slot| found(&mut slot.borrow_mut())).ok().flatten()
    }

    /// Gives a place back, of which nothing is under way any more. Its events are no longer polled afterwards.
    pub fn leave(&mut self, place: Place) {
        let at = usize::from(place.index);
        let armed = self.seats[at].armed;
        for event in (0..MAX_EVENTS).filter(|event| armed & 1 << event != 0) {
            let cancel = opcode::AsyncCancel::new(event_data(place, event)).build().user_data(NOBODY);
            // SAFETY: no address is in it.
            unsafe { self.push(&cancel) };
        }
        while self.seats[at].armed != 0 {
            self.enter(1, None);
            self.reap();
        }
        self.set_woken(at, false);
        self.seats[at].taken = false;
        self.seats[at].done.clear();
    }

    /// Queues an operation of `place`, of which it is `tag`.
    ///
    /// # Safety
    /// Addresses in it are valid until it completes.
    pub unsafe fn queue(&mut self, place: Place, tag: u32, entry: squeue::Entry) {
        let entry = entry.user_data(u64::from(tag & 0xffff) | u64::from(place.index) << 16);
        // SAFETY: as the caller says.
        unsafe { self.push(&entry) };
    }

    /// Has `tag` of `place` complete with an error, like any other.
    pub fn queue_refusal(&mut self, place: Place, tag: u32, errno: i32) {
        let data = u64::from(tag & 0xffff) | u64::from(place.index) << 16;
        let entry = opcode::Nop::new().build().user_data(data | u64::from(errno.unsigned_abs()) << ERRNO);
        // SAFETY: no address is in it.
        unsafe { self.push(&entry) };
    }

    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: as the caller says.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.enter(0, None);
        }
    }

    /// How many operations wait to be handed over.
    pub fn queued(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Hands over what waits, and takes what the kernel has.
    pub fn kick(&mut self) {
        let queue = self.ring.submission();
        let pending = !queue.is_empty() || queue.taskrun();
        drop(queue);
        if pending {
            self.enter(0, None);
        }
        self.reap();
    }

    /// Takes one completion of `place`; `None` means that there is none, and that it was told all.
    pub fn take(&mut self, place: Place) -> Option<Done> {
        self.reap();
        let at = usize::from(place.index);
        let done = self.seats[at].done.pop_front();
        if done.is_none() {
            self.set_woken(at, false);
        }
        done
    }

    /// Whether there are completions of `place`: cheap.
    pub fn ready(&mut self, place: Place) -> bool {
        // The kernel has completions that it puts into the queue when it is entered.
        if self.ring.completion().is_empty() && self.ring.submission().taskrun() {
            self.enter(0, None);
        }
        self.reap();
        !self.seats[usize::from(place.index)].done.is_empty()
    }

    /// Whether a completion or an event came for `place` that it was not told of.
    pub fn woken(&self, place: Place) -> bool {
        self.seats[usize::from(place.index)].woken
    }

    /// Polls events of `place` from now on. Each further signal is told; eventfds are never read, so none can be missed.
    pub fn arm(&mut self, place: Place, events: &[BorrowedFd<'_>]) {
        for (i, event) in events.iter().enumerate().take(MAX_EVENTS) {
            let armed = &mut self.seats[usize::from(place.index)].armed;
            if *armed & 1 << i == 0 {
                *armed |= 1 << i;
                let poll =
                    opcode::PollAdd::new(types::Fd(event.as_raw_fd()), libc::POLLIN as u32).multi(true);
                let poll = poll.build().user_data(event_data(place, i));
                // SAFETY: no address is in it.
                unsafe { self.push(&poll) };
            }
        }
    }

    /// Hands over what waits, and sleeps until something comes for any place or `timeout` is over.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        self.reap();
        let asleep = self.woken == 0;
        self.enter(usize::from(asleep), timeout);
        self.reap();
    }

    /// Sleeps until something came for `place`.
    pub fn wait_for(&mut self, place: Place) {
        self.reap();
        if self.seats[usize::from(place.index)].done.is_empty() {
            self.enter(1, None);
        }
    }

    fn set_woken(&mut self, at: usize, woken: bool) {
        let before = std::mem::replace(&mut self.seats[at].woken, woken);
        self.woken = self.woken + usize::from(woken) - usize::from(before);
    }

    /// Puts completions aside for the places that they are for.
    fn reap(&mut self) {
        loop {
            let Some(cqe) = self.ring.completion().next() else { break };
            let data = cqe.user_data();
            let at = (data >> 16 & 0xffff) as usize;
            if data == NOBODY || at >= self.seats.len() {
                continue;
            }
            self.set_woken(at, true);
            let (tag, refused) = ((data & 0xffff) as u32, (data >> ERRNO) as i32);
            if data & EVENT != 0 {
                if !cqueue::more(cqe.flags()) {
                    self.seats[at].armed &= !(1 << tag);
                }
                continue;
            }
            self.seats[at].done.push_back((tag, if refused != 0 { -refused } else { cqe.result() }));
        }
    }

    /// Registers `len` bytes at `address` as the buffer of a chunk of a place; without, none is registered there.
    ///
    /// # Errors
    /// That of io_uring_register(2).
    ///
    /// # Safety
    /// They stay mapped, and are only ever touched as shared memory, until they are no longer registered.
    pub unsafe fn register(
        &self,
        place: Place,
        chunk: usize,
        buffer: Option<(*mut u8, usize)>,
    ) -> io::Result<()> {
        let (address, iov_len) = buffer.unwrap_or((std::ptr::null_mut(), 0));
        let iovec = libc::iovec { iov_base: address.cast(), iov_len };
        let index = u32::from(buffer_index(place, chunk));
        // SAFETY: as the caller says. An empty entry names nothing.
        unsafe { self.ring.submitter().register_buffers_update(index, &[iovec], None) }.map(drop)
    }

    /// One io_uring_enter: hands over, and waits for `want` completions (0 or 1).
    fn enter(&mut self, want: usize, timeout: Option<Duration>) {
        let result = match timeout {
            Some(timeout) if want > 0 => {
                let time = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(want, &args)
            }
            _ => self.ring.submit_and_wait(want),
        };
        match result {
            Ok(_) => {}
            Err(e) => match e.raw_os_error() {
                // Time is over; a signal; the kernel is short of memory or the completion queue is full: what is queued stays
                // queued.
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                // Nothing sensible is left to do; the next incarnation replays.
                _ => panic!("io_uring_enter: {e}"),
            },
        }
    }
}

fn event_data(place: Place, event: usize) -> u64 {
    event as u64 | u64::from(place.index) << 16 | EVENT
}

/// Which of the registered buffers a chunk of a place is.
pub fn buffer_index(place: Place, chunk: usize) -> u16 {
    place.index * MAX_CHUNKS as u16 + chunk as u16
}

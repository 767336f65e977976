//! A block device that several threads may use at once, each call waiting for its own requests.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{BlkFront, DiskInfo, MAX_BYTES, Op, Outcome, SECTOR, SubmitError};

struct State {
    front: BlkFront,
    next_mark: u64,
    /// By mark: how it ended, and what it read.
    done: HashMap<u64, (Outcome, Vec<u8>)>,
    failed: bool,
}

struct Shared {
    state: Mutex<State>,
    /// Completions arrived, or there is room again.
    changed: Condvar,
    stop: AtomicBool,
    wake: EventFd,
}

/// See the module. Dropping it ends its thread; requests in flight stay with the backend.
pub struct BlkDisk {
    shared: Arc<Shared>,
    info: DiskInfo,
    reaper: Option<JoinHandle<()>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn reap(&self, event: impl AsFd) {
        while !self.stop.load(Relaxed) {
            let mut fds = [
                PollFd::new(event.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return tracing::error!(%error, "waiting for the block backend"),
            }
            let mut state = self.lock();
            let State { front, done, failed, .. } = &mut *state;
            let taken = front.take(|completion| {
                let mut bytes = vec![0; completion.read_len()];
                completion.copy_read(&mut bytes);
                done.insert(completion.mark, (completion.outcome, bytes));
            });
            if taken.is_err() {
                *failed = true;
                for mark in front.abandon() {
                    done.insert(mark, (Outcome::Error, Vec::new()));
                }
            }
            drop(state);
            self.changed.notify_all();
            if taken.is_err() {
                return;
            }
        }
    }
}

impl BlkDisk {
    /// Takes a connected device over.
    ///
    /// # Errors
    /// No thread or descriptor to be had.
    pub fn new(front: BlkFront) -> io::Result<Self> {
        let info = front.info();
        let event = front.event_fd().try_clone_to_owned()?;
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let state = State { front, next_mark: 0, done: HashMap::new(), failed: false };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            wake,
        });
        let theirs = shared.clone();
        let reaper = std::thread::Builder::new().name("blkfront".into()).spawn(move || theirs.reap(event))?;
        Ok(BlkDisk { shared, info, reaper: Some(reaper) })
    }

    /// What the backend says of the disk.
    pub fn info(&self) -> DiskInfo {
        self.info
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.info.sectors.saturating_mul(SECTOR)
    }

    /// See [`BlkFront::longest_wait`].
    pub fn longest_wait(&self) -> Duration {
        self.shared.lock().front.longest_wait()
    }

    /// See [`BlkFront::reset_longest_wait`].
    pub fn reset_longest_wait(&self) {
        self.shared.lock().front.reset_longest_wait();
    }

    /// Submits one request, waiting for room.
    fn submit<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        op: Op<'_>,
    ) -> io::Result<(MutexGuard<'a, State>, u64)> {
        loop {
            let mark = state.next_mark;
            match state.front.submit(op, mark) {
                Ok(()) => {
                    state.next_mark += 1;
                    return Ok((state, mark));
                }
                Err(SubmitError::Full) => {
                    state.front.push();
                    state = self.shared.wait(state);
                }
                Err(e) => return Err(io::Error::other(e)),
            }
        }
    }

    /// Waits for one request and gives what it read.
    fn finish<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        mark: u64,
    ) -> (MutexGuard<'a, State>, io::Result<Vec<u8>>) {
        loop {
            if let Some((outcome, bytes)) = state.done.remove(&mark) {
                let result = match outcome {
                    Outcome::Done => Ok(bytes),
                    Outcome::Error if state.failed => {
                        Err(io::Error::other("the block backend broke the protocol; the device is given up"))
                    }
                    Outcome::Error => Err(Errno::EIO.into()),
                    Outcome::Unsupported => Err(Errno::EOPNOTSUPP.into()),
                };
                return (state, result);
            }
            state = self.shared.wait(state);
        }
    }

    fn check(&self, offset: u64, len: usize) -> io::Result<u64> {
        let whole = offset.is_multiple_of(SECTOR) && (len as u64).is_multiple_of(SECTOR);
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= self.bytes());
        if !whole || !inside {
            let what = format!("{len} bytes at {offset} are not whole sectors of the disk");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Ok(offset / SECTOR)
    }

    /// Fills `into` from byte `offset` on; both whole sectors.
    ///
    /// # Errors
    /// `InvalidInput` for a range off the disk; EIO from the backend; a failed device.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let first = self.check(offset, into.len())?;
        let mut state = self.shared.lock();
        let mut marks = Vec::with_capacity(1);
        for (i, piece) in into.chunks(MAX_BYTES).enumerate() {
            let sector = first + (i * MAX_BYTES) as u64 / SECTOR;
            let mark;
            (state, mark) = self.submit(state, Op::Read { sector, len: piece.len() })?;
            marks.push(mark);
        }
        state.front.push();
        let mut outcome = Ok(());
        for (piece, mark) in into.chunks_mut(MAX_BYTES).zip(marks) {
            let result;
            (state, result) = self.finish(state, mark);
            match result {
                Ok(bytes) => piece.copy_from_slice(&bytes),
                Err(e) => outcome = Err(e),
            }
        }
        outcome
    }

    /// Writes `data` at byte `offset`; both whole sectors.
    ///
    /// # Errors
    /// As [`BlkDisk::read`].
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let first = self.check(offset, data.len())?;
        let mut state = self.shared.lock();
        let mut marks = Vec::with_capacity(1);
        for (i, piece) in data.chunks(MAX_BYTES).enumerate() {
            let sector = first + (i * MAX_BYTES) as u64 / SECTOR;
            let mark;
            (state, mark) = self.submit(state, Op::Write { sector, data: piece })?;
            marks.push(mark);
        }
        state.front.push();
        let mut outcome = Ok(());
        for mark in marks {
            let result;
            (state, result) = self.finish(state, mark);
            outcome = outcome.and(result.map(drop));
        }
        outcome
    }

    /// Makes all acknowledged writes durable. Does nothing if the backend has no cache to flush.
    ///
    /// # Errors
    /// As [`BlkDisk::read`].
    pub fn sync(&self) -> io::Result<()> {
        if !self.info.flush {
            return Ok(());
        }
        let (mut state, mark) = self.submit(self.shared.lock(), Op::Flush)?;
        state.front.push();
        self.finish(state, mark).1.map(drop)
    }
}

impl Drop for BlkDisk {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        let _full_is_awake_too = self.shared.wake.write(1);
        if let Some(reaper) = self.reaper.take() {
            let _its_panic_was_reported = reaper.join();
        }
    }
}

impl workload::load::BlockDevice for BlkDisk {
    fn size(&self) -> u64 {
        self.bytes()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(offset, buf)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write(offset, buf)
    }
    fn flush(&self) -> io::Result<()> {
        self.sync()
    }
}

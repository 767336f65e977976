//! A raw disk's queue: io_uring with registered buffers.
//!
//! The file is not registered: a dead ring lets go of registered files only after grace periods of the kernel (some 30 ms seen),
//! and so would the fence's lock. Without, exactly what is in flight pins the open file description.
//!
//! Buffers are registered a chunk at a time, once a chunk is used often; an idle queue has none registered and no memory in
//! them. The events of [`DiskQueue::wait`] are polled by the same ring, so that handing over and sleeping is one system call.
#![expect(
    unsafe_code,
    reason = "io_uring takes addresses; all of them lie in the buffers that the ring keeps alive"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use domain_kit::mem::SharedMem;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::libc;

use super::attachment::Disk;
use super::attachment::{
    BUFFER_CHUNK, Buffers, Completions, DiskError, DiskQueue, DiskRequest, Geometry, MAX_OPERATION_BYTES,
    Operation, Tag,
};
use super::source::Source;

/// Operations in a chunk after which it is registered: before, pinning it all costs more than it saves.
const REGISTER_AFTER: u32 = 64;
/// So many operations that wait are handed over at once, in the middle of a round: the disk begins while the rest is prepared, and what it has
/// done is answered while it works. With all of a round handed over together both sides wait for each other in turn, which cost a fifth of the
/// requests per second at depth 32 (docs/benchmarks.md).
const HAND_OVER: usize = 4;
/// Bytes that a secure discard overwrites at once.
const ERASE_STEP: usize = 1 << 20;
/// User data of polls of events: this and the event's number.
const EVENTS: u64 = 1 << 32;

/// What a tag's operation still has to do.
#[derive(Clone, Copy, Debug)]
struct Op {
    request: DiskRequest,
    done: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Chunk {
    /// So many operations since it was last registered or given back.
    Plain(u32),
    Registered,
    /// Registering failed once.
    #[default]
    Never,
}

/// See the module.
pub struct UringQueue {
    /// Before what it points into: closed first.
    ring: IoUring,
    buffers: Arc<dyn Buffers>,
    source: Arc<Source>,
    ops: Vec<Option<Op>>,
    chunks: Vec<Chunk>,
    /// Events whose poll is armed.
    armed: Vec<bool>,
    enabled: bool,
    under_way: u32,
    /// What a secure discard writes; made at the first.
    zeroes: Option<SharedMem>,
}

fn build(depth: u32) -> io::Result<IoUring> {
    let entries = (depth + 8).next_power_of_two();
    let modern = IoUring::builder()
        .setup_cqsize(entries * 2)
        .setup_r_disabled()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(entries);
    match modern {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            // Linux before 6.1.
            IoUring::builder().setup_cqsize(entries * 2).setup_r_disabled().build(entries)
        }
        other => other,
    }
}

impl UringQueue {
    /// A ring of its own for tags below `depth`.
    ///
    /// # Errors
    /// Those of io_uring_setup(2).
    pub fn new(source: Arc<Source>, buffers: Arc<dyn Buffers>, depth: u32) -> io::Result<Self> {
        let ring = build(depth)?;
        let chunks = buffers.mem().len() / BUFFER_CHUNK;
        let state = match ring.submitter().register_buffers_sparse(chunks as u32) {
            Ok(()) => Chunk::Plain(0),
            Err(error) => {
                tracing::warn!(%error, "no registered buffers: I/O is slower");
                Chunk::Never
            }
        };
        Ok(UringQueue {
            ring,
            buffers,
            source,
            ops: vec![None; depth as usize],
            chunks: vec![state; chunks],
            armed: Vec::new(),
            enabled: false,
            under_way: 0,
            zeroes: None,
        })
    }

    /// The first thread that works with it is the one that does for good.
    fn enable(&mut self) {
        if !self.enabled {
            self.enabled = true;
            if let Err(error) = self.ring.submitter().register_enable_rings() {
                tracing::error!(%error, "io_uring cannot be enabled");
            }
        }
    }

    fn set_chunk(&self, chunk: usize, registered: bool) -> io::Result<()> {
        let iovec = if registered {
            libc::iovec {
                iov_base: self.buffers.mem().as_ptr().wrapping_add(chunk * BUFFER_CHUNK).cast(),
                iov_len: BUFFER_CHUNK,
            }
        } else {
            libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }
        };
        // SAFETY: the chunk is mapped as long as self.buffers lives, which outlives self.ring; it is only ever touched as
        // shared memory. An empty entry names nothing.
        unsafe { self.ring.submitter().register_buffers_update(chunk as u32, &[iovec], None) }.map(drop)
    }

    /// Whether the chunk of an operation is registered; registers it when it is worth while.
    fn fixed(&mut self, chunk: usize) -> bool {
        match self.chunks[chunk] {
            Chunk::Registered => true,
            Chunk::Never => false,
            Chunk::Plain(used) if used < REGISTER_AFTER => {
                self.chunks[chunk] = Chunk::Plain(used + 1);
                false
            }
            Chunk::Plain(_) => {
                let done = self.set_chunk(chunk, true);
                if let Err(error) = &done {
                    // RLIMIT_MEMLOCK of an old kernel, for example.
                    tracing::warn!(%error, "buffers are not registered: I/O is slower");
                }
                self.chunks[chunk] = if done.is_ok() { Chunk::Registered } else { Chunk::Never };
                done.is_ok()
            }
        }
    }

    fn push_op(&mut self, tag: Tag, op: Op) {
        let fd = types::Fd(self.source.fd().as_fd().as_raw_fd());
        let DiskRequest { operation, offset, len, buffer } = op.request;
        let entry: squeue::Entry = match operation {
            Operation::Read | Operation::Write { .. } => {
                let chunk = buffer as usize / BUFFER_CHUNK;
                let fixed = self.fixed(chunk);
                let at = buffer as usize + op.done as usize;
                // In bounds: checked when it was submitted.
                let address = self.buffers.mem().as_ptr().wrapping_add(at);
                let (len, offset) = ((len - op.done) as u32, offset + op.done);
                let index = chunk as u16;
                if let Operation::Write { fua } = operation {
                    let flags = if fua || self.source.write_through() { libc::RWF_DSYNC } else { 0 };
                    if fixed {
                        opcode::WriteFixed::new(fd, address, len, index)
                            .offset(offset)
                            .rw_flags(flags)
                            .build()
                    } else {
                        opcode::Write::new(fd, address, len).offset(offset).rw_flags(flags).build()
                    }
                } else if fixed {
                    opcode::ReadFixed::new(fd, address, len, index).offset(offset).build()
                } else {
                    opcode::Read::new(fd, address, len).offset(offset).build()
                }
            }
            Operation::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Discard { secure: true } => self.erase(op),
            Operation::Discard { secure: false } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
            Operation::WriteZeroes => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
        };
        self.push(entry.user_data(u64::from(tag.0)));
    }

    /// The next step of a secure discard: zeroes over what is there, a piece at a time, and then all of it onto the medium.
    fn erase(&mut self, op: Op) -> squeue::Entry {
        let fd = types::Fd(self.source.fd().as_fd().as_raw_fd());
        let DiskRequest { offset, len, .. } = op.request;
        let piece = (len - op.done).min(ERASE_STEP as u64) as u32;
        match &self.zeroes {
            Some(zeroes) if piece > 0 => {
                opcode::Write::new(fd, zeroes.as_ptr(), piece).offset(offset + op.done).build()
            }
            _ => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: an address in it lies in its tag's buffer, which lives as long as self, and nothing else uses it until the
        // operation completes, and the kernel pins pages beyond that; or in the zeroes, which are only read and stay while
        // anything is under way.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            // Full only if more than one operation a tag were queued; made room all the same.
            self.enter(0, None);
        }
    }

    /// One io_uring_enter: hands over, and waits for `want` completions (0 or 1).
    fn enter(&mut self, want: usize, timeout: Option<Duration>) {
        self.enable();
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

    fn check(&mut self, request: &DiskRequest) -> Result<(), DiskError> {
        let refused = Err(DiskError(libc::EINVAL));
        match request.operation {
            Operation::Read | Operation::Write { .. } => {
                let len = request.len as usize;
                let chunk = request.buffer as usize / BUFFER_CHUNK;
                let inside = len > 0
                    && len <= MAX_OPERATION_BYTES
                    && request.buffer as usize + len <= (chunk + 1) * BUFFER_CHUNK
                    && chunk < self.chunks.len();
                if inside { Ok(()) } else { refused }
            }
            Operation::Discard { secure: true } => {
                if !self.source.geometry().discard.is_some_and(|discard| discard.secure) {
                    return Err(DiskError(libc::EOPNOTSUPP));
                }
                if self.zeroes.is_none() {
                    let made = SharedMem::create("zeroes", ERASE_STEP);
                    self.zeroes = Some(made.map_err(|_| DiskError(libc::ENOMEM))?.0);
                }
                Ok(())
            }
            Operation::Flush | Operation::Discard { .. } | Operation::WriteZeroes => Ok(()),
        }
    }

    /// What a completion means: `None` if the rest of the operation is to be done.
    fn judge(op: &mut Op, result: i32) -> Option<Result<(), DiskError>> {
        match (op.request.operation, result) {
            (_, e) if e == -libc::EINTR || e == -libc::EAGAIN => None,
            (_, e) if e < 0 => Some(Err(DiskError(-e))),
            (Operation::Read | Operation::Write { .. }, 0) => Some(Err(DiskError(libc::EIO))),
            (Operation::Read | Operation::Write { .. }, n) => {
                op.done += (n as u64).min(op.request.len - op.done);
                (op.done == op.request.len).then_some(Ok(()))
            }
            // A piece is written; the flush comes when all are.
            (Operation::Discard { secure: true }, n) if op.done < op.request.len => {
                if n == 0 {
                    return Some(Err(DiskError(libc::EIO)));
                }
                op.done += (n as u64).min(op.request.len - op.done);
                None
            }
            _ => Some(Ok(())),
        }
    }
}

impl DiskQueue for UringQueue {
    fn geometry(&self) -> Geometry {
        self.source.geometry()
    }

    fn submit(&mut self, tag: Tag, request: &DiskRequest) {
        let i = tag.0 as usize;
        debug_assert!(self.ops[i].is_none(), "{tag:?} is busy");
        let op = Op { request: *request, done: 0 };
        self.ops[i] = Some(op);
        self.under_way += 1;
        match self.check(request) {
            Ok(()) => {
                self.push_op(tag, op);
                if self.ring.submission().len() >= HAND_OVER {
                    self.enter(0, None);
                }
            }
            // Completes like any other, by way of the ring.
            Err(DiskError(errno)) => {
                tracing::error!(?request, errno, "an operation that cannot be");
                let nop = opcode::Nop::new()
                    .build()
                    .user_data(u64::from(tag.0) | u64::from(errno.unsigned_abs()) << 40);
                self.push(nop);
            }
        }
    }

    fn kick(&mut self) {
        let queue = self.ring.submission();
        let pending = !queue.is_empty() || queue.taskrun();
        drop(queue);
        if pending {
            self.enter(0, None);
        }
    }

    fn completed(&mut self, into: &mut Completions) {
        loop {
            let Some(cqe) = self.ring.completion().next() else { break };
            let data = cqe.user_data();
            if data & EVENTS != 0 {
                if !cqueue::more(cqe.flags()) {
                    self.armed[(data & 0xff) as usize] = false;
                }
                continue;
            }
            let (tag, refused) = (Tag(data as u32), (data >> 40) as i32);
            let Some(mut op) = self.ops.get(tag.0 as usize).copied().flatten() else {
                tracing::error!(tag = tag.0, "a completion for nothing");
                continue;
            };
            let result = if refused != 0 { -refused } else { cqe.result() };
            match Self::judge(&mut op, result) {
                Some(outcome) => {
                    self.ops[tag.0 as usize] = None;
                    self.under_way -= 1;
                    into.push((tag, outcome));
                }
                None => {
                    self.ops[tag.0 as usize] = Some(op);
                    self.push_op(tag, op);
                }
            }
        }
    }

    fn ready(&mut self) -> bool {
        if !self.ring.completion().is_empty() {
            return true;
        }
        // The kernel has completions that it puts into the queue when it is entered.
        if self.ring.submission().taskrun() {
            self.enter(0, None);
            return !self.ring.completion().is_empty();
        }
        false
    }

    fn wait(&mut self, events: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
        self.armed.resize(events.len(), false);
        for (i, event) in events.iter().enumerate() {
            if !std::mem::replace(&mut self.armed[i], true) {
                // Multishot, so each further signal is told; eventfds are never read, so none can be missed.
                let poll =
                    opcode::PollAdd::new(types::Fd(event.as_raw_fd()), libc::POLLIN as u32).multi(true);
                self.push(poll.build().user_data(EVENTS | i as u64));
            }
        }
        if self.ring.completion().is_empty() {
            self.enter(1, timeout);
        }
        Ok(())
    }

    fn finish(&mut self) {
        let mut done = Completions::new();
        while self.under_way > 0 {
            self.enter(1, None);
            self.completed(&mut done);
        }
    }

    fn idle(&mut self) {
        if self.under_way > 0 {
            return;
        }
        self.zeroes = None;
        self.enable();
        for chunk in 0..self.chunks.len() {
            if self.chunks[chunk] == Chunk::Registered {
                if let Err(error) = self.set_chunk(chunk, false) {
                    tracing::warn!(%error, "buffers stay registered");
                    continue;
                }
                self.chunks[chunk] = Chunk::Plain(0);
            }
        }
    }
}

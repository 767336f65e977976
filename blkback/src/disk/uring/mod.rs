//! A raw disk's queue: io_uring with registered buffers.
//!
//! The file is not registered: a dead ring lets go of registered files only after grace periods of the kernel (some 30 ms seen),
//! and so would the fence's lock. Without, exactly what is in flight pins the open file description.
//!
//! Buffers are registered a chunk at a time, once a chunk is used often; an idle queue has none registered and no memory in
//! them. The events of [`DiskQueue::wait`] are polled by the same ring, so that handing over and sleeping is one system call; and that
//! ring is its thread's ([`thread`]), so that queues served by one thread share these calls.
#![expect(
    unsafe_code,
    reason = "io_uring takes addresses; all of them lie in the buffers that the ring keeps alive"
)]

mod thread;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use domain_kit::mem::SharedMem;
use io_uring::{opcode, squeue, types};
use nix::libc;

use super::attachment::Disk;
use super::attachment::{
    BUFFER_CHUNK, Buffers, Completions, DiskError, DiskQueue, DiskRequest, Geometry, MAX_OPERATION_BYTES,
    Operation, Tag,
};
use super::source::Source;
use thread::{Place, ThreadRing, buffer_index};

/// Operations in a chunk after which it is registered: before, pinning it all costs more than it saves.
const REGISTER_AFTER: u32 = 64;
/// So many operations that wait are handed over at once, in the middle of a round: the disk begins while the rest is prepared, and what it has
/// done is answered while it works. With all of a round handed over together both sides wait for each other in turn, which cost a fifth of the
/// requests per second at depth 32 (docs/benchmarks.md).
const HAND_OVER: usize = 4;
/// Bytes that a secure discard overwrites at once.
const ERASE_STEP: usize = 1 << 20;

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
    buffers: Arc<dyn Buffers>,
    source: Arc<Source>,
    ops: Vec<Option<Op>>,
    chunks: Vec<Chunk>,
    /// From its first use on: of the thread that uses it.
    place: Option<Place>,
    under_way: u32,
    /// What a secure discard writes; made at the first.
    zeroes: Option<SharedMem>,
}

impl UringQueue {
    /// For tags below `depth`, which is 65,536 at most.
    pub fn new(source: Arc<Source>, buffers: Arc<dyn Buffers>, depth: u32) -> Self {
        let chunks = buffers.mem().len() / BUFFER_CHUNK;
        UringQueue {
            buffers,
            source,
            ops: vec![None; depth.min(1 << 16) as usize],
            chunks: vec![Chunk::Never; chunks],
            place: None,
            under_way: 0,
            zeroes: None,
        }
    }

    /// Its place among its thread's queues.
    fn place(&mut self) -> Place {
        match self.place {
            Some(place) => place,
            None => {
                // Whoever can do without asks for it by `begin`, and is told.
                self.begin().unwrap_or_else(|e| panic!("io_uring_setup: {e}"));
                self.place.unwrap_or_else(|| unreachable!("it has begun"))
            }
        }
    }

    /// Does something with its thread's io_uring.
    fn with<T>(&mut self, f: impl FnOnce(&mut ThreadRing, Place) -> T) -> T {
        let place = self.place();
        ThreadRing::with(place, |ring| f(ring, place))
            .unwrap_or_else(|| panic!("a disk's queue is used on two threads"))
    }

    fn set_chunk(&mut self, chunk: usize, registered: bool) -> io::Result<()> {
        let address = self.buffers.mem().as_ptr().wrapping_add(chunk * BUFFER_CHUNK);
        let buffer = registered.then_some((address, BUFFER_CHUNK));
        // SAFETY: the chunk is mapped as long as self.buffers lives; `finish` takes it out before, or nothing is ever unmapped. It is
        // only ever touched as shared memory.
        self.with(|ring, place| unsafe { ring.register(place, chunk, buffer) })
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

    /// No chunk is registered afterwards.
    fn unregister(&mut self) {
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

    fn push_op(&mut self, tag: Tag, op: Op) {
        let fd = types::Fd(self.source.fd().as_fd().as_raw_fd());
        let DiskRequest { operation, offset, len, buffer } = op.request;
        let place = self.place();
        let entry: squeue::Entry = match operation {
            Operation::Read | Operation::Write { .. } => {
                let chunk = buffer as usize / BUFFER_CHUNK;
                let fixed = self.fixed(chunk);
                let at = buffer as usize + op.done as usize;
                // In bounds: checked when it was submitted.
                let address = self.buffers.mem().as_ptr().wrapping_add(at);
                let (len, offset) = ((len - op.done) as u32, offset + op.done);
                let index = buffer_index(place, chunk);
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
        // SAFETY: an address in it lies in its tag's buffer, which lives as long as self, and nothing else uses it until the
        // operation completes, and the kernel pins pages beyond that; or in the zeroes, which are only read and stay while
        // anything is under way. Self ends after its operations, or leaves both behind.
        self.with(|ring, place| unsafe { ring.queue(place, tag.0, entry) });
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

    fn begin(&mut self) -> io::Result<()> {
        if self.place.is_none() {
            let (place, registers) = ThreadRing::join()?;
            self.place = Some(place);
            let most = if registers { thread::MAX_CHUNKS } else { 0 };
            self.chunks.iter_mut().take(most).for_each(|chunk| *chunk = Chunk::Plain(0));
        }
        Ok(())
    }

    fn shares(&self) -> bool {
        true
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
                self.with(|ring, _| {
                    if ring.queued() >= HAND_OVER {
                        ring.kick();
                    }
                });
            }
            // Completes like any other, by way of the ring.
            Err(DiskError(errno)) => {
                tracing::error!(?request, errno, "an operation that cannot be");
                self.with(|ring, place| ring.queue_refusal(place, tag.0, errno));
            }
        }
    }

    fn kick(&mut self) {
        self.with(|ring, _| ring.kick());
    }

    fn completed(&mut self, into: &mut Completions) {
        while let Some((tag, result)) = self.with(|ring, place| ring.take(place)) {
            let tag = Tag(tag);
            let Some(mut op) = self.ops.get(tag.0 as usize).copied().flatten() else {
                tracing::error!(tag = tag.0, "a completion for nothing");
                continue;
            };
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
        self.with(|ring, place| ring.ready(place))
    }

    fn woken(&mut self) -> bool {
        self.with(|ring, place| ring.woken(place))
    }

    fn arm(&mut self, events: &[BorrowedFd<'_>]) {
        self.with(|ring, place| ring.arm(place, events));
    }

    fn wait(&mut self, events: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
        self.with(|ring, place| {
            ring.arm(place, events);
            ring.wait(timeout);
        });
        Ok(())
    }

    fn finish(&mut self) {
        let Some(place) = self.place else { return };
        let mut done = Completions::new();
        self.completed(&mut done);
        while self.under_way > 0 {
            self.with(|ring, place| ring.wait_for(place));
            self.completed(&mut done);
        }
        self.unregister();
        self.with(|ring, place| ring.leave(place));
        self.place = None;
        tracing::trace!(?place, "left");
    }

    fn idle(&mut self) {
        if self.under_way == 0 && self.place.is_some() {
            self.zeroes = None;
            self.unregister();
        }
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        let Some(place) = self.place else { return };
        if ThreadRing::with(place, |_| ()).is_some() {
            self.finish();
            return;
        }
        // Its thread has gone, or is another: what the kernel may still use stays.
        tracing::error!("a disk's queue ends on another thread than it was used by; its buffers stay");
        std::mem::forget((self.buffers.clone(), self.zeroes.take()));
    }
}

//! The disk by io_uring, with registered buffers.
//!
//! The file is not registered: a dead ring lets go of registered files only after grace periods of the kernel (some 30 ms seen),
//! and so would the fence's lock. Without, exactly what is in flight pins the open file description.
#![expect(
    unsafe_code,
    reason = "io_uring takes addresses; all of them lie in the buffers that the ring keeps alive"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use domain_kit::journal::Slot;
use domain_kit::mem::SharedMem;
use io_uring::{IoUring, opcode, squeue, types};
use nix::libc;

use super::source::Source;
use crate::engine::{Disk, DiskError};
use crate::request::{DiskShape, MAX_REQUEST_BYTES};

/// One buffer for each slot, of [`MAX_REQUEST_BYTES`] each, private to this incarnation (hv-core apart, which copies granted
/// bytes in and out).
pub trait Buffers: Send + Sync + 'static {
    /// Their memory.
    fn mem(&self) -> &SharedMem;
}

impl Buffers for SharedMem {
    fn mem(&self) -> &SharedMem {
        self
    }
}

impl Buffers for domain_kit::grants::CopyBuffer {
    fn mem(&self) -> &SharedMem {
        &self.mem
    }
}

/// Byte offset of a slot's buffer.
pub fn buffer_offset(slot: Slot) -> usize {
    slot.0 as usize * MAX_REQUEST_BYTES
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

/// What a slot's operation still has to do.
#[derive(Clone, Copy, Debug)]
struct Op {
    kind: Kind,
    offset: u64,
    len: u32,
    done: u32,
}

/// See the module.
pub struct UringDisk {
    /// Before what it points into: closed first.
    ring: IoUring,
    buffers: Arc<dyn Buffers>,
    source: Arc<Source>,
    shape: DiskShape,
    ops: Vec<Option<Op>>,
    fixed: bool,
    queued: u32,
    under_way: u32,
}

impl UringDisk {
    /// A ring of its own for `slots` slots, all of whose buffers lie in `buffers`.
    ///
    /// # Errors
    /// Those of io_uring_setup(2) and io_uring_register(2).
    ///
    /// # Panics
    /// If the buffers are too short.
    pub fn new(source: Arc<Source>, buffers: Arc<dyn Buffers>, slots: u32) -> io::Result<Self> {
        assert!(slots as usize * MAX_REQUEST_BYTES <= buffers.mem().len(), "a buffer for each slot");
        let ring = IoUring::builder()
            .setup_cqsize(slots.next_power_of_two() * 2)
            .build(slots.next_power_of_two())?;
        let all = libc::iovec {
            iov_base: buffers.mem().as_ptr().cast(),
            iov_len: slots as usize * MAX_REQUEST_BYTES,
        };
        // SAFETY: the memory is mapped as long as self.buffers lives, which outlives self.ring; it is only ever touched as
        // shared memory.
        let fixed = match unsafe { ring.submitter().register_buffers(&[all]) } {
            Ok(()) => true,
            Err(error) => {
                // RLIMIT_MEMLOCK of an old kernel, for example.
                tracing::warn!(%error, "buffers are not registered: I/O is slower");
                false
            }
        };
        let ops = vec![None; slots as usize];
        let shape = source.shape;
        Ok(UringDisk { ring, buffers, source, shape, ops, fixed, queued: 0, under_way: 0 })
    }

    /// Operations that the kernel has.
    pub fn under_way(&self) -> u32 {
        self.under_way
    }

    /// Refuses writes of this ring, if `read_only`, even if others may write the disk.
    pub fn set_read_only(&mut self, read_only: bool) {
        self.shape.read_only |= read_only;
    }

    /// Waits until the kernel has nothing of this ring's any more.
    pub fn finish(&mut self) {
        let mut done = Vec::new();
        while self.under_way > 0 {
            if let Err(e) = self.ring.submit_and_wait(1)
                && e.raw_os_error() != Some(libc::EINTR)
            {
                return tracing::error!(error = %e, "io_uring_enter");
            }
            self.completed(&mut done);
        }
    }

    fn start(&mut self, slot: Slot, op: Op) {
        debug_assert!(self.ops[slot.0 as usize].is_none(), "{slot:?} is busy");
        self.ops[slot.0 as usize] = Some(op);
        self.under_way += 1;
        self.push(slot, op);
    }

    fn push(&mut self, slot: Slot, op: Op) {
        let fd = types::Fd(self.source.file.as_raw_fd());
        let at = buffer_offset(slot) + op.done as usize;
        assert!(op.done <= op.len && op.len as usize <= MAX_REQUEST_BYTES && slot.0 < self.ops.len() as u32);
        // In bounds: a slot of the ring (checked), and at most its own buffer's length from its start (checked).
        let address = self.buffers.mem().as_ptr().wrapping_add(at);
        let (len, offset) = (op.len - op.done, op.offset + u64::from(op.done));
        let entry: squeue::Entry = match (op.kind, self.fixed) {
            (Kind::Read, true) => opcode::ReadFixed::new(fd, address, len, 0).offset(offset).build(),
            (Kind::Read, false) => opcode::Read::new(fd, address, len).offset(offset).build(),
            (Kind::Write, true) => opcode::WriteFixed::new(fd, address, len, 0).offset(offset).build(),
            (Kind::Write, false) => opcode::Write::new(fd, address, len).offset(offset).build(),
            (Kind::Flush, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        let entry = entry.user_data(u64::from(slot.0));
        // SAFETY: the address lies in this slot's buffer, which lives as long as self; nothing else uses it until the
        // operation completes, and the kernel pins registered pages beyond that.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            // Full only if more than one operation a slot were queued; made room all the same.
            self.submit_now();
        }
        self.queued += 1;
    }

    fn submit_now(&mut self) {
        loop {
            match self.ring.submit() {
                Ok(_) => break,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // The kernel is short of memory or the completion queue is full: what is queued stays queued.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => break,
                // Nothing sensible is left to do; the next incarnation replays.
                Err(e) => panic!("io_uring_enter: {e}"),
            }
        }
        self.queued = self.ring.submission().len() as u32;
    }
}

impl Disk for UringDisk {
    fn shape(&self) -> DiskShape {
        self.shape
    }

    fn read(&mut self, slot: Slot, offset: u64, len: u32) {
        self.start(slot, Op { kind: Kind::Read, offset, len, done: 0 });
    }

    fn write(&mut self, slot: Slot, offset: u64, len: u32) {
        self.start(slot, Op { kind: Kind::Write, offset, len, done: 0 });
    }

    fn flush(&mut self, slot: Slot) {
        self.start(slot, Op { kind: Kind::Flush, offset: 0, len: 0, done: 0 });
    }

    fn submit(&mut self) {
        if self.queued > 0 {
            self.submit_now();
        }
    }

    fn completed(&mut self, into: &mut Vec<(Slot, Result<(), DiskError>)>) {
        loop {
            let Some(cqe) = self.ring.completion().next() else { break };
            let slot = Slot(cqe.user_data() as u32);
            let Some(mut op) = self.ops.get(slot.0 as usize).copied().flatten() else {
                tracing::error!(slot = slot.0, "a completion for nothing");
                continue;
            };
            let result = cqe.result();
            let outcome = match (op.kind, result) {
                (_, e) if e == -libc::EINTR || e == -libc::EAGAIN => None,
                (_, e) if e < 0 => Some(Err(DiskError(-e))),
                (Kind::Flush, _) => Some(Ok(())),
                // Shorter than it was: the file was cut under us.
                (_, 0) => Some(Err(DiskError(libc::EIO))),
                (_, n) => {
                    op.done += (n as u32).min(op.len - op.done);
                    (op.done == op.len).then_some(Ok(()))
                }
            };
            match outcome {
                Some(outcome) => {
                    self.ops[slot.0 as usize] = None;
                    self.under_way -= 1;
                    into.push((slot, outcome));
                }
                None => {
                    self.ops[slot.0 as usize] = Some(op);
                    self.push(slot, op);
                }
            }
        }
    }
}

impl AsRawFd for UringDisk {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl AsFd for UringDisk {
    /// Readable while completions wait to be taken.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as self lives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

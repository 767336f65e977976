//! Where the frontend protocol and storage meet. Neither knows anything of the other.
//!
//! ```text
//!   rings, journal, grants             what a disk is made of
//!   (engine, device)  ── DiskQueue ──► raw, qcow2, NBD, … (this folder)
//!                     ◄── Geometry ──  Disk
//! ```
//!
//! A [`Disk`] is open and fenced. Each ring gets a [`DiskQueue`] of its own, used by the one thread that serves the ring, and a set of
//! [`Buffers`] that only that queue and the ring use. The engine names each operation by a [`Tag`]; a tag has at most one
//! operation under way. Operations complete in any order, each exactly once.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use domain_kit::mem::SharedMem;

/// Bytes of a piece of buffer memory that is managed (registered, given back) as a whole. No request's buffer crosses the
/// border between two.
pub const BUFFER_CHUNK: usize = 1 << 20;

/// Most bytes of one operation's buffer.
pub const MAX_OPERATION_BYTES: usize = BUFFER_CHUNK;

/// What requests are judged by, and what frontends are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Units of 512 bytes on it.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Bytes of a logical sector: offsets and lengths are multiples of it. 512 or 4096.
    pub logical: u32,
    /// Bytes of a physical sector, a multiple of `logical`.
    pub physical: u32,
    /// Discards, if there are any.
    pub discard: Option<Discard>,
}

impl Geometry {
    /// A plain disk of 512-byte sectors without discards.
    pub const fn plain(sectors: u64, read_only: bool) -> Self {
        Geometry { sectors, read_only, logical: 512, physical: 512, discard: None }
    }
}

/// What a disk says of discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Bytes of what can be discarded by itself.
    pub granularity: u32,
    /// Bytes from the disk's start to the first such unit.
    pub alignment: u32,
    /// [`Operation::Discard`] with `secure` works.
    pub secure: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Disk to buffer.
    Read,
    /// Buffer to disk. With `fua` it is on the medium when it completes.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// All writes that completed before it was submitted are on the medium when it completes, whichever queue they were on.
    Flush,
    /// The range may read as anything, zeroes included, and its space be given back.
    Discard {
        /// What was there can no longer be recovered.
        secure: bool,
    },
    /// The range reads as zeroes.
    WriteZeroes,
}

/// Names an operation under way: a small number, below the depth of its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u32);

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRequest {
    /// What to do.
    pub operation: Operation,
    /// First byte on the disk, a multiple of the logical sector.
    pub offset: u64,
    /// Bytes, a multiple of the logical sector; at most [`MAX_OPERATION_BYTES`] where there is a buffer. 0 for a flush.
    pub len: u64,
    /// Where the buffer starts in the queue's [`Buffers`], page-aligned; `len` bytes, inside one chunk. Reads and writes only.
    pub buffer: u32,
}

/// Why an operation failed: an errno. It is that operation's alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskError(pub i32);

/// What has completed.
pub type Completions = Vec<(Tag, Result<(), DiskError>)>;

/// Memory of a queue's buffers, whole [`BUFFER_CHUNK`]s, private to this incarnation (hv-core apart, which copies granted bytes
/// in and out).
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

/// How an open disk is protected from I/O of its dead owners that is still under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    /// In words, for the log and the documentation.
    pub how: &'static str,
    /// How long the predecessor's I/O took to drain.
    pub drain: Duration,
}

/// An open, fenced disk.
pub trait Disk: Send + Sync {
    /// What it is now. `sectors` can change while it is open.
    fn geometry(&self) -> Geometry;
    /// The fence that was passed when it was opened.
    fn fence(&self) -> Fence;
    /// Looks whether the storage has another size now; true if [`Disk::geometry`] changed.
    ///
    /// # Errors
    /// The storage's.
    fn look_again(&self) -> io::Result<bool> {
        Ok(false)
    }
    /// Makes it longer; [`Disk::look_again`] finds it so.
    ///
    /// # Errors
    /// The storage's; `Unsupported` if its length is not ours to change.
    fn grow(&self, _bytes: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// How far a commit is, if one is under way.
    fn commit(&self) -> Option<super::commit::Progress> {
        None
    }
    /// Everything answered is on the medium afterwards, and nothing of it is kept aside.
    ///
    /// # Errors
    /// The storage's.
    fn settle(&self) -> io::Result<()>;
    /// A queue for one ring with at most `depth` operations under way, tags 0 to `depth` - 1. May be made on another thread than
    /// the one that then uses it.
    ///
    /// # Errors
    /// No memory or descriptors for it.
    fn queue(self: Arc<Self>, buffers: Arc<dyn Buffers>, depth: u32)
    -> io::Result<Box<dyn DiskQueue + Send>>;
}

/// A ring's way to its disk. One thread uses it.
pub trait DiskQueue {
    /// What the disk is now.
    fn geometry(&self) -> Geometry;
    /// To be called on the thread that will use it, first.
    ///
    /// # Errors
    /// No memory or descriptors for it.
    fn begin(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// Whether a thread can use several of its kind: [`DiskQueue::wait`] and [`DiskQueue::kick`] of one are then for all of them.
    fn shares(&self) -> bool {
        false
    }
    /// Queues an operation; `tag` must have none under way. An operation that cannot be carried out completes with an error.
    fn submit(&mut self, tag: Tag, request: &DiskRequest);
    /// Hands over what was queued.
    fn kick(&mut self);
    /// Takes what has completed.
    fn completed(&mut self, into: &mut Completions);
    /// Whether [`DiskQueue::completed`] would give something: cheap enough to be asked in a loop, and may miss.
    fn ready(&mut self) -> bool;
    /// Whether a completion or an event came since [`DiskQueue::completed`] last gave all there was. Of queues that share.
    fn woken(&mut self) -> bool {
        true
    }
    /// Has `events` end any sleep of the queues that share, and this queue be [`DiskQueue::woken`] then. They are the same at every
    /// call.
    fn arm(&mut self, _events: &[BorrowedFd<'_>]) {}
    /// Hands over what was queued, then sleeps until something has completed, one of `events` is readable, or `timeout` is over.
    /// `events` are the same at every call, after those of [`DiskQueue::arm`]. Returning early is fine.
    ///
    /// # Errors
    /// The kernel is out of memory.
    fn wait(&mut self, events: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<()>;
    /// Waits until nothing of this queue's is under way any more. What completes meanwhile is lost. It ends that way, or by being
    /// dropped on its thread.
    fn finish(&mut self);
    /// Nothing was asked for a while: gives memory back that can be had again.
    fn idle(&mut self) {}
}

impl<Q: DiskQueue + ?Sized> DiskQueue for Box<Q> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }
    fn begin(&mut self) -> io::Result<()> {
        (**self).begin()
    }
    fn shares(&self) -> bool {
        (**self).shares()
    }
    fn woken(&mut self) -> bool {
        (**self).woken()
    }
    fn arm(&mut self, events: &[BorrowedFd<'_>]) {
        (**self).arm(events);
    }
    fn submit(&mut self, tag: Tag, request: &DiskRequest) {
        (**self).submit(tag, request);
    }
    fn kick(&mut self) {
        (**self).kick();
    }
    fn completed(&mut self, into: &mut Completions) {
        (**self).completed(into);
    }
    fn ready(&mut self) -> bool {
        (**self).ready()
    }
    fn wait(&mut self, events: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
        (**self).wait(events, timeout)
    }
    fn finish(&mut self) {
        (**self).finish();
    }
    fn idle(&mut self) {
        (**self).idle();
    }
}

//! blkfront: a block device of a process guest.
//!
//! | module | what |
//! |---|---|
//! | [`queue`] | the ring and data pages, and every check of what the backend says |
//! | [`disk`] | the same as a disk that several threads may use at once |
//!
//! [`BlkFront`] connects by xenbus and adds the event channel. All of its pages lie in one region that only the backend
//! may map.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use domain_kit::evtchn::Port;
use domain_kit::grants::{GrantError, Region};
use domain_kit::hypercall::{HvError, Hypercall};
use domain_kit::mem::{Page, SharedMem};
use domain_kit::ring::RingMem;
use domain_kit::xenbus::{Frontend, XenbusState};
use domain_kit::xs::{XsClient, XsError};
use hv_abi::PAGE_SIZE;
use xen_abi::io::blkif::{Abi, VDISK_READONLY, node};

pub mod disk;
pub mod queue;

pub use disk::BlkDisk;
use queue::BlkQueue;
pub use queue::{Completion, MAX_BYTES, Op, Outcome, QueueError, SECTOR, SubmitError};

/// Why a device could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// xenstore.
    #[error(transparent)]
    Store(#[from] XsError),
    /// hv-core.
    #[error(transparent)]
    Hypercall(#[from] HvError),
    /// Memory.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// The device's own nodes.
    #[error("vbd {0}: {1}")]
    Node(u32, &'static str),
    /// The backend closed the device; its error node may say why.
    #[error("vbd {0}: the backend closed the device")]
    Closed(u32),
}

/// The data part of the region: all but the ring's page.
#[derive(Debug)]
pub struct DataPages {
    region: std::sync::Arc<SharedMem>,
}

impl RingMem for DataPages {
    fn size(&self) -> usize {
        self.region.len() - PAGE_SIZE
    }
    fn load_u32(&self, offset: usize) -> u32 {
        RingMem::load_u32(&*self.region, PAGE_SIZE + offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        RingMem::store_u32(&*self.region, PAGE_SIZE + offset, value);
    }
    fn load_u64(&self, offset: usize) -> u64 {
        RingMem::load_u64(&*self.region, PAGE_SIZE + offset)
    }
    fn store_u64(&self, offset: usize, value: u64) {
        RingMem::store_u64(&*self.region, PAGE_SIZE + offset, value);
    }
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.region.copy_out(PAGE_SIZE + offset, into);
    }
    fn copy_in(&self, offset: usize, from: &[u8]) {
        self.region.copy_in(PAGE_SIZE + offset, from);
    }
}

/// What the backend says of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Units of 512 bytes.
    pub sectors: u64,
    /// Writes will be refused.
    pub read_only: bool,
    /// Flushes work.
    pub flush: bool,
}

/// A connected block device, for one thread.
#[derive(Debug)]
pub struct BlkFront {
    queue: BlkQueue<Page, DataPages>,
    port: Port,
    info: DiskInfo,
    progress: Progress,
}

/// The longest time in which something was in flight and nothing completed.
#[derive(Clone, Copy, Debug)]
struct Progress {
    last: Instant,
    longest: Duration,
}

impl BlkFront {
    /// Connects device `id` of domain `domid`, waiting up to `timeout` for its backend.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(
        hv: &Hypercall,
        xs: &XsClient,
        domid: u16,
        id: u32,
        timeout: Duration,
    ) -> Result<BlkFront, ConnectError> {
        use XenbusState::{Closed, Closing, Connected, InitWait, Initialised};
        let deadline = Instant::now() + timeout;
        let left = || deadline.saturating_duration_since(Instant::now());
        let front = Frontend::open(xs, domid, "vbd", id)?;
        front.wait_backend(&[InitWait], timeout)?;
        let flush = front.backend_number::<u32>(node::FEATURE_FLUSH_CACHE)?.unwrap_or(0) != 0;
        let tag = u64::from_le_bytes(*b"blkfront").wrapping_add(u64::from(id));
        let region = Region::create(hv, front.backend_domid, 1 + queue::data_pages() as u32, tag)?;
        let data = DataPages { region: region.mem.clone() };
        let queue = BlkQueue::new(Page::new(region.mem.clone(), 0), data, region.gref(1));
        let port = hv.port_alloc_unbound(front.backend_domid)?;
        front.publish(
            &[
                (node::RING_REF, region.gref(0).to_string()),
                (node::EVENT_CHANNEL, port.port.to_string()),
                (node::PROTOCOL, Abi::X86_64.protocol().to_owned()),
                (node::FEATURE_PERSISTENT, "1".to_owned()),
            ],
            Initialised,
        )?;
        if front.wait_backend(&[Connected, Closing, Closed], left())? != Connected {
            return Err(ConnectError::Closed(id));
        }
        let sectors =
            front.backend_number(node::SECTORS)?.ok_or(ConnectError::Node(id, "no sectors node"))?;
        if front.backend_number::<u32>(node::SECTOR_SIZE)? != Some(512) {
            return Err(ConnectError::Node(id, "sectors are not of 512 bytes"));
        }
        let info = front.backend_number::<u32>(node::INFO)?.unwrap_or(0);
        front.publish(&[], Connected)?;
        let info = DiskInfo { sectors, read_only: info & VDISK_READONLY != 0, flush };
        Ok(BlkFront {
            queue,
            port,
            info,
            progress: Progress { last: Instant::now(), longest: Duration::ZERO },
        })
    }

    /// What the backend says of the disk.
    pub fn info(&self) -> DiskInfo {
        self.info
    }

    /// Requests that can still be submitted.
    pub fn free(&self) -> usize {
        self.queue.free()
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    /// Readable when responses may wait. After it was, call [`BlkFront::take`].
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.port.rx()
    }

    /// Puts a request on the ring; the backend sees it after [`BlkFront::push`]. `mark` comes back with its completion.
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn submit(&mut self, op: Op<'_>, mark: u64) -> Result<(), SubmitError> {
        if self.queue.in_flight() == 0 {
            self.progress.last = Instant::now();
        }
        self.queue.submit(op, mark)
    }

    /// Publishes what was submitted and notifies the backend if it wants to be.
    pub fn push(&mut self) {
        if self.queue.push() {
            self.port.notify();
        }
    }

    /// Hands each response that has arrived to `each`, without waiting; gives their number.
    ///
    /// # Errors
    /// The backend broke the protocol; the device is then not used any more, and [`BlkFront::abandon`] gives up the rest.
    pub fn take(&mut self, each: impl FnMut(Completion<'_, DataPages>)) -> Result<usize, QueueError> {
        self.port.clear();
        let taken = self.queue.take(each)?;
        if taken > 0 {
            let now = Instant::now();
            self.progress.longest = self.progress.longest.max(now - self.progress.last);
            self.progress.last = now;
        }
        Ok(taken)
    }

    /// Waits until at least one response was handed to `each`, or `timeout` is over (then 0).
    ///
    /// # Errors
    /// As [`BlkFront::take`]. A failure to wait counts as a timeout.
    pub fn wait(
        &mut self,
        timeout: Duration,
        mut each: impl FnMut(Completion<'_, DataPages>),
    ) -> Result<usize, QueueError> {
        let deadline = Instant::now() + timeout;
        loop {
            let taken = self.take(&mut each)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if taken > 0 || left.is_zero() {
                return Ok(taken);
            }
            if let Err(error) = self.port.wait(Some(left)) {
                tracing::error!(%error, "waiting for the block backend");
                return Ok(0);
            }
        }
    }

    /// After a failure: marks of the requests that were in flight and will never be answered.
    pub fn abandon(&mut self) -> Vec<u64> {
        self.queue.abandon()
    }

    /// The longest time so far in which something was in flight and nothing completed, the present one included.
    pub fn longest_wait(&self) -> Duration {
        let now = if self.queue.in_flight() > 0 { self.progress.last.elapsed() } else { Duration::ZERO };
        self.progress.longest.max(now)
    }

    /// Starts the measurement of [`BlkFront::longest_wait`] anew.
    pub fn reset_longest_wait(&mut self) {
        self.progress = Progress { last: Instant::now(), longest: Duration::ZERO };
    }
}

//! blkfront: a block device of a process guest.
//!
//! | module | what |
//! |---|---|
//! | [`queue`] | the ring and data pages, and every check of what the backend says |
//! | [`load`] | a verifying load, for tests |
//! | [`disk`] | the same as a disk that several threads may use at once |
//!
//! [`BlkFront`] connects by xenbus and adds the event channel. All of its pages lie in one region that only the backend
//! may map.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use domain_kit::Hypercall;
use domain_kit::evtchn::Port;
use domain_kit::grants::Region;
use domain_kit::poll::Window;
use domain_kit::ring::{Pages, Span};
use domain_kit::xenbus::{Frontend, XenbusState};
use domain_kit::xs::{XsClient, XsError, XsOps};
use hv_abi::PAGE_SIZE;
use xen_abi::io::blkif::{
    BLKIF_MAX_SEGMENTS_PER_REQUEST, VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE, node,
};

use crate::ConnectError;

pub mod disk;
pub mod load;
pub mod queue;

pub use disk::BlkDisk;
use queue::BlkQueue;
pub use queue::{Completion, MAX_BYTES, Op, Outcome, QueueError, QueueShape, SECTOR, SubmitError};

/// What the backend says of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Units of 512 bytes.
    pub sectors: u64,
    /// Writes will be refused.
    pub read_only: bool,
    /// Flushes work.
    pub flush: bool,
    /// Discards work.
    pub discard: bool,
    /// Secure discards work.
    pub discard_secure: bool,
    /// Bytes of a sector, a power of two from 512 to 4096: requests are whole ones.
    pub sector_size: u32,
    /// Bytes of a physical sector.
    pub physical_sector_size: u32,
    /// It is a cdrom drive.
    pub cdrom: bool,
    /// Its medium can be taken out; `sectors` is 0 while there is none.
    pub removable: bool,
}

/// How to connect. What the backend offers less of is used as far as it offers it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Rings, each for a thread.
    pub queues: u32,
    /// Sizes of each.
    pub shape: QueueShape,
    /// Grants may stay mapped.
    pub persistent: bool,
    /// Says the ring's size in pages (`num-ring-pages`) instead of by `ring-page-order`.
    pub legacy_pages: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { queues: 1, shape: QueueShape::default(), persistent: true, legacy_pages: false }
    }
}

/// A queue of a connected block device, for one thread.
#[derive(Debug)]
pub struct BlkFront {
    queue: BlkQueue<Pages, Span>,
    port: Port,
    info: DiskInfo,
    progress: Progress,
    window: Window,
}

/// The longest time in which something was in flight and nothing completed.
#[derive(Clone, Copy, Debug)]
struct Progress {
    last: Instant,
    longest: Duration,
}

impl Progress {
    fn note(&mut self, taken: usize) {
        if taken > 0 {
            let now = Instant::now();
            self.longest = self.longest.max(now - self.last);
            self.last = now;
        }
    }
}

impl BlkFront {
    /// Connects device `id` of domain `domid` with one queue, waiting up to `timeout` for its backend.
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
        let mut queues = Self::connect_with(hv, xs, domid, id, timeout, &Options::default())?;
        queues.pop().ok_or(ConnectError::Node("vbd", id, "no queue"))
    }

    /// The same with these options; gives a front for each queue. Why it failed stands in `error/device/vbd/ID/error` below the domain's
    /// own directory, too.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect_with(
        hv: &Hypercall,
        xs: &XsClient,
        domid: u16,
        id: u32,
        timeout: Duration,
        options: &Options,
    ) -> Result<Vec<BlkFront>, ConnectError> {
        let node = error_node(domid, id);
        let connected = Self::connect_at(hv, xs, domid, id, timeout, options);
        let said = match &connected {
            Ok(_) => xs.rm(&node),
            Err(why) => xs.write(&node, why.to_string()),
        };
        match said {
            Err(error) if !error.is_not_found() => tracing::warn!(node, %error, "the error node"),
            _ => {}
        }
        connected
    }

    fn connect_at(
        hv: &Hypercall,
        xs: &XsClient,
        domid: u16,
        id: u32,
        timeout: Duration,
        options: &Options,
    ) -> Result<Vec<BlkFront>, ConnectError> {
        use XenbusState::{Closed, Closing, Connected, InitWait, Initialised};
        let deadline = Instant::now() + timeout;
        let left = || deadline.saturating_duration_since(Instant::now());
        let front = Frontend::open(xs, domid, "vbd", id)?;
        front.wait_backend(&[InitWait], timeout)?;
        let offered = |name: &str, least: u32| -> Result<u32, ConnectError> {
            Ok(front.backend_number::<u32>(name)?.unwrap_or(least))
        };
        let flush = offered(node::FEATURE_FLUSH_CACHE, 0)? != 0;
        let discard = offered(node::FEATURE_DISCARD, 0)? != 0;
        let discard_secure = discard && offered(node::DISCARD_SECURE, 0)? != 0;
        let queues = options.queues.clamp(1, offered(node::MULTI_QUEUE_MAX_QUEUES, 1)?.max(1));
        let most_pages = 1usize << offered(node::MAX_RING_PAGE_ORDER, 0)?.min(4);
        let indirect = offered(node::FEATURE_MAX_INDIRECT_SEGMENTS, 0)? as usize;
        let mut shape = options.shape;
        shape.ring_pages = shape.ring_pages.min(most_pages);
        shape.segments = shape.segments.min(indirect.max(BLKIF_MAX_SEGMENTS_PER_REQUEST as usize));
        let mut nodes = vec![
            (node::PROTOCOL.to_owned(), shape.abi.protocol().to_owned()),
            (node::FEATURE_PERSISTENT.to_owned(), u32::from(options.persistent).to_string()),
        ];
        if shape.ring_pages > 1 && options.legacy_pages {
            nodes.push((node::NUM_RING_PAGES.to_owned(), shape.ring_pages.to_string()));
        } else if shape.ring_pages > 1 {
            nodes.push((node::RING_PAGE_ORDER.to_owned(), shape.ring_pages.ilog2().to_string()));
        }
        if queues > 1 {
            nodes.push((node::MULTI_QUEUE_NUM_QUEUES.to_owned(), queues.to_string()));
        }
        let mut parts = Vec::new();
        for n in 0..queues {
            let prefix = if queues > 1 { format!("queue-{n}/") } else { String::new() };
            parts.push(Self::queue(hv, front.backend_domid, id, n, &shape, &prefix, &mut nodes)?);
        }
        let nodes: Vec<(&str, String)> = nodes.iter().map(|(n, v)| (n.as_str(), v.clone())).collect();
        front.publish(&nodes, Initialised)?;
        if front.wait_backend(&[Connected, Closing, Closed], left())? != Connected {
            return Err(ConnectError::Closed("vbd", id));
        }
        let sectors =
            front.backend_number(node::SECTORS)?.ok_or(ConnectError::Node("vbd", id, "no sectors node"))?;
        let sector_size = front.backend_number::<u32>(node::SECTOR_SIZE)?.unwrap_or(512);
        let physical_sector_size =
            front.backend_number::<u32>(node::PHYSICAL_SECTOR_SIZE)?.unwrap_or(sector_size);
        if ![512, 1024, 2048, 4096].contains(&sector_size) {
            return Err(ConnectError::Node("vbd", id, "sectors are not of 512 to 4096 bytes"));
        }
        let info = front.backend_number::<u32>(node::INFO)?.unwrap_or(0);
        front.publish(&[], Connected)?;
        let info = DiskInfo {
            sectors,
            read_only: info & VDISK_READONLY != 0,
            flush,
            discard,
            discard_secure,
            sector_size,
            physical_sector_size,
            cdrom: info & VDISK_CDROM != 0,
            removable: info & VDISK_REMOVABLE != 0,
        };
        let progress = Progress { last: Instant::now(), longest: Duration::ZERO };
        let window = Window::new(Duration::ZERO);
        Ok(parts.into_iter().map(|(queue, port)| BlkFront { queue, port, info, progress, window }).collect())
    }

    /// Memory, grants and port of a queue, and the nodes that tell of them.
    fn queue(
        hv: &Hypercall,
        backend: u16,
        id: u32,
        number: u32,
        shape: &QueueShape,
        prefix: &str,
        nodes: &mut Vec<(String, String)>,
    ) -> Result<(BlkQueue<Pages, Span>, Port), ConnectError> {
        let tag = u64::from_le_bytes(*b"blkfront").wrapping_add(u64::from(id) | u64::from(number) << 56);
        let pages = shape.ring_pages;
        let region = Region::create(hv, backend, (pages + shape.data_pages()) as u32, tag)?;
        let ring = Pages::new(region.mem.clone(), (0..pages).map(|p| p * PAGE_SIZE).collect());
        let base = pages * PAGE_SIZE;
        let data = Span::new(region.mem.clone(), base, region.mem.len() - base);
        let queue = BlkQueue::new(ring, data, region.gref(pages as u32), *shape);
        let port = hv.port_alloc_unbound(backend)?;
        match pages {
            1 => nodes.push((format!("{prefix}{}", node::RING_REF), region.gref(0).to_string())),
            _ => nodes
                .extend((0..pages as u32).map(|page| {
                    (format!("{prefix}{}{page}", node::RING_REF), region.gref(page).to_string())
                })),
        }
        nodes.push((format!("{prefix}{}", node::EVENT_CHANNEL), port.port.to_string()));
        Ok((queue, port))
    }

    /// Most bytes of a read or write.
    pub fn max_bytes(&self) -> usize {
        self.queue.max_bytes()
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

    /// Puts a write on the ring whose data `fill` puts where they are granted, see [`BlkQueue::submit_in_place`].
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn submit_in_place(
        &mut self,
        sector: u64,
        len: usize,
        mark: u64,
        fill: impl FnOnce(&Span, usize),
    ) -> Result<(), SubmitError> {
        if self.queue.in_flight() == 0 {
            self.progress.last = Instant::now();
        }
        self.queue.submit_in_place(sector, len, mark, fill)
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
    pub fn take(&mut self, each: impl FnMut(Completion<'_, Span>)) -> Result<usize, QueueError> {
        self.port.clear();
        self.arrived(each)
    }

    fn arrived(&mut self, each: impl FnMut(Completion<'_, Span>)) -> Result<usize, QueueError> {
        let taken = self.queue.take(each)?;
        self.progress.note(taken);
        Ok(taken)
    }

    /// For how long [`BlkFront::wait`] looks for responses at most before it sleeps (see [`domain_kit::poll`]); at first not at all.
    pub fn set_look(&mut self, longest: Duration) {
        self.window = Window::new(longest);
    }

    /// Waits until at least one response was handed to `each`, or `timeout` is over (then 0).
    ///
    /// # Errors
    /// As [`BlkFront::take`]. A failure to wait counts as a timeout.
    pub fn wait(
        &mut self,
        timeout: Duration,
        mut each: impl FnMut(Completion<'_, Span>),
    ) -> Result<usize, QueueError> {
        let start = Instant::now();
        let deadline = start + timeout;
        // Not asked for an event as long as it looks by itself.
        let BlkFront { queue, window, .. } = self;
        let mut taken = 0;
        if window.is_open() {
            window.look(start, || -> Result<bool, QueueError> {
                taken = queue.glance(&mut each)?;
                Ok(taken > 0)
            })?;
        }
        self.progress.note(taken);
        while taken == 0 {
            // A kick that is latched still costs one turn more; to take it each time costs every turn a system call.
            taken = self.arrived(&mut each)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if taken > 0 || left.is_zero() {
                break;
            }
            if let Err(error) = self.port.wait(Some(left)) {
                tracing::error!(%error, "waiting for the block backend");
                return Ok(0);
            }
        }
        self.window.learn(start.elapsed());
        Ok(taken)
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

/// Where a frontend says what went wrong with its device (as Linux's xenbus_dev_error does).
pub fn error_node(domid: u16, id: u32) -> String {
    format!("/local/domain/{domid}/error/device/vbd/{id}/error")
}

/// Says goodbye to device `id` of domain `domid`, whose fronts are not used any more, and begins again: it can then be connected
/// anew, in another way too.
///
/// # Errors
/// The store's.
pub fn disconnect(xs: &XsClient, domid: u16, id: u32, timeout: Duration) -> Result<(), XsError> {
    let front = Frontend::open(xs, domid, "vbd", id)?;
    front.close(timeout)?;
    front.wait_backend(&[XenbusState::Closed, XenbusState::InitWait], timeout)?;
    let ring_refs = (0..16).map(|page| format!("{}{page}", node::RING_REF));
    let queues = (0..16).map(|queue| format!("queue-{queue}"));
    let rest = [
        node::RING_REF,
        node::EVENT_CHANNEL,
        node::RING_PAGE_ORDER,
        node::NUM_RING_PAGES,
        node::MULTI_QUEUE_NUM_QUEUES,
    ];
    for name in ring_refs.chain(queues).chain(rest.map(str::to_owned)) {
        match xs.rm(&format!("{}/{name}", front.path)) {
            Err(e) if !e.is_not_found() => return Err(e),
            _ => {}
        }
    }
    front.publish(&[], XenbusState::Initialising)
}

//! The ring and its data pages, and every check of what the backend says.
//!
//! Each request in flight has a tag, which is its id on the ring and owns its data pages for good: the same grants are used for
//! ever, which is what persistent grants are about. Free tags are a stack, so that few pages are in use at low depth.
//! A tag of a queue with indirect requests owns one page more, for the segments.

use domain_kit::ring::{FrontRing, RingError, RingLayout, RingMem};
use hv_abi::PAGE_SIZE;
use xen_abi::io::blkif::*;
use zerocopy::IntoBytes;

/// Most segments of a request that is not indirect.
const DIRECT: usize = BLKIF_MAX_SEGMENTS_PER_REQUEST as usize;
/// Most bytes of one request that is not indirect.
pub const MAX_BYTES: usize = DIRECT * PAGE_SIZE;
/// Bytes of the unit of sector numbers.
pub const SECTOR: u64 = SECTOR_SIZE as u64;

/// The sizes of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueShape {
    /// Layout of the entries.
    pub abi: Abi,
    /// Pages of the ring, a power of two.
    pub ring_pages: usize,
    /// Most requests in flight; at most as many as the ring has slots are used.
    pub depth: usize,
    /// Most segments (pages) of a request; more than 11 make indirect requests.
    pub segments: usize,
}

impl Default for QueueShape {
    fn default() -> Self {
        QueueShape { abi: Abi::X86_64, ring_pages: 1, depth: usize::MAX, segments: DIRECT }
    }
}

impl QueueShape {
    /// Layout of the ring.
    pub fn layout(&self) -> RingLayout {
        RingLayout::new(self.ring_pages, self.abi.entry_size(), self.abi.response_size())
    }

    /// Requests in flight at most.
    pub fn tags(&self) -> usize {
        self.depth.min(self.layout().size as usize)
    }

    /// Pages that a tag owns.
    fn tag_pages(&self) -> usize {
        self.segments + usize::from(self.segments > DIRECT)
    }

    /// Data pages of the whole queue.
    pub fn data_pages(&self) -> usize {
        self.tags() * self.tag_pages()
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// Reads `len` bytes, a multiple of 512, from `sector` on.
    Read {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: usize,
    },
    /// Writes the bytes, a multiple of 512, at `sector`.
    Write {
        /// First sector.
        sector: u64,
        /// What.
        data: &'a [u8],
    },
    /// Makes all answered writes durable.
    Flush,
    /// Writes the bytes at `sector`; nothing on this queue overtakes it, and it is durable when answered.
    Barrier {
        /// First sector.
        sector: u64,
        /// What: at most [`MAX_BYTES`].
        data: &'a [u8],
    },
    /// The content of the sectors is not needed any more.
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
    /// And can't be had back.
    SecureDiscard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// All tags are in flight; take completions first.
    #[error("the ring is full")]
    Full,
    /// Length 0, no multiple of 512, or more than a request of this queue has.
    #[error("a request of {0} bytes")]
    Length(usize),
    /// The backend broke the protocol earlier; the device is not used any more.
    #[error("the device failed: {0}")]
    Failed(QueueError),
}

/// The backend broke the protocol. The device is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// An index that no honest backend writes.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A response to nothing that is pending: made up, or a duplicate.
    #[error("a response with id {0}, which is not pending")]
    NotPending(u64),
    /// A response of another operation than was asked.
    #[error("a response of operation {got} to a request of operation {want}")]
    Operation {
        /// What the response says.
        got: u8,
        /// What was asked.
        want: u8,
    },
    /// A status that blkif.h does not define.
    #[error("a response with status {0}")]
    Status(i16),
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// BLKIF_RSP_ERROR.
    Error,
    /// BLKIF_RSP_EOPNOTSUPP.
    Unsupported,
}

/// A request that was answered.
pub struct Completion<'a, D> {
    /// The mark given to [`BlkQueue::submit`].
    pub mark: u64,
    /// How it ended.
    pub outcome: Outcome,
    data: &'a D,
    base: usize,
    len: usize,
}

impl<D: RingMem> Completion<'_, D> {
    /// Bytes read; 0 for other requests.
    pub fn read_len(&self) -> usize {
        self.len
    }

    /// Copies what was read (as much as fits in `into`).
    pub fn copy_read(&self, into: &mut [u8]) {
        let n = into.len().min(self.len);
        self.data.copy_out(self.base, &mut into[..n]);
    }
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    operation: u8,
    mark: u64,
    read_len: usize,
}

/// One ring with its data pages, `R` and `D` their memory.
#[derive(Debug)]
pub struct BlkQueue<R, D> {
    ring: FrontRing<R>,
    data: D,
    shape: QueueShape,
    first_gref: u32,
    free: Vec<u32>,
    pending: Vec<Option<Pending>>,
    failed: Option<QueueError>,
}

impl<R: RingMem, D: RingMem> BlkQueue<R, D> {
    /// Makes a new, empty ring. `data` has [`QueueShape::data_pages`] pages, whose grants start at `first_gref`.
    ///
    /// # Panics
    /// If the memory is too short.
    pub fn new(ring: R, data: D, first_gref: u32, shape: QueueShape) -> Self {
        assert!(data.size() >= shape.data_pages() * PAGE_SIZE, "too few data pages");
        BlkQueue {
            ring: FrontRing::init(ring, shape.layout()),
            data,
            shape,
            first_gref,
            free: (0..shape.tags() as u32).rev().collect(),
            pending: vec![None; shape.tags()],
            failed: None,
        }
    }

    /// Most bytes of a read or write.
    pub fn max_bytes(&self) -> usize {
        self.shape.segments * PAGE_SIZE
    }

    /// Requests that can still be submitted.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    /// Why the device is not used any more, if so.
    pub fn failed(&self) -> Option<QueueError> {
        self.failed
    }

    /// Gives all requests up that were in flight when the device failed, by their marks.
    pub fn abandon(&mut self) -> Vec<u64> {
        if self.failed.is_none() {
            return Vec::new();
        }
        self.pending.iter_mut().filter_map(|p| p.take().map(|p| p.mark)).collect()
    }

    /// Puts a request on the ring; the backend sees it after [`BlkQueue::push`]. `mark` comes back with its completion.
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn submit(&mut self, op: Op<'_>, mark: u64) -> Result<(), SubmitError> {
        let discard = match op {
            Op::Discard { sectors, .. } => Some((sectors, 0)),
            Op::SecureDiscard { sectors, .. } => Some((sectors, BLKIF_DISCARD_SECURE)),
            _ => None,
        };
        let (operation, sector, len) = match op {
            Op::Read { sector, len } => (BLKIF_OP_READ, sector, len),
            Op::Write { sector, data } => (BLKIF_OP_WRITE, sector, data.len()),
            Op::Flush => (BLKIF_OP_FLUSH_DISKCACHE, 0, 0),
            Op::Barrier { sector, data } => (BLKIF_OP_WRITE_BARRIER, sector, data.len()),
            Op::Discard { sector, .. } | Op::SecureDiscard { sector, .. } => (BLKIF_OP_DISCARD, sector, 0),
        };
        self.start(operation, sector, len, discard, mark, |pages, at| {
            if let Op::Write { data, .. } | Op::Barrier { data, .. } = op {
                pages.copy_in(at, data);
            }
        })
    }

    /// Puts a write of `len` bytes at `sector` on the ring whose data `fill` puts where they are granted, from the offset on that it is
    /// given: they are not copied.
    ///
    /// # Errors
    /// [`SubmitError`]; `fill` was not called then.
    pub fn submit_in_place(
        &mut self,
        sector: u64,
        len: usize,
        mark: u64,
        fill: impl FnOnce(&D, usize),
    ) -> Result<(), SubmitError> {
        self.start(BLKIF_OP_WRITE, sector, len, None, mark, fill)
    }

    /// `discard`: its sectors and flag.
    fn start(
        &mut self,
        operation: u8,
        sector: u64,
        len: usize,
        discard: Option<(u64, u8)>,
        mark: u64,
        fill: impl FnOnce(&D, usize),
    ) -> Result<(), SubmitError> {
        if let Some(e) = self.failed {
            return Err(SubmitError::Failed(e));
        }
        let most = if operation == BLKIF_OP_WRITE_BARRIER { MAX_BYTES } else { self.max_bytes() };
        let whole = len > 0 && len <= most && len.is_multiple_of(SECTOR as usize);
        if !whole && !matches!(operation, BLKIF_OP_FLUSH_DISKCACHE | BLKIF_OP_DISCARD) {
            return Err(SubmitError::Length(len));
        }
        let Some(tag) = self.free.pop() else { return Err(SubmitError::Full) };
        fill(&self.data, tag as usize * self.shape.tag_pages() * PAGE_SIZE);
        let request = self.request(operation, tag, sector, len, discard);
        let abi = self.shape.abi;
        self.ring.put(&abi.encode(&request)[..abi.entry_size()]);
        let read_len = if operation == BLKIF_OP_READ { len } else { 0 };
        self.pending[tag as usize] = Some(Pending { operation: request.operation(), mark, read_len });
        Ok(())
    }

    fn request(
        &self,
        operation: u8,
        tag: u32,
        sector: u64,
        len: usize,
        discard: Option<(u64, u8)>,
    ) -> Request {
        let id = tag.into();
        if let Some((nr_sectors, flag)) = discard {
            let sector_number = sector;
            return Request::Discard(BlkifRequestDiscard {
                operation,
                flag,
                id,
                sector_number,
                nr_sectors,
                ..Default::default()
            });
        }
        let page = tag as usize * self.shape.tag_pages();
        let segment = |i: usize| {
            let bytes = (len - i * PAGE_SIZE).min(PAGE_SIZE);
            let gref = self.first_gref + (page + i) as u32;
            BlkifRequestSegment::new(gref, 0, (bytes / SECTOR as usize - 1) as u8)
        };
        let segments = len.div_ceil(PAGE_SIZE);
        if segments <= DIRECT {
            let mut request = BlkifRequest { operation, id, sector_number: sector, ..Default::default() };
            request.nr_segments = segments as u8;
            request.seg.iter_mut().take(segments).enumerate().for_each(|(i, s)| *s = segment(i));
            return Request::Direct(request);
        }
        let list = page + self.shape.segments;
        for i in 0..segments {
            self.data.copy_in(list * PAGE_SIZE + i * size_of::<BlkifRequestSegment>(), segment(i).as_bytes());
        }
        let mut request = BlkifRequestIndirect {
            operation: BLKIF_OP_INDIRECT,
            indirect_op: operation,
            id,
            sector_number: sector,
            nr_segments: segments as u16,
            ..Default::default()
        };
        request.indirect_grefs[0] = self.first_gref + list as u32;
        Request::Indirect(request)
    }

    /// Publishes what was submitted; true if the backend wants an event.
    pub fn push(&mut self) -> bool {
        self.ring.push()
    }

    /// Hands each response that has arrived to `each`; gives their number. When it gives 0, the next response will raise an event.
    ///
    /// # Errors
    /// The backend broke the protocol; the device is then not used any more.
    pub fn take(&mut self, mut each: impl FnMut(Completion<'_, D>)) -> Result<usize, QueueError> {
        self.take_with(true, &mut each)
    }

    /// The same without asking for an event: for who looks again by itself.
    ///
    /// # Errors
    /// As [`BlkQueue::take`].
    pub fn glance(&mut self, mut each: impl FnMut(Completion<'_, D>)) -> Result<usize, QueueError> {
        self.take_with(false, &mut each)
    }

    fn take_with(
        &mut self,
        ask: bool,
        each: &mut impl FnMut(Completion<'_, D>),
    ) -> Result<usize, QueueError> {
        if let Some(e) = self.failed {
            return Err(e);
        }
        let taken = self.take_all(ask, each);
        if let Err(e) = taken {
            tracing::error!(error = %e, "the block backend broke the protocol: the device is given up");
            self.failed = Some(e);
        }
        taken
    }

    fn take_all(&mut self, ask: bool, each: &mut impl FnMut(Completion<'_, D>)) -> Result<usize, QueueError> {
        let mut count = 0;
        loop {
            let waiting = self.ring.unconsumed()?;
            for _ in 0..waiting {
                let mut bytes = [0; size_of::<BlkifResponse>()];
                self.ring.take(&mut bytes[..self.shape.abi.response_size()]);
                self.judge(self.shape.abi.decode_response(&bytes), each)?;
                count += 1;
            }
            if waiting == 0 && !(ask && self.ring.final_check()?) {
                return Ok(count);
            }
        }
    }

    fn judge(
        &mut self,
        response: BlkifResponse,
        each: &mut impl FnMut(Completion<'_, D>),
    ) -> Result<(), QueueError> {
        let id = response.id;
        let tag = usize::try_from(id)
            .ok()
            .filter(|&tag| tag < self.pending.len())
            .ok_or(QueueError::NotPending(id))?;
        let pending = self.pending[tag].ok_or(QueueError::NotPending(id))?;
        if response.operation != pending.operation {
            return Err(QueueError::Operation { got: response.operation, want: pending.operation });
        }
        let outcome = match response.status {
            BLKIF_RSP_OKAY => Outcome::Done,
            BLKIF_RSP_ERROR => Outcome::Error,
            BLKIF_RSP_EOPNOTSUPP => Outcome::Unsupported,
            other => return Err(QueueError::Status(other)),
        };
        self.pending[tag] = None;
        let len = if outcome == Outcome::Done { pending.read_len } else { 0 };
        each(Completion {
            mark: pending.mark,
            outcome,
            data: &self.data,
            base: tag * self.shape.tag_pages() * PAGE_SIZE,
            len,
        });
        self.free.push(tag as u32);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_kit::ring::{BackRing, HeapMem};
    use std::sync::Arc;
    use xen_abi::io::ring::RSP_PROD_OFFSET;

    const ABI: Abi = Abi::X86_64;
    type Queue = BlkQueue<Arc<HeapMem>, Arc<HeapMem>>;

    fn pair() -> (Queue, BackRing<Arc<HeapMem>>, Arc<HeapMem>, Arc<HeapMem>) {
        let ring = Arc::new(HeapMem::new(PAGE_SIZE));
        let shape = QueueShape::default();
        let data = Arc::new(HeapMem::new(shape.data_pages() * PAGE_SIZE));
        let queue = BlkQueue::new(ring.clone(), data.clone(), 100, shape);
        (queue, BackRing::attach(ring.clone(), shape.layout(), 0, 0), ring, data)
    }

    fn answer(back: &mut BackRing<Arc<HeapMem>>, id: u64, operation: u8, status: i16) {
        back.put(&ABI.encode_response(id, operation, status));
        back.push();
    }

    fn take_request(back: &mut BackRing<Arc<HeapMem>>) -> BlkifRequest {
        assert!(back.unconsumed().unwrap() > 0);
        let mut slot = [0; 112];
        back.take(&mut slot);
        match ABI.decode(&slot) {
            Request::Direct(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_read_and_a_write_pass() {
        let (mut queue, mut back, _, data) = pair();
        queue.submit(Op::Write { sector: 8, data: &[7; 5 * 512] }, 1).unwrap();
        queue.submit(Op::Read { sector: 16, len: 9 * 512 }, 2).unwrap();
        queue.submit(Op::Flush, 3).unwrap();
        assert!(queue.push());
        let write = take_request(&mut back);
        assert_eq!((write.sector_number, write.nr_segments), (8, 1));
        assert_eq!((write.seg[0].first_sect, write.seg[0].last_sect), (0, 4));
        let page = (write.seg[0].gref - 100) as usize;
        let mut bytes = [0; 5 * 512];
        data.copy_out(page * PAGE_SIZE, &mut bytes);
        assert_eq!(bytes, [7; 5 * 512]);
        let read = take_request(&mut back);
        assert_eq!((read.nr_segments, read.seg[1].last_sect), (2, 0));
        data.copy_in((read.seg[0].gref - 100) as usize * PAGE_SIZE, &[9; PAGE_SIZE]);
        let flush = take_request(&mut back);
        assert_eq!(flush.nr_segments, 0);
        answer(&mut back, read.id, BLKIF_OP_READ, 0);
        answer(&mut back, write.id, BLKIF_OP_WRITE, -1);
        let mut seen = Vec::new();
        let taken = queue.take(|c| {
            let mut into = [0; 16];
            c.copy_read(&mut into);
            seen.push((c.mark, c.outcome, c.read_len(), into[0]));
        });
        assert_eq!(taken, Ok(2));
        assert_eq!(seen, [(2, Outcome::Done, 9 * 512, 9), (1, Outcome::Error, 0, 0)]);
        assert_eq!(queue.in_flight(), 1);
    }

    #[test]
    fn lengths_and_a_full_ring_are_refused() {
        let (mut queue, ..) = pair();
        for len in [0, 511, 513, MAX_BYTES + 512] {
            assert_eq!(queue.submit(Op::Read { sector: 0, len }, 0), Err(SubmitError::Length(len)));
        }
        for mark in 0..32 {
            queue.submit(Op::Read { sector: 0, len: 512 }, mark).unwrap();
        }
        assert_eq!(queue.submit(Op::Flush, 32), Err(SubmitError::Full));
    }

    /// A lying backend: each lie ends the device with an error, and what was in flight is given up.
    #[test]
    fn lies_are_caught() {
        type Lie = fn(&mut BackRing<Arc<HeapMem>>, &HeapMem);
        let lies: [(&str, Lie); 6] = [
            ("an id never used", |back, _| answer(back, 31, BLKIF_OP_READ, 0)),
            ("an id out of range", |back, _| answer(back, 32, BLKIF_OP_READ, 0)),
            ("a huge id", |back, _| answer(back, u64::MAX, BLKIF_OP_READ, 0)),
            ("another operation", |back, _| answer(back, 0, BLKIF_OP_WRITE, 0)),
            ("an unknown status", |back, _| answer(back, 0, BLKIF_OP_READ, 7)),
            ("too many responses", |_, ring| ring.store_u32(RSP_PROD_OFFSET, 3)),
        ];
        for (what, lie) in lies {
            let (mut queue, mut back, ring, _) = pair();
            queue.submit(Op::Read { sector: 0, len: 512 }, 5).unwrap();
            queue.submit(Op::Read { sector: 9, len: 512 }, 6).unwrap();
            queue.push();
            take_request(&mut back);
            take_request(&mut back);
            lie(&mut back, &ring);
            let error = queue.take(|_| panic!("{what}: believed")).expect_err(what);
            assert_eq!(queue.submit(Op::Flush, 7), Err(SubmitError::Failed(error)));
            assert_eq!(queue.abandon(), [5, 6]);
        }
    }

    #[test]
    fn a_duplicate_is_caught() {
        let (mut queue, mut back, ..) = pair();
        queue.submit(Op::Read { sector: 0, len: 512 }, 5).unwrap();
        queue.submit(Op::Read { sector: 9, len: 512 }, 6).unwrap();
        queue.push();
        let first = take_request(&mut back);
        take_request(&mut back);
        answer(&mut back, first.id, BLKIF_OP_READ, 0);
        assert_eq!(queue.take(|_| ()), Ok(1));
        answer(&mut back, first.id, BLKIF_OP_READ, 0);
        assert_eq!(queue.take(|_| ()), Err(QueueError::NotPending(first.id)));
    }

    #[test]
    fn indirect_requests_barriers_and_discards() {
        for abi in [Abi::X86_64, Abi::X86_32] {
            let shape = QueueShape { abi, ring_pages: 4, depth: 5, segments: 40 };
            let ring = Arc::new(HeapMem::new(4 * PAGE_SIZE));
            let data = Arc::new(HeapMem::new(shape.data_pages() * PAGE_SIZE));
            let mut queue = BlkQueue::new(ring.clone(), data.clone(), 100, shape);
            let mut back = BackRing::attach(ring, shape.layout(), 0, 0);
            assert_eq!((shape.layout().size, queue.free(), queue.max_bytes()), (128, 5, 40 * PAGE_SIZE));
            let bytes = vec![5; 39 * PAGE_SIZE + 512];
            queue.submit(Op::Write { sector: 3, data: &bytes }, 1).unwrap();
            queue.submit(Op::Barrier { sector: 9, data: &[1; 512] }, 2).unwrap();
            queue.submit(Op::Discard { sector: 16, sectors: 1 << 40 }, 3).unwrap();
            let too_long = Op::Barrier { sector: 0, data: &bytes };
            assert_eq!(queue.submit(too_long, 4), Err(SubmitError::Length(bytes.len())));
            assert!(queue.push());
            let mut take = || {
                let mut slot = [0; MAX_ENTRY_SIZE];
                back.take(&mut slot[..abi.entry_size()]);
                abi.decode(&slot)
            };
            let Request::Indirect(write) = take() else { panic!("not indirect") };
            assert_eq!((write.indirect_op, write.nr_segments, write.sector_number), (BLKIF_OP_WRITE, 40, 3));
            let list = (write.indirect_grefs[0] - 100) as usize * PAGE_SIZE;
            let mut segment = [0; 8];
            data.copy_out(list + 39 * 8, &mut segment);
            assert_eq!(segment, BlkifRequestSegment::new(139, 0, 0).as_bytes());
            let Request::Direct(barrier) = take() else { panic!("not direct") };
            assert_eq!((barrier.operation, barrier.nr_segments), (BLKIF_OP_WRITE_BARRIER, 1));
            let Request::Discard(discard) = take() else { panic!("no discard") };
            assert_eq!((discard.sector_number, discard.nr_sectors), (16, 1 << 40));
            for (id, operation) in [(discard.id, BLKIF_OP_DISCARD), (write.id, BLKIF_OP_WRITE)] {
                back.put(&abi.encode_response(id, operation, 0)[..abi.response_size()]);
            }
            back.push();
            let mut marks = Vec::new();
            assert_eq!(queue.take(|c| marks.push(c.mark)), Ok(2));
            assert_eq!(marks, [3, 1]);
        }
    }
}

//! One engine in this thread, with a frontend's end of its ring, pages and a disk in memory.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use blkback::disk::attachment::{
    Buffers, Completions, DiskError, DiskQueue, DiskRequest, Geometry, Operation, Tag,
};
use blkback::engine::{BUFFERS_BYTES, Engine};
use blkback::request::{BlkifFormat, MAX_INDIRECT_BYTES};
use blkback::stats::Stats;
use domain_kit::journal::JournaledRing;
use domain_kit::mem::SharedMem;
use domain_kit::ring::{FrontRing, RingLayout};
use xen_abi::io::blkif::*;

use super::PlainPages;

pub const ABI: Abi = Abi::X86_64;
pub const SECTORS: u64 = 1024;
/// Pages that are granted: gref n is page n. One page before and one after are not.
pub const PAGES: usize = 16;

/// A disk in memory, that fails when told.
pub struct Fake {
    buffers: Arc<SharedMem>,
    pub data: Vec<u8>,
    done: Completions,
    /// The next writes fail with this.
    pub fail: Vec<i32>,
}

impl DiskQueue for Fake {
    fn geometry(&self) -> Geometry {
        Geometry::plain(SECTORS, false)
    }
    fn submit(&mut self, tag: Tag, request: &DiskRequest) {
        let (at, len) = (request.offset as usize, request.len as usize);
        let range = at..at + len;
        let result = match request.operation {
            Operation::Read => {
                self.buffers.mem().copy_in(request.buffer as usize, &self.data[range]);
                Ok(())
            }
            Operation::Write { .. } => match self.fail.pop() {
                Some(errno) => Err(DiskError(errno)),
                None => {
                    self.buffers.mem().copy_out(request.buffer as usize, &mut self.data[range]);
                    Ok(())
                }
            },
            _ => Ok(()),
        };
        self.done.push((tag, result));
    }
    fn kick(&mut self) {}
    fn completed(&mut self, into: &mut Completions) {
        into.append(&mut self.done);
    }
    fn ready(&mut self) -> bool {
        !self.done.is_empty()
    }
    fn wait(&mut self, _events: &[BorrowedFd<'_>], _timeout: Option<Duration>) -> std::io::Result<()> {
        Ok(())
    }
    fn finish(&mut self) {}
}

pub struct World {
    pub ring: Arc<SharedMem>,
    pub guest: Arc<SharedMem>,
    pub front: FrontRing<Arc<SharedMem>>,
    pub engine: Engine<Arc<SharedMem>, Arc<SharedMem>, PlainPages, Fake>,
    pub stats: Arc<Stats>,
}

fn memory(len: usize) -> Arc<SharedMem> {
    Arc::new(SharedMem::create("hostile", len).unwrap().0)
}

pub fn world() -> World {
    let layout = RingLayout::new(1, ABI.entry_size(), ABI.response_size());
    let shape = JournaledRing::<Arc<SharedMem>, Arc<SharedMem>, BlkifFormat>::shape(
        &layout,
        MAX_INDIRECT_BYTES as u32,
        0,
    );
    let (ring, guest) = (memory(4096), memory((PAGES + 2) * 4096));
    let front = FrontRing::init(ring.clone(), layout);
    let journal = memory(shape.bytes());
    let back = JournaledRing::create(ring.clone(), layout, journal, shape, [0; 6], BlkifFormat(ABI)).unwrap();
    let buffers = memory(BUFFERS_BYTES);
    let disk = Fake {
        buffers: buffers.clone(),
        data: vec![0; SECTORS as usize * 512],
        done: Vec::new(),
        fail: Vec::new(),
    };
    // One page before and one after are not granted.
    let pages = PlainPages { guest: guest.clone(), buffers, first: 4096, pages: PAGES };
    let stats = Arc::new(Stats::default());
    let engine = Engine::new(back, ABI, Vec::new(), pages, disk, stats.clone());
    World { ring, guest, front, engine, stats }
}

impl World {
    pub fn put(&mut self, request: &Request) {
        self.front.put(&ABI.encode(request));
        self.front.push();
    }

    pub fn write(&mut self, id: u64, sector_number: u64, gref: u32) {
        let mut request = BlkifRequest { operation: BLKIF_OP_WRITE, id, sector_number, ..Default::default() };
        request.nr_segments = 1;
        request.seg[0] = BlkifRequestSegment::new(gref, 0, 7);
        self.put(&Request::Direct(request));
    }

    /// Polls until nothing is left to do at once, and takes the responses.
    pub fn settle(&mut self) -> Vec<(u64, i16)> {
        while self.engine.poll().unwrap().more {}
        let mut responses = Vec::new();
        while self.front.unconsumed().unwrap() > 0 {
            let mut bytes = [0; 16];
            self.front.take(&mut bytes);
            let response = ABI.decode_response(&bytes);
            responses.push((response.id, response.status));
        }
        responses
    }
}

//! The model's disk and guest pages, and what a power failure would leave.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Duration;

use blkback::disk::attachment::{Completions, Discard, DiskQueue, DiskRequest, Geometry, Operation, Tag};
use blkback::engine::{Direction, GuestPages, IndirectPage};
use blkback::request::Prepared;
use domain_kit::journal::Slot;
use domain_kit::model::Life;
use xen_abi::io::blkif::*;
use zerocopy::IntoBytes;

/// Sectors that are used.
pub const SECTORS: u64 = 4;
/// A discard of version n is of one sector and n times as many more, which do not exist: that is how the disk knows it.
const DISCARD_STEP: u64 = 16;

/// Sectors of a discard by the request with that index.
pub fn discard_sectors(id: u64) -> u64 {
    1 + (id + 1) * DISCARD_STEP
}

/// A request, and the ring that it goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub queue: usize,
    pub op: Op,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read(u64),
    Write(u64),
    Barrier(u64),
    Flush,
    /// A write that crashes the service when it runs.
    Poison(u64),
    /// A write whose segment lies in an indirect page.
    Indirect(u64),
    /// A flush with data: the write that follows it is on the medium, too.
    Fua(u64),
    /// To the model a write of zeroes.
    Discard(u64),
}

impl Op {
    pub fn sector(self) -> u64 {
        match self {
            Op::Read(s) | Op::Write(s) | Op::Barrier(s) | Op::Poison(s) => s,
            Op::Indirect(s) | Op::Fua(s) | Op::Discard(s) => s,
            Op::Flush => 0,
        }
    }

    pub fn writes(self) -> bool {
        !matches!(self, Op::Read(_) | Op::Flush)
    }

    /// The operation that its response must name.
    pub fn code(self) -> u8 {
        match self {
            Op::Read(_) => BLKIF_OP_READ,
            Op::Write(_) | Op::Poison(_) | Op::Indirect(_) => BLKIF_OP_WRITE,
            Op::Barrier(_) => BLKIF_OP_WRITE_BARRIER,
            Op::Flush | Op::Fua(_) => BLKIF_OP_FLUSH_DISKCACHE,
            Op::Discard(_) => BLKIF_OP_DISCARD,
        }
    }
}

/// Sector contents are the version of what wrote them: the index of the operation + 1.
pub type Version = u64;

#[derive(Clone, Copy, Debug)]
pub enum Io {
    Read(u64),
    /// With FUA or without.
    Write(u64, bool),
    /// Of that version.
    Discard(u64, Version),
    Flush,
}

pub type Buffers = Rc<RefCell<Vec<Version>>>;
pub type Done = Rc<RefCell<Completions>>;

#[derive(Debug)]
pub struct InFlight {
    tag: Tag,
    /// Page of the buffers.
    buffer: usize,
    io: Io,
    /// The buffers of the incarnation that handed it over.
    buffers: Buffers,
    done: Done,
}

/// What happened, as far as a power failure is concerned.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A write is in the disk's cache, or with FUA on the medium.
    Landed { version: Version, fua: bool },
    /// All that had landed is on the medium.
    Flushed,
    /// The guest gave the request with this id to its disk.
    Issued(u64),
    /// The guest has its answer.
    Acked(u64),
}

#[derive(Debug, Default)]
pub struct Medium {
    pub log: Vec<Event>,
    /// Versions that a disk operation was made for.
    pub started: BTreeSet<Version>,
    pub cache: Vec<Version>,
    pub durable: Vec<Version>,
    pub in_flight: Vec<InFlight>,
    pub landed: BTreeSet<Version>,
    pub on_medium: BTreeSet<Version>,
    pub script: Vec<Step>,
}

impl Medium {
    pub fn land(&mut self, which: usize) {
        let op = self.in_flight.remove(which);
        let i = op.buffer;
        match op.io {
            Io::Read(sector) => op.buffers.borrow_mut()[i] = self.cache[sector as usize],
            Io::Write(sector, fua) => {
                let version = op.buffers.borrow()[i];
                self.put(sector, version, fua);
            }
            Io::Discard(sector, version) => self.put(sector, version, false),
            Io::Flush => {
                self.durable.clone_from(&self.cache);
                self.on_medium.extend(&self.landed);
                self.log.push(Event::Flushed);
            }
        }
        op.done.borrow_mut().push((op.tag, Ok(())));
    }

    fn put(&mut self, sector: u64, version: Version, fua: bool) {
        let old = std::mem::replace(&mut self.cache[sector as usize], version);
        assert!(version >= old, "version {version} landed over {old} in sector {sector}");
        self.check_barriers(version);
        self.landed.insert(version);
        self.log.push(Event::Landed { version, fua });
        if fua {
            self.durable[sector as usize] = version;
            self.on_medium.insert(version);
        }
    }

    fn check_barriers(&self, version: Version) {
        let landed =
            |i: usize| self.landed.contains(&(i as u64 + 1)) || matches!(self.script[i].op, Op::Poison(_));
        let me = version as usize - 1;
        // On the device: what is on the disk before a barrier's data is on the medium before them, whichever ring it came by.
        if let Op::Barrier(_) = self.script[me].op {
            let torn: Vec<_> = self.landed.difference(&self.on_medium).filter(|v| **v != version).collect();
            assert!(torn.is_empty(), "barrier {version} landed between {torn:?} and the flush of them");
        }
        // On its ring: nothing overtakes it either way.
        let queue = self.script[me].queue;
        let here = |i: usize| self.script[i].queue == queue;
        for earlier in (0..me).filter(|i| here(*i)) {
            let barrier_between =
                (earlier..=me).any(|i| here(i) && matches!(self.script[i].op, Op::Barrier(_)));
            if barrier_between && self.script[earlier].op.writes() {
                assert!(
                    landed(earlier),
                    "version {version} overtook version {} across a barrier",
                    earlier + 1
                );
            }
        }
    }
}

/// An incarnation's view of the disk.
pub struct ModelDisk {
    pub medium: Rc<RefCell<Medium>>,
    pub life: Rc<Life>,
    pub buffers: Buffers,
    pub queued: Vec<(Tag, usize, Io)>,
    pub done: Done,
    pub poison: BTreeSet<Version>,
}

impl DiskQueue for ModelDisk {
    fn geometry(&self) -> Geometry {
        let discard = Some(Discard { granularity: 512, alignment: 0, secure: false });
        Geometry { discard, ..Geometry::plain(1 << 20, false) }
    }
    fn submit(&mut self, tag: Tag, request: &DiskRequest) {
        let sector = request.offset / 512;
        let page = request.buffer as usize / 4096;
        let io = match request.operation {
            Operation::Read => Io::Read(sector),
            Operation::Write { fua } => {
                if self.poison.contains(&self.buffers.borrow()[page]) {
                    self.life.crash();
                }
                self.medium.borrow_mut().started.insert(self.buffers.borrow()[page]);
                Io::Write(sector, fua)
            }
            Operation::Flush => Io::Flush,
            Operation::Discard { secure: false } => {
                let version = (request.len / 512 - 1) / DISCARD_STEP;
                self.medium.borrow_mut().started.insert(version);
                Io::Discard(sector, version)
            }
            other => panic!("{other:?}"),
        };
        let len = match io {
            Io::Flush => 0,
            Io::Discard(_, version) => discard_sectors(version - 1) * 512,
            _ => 512,
        };
        assert_eq!(request.len, len);
        self.queued.push((tag, page, io));
    }
    fn kick(&mut self) {
        for (tag, buffer, io) in self.queued.drain(..) {
            if self.life.step() {
                let (buffers, done) = (self.buffers.clone(), self.done.clone());
                self.medium.borrow_mut().in_flight.push(InFlight { tag, buffer, io, buffers, done });
            }
        }
    }
    fn completed(&mut self, into: &mut Completions) {
        into.append(&mut self.done.borrow_mut());
    }
    fn ready(&mut self) -> bool {
        !self.done.borrow().is_empty()
    }
    fn wait(&mut self, _events: &[BorrowedFd<'_>], _timeout: Option<Duration>) -> std::io::Result<()> {
        Ok(())
    }
    fn finish(&mut self) {}
}

/// Guest pages: one version each, by gref.
pub struct ModelPages {
    pub pages: Rc<RefCell<Vec<Version>>>,
    pub medium: Rc<RefCell<Medium>>,
    pub life: Rc<Life>,
    pub buffers: Buffers,
}

impl GuestPages for ModelPages {
    fn transfer(
        &mut self,
        direction: Direction,
        slots: &[Slot],
        requests: &[Prepared],
        _failed: &mut Vec<Slot>,
    ) {
        for slot in slots {
            let gref = requests[slot.0 as usize].segments[0].gref as usize;
            let page = requests[slot.0 as usize].buffer as usize / 4096;
            let mut buffers = self.buffers.borrow_mut();
            match direction {
                Direction::Fetch => buffers[page] = self.pages.borrow()[gref],
                Direction::Store if self.life.step() => self.pages.borrow_mut()[gref] = buffers[page],
                Direction::Store => {}
            }
        }
    }

    /// The page of request n has gref 1000 + n and names page n.
    fn indirect(&mut self, pages: &[IndirectPage], each: &mut dyn FnMut(Slot, Option<&[u8]>)) {
        for page in pages {
            let id = page.gref - 1000;
            let version = u64::from(id) + 1;
            assert!(
                self.life.death().is_some() || !self.medium.borrow().started.contains(&version),
                "segments were fetched again after the request ran"
            );
            assert_eq!(page.len, 8);
            let segment = BlkifRequestSegment::new(id, 0, 0);
            each(page.slot, Some(segment.as_bytes()));
        }
    }
}

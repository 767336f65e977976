//! The block journal's model test: the real engine, ring and journal between a model frontend and a model disk, killed at every
//! step. A step is each store to shared or journal memory and each operation handed to the disk; completions come in any
//! order. What a dead incarnation had handed over lands at any time until the fence, or never.
//!
//! At the end the power fails after each event that there was, and what was promised by flushes and barriers must be on the medium.
//! Checked all the time: each request gets exactly one response of its own kind; what was acknowledged is on the disk; nothing
//! stale ever lands over newer data; an acknowledged flush is durable; nothing overtakes a barrier; a poison request, and
//! no other, is answered with an error; nobody sleeps while there is work.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use std::os::fd::BorrowedFd;
use std::time::Duration;

use blkback::disk::attachment::{Completions, DiskQueue, DiskRequest, Geometry, Operation, Tag};
use blkback::engine::{Direction, Engine, GuestPages, IndirectPage};
use blkback::request::{BlkifFormat, Prepared};
use blkback::stats::Stats;
use domain_kit::journal::{JournaledRing, Shape, Slot};
use domain_kit::model::{Chooser, Death, DyingMem, Fate, Life};
use domain_kit::ring::{FrontRing, HeapMem, RingLayout};
use xen_abi::io::blkif::*;
use zerocopy::IntoBytes;

const SECTORS: u64 = 4;
const ABI: Abi = Abi::X86_64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Read(u64),
    Write(u64),
    Barrier(u64),
    Flush,
    /// A write that crashes the service when it runs.
    Poison(u64),
    /// A write whose segment lies in an indirect page.
    Indirect(u64),
}

impl Op {
    fn sector(self) -> u64 {
        match self {
            Op::Read(s) | Op::Write(s) | Op::Barrier(s) | Op::Poison(s) | Op::Indirect(s) => s,
            Op::Flush => 0,
        }
    }

    fn writes(self) -> bool {
        matches!(self, Op::Write(_) | Op::Barrier(_) | Op::Poison(_) | Op::Indirect(_))
    }

    /// The operation that its response must name.
    fn code(self) -> u8 {
        match self {
            Op::Read(_) => BLKIF_OP_READ,
            Op::Write(_) | Op::Poison(_) | Op::Indirect(_) => BLKIF_OP_WRITE,
            Op::Barrier(_) => BLKIF_OP_WRITE_BARRIER,
            Op::Flush => BLKIF_OP_FLUSH_DISKCACHE,
        }
    }
}

/// Sector contents are the version of what wrote them: the index of the operation + 1.
type Version = u64;

#[derive(Clone, Copy, Debug)]
enum Io {
    Read(u64),
    /// With FUA or without.
    Write(u64, bool),
    Flush,
}

type Buffers = Rc<RefCell<Vec<Version>>>;
type Done = Rc<RefCell<Completions>>;

#[derive(Debug)]
struct InFlight {
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
enum Event {
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
struct Medium {
    log: Vec<Event>,
    /// Versions that a disk operation was made for.
    started: BTreeSet<Version>,
    cache: Vec<Version>,
    durable: Vec<Version>,
    in_flight: Vec<InFlight>,
    landed: BTreeSet<Version>,
    script: Vec<Op>,
}

impl Medium {
    fn land(&mut self, which: usize) {
        let op = self.in_flight.remove(which);
        let i = op.buffer;
        match op.io {
            Io::Read(sector) => op.buffers.borrow_mut()[i] = self.cache[sector as usize],
            Io::Write(sector, fua) => {
                let version = op.buffers.borrow()[i];
                let old = std::mem::replace(&mut self.cache[sector as usize], version);
                assert!(version >= old, "version {version} landed over {old} in sector {sector}");
                self.check_barriers(version);
                self.landed.insert(version);
                self.log.push(Event::Landed { version, fua });
                if fua {
                    self.durable[sector as usize] = version;
                }
            }
            Io::Flush => {
                self.durable.clone_from(&self.cache);
                self.log.push(Event::Flushed);
            }
        }
        op.done.borrow_mut().push((op.tag, Ok(())));
    }

    fn check_barriers(&self, version: Version) {
        let landed =
            |i: usize| self.landed.contains(&(i as u64 + 1)) || matches!(self.script[i], Op::Poison(_));
        let me = version as usize - 1;
        for earlier in 0..me {
            let barrier_between = (earlier..=me).any(|i| matches!(self.script[i], Op::Barrier(_)));
            if barrier_between && self.script[earlier].writes() {
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
struct ModelDisk {
    medium: Rc<RefCell<Medium>>,
    life: Rc<Life>,
    buffers: Buffers,
    queued: Vec<(Tag, usize, Io)>,
    done: Done,
    poison: BTreeSet<Version>,
}

impl DiskQueue for ModelDisk {
    fn geometry(&self) -> Geometry {
        Geometry::plain(SECTORS, false)
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
            other => panic!("{other:?}"),
        };
        assert_eq!(request.len, if matches!(io, Io::Flush) { 0 } else { 512 });
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
struct ModelPages {
    pages: Rc<RefCell<Vec<Version>>>,
    medium: Rc<RefCell<Medium>>,
    life: Rc<Life>,
    buffers: Buffers,
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

type ModelEngine = Engine<DyingMem, DyingMem, ModelPages, ModelDisk>;

struct Pending {
    op: Op,
    /// What was acknowledged when it was issued.
    acked: Vec<Version>,
}

struct World {
    fate: Fate,
    fence: bool,
    eager: bool,
    layout: RingLayout,
    shape: Shape,
    ring: Rc<HeapMem>,
    journal: Rc<HeapMem>,
    medium: Rc<RefCell<Medium>>,
    pages: Rc<RefCell<Vec<Version>>>,
    script: Vec<Op>,
    // The frontend.
    front: FrontRing<Rc<HeapMem>>,
    next: usize,
    pending: BTreeMap<u64, Pending>,
    acked: Vec<Version>,
    front_event: bool,
    // The backend.
    life: Rc<Life>,
    engine: Option<ModelEngine>,
    done: Done,
    back_event: bool,
    more: bool,
    reattached: bool,
    own_faults: u32,
    kills: u32,
}

/// What a run was about, for the message of a failure.
#[derive(Clone, Debug)]
struct Config {
    ring: u32,
    script: Vec<Op>,
    kills: u32,
    fence: bool,
    /// The frontend does at once what it can: fewer interleavings, for larger scripts.
    eager: bool,
}

impl World {
    fn new(config: &Config, fate: Fate) -> Self {
        let pages = if config.ring > 32 { 2 } else { 1 };
        let layout = RingLayout::new(pages, ABI.entry_size(), ABI.response_size()).with_size(config.ring);
        let shape = JournaledRing::<DyingMem, DyingMem, BlkifFormat>::shape(&layout, 8, 0);
        let ring = Rc::new(HeapMem::new(layout.bytes()));
        let journal = Rc::new(HeapMem::new(shape.bytes()));
        let front = FrontRing::init(ring.clone(), layout);
        let zeros = vec![0; SECTORS as usize];
        let medium = Medium {
            cache: zeros.clone(),
            durable: zeros.clone(),
            script: config.script.clone(),
            ..Default::default()
        };
        // Connecting is not part of this model: the first incarnation begins with a journal.
        let plain =
            JournaledRing::create(ring.clone(), layout, journal.clone(), shape, [0; 6], BlkifFormat(ABI));
        drop(plain.expect("create"));
        let life = Life::new(&fate);
        life.crash();
        World {
            fence: config.fence,
            eager: config.eager,
            layout,
            shape,
            ring,
            journal,
            medium: Rc::new(RefCell::new(medium)),
            pages: Rc::new(RefCell::new(vec![0; config.script.len()])),
            script: config.script.clone(),
            front,
            next: 0,
            pending: BTreeMap::new(),
            acked: zeros,
            front_event: false,
            life,
            engine: None,
            done: Rc::default(),
            back_event: false,
            more: false,
            reattached: false,
            own_faults: 0,
            kills: 0,
            fate,
        }
    }

    /// Overlapping requests are only in flight together when a barrier orders them.
    fn may_issue(&self) -> bool {
        let Some(&op) = self.script.get(self.next) else { return false };
        if self.front.free() == 0 {
            return false;
        }
        let ordered = matches!(op, Op::Barrier(_));
        self.pending.iter().all(|(&id, other)| {
            let barrier_between =
                self.script[id as usize..self.next].iter().any(|o| matches!(o, Op::Barrier(_)));
            let overlap = op != Op::Flush
                && other.op != Op::Flush
                && op.sector() == other.op.sector()
                && (op.writes() || other.op.writes());
            !overlap || ordered || barrier_between
        })
    }

    fn issue(&mut self) {
        let op = self.script[self.next];
        let id = self.next as u64;
        self.pages.borrow_mut()[self.next] = if op.writes() { id + 1 } else { u64::MAX };
        let (operation, sector_number) = (op.code(), op.sector());
        let request = if matches!(op, Op::Indirect(_)) {
            let mut request = BlkifRequestIndirect {
                operation: BLKIF_OP_INDIRECT,
                indirect_op: operation,
                nr_segments: 1,
                id,
                sector_number,
                ..Default::default()
            };
            request.indirect_grefs[0] = 1000 + id as u32;
            Request::Indirect(request)
        } else {
            let mut request = BlkifRequest { operation, id, sector_number, ..Default::default() };
            if op != Op::Flush {
                request.nr_segments = 1;
                request.seg[0] = BlkifRequestSegment::new(id as u32, 0, 0);
            }
            Request::Direct(request)
        };
        self.front.put(&ABI.encode(&request)[..ABI.entry_size()]);
        self.medium.borrow_mut().log.push(Event::Issued(id));
        self.pending.insert(id, Pending { op, acked: self.acked.clone() });
        self.next += 1;
        if self.front.push() {
            self.back_event = true;
        }
    }

    fn consume(&mut self) {
        self.front_event = false;
        loop {
            for _ in 0..self.front.unconsumed().expect("honest backend") {
                let mut bytes = [0; 16];
                self.front.take(&mut bytes);
                let response = ABI.decode_response(&bytes);
                let pending =
                    self.pending.remove(&response.id).expect("a response to nothing that is pending");
                assert_eq!(response.operation, pending.op.code(), "another operation's response");
                self.judge(response.id, &pending, response.status);
                self.medium.borrow_mut().log.push(Event::Acked(response.id));
            }
            if !self.front.final_check().expect("honest backend") {
                return;
            }
        }
    }

    fn judge(&mut self, id: u64, pending: &Pending, status: i16) {
        let medium = self.medium.borrow();
        let sector = pending.op.sector() as usize;
        match pending.op {
            Op::Poison(_) => {
                assert_eq!(status, BLKIF_RSP_ERROR, "poison");
                return;
            }
            op => assert_eq!(status, BLKIF_RSP_OKAY, "{op:?} failed"),
        }
        match pending.op {
            Op::Read(_) => {
                let read = self.pages.borrow()[id as usize];
                assert!(
                    read >= pending.acked[sector] && read <= id,
                    "read {read}, acked {}",
                    pending.acked[sector]
                );
            }
            Op::Flush => {
                for (durable, acked) in medium.durable.iter().zip(&pending.acked) {
                    assert!(durable >= acked, "flushed, but not durable: {durable} < {acked}");
                }
            }
            _ => {
                assert!(medium.cache[sector] > id, "acknowledged, but not on the disk");
                self.acked[sector] = self.acked[sector].max(id + 1);
                if matches!(pending.op, Op::Barrier(_)) {
                    assert!(medium.durable[sector] > id, "a barrier that is not durable");
                }
            }
        }
    }

    fn buffers(&self) -> Buffers {
        Rc::new(RefCell::new(vec![0; self.layout.size as usize]))
    }

    fn restart(&mut self) {
        let own_fault = self.life.death() == Some(Death::OwnFault) && self.own_faults + self.kills > 0;
        self.life = Life::new(&self.fate);
        // The fence: what the dead one handed over has landed or never will.
        if self.fence {
            while !self.medium.borrow().in_flight.is_empty() {
                if self.fate.choose(2) == 0 {
                    self.medium.borrow_mut().land(0);
                } else {
                    self.medium.borrow_mut().in_flight.remove(0);
                }
            }
        }
        let memory = |mem| DyingMem::new(mem, &self.life);
        let (ring, unanswered) = JournaledRing::reattach(
            memory(&self.ring),
            self.layout,
            memory(&self.journal),
            self.shape,
            BlkifFormat(ABI),
            own_fault,
        )
        .expect("a sound journal");
        let buffers = self.buffers();
        self.done = Rc::default();
        let guest = ModelPages {
            pages: self.pages.clone(),
            medium: self.medium.clone(),
            life: self.life.clone(),
            buffers: buffers.clone(),
        };
        let disk = ModelDisk {
            medium: self.medium.clone(),
            life: self.life.clone(),
            buffers,
            queued: Vec::new(),
            done: self.done.clone(),
            poison: self.poison(),
        };
        self.engine = Some(Engine::new(ring, ABI, unanswered, guest, disk, Arc::new(Stats::default())));
        self.more = true;
        self.reattached = true;
        self.bury();
    }

    fn poison(&self) -> BTreeSet<Version> {
        let poison = |(i, op): (usize, &Op)| matches!(op, Op::Poison(_)).then_some(i as u64 + 1);
        self.script.iter().enumerate().filter_map(poison).collect()
    }

    fn run_engine(&mut self) {
        let Some(engine) = &mut self.engine else { return };
        self.back_event = false;
        let polled = engine.poll().expect("honest frontend");
        self.more = polled.more;
        if (polled.notify || std::mem::take(&mut self.reattached)) && self.life.step() {
            self.front_event = true;
        }
        self.bury();
    }

    fn bury(&mut self) {
        if let Some(death) = self.life.death() {
            self.engine = None;
            match death {
                Death::Killed => self.kills += 1,
                Death::OwnFault => self.own_faults += 1,
            }
        }
    }

    /// The power fails after each event: of what had landed, the medium has what was flushed or written with FUA, and of the rest
    /// anything. What the guest was promised by then must be there.
    fn check_power_cuts(&self) {
        let medium = self.medium.borrow();
        let mut landed = BTreeSet::new();
        let mut on_medium = BTreeSet::new();
        let mut acked = BTreeSet::new();
        // What was acknowledged when each flush was issued.
        let mut before: BTreeMap<u64, BTreeSet<Version>> = BTreeMap::new();
        let mut promised: BTreeSet<Version> = BTreeSet::new();
        for event in &medium.log {
            match *event {
                Event::Landed { version, fua } => {
                    landed.insert(version);
                    if fua {
                        on_medium.insert(version);
                    }
                }
                Event::Flushed => on_medium.extend(&landed),
                Event::Issued(id) => {
                    before.insert(id, acked.clone());
                }
                Event::Acked(id) => {
                    let op = self.script[id as usize];
                    if op.writes() && !matches!(op, Op::Poison(_)) {
                        acked.insert(id + 1);
                    }
                    if matches!(op, Op::Flush | Op::Barrier(_)) {
                        promised.extend(&before[&id]);
                    }
                    if matches!(op, Op::Barrier(_)) {
                        promised.insert(id + 1);
                    }
                }
            }
            let lost: Vec<_> = promised.difference(&on_medium).collect();
            assert!(lost.is_empty(), "a power failure after {event:?} loses {lost:?}, which were promised");
        }
    }

    /// Runs until nothing can happen any more.
    fn run(&mut self) {
        #[derive(Clone, Copy)]
        enum Actor {
            Issue,
            Consume,
            Engine,
            Restart,
            Land(usize),
        }
        loop {
            if self.eager && self.may_issue() {
                self.issue();
                continue;
            }
            if self.eager && self.front_event {
                self.consume();
                continue;
            }
            let mut actors = Vec::new();
            if self.engine.is_none() {
                actors.push(Actor::Restart);
            } else if self.back_event || self.more || !self.done.borrow().is_empty() {
                actors.push(Actor::Engine);
            }
            if self.may_issue() {
                actors.push(Actor::Issue);
            }
            if self.front_event {
                actors.push(Actor::Consume);
            }
            // With a fence, what is in limbo lands during the fence: the choice is made there.
            if self.engine.is_some() || !self.fence {
                actors.extend((0..self.medium.borrow().in_flight.len()).map(Actor::Land));
            }
            if actors.is_empty() {
                break;
            }
            match actors[self.fate.choose(actors.len() as u32) as usize] {
                Actor::Issue => self.issue(),
                Actor::Consume => self.consume(),
                Actor::Engine => self.run_engine(),
                Actor::Restart => self.restart(),
                Actor::Land(i) => self.medium.borrow_mut().land(i),
            }
        }
        assert_eq!(self.next, self.script.len(), "stuck: requests could not be issued");
        assert!(self.pending.is_empty(), "a response is missing");
        let medium = self.medium.borrow();
        for (now, acked) in medium.cache.iter().zip(&self.acked) {
            assert!(now >= acked, "an acknowledged write was lost");
        }
        drop(medium);
        self.check_power_cuts();
        let poisons = self.script.iter().filter(|op| matches!(op, Op::Poison(_))).count() as u32;
        assert!(self.own_faults <= 3 * poisons + self.kills, "{} crashes", self.own_faults);
    }
}

#[derive(Debug, Default)]
struct Explored {
    runs: u64,
    steps: u64,
    kills: u64,
    crashes: u64,
}

fn explore(config: &Config, chooser: Chooser, limit: u64, explored: &mut Explored) -> bool {
    let chooser = Rc::new(RefCell::new(chooser));
    for _ in 0..limit {
        let fate = Fate::new(chooser.clone(), config.kills);
        let mut world = World::new(config, fate.clone());
        world.run();
        explored.runs += 1;
        explored.steps += fate.steps();
        explored.kills += u64::from(world.kills);
        explored.crashes += u64::from(world.own_faults);
        if !chooser.borrow_mut().advance() {
            return true;
        }
    }
    false
}

fn all(name: &str, ring: u32, kills: u32, eager: bool, script: &[Op]) {
    let config = Config { ring, script: script.to_vec(), kills, fence: true, eager };
    let mut explored = Explored::default();
    let complete = explore(&config, Chooser::exhaustive(), 6_000_000, &mut explored);
    println!("{name}: all of {explored:?}");
    assert!(complete, "{name}: too large to be explored exhaustively");
}

use Op::{Barrier, Flush, Indirect, Poison, Read, Write};

#[test]
fn exhaustive_one_write_killed_twice() {
    all("one write, two kills", 2, 2, false, &[Write(0)]);
}

#[test]
fn exhaustive_two_writes() {
    all("two writes", 2, 1, false, &[Write(0), Write(1)]);
}

#[test]
fn exhaustive_two_requests_killed_twice() {
    all("read beside a write, two kills", 2, 2, true, &[Write(0), Read(1)]);
}

#[test]
fn exhaustive_write_again() {
    all("the same sector again", 2, 2, true, &[Write(0), Write(0), Read(0)]);
}

#[test]
fn exhaustive_write_then_flush() {
    all("write and flush", 2, 2, true, &[Write(0), Flush]);
}

#[test]
fn exhaustive_barrier() {
    all("barrier between writes", 4, 2, true, &[Write(0), Barrier(0), Write(0)]);
}

#[test]
fn exhaustive_indirect_killed_twice() {
    all("an indirect write, two kills", 2, 2, true, &[Indirect(0)]);
}

#[test]
fn exhaustive_indirect_beside_a_write() {
    all("an indirect write beside a write", 2, 1, true, &[Indirect(0), Write(1)]);
}

#[test]
fn exhaustive_poison() {
    all("poison beside a write", 2, 1, false, &[Poison(1), Write(0)]);
}

fn random_script(seed: u64, len: usize) -> Vec<Op> {
    let mut chooser = Chooser::random(seed, 1);
    (0..len)
        .map(|_| {
            let sector = u64::from(chooser.choose(SECTORS as u32));
            match chooser.choose(40) {
                0..14 => Read(sector),
                14..23 => Write(sector),
                23..32 => Indirect(sector),
                32..35 => Barrier(sector),
                35..39 => Flush,
                _ => Poison(sector),
            }
        })
        .collect()
}

#[test]
fn random_long_runs() {
    let runs: u64 = std::env::var("BLKBACK_MODEL_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(1500);
    let mut explored = Explored::default();
    for seed in 0..runs {
        let ring = [2, 4, 8, 64][seed as usize % 4];
        let kill_odds = [12, 60, 300][seed as usize % 3];
        let config = Config { ring, script: random_script(seed, 60), kills: 25, fence: true, eager: false };
        explore(&config, Chooser::random(seed ^ 0x5eed, kill_odds), 1, &mut explored);
    }
    println!("{runs} random runs: {explored:?}");
    assert!(explored.kills > runs);
}

/// The model sees what the fence is for: without it an old write lands over newer data.
#[test]
fn without_the_fence_the_model_finds_stale_data() {
    let config = Config { ring: 2, script: vec![Write(0), Write(0)], kills: 1, fence: false, eager: false };
    let mut explored = Explored::default();
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let run = std::panic::AssertUnwindSafe(|| {
        explore(&config, Chooser::exhaustive(), 1_000_000, &mut explored);
    });
    let outcome = std::panic::catch_unwind(run);
    std::panic::set_hook(quiet);
    let message = outcome.expect_err("the model must see the missing fence");
    let message = message.downcast_ref::<String>().cloned().unwrap_or_default();
    println!("without a fence, found after {} runs: {message}", explored.runs);
    assert!(message.contains("landed over"), "{message}");
}

//! Rings of one device between a frontend, engines and the model's disk, under a scheduler.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use blkback::engine::Engine;
use blkback::engine::gate::{Gate, Seat, Wake};
use blkback::request::BlkifFormat;
use blkback::stats::Stats;
use domain_kit::journal::{JournaledRing, Shape};
use domain_kit::model::{Chooser, Death, DyingMem, Fate, Life};
use domain_kit::ring::{FrontRing, HeapMem, RingLayout};
use xen_abi::io::blkif::*;

use crate::medium::*;

const ABI: Abi = Abi::X86_64;

type ModelEngine = Engine<DyingMem, DyingMem, ModelPages, ModelDisk>;

struct Pending {
    op: Op,
    /// What was acknowledged when it was issued.
    acked: Vec<Version>,
}

/// One ring, both ends.
struct Queue {
    ring: Rc<HeapMem>,
    journal: Rc<HeapMem>,
    front: FrontRing<Rc<HeapMem>>,
    front_event: bool,
    back_event: bool,
    /// By another ring of the device.
    woken: Arc<AtomicBool>,
    engine: Option<ModelEngine>,
    done: Done,
    more: bool,
    reattached: bool,
}

impl Queue {
    fn new(layout: RingLayout, shape: Shape) -> Queue {
        let ring = Rc::new(HeapMem::new(layout.bytes()));
        let journal = Rc::new(HeapMem::new(shape.bytes()));
        let front = FrontRing::init(ring.clone(), layout);
        // Connecting is not part of this model: the first incarnation begins with a journal.
        let plain =
            JournaledRing::create(ring.clone(), layout, journal.clone(), shape, [0; 6], BlkifFormat(ABI));
        drop(plain.expect("create"));
        Queue {
            ring,
            journal,
            front,
            front_event: false,
            back_event: false,
            woken: Arc::default(),
            engine: None,
            done: Rc::default(),
            more: false,
            reattached: false,
        }
    }

    fn has_work(&self) -> bool {
        self.engine.is_some()
            && (self.back_event || self.more || self.woken.load(Relaxed) || !self.done.borrow().is_empty())
    }
}

pub struct World {
    fate: Fate,
    fence: bool,
    gate: bool,
    eager: bool,
    layout: RingLayout,
    shape: Shape,
    medium: Rc<RefCell<Medium>>,
    pages: Rc<RefCell<Vec<Version>>>,
    script: Vec<Step>,
    next: usize,
    pending: BTreeMap<u64, Pending>,
    acked: Vec<Version>,
    life: Rc<Life>,
    queues: Vec<Queue>,
    pub own_faults: u32,
    pub kills: u32,
}

/// What a run was about, for the message of a failure.
#[derive(Clone, Debug)]
pub struct Config {
    /// Entries of each ring.
    pub ring: u32,
    pub queues: usize,
    pub script: Vec<Step>,
    pub kills: u32,
    pub fence: bool,
    /// The rings know of each other.
    pub gate: bool,
    /// The frontend does at once what it can: fewer interleavings, for larger scripts.
    pub eager: bool,
}

impl World {
    pub fn new(config: &Config, fate: Fate) -> Self {
        let pages = if config.ring > 32 { 2 } else { 1 };
        let layout = RingLayout::new(pages, ABI.entry_size(), ABI.response_size()).with_size(config.ring);
        let shape = JournaledRing::<DyingMem, DyingMem, BlkifFormat>::shape(&layout, 8, 0);
        let zeros = vec![0; SECTORS as usize];
        let medium = Medium {
            cache: zeros.clone(),
            durable: zeros.clone(),
            script: config.script.clone(),
            ..Default::default()
        };
        let life = Life::new(&fate);
        life.crash();
        World {
            fence: config.fence,
            gate: config.gate && config.queues > 1,
            eager: config.eager,
            layout,
            shape,
            medium: Rc::new(RefCell::new(medium)),
            pages: Rc::new(RefCell::new(vec![0; config.script.len()])),
            script: config.script.clone(),
            next: 0,
            pending: BTreeMap::new(),
            acked: zeros,
            life,
            queues: (0..config.queues).map(|_| Queue::new(layout, shape)).collect(),
            own_faults: 0,
            kills: 0,
            fate,
        }
    }

    /// Overlapping requests are only in flight together when a barrier orders them, on the ring that both are on.
    fn may_issue(&self) -> bool {
        let Some(&Step { queue, op }) = self.script.get(self.next) else { return false };
        if self.queues[queue].front.free() == 0 {
            return false;
        }
        self.pending.iter().all(|(&id, other)| {
            let here = self.script[id as usize].queue == queue;
            let ordered = here && matches!(op, Op::Barrier(_));
            let is_barrier = |s: &Step| s.queue == queue && matches!(s.op, Op::Barrier(_));
            let barrier_between = here && self.script[id as usize..self.next].iter().any(is_barrier);
            let overlap = op != Op::Flush
                && other.op != Op::Flush
                && op.sector() == other.op.sector()
                && (op.writes() || other.op.writes());
            !overlap || ordered || barrier_between
        })
    }

    fn issue(&mut self) {
        let Step { queue, op } = self.script[self.next];
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
        } else if matches!(op, Op::Discard(_)) {
            let nr_sectors = discard_sectors(id);
            Request::Discard(BlkifRequestDiscard {
                operation,
                id,
                sector_number,
                nr_sectors,
                ..Default::default()
            })
        } else {
            let mut request = BlkifRequest { operation, id, sector_number, ..Default::default() };
            if op != Op::Flush {
                request.nr_segments = 1;
                request.seg[0] = BlkifRequestSegment::new(id as u32, 0, 0);
            }
            Request::Direct(request)
        };
        self.queues[queue].front.put(&ABI.encode(&request)[..ABI.entry_size()]);
        self.medium.borrow_mut().log.push(Event::Issued(id));
        self.pending.insert(id, Pending { op, acked: self.acked.clone() });
        self.next += 1;
        if self.queues[queue].front.push() {
            self.queues[queue].back_event = true;
        }
    }

    fn consume(&mut self, queue: usize) {
        self.queues[queue].front_event = false;
        loop {
            for _ in 0..self.queues[queue].front.unconsumed().expect("honest backend") {
                let mut bytes = [0; 16];
                self.queues[queue].front.take(&mut bytes);
                let response = ABI.decode_response(&bytes);
                let pending =
                    self.pending.remove(&response.id).expect("a response to nothing that is pending");
                assert_eq!(self.script[response.id as usize].queue, queue, "another ring's response");
                assert_eq!(response.operation, pending.op.code(), "another operation's response");
                self.judge(response.id, &pending, response.status);
                self.medium.borrow_mut().log.push(Event::Acked(response.id));
            }
            if !self.queues[queue].front.final_check().expect("honest backend") {
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
                if matches!(pending.op, Op::Barrier(_) | Op::Fua(_)) {
                    assert!(medium.durable[sector] > id, "{:?} that is not durable", pending.op);
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
        let wake = |queue: &Queue| -> Wake {
            let woken = queue.woken.clone();
            Box::new(move || woken.store(true, Relaxed))
        };
        let gate = self.gate.then(|| Gate::new(self.queues.iter().map(wake).collect()));
        for number in 0..self.queues.len() {
            let queue = &self.queues[number];
            let memory = |mem| DyingMem::new(mem, &self.life);
            let (ring, unanswered) = JournaledRing::reattach(
                memory(&queue.ring),
                self.layout,
                memory(&queue.journal),
                self.shape,
                BlkifFormat(ABI),
                own_fault,
            )
            .expect("a sound journal");
            let buffers = self.buffers();
            let done = Done::default();
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
                done: done.clone(),
                poison: self.poison(),
            };
            let mut engine = Engine::new(ring, ABI, unanswered, guest, disk, Arc::new(Stats::default()));
            if let Some(gate) = &gate {
                engine.set_seat(Seat::new(gate.clone(), number as u32));
            }
            let queue = &mut self.queues[number];
            queue.engine = Some(engine);
            queue.done = done;
            queue.more = true;
            queue.reattached = true;
            if self.life.death().is_some() {
                break;
            }
        }
        self.bury();
    }

    fn poison(&self) -> BTreeSet<Version> {
        let poison = |(i, op): (usize, &Step)| matches!(op.op, Op::Poison(_)).then_some(i as u64 + 1);
        self.script.iter().enumerate().filter_map(poison).collect()
    }

    fn run_engine(&mut self, number: usize) {
        let queue = &mut self.queues[number];
        let Some(engine) = &mut queue.engine else { return };
        queue.back_event = false;
        queue.woken.store(false, Relaxed);
        let polled = engine.poll().expect("honest frontend");
        queue.more = polled.more;
        if (polled.notify || std::mem::take(&mut queue.reattached)) && self.life.step() {
            queue.front_event = true;
        }
        self.bury();
    }

    /// All rings of an incarnation die at the same instant.
    fn bury(&mut self) {
        if let Some(death) = self.life.death() {
            self.queues.iter_mut().for_each(|queue| queue.engine = None);
            match death {
                Death::Killed => self.kills += 1,
                Death::OwnFault => self.own_faults += 1,
            }
        }
    }

    fn alive(&self) -> bool {
        self.queues.iter().all(|queue| queue.engine.is_some())
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
                    let op = self.script[id as usize].op;
                    if op.writes() && !matches!(op, Op::Poison(_)) {
                        acked.insert(id + 1);
                    }
                    if matches!(op, Op::Flush | Op::Barrier(_) | Op::Fua(_)) {
                        promised.extend(&before[&id]);
                    }
                    if matches!(op, Op::Barrier(_) | Op::Fua(_)) {
                        promised.insert(id + 1);
                    }
                }
            }
            let lost: Vec<_> = promised.difference(&on_medium).collect();
            assert!(lost.is_empty(), "a power failure after {event:?} loses {lost:?}, which were promised");
        }
    }

    /// Runs until nothing can happen any more.
    pub fn run(&mut self) {
        #[derive(Clone, Copy)]
        enum Actor {
            Issue,
            Consume(usize),
            Engine(usize),
            Restart,
            Land(usize),
        }
        loop {
            if self.eager && self.may_issue() {
                self.issue();
                continue;
            }
            let told = (0..self.queues.len()).find(|q| self.queues[*q].front_event);
            if let Some(queue) = told.filter(|_| self.eager) {
                self.consume(queue);
                continue;
            }
            let mut actors = Vec::new();
            if !self.alive() {
                actors.push(Actor::Restart);
            }
            let queues = || self.queues.iter().enumerate();
            actors.extend(queues().filter(|(_, q)| q.has_work()).map(|(i, _)| Actor::Engine(i)));
            if self.may_issue() {
                actors.push(Actor::Issue);
            }
            actors.extend(queues().filter(|(_, q)| q.front_event).map(|(i, _)| Actor::Consume(i)));
            // With a fence, what is in limbo lands during the fence: the choice is made there.
            if self.alive() || !self.fence {
                actors.extend((0..self.medium.borrow().in_flight.len()).map(Actor::Land));
            }
            if actors.is_empty() {
                break;
            }
            match actors[self.fate.choose(actors.len() as u32) as usize] {
                Actor::Issue => self.issue(),
                Actor::Consume(queue) => self.consume(queue),
                Actor::Engine(queue) => self.run_engine(queue),
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
        let poisons = self.script.iter().filter(|op| matches!(op.op, Op::Poison(_))).count() as u32;
        assert!(self.own_faults <= 3 * poisons + self.kills, "{} crashes", self.own_faults);
    }
}

#[derive(Debug, Default)]
pub struct Explored {
    pub runs: u64,
    pub steps: u64,
    pub kills: u64,
    pub crashes: u64,
}

pub fn explore(config: &Config, chooser: Chooser, limit: u64, explored: &mut Explored) -> bool {
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

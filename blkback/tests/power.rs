//! Power failures: the real engines work on a file under kills, and everything that reaches the medium is logged (writes, discards and
//! flushes, when handed over and when completed), with what the guest asked and was answered. Afterwards the power fails after
//! every entry of the log: what a flush or barrier promised must be there, whatever the medium did with what was not flushed
//! (nothing of it arrived, or any part of it).
//!
//! The medium is a disk with a volatile cache: a write may be on the medium from when it was handed over; it is for certain once it has
//! completed with FUA, or before a flush was handed over that has completed.

mod common;

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use blkback::disk::attachment::{Completions, DiskQueue, DiskRequest, Geometry, Operation, Tag};
use common::rig::{Front, Life, Ring, end};
use domain_kit::mem::SharedMem;
use frontends::blkfront::Op;
use frontends::blkfront::load::Rng;
use frontends::blkfront::queue::QueueShape;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use xen_abi::io::blkif::Abi;

/// Sectors of each ring's part of the disk.
const PART: u64 = 2048;
const RINGS: u64 = 3;
const DEPTH: usize = 24;
/// Entries of the log, and bytes of each: kind, a; b; c.
const ENTRIES: u32 = 1 << 19;
const ENTRY: usize = 24;
/// Where they begin; their number is before.
const FIRST: usize = 64;

/// What happened. Disk operations are named by the log entry that handed them over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// The guest put request `mark` on ring `ring`.
    Issued {
        ring: u32,
        mark: u64,
        what: Asked,
    },
    /// It has its answer.
    Answered {
        ring: u32,
        mark: u64,
    },
    /// A write is handed over.
    Write {
        first: u64,
        sectors: u64,
        version: u64,
        fua: bool,
    },
    Discard {
        first: u64,
        sectors: u64,
    },
    Flush,
    /// The operation has completed.
    Done {
        op: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Read,
    Change { first: u64, sectors: u64, barrier: bool },
    Flush,
}

/// The log, in memory that outlives the incarnations. An entry is there once its kind is, which is stored last.
struct Log(SharedMem);

impl Log {
    fn new() -> Log {
        Log(SharedMem::create("power-log", FIRST + ENTRIES as usize * ENTRY).unwrap().0)
    }

    fn len(&self) -> u32 {
        self.0.load_u32(0, Acquire).min(ENTRIES)
    }

    fn nearly_full(&self) -> bool {
        self.len() > ENTRIES - 4096
    }

    fn note(&self, event: Event) -> u32 {
        let mut index = self.0.load_u32(0, Acquire);
        while let Err(found) = self.0.cas_u32(0, index, index + 1) {
            index = found;
        }
        assert!(index < ENTRIES, "the log is full");
        let (kind, a, b, c) = match event {
            Event::Issued { ring, mark, what } => {
                let (kind, range) = match what {
                    Asked::Read => (1, 0),
                    Asked::Flush => (2, 0),
                    Asked::Change { first, sectors, barrier } => {
                        (if barrier { 4 } else { 3 }, first << 32 | sectors)
                    }
                };
                (kind, ring, mark, range)
            }
            Event::Answered { ring, mark } => (5, ring, mark, 0),
            Event::Write { first, sectors, version, fua } => {
                (6, u32::from(fua), version, first << 32 | sectors)
            }
            Event::Discard { first, sectors } => (7, 0, 0, first << 32 | sectors),
            Event::Flush => (8, 0, 0, 0),
            Event::Done { op } => (9, op, 0, 0),
        };
        let at = FIRST + index as usize * ENTRY;
        self.0.store_u32(at + 4, a, Release);
        self.0.store_u64(at + 8, b, Release);
        self.0.store_u64(at + 16, c, Release);
        self.0.store_u32(at, kind, Release);
        index
    }

    /// What is there at `index`; `None` if its writer was killed before it was.
    fn get(&self, index: u32) -> Option<Event> {
        let at = FIRST + index as usize * ENTRY;
        let kind = self.0.load_u32(at, Acquire);
        let (a, b, c) = (
            self.0.load_u32(at + 4, Acquire),
            self.0.load_u64(at + 8, Acquire),
            self.0.load_u64(at + 16, Acquire),
        );
        let (first, sectors) = (c >> 32, c & 0xffff_ffff);
        Some(match kind {
            0 => return None,
            1 => Event::Issued { ring: a, mark: b, what: Asked::Read },
            2 => Event::Issued { ring: a, mark: b, what: Asked::Flush },
            3 | 4 => {
                let what = Asked::Change { first, sectors, barrier: kind == 4 };
                Event::Issued { ring: a, mark: b, what }
            }
            5 => Event::Answered { ring: a, mark: b },
            6 => Event::Write { first, sectors, version: b, fua: a != 0 },
            7 => Event::Discard { first, sectors },
            8 => Event::Flush,
            9 => Event::Done { op: a },
            other => panic!("entry {index} is of kind {other}"),
        })
    }

    fn events(&self) -> Vec<Option<Event>> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }
}

/// Between engine and disk: notes what is handed over before it is, and completions after they came.
struct Logged {
    inner: Box<dyn DiskQueue + Send>,
    buffers: Arc<SharedMem>,
    log: Arc<Log>,
    /// Entry of each tag's operation.
    ops: HashMap<Tag, u32>,
}

impl DiskQueue for Logged {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }
    fn submit(&mut self, tag: Tag, request: &DiskRequest) {
        let (first, sectors) = (request.offset / 512, request.len / 512);
        let op = match request.operation {
            Operation::Read => None,
            Operation::Write { fua } => {
                let mut version = [0; 8];
                self.buffers.copy_out(request.buffer as usize, &mut version);
                let version = u64::from_le_bytes(version);
                Some(Event::Write { first, sectors, version, fua })
            }
            Operation::Flush => Some(Event::Flush),
            Operation::Discard { .. } | Operation::WriteZeroes => Some(Event::Discard { first, sectors }),
        };
        if let Some(op) = op {
            self.ops.insert(tag, self.log.note(op));
        }
        self.inner.submit(tag, request);
    }
    fn kick(&mut self) {
        self.inner.kick();
    }
    fn completed(&mut self, into: &mut Completions) {
        let before = into.len();
        self.inner.completed(into);
        for (tag, result) in &into[before..] {
            assert_eq!(*result, Ok(()));
            if let Some(op) = self.ops.remove(tag) {
                self.log.note(Event::Done { op });
            }
        }
    }
    fn ready(&mut self) -> bool {
        self.inner.ready()
    }
    fn wait(&mut self, events: &[BorrowedFd<'_>], timeout: Option<Duration>) -> std::io::Result<()> {
        self.inner.wait(events, timeout)
    }
    fn finish(&mut self) {
        self.inner.finish();
    }
}

/// A write or discard on its way to the medium. `mark` is the request that it is of: it names what its sectors have then.
#[derive(Clone, Copy, Debug)]
struct Change {
    first: u64,
    sectors: u64,
    mark: u64,
    fua: bool,
}

impl Change {
    fn range(&self) -> std::ops::Range<usize> {
        self.first as usize..(self.first + self.sectors) as usize
    }
}

/// Goes through a log and lets the power fail. All per sector, as marks of requests: they grow.
struct Replay {
    /// Last asked for.
    issued: Vec<u64>,
    /// Answered last.
    answered: Vec<u64>,
    /// Promised to survive.
    promised: Vec<u64>,
    /// On the medium for certain.
    certain: Vec<u64>,
    /// Handed over last.
    handed: Vec<u64>,
    requests: HashMap<(u32, u64), Asked>,
    /// What was answered when a flush or barrier was issued.
    before: HashMap<(u32, u64), Vec<u64>>,
    /// Handed over, in that order, and not certain.
    open: Vec<(u32, Change, bool)>,
    /// Completed changes when each flush was handed over.
    flushes: HashMap<u32, Vec<u32>>,
    flushed: u64,
    cuts: u64,
}

impl Replay {
    fn new() -> Replay {
        let zeros = vec![0; (RINGS * PART) as usize];
        Replay {
            issued: zeros.clone(),
            answered: zeros.clone(),
            promised: zeros.clone(),
            certain: zeros.clone(),
            handed: zeros,
            requests: HashMap::new(),
            before: HashMap::new(),
            open: Vec::new(),
            flushes: HashMap::new(),
            flushed: 0,
            cuts: 0,
        }
    }

    fn step(&mut self, index: u32, event: Event) -> Result<(), String> {
        match event {
            Event::Issued { ring, mark, what } => {
                if let Asked::Change { first, sectors, .. } = what {
                    self.issued[first as usize..(first + sectors) as usize].fill(mark);
                }
                if matches!(what, Asked::Flush | Asked::Change { barrier: true, .. }) {
                    self.before.insert((ring, mark), self.answered.clone());
                }
                self.requests.insert((ring, mark), what);
            }
            Event::Answered { ring, mark } => {
                let what = self.requests.remove(&(ring, mark)).ok_or("an answer to nothing")?;
                if let Some(before) = self.before.remove(&(ring, mark)) {
                    self.promised.iter_mut().zip(before).for_each(|(p, b)| *p = b.max(*p));
                }
                if let Asked::Change { first, sectors, barrier } = what {
                    let range = first as usize..(first + sectors) as usize;
                    if barrier {
                        self.promised[range.clone()].fill(mark);
                    }
                    self.answered[range].fill(mark);
                }
                // Promises grow at answers alone: a cut after any other entry loses no more than one here.
                self.cut_worst(index)?;
            }
            Event::Write { first, sectors, version, fua } => {
                let mark = self.hand_over(index, first, sectors, fua)?;
                if mark != version {
                    return Err(format!("entry {index}: version {version} is written for request {mark}"));
                }
            }
            Event::Discard { first, sectors } => drop(self.hand_over(index, first, sectors, false)?),
            Event::Flush => {
                let completed = self.open.iter().filter(|(.., done)| *done).map(|(op, ..)| *op).collect();
                self.flushes.insert(index, completed);
            }
            Event::Done { op } => {
                if let Some(completed) = self.flushes.remove(&op) {
                    self.flushed += 1;
                    completed.into_iter().for_each(|op| self.certain_now(op));
                } else if let Some(change) = self.open.iter_mut().find(|(o, ..)| *o == op) {
                    change.2 = true;
                    if change.1.fua {
                        self.certain_now(op);
                    }
                }
            }
        }
        Ok(())
    }

    fn hand_over(&mut self, op: u32, first: u64, sectors: u64, fua: bool) -> Result<u64, String> {
        let mark = self.issued[first as usize];
        let change = Change { first, sectors, mark, fua };
        for sector in change.range() {
            if self.issued[sector] != mark || self.handed[sector] > mark {
                return Err(format!(
                    "entry {op}: sector {sector} is written for request {mark}, after {} and with {} asked for",
                    self.handed[sector], self.issued[sector]
                ));
            }
            self.handed[sector] = mark;
        }
        self.open.push((op, change, false));
        Ok(mark)
    }

    fn certain_now(&mut self, op: u32) {
        let Some(i) = self.open.iter().position(|(o, ..)| *o == op) else { return };
        let (_, change, _) = self.open.remove(i);
        for sector in change.range() {
            self.certain[sector] = self.certain[sector].max(change.mark);
        }
    }

    /// The power fails here, and nothing arrived that was not certain.
    fn cut_worst(&mut self, index: u32) -> Result<(), String> {
        self.cuts += 1;
        self.judge(index, &self.certain)
    }

    /// The power fails here, and any part of what was handed over arrived; of what overlaps, the later over the earlier.
    fn cut_random(&mut self, index: u32, rng: &mut Rng) -> Result<(), String> {
        let mut medium = self.certain.clone();
        let likely = 1 + rng.below(9);
        for (_, change, _) in &self.open {
            for sector in change.range() {
                if rng.below(10) < likely {
                    medium[sector] = medium[sector].max(change.mark);
                }
            }
        }
        self.cuts += 1;
        self.judge(index, &medium)
    }

    fn judge(&self, index: u32, medium: &[u64]) -> Result<(), String> {
        for (sector, now) in medium.iter().enumerate() {
            let (least, most) = (self.promised[sector], self.issued[sector]);
            if *now < least || *now > most {
                return Err(format!(
                    "a power failure after entry {index}: sector {sector} has request {now}, and {least} to {most} may be there"
                ));
            }
        }
        Ok(())
    }
}

/// Lets the power fail everywhere; gives how often, and how many flushes there were.
fn replay(events: &[Option<Event>], seed: u64) -> Result<(u64, u64), String> {
    let mut replay = Replay::new();
    let mut rng = Rng::new(seed);
    for (index, event) in (0..).zip(events) {
        let Some(event) = event else { continue };
        replay.step(index, *event)?;
        if rng.below(50) == 0 {
            replay.cut_random(index, &mut rng)?;
        }
    }
    Ok((replay.cuts, replay.flushed))
}

fn issue(front: &mut Front, number: u32, ring: &Ring, log: &Log) {
    let Front { queue, load, .. } = front;
    let max_bytes = queue.max_bytes();
    load.issue(DEPTH, max_bytes, |op, mark| {
        if queue.submit(op, mark).is_err() {
            return false;
        }
        let what = match op {
            Op::Read { .. } => Asked::Read,
            Op::Flush => Asked::Flush,
            Op::Write { sector, data } => {
                Asked::Change { first: sector, sectors: data.len() as u64 / 512, barrier: false }
            }
            Op::Barrier { sector, data } => {
                Asked::Change { first: sector, sectors: data.len() as u64 / 512, barrier: true }
            }
            Op::Discard { sector, sectors } | Op::SecureDiscard { sector, sectors } => {
                Asked::Change { first: sector, sectors, barrier: false }
            }
        };
        // Before the backend can see it.
        log.note(Event::Issued { ring: number, mark, what });
        true
    });
    if queue.push() {
        ring.to_back.write(1).unwrap();
    }
}

fn take(rings: &[Ring], fronts: &mut [Front], log: &Log) {
    let mut fds: Vec<_> = rings.iter().map(|r| PollFd::new(r.to_front.as_fd(), PollFlags::POLLIN)).collect();
    assert!(poll(&mut fds, PollTimeout::from(10_000u16)).unwrap() > 0, "stuck");
    for (number, (ring, front)) in (0..).zip(rings.iter().zip(fronts)) {
        let _ = ring.to_front.read();
        let Front { queue, load, answered } = front;
        let taken = queue.take(|completion| {
            load.done(&completion);
            log.note(Event::Answered { ring: number, mark: completion.mark });
        });
        *answered += taken.expect("an honest backend") as u64;
    }
}

/// Runs a load for so many kills, or until the log is full.
fn logged(kills: u32, seed: u64) -> Vec<Option<Event>> {
    let shape = |abi, segments| QueueShape { abi, ring_pages: 2, depth: DEPTH, segments };
    let shapes = [shape(Abi::X86_64, 32), shape(Abi::X86_32, 16), shape(Abi::X86_64, 11)];
    let rings: Vec<Ring> = shapes.into_iter().map(Ring::new).collect();
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(RINGS * PART * 512).unwrap();
    let mut fronts = Front::of_all(&rings, PART, seed);
    let log = Arc::new(Log::new());
    let theirs = log.clone();
    let wrap = move |inner, buffers: &Arc<SharedMem>| -> Box<dyn DiskQueue + Send> {
        Box::new(Logged { inner, buffers: buffers.clone(), log: theirs.clone(), ops: HashMap::new() })
    };
    let life = || Life { wrap: &wrap, ..Life::of(disk.path()) };
    let mut rng = Rng::new(seed);
    let mut child = life().start(&rings);
    for _ in 0..kills {
        let until = Instant::now() + Duration::from_micros(rng.below(20_000));
        while Instant::now() < until && !log.nearly_full() {
            for (number, (front, ring)) in (0..).zip(fronts.iter_mut().zip(&rings)) {
                issue(front, number, ring, &log);
            }
            take(&rings, &mut fronts, &log);
        }
        if log.nearly_full() {
            break;
        }
        end(child);
        child = life().start(&rings);
    }
    while fronts.iter().any(|f| f.load.in_flight() > 0) {
        take(&rings, &mut fronts, &log);
    }
    end(child);
    log.events()
}

fn survives(kills: u32, seed: u64) {
    let events = logged(kills, seed);
    let (cuts, flushes) = replay(&events, seed).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    println!(
        "{kills} kills, {} entries, {flushes} flushes, {cuts} power failures: nothing promised is lost",
        events.len()
    );
    assert!(flushes > 0 && cuts > 0);
    // The replay can see a loss: a medium that forgets its flushes loses what was promised.
    let forgetful: Vec<Option<Event>> = events
        .iter()
        .map(|event| match event {
            Some(Event::Done { op }) if events[*op as usize] == Some(Event::Flush) => None,
            other => *other,
        })
        .collect();
    let loss = replay(&forgetful, seed).expect_err("flushes that do nothing must be noticed");
    assert!(loss.contains("a power failure after"), "{loss}");
}

#[test]
fn a_power_failure_anywhere_loses_nothing_promised() {
    survives(40, 1);
}

#[test]
#[ignore = "long: cargo xtask soak block"]
fn soak_block_power() {
    let rounds = if std::env::var_os("BH_SOAK").is_some() { 50 } else { 5 };
    (0..rounds).for_each(|seed| survives(100, 100 + seed));
}

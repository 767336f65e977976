//! blkback in the whole system, with every shape of connection: several queues, rings of several pages, indirect segments, both
//! ABIs, persistent grants or not, discards; reconnected, and killed under a verifying load.

mod common;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bulkhead_tests::system::System;
use common::*;
use domain_kit::xs::XsOps;
use frontends::blkfront::{self, BlkFront, Op, Options, Outcome, QueueShape};
use xen_abi::io::blkif::Abi;

/// Sectors of each queue's part of the disk.
const PART: u64 = 16 * 2048;

/// xorshift64.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What sector `sector` holds after write number `version`; 0: never written, or discarded.
fn fill(version: u64, sector: u64, into: &mut [u8]) {
    for chunk in into.chunks_exact_mut(16) {
        chunk[..8].copy_from_slice(&version.to_le_bytes());
        chunk[8..].copy_from_slice(&(if version == 0 { 0 } else { sector }).to_le_bytes());
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    Read,
    /// Version that the sectors have then.
    Now(u64),
    Nothing,
}

struct Pending {
    first: u64,
    sectors: u64,
    done: Done,
}

/// A verifying load on one queue, on its own part of the disk.
struct Load {
    front: BlkFront,
    start: u64,
    content: Vec<u64>,
    pending: HashMap<u64, Pending>,
    rng: Rng,
    next: u64,
    depth: usize,
    verified: u64,
}

impl Load {
    fn new(front: BlkFront, part: u64, depth: usize, seed: u64) -> Load {
        let content = vec![0; PART as usize];
        let rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Load { front, start: part * PART, content, pending: HashMap::new(), rng, next: 1, depth, verified: 0 }
    }

    fn issue(&mut self) {
        let mut tries = 0;
        while self.front.in_flight() < self.depth && self.front.free() > 0 && tries < 2 * self.depth {
            tries += 1;
            let most = self.front.max_bytes() as u64 / 512;
            let sectors = match self.rng.below(10) {
                0 => 1 + self.rng.below(most),
                1..4 => 1 + self.rng.below(88),
                _ => 1 + self.rng.below(8),
            };
            let first = self.rng.below(PART - sectors);
            let kind = self.rng.below(100);
            let data = !(94..97).contains(&kind);
            let overlaps = |p: &Pending| p.first < first + sectors && first < p.first + p.sectors;
            if data && self.pending.values().any(overlaps) {
                continue;
            }
            let version = self.next;
            let sector = self.start + first;
            let bytes = (sectors * 512) as usize;
            let mut buffer = vec![0; bytes];
            for (i, chunk) in (0..).zip(buffer.chunks_exact_mut(512)) {
                fill(version, sector + i, chunk);
            }
            let (op, done, sectors) = match kind {
                0..45 => (Op::Read { sector, len: bytes }, Done::Read, sectors),
                45..92 => (Op::Write { sector, data: &buffer }, Done::Now(version), sectors),
                92..94 => {
                    let cut = bytes.min(blkfront::MAX_BYTES);
                    (Op::Barrier { sector, data: &buffer[..cut] }, Done::Now(version), cut as u64 / 512)
                }
                94..97 => (Op::Flush, Done::Nothing, 0),
                _ => (Op::Discard { sector, sectors }, Done::Now(0), sectors),
            };
            self.front.submit(op, version).unwrap_or_else(|e| panic!("{e}"));
            self.pending.insert(version, Pending { first, sectors, done });
            self.next += 1;
        }
        self.front.push();
    }

    fn take(&mut self) {
        let Load { front, pending, content, start, verified, .. } = self;
        let taken = front.wait(Duration::from_secs(10), |completion| {
            let p = pending.remove(&completion.mark).expect("a response to nothing");
            assert_eq!(completion.outcome, Outcome::Done, "sector {} + {}", p.first, p.sectors);
            let range = p.first as usize..(p.first + p.sectors) as usize;
            match p.done {
                Done::Nothing => {}
                Done::Now(version) => content[range].fill(version),
                Done::Read => {
                    let mut bytes = vec![0; completion.read_len()];
                    completion.copy_read(&mut bytes);
                    let mut want = [0; 512];
                    for (i, got) in range.zip(bytes.chunks_exact(512)) {
                        fill(content[i], *start + i as u64, &mut want);
                        assert_eq!(got, want, "sector {} holds something else", *start + i as u64);
                        *verified += 512;
                    }
                }
            }
        });
        assert!(taken.unwrap_or_else(|e| panic!("{e}")) > 0 || self.pending.is_empty(), "no answer for 10 s");
    }

    fn run(&mut self, until: impl Fn() -> bool, progress: &AtomicU64) {
        while !until() {
            self.issue();
            self.take();
            progress.fetch_add(1, Relaxed);
        }
        while !self.pending.is_empty() {
            self.take();
        }
    }
}

/// Runs loads on all queues until `until`, and gives them back.
fn run_all(fronts: Vec<BlkFront>, depth: usize, seed: u64, meanwhile: impl FnOnce(&AtomicU64)) -> Vec<Load> {
    let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(fronts)
            .map(|(part, front)| {
                let (stop, progress) = (&stop, &progress);
                scope.spawn(move || {
                    let mut load = Load::new(front, part, depth, seed + part);
                    load.run(|| stop.load(Relaxed), progress);
                    load
                })
            })
            .collect();
        meanwhile(&progress);
        stop.store(true, Relaxed);
        threads.into_iter().map(|t| t.join().expect("a load failed")).collect()
    })
}

/// Every sector of the image is what the loads have left there.
fn compare(image: &std::path::Path, loads: &[Load]) {
    let file = std::fs::File::open(image).unwrap();
    let (mut got, mut want) = (vec![0; (PART * 512) as usize], [0; 512]);
    for load in loads {
        file.read_exact_at(&mut got, load.start * 512).unwrap();
        for (i, got) in (0..).zip(got.chunks_exact(512)) {
            fill(load.content[i as usize], load.start + i, &mut want);
            assert_eq!(got, want, "sector {} of the image", load.start + i);
        }
    }
}

fn zero(image: &std::path::Path) {
    let file = std::fs::File::options().write(true).open(image).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(0).unwrap();
    file.set_len(len).unwrap();
}

fn connect(system: &System, brain: &Brain, options: &Options) -> Vec<BlkFront> {
    let domid = brain.domain.domid();
    BlkFront::connect_with(&brain.domain.hv, &brain.xs, domid, XVDA, SOON, options)
        .unwrap_or_else(|e| panic!("{e}\n{}", system.log_tail(25)))
}

fn reconnect(system: &System, brain: &Brain) {
    blkfront::disconnect(&brain.xs, brain.domain.domid(), XVDA, SOON)
        .unwrap_or_else(|e| panic!("{e}\n{}", system.log_tail(25)));
}

#[test]
fn every_shape_of_connection() {
    let system = start();
    let image = image(&system, "disk", 4 * PART * 512);
    create(&system, &probe_file("shapes", Some(&image)));
    let brain = Brain::of(&system, "shapes");
    let shape = |abi, ring_pages, depth, segments| QueueShape { abi, ring_pages, depth, segments };
    let shapes = [
        Options::default(),
        Options { persistent: false, ..Options::default() },
        Options { queues: 4, shape: shape(Abi::X86_64, 1, 32, 256), ..Options::default() },
        Options { shape: shape(Abi::X86_32, 16, 400, 32), legacy_pages: true, ..Options::default() },
        Options { queues: 2, shape: shape(Abi::X86_32, 4, 64, 11), persistent: false, ..Options::default() },
        Options { queues: 3, shape: shape(Abi::X86_64, 2, 48, 64), persistent: false, ..Options::default() },
    ];
    for (seed, options) in (1..).zip(&shapes) {
        zero(&image);
        let fronts = connect(&system, &brain, options);
        assert_eq!(fronts.len(), options.queues as usize, "{options:?}");
        assert_eq!(fronts[0].max_bytes(), options.shape.segments * 4096);
        assert!(fronts[0].info().discard);
        let depth = options.shape.depth.min(128);
        let loads = run_all(fronts, depth, seed, |_| std::thread::sleep(Duration::from_millis(400)));
        let verified: u64 = loads.iter().map(|l| l.verified).sum();
        println!("{options:?}: {verified} bytes verified");
        assert!(verified > 0);
        reconnect(&system, &brain);
        compare(&image, &loads);
    }
}

/// Kills blkback so often at seeded moments, under a load on several queues with indirect requests.
fn killed(kills: u32, seed: u64) {
    let system = start();
    let image = image(&system, "disk", 4 * PART * 512);
    create(&system, &probe_file("killed", Some(&image)));
    let brain = Brain::of(&system, "killed");
    let shape = QueueShape { ring_pages: 2, depth: 40, segments: 64, ..QueueShape::default() };
    let fronts = connect(&system, &brain, &Options { queues: 3, shape, ..Options::default() });
    let blkback = blkback_of("killed");
    let mut rng = Rng(seed);
    let began = Instant::now();
    let mut pauses = Vec::new();
    let loads = run_all(fronts, 40, seed, |progress| {
        let mut last = 0;
        for _ in 0..kills {
            std::thread::sleep(Duration::from_micros(rng.below(20_000)));
            let mut pid = 0;
            until(&system, "blkback has a process", || {
                pid = system.services().ok().and_then(|s| s.get(&blkback).map(|s| s.pid)).unwrap_or(0);
                pid > 1 && pid != last
            });
            last = pid;
            let _gone_already =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            let (killed, before) = (Instant::now(), progress.load(Relaxed));
            until(&system, "the load goes on", || progress.load(Relaxed) > before + 3);
            pauses.push(killed.elapsed());
        }
    });
    let verified: u64 = loads.iter().map(|l| l.verified).sum();
    pauses.sort();
    println!(
        "{kills} kills in {:?}, {verified} bytes verified, pauses p50 {:?} max {:?}",
        began.elapsed(),
        pauses.get(pauses.len() / 2),
        pauses.last()
    );
    reconnect(&system, &brain);
    compare(&image, &loads);
}

#[test]
fn killed_under_load_on_several_queues() {
    killed(20, 1);
}

#[test]
#[ignore = "long: cargo xtask soak block"]
fn soak_block_system() {
    killed(if std::env::var_os("BH_SOAK").is_some() { 1000 } else { 50 }, 2);
}

/// A disk that grows under a running guest: the new size stands in the store, and the sectors can be used.
#[test]
fn a_disk_grows_under_a_running_guest() {
    let system = start();
    let image = image(&system, "disk", 1 << 20);
    create(&system, &probe_file("grows", Some(&image)));
    let brain = Brain::of(&system, "grows");
    let mut front = connect(&system, &brain, &Options::default()).remove(0);
    assert_eq!(front.info().sectors, 2048);
    let mut read = |sector| {
        front.submit(Op::Read { sector, len: 512 }, 0).unwrap();
        front.push();
        let mut outcome = None;
        front.wait(SOON, |c| outcome = Some(c.outcome)).unwrap();
        outcome.unwrap()
    };
    assert_eq!(read(2047), Outcome::Done);
    assert_eq!(read(2048), Outcome::Error);
    std::fs::File::options().write(true).open(&image).unwrap().set_len(2 << 20).unwrap();
    let domid = brain.domain.domid();
    let back = brain.xs.read_string(&format!("/local/domain/{domid}/device/vbd/{XVDA}/backend")).unwrap();
    until(&system, "the new size", || brain.xs.read_string(&format!("{back}/sectors")).unwrap() == "4096");
    assert_eq!(read(4095), Outcome::Done);
    assert_eq!(brain.xs.read_string(&format!("{back}/state")).unwrap(), "4");
}

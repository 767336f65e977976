//! blkback in the whole system, with every shape of connection: several queues, rings of several pages, indirect segments, both
//! ABIs, persistent grants or not, discards; reconnected, and killed under a verifying load.

mod common;

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bulkhead_tests::system::System;
use common::*;
use domain_kit::xs::XsOps;
use frontends::blkfront::load::{Load, Rng};
use frontends::blkfront::{self, BlkFront, Op, Options, Outcome, QueueShape};
use xen_abi::io::blkif::Abi;

/// Sectors of each queue's part of the disk.
const PART: u64 = 16 * 2048;

/// Keeps `depth` requests in flight until `until`, then drains.
fn run(front: &mut BlkFront, load: &mut Load, depth: usize, until: impl Fn() -> bool, progress: &AtomicU64) {
    loop {
        let over = until();
        if !over {
            let max_bytes = front.max_bytes();
            load.issue(depth, max_bytes, |op, mark| front.submit(op, mark).is_ok());
            front.push();
        } else if load.in_flight() == 0 {
            return;
        }
        let taken = front.wait(Duration::from_secs(10), |completion| load.done(&completion));
        assert!(taken.unwrap_or_else(|e| panic!("{e}")) > 0, "no answer for 10 s");
        progress.fetch_add(1, Relaxed);
    }
}

/// Runs loads on all queues until `until`, and gives them back.
fn run_all(fronts: Vec<BlkFront>, depth: usize, seed: u64, meanwhile: impl FnOnce(&AtomicU64)) -> Vec<Load> {
    let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(fronts)
            .map(|(part, mut front)| {
                let (stop, progress) = (&stop, &progress);
                scope.spawn(move || {
                    let mut load = Load::new(part * PART, PART, seed + part);
                    run(&mut front, &mut load, depth, || stop.load(Relaxed), progress);
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
    for load in loads {
        let (start, len) = load.part();
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, start).unwrap();
        load.check(0, &bytes);
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
        let verified: u64 = loads.iter().map(|l| l.verified()).sum();
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
    let mut rng = Rng::new(seed);
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
    let verified: u64 = loads.iter().map(|l| l.verified()).sum();
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

/// In the sandbox too: where the storage has direct I/O, the page cache is passed by.
#[test]
fn the_page_cache_is_passed_by() {
    let system = start();
    let image = image(&system, "disk", 1 << 20);
    let flags = nix::libc::O_DIRECT;
    let mut direct = std::fs::File::options();
    std::os::unix::fs::OpenOptionsExt::custom_flags(direct.read(true), flags);
    if let Err(error) = direct.open(&image) {
        return println!("the file system of temporary files has no direct I/O: {error}");
    }
    create(&system, &probe_file("direct", Some(&image)));
    let brain = Brain::of(&system, "direct");
    drop(connect(&system, &brain, &Options::default()));
    let pid = system.services().unwrap()[&blkback_of("direct")].pid;
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut disks = fds.flatten().filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|path| path == image));
    let fd = disks.next().expect("it has its disk open").file_name().into_string().unwrap();
    let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap();
    let open = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap();
    let open = i32::from_str_radix(open.trim(), 8).unwrap();
    assert_ne!(open & flags, 0, "{info}");
}

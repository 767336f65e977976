//! Real kills of the real data path: a child process runs engines, rings, journals and io_uring over shared memory, one thread a
//! ring; a parent is its frontend with a verifying load and kills it with SIGKILL at random moments. Three rings of two pages,
//! indirect requests, barriers, flushes, discards, queue depth up to 40. `BLKBACK_KILLS` sets the number (default 300) and
//! `BLKBACK_SEED` the seed; `cargo xtask soak block` does 10,000.

mod common;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::rig::{Front, Life, Ring, answered, end, take_all};
use frontends::blkfront::load::Rng;
use frontends::blkfront::queue::QueueShape;
use frontends::blkfront::{Op, Outcome};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use xen_abi::io::blkif::Abi;

/// Sectors of each ring's part of the disk.
const PART: u64 = 4096;
const POISON: u64 = 1000;
const DEPTH: usize = 40;

fn kills_lose_nothing_in(kills: u32, seed: u64) {
    let shape = |abi, segments| QueueShape { abi, ring_pages: 2, depth: DEPTH, segments };
    let shapes = [shape(Abi::X86_64, 64), shape(Abi::X86_32, 32), shape(Abi::X86_64, 11)];
    let rings: Vec<Ring> = shapes.into_iter().map(Ring::new).collect();
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(rings.len() as u64 * PART * 512).unwrap();
    let mut fronts = Front::of_all(&rings, PART, seed);
    let mut rng = Rng::new(seed);
    let mut child = Life::of(disk.path()).start(&rings);
    let mut pauses = Vec::new();
    for round in 0..=kills {
        let until = Instant::now() + Duration::from_micros(rng.below(6000));
        let depth = [1, 8, DEPTH][round as usize % 3];
        let seen = answered(&fronts);
        while Instant::now() < until || answered(&fronts) == seen {
            fronts.iter_mut().zip(&rings).for_each(|(front, ring)| front.issue(ring, depth));
            take_all(&rings, &mut fronts);
        }
        if round == kills {
            break;
        }
        fronts.iter_mut().zip(&rings).for_each(|(front, ring)| front.issue(ring, depth));
        let killed = Instant::now();
        end(child);
        child = Life::of(disk.path()).start(&rings);
        let before = answered(&fronts);
        while answered(&fronts) == before && fronts.iter().any(|f| f.load.in_flight() > 0) {
            take_all(&rings, &mut fronts);
        }
        pauses.push(killed.elapsed());
    }
    // Drain, then compare every sector with the file itself.
    while fronts.iter().any(|f| f.load.in_flight() > 0) {
        take_all(&rings, &mut fronts);
    }
    end(child);
    let bytes = std::fs::read(disk.path()).unwrap();
    for front in &fronts {
        let (start, len) = front.load.part();
        front.load.check(0, &bytes[start as usize..][..len]);
    }
    pauses.sort();
    println!(
        "seed {seed}: {kills} kills, {} requests answered, {} bytes verified, pause p50 {:?} p99 {:?} max {:?}",
        answered(&fronts),
        fronts.iter().map(|f| f.load.verified()).sum::<u64>(),
        pauses.get(pauses.len() / 2),
        pauses.get(pauses.len() * 99 / 100),
        pauses.last()
    );
}

#[test]
fn kills_lose_nothing() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    kills_lose_nothing_in(number("BLKBACK_KILLS").unwrap_or(300), number("BLKBACK_SEED").unwrap_or(1).into());
}

#[test]
#[ignore = "long: cargo xtask soak block"]
fn soak_block_kills() {
    let kills = if std::env::var_os("BH_SOAK").is_some() { 2500 } else { 250 };
    (7..11).for_each(|seed| kills_lose_nothing_in(kills, seed));
}

/// One ring has nothing but barriers, eight of them waiting at any time; the others are served all the same, in each life.
#[test]
fn a_stream_of_barriers_lets_the_others_take_turns_through_kills() {
    const KILLS: u32 = 40;
    let shape = QueueShape { ring_pages: 2, depth: DEPTH, ..QueueShape::default() };
    let rings: Vec<Ring> = (0..3).map(|_| Ring::new(shape)).collect();
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(rings.len() as u64 * PART * 512).unwrap();
    let mut barriers = rings[0].front();
    let mut fronts = Front::of_all(&rings, PART, 5).split_off(1);
    let (mut asked, mut answered) = (0u64, 0u64);
    let mut slowest = Duration::ZERO;
    let mut child = Life::of(disk.path()).start(&rings);
    for life in 0..=KILLS {
        let began = Instant::now();
        let before: Vec<u64> = std::iter::once(answered).chain(fronts.iter().map(|f| f.answered)).collect();
        loop {
            while asked < answered + 8 {
                let barrier = Op::Barrier { sector: asked % PART, data: &[asked as u8; 512] };
                barriers.submit(barrier, asked).unwrap();
                asked += 1;
            }
            if barriers.push() {
                rings[0].to_back.write(1).unwrap();
            }
            fronts.iter_mut().zip(&rings[1..]).for_each(|(front, ring)| front.issue(ring, 4));
            take_all(&rings[1..], &mut fronts);
            let _ = rings[0].to_front.read();
            answered += barriers.take(|c| assert_eq!(c.outcome, Outcome::Done)).unwrap() as u64;
            let now: Vec<u64> = std::iter::once(answered).chain(fronts.iter().map(|f| f.answered)).collect();
            if now.iter().zip(&before).all(|(now, before)| *now >= before + 8) {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(10), "life {life}: {before:?} became {now:?}");
        }
        slowest = slowest.max(began.elapsed());
        if life < KILLS {
            end(child);
            child = Life::of(disk.path()).start(&rings);
        }
    }
    end(child);
    println!(
        "{answered} barriers, {} others; a life's first 8 of each took {slowest:?} at most",
        common::rig::answered(&fronts)
    );
}

/// A request that makes the service crash is run three times, then answered with an error; all others are served.
#[test]
fn a_poison_request_is_given_up_after_three_crashes() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(PART * 512).unwrap();
    let rings = [Ring::new(QueueShape { depth: 8, ..QueueShape::default() })];
    let mut front = rings[0].front();
    for mark in 0..8u64 {
        let sector = if mark == 5 { POISON } else { mark };
        front.submit(Op::Write { sector, data: &[7; 512] }, mark).unwrap();
    }
    front.push();
    let mut crashes = 0;
    let mut own_fault = false;
    let mut outcomes = HashMap::new();
    while outcomes.len() < 8 {
        let child = Life { own_fault, poison: Some(POISON), ..Life::of(disk.path()) }.start(&rings);
        loop {
            let mut fds = [PollFd::new(rings[0].to_front.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(20u16)).unwrap();
            let _ = rings[0].to_front.read();
            front
                .take(|c| assert!(outcomes.insert(c.mark, c.outcome).is_none(), "answered twice"))
                .expect("an honest backend");
            if outcomes.len() == 8 {
                end(child);
                break;
            }
            if let WaitStatus::Signaled(_, signal, _) = waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap() {
                assert_eq!(signal, Signal::SIGABRT);
                crashes += 1;
                own_fault = true;
                break;
            }
        }
    }
    assert_eq!(crashes, 3);
    for (mark, outcome) in outcomes {
        assert_eq!(outcome, if mark == 5 { Outcome::Error } else { Outcome::Done }, "request {mark}");
    }
}

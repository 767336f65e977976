//! The block journal's model test: the real engines, rings and journals of one device between a model frontend and a model disk,
//! killed at every step. A step is each store to shared or journal memory and each operation handed to the disk; completions come in any
//! order. What a dead incarnation had handed over lands at any time until the fence, or never.
//!
//! At the end the power fails after each event that there was, and what was promised by flushes and barriers must be on the medium.
//! Checked all the time: each request gets exactly one response of its own kind; what was acknowledged is on the disk; nothing
//! stale ever lands over newer data; an acknowledged flush is durable; nothing overtakes a barrier; a poison request, and
//! no other, is answered with an error; nobody sleeps while there is work.

mod medium;
mod world;

use domain_kit::model::Chooser;
use medium::Op::{self, Barrier, Discard, Flush, Fua, Indirect, Poison, Read, Write};
use medium::{SECTORS, Step};
use world::{Config, Explored, explore};

fn all(name: &str, ring: u32, kills: u32, eager: bool, script: &[Op]) {
    let script: Vec<_> = script.iter().map(|op| (0, *op)).collect();
    all_of(name, 1, ring, kills, eager, &script);
}

fn steps(script: &[(usize, Op)]) -> Vec<Step> {
    script.iter().map(|&(queue, op)| Step { queue, op }).collect()
}

fn all_of(name: &str, queues: usize, ring: u32, kills: u32, eager: bool, script: &[(usize, Op)]) {
    let config = Config { ring, queues, script: steps(script), kills, fence: true, gate: true, eager };
    let mut explored = Explored::default();
    let complete = explore(&config, Chooser::exhaustive(), 6_000_000, &mut explored);
    println!("{name}: all of {explored:?}");
    assert!(complete, "{name}: too large to be explored exhaustively");
}

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

#[test]
fn exhaustive_discard_and_flush_with_data() {
    all("discard, then a write there, then FUA", 4, 1, true, &[Discard(0), Write(0), Fua(0)]);
}

/// Two rings: every interleaving without a kill, and many with up to two, from seeds: all of them are too many.
fn rings(name: &str, script: &[(usize, Op)]) {
    all_of(name, 2, 2, 0, true, script);
    let mut explored = Explored::default();
    for seed in 0..8000u64 {
        let (eager, kills) = (!seed.is_multiple_of(4), 1 + seed as u32 % 2);
        let config =
            Config { ring: 2, queues: 2, script: steps(script), kills, fence: true, gate: true, eager };
        explore(&config, Chooser::random(seed, 10 + seed as u32 % 60), 1, &mut explored);
    }
    println!("{name}, killed: {explored:?}");
    assert!(explored.kills > 4000);
}

/// A barrier on one ring waits for what runs on the other, and nothing slips in between its flush and its write.
#[test]
fn rings_barrier_beside_a_write() {
    rings("a write beside a barrier on another ring", &[(0, Write(0)), (1, Barrier(1))]);
    rings("barriers on two rings", &[(0, Barrier(0)), (1, Barrier(1))]);
}

#[test]
fn rings_flush_fua_and_discard() {
    rings("a flush beside a write", &[(0, Write(0)), (1, Flush)]);
    rings("FUA beside a barrier", &[(0, Fua(0)), (1, Barrier(1))]);
    rings("a discard beside a barrier", &[(0, Discard(0)), (1, Barrier(1))]);
}

/// A request that crashes the service is given up, and what ran on another ring at the same time is not blamed.
#[test]
fn rings_poison() {
    rings("poison beside a write on another ring", &[(0, Poison(1)), (1, Write(0))]);
}

fn random_script(seed: u64, queues: usize, len: usize) -> Vec<Step> {
    let mut chooser = Chooser::random(seed, 1);
    (0..len)
        .map(|_| {
            let queue = chooser.choose(queues as u32) as usize;
            let sector = u64::from(chooser.choose(SECTORS as u32));
            let op = match chooser.choose(48) {
                0..14 => Read(sector),
                14..23 => Write(sector),
                23..31 => Indirect(sector),
                31..36 => Barrier(sector),
                36..40 => Flush,
                40..43 => Fua(sector),
                43..47 => Discard(sector),
                _ => Poison(sector),
            };
            Step { queue, op }
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
        let queues = [1, 2, 3][seed as usize / 4 % 3];
        let script = random_script(seed, queues, 60);
        let config = Config { ring, queues, script, kills: 25, fence: true, gate: true, eager: false };
        explore(&config, Chooser::random(seed ^ 0x5eed, kill_odds), 1, &mut explored);
    }
    println!("{runs} random runs: {explored:?}");
    assert!(explored.kills > runs);
}

/// Explores until the model finds a fault; its message.
fn finds(config: &Config) -> String {
    let mut explored = Explored::default();
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let run = std::panic::AssertUnwindSafe(|| {
        explore(config, Chooser::exhaustive(), 1_000_000, &mut explored);
    });
    let outcome = std::panic::catch_unwind(run);
    std::panic::set_hook(quiet);
    let message = outcome.expect_err("the model must find it");
    let message = message.downcast_ref::<String>().cloned().unwrap_or_default();
    println!("found after {} runs: {message}", explored.runs);
    message
}

/// The model sees what the fence is for: without it an old write lands over newer data.
#[test]
fn without_the_fence_the_model_finds_stale_data() {
    let script = steps(&[(0, Write(0)), (0, Write(0))]);
    let config = Config { ring: 2, queues: 1, script, kills: 1, fence: false, gate: true, eager: false };
    let message = finds(&config);
    assert!(message.contains("landed over"), "{message}");
}

/// And what the gate is for: without it a write of another ring slips in between a barrier's flush and its data.
#[test]
fn without_the_gate_the_model_finds_a_torn_barrier() {
    let script = steps(&[(0, Write(0)), (1, Barrier(1))]);
    let config = Config { ring: 2, queues: 2, script, kills: 0, fence: true, gate: false, eager: false };
    let message = finds(&config);
    assert!(message.contains("the flush of them"), "{message}");
}

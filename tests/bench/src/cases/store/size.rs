//! What a large tree costs: filling, memory, removing it, starting again with it, and replacing the program under it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use domain_kit::xs::Op;

use super::arena::Arena;
use super::conn::{Conn, request};
use super::daemons::{Daemon, Who};
use super::turns::{Better, Results, Target, take_turns};
use crate::report::Line;
use crate::stats::Series;

/// Nodes of the lines about size.
const NODES: u32 = 100_000;
/// Nodes in a directory.
const IN_DIRECTORY: u32 = 1_000;
/// Rounds with daemons of their own.
const FRESH_ROUNDS: usize = 2;
/// Restarts and updates with a small and with a large tree.
const RESTARTS: [(u32, usize, f64); 2] = [(10_000, 9, 20.0), (1_000_000, 3, 200.0)];
/// Requests in flight while filling.
const DEPTH: u32 = 32;
/// How long an update may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Directories of 1,000 nodes of 16 bytes below /bench, so many nodes in all.
fn fill(socket: &std::path::Path, nodes: u32) -> Result<()> {
    Conn::connect(socket)?.pipeline(nodes, DEPTH, |n, out| {
        let path = format!("/bench/d{:04}/n{:03}\0", n / IN_DIRECTORY, n % IN_DIRECTORY);
        request(Op::Write, 0, &[path.as_bytes(), &[b'x'; 16]], out);
    })
}

/// Nodes a second, memory, and the time to remove them all.
pub fn size(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let results = take_turns(arena.rounds().min(FRESH_ROUNDS), &arena.daemons(), |who| {
        let daemon = arena.fresh(who)?;
        let before = daemon.resident()?;
        let start = Instant::now();
        fill(&daemon.socket, NODES)?;
        let filled = start.elapsed().as_secs_f64();
        let grown = daemon.resident()?.saturating_sub(before);
        let mut conn = Conn::connect(&daemon.socket)?;
        let start = Instant::now();
        conn.call(Op::Rm, 0, &[b"/bench\0"])?;
        Ok(vec![
            f64::from(NODES) / filled / 1e3,
            grown as f64 / f64::from(1 << 20),
            start.elapsed().as_secs_f64() * 1e3,
        ])
    })?;
    Ok(vec![
        results.line("memory of 100,000 nodes", "MiB", 1, Better::Lower, Target::AtMost(1.0, Who::C)),
        results.line("filling 100,000 nodes", "knodes/s", 0, Better::Higher, Target::Best(1.5)),
        results.line("removing 100,000 nodes", "ms", 2, Better::Lower, Target::Best(1.5)),
    ])
}

/// Time from SIGKILL until a new connection is answered from the whole tree. Debian's daemons have lost it then.
pub fn restart(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (nodes, rounds, limit) in RESTARTS {
        let mut daemon = arena.fresh(Who::Ours)?;
        fill(&daemon.socket, nodes)?;
        let mut times = Series::default();
        for round in 0..rounds.min(arena.rounds()) {
            // Some events since the last snapshot, as there always are.
            Conn::connect(&daemon.socket)?.write("/round", round.to_string().as_bytes())?;
            times.push(daemon.kill_and_restart(arena.settings)?.as_secs_f64() * 1e3);
            let last = format!("/bench/d{:04}/n999\0", nodes / IN_DIRECTORY - 1);
            let value = Conn::connect(&daemon.socket)?.call(Op::Read, 0, &[last.as_bytes()])?;
            ensure!(value == [b'x'; 16], "the tree is another after SIGKILL");
        }
        let name = format!("restart after SIGKILL, {} nodes", thousands(nodes));
        lines.push(Line {
            samples: times.len(),
            note: format!(
                "start of the process included; longest {:.1} ms; Debian's daemons lose the tree",
                times.percentile(1.0)
            ),
            ..Line::under(&name, "ms", times.median(), limit)
        });
    }
    Ok(lines)
}

fn thousands(n: u32) -> String {
    if n >= 1_000_000 { format!("{},000,000", n / 1_000_000) } else { format!("{},000", n / 1000) }
}

/// The longest time between two answers to a client that reads all the time, over an update to the same program.
fn longest_gap(arena: &Arena<'_>, daemon: &Daemon) -> Result<f64> {
    let program = daemon.program(arena.settings)?;
    let program = program.to_str().context("the program's path is no text")?;
    let (stop, begun) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut control = Conn::connect(&daemon.socket)?;
    let mut reader = Conn::connect(&daemon.socket)?;
    std::thread::scope(|scope| {
        let read = scope.spawn(|| -> Result<f64> {
            let mut longest: f64 = 0.0;
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                reader.call(Op::Read, 0, &[b"/bench/d0000/n000\0"])?;
                longest = longest.max(start.elapsed().as_secs_f64() * 1e3);
                begun.store(true, Ordering::Relaxed);
            }
            Ok(longest)
        });
        let update = update(&mut control, program, &begun);
        // Some more reads after it, so that a gap at its end counts.
        std::thread::sleep(Duration::from_millis(50));
        stop.store(true, Ordering::Relaxed);
        let longest = read.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        update.map(|()| longest)
    })
}

/// As xenstore-control does it: the program, then start, again while transactions are open.
fn update(control: &mut Conn, program: &str, begun: &AtomicBool) -> Result<()> {
    while !begun.load(Ordering::Relaxed) {
        std::thread::yield_now();
    }
    let said = |reply: Vec<u8>| String::from_utf8_lossy(&reply).trim_end_matches('\0').to_owned();
    let begin = ["live-update\0-f\0", program, "\0"].concat();
    let reply = said(control.call(Op::Control, 0, &[begin.as_bytes()])?);
    ensure!(reply == "OK", "live-update -f: {reply}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        match said(control.call(Op::Control, 0, &[b"live-update\0-s\0"])?).as_str() {
            "OK" => return Ok(()),
            "BUSY" if Instant::now() < deadline => {}
            other => bail!("live-update -s: {other}"),
        }
    }
}

/// Live updates with 10,000 nodes, all; with a million, ours.
pub fn live_update(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (nodes, rounds, limit) in RESTARTS {
        let whos = if nodes > NODES { vec![Who::Ours] } else { arena.daemons() };
        let mut daemons = Vec::new();
        let mut failed = Vec::new();
        for who in whos {
            match arena.fresh(who).and_then(|d| fill(&d.socket, nodes).map(|()| d)) {
                Ok(daemon) => daemons.push(daemon),
                Err(e) if who == Who::Ours => return Err(e),
                Err(e) => failed.push((who, format!("{e:#}"))),
            }
        }
        let running: Vec<Who> = daemons.iter().map(|d| d.who).collect();
        let name = format!("longest gap at live update, {} nodes", thousands(nodes));
        let results = take_turns(rounds.min(arena.rounds()), &running, |who| {
            let daemon = daemons.iter().find(|d| d.who == who).context("it runs")?;
            Ok(vec![longest_gap(arena, daemon)?])
        });
        let mut results: Results = match results {
            Ok(results) => results,
            Err(e) => {
                lines.push(Line::missing(
                    &name,
                    "ms",
                    &format!("< {limit} ms"),
                    &format!("not measured: {e:#}"),
                ));
                continue;
            }
        };
        failed.iter().for_each(|(who, why)| results.without(*who, why));
        lines.push(results.line(&name, "ms", 0, Better::Lower, Target::Under(limit)));
    }
    Ok(lines)
}

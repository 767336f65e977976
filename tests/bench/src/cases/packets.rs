//! Packets from guest to guest through netback, beside the machine's memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bulkhead_tests::system::{NETBACK, System};
use domain_kit::mem::SharedMem;
use serde_json::json;

use super::Settings;
use super::world::World;
use crate::peers::memory;
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;
use crate::wire::Remote;

/// Length of one turn.
const TURN: Duration = Duration::from_millis(400);
/// A large segment: 64 KiB of IP.
const LARGE: usize = 65_014;
const SMALL: usize = 64;
/// Packets per second and core that small ones are to reach, thousands.
const SMALL_GOAL: f64 = 1000.0;

/// Names, units and goals of the lines.
pub const LARGE_NAMES: &[(&str, &str, &str)] = &[
    ("net 64 KiB segments, guest to guest", "MiB/s", ">= 0.50 x memcpy, two copies"),
    ("net 64 KiB segments, per core of netback and hv-core", "MiB/s", ""),
];
/// The same of the small packets'.
pub const SMALL_NAMES: &[(&str, &str, &str)] = &[
    ("net 64-byte packets, guest to guest", "k/s", ""),
    ("net 64-byte packets, per core of netback and hv-core", "k/s", ">= 1000 k/s"),
    ("the same with 2 queues", "k/s", ">= 0.80 x one queue"),
    ("the same with 4 queues", "k/s", ">= 0.80 x one queue"),
    ("the same with 16 queues", "k/s", ">= 0.80 x one queue"),
];
/// What one queue does on a core, many must do too: then they scale as far as there are cores.
const QUEUES: [usize; 3] = [2, 4, 16];
const QUEUES_GOAL: f64 = 0.8;

/// Processor time of a process so far, seconds.
fn cpu_seconds(pid: i32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name, which can hold anything: the 14th and 15th field are the 12th and 13th from there.
    let rest = text.rsplit_once(')').context("/proc/PID/stat")?.1;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().filter_map(|&i| fields.get(i)?.parse::<u64>().ok()).sum();
    Ok(ticks as f64 / 100.0)
}

fn busy(system: &System) -> Result<f64> {
    let netback = system.services()?.get(NETBACK).context("no netback")?.pid;
    Ok(cpu_seconds(netback)? + cpu_seconds(system.hv_core_pid().cast_signed())?)
}

struct Pair<'a> {
    from: &'a mut Remote,
    to: &'a mut Remote,
    mac: serde_json::Value,
}

impl Pair<'_> {
    /// Both ends have so many queues.
    fn prepare(&mut self, queues: usize) -> Result<()> {
        self.to.call(&json!({"cmd": "packets_mac", "vif": 0, "queues": queues}))?;
        self.from.call(&json!({"cmd": "packets_mac", "vif": 1, "queues": queues}))?;
        Ok(())
    }

    /// Packets and bytes per second that arrive, by so many queues at each end.
    fn pump(&mut self, len: usize, queues: usize) -> Result<(f64, f64)> {
        let ms = TURN.as_millis() as u64;
        let send = json!({"cmd": "packets_send", "vif": 1, "to": self.mac, "len": len, "queues": queues, "ms": ms + 150});
        let take = json!({"cmd": "packets_take", "vif": 0, "queues": queues, "ms": ms});
        let Pair { from, to, .. } = self;
        let got = std::thread::scope(|scope| {
            let taker = scope.spawn(|| to.call(&take));
            std::thread::sleep(Duration::from_millis(20));
            let sent = from.call(&send);
            let got = taker.join().map_err(|_| anyhow::anyhow!("the taker panicked"))?;
            sent.and(got)
        })?;
        let number = |key: &str| got[key].as_f64().unwrap_or(0.0);
        let seconds = number("seconds");
        anyhow::ensure!(seconds > 0.0, "no packet came: {got}");
        Ok((number("packets") / seconds, number("bytes") / seconds))
    }
}

/// Bytes per second that go through two copies, as each byte of a packet does: out of one guest's pages, into another's.
fn two_copies() -> Result<f64> {
    const BYTES: usize = 4 << 20;
    const PIECE: usize = 64 << 10;
    let make = || Ok::<_, std::io::Error>(Arc::new(SharedMem::create("bench", BYTES)?.0));
    let (a, b, c) = (make()?, make()?, make()?);
    let (start, mut done) = (Instant::now(), 0usize);
    while start.elapsed() < TURN {
        let at = done % BYTES;
        memory::copy(&a, &b, at, PIECE);
        memory::copy(&b, &c, at, PIECE);
        done += PIECE;
    }
    Ok(done as f64 / start.elapsed().as_secs_f64())
}

/// The guests at both ends, connected.
fn pair<'a>(settings: &Settings, world: &'a mut World) -> Result<(&'a System, Pair<'a>)> {
    let World { system, guest, other, .. } = world;
    let to = match other {
        Some(to) => to,
        None => other.insert(World::second_guest(system, settings)?),
    };
    let mac = to.call(&json!({"cmd": "packets_mac", "vif": 0}))?["mac"].clone();
    guest.call(&json!({"cmd": "packets_mac", "vif": 1}))?;
    Ok((system, Pair { from: guest, to, mac }))
}

/// Large segments.
///
/// # Errors
/// What could not be set up or measured.
pub fn large(settings: &Settings, world: &mut World) -> Result<Vec<Line>> {
    let (system, mut pair) = pair(settings, world)?;
    const MIB: f64 = (1 << 20) as f64;
    let mut per_core = Series::default();
    let mut ours = || -> Result<f64> {
        let (before, start) = (busy(system)?, Instant::now());
        let rate = pair.pump(LARGE, 1)?.1 / MIB;
        let cores = (busy(system)? - before) / start.elapsed().as_secs_f64();
        per_core.push(rate / cores.max(0.01));
        Ok(rate)
    };
    let series = take_turns(
        settings.rounds,
        &mut [
            Contestant::new("netback", &mut ours),
            Contestant::new("memcpy, two copies", || Ok(two_copies()? / MIB)),
        ],
    )?;
    let [ours, limit]: [Series; 2] = series.try_into().ok().context("as many series as contestants")?;
    let goal = Goal::RatioAtLeast(0.5);
    let line = Line::beside(LARGE_NAMES[0].0, "MiB/s", &ours, ("memcpy, two copies", &limit), goal);
    let core = Line {
        name: LARGE_NAMES[1].0.into(),
        unit: "MiB/s".into(),
        ours: Some(per_core.median()),
        samples: per_core.len(),
        ..Line::default()
    };
    Ok(vec![line.note("no TCP in the guests; beside netback's two copies the guests copy once each"), core])
}

/// Small packets, with one queue and with several.
///
/// # Errors
/// What could not be set up or measured.
pub fn small(settings: &Settings, world: &mut World) -> Result<Vec<Line>> {
    let (system, mut pair) = pair(settings, world)?;
    let mut small = |queues: usize| -> Result<(Series, Series)> {
        let (mut rate, mut per_core) = (Series::default(), Series::default());
        for round in 0..=settings.rounds {
            // Connected anew, if the number of queues is another.
            pair.prepare(queues)?;
            let before = busy(system)?;
            let start = Instant::now();
            let packets = pair.pump(SMALL, queues)?.0;
            // Of the whole turn, whose edges are not counted.
            let cores = (busy(system)? - before) / start.elapsed().as_secs_f64();
            if round > 0 {
                rate.push(packets / 1e3);
                per_core.push(packets / 1e3 / cores.max(0.01));
            }
        }
        Ok((rate, per_core))
    };
    let (rate, per_core) = small(1)?;
    let line = |name: &str, series: &Series| Line {
        name: name.into(),
        unit: "k/s".into(),
        ours: Some(series.median()),
        samples: series.len(),
        ..Line::default()
    };
    let one = line(SMALL_NAMES[0].0, &rate)
        .note("sender, netback, hv-core and receiver share this machine's processors");
    let reached = per_core.median() >= SMALL_GOAL;
    let core = Line {
        limit: Some(SMALL_GOAL),
        goal: SMALL_NAMES[1].2.into(),
        met: Some(reached),
        ..line(SMALL_NAMES[1].0, &per_core)
    };
    let mut lines = vec![one, core];
    for (number, queues) in QUEUES.into_iter().enumerate() {
        let (name, unit, goal) = SMALL_NAMES[2 + number];
        let many = small(queues).map(|(rate, many)| {
            Line::beside(name, unit, &many, ("one queue", &per_core), Goal::RatioAtLeast(QUEUES_GOAL))
                .note(format!("{queues} queues at each end, a thread each; {:.0} k/s in all", rate.median()))
        });
        lines.push(many.unwrap_or_else(|e| Line::missing(name, unit, goal, &format!("not measured: {e:#}"))));
    }
    // As the others want it.
    pair.prepare(1)?;
    Ok(lines)
}

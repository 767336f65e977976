//! The pause that a guest sees when a service is killed with SIGKILL under light load.
//!
//! Light load: one request at a time, a new one a millisecond after the last was done. The pause is the longest that one took, from
//! the kill until the service has answered again, so it is at least the time that a request takes anyway.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::kills::Rng;
use bulkhead_tests::system::NETBACK;
use serde_json::json;
use workload::stall::StallMeter;

use super::world::World;
use super::{Settings, or_missing};
use crate::dom0::Dom0;
use crate::report::Line;
use crate::stats::Series;

/// Kills of each service.
const KILLS: usize = 30;
/// The goal, ms.
const LIMIT: f64 = 50.0;
/// Longest wait for a service to be back.
const BACK: Duration = Duration::from_secs(10);
/// Between two requests of the light load.
const BETWEEN: Duration = Duration::from_millis(1);

/// Who is killed, and whose pause is looked at.
const SERVICES: [(&str, Kind); 5] = [
    ("xenstored", Kind::Guest("store")),
    ("blkback", Kind::Guest("block")),
    ("netback", Kind::Guest("net")),
    ("console-backend", Kind::Guest("console")),
    ("dom0-supervisor", Kind::Toolstack),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A load in the guest.
    Guest(&'static str),
    /// A client of dom0's.
    Toolstack,
}

/// All lines of the case.
pub fn run(_settings: &Settings, world: &mut Result<World>) -> Vec<Line> {
    match world {
        Ok(world) => lines(world),
        Err(error) => {
            let why = format!("not measured: {error:#}");
            SERVICES.iter().map(|(service, _)| Line::missing(&name(service), "ms", GOAL, &why)).collect()
        }
    }
}

const GOAL: &str = "p99 < 50 ms";

fn name(service: &str) -> String {
    format!("pause after kill -9 of {service}")
}

fn lines(world: &mut World) -> Vec<Line> {
    let mut lines = Vec::new();
    for (service, kind) in SERVICES {
        let series = match kind {
            Kind::Guest(load) => guest_pauses(world, service, load, KILLS),
            Kind::Toolstack => toolstack_pauses(world, service),
        };
        lines.extend(or_missing(&[(&name(service), "ms", GOAL)], series.map(|s| vec![line(service, &s)])));
    }
    lines
}

fn line(service: &str, pauses: &Series) -> Line {
    let p99 = pauses.percentile(0.99);
    Line {
        ours: Some(pauses.median()),
        p99: Some(p99),
        goal: GOAL.into(),
        met: Some(p99 < LIMIT),
        ratio: Some(p99 / LIMIT),
        samples: pauses.len(),
        note: format!(
            "{} kills, longest {:.1} ms; ratio is p99 over limit",
            pauses.len(),
            pauses.percentile(1.0)
        ),
        ..Line::under(&name(service), "ms", f64::NAN, LIMIT)
    }
}

/// The name of the running service of that kind: a guest's private backend has one of its own.
fn find(world: &World, service: &str) -> Result<String> {
    let services = world.system.services()?;
    let exact = match service {
        "netback" => NETBACK,
        "dom0-supervisor" => "dom0",
        "console-backend" => "console",
        other => other,
    };
    let names: Vec<&String> = services.keys().collect();
    let found = services.keys().find(|n| *n == exact).or_else(|| {
        services.keys().find(|n| n.contains(service) || (service == "blkback" && n.contains("xvda")))
    });
    found.cloned().with_context(|| format!("no {service} among {names:?}"))
}

/// Pauses that a load in the guest sees when the service is killed so often, ms.
pub(super) fn guest_pauses(world: &mut World, service: &str, load: &str, kills: usize) -> Result<Series> {
    let victim = [find(world, service)?];
    world.guest.call(&json!({"cmd": "load", "kind": load, "on": true}))?;
    let take = json!({"cmd": "longest", "kind": load});
    let mut rng = Rng::new(1);
    let mut pauses = Series::default();
    for _ in 0..kills {
        thread::sleep(rng.between(Duration::from_millis(50), Duration::from_millis(150)));
        let before = world.guest.call(&take)?;
        let done = before["done"].as_u64().unwrap_or(0);
        let victims = world.system.kill(&victim)?;
        world.system.wait_restarted(&victims, BACK)?;
        // Until requests go through again: at least two after the pause.
        let mut longest: f64 = 0.0;
        let deadline = Instant::now() + BACK;
        let mut settled = None;
        loop {
            thread::sleep(Duration::from_millis(20));
            let now = world.guest.call(&take)?;
            longest = longest.max(now["ms"].as_f64().unwrap_or(0.0));
            let moved = now["done"].as_u64().unwrap_or(0);
            match settled {
                Some(at) if moved >= at + 10 => break,
                None if moved > done => settled = Some(moved),
                _ => {}
            }
            ensure!(Instant::now() < deadline, "no request went through after kill of {service}");
        }
        pauses.push(longest);
    }
    world.guest.call(&json!({"cmd": "load", "kind": load, "on": false}))?;
    Ok(pauses)
}

fn toolstack_pauses(world: &World, service: &str) -> Result<Series> {
    let victim = [find(world, service)?];
    let meter = Arc::new(StallMeter::new(1));
    let stop = Arc::new(AtomicBool::new(false));
    let socket = world.system.socket();
    let load = {
        let (meter, stop) = (meter.clone(), stop.clone());
        thread::spawn(move || -> Result<()> {
            let dom0 = Dom0::new(&socket)?;
            while !stop.load(Ordering::Relaxed) {
                // Asked again until answered: a client of dom0's does so too.
                meter.measure(0, || while dom0.ping().is_err() && !stop.load(Ordering::Relaxed) {});
                thread::sleep(BETWEEN);
            }
            Ok(())
        })
    };
    let mut rng = Rng::new(2);
    let mut pauses = Series::default();
    let result = (0..KILLS).try_for_each(|_| {
        thread::sleep(rng.between(Duration::from_millis(50), Duration::from_millis(150)));
        // `services` asks dom0 itself: before the kill, so that it does not wait.
        let services = world.system.services()?;
        let pid = services.get(&victim[0]).context("dom0 is not in its own list")?.pid;
        meter.take();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
        let victims = [services[&victim[0]].clone()];
        world.system.wait_restarted(&victims, BACK)?;
        pauses.push(meter.take().as_secs_f64() * 1e3);
        anyhow::Ok(())
    });
    stop.store(true, Ordering::Relaxed);
    load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
    result.map(|()| pauses)
}

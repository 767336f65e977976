//! What a SIGKILL of blkback costs its guest at queue depth 32: the longest time without an answer, less the drain of what the dead
//! process had in flight, which blkback measures itself and which is a line of its own.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::kills::Rng;
use serde_json::json;

use crate::cases::world::World;
use crate::report::Line;
use crate::stats::Series;

/// Kills.
const KILLS: usize = 100;
/// The goal, ms.
const LIMIT: f64 = 20.0;
/// Longest wait for the service to be back.
const BACK: Duration = Duration::from_secs(10);

/// The lines.
pub fn lines(world: &mut World) -> Result<Vec<Line>> {
    // Connected at first use.
    world.guest.call(&json!({"cmd": "load", "kind": "block-deep", "on": true}))?;
    let result = kills(world);
    world.guest.call(&json!({"cmd": "load", "kind": "block-deep", "on": false}))?;
    let (pauses, drains) = result?;
    let beyond = pauses.differences(&drains);
    let p99 = beyond.percentile(0.99);
    let name = "block: pause after SIGKILL at depth 32, beyond the drain";
    let of = |series: &Series| Line {
        ours: Some(series.median()),
        p99: Some(series.percentile(0.99)),
        samples: series.len(),
        note: format!("{} kills, longest {:.1} ms", series.len(), series.percentile(1.0)),
        ..Line::default()
    };
    Ok(vec![
        Line {
            name: name.into(),
            unit: "ms".into(),
            limit: Some(LIMIT),
            goal: "p99 < 20 ms".into(),
            met: Some(p99 < LIMIT),
            ratio: Some(p99 / LIMIT),
            ..of(&beyond)
        },
        Line { name: "- drain of what was in flight".into(), unit: "ms".into(), ..of(&drains) },
        Line { name: "- pause and drain together".into(), unit: "ms".into(), ..of(&pauses) },
    ])
}

/// Pauses and drains in milliseconds, kill by kill.
fn kills(world: &mut World) -> Result<(Series, Series)> {
    let take = json!({"cmd": "longest", "kind": "block-deep"});
    let (mut pauses, mut drains) = (Series::default(), Series::default());
    let mut rng = Rng::new(3);
    let pid = |world: &World| super::backend(world).map(|(pid, _)| pid);
    let mut victim = pid(world)?;
    for _ in 0..KILLS {
        thread::sleep(rng.between(Duration::from_millis(50), Duration::from_millis(150)));
        let before = world.guest.call(&take)?["done"].as_u64().unwrap_or(0);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim), nix::sys::signal::Signal::SIGKILL)?;
        let deadline = Instant::now() + BACK;
        // At least so many answers after the pause; some may still have come from the dead.
        let mut longest: f64 = 0.0;
        loop {
            thread::sleep(Duration::from_millis(20));
            let now = world.guest.call(&take)?;
            longest = longest.max(now["ms"].as_f64().unwrap_or(0.0));
            if now["done"].as_u64().unwrap_or(0) >= before + 40 && pid(world).is_ok_and(|p| p != victim) {
                break;
            }
            ensure!(Instant::now() < deadline, "no request went through after the kill");
        }
        victim = pid(world)?;
        let drain = drain_us(world, victim)?;
        pauses.push(longest);
        drains.push(drain as f64 / 1e3);
    }
    Ok((pauses, drains))
}

/// What blkback says of the time until its predecessor's lock was gone, microseconds.
fn drain_us(world: &World, pid: i32) -> Result<u64> {
    let json = world.system.bh_json(&["services"])?;
    let rows = json["services"].as_array().or(json.as_array()).context("bh services --json: no list")?;
    let row = rows.iter().find(|r| r["host_pid"] == pid).context("blkback is not in the list")?;
    let counters = row["counters"].as_array().context("no counters")?;
    let drain = counters.iter().find(|c| c["name"] == "drain").context("blkback does not tell its drain")?;
    drain["value"].as_u64().context("drain is no number")
}

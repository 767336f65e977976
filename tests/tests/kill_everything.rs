//! The real system with a process guest under verified load, every component killed at random: nothing may be lost.
//! `cargo xtask soak process` runs the same with the full count.

use std::time::Duration;

use bulkhead_tests::load_run::{Guest, Quiet, Run, run};
use bulkhead_tests::system::Config;

#[test]
fn nothing_is_lost_when_everything_is_killed() {
    let plan = Run { guest: Guest::Process, kills: 60, duration: Duration::ZERO, seed: 2 };
    let outcome = run(&plan, Config::of_this_build().unwrap(), &Quiet).unwrap_or_else(|e| panic!("{e:#}"));
    let problems = outcome.problems();
    assert!(problems.is_empty(), "{}\n{}", problems.join("\n"), outcome.evidence);
    let kills: usize = outcome.rows.iter().map(|(_, s)| s.count).sum();
    assert_eq!(kills, 60);
}

/// The full count; `cargo xtask soak process`.
#[test]
#[ignore = "cargo xtask soak"]
fn soak_process_guest() {
    let kills = if std::env::var_os("BH_SOAK").is_some() { 2000 } else { 300 };
    let plan = Run { guest: Guest::Process, kills, duration: Duration::ZERO, seed: 3 };
    let outcome = run(&plan, Config::of_this_build().unwrap(), &Quiet).unwrap_or_else(|e| panic!("{e:#}"));
    println!("{:#}", outcome.json());
    let problems = outcome.problems();
    assert!(problems.is_empty(), "{}\n{}", problems.join("\n"), outcome.evidence);
}

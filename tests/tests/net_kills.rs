//! netback alone, killed over and over under checked TCP streams and pings: two guests with two queues each, TCP of both with
//! the outside, pings of one with the other through the switch. `cargo xtask soak net` is the same with the full count.

mod common;

use std::time::{Duration, Instant};

use bulkhead_tests::kills::Rng;
use bulkhead_tests::load_run::{PEER_PORT, Peer};
use bulkhead_tests::outcome::totals;
use bulkhead_tests::outside::{ADDRESS, PREFIX};
use bulkhead_tests::progress::{Progress, Seen};
use common::*;
use serde_json::Value;

const IPS: [&str; 2] = ["10.77.0.2", "10.77.0.3"];
/// How many kills may go by before it is looked whether the guests have gone on.
const LOOK: usize = 10;

fn file(n: usize, seed: u64) -> String {
    format!(
        "name = \"net{n}\"\ntype = \"process\"\nprogram = \"{}\"\n\
         args = [\"--ip\", \"{}/{PREFIX}\", \"--peer\", \"{ADDRESS}:{PEER_PORT}\", \"--ping\", \"{}\", \"--queues\", \"2\", \
         \"--work\", \"tcp,ping\", \"--rate\", \"2000000\", \"--ping-ms\", \"20\", \"--interval-ms\", \"100\", \"--seed\", \"{}\"]\n\
         [[vif]]\nbackend = \"{}\"\nip = [\"{}\"]\n",
        program("process-guest").display(),
        IPS[n],
        IPS[1 - n],
        seed + n as u64,
        netback(),
        IPS[n],
    )
}

fn number(line: &Value, part: &str, key: &str) -> f64 {
    line[part][key].as_f64().unwrap_or(0.0)
}

fn run(kills: usize, seed: u64) {
    let system = start();
    let peer = Peer::start(&system).unwrap();
    let guests: Vec<(Progress, _)> = (0..2)
        .map(|n| {
            create(&system, &file(n, seed));
            system.console(&format!("net{n}"))
        })
        .collect();
    let moved = |since: &[(u64, u64)]| {
        for ((progress, _), before) in guests.iter().zip(since) {
            let on = |seen: &Seen| {
                let now = totals(&seen.last);
                now.tcp > before.0 && now.pings > before.1
            };
            assert!(progress.wait(SOON, on), "a guest stands still\n{}", system.log_tail(30));
        }
    };
    moved(&[(0, 0), (0, 0)]);
    let now = || -> Vec<(u64, u64)> {
        guests.iter().map(|(p, _)| totals(&p.lock().last)).map(|t| (t.tcp, t.pings)).collect()
    };
    let mut rng = Rng::new(seed);
    let start = Instant::now();
    for i in 0..kills {
        let killed = system.kill(&[netback().to_owned()]).unwrap();
        system.wait_restarted(&killed, SOON).unwrap_or_else(|e| panic!("kill {i}: {e:#}"));
        std::thread::sleep(rng.between(Duration::ZERO, Duration::from_millis(30)));
        if i % LOOK == 0 {
            let before = now();
            moved(&before);
        }
    }
    let took = start.elapsed();
    moved(&now());
    std::thread::sleep(Duration::from_millis(500));
    let mut pauses = Vec::new();
    for (n, (progress, _)) in guests.iter().enumerate() {
        let seen = progress.lock();
        let last = &seen.last;
        assert_eq!(seen.boots, 1, "guest {n} started again");
        for key in ["corrupt", "resets"] {
            assert_eq!(number(last, "tcp", key), 0.0, "guest {n}: TCP {key}: {last}");
        }
        assert_eq!(number(last, "tcp", "connects"), 1.0, "guest {n}: one connection all the while: {last}");
        let lost = number(last, "ping", "lost");
        // A kill can catch a ping in the hands of one thread; that is rare. Many lost ones mean that something is lost by rule.
        assert!(lost <= kills as f64 / 10.0, "guest {n}: {lost} pings lost in {kills} kills");
        println!(
            "guest {n}: {:.1} MB of TCP compared, {} pings answered, {lost} lost",
            number(last, "tcp", "rx_bytes") / 1e6,
            number(last, "ping", "received")
        );
        pauses.extend(
            seen.lines.iter().map(|(_, line)| number(line, "tcp", "max_gap_ms")).filter(|&ms| ms > 0.0),
        );
    }
    assert_eq!(peer.stats.corrupt.load(std::sync::atomic::Ordering::Relaxed), 0);
    assert_eq!(peer.stats.resets.load(std::sync::atomic::Ordering::Relaxed), 0);
    peer.stop();
    pauses.sort_by(f64::total_cmp);
    let rank = |p: f64| pauses.get((p * pauses.len() as f64) as usize).copied().unwrap_or(0.0);
    println!(
        "{kills} kills in {:.0} s; longest silence on a TCP stream in each tenth of a second: p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms",
        took.as_secs_f64(),
        rank(0.50),
        rank(0.99),
        pauses.last().copied().unwrap_or(0.0)
    );
}

#[test]
fn streams_and_pings_outlive_netback() {
    run(300, 5);
}

/// The full count; `cargo xtask soak net`.
#[test]
#[ignore = "cargo xtask soak"]
fn soak_net() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let most = if std::env::var_os("BH_SOAK").is_some() { 10_000 } else { 300 };
    // In parts, each with another seed.
    run(number("BH_SOAK_KILLS").unwrap_or(most) as usize, number("BH_SOAK_SEED").unwrap_or(6));
}

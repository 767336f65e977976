//! SIGKILL of the real daemon under verified load. Standalone: connections die with it, so clients connect again; the tree and
//! its permissions must be what was acknowledged. (Under hv-core sockets survive too: the whole-system tests show that.)
//!
//! `BH_STORE_KILLS` sets the number of kills.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::Daemon;
use domain_kit::xs::{XsClient, XsErrno, XsError, XsOps};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// What a client knows of one node.
struct Known {
    path: String,
    acked: Option<String>,
    /// Written without an answer: it may or may not have been carried out.
    doubtful: Option<String>,
}

impl Known {
    fn check(&mut self, found: Option<String>) {
        assert!(
            found == self.acked || (self.doubtful.is_some() && found == self.doubtful),
            "{}: found {found:?}, acknowledged {:?}, in doubt {:?}",
            self.path,
            self.acked,
            self.doubtful
        );
        self.acked = found;
        self.doubtful = None;
    }
}

fn lost(e: &XsError) -> bool {
    matches!(e, XsError::Disconnected | XsError::Timeout(_) | XsError::Io(_))
}

/// Repeats a read until the daemon is there.
fn surely<T>(mut run: impl FnMut() -> Result<T, XsError>) -> T {
    for _ in 0..2000 {
        match run() {
            Ok(value) => return value,
            Err(e) if lost(&e) => std::thread::sleep(Duration::from_millis(5)),
            Err(e) => panic!("{e}"),
        }
    }
    panic!("the daemon did not come back");
}

fn client(number: u64, socket: &std::path::Path, stop: &AtomicBool, done: &AtomicU64) {
    let mut rng = SmallRng::seed_from_u64(number);
    let xs = XsClient::connect_socket(socket, Duration::from_secs(20)).expect("connect");
    let base = format!("/load/{number}");
    let mut nodes: Vec<Known> =
        (0..8).map(|i| Known { path: format!("{base}/n{i}"), acked: None, doubtful: None }).collect();
    surely(|| xs.mkdir(&base));
    let watches = xs.watch_set().expect("eventfd");
    surely(|| match watches.watch(&base, "w") {
        Err(XsError::Errno(XsErrno::EEXIST)) => Ok(()),
        other => other,
    });
    let mut counter = 0u64;
    while !stop.load(Ordering::Relaxed) {
        counter += 1;
        let known = &mut nodes[rng.random_range(0..8)];
        let value = format!("{counter}-{}", "x".repeat(rng.random_range(0..200)));
        match rng.random_range(0..10) {
            0..5 => match xs.write(&known.path, &value) {
                Ok(()) => known.acked = Some(value),
                Err(e) if lost(&e) => known.doubtful = Some(value),
                Err(e) => panic!("write: {e}"),
            },
            5 => match xs.rm(&known.path) {
                Ok(()) => known.acked = None,
                // In doubt between two: settled here, so that one stays.
                Err(e) if lost(&e) => {
                    let found = surely(|| xs.read_opt(&known.path));
                    assert!(found.is_none() || found == known.acked, "{}: {found:?}", known.path);
                    known.acked = found;
                }
                Err(e) => panic!("rm: {e}"),
            },
            6..8 => {
                // Two nodes that only ever change together.
                let pair = [format!("{base}/a"), format!("{base}/b")];
                let result = xs.transaction(|tx| {
                    tx.write(&pair[0], &value)?;
                    tx.write(&pair[1], &value)
                });
                match result {
                    Ok(()) => {}
                    // The transaction died with its connection.
                    Err(XsError::Errno(XsErrno::ENOENT)) => {}
                    Err(e) if lost(&e) => {}
                    Err(e) => panic!("transaction: {e}"),
                }
                let found = pair.map(|p| surely(|| xs.read_opt(&p)));
                assert_eq!(found[0], found[1], "half a transaction");
            }
            _ => {}
        }
        if known.doubtful.is_some() {
            let found = surely(|| xs.read_opt(&known.path));
            known.check(found);
        }
        while watches.try_next().is_some() {}
        done.fetch_add(1, Ordering::Relaxed);
    }
    for known in &mut nodes {
        let found = surely(|| xs.read_opt(&known.path));
        known.check(found);
    }
    // The watch lives on through all reconnections.
    while watches.next_timeout(Duration::from_millis(100)).is_some() {}
    surely(|| xs.write(&format!("{base}/last"), "1"));
    let seen = |e: domain_kit::xs::WatchEvent| e.path.starts_with(&base);
    assert!(watches.next_timeout(Duration::from_secs(10)).is_some_and(seen), "the watch was lost");
}

#[test]
fn tree_survives_sigkill_under_load() {
    let kills: u64 = std::env::var("BH_STORE_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    let mut daemon = Daemon::start();
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|number| {
            let (socket, stop, done) = (daemon.socket(), stop.clone(), done.clone());
            std::thread::spawn(move || client(number, &socket, &stop, &done))
        })
        .collect();
    let xs = XsClient::connect_socket(daemon.socket(), Duration::from_secs(20)).expect("connect");
    surely(|| xs.write("/perms", "x"));
    surely(|| xs.set_perms("/perms", &["b1", "r2", "w3"]));
    let mut rng = SmallRng::seed_from_u64(1);
    for _ in 0..kills {
        std::thread::sleep(Duration::from_micros(rng.random_range(1000..25_000)));
        daemon.restart();
        if clients.iter().any(|c| c.is_finished()) {
            break;
        }
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        if let Err(panic) = client.join() {
            std::panic::resume_unwind(panic);
        }
    }
    assert_eq!(surely(|| xs.get_perms("/perms")), ["b1", "r2", "w3"]);
    assert_eq!(surely(|| xs.control(&["check"])), "OK");
    let done = done.load(Ordering::Relaxed);
    println!("{kills} kills, {done} steps");
    assert!(done > kills);
}

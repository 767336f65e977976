//! Guests that do what they must not, in the whole system: two others' packets go to and fro as before. See `docs/hazards.md`.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bulkhead_tests::system::System;
use common::*;
use domain_kit::xs::XsOps;
use ends::*;
use frontends::netfront::Options;

/// Packets there and back; how long one takes.
fn trips(a: &mut End, b: &mut End, count: u8) -> Duration {
    let start = Instant::now();
    for i in 0..count {
        a.send(&frame(b.mac, a.mac, i, 200));
        b.receive(marked(i));
    }
    start.elapsed() / u32::from(count.max(1))
}

/// Runs `storm` in a thread for as long as packets go to and fro; says how long one took before and meanwhile.
fn beside(a: &mut End, b: &mut End, storm: impl FnMut() + Send) -> (Duration, Duration) {
    let quiet = trips(a, b, 100);
    let over = AtomicBool::new(false);
    let mut storm = storm;
    let loud = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                storm();
            }
        });
        let loud = trips(a, b, 200).max(trips(a, b, 200));
        over.store(true, Ordering::Relaxed);
        loud
    });
    (quiet, loud)
}

fn fine(system: &System, what: &str, (quiet, loud): (Duration, Duration), memory: u64) {
    let now = memory_kb(system);
    println!("{what}: a packet took {quiet:?}, then {loud:?}; netback's memory {memory} kB, then {now} kB");
    assert!(loud < quiet * 20 + Duration::from_millis(20), "{what}: {quiet:?} became {loud:?}");
    assert!(now < memory + 16 * 1024, "{what}: {memory} kB became {now} kB");
    assert_eq!(system.services().unwrap()[netback()].generation, 1, "{what}: netback ended");
}

fn memory_kb(system: &System) -> u64 {
    let text = service_process(system, netback()).status("VmRSS").unwrap_or_default();
    text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[test]
fn storms_of_one_guest_leave_the_others_alone() {
    let system = start();
    let mut a = end(&system, 0, "", Options::default());
    let mut b = end(&system, 1, "", Options::default());
    let mut bad = end(&system, 2, "", Options::default());
    let state = format!("/local/domain/{}/device/vif/0/state", bad.brain.domain.domid());

    // XSA-349: every write fires a watch of netback's; they are looked at together.
    let memory = memory_kb(&system);
    let mut writes = 0u32;
    let xs = bad.brain.xs.clone();
    let times = beside(&mut a, &mut b, || {
        xs.write(&state, "4").unwrap();
        writes += 1;
    });
    assert!(writes > 100, "{writes} writes are no flood");
    fine(&system, &format!("xsa_349, {writes} changes of a state"), times, memory);

    // XSA-391: events without anything to do.
    let memory = memory_kb(&system);
    let mut events = 0u64;
    let times = beside(&mut a, &mut b, || {
        bad.front.queues()[0].kick();
        events += 1;
    });
    assert!(events > 1000, "{events} events are no storm");
    fine(&system, &format!("xsa_391, {events} events"), times, memory);
    bad.send(&frame(a.mac, bad.mac, 77, 100));
    a.receive(marked(77));

    // XSA-350: connect and disconnect, over and over.
    let memory = memory_kb(&system);
    let mut rounds = 0;
    let brain = &bad.brain;
    let times = beside(&mut a, &mut b, || {
        // Closes what is connected, and connects anew.
        drop(connect(&system, brain, Options::default()));
        rounds += 1;
    });
    assert!(rounds > 0);
    fine(&system, &format!("xsa_350, {rounds} connections"), times, memory);
}

/// XSA-350, the other way round: the guest is gone at any moment of a connection.
#[test]
fn xsa_350_guests_that_die_while_they_connect() {
    let system = start();
    let mut a = end(&system, 0, "", Options::default());
    let mut b = end(&system, 1, "", Options::default());
    for round in 0..4u64 {
        let dying = end(&system, 2, "", Options::default());
        std::thread::scope(|scope| {
            let again = scope.spawn(|| {
                // Until its hypercalls are refused.
                let d = &dying.brain;
                d.xs.set_timeout(Duration::from_millis(500));
                let time = Duration::from_secs(5);
                while frontends::netfront::NetFront::connect(&d.domain.hv, &d.xs, d.domain.domid(), 0, time)
                    .is_ok()
                {}
            });
            std::thread::sleep(Duration::from_millis(3 * round));
            system.bh_ok(&["destroy", "guest2"]).unwrap();
            trips(&mut a, &mut b, 20);
            drop(again);
        });
    }
    assert_eq!(system.services().unwrap()[netback()].generation, 1);
    assert_eq!(counter(&system, "vifs_connected"), 2);
}

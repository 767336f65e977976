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
use frontends::netfront::{Options, PacketMeta};

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

/// Bytes a second from one guest to the other, for about so long.
fn throughput(a: &mut End, b: &mut End, time: Duration) -> f64 {
    let packet = frame(b.mac, a.mac, 1, 1514);
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < time {
        a.front.clear();
        let queue = &mut a.front.queues()[0];
        queue.rings.reap().unwrap();
        while queue.rings.send(&packet, PacketMeta::default()) {}
        queue.flush();
        b.front.clear();
        b.front.queue().reap().unwrap();
        while let Some(packet) = b.front.receive_any().unwrap() {
            bytes += packet.bytes.len();
        }
        b.front.flush();
        std::thread::yield_now();
    }
    bytes as f64 / start.elapsed().as_secs_f64()
}

/// One guest takes nothing and is flooded by another, a third sends garbage, all at the same time: two good ones keep their share of
/// the processors, and netback its memory.
#[test]
fn floods_and_garbage_leave_the_others_throughput_alone() {
    let system = start();
    let mut a = end(&system, 0, "", Options::default());
    let mut b = end(&system, 1, "", Options::default());
    let deaf = end(&system, 2, "", Options::default());
    let mut bad = end(&system, 3, "", Options::default());
    const TIME: Duration = Duration::from_millis(800);
    throughput(&mut a, &mut b, TIME / 4);
    let (quiet, memory) = (throughput(&mut a, &mut b, TIME), memory_kb(&system));
    let over = AtomicBool::new(false);
    let (good, to) = (a.mac, deaf.mac);
    let loud = std::thread::scope(|scope| {
        scope.spawn(|| {
            let flood = frame(to, bad.mac, 2, 1514);
            // Not what it says that it is, cut short, or to be segmented into nothing.
            let garbage = [
                (
                    vec![0x45; 60],
                    PacketMeta { csum_blank: true, gso_tcpv4: Some(1), ..PacketMeta::default() },
                ),
                (frame(good, bad.mac, 3, 14), PacketMeta { csum_blank: true, ..PacketMeta::default() }),
                (
                    frame(good, bad.mac, 4, 9000),
                    PacketMeta { gso_tcpv6: Some(65535), ..PacketMeta::default() },
                ),
            ];
            let mut round = 0usize;
            while !over.load(Ordering::Relaxed) {
                bad.front.clear();
                let queue = &mut bad.front.queues()[0];
                queue.rings.reap().unwrap();
                let (bytes, meta) = &garbage[round % garbage.len()];
                queue.rings.send(bytes, *meta);
                while queue.rings.send(&flood, PacketMeta::default()) {}
                queue.flush();
                round += 1;
                std::thread::yield_now();
            }
        });
        std::thread::sleep(TIME / 4);
        let loud = throughput(&mut a, &mut b, TIME);
        over.store(true, Ordering::Relaxed);
        loud
    });
    let now = memory_kb(&system);
    let mb = |bytes: f64| bytes / 1e6;
    println!(
        "{:.0} MB/s alone, {:.0} MB/s beside a flood to a deaf guest and garbage; netback's memory {memory} kB, then {now} kB",
        mb(quiet),
        mb(loud)
    );
    // Twice as many threads want the processors.
    assert!(loud > quiet / 4.0, "{quiet} bytes a second became {loud}");
    assert!(now < memory + 16 * 1024, "{memory} kB became {now} kB");
    assert!(counter(&system, "rx_dropped") > 1000 && counter(&system, "tx_errors") > 10);
    assert_eq!(system.services().unwrap()[netback()].generation, 1);
    trips(&mut a, &mut b, 20);
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

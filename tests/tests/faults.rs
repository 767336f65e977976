//! Requests that crash a service, devices that go while nobody looks, and frontends that come and go under load.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bulkhead_tests::inspect::Process;
use bulkhead_tests::system::{Config, System};
use common::*;
use domain_kit::xs::XsOps;
use frontends::netfront::{NetFront, PacketMeta};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A disk file that is there before the system starts.
struct DiskFile(tempfile::TempDir);

impl DiskFile {
    fn new(bytes: u64) -> DiskFile {
        let dir = tempfile::tempdir().unwrap();
        std::fs::File::create(dir.path().join("disk.img")).unwrap().set_len(bytes).unwrap();
        DiskFile(dir)
    }

    fn entry(&self, name: &str, more: &str) -> String {
        format!(
            "[[blkback]]\nname = \"{name}\"\ndisk = \"{}\"\n{more}\n",
            self.0.path().join("disk.img").display()
        )
    }
}

fn system_with(more: String) -> System {
    let mut config = Config::of_this_build().unwrap();
    config.host_file_more = more;
    start_with(config)
}

fn uses(name: &str, backend: &str) -> String {
    format!("{}[[disk]]\nvdev = \"xvda\"\nbackend = \"{backend}\"\n", probe_file(name, None))
}

fn generation(system: &System, service: &str) -> u64 {
    system.services().unwrap()[service].generation
}

fn counter(system: &System, service: &str, name: &str) -> u64 {
    let json = system.bh_json(&["services"]).unwrap();
    let all = json["services"].as_array().unwrap();
    let found = all.iter().find(|s| s["name"] == service).unwrap();
    let counters = found["counters"].as_array().unwrap();
    counters.iter().filter(|c| c["name"] == name).filter_map(|c| c["value"].as_u64()).sum()
}

/// A write that makes blkback panic: run three times, then answered with an error. The guest sees that one error and nothing else,
/// whatever else it has in flight.
#[test]
fn a_poison_request_costs_one_error() {
    const POISON: u64 = 4096; // sector
    let file = DiskFile::new(8 << 20);
    let system = system_with(file.entry("poisoned", &format!("args = [\"--fault\", \"{POISON}\"]")));
    let good = image(&system, "good.img", 4 << 20);
    create(&system, &loaded_guest_file("good", &good));
    create(&system, &uses("victim", "poisoned"));
    let brain = Brain::of(&system, "victim");
    let disk = brain.disk(&system);
    disk.write(0, &[1; 4096]).unwrap();
    assert_eq!(generation(&system, "poisoned"), 1);

    // Others of the same guest write and read back meanwhile, each its own part.
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> = (0..4u64)
        .map(|n| {
            let (disk, stop, done) = (disk.clone(), stop.clone(), done.clone());
            std::thread::spawn(move || -> std::io::Result<()> {
                let base = n * (256 << 10);
                for round in 0u64.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    let at = base + round % 64 * 4096;
                    let block = [(round ^ n) as u8; 4096];
                    disk.write(at, &block)?;
                    let mut back = [0; 4096];
                    disk.read(at, &mut back)?;
                    assert!(back == block, "wrong data at {at}");
                    done.fetch_add(1, Relaxed);
                }
                Ok(())
            })
        })
        .collect();
    until(&system, "the workers work", || done.load(Relaxed) > 50);
    let error = disk.write(POISON * 512, &[2; 4096]).unwrap_err();
    println!("the poison request: {error}");
    let after = done.load(Relaxed);
    until(&system, "the workers go on", || done.load(Relaxed) > after + 50);
    stop.store(true, Relaxed);
    for worker in workers {
        worker.join().unwrap().expect("no other request is answered with an error");
    }
    assert_eq!(generation(&system, "poisoned"), 4, "three crashes and no more");
    assert_eq!(counter(&system, "poisoned", "poisoned"), 1);
    // Beside the poisoned sector the disk is as good as before.
    disk.write((POISON + 8) * 512, &[3; 4096]).unwrap();
    disk.sync().unwrap();
    assert_eq!(generation(&system, "poisoned"), 4);
    still_works(&system, "good");
}

fn frame(front: &NetFront, len: usize, mark: u8) -> Vec<u8> {
    let mut frame = vec![mark; len];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&front.mac());
    // A type for experiments (IEEE 802): nobody answers it.
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// Sends one frame; false if the ring is full.
fn send(front: &mut NetFront, len: usize, mark: u8) -> bool {
    let frame = frame(front, len, mark);
    let sent = front.queue().send(&frame, PacketMeta::default());
    front.flush();
    sent
}

/// A packet that makes netback panic: tried three times, then dropped; those behind it are sent.
#[test]
fn a_poison_packet_is_dropped() {
    const POISON: usize = 777;
    let system = system_with(String::new());
    // The harness's netback is the last entry of the host file.
    let path = system.dir().join("etc/host.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{text}args = [\"--fault\", \"{POISON}\"]\n")).unwrap();
    let before = service_domid(&system, netback());
    system.bh_ok(&["reload"]).unwrap();
    until(&system, "netback is made anew", || {
        system.services().is_ok_and(|s| s.get(netback()).is_some_and(|n| n.state == "running"))
            && service_domid(&system, netback()) != before
    });
    let file = format!("{}[[vif]]\nbackend = \"{}\"\n", probe_file("victim", None), netback());
    create(&system, &file);
    let brain = Brain::of(&system, "victim");
    let mut front = NetFront::connect(&brain.domain.hv, &brain.xs, brain.domain.domid(), 0, SOON).unwrap();
    assert!(send(&mut front, 100, 1));
    until(&system, "the first packet", || counter(&system, netback(), "tx_packets") >= 1);
    assert_eq!(generation(&system, netback()), 1);
    assert!(send(&mut front, POISON, 2));
    for mark in 0..20 {
        assert!(send(&mut front, 200, mark));
    }
    until(&system, "the poison is dropped", || counter(&system, netback(), "poisoned") == 1);
    until(&system, "those behind it are sent", || counter(&system, netback(), "tx_packets") == 20);
    assert_eq!(generation(&system, netback()), 4, "three crashes and no more");
    // Every slot is answered, and the ring goes round.
    until(&system, "all answered", || {
        front.clear();
        front.queue().reap().unwrap();
        front.queue().can_send(60_000, PacketMeta::default())
    });
    for mark in 0..50 {
        until(&system, "room", || {
            front.queue().reap().unwrap();
            send(&mut front, 300, mark)
        });
    }
    until(&system, "more packets", || counter(&system, netback(), "tx_packets") == 70);
    assert_eq!(generation(&system, netback()), 4);
}

/// What netback keeps for itself: its TAP, what it read from there, learned addresses, leases, and rules that were set while it ran.
const KEPT_BY_NETBACK: usize = 5;

/// netback served a vif (its memory is kept), died, and the vif was removed meanwhile: the next incarnation lets go of it.
#[test]
fn a_vif_removed_while_netback_is_dead_leaves_nothing() {
    let system = start();
    let kept = |system: &System| speak_as(service_process(system, netback())).fd_list().unwrap().len();
    let file = format!("{}[[vif]]\nbackend = \"{}\"\n", probe_file("short", None), netback());
    create(&system, &file);
    let brain = Brain::of(&system, "short");
    let front = NetFront::connect(&brain.domain.hv, &brain.xs, brain.domain.domid(), 0, SOON).unwrap();
    assert_eq!(kept(&system), KEPT_BY_NETBACK + 2);
    let process = service_process(&system, netback());
    kill(Pid::from_raw(process.0), Signal::SIGSTOP).unwrap();
    system.bh_ok(&["destroy", "short"]).unwrap();
    let killed = system.kill(&[netback().to_owned()]).unwrap();
    system.wait_restarted(&killed, SOON).unwrap();
    until(&system, "the vif is let go", || kept(&system) == KEPT_BY_NETBACK);
    drop(front);
}

/// A small generator, so that a run can be had again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

fn seed() -> u64 {
    std::env::var("BH_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

/// Frontends connect, go, and jump between states while they have I/O in flight, and the backend is killed in between. It never
/// fails by itself, nothing is left of those that went, and who stays is served.
#[test]
fn xsa_350_connect_and_kill_under_load() {
    let (shared, own) = (DiskFile::new(8 << 20), DiskFile::new(8 << 20));
    let system = system_with(shared.entry("shared", "") + &own.entry("toggled", ""));
    let good = image(&system, "good.img", 4 << 20);
    create(&system, &loaded_guest_file("good", &good));
    let mut dice = Dice(seed());
    let process_of = |name: &str| service_process(&system, name);
    let rest = |process: Process| process.fds().unwrap().len();
    let (before_disk, before_net) = (rest(process_of("shared")), rest(process_of(netback())));
    let mut kills = [0; 2];
    let end = Instant::now() + Duration::from_secs(20);
    let mut rounds = 0;
    while rounds < 24 && Instant::now() < end {
        rounds += 1;
        let file = format!(
            "name = \"x\"\ntype = \"process\"\nprogram = \"{}\"\nargs = [\"--work\", \"disk\"]\n\
             [[disk]]\nvdev = \"xvda\"\nbackend = \"shared\"\n[[vif]]\nbackend = \"{}\"\n",
            program("process-guest").display(),
            netback()
        );
        create(&system, &file);
        std::thread::sleep(Duration::from_millis(dice.below(200)));
        for (n, name) in ["shared", netback()].iter().enumerate() {
            if dice.below(3) == 0 {
                kills[n] += 1;
                let killed = system.kill(&[(*name).to_owned()]).unwrap();
                if dice.below(2) == 0 {
                    system.wait_restarted(&killed, SOON).unwrap();
                }
            }
        }
        system.bh_ok(&["destroy", "x"]).unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25)));
    }
    println!("{rounds} guests came and went, {kills:?} kills, seed {}", seed());
    for (n, name) in ["shared", netback()].iter().enumerate() {
        until(&system, "it runs", || system.services().unwrap()[*name].state == "running");
        assert_eq!(
            generation(&system, name),
            1 + kills[n],
            "{name} ended by itself\n{}",
            system.log_tail(25)
        );
    }
    for (name, before) in [("shared", before_disk), (netback(), before_net)] {
        until(&system, &format!("descriptors of {name}"), || rest(process_of(name)) <= before);
        let hv = speak_as(process_of(name));
        let left = (hv.grant_list().unwrap().len(), hv.fd_list().unwrap().len());
        let own = if *name == *netback() { KEPT_BY_NETBACK } else { 0 };
        assert_eq!(left, (0, own), "grant maps and kept descriptors of {name}");
    }
    toggle(&system, &mut dice);
    still_works(&system, "good");
}

/// One frontend that writes every state in any order, its backend killed now and then.
fn toggle(system: &System, dice: &mut Dice) {
    create(system, &uses("toggler", "toggled"));
    let brain = Brain::of(system, "toggler");
    let disk = brain.disk(system);
    disk.write(0, &[5; 4096]).unwrap();
    let path = format!("/local/domain/{}/device/vbd/{XVDA}/state", brain.domain.domid());
    let mut kills = 0;
    for _ in 0..300 {
        brain.xs.write(&path, dice.below(8).to_string()).unwrap();
        if dice.below(60) == 0 {
            kills += 1;
            let killed = system.kill(&["toggled".to_owned()]).unwrap();
            system.wait_restarted(&killed, SOON).unwrap();
        }
        std::thread::sleep(Duration::from_millis(dice.below(4)));
    }
    drop(disk);
    assert_eq!(generation(system, "toggled"), 1 + kills, "it ended by itself\n{}", system.log_tail(25));
    // Whatever it has become, it goes, and the next guest has the disk.
    system.bh_ok(&["destroy", "toggler"]).unwrap();
    create(system, &uses("next", "toggled"));
    let next = Brain::of(system, "next").disk(system);
    let mut back = [0; 4096];
    next.read(0, &mut back).unwrap();
    assert_eq!(back, [5; 4096]);
}

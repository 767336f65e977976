//! What an administrator does with a vif while its guest runs: captures, firewall rules, link state. Each beside kills.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use bulkhead_tests::system::System;
use common::*;
use domain_kit::xs::XsOps;
use ends::*;
use frontends::netfront::Options;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pcap_parser::traits::PcapNGPacketBlock;
use pcap_parser::{Block, OptionCode, parse_block_le};

/// Why it would last for ever is in its arguments; what it says is read line by line.
struct Capture {
    child: Child,
    lines: BufReader<std::process::ChildStderr>,
}

impl Capture {
    fn start(system: &System, args: &[&str]) -> Capture {
        let mut command = system.bh_command(&[&["capture"], args].concat());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap());
        let mut this = Capture { child, lines };
        this.says("capturing");
        this
    }

    fn says(&mut self, what: &str) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert!(line.contains(what), "not {what:?}: {line}");
        line
    }

    fn interrupt(mut self) -> String {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).unwrap();
        let end = self.says("packets captured");
        assert!(self.child.wait().unwrap().success());
        end
    }
}

/// A packet of a file: to the guest, its bytes, packets missed before it, its comment.
#[derive(Debug)]
struct Seen {
    to_guest: bool,
    data: Vec<u8>,
    length: usize,
    dropped: u64,
    comment: Option<String>,
}

fn packets(mut file: &[u8]) -> Vec<Seen> {
    let mut out = Vec::new();
    let (mut last, mut interfaces) = (0, 0);
    while !file.is_empty() {
        let (rest, block) = parse_block_le(file).unwrap();
        file = rest;
        match block {
            Block::EnhancedPacket(p) => {
                let option = |code| {
                    p.options
                        .iter()
                        .find(|o| o.code == OptionCode(code))
                        .map(|o| o.as_bytes().unwrap().to_vec())
                };
                let number = |bytes: Vec<u8>| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
                let time = u64::from(p.ts_high) << 32 | u64::from(p.ts_low);
                assert!(time >= last, "back in time");
                last = time;
                out.push(Seen {
                    to_guest: number(option(2).unwrap()) == 1,
                    data: p.packet_data()[..p.caplen as usize].to_vec(),
                    length: p.origlen as usize,
                    dropped: option(4).map_or(0, number),
                    comment: option(1).map(|text| String::from_utf8(text).unwrap()),
                });
            }
            Block::InterfaceDescription(i) => {
                assert_eq!(i.if_tsresol, 9);
                interfaces += 1;
            }
            Block::SectionHeader(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(interfaces, 1);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    assert!(out.is_empty() || now - last < 600_000_000_000, "the time is no time of today");
    out
}

fn marks(seen: &[Seen]) -> Vec<(bool, u8)> {
    let ours = seen.iter().filter(|p| p.data[12..14] == EXPERIMENT);
    ours.map(|p| (p.to_guest, p.data[14])).collect()
}

#[test]
fn captures_outlive_restarts_and_are_bounded() {
    let system = start();
    let mut a = end(&system, 0, "", Options::default());
    let mut b = end(&system, 1, "", Options::default());
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    trip(&mut a, &mut b, 1);
    let (whole, short) = (file("whole.pcapng"), file("short.pcapng"));
    let mut capture = Capture::start(&system, &["guest0", "-w", &whole]);
    let limited = Capture::start(&system, &["guest1", "0", "-w", &short, "-s", "64", "-n", "2"]);
    trip(&mut a, &mut b, 10);
    trip(&mut a, &mut b, 20);
    // It ends by itself.
    let Capture { mut child, mut lines } = limited;
    assert!(child.wait().unwrap().success());
    let mut end_line = String::new();
    lines.read_line(&mut end_line).unwrap();
    assert!(end_line.contains("2 packets captured"), "{end_line}");
    let seen = packets(&std::fs::read(&short).unwrap());
    assert_eq!(marks(&seen), [(true, 10), (false, 11)]);
    assert!(seen.iter().all(|p| p.data.len() == 64) && (seen[0].length, seen[1].length) == (200, 300));
    // Restarts of netback and of dom0 leave gaps that the file tells of.
    for (i, victim) in [netback(), "dom0-supervisor"].into_iter().enumerate() {
        let killed = system.kill(&[victim.to_owned()]).unwrap();
        system.wait_restarted(&killed, SOON).unwrap();
        capture.says("interrupted");
        capture.says("goes on");
        trip(&mut a, &mut b, 30 + 10 * i as u8);
    }
    // What no rule lets through is there, too.
    let mut denied = frame(b.mac, a.mac, 60, 100);
    denied[11] ^= 1;
    a.send(&denied);
    trip(&mut a, &mut b, 70);
    until(&system, "the last packet is in the file", || {
        marks(&packets(&std::fs::read(&whole).unwrap())).contains(&(true, 71))
    });
    assert!(capture.interrupt().contains("0 missed"));
    let seen = packets(&std::fs::read(&whole).unwrap());
    let trips = [10, 20, 30, 40].iter().flat_map(|&m| [(false, m), (true, m + 1)]);
    let wanted: Vec<_> = trips.chain([(false, 60), (false, 70), (true, 71)]).collect();
    assert_eq!(marks(&seen), wanted);
    let told: Vec<u8> = seen.iter().filter(|p| p.comment.is_some()).map(|p| p.data[14]).collect();
    assert_eq!(told, [30, 40], "gaps");

    // A reader that does not read costs a bounded memory, and is told what it missed.
    let memory = || {
        let text = service_process(&system, netback()).status("RssAnon").unwrap_or_default();
        text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap()
    };
    let before = memory();
    let slow = Capture::start(&system, &["guest0", "-w", "-"]);
    kill(Pid::from_raw(slow.child.id().cast_signed()), Signal::SIGSTOP).unwrap();
    for i in 0..8000u32 {
        a.send(&frame(b.mac, a.mac, (i % 7) as u8, 1514));
        if i % 64 == 0 {
            while b.receive_within(Duration::ZERO, |_| true).is_some() {}
            b.receive_within(Duration::from_millis(2), |_| false);
        }
    }
    let after = memory();
    println!("netback's own memory: {before} kB, beside a stopped capture of 12 MB {after} kB");
    assert!(after < before + 10_000, "{before} kB became {after} kB");
    let Capture { mut child, .. } = slow;
    let mut out = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).unwrap();
        bytes
    });
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGCONT).unwrap();
    // After the gap it goes on; the packet tells how long that was.
    std::thread::sleep(Duration::from_millis(300));
    trip(&mut a, &mut b, 90);
    std::thread::sleep(Duration::from_millis(500));
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    assert!(child.wait().unwrap().success());
    let seen = packets(&reader.join().unwrap());
    let (got, dropped) = (seen.len() as u64, seen.iter().map(|p| p.dropped).sum::<u64>());
    println!("{got} packets, {dropped} missed");
    assert!(dropped > 1000 && got + dropped >= 8000, "{got} and {dropped}");
    assert_eq!(marks(&seen)[marks(&seen).len() - 2..], [(false, 90), (true, 91)]);

    // What cannot be.
    for (args, code, why) in [
        (vec!["capture", "guest0", "7", "-w", "-"], 3, "no vif 7"),
        (vec!["capture", "nobody", "-w", "-"], 3, "nobody"),
        (vec!["capture", "guest0", "-w", "/nowhere/x"], 2, "/nowhere/x"),
    ] {
        let out = system.bh(&args).unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!((out.status.code(), text.contains(why)), (Some(code), true), "{text}");
        assert!(!Path::new("/nowhere").exists());
    }
}

/// IPv4 of so many bytes with an address of the sender's.
fn ip(to: &End, from: &End, port: u8, source: [u8; 4]) -> Vec<u8> {
    let mut f = frame(to.mac, from.mac, 0, 60);
    f[12..34].copy_from_slice(&[8, 0, 0x45, 0, 0, 46, 0, 1, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 10, 77, 0, 99]);
    f[26..30].copy_from_slice(&source);
    f[34..38].copy_from_slice(&[0, 9, 0, port]);
    f
}

#[test]
fn rules_by_bh() {
    let system = start();
    let mut a = end(&system, 0, "ip = [\"10.77.0.11\"]", Options::default());
    let mut b = end(&system, 1, "", Options::default());
    let rules = |args: &[&str]| system.bh(&[&["network-rules"], args].concat()).unwrap();
    let ok = |args: &[&str]| {
        let out = rules(args);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let shown = |system: &System| {
        let json = system.bh_json(&["network-rules", "guest0"]).unwrap();
        let set = json["sets"][0].clone();
        let rules: Vec<String> =
            set["rules"].as_array().unwrap().iter().map(|r| r.as_str().unwrap().to_owned()).collect();
        (set["policy"].as_str().map(str::to_owned), rules)
    };
    /// Which of these ports get through, once those of `want` do.
    fn through(system: &System, a: &mut End, b: &mut End, want: &[u8]) {
        let mut got = Vec::new();
        until(system, &format!("ports {want:?} get through, and no others"), || {
            got.clear();
            for port in [20, 25, 80] {
                let packet = ip(b, a, port, [10, 77, 0, 11]);
                a.send(&packet);
            }
            while let Some(p) =
                b.receive_within(Duration::from_millis(40), |f| f[12..14] == [8, 0] && f[23] == 17)
            {
                got.push(p.bytes[37]);
            }
            got.sort_unstable();
            got == want
        });
    }
    assert_eq!(shown(&system), (None, vec![]));
    through(&system, &mut a, &mut b, &[20, 25, 80]);
    ok(&["guest0", "--add", "action=accept proto=udp dstports=80-80"]);
    assert_eq!(shown(&system), (Some("drop".into()), vec!["action=accept proto=udp dstports=80-80".into()]));
    through(&system, &mut a, &mut b, &[80]);
    ok(&["guest0", "0", "--add", "action=accept proto=udp dstports=25-25", "--at", "0"]);
    through(&system, &mut a, &mut b, &[25, 80]);
    ok(&["guest0", "0", "--remove", "1"]);
    through(&system, &mut a, &mut b, &[25]);
    // A restart of either changes nothing.
    for victim in [netback(), "xenstored"] {
        let killed = system.kill(&[victim.to_owned()]).unwrap();
        system.wait_restarted(&killed, SOON).unwrap();
        through(&system, &mut a, &mut b, &[25]);
    }
    // A whole set, from standard input and from a file; what is wrong changes nothing.
    let mut command = system.bh_command(&["network-rules", "guest0", "--set", "-", "--policy", "accept"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let text = "# from a mail\n\naction=drop proto=udp dstports=25-25\naction=accept comment=all\n";
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    through(&system, &mut a, &mut b, &[20, 80]);
    let before = shown(&system);
    assert_eq!((before.0.as_deref(), before.1.len()), (Some("accept"), 2));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rules");
    std::fs::write(&path, "action=drop proto=udp\nproto=tcp\n").unwrap();
    let path = path.to_str().unwrap();
    for (args, code, why) in [
        (vec!["guest0", "--set", path], 2, "action"),
        (vec!["guest0", "--add", "action=maybe"], 2, "maybe"),
        (vec!["guest0", "--remove", "9"], 2, "no rule 9"),
        (vec!["guest0", "--set", "/nowhere"], 2, "/nowhere"),
        (vec!["guest0", "5", "--clear"], 3, "no vif 5"),
        (vec!["guest1"], 2, "--address"),
    ] {
        let out = rules(&args);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!((out.status.code(), text.contains(why)), (Some(code), true), "{args:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    assert_eq!(shown(&system), before);
    std::fs::write(path, "action=drop proto=udp dstports=20-25\n").unwrap();
    ok(&["guest0", "--set", path]);
    assert_eq!(shown(&system).1.len(), 1, "the second rule is gone");
    through(&system, &mut a, &mut b, &[80]);
    ok(&["guest0", "--clear"]);
    assert_eq!(shown(&system), (None, vec![]));
    through(&system, &mut a, &mut b, &[20, 25, 80]);
    assert!(ok(&["guest1", "--address", "10.77.0.12"]).contains("let through"));
}

#[test]
fn a_pulled_cable_and_no_flap_without() {
    let system = start();
    let mut a = end(&system, 0, "", Options::default());
    let mut b = end(&system, 1, "", Options::default());
    let domid = a.brain.domain.domid();
    let xs = a.brain.xs.clone();
    let front = format!("/local/domain/{domid}/device/vif/0");
    let back = xs.read_string(&format!("{front}/backend")).unwrap();
    let watches = xs.watch_set().unwrap();
    for end in [&front, &back] {
        watches.watch(&format!("{end}/state"), end).unwrap();
    }
    let link =
        |system: &System| system.bh_json(&["network-list", "guest0"]).unwrap()["vifs"][0]["link"].as_bool();
    trip(&mut a, &mut b, 1);
    assert_eq!(link(&system), Some(true));
    let kill_it = || {
        let killed = system.kill(&[netback().to_owned()]).unwrap();
        system.wait_restarted(&killed, SOON).unwrap();
    };
    kill_it();
    trip(&mut a, &mut b, 5);
    // netback writes what it offers again; the states must stay.
    let states = || {
        let mut all = Vec::new();
        while let Some(event) = watches.next_timeout(Duration::from_millis(100)) {
            all.push((event.path.clone(), xs.read_string(&event.path).unwrap()));
        }
        all
    };
    let seen = states();
    assert!(seen.iter().all(|(_, state)| state == "4"), "{seen:?}");

    for _ in 0..2 {
        system.bh_ok(&["network-link", "guest0", "0", "down"]).unwrap();
    }
    assert_eq!(link(&system), Some(false));
    assert_eq!(xs.read_string(&format!("{front}/disconnect")).unwrap(), "1");
    let dark = |a: &mut End, b: &mut End| {
        a.send(&frame(b.mac, a.mac, 30, 200));
        b.send(&frame(a.mac, b.mac, 31, 200));
        let wait = Duration::from_millis(60);
        b.receive_within(wait, marked(30)).is_none() && a.receive_within(wait, marked(31)).is_none()
    };
    until(&system, "nothing passes", || dark(&mut a, &mut b));
    kill_it();
    for _ in 0..3 {
        assert!(dark(&mut a, &mut b), "the cable is plugged in by a restart");
    }
    system.bh_ok(&["network-link", "guest0", "0", "up"]).unwrap();
    until(&system, "packets pass", || !dark(&mut a, &mut b));
    trip(&mut a, &mut b, 40);
    assert_eq!(link(&system), Some(true));
    let seen = states();
    assert!(seen.iter().all(|(_, state)| state == "4"), "the connection stays: {seen:?}");
    let out = system.bh(&["network-link", "guest0", "3", "up"]).unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", String::from_utf8_lossy(&out.stderr));
}

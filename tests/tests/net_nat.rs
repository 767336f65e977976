//! Connections through NAT, and netback replaced on purpose: neither a kill nor a new program in its place ends a connection.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead_tests::kills::Rng;
use bulkhead_tests::load_run::{PEER_PORT, Peer};
use bulkhead_tests::outcome::totals;
use bulkhead_tests::outside::ADDRESS;
use bulkhead_tests::progress::Progress;
use bulkhead_tests::system::{Config, System};
use common::*;
use ends::*;
use frontends::netfront::Options;

const GUEST: &str = "10.78.0.2";
const UDP_GUEST: [u8; 4] = [10, 78, 0, 5];
const UPLINK_ADDRESS: &str = "10.77.0.9";

fn nat() -> System {
    let mut config = Config::of_this_build().unwrap();
    config.net_mode = "nat";
    config.host_file_more = format!("gateway = \"10.78.0.1/24\"\nuplink_address = \"{UPLINK_ADDRESS}/24\"\n");
    start_with(config)
}

/// A guest with a TCP stream to the outside and pings, behind this gateway or none.
fn file(ip: &str, gateway: Option<&str>) -> String {
    let gateway = gateway.map(|g| format!("\"--gateway\", \"{g}\", ")).unwrap_or_default();
    format!(
        "name = \"stream\"\ntype = \"process\"\nprogram = \"{}\"\n\
         args = [\"--ip\", \"{ip}/24\", {gateway}\"--peer\", \"{ADDRESS}:{PEER_PORT}\", \"--work\", \"tcp,ping\", \
         \"--rate\", \"2000000\", \"--ping-ms\", \"20\", \"--interval-ms\", \"100\"]\n\
         [[vif]]\nbackend = \"{}\"\nip = [\"{ip}\"]\n",
        program("process-guest").display(),
        netback()
    )
}

/// More bytes and pings than now.
fn goes_on(system: &System, progress: &Progress) {
    let before = totals(&progress.lock().last);
    let on = progress.wait(SOON, |seen| {
        let now = totals(&seen.last);
        now.tcp > before.tcp + 100_000 && now.pings > before.pings
    });
    assert!(on, "the stream stands still\n{}", system.log_tail(40));
}

/// One connection all the while, each byte right; how many pings were lost of how many.
fn check(progress: &Progress) -> (u64, u64) {
    let seen = progress.lock();
    let tcp = &seen.last["tcp"];
    let numbers = ["connects", "resets", "corrupt"].map(|key| tcp[key].as_u64());
    assert_eq!(numbers, [Some(1), Some(0), Some(0)], "{}", seen.last);
    assert_eq!(seen.boots, 1);
    let now = totals(&seen.last);
    (now.lost, now.pings)
}

/// Answers each datagram with its bytes; from where they came.
struct Echo {
    port: u16,
    from: Arc<Mutex<BTreeSet<SocketAddr>>>,
    over: Arc<AtomicBool>,
}

impl Echo {
    fn start(system: &System) -> Echo {
        let socket = system.outside.run(|| UdpSocket::bind((ADDRESS, 0)).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let port = socket.local_addr().unwrap().port();
        let (from, over) = (Arc::new(Mutex::new(BTreeSet::new())), Arc::new(AtomicBool::new(false)));
        let (seen, end) = (from.clone(), over.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 2048];
            while !end.load(Ordering::Relaxed) {
                if let Ok((len, peer)) = socket.recv_from(&mut bytes) {
                    seen.lock().unwrap().insert(peer);
                    // The guest sends again what is lost.
                    let _ = socket.send_to(&bytes[..len], peer);
                }
            }
        });
        Echo { port, from, over }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// A datagram of the guest's to the outside, by way of the gateway.
fn datagram(from: &End, port: u16, number: u32) -> Vec<u8> {
    let mut f = netback::forward::TAP_MAC.to_vec();
    f.extend(from.mac);
    f.extend([8, 0, 0x45, 0, 0, 40, 0, 1, 0, 0, 64, 17, 0, 0]);
    f.extend(UDP_GUEST);
    let outside: std::net::Ipv4Addr = ADDRESS.parse().unwrap();
    f.extend(outside.octets());
    let sum: u32 = f[14..34].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    f[24..26].copy_from_slice(&sum.to_be_bytes());
    f.extend(4000u16.to_be_bytes());
    f.extend(port.to_be_bytes());
    // No checksum, as UDP over IPv4 allows.
    f.extend([0, 20, 0, 0]);
    f.extend(*b"BULKHEAD");
    f.extend(number.to_be_bytes());
    f
}

fn run(kills: u32, seed: u64) {
    let system = nat();
    let peer = Peer::start(&system).unwrap();
    let echo = Echo::start(&system);
    create(&system, &file(GUEST, Some("10.78.0.1")));
    let (progress, _console) = system.console("stream");
    let mut udp = end(&system, 0, "ip = [\"10.78.0.5\"]", Options::default());
    goes_on(&system, &progress);
    let mut rng = Rng::new(seed);
    let mut sent = 0;
    for round in 0..kills {
        // The answer to this very datagram, which may be lost at a kill, but not again and again.
        let mut tries = 0;
        loop {
            let packet = datagram(&udp, echo.port, round);
            udp.send(&packet);
            (sent, tries) = (sent + 1, tries + 1);
            let answer = udp.receive_within(Duration::from_millis(200), |f| {
                f[12..14] == [8, 0] && f[23] == 17 && f.ends_with(&round.to_be_bytes())
            });
            if let Some(answer) = answer {
                assert_eq!(answer.bytes[30..34], UDP_GUEST, "to the guest's own address");
                break;
            }
            assert!(tries < 50, "no answer after kill {round}\n{}", system.log_tail(30));
        }
        let killed = system.kill(&[netback().to_owned()]).unwrap();
        system.wait_restarted(&killed, SOON).unwrap();
        std::thread::sleep(rng.between(Duration::ZERO, Duration::from_millis(40)));
        if round % 20 == 0 {
            goes_on(&system, &progress);
        }
    }
    goes_on(&system, &progress);
    let (lost, pings) = check(&progress);
    assert_eq!(peer.stats.resets.load(Ordering::Relaxed), 0);
    let from: Vec<SocketAddr> = echo.from.lock().unwrap().iter().copied().collect();
    // The kernel's table knows the flow by the guest's port: a forgotten one would come from another.
    assert_eq!(from.len(), 1, "one flow is one flow: {from:?}");
    assert_eq!(from[0].ip().to_string(), UPLINK_ADDRESS);
    println!("{kills} kills: {sent} datagrams for {kills} answers, {pings} pings, {lost} lost");
    assert!(lost <= u64::from(kills) / 10, "{lost} pings lost in {kills} kills");
    peer.stop();
}

#[test]
fn flows_through_nat_outlive_netback() {
    run(40, 11);
}

/// `cargo xtask soak net`.
#[test]
#[ignore = "cargo xtask soak"]
fn soak_net_nat() {
    run(if std::env::var_os("BH_SOAK").is_some() { 1000 } else { 100 }, 12);
}

/// netback replaced by another program on disk, over and over, under a TCP stream: what is in its hands is put down first, so
/// that not even a ping is lost.
#[test]
fn a_new_program_under_a_stream() {
    let mut config = Config::of_this_build().unwrap();
    let bin = tempfile::tempdir().unwrap();
    for name in ["hv-core", "dom0-supervisor", "bh", "xenstored", "console-backend", "blkback", "netback"] {
        std::fs::copy(config.bin_dir.join(name), bin.path().join(name)).unwrap();
    }
    config.bin_dir = bin.path().into();
    let system = start_with(config);
    let peer = Peer::start(&system).unwrap();
    create(&system, &file("10.77.0.2", None));
    let (progress, _console) = system.console("stream");
    goes_on(&system, &progress);
    let place = bin.path().join("netback");
    const ROUNDS: u64 = 12;
    for round in 1..=ROUNDS {
        let new = bin.path().join("new");
        let mut bytes = std::fs::read(&place).unwrap();
        // Another program, as far as the disk is concerned.
        bytes.push(0);
        std::fs::write(&new, bytes).unwrap();
        std::fs::set_permissions(&new, std::fs::metadata(&place).unwrap().permissions()).unwrap();
        std::fs::rename(&new, &place).unwrap();
        system.bh_ok(&["restart", netback()]).unwrap();
        let service = &system.services().unwrap()[netback()];
        assert_eq!(service.generation, round + 1);
        let runs = std::fs::metadata(format!("/proc/{}/exe", service.pid)).unwrap();
        assert_eq!(runs.len(), std::fs::metadata(&place).unwrap().len(), "the new one runs");
        assert_eq!(runs.ino(), std::fs::metadata(&place).unwrap().ino());
        goes_on(&system, &progress);
    }
    let (lost, pings) = check(&progress);
    println!("{ROUNDS} replacements: {pings} pings answered, {lost} lost");
    assert_eq!(lost, 0, "of {pings}");
    peer.stop();
}

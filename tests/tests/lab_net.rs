//! Two Debian guests and the outside over netback's modes, in the lab: TCP and UDP, IPv4 and IPv6, both ways, with offloads on, and
//! netback killed under running connections; a guest moved to another driver domain. Kernels and programs of the guests are Debian's.

mod common;
#[path = "common/linux.rs"]
mod linux;

use std::io::Write;
use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::Duration;

use bulkhead_tests::kills::Rng;
use bulkhead_tests::load_run::{PEER_PORT, Peer};
use bulkhead_tests::outcome::totals;
use bulkhead_tests::outside::{ADDRESS, PEER, PREFIX, SECOND_UPLINK};
use bulkhead_tests::progress::Progress;
use bulkhead_tests::system::{Config, Console, System};
use common::*;
use linux::*;

/// TCP segments to a hundred packets of the guest's driver, from which on there were large packets that nobody cut on their way. Each
/// way the other's acknowledgements are among them, which are one segment each.
const LARGE: u64 = 105;
/// Bytes of a received packet on average, acknowledgements among them, from which on there were large ones: no Ethernet frame has as many.
const LARGE_BYTES: u64 = 1514;
/// How long a guest's script may take: everything is emulated.
const PATIENCE: Duration = Duration::from_secs(150);
/// The networks that a guest has an interface in, eth0 to eth2, and their netbacks. Of network n the outside has 10.77.n.1 and
/// fd77:n::1; the guests of those that are routed 10.78.n.0/24 and fd78:n::/64.
const NETWORKS: [&str; 3] = ["bridged", "routed", "nat"];

/// The netback of a network.
fn backend(n: usize) -> &'static str {
    if n == 0 { netback() } else { NETWORKS[n] }
}

/// A guest's addresses in a network.
fn addresses(n: usize, host: u8) -> (String, String) {
    let part = if n == 0 { 7 } else { 8 };
    (format!("10.7{part}.{n}.{host}"), format!("fd7{part}:{n}::{host}"))
}

/// Has text for the guest that connects to this port of the outside's: a kernel's command line is short.
fn serve(system: &System, port: u16, text: String) {
    let listener = system.outside.run(move || TcpListener::bind((ADDRESS, port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // The guest says so if it got less.
            let _ = stream.write_all(text.as_bytes());
        }
    });
}

/// A guest in all networks that runs these scripts.
fn create_guest(system: &System, host: u8, scripts: &[String]) -> (Progress, Console) {
    let (kernel, initrd) = linux("debian13/initrd-tools.img");
    let mut words = format!("console=hvc0 quiet panic=1 bh.interval_ms=2000 bh.ip=10.77.0.{host}/{PREFIX}");
    for (i, text) in scripts.iter().enumerate() {
        let port = 7000 + u16::from(host) * 10 + i as u16;
        serve(system, port, text.clone());
        words.push_str(&format!(" {}", script(&format!("nc {ADDRESS} {port} >/tmp/s;sh /tmp/s"))));
    }
    let vifs: String = (0..NETWORKS.len())
        .map(|n| {
            let (v4, v6) = addresses(n, host);
            format!("[[vif]]\nbackend = \"{}\"\nip = [\"{v4}\", \"{v6}\"]\n", backend(n))
        })
        .collect();
    let file = format!(
        "name = \"linux{host}\"\ntype = \"pvh\"\nkernel = \"{}\"\nramdisk = \"{}\"\nmemory = 256\non_crash = \"preserve\"\n\
         cmdline = \"{words}\"\n{vifs}",
        kernel.display(),
        initrd.display(),
    );
    create(system, &file);
    system.console(&format!("linux{host}"))
}

/// Addresses and routes of a guest. Nobody else has its addresses, so they need not be asked for first.
fn setup(host: u8) -> String {
    format!(
        "set -e\nH={host}\n\
         for m in 0 1 2; do d=eth$m; c=/proc/sys/net/ipv6/conf/$d; echo 0 >$c/accept_dad; echo 0 >$c/accept_ra\n\
         if [ $m = 0 ]; then ip link set $d up; ip -6 addr add fd77:0::$H/64 dev $d; continue; fi\n\
         ip addr add 10.78.$m.$H/24 dev $d; ip link set $d up; ip -6 addr add fd78:$m::$H/64 dev $d\n\
         ip route add 10.77.$m.0/24 via 10.78.$m.1; ip -6 route add fd77:$m::/64 via fd78:$m::1; done\n"
    )
}

/// TCP and UDP both ways with the outside and the guest 2 in each network; a line for each thing that went well. Segments are counted
/// by the guest's TCP, packets and bytes by its driver.
const TALK: &str = r#"
segments() { awk '/^Tcp: [0-9]/ { print $'$1' }' /proc/net/snmp; }
i() { iperf3 -i 0 "$@" >/tmp/o 2>&1 || { echo "iperf3 $*:"; cat /tmp/o; exit 1; }; }
cd /sys/class/net
for m in 0 1 2; do
  g=8; [ $m = 0 ] && g=7
  cd /sys/class/net/eth$m/statistics
  for P in 10.77.$m.1 10.7$g.$m.2 fd77:$m::1 fd7$g:$m::2; do
    n=0; until ping -c 1 -W 2 $P >/dev/null; do n=$((n+1)); [ $n -lt 20 ] || { echo "no echo of $P"; exit 1; }; done
    t=$(segments 12) u=$(cat tx_packets) r=$(cat rx_bytes) s=$(cat rx_packets)
    i -c $P -t 1 --bidir
    t=$(( ($(segments 12) - t) * 100 / ($(cat tx_packets) - u) )) r=$(( ($(cat rx_bytes) - r) / ($(cat rx_packets) - s) ))
    echo tcp $P $t $r
    i -c $P -u -b 1M -t 1 --bidir
    awk -v P=$P '/receiver/ { match($0, /[0-9]+\/[0-9]+/); print "udp", P, substr($0, RSTART, RLENGTH) }' /tmp/o
  done
done
# Faster than one emulated processor may be: told where datagrams are lost, and not judged.
lost() { awk '/^Udp: [0-9]/ { print "received", $2, "socket full", $6 }' /proc/net/snmp; }
cd /sys/class/net/eth0/statistics
for way in "" -R; do
  a="$(lost)"
  i -c 10.77.0.1 -u -b 4M -t 3 $way
  echo "fast udp $way: $(grep receiver /tmp/o); guest before: $a; after: $(lost); NIC: dropped $(cat rx_dropped) in, $(cat tx_dropped) out"
done
"#;

/// iperf3's servers in the outside, while this is held.
struct Servers(Vec<Child>);

impl Servers {
    fn start(system: &System) -> Servers {
        let dir = system.dir().to_owned();
        let start = move || {
            [5201, 5202, 5203].map(|port: u16| {
                let log = std::fs::File::create(dir.join(format!("iperf3-{port}"))).unwrap();
                let mut command = Command::new("iperf3");
                command.args(["-s", "-p", &port.to_string()]);
                command.stdout(log.try_clone().unwrap()).stderr(log).spawn().expect("iperf3 (package iperf3)")
            })
        };
        Servers(system.outside.run(start).unwrap().into())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // They serve until then.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn ip(system: &System, words: &str) {
    let args: Vec<String> = words.split(' ').map(str::to_owned).collect();
    let out = system.outside.run(move || Command::new("ip").args(args).output()).unwrap().unwrap();
    assert!(out.status.success(), "ip {words}: {}", String::from_utf8_lossy(&out.stderr));
}

/// What netbacks counted as dropped.
fn dropped(system: &System) -> String {
    let json = system.bh_json(&["services"]).unwrap();
    let services = json["services"].as_array().unwrap();
    let counters = services.iter().flat_map(|s| s["counters"].as_array().into_iter().flatten());
    let lost = counters.filter(|c| c["name"].as_str().is_some_and(|name| name.contains("dropped")));
    lost.filter(|c| c["value"].as_u64() != Some(0)).map(|c| format!("{c}\n")).collect()
}

/// Three networks of the outside's, a netback of another mode at each, two guests in all of them.
fn talk(kills: usize) {
    let mut config = Config::of_this_build().unwrap();
    config.networks = 2;
    for (n, mode) in NETWORKS.iter().enumerate().skip(1) {
        config.host_file_more.push_str(&format!(
            "[[netback]]\nname = \"{mode}\"\nmode = \"{mode}\"\nuplink = \"bh-net{n}\"\n\
             gateway = \"10.78.{n}.1/24\"\ngateway6 = \"fd78:{n}::1/64\"\n\
             uplink_address = \"10.77.{n}.9/24\"\nuplink_address6 = \"fd77:{n}::9/64\"\n"
        ));
    }
    let system = start_with(config);
    ip(&system, &format!("-6 addr add fd77:0::1/64 dev {PEER} nodad"));
    // On the outside's own network, as far as it knows: the routing netback answers for its guests there.
    ip(&system, "route add 10.78.1.0/24 dev bh-onet1");
    ip(&system, "-6 route add fd78:1::/64 dev bh-onet1");
    let _servers = Servers::start(&system);
    let serving = "iperf3 -s -D --logfile /tmp/1; iperf3 -s -D -p 5202 --logfile /tmp/2; sleep 1\n";
    let (one, _console) = create_guest(&system, 2, &[setup(2) + serving]);
    // Long enough for all kills, by a connection in each network that must last.
    let seconds = 6 + 3 * kills;
    let last = format!(
        "l() {{ f=/tmp/l$1; shift; iperf3 -i 0 -t {seconds} \"$@\" >$f 2>&1 || {{ cat $f; exit 1; }}; grep receiver $f; }}\n\
         l 0 -c 10.77.0.1 -p 5202 & a=$!; l 1 -c fd78:1::2 -p 5202 & b=$!; l 2 -R -c 10.77.2.1 -p 5203 & c=$!\n\
         sleep 2; echo begun; wait $a && wait $b && wait $c\n"
    );
    let (two, _console) = create_guest(&system, 3, &[setup(3) + TALK, last]);
    said(&system, &one, 0, PATIENCE);
    let lines = said(&system, &two, 0, PATIENCE);
    println!("{}", lines.join("\n"));
    let snmp = system.outside.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).unwrap().unwrap();
    println!(
        "outside:\n{}",
        snmp.lines().filter(|line| line.starts_with("Udp:")).collect::<Vec<_>>().join("\n")
    );
    println!("{}", dropped(&system));
    for n in 0..NETWORKS.len() {
        let (v4, v6) = addresses(n, 2);
        for peer in [format!("10.77.{n}.1"), format!("fd77:{n}::1"), v4, v6] {
            let of = |kind: &str| {
                let start = format!("{kind} {peer} ");
                lines.iter().filter_map(move |line| line.strip_prefix(&start).map(str::to_owned))
            };
            let sizes: Vec<u64> = of("tcp")
                .flat_map(|l| l.split(' ').map(|n| n.parse().unwrap()).collect::<Vec<_>>())
                .collect();
            assert!(
                sizes.len() == 2 && sizes[0] > LARGE && sizes[1] > LARGE_BYTES,
                "{peer}: {sizes:?} segments to 100 packets sent, bytes a packet received"
            );
            // Lost of all, as iperf3 counts them, each way.
            let udp: Vec<(u64, u64)> = of("udp")
                .map(|l| {
                    l.split_once('/')
                        .map(|(lost, all)| (lost.parse().unwrap(), all.parse().unwrap()))
                        .unwrap()
                })
                .collect();
            let fine = |(lost, all): &(u64, u64)| *all > 50 && lost * 5 < *all;
            assert!(udp.len() == 2 && udp.iter().all(fine), "{peer}: {udp:?} datagrams lost");
        }
    }
    wait(&system, &two, "connections", |seen| seen.lines.iter().any(|l| l.1["line"] == "begun"));
    let mut rng = Rng::new(8);
    for i in 0..kills {
        std::thread::sleep(rng.between(Duration::from_millis(200), Duration::from_millis(1200)));
        let victims: Vec<String> = match i % 4 {
            3 => (0..NETWORKS.len()).map(|n| backend(n).to_owned()).collect(),
            n => vec![backend(n).to_owned()],
        };
        let killed = system.kill(&victims).unwrap();
        system.wait_restarted(&killed, SOON).unwrap_or_else(|e| panic!("kill {i}: {e:#}"));
    }
    let over = two.lock().lines.iter().any(|l| l.1["ev"] == "run_end" && l.1["script"] == 1);
    assert!(!over, "the connections had ended before the last kill");
    let lines = said(&system, &two, 1, PATIENCE + Duration::from_secs(seconds as u64));
    println!("{kills} kills:\n{}", lines.join("\n"));
    assert_eq!(lines.iter().filter(|line| line.contains("receiver")).count(), 3, "all connections lasted");
}

/// `cargo xtask soak lab_net`. Not among CI's yet: its second part, the kills, has not been seen to its end (docs/soak.md, "Open").
#[test]
#[ignore = "cargo xtask soak, in the lab"]
fn soak_lab_net_modes() {
    talk(if std::env::var_os("BH_SOAK").is_some() { 50 } else { 6 });
}

/// `bh network-move` there and back under a Debian guest's TCP connection, every byte of which is compared.
#[test]
#[ignore = "in the lab"]
fn lab_net_move_keeps_the_connection() {
    const SECOND: &str = "second";
    let mut config = Config::of_this_build().unwrap();
    config.two_uplinks = true;
    config.host_file_more = format!("[[netback]]\nname = \"{SECOND}\"\nuplink = \"{SECOND_UPLINK}\"\n");
    let system = start_with(config);
    let peer = Peer::start(&system).unwrap();
    let words = format!("bh.ip=10.77.0.2/{PREFIX} bh.work=tcp,ping bh.peer={ADDRESS}:{PEER_PORT}");
    let file = domain_file("debian13", 1, &words, None);
    let file = format!("{file}[[vif]]\nbackend = \"{}\"\nip = [\"10.77.0.2\"]\n", netback());
    let (guest, _console) = boot(&system, &file);
    let goes_on = || {
        let before = totals(&guest.lock().last);
        wait(&system, &guest, "more of the stream", |seen| {
            let now = totals(&seen.last);
            now.tcp > before.tcp + 200_000 && now.pings > before.pings
        });
    };
    goes_on();
    for backend in [SECOND, netback()] {
        system
            .bh_ok(&["network-move", "linux", "0", "--backend", backend])
            .unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(40)));
        goes_on();
    }
    let seen = guest.lock();
    let numbers = ["connects", "resets", "corrupt"].map(|key| seen.last["tcp"][key].as_u64());
    assert_eq!(numbers, [Some(1), Some(0), Some(0)], "{}", seen.last);
    assert_eq!(seen.boots, 1);
    println!("{}", seen.last);
    drop(seen);
    peer.stop();
}

//! netback's features, seen by frontends of the real system: several queues, offloads both ways, hashes, multicast filters,
//! headroom, filters, reconnection; and all of it once more after netback was killed.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::time::{Duration, Instant};

use bulkhead_tests::system::{Config, System};
use common::*;
use domain_kit::xs::XsOps;
use ends::*;
use frontends::netfront::{Options, PacketMeta};
use xen_abi::io::netif::*;

const QUEUES: usize = 4;
fn system() -> System {
    let mut config = Config::of_this_build().unwrap();
    config.host_file_more = format!("args = [\"--queues\", \"{QUEUES}\"]\n");
    start_with(config)
}

/// TCP over IPv4 or IPv6 with so many bytes of payload; no checksum yet.
fn tcp(to: [u8; 6], from: [u8; 6], v6: bool, ports: (u16, u16), payload: usize) -> Vec<u8> {
    let mut f = vec![0; 14];
    f[..6].copy_from_slice(&to);
    f[6..12].copy_from_slice(&from);
    if v6 {
        f[12..14].copy_from_slice(&[0x86, 0xdd]);
        f.extend([0x60, 0, 0, 0]);
        f.extend((20 + payload as u16).to_be_bytes());
        f.extend([6, 64]);
        f.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, from[5]]);
        f.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, to[5]]);
    } else {
        f[12..14].copy_from_slice(&[8, 0]);
        f.extend([0x45, 0]);
        f.extend((40 + payload as u16).to_be_bytes());
        f.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 77, 0, from[5], 10, 77, 0, to[5]]);
        let sum = netsum(&f[14..34], 0);
        f[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    f.extend(ports.0.to_be_bytes());
    f.extend(ports.1.to_be_bytes());
    f.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    f.extend((0..payload).map(|i| (i / 251) as u8 ^ i as u8));
    f
}

/// The internet checksum over words, with something added.
fn netsum(bytes: &[u8], add: u32) -> u16 {
    let mut sum: u32 = add;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Whether the TCP checksum of a packet is finished and right.
fn checksum_is_right(f: &[u8]) -> bool {
    let v6 = f[12..14] == [0x86, 0xdd];
    let (ip, addresses) = if v6 { (40, 22..54) } else { (20, 26..34) };
    let segment = &f[14 + ip..];
    let pseudo = !netsum(&f[addresses], segment.len() as u32 + 6);
    netsum(segment, pseudo.into()) == 0
}

fn is_tcp(f: &[u8]) -> bool {
    f[12..14] == [8, 0] && f[23] == 6 || f[12..14] == [0x86, 0xdd] && f[20] == 6
}

/// What all must be able to do at any time: `a` and `b` take everything whole, `c` takes neither large packets nor IPv6 checksums.
fn offloads_work(a: &mut End, b: &mut End, c: &mut End) {
    for v6 in [false, true] {
        let size = Some(1400);
        let meta = PacketMeta {
            csum_blank: true,
            gso_tcpv4: size.filter(|_| !v6),
            gso_tcpv6: size.filter(|_| v6),
            ..PacketMeta::default()
        };
        // Whole to one that can take it, checksum still blank.
        let large = tcp(b.mac, a.mac, v6, (1000, 2000), 50_000);
        a.send_on(1, &large, meta);
        let packet = b.receive(is_tcp);
        assert_eq!(packet.bytes.len(), large.len());
        assert_eq!(packet.bytes[80..], large[80..]);
        assert!(packet.meta.csum_blank);
        assert_eq!((packet.meta.gso_tcpv4, packet.meta.gso_tcpv6), (meta.gso_tcpv4, meta.gso_tcpv6));
        // In segments with finished checksums to one that cannot.
        let large = tcp(c.mac, a.mac, v6, (1000, 2000), 50_000);
        a.send_on(1, &large, meta);
        let header = large.len() - 50_000;
        let mut payload = Vec::new();
        while payload.len() < 50_000 {
            let packet = c.receive(is_tcp);
            assert!(packet.bytes.len() <= header + 1400 && checksum_is_right(&packet.bytes));
            assert!(
                !packet.meta.csum_blank && packet.meta.gso_tcpv4.is_none() && packet.meta.gso_tcpv6.is_none()
            );
            payload.extend_from_slice(&packet.bytes[header..]);
        }
        assert_eq!(payload, large[header..]);
        // A small one with a blank checksum: IPv4 stays blank, IPv6 is finished.
        let small = tcp(c.mac, a.mac, v6, (1000, 2000), 100);
        a.send_on(0, &small, PacketMeta { csum_blank: true, ..PacketMeta::default() });
        let packet = c.receive(is_tcp);
        assert_eq!(packet.meta.csum_blank, !v6);
        assert!(!v6 || checksum_is_right(&packet.bytes));
    }
}

/// Every queue carries packets each way.
fn queues_work(a: &mut End, b: &mut End) {
    for queue in 0..QUEUES {
        a.send_on(queue, &frame(b.mac, a.mac, 100 + queue as u8, 600), PacketMeta::default());
        b.receive(marked(100 + queue as u8));
    }
    // Flows are spread over the receiver's queues.
    let mut seen = [0; QUEUES];
    for port in 0..64 {
        a.send(&tcp(b.mac, a.mac, false, (port, 80), 10));
    }
    let deadline = Instant::now() + SOON;
    while seen.iter().sum::<usize>() < 64 {
        assert!(Instant::now() < deadline, "{seen:?}");
        b.front.clear();
        for (i, queue) in b.front.queues().iter_mut().enumerate() {
            while let Some(packet) = queue.rings.receive().unwrap() {
                seen[i] += usize::from(is_tcp(&packet.bytes));
            }
            queue.flush();
        }
    }
    assert!(seen.iter().all(|&n| n > 0), "{seen:?}");
}

const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 9];

fn filters_work(a: &mut End, b: &mut End) {
    a.send(&frame(GROUP, a.mac, 1, 100));
    a.send(&frame([1, 0, 0x5e, 0, 0, 10], a.mac, 2, 100));
    a.send(&frame([0xff; 6], a.mac, 3, 100));
    // They come by different queues, so in any order; the other group's is not among them.
    let mut seen = Vec::new();
    while seen.len() < 2 {
        seen.push(b.receive(|f| f[12..14] == EXPERIMENT).bytes[14]);
    }
    seen.sort_unstable();
    assert_eq!(seen, [1, 3]);
    assert!(b.receive_within(Duration::from_millis(50), marked(2)).is_none());
}

fn hashes_work(a: &mut End, b: &mut End) {
    a.send(&tcp(b.mac, a.mac, false, (7, 80), 10));
    let packet = b.receive(is_tcp);
    let (kind, value) = packet.meta.hash.expect("a hash");
    assert_eq!(kind, 1, "TCP over IPv4");
    let input: Vec<u8> = [&packet.bytes[26..34], &packet.bytes[34..38]].concat();
    assert_eq!(value, netback::hash::toeplitz(&[0xa5; 40], &input));
}

#[test]
fn every_feature_and_again_after_a_kill() {
    let system = system();
    let whole = Options { queues: QUEUES, ..Options::default() };
    let mut a = end(&system, 0, "", whole);
    let fancy = Options { multicast_control: true, ctrl: true, headroom: 256, ..whole };
    let mut b = end(&system, 1, "", fancy);
    let plain = Options { gso: false, ipv6_offloads: false, ..Options::default() };
    let mut c = end(&system, 2, "", plain);
    assert_eq!(a.front.queues().len(), QUEUES);

    // Hashes by the control ring.
    queues_work(&mut a, &mut b);
    let ctrl = b.front.ctrl().unwrap();
    assert_eq!(ctrl.call(XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS, [0; 3]), Ok(15));
    ctrl.call(XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM, [1, 0, 0]).unwrap();
    ctrl.call(XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS, [15, 0, 0]).unwrap();
    ctrl.call_with(XEN_NETIF_CTRL_TYPE_SET_HASH_KEY, &[0xa5; 40], 40, 0).unwrap();
    // A group's filter.
    assert!(b.front.queue().send_multicast(true, GROUP));
    b.front.flush();
    until(&system, "the filter is answered", || {
        b.front.clear();
        b.front.queue().reap().unwrap() > 0
    });

    for kills in 0..3 {
        if kills > 0 {
            let killed = system.kill(&[netback().to_owned()]).unwrap();
            system.wait_restarted(&killed, SOON).unwrap();
        }
        offloads_work(&mut a, &mut b, &mut c);
        hashes_work(&mut a, &mut b);
        filters_work(&mut a, &mut b);
        // With Toeplitz over ports, too, flows are spread.
        queues_work(&mut a, &mut b);
    }
    assert_eq!(system.services().unwrap()[netback()].generation, 3, "it did not end by itself");

    // A frontend that comes again, with other wishes.
    drop(b.front);
    b.front = connect(&system, &b.brain, Options::default());
    assert_eq!(b.front.queues().len(), 1);
    a.send(&frame(b.mac, a.mac, 9, 100));
    b.receive(marked(9));
    // Without the filter every group comes.
    a.send(&frame([1, 0, 0x5e, 0, 0, 10], a.mac, 10, 100));
    b.receive(marked(10));
}

#[test]
fn nobody_sends_with_anothers_address() {
    let system = system();
    let mut a = end(&system, 0, "ip = [\"10.77.0.11\"]", Options::default());
    let mut b = end(&system, 1, "", Options::default());
    let mut ip = tcp(b.mac, a.mac, false, (1, 2), 10);
    ip[26..30].copy_from_slice(&[10, 77, 0, 11]);
    let mut stolen = ip.clone();
    stolen[29] = 12;
    let mut other_mac = ip.clone();
    other_mac[11] = 99;
    let mut vlan = frame(b.mac, a.mac, 7, 100);
    vlan[12..14].copy_from_slice(&[0x81, 0]);
    for bad in [&stolen, &other_mac, &vlan] {
        a.send(bad);
    }
    a.send(&ip);
    let first = b.receive(|f| f[6..11] == a.mac[..5]);
    assert_eq!(first.bytes[..34], ip[..34], "the first to come is the honest one");
    until(&system, "three are counted", || counter(&system, "tx_spoofed") == 3);
    // The settings are kept: also a new incarnation knows, and changes of the toolstack's reach it.
    let killed = system.kill(&[netback().to_owned()]).unwrap();
    system.wait_restarted(&killed, SOON).unwrap();
    a.send(&stolen);
    until(&system, "counted", || counter(&system, "tx_spoofed") == 1);
}

/// Only who sent from an address hears what is sent to it, also of the next incarnation, which has heard nothing yet.
#[test]
fn learned_addresses_outlive_netback() {
    let system = system();
    let mut a = end(&system, 0, "antispoof = false", Options::default());
    let mut b = end(&system, 1, "", Options::default());
    let mut c = end(&system, 2, "antispoof = false", Options::default());
    let learned = [2, 0, 0, 0, 0, 0x77];
    b.send(&frame(learned, b.mac, 1, 100));
    a.receive(marked(1));
    c.receive(marked(1));
    a.send(&frame(b.mac, learned, 2, 100));
    b.receive(marked(2));
    for kills in 0..3 {
        if kills > 0 {
            let killed = system.kill(&[netback().to_owned()]).unwrap();
            system.wait_restarted(&killed, SOON).unwrap();
        }
        b.send(&frame(learned, b.mac, 3, 100));
        b.send(&frame(c.mac, b.mac, 4, 100));
        a.receive(marked(3));
        let first = c.receive(|f| f[12..14] == EXPERIMENT);
        assert!(marked(4)(&first.bytes), "after {kills} kills it was sent to all: {:?}", &first.bytes[..20]);
    }
}

#[test]
fn rules_rates_and_isolation() {
    let system = system();
    let rules = "ip = [\"10.77.0.1\"]\nantispoof = false\nfirewall = [\"action=drop proto=tcp dstports=25\", \"action=accept dst4=10.77.0.0/24\"]";
    let mut a = end(&system, 0, rules, Options::default());
    let mut b = end(&system, 1, "", Options::default());
    let mut alone = end(&system, 2, "isolated = true", Options::default());
    let mut slow = end(&system, 3, "rate = 1000000", Options::default());
    a.send(&tcp(b.mac, a.mac, false, (9, 25), 10));
    a.send(&tcp(b.mac, a.mac, false, (9, 26), 10));
    assert_eq!(b.receive(is_tcp).bytes[37], 26);
    assert_eq!(counter(&system, "tx_denied"), 1);
    // An isolated guest hears nobody and is heard by nobody.
    b.send(&frame([0xff; 6], b.mac, 1, 100));
    b.send(&frame(alone.mac, b.mac, 2, 100));
    alone.send(&frame(b.mac, alone.mac, 3, 100));
    a.receive(marked(1));
    assert!(alone.receive_within(Duration::from_millis(300), |f| f[12..14] == EXPERIMENT).is_none());
    assert!(b.receive_within(Duration::from_millis(300), marked(3)).is_none());
    // 1 MB/s: two megabytes take about two seconds, less what may go at once.
    let start = Instant::now();
    for _ in 0..1400 {
        slow.send(&frame(b.mac, slow.mac, 4, 1500));
        while b.receive_within(Duration::ZERO, |_| true).is_some() {}
    }
    let took = start.elapsed();
    assert!(took > Duration::from_millis(1300), "{took:?}");
}

/// XSA-392/424: one guest takes nothing, one floods, one sends garbage; the fourth's packets go to and fro as before.
#[test]
fn xsa_392_one_guest_leaves_the_others_alone() {
    let system = system();
    let mut a = end(&system, 0, "", Options::default());
    let mut b = end(&system, 1, "", Options::default());
    // Posts no buffers beyond the first 256.
    let deaf = end(&system, 2, "", Options::default());
    let mut flood = end(&system, 3, "", Options::default());
    let memory = |system: &System| service_process(system, netback()).status("RssShmem").unwrap_or_default();
    let trips = |a: &mut End, b: &mut End, count: u8| {
        let start = Instant::now();
        for i in 0..count {
            a.send(&frame(b.mac, a.mac, i, 200));
            b.receive(marked(i));
        }
        start.elapsed() / u32::from(count)
    };
    let quiet = trips(&mut a, &mut b, 100);
    // Far more than its ring and the backlog take.
    for i in 0..3000u32 {
        flood.send(&frame(deaf.mac, flood.mac, i as u8, 1514));
    }
    until(&system, "drops are counted", || counter(&system, "rx_dropped") > 500);
    let loud = trips(&mut a, &mut b, 100);
    println!(
        "a packet takes {quiet:?}, beside a deaf guest and a flood {loud:?}; netback's memory {}",
        memory(&system)
    );
    assert!(loud < quiet * 20 + Duration::from_millis(20), "{quiet:?} became {loud:?}");
    // Garbage: the vif is given up, the others are not.
    let xs = &flood.brain.xs;
    let state = format!("/local/domain/{}/device/vif/0/state", flood.brain.domain.domid());
    xs.write(&state, "5").unwrap();
    xs.write(&state, "6").unwrap();
    trips(&mut a, &mut b, 20);
    assert_eq!(system.services().unwrap()[netback()].generation, 1);
}

/// A DHCP message of a client, as the wire has it.
fn dhcp(mac: [u8; 6], kind: u8, wish: Option<[u8; 4]>) -> Vec<u8> {
    let mut body = vec![1, 1, 6, 0, 0, 0, 0, 9];
    body.resize(28, 0);
    body.extend(mac);
    body.resize(236, 0);
    body.extend([99, 130, 83, 99, 53, 1, kind]);
    if let Some(ip) = wish {
        body.extend([50, 4]);
        body.extend(ip);
    }
    body.push(255);
    let mut f = vec![0xff; 6];
    f.extend(mac);
    f.extend([8, 0, 0x45, 0]);
    f.extend((28 + body.len() as u16).to_be_bytes());
    f.extend([0, 1, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum = netsum(&f[14..34], 0);
    f[24..26].copy_from_slice(&sum.to_be_bytes());
    f.extend([0, 68, 0, 67]);
    f.extend((8 + body.len() as u16).to_be_bytes());
    f.extend([0, 0]);
    f.extend(body);
    f
}

impl End {
    /// The address in the server's answer of this kind.
    fn dhcp(&mut self, kind: u8, wish: Option<[u8; 4]>, answer: u8) -> [u8; 4] {
        self.send(&dhcp(self.mac, kind, wish));
        let packet = self.receive(|f| f[12..14] == [8, 0] && f[23] == 17 && f[34..38] == [0, 67, 0, 68]);
        // The first option is the message's type.
        assert_eq!(packet.bytes[42 + 240..42 + 243], [53, 1, answer]);
        packet.bytes[58..62].try_into().unwrap()
    }
}

/// A routed domain: DHCP leases and Qubes' rules are there again after a kill, routers are advertised, IPv6 is routed.
#[test]
fn leases_and_qubes_rules_outlive_netback() {
    let mut config = Config::of_this_build().unwrap();
    config.net_mode = "routed";
    config.host_file_more = "gateway = \"10.78.0.1/24\"\ngateway6 = \"fd00:0:0:78::1/64\"\n\
                             uplink_address = \"10.77.0.9/24\"\ndns = [\"10.77.0.1\"]\n"
        .into();
    let system = start_with(config);
    let gateway = netback::forward::TAP_MAC;
    let mut a = end(&system, 0, "", Options::default());
    let mut b = end(&system, 1, "ip = [\"10.78.0.5\"]\nra = false", Options::default());
    let offered = a.dhcp(1, None, 2);
    let ip = a.dhcp(3, Some(offered), 5);
    assert_eq!((ip, ip[..3] == [10, 78, 0]), (offered, true));
    assert_eq!(b.dhcp(1, None, 2), [10, 78, 0, 5], "the toolstack's");
    // A router for who asks, if it is to have one.
    let own = netback::switch::answer::link_local(a.mac).octets();
    let mut solicitation = vec![0x33, 0x33, 0, 0, 0, 2];
    solicitation.extend(a.mac);
    solicitation.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 58, 255]);
    solicitation.extend(own);
    solicitation.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 133, 0, 0, 0, 0, 0, 0, 0]);
    a.send(&solicitation);
    let said = a.receive(|f| f[12..14] == [0x86, 0xdd] && f[54] == 134);
    assert!(said.bytes.windows(8).any(|w| w == [0xfd, 0, 0, 0, 0, 0, 0, 0x78]), "the guests' network");

    let to_b = |port: u16| {
        let mut f = tcp(gateway, MACS[0], false, (9, port), 10);
        f[26..30].copy_from_slice(&ip);
        f[30..34].copy_from_slice(&[10, 78, 0, 5]);
        f
    };
    let root = format!(
        "/local/domain/{}/qubes-firewall/{}_{}_{}_{}",
        service_domid(&system, netback()),
        ip[0],
        ip[1],
        ip[2],
        ip[3]
    );
    a.send(&to_b(80));
    assert_eq!(b.receive(is_tcp).bytes[36..38], [0, 80]);
    for (node, value) in [("/policy", "drop"), ("/0000", "action=accept proto=tcp dstports=81-81"), ("", "")]
    {
        system.bh_ok(&["store", "write", &format!("{root}{node}"), value]).unwrap();
    }
    until(&system, "the rule holds", || {
        a.send(&to_b(80));
        b.receive_within(Duration::from_millis(50), is_tcp).is_none()
    });
    for _ in 0..2 {
        a.send(&to_b(80));
        a.send(&to_b(81));
        assert_eq!(b.receive(is_tcp).bytes[36..38], [0, 81]);
        assert_eq!(a.dhcp(3, Some(ip), 5), ip, "the lease is renewed");
        let killed = system.kill(&[netback().to_owned()]).unwrap();
        system.wait_restarted(&killed, SOON).unwrap();
    }
    system.bh_ok(&["store", "rm", &root]).unwrap();
    until(&system, "the rules are gone", || {
        a.send(&to_b(80));
        b.receive_within(Duration::from_millis(50), is_tcp).is_some()
    });
}

//! TAP, bridge, routes and NAT in a network namespace of the test's own. Needs root (CAP_NET_ADMIN); says so where it has not.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use domain_kit::mem::SharedMem;
use netback::forward::{Mode, TAP_MAC, Wiring, WiringError};
use netback::netlink::Netlink;
use netback::offload::{VNET_HDR_LEN, checksum};
use netback::tap::Tap;
use netback::uplink::NAME;

/// Runs in a thread with a network namespace of its own.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        if let Err(e) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
            eprintln!("not run: no network namespace can be made here ({e})");
            return;
        }
        if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open(netback::tap::TUN_DEVICE) {
            eprintln!("not run: /dev/net/tun ({e})");
            return;
        }
        test();
    };
    std::thread::spawn(run).join().expect("the test's thread");
}

fn wiring(mode: Mode) -> Wiring {
    Wiring {
        uplink: Some("up0".into()),
        gateway: Some("10.9.0.1/24".parse().unwrap()),
        uplink_address: Some("192.168.9.2/24".parse().unwrap()),
        uplink_gateway: Some(Ipv4Addr::new(192, 168, 9, 1)),
        ..Wiring::new(mode)
    }
}

fn broadcast(from: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![from; len];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[0, 0x16, 0x3e, 0, 0, from]);
    // A local experimental ethertype (IEEE 802): nobody answers it.
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

fn send(tap: &Tap, mem: &SharedMem, frame: &[u8]) {
    mem.zero(0, VNET_HDR_LEN);
    mem.copy_in(VNET_HDR_LEN, frame);
    assert!(tap.write(mem, 0, VNET_HDR_LEN + frame.len()).unwrap().is_some());
}

/// Sends until it has come through: a link that was just set up drops what comes before the kernel has seen its carrier.
fn carry(from: &Tap, to: &Tap, mem: &SharedMem, frame: &[u8]) {
    for _ in 0..50 {
        send(from, mem, frame);
        if read_within(to, mem, Duration::from_millis(200), |f| f == frame).is_some() {
            return;
        }
    }
    panic!("no frame comes through");
}

/// Reads until a frame comes that fits.
fn read_until(tap: &Tap, mem: &SharedMem, fits: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    read_within(tap, mem, Duration::from_secs(5), fits)
}

fn read_within(tap: &Tap, mem: &SharedMem, time: Duration, fits: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        match tap.read(mem, 0, 70_000).expect("read") {
            None => std::thread::sleep(Duration::from_millis(1)),
            Some(n) => {
                let mut frame = vec![0; n - VNET_HDR_LEN];
                mem.copy_out(VNET_HDR_LEN, &mut frame);
                if fits(&frame) {
                    return Some(frame);
                }
            }
        }
    }
    None
}

/// The outside's end of the uplink, as another TAP joined to it by a bridge of the test's own.
fn outside(netlink: &mut Netlink) -> Tap {
    netlink.add_veth("up0", "out0").unwrap();
    let tap = Tap::create("out-tap").unwrap();
    let bridge = netlink.ensure_bridge("out-br").unwrap();
    for name in ["out0", "out-tap"] {
        let link = netlink.link(name).unwrap();
        netlink.no_ipv6_of_its_own(link.index).unwrap();
        netlink.set_master(link.index, bridge.index).unwrap();
        netlink.set_up(link.index).unwrap();
    }
    netlink.set_up(bridge.index).unwrap();
    tap
}

#[test]
fn bridged_joins_tap_and_uplink_and_is_found_again() {
    in_namespace(|| {
        let mut netlink = Netlink::open().unwrap();
        let wiring = wiring(Mode::Bridge);
        let tap = Tap::create(NAME).unwrap();
        assert!(matches!(wiring.prepare(&mut netlink, NAME), Err(WiringError::NoUplink(_))));
        let out = outside(&mut netlink);
        wiring.prepare(&mut netlink, NAME).unwrap();
        assert_eq!(netlink.link(NAME).unwrap().mac, TAP_MAC);
        let (mem, _fd) = SharedMem::create("test", 128 << 10).unwrap();
        for (from, to, sender) in [(&tap, &out, 1), (&out, &tap, 2)] {
            let frame = broadcast(sender, 600);
            carry(from, to, &mem, &frame);
        }
        // A new incarnation finds it all: the same descriptor, the same set-up, and nothing changes.
        let again = Tap::from_fd(tap.as_fd().try_clone_to_owned().unwrap()).unwrap();
        drop(tap);
        assert_eq!(again.name(), NAME);
        let before = netlink.link(NAME).unwrap();
        wiring.prepare(&mut netlink, NAME).unwrap();
        assert_eq!(netlink.link(NAME).unwrap(), before);
        let frame = broadcast(3, 60);
        carry(&out, &again, &mem, &frame);
    });
}

/// A frame whose headers make no sense is refused by the kernel, and nothing else happens.
#[test]
fn nonsense_headers_are_refused() {
    in_namespace(|| {
        let mut netlink = Netlink::open().unwrap();
        let wiring = Wiring { uplink: None, ..wiring(Mode::Bridge) };
        let tap = Tap::create(NAME).unwrap();
        wiring.prepare(&mut netlink, NAME).unwrap();
        let (mem, _fd) = SharedMem::create("test", 4096).unwrap();
        mem.copy_in(0, &[1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        mem.copy_in(VNET_HDR_LEN, &broadcast(1, 60));
        assert!(tap.write(&mem, 0, VNET_HDR_LEN + 60).is_err());
    });
}

const GUEST_MAC: [u8; 6] = [0, 0x16, 0x3e, 0, 0, 7];

/// An ICMP echo request in Ethernet.
fn echo(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut f = vec![0; 42];
    f[..6].copy_from_slice(&TAP_MAC);
    f[6..12].copy_from_slice(&GUEST_MAC);
    f[12..14].copy_from_slice(&[8, 0]);
    f[14..24].copy_from_slice(&[0x45, 0, 0, 28, 0, 1, 0, 0, 64, 1]);
    f[26..30].copy_from_slice(&from);
    f[30..34].copy_from_slice(&to);
    let sum = checksum(&f[14..34]);
    f[24..26].copy_from_slice(&sum.to_be_bytes());
    f[34..42].copy_from_slice(&[8, 0, 0, 0, 0x42, 0x48, 0, 1]);
    let sum = checksum(&f[34..42]);
    f[36..38].copy_from_slice(&sum.to_be_bytes());
    f
}

/// Routed and NAT: a guest's packet comes out at the uplink, in NAT mode with the uplink's address, and the answer comes back.
#[test]
fn routed_and_nat_carry_a_guests_packets() {
    for mode in [Mode::Routed, Mode::Nat] {
        in_namespace(move || {
            let mut netlink = Netlink::open().unwrap();
            let tap = Tap::create(NAME).unwrap();
            let none = Wiring { gateway: None, ..wiring(mode) };
            assert!(matches!(none.prepare(&mut netlink, NAME), Err(WiringError::NoGateway)));
            let out = outside(&mut netlink);
            let wiring = wiring(mode);
            // Twice: a restart finds everything there.
            for _ in 0..2 {
                wiring.prepare(&mut netlink, NAME).unwrap();
                wiring.route_to(&mut netlink, NAME, Ipv4Addr::new(10, 9, 0, 2).into()).unwrap();
            }
            let (mem, _fd) = SharedMem::create("test", 128 << 10).unwrap();
            send(&tap, &mem, &echo([10, 9, 0, 2], [192, 168, 9, 1]));
            // The domain's kernel asks the outside for its address first.
            let ask = read_until(&out, &mem, |f| f[12..14] == [8, 6] && f[38..42] == [192, 168, 9, 1])
                .expect("ARP");
            let out_mac = [2, 0, 0, 0, 0, 9];
            let mut answer = vec![0; 42];
            answer[..6].copy_from_slice(&ask[6..12]);
            answer[6..12].copy_from_slice(&out_mac);
            answer[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
            answer[22..28].copy_from_slice(&out_mac);
            answer[28..32].copy_from_slice(&[192, 168, 9, 1]);
            answer[32..38].copy_from_slice(&ask[6..12]);
            answer[38..42].copy_from_slice(&ask[28..32]);
            send(&out, &mem, &answer);
            let seen =
                read_until(&out, &mem, |f| f[12..14] == [8, 0] && f[34] == 8).expect("the echo request");
            let from = if mode == Mode::Nat { [192, 168, 9, 2] } else { [10, 9, 0, 2] };
            assert_eq!(seen[26..30], from, "{mode:?}");
            // The reply.
            let mut reply = seen.clone();
            reply[..6].copy_from_slice(&seen[6..12]);
            reply[6..12].copy_from_slice(&out_mac);
            reply[26..30].copy_from_slice(&[192, 168, 9, 1]);
            reply[30..34].copy_from_slice(&from);
            (reply[34], reply[36], reply[37]) = (0, 0, 0);
            let sum = checksum(&reply[34..42]);
            reply[36..38].copy_from_slice(&sum.to_be_bytes());
            send(&out, &mem, &reply);
            // The kernel asks for the guest, which the switch would answer.
            let ask =
                read_until(&tap, &mem, |f| f[12..14] == [8, 6] && f[38..42] == [10, 9, 0, 2]).expect("ARP");
            let headers = netback::headers::Headers::parse(&ask);
            send(&tap, &mem, &netback::switch::answer::arp(&headers.arp().unwrap(), GUEST_MAC));
            let back = read_until(&tap, &mem, |f| f[12..14] == [8, 0] && f[34] == 0).expect("the reply");
            assert_eq!((&back[..6], &back[30..34]), (&GUEST_MAC[..], &[10, 9, 0, 2][..]));
        });
    }
}

/// An ICMPv6 message in Ethernet.
fn icmpv6(dst: [u8; 6], src: [u8; 6], from: Ipv6Addr, to: Ipv6Addr, body: &[u8]) -> Vec<u8> {
    let mut f = Vec::new();
    f.extend(dst);
    f.extend(src);
    f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, body.len() as u8, 58, 255]);
    f.extend(from.octets());
    f.extend(to.octets());
    let pseudo = [&f[22..54], &[0, 0, 0, body.len() as u8, 0, 0, 0, 58], body].concat();
    let sum = checksum(&pseudo);
    f.extend(body);
    f[56..58].copy_from_slice(&sum.to_be_bytes());
    f
}

/// A neighbour solicitation for `target` in this frame.
fn asks_for(f: &[u8], target: Ipv6Addr) -> bool {
    netback::headers::Headers::parse(f).neighbour() == Some((135, target))
}

/// The same with IPv6: forwarding without an answer of the host's own, NAT66, and in routed mode the uplink answers for guests.
#[test]
fn routed_and_nat_carry_ipv6() {
    for mode in [Mode::Routed, Mode::Nat] {
        in_namespace(move || {
            if !std::path::Path::new("/proc/sys/net/ipv6/conf/all/forwarding").exists() {
                eprintln!("not run: the kernel has no IPv6");
                return;
            }
            let ip = |text: &str| text.parse::<Ipv6Addr>().unwrap();
            let (guest, peer, own) = (ip("fd00:0:0:9::2"), ip("2001:db8:9::1"), ip("2001:db8:9::2"));
            let mut netlink = Netlink::open().unwrap();
            let tap = Tap::create(NAME).unwrap();
            let out = outside(&mut netlink);
            let wiring = Wiring {
                gateway6: Some("fd00:0:0:9::1/64".parse().unwrap()),
                uplink_address6: Some("2001:db8:9::2/64".parse().unwrap()),
                uplink_gateway6: Some(peer),
                ..wiring(mode)
            };
            for _ in 0..2 {
                wiring.prepare(&mut netlink, NAME).unwrap();
                wiring.route_to(&mut netlink, NAME, guest.into()).unwrap();
            }
            let (mem, _fd) = SharedMem::create("test", 128 << 10).unwrap();
            let out_mac = [2, 0, 0, 0, 0, 9];
            let echo = icmpv6(TAP_MAC, GUEST_MAC, guest, peer, &[128, 0, 0, 0, 0x42, 0x48, 0, 1]);
            // The outside's answers to the domain's kernel, which asks for its neighbour first. A link that was just set up drops what
            // comes too early: sent again until it was seen.
            let mut seen = None;
            for _ in 0..20 {
                send(&tap, &mem, &echo);
                let next = read_within(&out, &mem, Duration::from_millis(500), |f| {
                    asks_for(f, peer) || (f[12..14] == [0x86, 0xdd] && f[54] == 128)
                });
                match next {
                    Some(f) if f[54] == 128 => {
                        seen = Some(f);
                        break;
                    }
                    Some(ask) => {
                        let h = netback::headers::Headers::parse(&ask);
                        send(&out, &mem, &netback::switch::answer::neighbour(&h, out_mac).unwrap());
                    }
                    None => {}
                }
            }
            let seen = seen.expect("the echo request");
            let from = if mode == Mode::Nat { own } else { guest };
            assert_eq!((&seen[22..38], seen[21]), (&from.octets()[..], 254), "{mode:?}");
            // The reply; in routed mode the outside finds the guest at the uplink.
            let uplink_mac: [u8; 6] = seen[6..12].try_into().unwrap();
            if mode == Mode::Routed {
                let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
                body.extend(guest.octets());
                body.extend([1, 1]);
                body.extend(out_mac);
                let group: Ipv6Addr = "ff02::1:ff00:2".parse().unwrap();
                send(&out, &mem, &icmpv6([0x33, 0x33, 0xff, 0, 0, 2], out_mac, peer, group, &body));
                let said = read_until(&out, &mem, |f| {
                    netback::headers::Headers::parse(f).neighbour() == Some((136, guest))
                });
                assert_eq!(said.expect("an advertisement for the guest")[6..12], uplink_mac);
            }
            let reply = icmpv6(uplink_mac, out_mac, peer, from, &[129, 0, 0, 0, seen[58], seen[59], 0, 1]);
            send(&out, &mem, &reply);
            // The kernel asks for the guest, which the switch would answer.
            let ask = read_until(&tap, &mem, |f| asks_for(f, guest)).expect("a solicitation for the guest");
            let h = netback::headers::Headers::parse(&ask);
            send(&tap, &mem, &netback::switch::answer::neighbour(&h, GUEST_MAC).unwrap());
            let back =
                read_until(&tap, &mem, |f| f[12..14] == [0x86, 0xdd] && f[54] == 129).expect("the reply");
            assert_eq!((&back[..6], &back[38..54]), (&GUEST_MAC[..], &guest.octets()[..]));
        });
    }
}

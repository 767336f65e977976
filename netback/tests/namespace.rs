//! TAPs, bridge and routes in a network namespace of the test's own. Needs root (CAP_NET_ADMIN); says so where it has not.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use domain_kit::mem::SharedMem;
use netback::forward::{BRIDGE, Mode, TAP_MAC, Wiring, WiringError};
use netback::netlink::Netlink;
use netback::offload::VNET_HDR_LEN;
use netback::tap::{Offloads, Tap};

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
        mode,
        uplink: Some("up0".into()),
        gateway: Some("10.9.0.1/24".parse().unwrap()),
        uplink_address: Some("192.168.9.2/24".parse().unwrap()),
        uplink_gateway: Some(Ipv4Addr::new(192, 168, 9, 1)),
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

/// Reads until a frame of that sender comes.
fn read_from(tap: &Tap, mem: &SharedMem, sender: u8) -> Option<Vec<u8>> {
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        match tap.read(mem, 0, 70_000).expect("read") {
            None => std::thread::sleep(Duration::from_millis(1)),
            Some(n) => {
                let mut frame = vec![0; n - VNET_HDR_LEN];
                mem.copy_out(VNET_HDR_LEN, &mut frame);
                if frame[11] == sender {
                    return Some(frame);
                }
            }
        }
    }
    None
}

#[test]
fn bridge_carries_frames_between_vifs_and_is_found_again() {
    in_namespace(|| {
        let mut netlink = Netlink::open().unwrap();
        let wiring = wiring(Mode::Bridge);
        assert!(matches!(wiring.prepare(&mut netlink), Err(WiringError::NoUplink(_))));
        netlink.add_veth("up0", "out0").unwrap();
        wiring.prepare(&mut netlink).unwrap();
        let taps = ["vif1.0", "vif2.0"].map(|name| {
            let tap = Tap::create(name).unwrap();
            tap.set_offloads(Offloads { csum: true, gso_tcpv4: true, sg: true, ..Offloads::default() })
                .unwrap();
            wiring.attach(&mut netlink, name, 1500, None).unwrap();
            tap
        });
        let bridge = netlink.link(BRIDGE).unwrap();
        for name in ["up0", "vif1.0", "vif2.0"] {
            let link = netlink.link(name).unwrap();
            assert!(link.up && link.master == bridge.index, "{name}");
        }
        assert_eq!(netlink.link("vif1.0").unwrap().mac, TAP_MAC);

        let (mem, _fd) = SharedMem::create("test", 128 << 10).unwrap();
        let frame = broadcast(1, 600);
        mem.zero(0, VNET_HDR_LEN);
        mem.copy_in(VNET_HDR_LEN, &frame);
        assert!(taps[0].write(&mem, 0, VNET_HDR_LEN + frame.len()).unwrap().is_some());
        assert_eq!(read_from(&taps[1], &mem, 1), Some(frame));

        // A new incarnation finds it all: the same descriptor, the same set-up, and nothing changes.
        let [first, second] = taps;
        use std::os::fd::AsFd;
        let again = Tap::from_fd(first.as_fd().try_clone_to_owned().unwrap()).unwrap();
        drop(first);
        assert_eq!(again.name(), "vif1.0");
        let before = netlink.link("vif1.0").unwrap();
        wiring.prepare(&mut netlink).unwrap();
        wiring.attach(&mut netlink, "vif1.0", 1500, None).unwrap();
        assert_eq!(netlink.link("vif1.0").unwrap(), before);
        let frame = broadcast(2, 60);
        mem.zero(0, VNET_HDR_LEN);
        mem.copy_in(VNET_HDR_LEN, &frame);
        second.write(&mem, 0, VNET_HDR_LEN + frame.len()).unwrap();
        assert_eq!(read_from(&again, &mem, 2), Some(frame));
    });
}

/// A frame whose headers make no sense is refused by the kernel, and nothing else happens.
#[test]
fn nonsense_headers_are_refused() {
    in_namespace(|| {
        let mut netlink = Netlink::open().unwrap();
        let wiring = Wiring { uplink: None, ..wiring(Mode::Bridge) };
        wiring.prepare(&mut netlink).unwrap();
        let tap = Tap::create("vif1.0").unwrap();
        wiring.attach(&mut netlink, "vif1.0", 1500, None).unwrap();
        let (mem, _fd) = SharedMem::create("test", 4096).unwrap();
        mem.copy_in(0, &[1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        mem.copy_in(VNET_HDR_LEN, &broadcast(1, 60));
        assert!(tap.write(&mem, 0, VNET_HDR_LEN + 60).is_err());
    });
}

/// A guest's ARP request for its gateway is answered by the routed driver domain.
#[test]
fn routed_mode_answers_for_the_gateway() {
    in_namespace(|| {
        let mut netlink = Netlink::open().unwrap();
        netlink.add_veth("up0", "out0").unwrap();
        let out = netlink.link("out0").unwrap();
        netlink.set_up(out.index).unwrap();
        let none = Wiring { gateway: None, ..wiring(Mode::Routed) };
        assert!(matches!(none.prepare(&mut netlink), Err(WiringError::NoGateway)));
        let wiring = wiring(Mode::Routed);
        let tap = Tap::create("vif1.0").unwrap();
        // Twice: a restart finds everything there.
        for _ in 0..2 {
            wiring.prepare(&mut netlink).unwrap();
            wiring.attach(&mut netlink, "vif1.0", 1500, Some(Ipv4Addr::new(10, 9, 0, 2))).unwrap();
        }
        let (mem, _fd) = SharedMem::create("test", 128 << 10).unwrap();
        let mut arp = broadcast(7, 42);
        arp[12..14].copy_from_slice(&[8, 6]);
        arp[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
        arp[22..28].copy_from_slice(&[0, 0x16, 0x3e, 0, 0, 7]);
        arp[28..32].copy_from_slice(&[10, 9, 0, 2]);
        arp[32..38].fill(0);
        arp[38..42].copy_from_slice(&[10, 9, 0, 1]);
        mem.zero(0, VNET_HDR_LEN);
        mem.copy_in(VNET_HDR_LEN, &arp);
        tap.write(&mem, 0, VNET_HDR_LEN + arp.len()).unwrap();
        let answer = read_from(&tap, &mem, TAP_MAC[5]).expect("an answer");
        assert_eq!(&answer[12..14], [8, 6]);
        assert_eq!(answer[21], 2, "a reply");
        assert_eq!(&answer[28..32], [10, 9, 0, 1]);
    });
}

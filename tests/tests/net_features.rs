//! What a frontend may ask of netback and ours never does: one event channel for both rings; jumbo frames; and what netback refuses.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::time::{Duration, Instant};

use bulkhead_tests::system::System;
use common::*;
use domain_kit::evtchn::Port;
use domain_kit::grants::Region;
use domain_kit::mem::Page;
use domain_kit::ring::Span;
use domain_kit::xenbus::{Frontend, XenbusState};
use ends::*;
use frontends::netfront::queue::{BUFFER_PAGES, NetQueue};
use frontends::netfront::{Options, PacketMeta};
use hv_abi::PAGE_SIZE;

/// A device as simple as netif.h allows it.
struct Plain {
    rings: NetQueue<Page, Span>,
    port: Port,
}

/// Asks for one, with these nodes in the place of or besides what is right; waits for no answer.
fn ask(brain: &Brain, tag: u64, nodes: &[(&'static str, &str)]) -> (Plain, Frontend) {
    let hv = &brain.domain.hv;
    let front = Frontend::open(&brain.xs, brain.domain.domid(), "vif", 0).unwrap();
    front.publish(&[], XenbusState::Initialising).unwrap();
    front.wait_backend(&[XenbusState::InitWait], SOON).unwrap();
    let region = Region::create(hv, front.backend_domid, (2 + BUFFER_PAGES) as u32, tag).unwrap();
    let buffers = Span::new(region.mem.clone(), 2 * PAGE_SIZE, BUFFER_PAGES * PAGE_SIZE);
    let page = |i| Page::new(region.mem.clone(), i);
    let mut rings = NetQueue::new(page(0), page(1), buffers, region.gref(2));
    rings.push();
    let port = hv.port_alloc_unbound(front.backend_domid).unwrap();
    let mut all: Vec<(&str, String)> = vec![
        ("tx-ring-ref", region.gref(0).to_string()),
        ("rx-ring-ref", region.gref(1).to_string()),
        ("event-channel", port.port.to_string()),
    ];
    // What the device asked for when it was another.
    for name in ["event-channel-tx", "event-channel-rx"] {
        let _absent_is_fine = domain_kit::xs::XsOps::rm(
            &brain.xs,
            &format!("/local/domain/{}/device/vif/0/{name}", brain.domain.domid()),
        );
    }
    let right = [
        ("request-rx-copy", "1"),
        ("feature-rx-notify", "1"),
        ("feature-sg", "1"),
        ("multi-queue-num-queues", "1"),
        ("xdp-headroom", "0"),
    ];
    let kept = right.iter().filter(|(name, _)| nodes.iter().all(|(other, _)| other != name));
    all.extend(kept.chain(nodes).map(|&(name, value)| (name, value.to_owned())));
    front.publish(&all, XenbusState::Connected).unwrap();
    (Plain { rings, port }, front)
}

impl Plain {
    fn send(&mut self, frame: &[u8]) {
        self.rings.reap().unwrap();
        assert!(self.rings.send(frame, PacketMeta::default()));
        self.flush();
    }

    fn flush(&mut self) {
        let (tx, rx) = self.rings.push();
        if tx || rx {
            self.port.notify();
        }
    }

    /// The next packet of the experiments' type; by events alone.
    fn receive(&mut self) -> Vec<u8> {
        let deadline = Instant::now() + SOON;
        loop {
            while let Some(packet) = self.rings.receive().unwrap() {
                self.flush();
                if packet.bytes[12..14] == EXPERIMENT {
                    return packet.bytes;
                }
            }
            assert!(Instant::now() < deadline, "nothing came");
            if !self.rings.final_check().unwrap() {
                self.port.wait(Some(Duration::from_secs(1))).unwrap();
            }
        }
    }
}

/// With and without a kill in between: packets of 9000 bytes and small ones, both ways.
#[test]
fn one_event_channel_and_jumbo_frames() {
    let system = start();
    let mut a = end(&system, 0, "mtu = 9000", Options::default());
    let End { brain, front, mac } = end(&system, 1, "mtu = 9000", Options::default());
    let mut c = end(&system, 2, "", Options::default());
    drop(front);
    let (mut b, state) = ask(&brain, 7, &[]);
    state.wait_backend(&[XenbusState::Connected], SOON).unwrap();
    assert_eq!(state.backend_node("hotplug-status").unwrap().as_deref(), Some("connected"));
    for kills in 0..2 {
        if kills > 0 {
            let killed = system.kill(&[netback().to_owned()]).unwrap();
            system.wait_restarted(&killed, SOON).unwrap();
        }
        for len in [9014, 60, 4097] {
            let mut to_b = frame(mac, a.mac, 1, len);
            to_b[20] = kills;
            a.send(&to_b);
            assert_eq!(b.receive(), to_b);
            let to_a = frame(a.mac, mac, 2, len);
            b.send(&to_a);
            assert_eq!(a.receive(marked(2)).bytes, to_a);
        }
        // Nobody said that this one takes so much.
        let before = counter(&system, "rx_dropped");
        a.send(&frame(c.mac, a.mac, 3, 9014));
        a.send(&frame(c.mac, a.mac, 4, 1514));
        assert_eq!(c.receive(|f| f[12..14] == EXPERIMENT).bytes[14], 4);
        assert_eq!(counter(&system, "rx_dropped"), before + 1);
    }
}

fn refused(system: &System, brain: &Brain, why: &str) {
    let path = format!(
        "/local/domain/{}/error/backend/vif/{}/0/error",
        service_domid(system, netback()),
        brain.domain.domid()
    );
    until(system, why, || system.bh_ok(&["store", "read", &path]).is_ok_and(|text| text.contains(why)));
}

/// Headroom in front of packets comes and goes while the device is connected, as when Linux loads an XDP program; netback is killed
/// with it and without.
#[test]
fn xdp_headroom_changes_while_connected() {
    let system = start();
    let mut a = end(&system, 0, "", Options::default());
    let End { brain, front, mac } = end(&system, 1, "", Options::default());
    drop(front);
    let (mut b, state) = ask(&brain, 7, &[]);
    state.wait_backend(&[XenbusState::Connected], SOON).unwrap();
    let mut exchange = |b: &mut Plain, headroom: usize| {
        for (i, len) in [60, 1000, 1514].into_iter().enumerate() {
            let packet = frame(mac, a.mac, i as u8, len);
            a.send(&packet);
            assert!(b.receive() == packet, "{len} bytes behind {headroom}");
            b.send(&frame(a.mac, mac, i as u8, len));
            a.receive(marked(i as u8));
        }
    };
    exchange(&mut b, 0);
    for headroom in [256, 0, 100, 256] {
        state.publish(&[("xdp-headroom", headroom.to_string())], XenbusState::Reconfiguring).unwrap();
        state.wait_backend(&[XenbusState::Reconfigured], SOON).unwrap();
        b.rings = b.rings.with_headroom(headroom);
        state.publish(&[], XenbusState::Connected).unwrap();
        state.wait_backend(&[XenbusState::Connected], SOON).unwrap();
        exchange(&mut b, headroom);
        let killed = system.kill(&[netback().to_owned()]).unwrap();
        system.wait_restarted(&killed, SOON).unwrap();
        exchange(&mut b, headroom);
    }
}

/// A frontend hears why it is not served, nobody else notices, and it may come again.
#[test]
fn what_is_refused_is_told() {
    let system = start();
    let mut a = end(&system, 0, "", Options::default());
    let End { brain, front, mac } = end(&system, 1, "", Options::default());
    drop(front);
    for (tag, (node, value, why)) in [
        ("request-rx-copy", "0", "pages are not flipped"),
        ("feature-rx-notify", "0", "does not notify of rx requests"),
        ("multi-queue-num-queues", "99", "wants 99 queues"),
        ("xdp-headroom", "300", "300 bytes of headroom"),
    ]
    .into_iter()
    .enumerate()
    {
        let _device = ask(&brain, tag as u64, &[(node, value)]);
        refused(&system, &brain, why);
    }
    let (mut b, state) = ask(&brain, 9, &[]);
    state.wait_backend(&[XenbusState::Connected], SOON).unwrap();
    a.send(&frame(mac, a.mac, 1, 100));
    assert_eq!(b.receive()[14], 1);
    assert_eq!(system.services().unwrap()[netback()].generation, 1, "it did not end by itself");
}

//! Frontends of the real system that a test drives packet by packet.
#![allow(dead_code, reason = "each test program uses a part")]

use std::time::{Duration, Instant};

use bulkhead_tests::system::System;
use frontends::netfront::{NetFront, Options, Packet, PacketMeta};

use super::common::*;

pub const MACS: [[u8; 6]; 4] =
    [[0, 0x16, 0x3e, 0, 0, 1], [0, 0x16, 0x3e, 0, 0, 2], [0, 0x16, 0x3e, 0, 0, 3], [0, 0x16, 0x3e, 0, 0, 4]];
/// A type for experiments (IEEE 802): nobody answers it.
pub const EXPERIMENT: [u8; 2] = [0x88, 0xb5];

pub struct End {
    pub brain: Brain,
    pub front: NetFront,
    pub mac: [u8; 6],
}

/// A guest with one vif; `more` are lines of its `[[vif]]`.
pub fn end(system: &System, n: usize, more: &str, options: Options) -> End {
    let mac = MACS[n];
    let text: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
    let name = format!("guest{n}");
    let file = format!(
        "{}[[vif]]\nbackend = \"{}\"\nmac = \"{}\"\n{more}\n",
        probe_file(&name, None),
        netback(),
        text.join(":")
    );
    create(system, &file);
    let brain = Brain::of(system, &name);
    let front = connect(system, &brain, options);
    End { brain, front, mac }
}

pub fn connect(system: &System, brain: &Brain, options: Options) -> NetFront {
    NetFront::connect_with(&brain.domain.hv, &brain.xs, brain.domain.domid(), 0, options, SOON)
        .unwrap_or_else(|e| panic!("{e}\n{}", system.log_tail(25)))
}

impl End {
    pub fn send_on(&mut self, queue: usize, frame: &[u8], meta: PacketMeta) {
        let deadline = Instant::now() + SOON;
        let queue = &mut self.front.queues()[queue];
        loop {
            queue.clear();
            queue.rings.reap().unwrap();
            if queue.rings.send(frame, meta) {
                break;
            }
            assert!(Instant::now() < deadline, "no room in the tx ring");
            std::thread::sleep(Duration::from_millis(1));
        }
        queue.flush();
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.send_on(0, frame, PacketMeta::default());
    }

    /// The next packet that fits, within a time.
    pub fn receive_within(&mut self, time: Duration, fits: impl Fn(&[u8]) -> bool) -> Option<Packet> {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            self.front.clear();
            for queue in self.front.queues() {
                queue.rings.reap().unwrap();
            }
            while let Some(packet) = self.front.receive_any().unwrap() {
                self.front.flush();
                if fits(&packet.bytes) {
                    return Some(packet);
                }
            }
            self.front.flush();
            if !self.front.final_check().unwrap() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        None
    }

    pub fn receive(&mut self, fits: impl Fn(&[u8]) -> bool) -> Packet {
        self.receive_within(SOON, fits).expect("a packet")
    }
}

/// A packet each way, the answer marked with the next number.
pub fn trip(a: &mut End, b: &mut End, mark: u8) {
    a.send(&frame(b.mac, a.mac, mark, 200));
    b.receive(marked(mark));
    b.send(&frame(a.mac, b.mac, mark + 1, 300));
    a.receive(marked(mark + 1));
}

pub fn frame(to: [u8; 6], from: [u8; 6], mark: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![mark; len];
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12..14].copy_from_slice(&EXPERIMENT);
    frame
}

pub fn marked(mark: u8) -> impl Fn(&[u8]) -> bool {
    move |bytes| bytes[12..14] == EXPERIMENT && bytes[14] == mark
}

/// The sum of a counter of netback's over all vifs.
pub fn counter(system: &System, name: &str) -> u64 {
    let json = system.bh_json(&["services"]).unwrap();
    let all = json["services"].as_array().unwrap();
    let found = all.iter().find(|s| s["name"] == netback()).unwrap();
    let counters = found["counters"].as_array().unwrap();
    counters.iter().filter(|c| c["name"] == name).filter_map(|c| c["value"].as_u64()).sum()
}

//! The net journal under a crash at every step.
//!
//! The real queues and the uplink's spool run over memory that counts stores and "kills" the process before the n-th one (a copy is torn in
//! its middle), and over an outside and a hypervisor that can kill it before and after each packet and each copied
//! piece. A new incarnation then re-attaches. Explored: every single crash, every pair of crashes whose second comes
//! within the recovery (and a stride of all later ones), and a poison packet each way that crashes by itself.
//!
//! Seen through the eyes of the frontend ([`common::Guest`]) and of the outside: every tx slot is answered exactly once, in order,
//! extra info with NULL; no page is touched once its slot is answered; no packet goes out or comes in twice, none out of
//! its destination's order (there are two each way, and one overtakes the other), none damaged; each kill loses at most one.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;

use common::{Guest, Outgoing, Pages, deliver};
use domain_kit::grants::CopyBatch;
use domain_kit::hypercall::HvError;
use domain_kit::ring::{HeapMem, RingLayout, RingMem};
use hv_abi::CopyEntry;
use netback::offload::{self, Family, Gso, Meta, VNET_HDR_LEN, VnetHdr};
use netback::queue::rx::{self, RxFrame, RxQueue, RxTarget, Source};
use netback::queue::tx::{self, TxQueue};
use netback::queue::{ARENA_BYTES, Copier, Fate, Frame, World};
use netback::slots::{Kind, KindScanner};
use netback::spool::{self, Spool};
use netback::stats::Stats;
use xen_abi::io::netif::*;

/// What ends an incarnation; true: its own fault.
struct Crash(bool);

/// Steps left to live.
#[derive(Default)]
struct Fuel {
    left: Cell<Option<u64>>,
    used: Cell<u64>,
}

impl Fuel {
    /// True if the process dies here.
    fn burnt(&self) -> bool {
        self.used.set(self.used.get() + 1);
        match self.left.get() {
            None => false,
            Some(0) => true,
            Some(n) => {
                self.left.set(Some(n - 1));
                false
            }
        }
    }

    fn step(&self) {
        if self.burnt() {
            resume_unwind(Box::new(Crash(false)));
        }
    }
}

/// Memory that outlives the process; each store is a step.
#[derive(Clone)]
struct Mem {
    inner: Rc<HeapMem>,
    fuel: Rc<Fuel>,
}

impl RingMem for Mem {
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.inner.load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.fuel.step();
        self.inner.store_u32(offset, value);
    }
    fn load_u64(&self, offset: usize) -> u64 {
        self.inner.load_u64(offset)
    }
    fn store_u64(&self, offset: usize, value: u64) {
        self.fuel.step();
        self.inner.store_u64(offset, value);
    }
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.inner.copy_out(offset, into);
    }
    fn copy_in(&self, offset: usize, from: &[u8]) {
        if self.fuel.burnt() {
            self.inner.copy_in(offset, &from[..from.len() / 2]);
            resume_unwind(Box::new(Crash(false)));
        }
        self.inner.copy_in(offset, from);
    }
}

/// A packet for the guest, with the size of the segments that it is to be cut into.
type ToGuest = (Vec<u8>, Option<u16>);

/// What lies outside of netback: the kernel's side of the TAP, hv-core, the frontend's pages.
struct Outside {
    arena: Mem,
    /// Buffer 2: what the uplink's thread reads into.
    uplink: Mem,
    to_guest: Rc<RefCell<VecDeque<ToGuest>>>,
    from_guest: Rc<RefCell<Vec<Vec<u8>>>>,
    pages: Pages,
    fuel: Rc<Fuel>,
    poison: bool,
}

impl Outside {
    /// A packet with this first byte makes netback crash by its own fault when it touches it.
    fn taste(&self, packet: &[u8]) {
        if self.poison && packet[0] == POISON {
            resume_unwind(Box::new(Crash(true)));
        }
    }

    /// What the uplink's thread does in a round: reads, notes, delivers, marks.
    fn feed(
        &mut self,
        spool: &mut Spool,
        notes: &Mem,
        rx: &mut RxQueue<Mem, Mem, Mem>,
        careful: bool,
    ) -> bool {
        let uplink = self.uplink.clone();
        while let Some(at) = spool.room() {
            self.fuel.step();
            let Some((packet, gso)) = self.to_guest.borrow_mut().pop_front() else { break };
            let hdr = gso.map_or(VnetHdr::default(), |size| {
                let gso = Some(Gso { family: Family::V4, size });
                let meta = Meta { csum_blank: true, data_validated: true, gso };
                offload::to_tap(meta, &packet, packet.len()).expect("TCP").hdr
            });
            uplink.inner.copy_in(at - VNET_HDR_LEN, &hdr.to_bytes());
            uplink.inner.copy_in(at, &packet);
            self.fuel.step();
            spool.note(notes, &uplink, packet.len());
        }
        let frames = spool.unmarked();
        let source = Source { arena: &uplink, buffer: 2, base: 0, away: &[] };
        for batch in frames.chunks(if careful { 1 } else { 64 }) {
            let base = spool.base();
            for destination in 0..2 {
                let first = |frame: &Frame| {
                    let mut first = [0];
                    uplink.inner.copy_out(frame.at, &mut first);
                    first[0]
                };
                let (numbers, run): (Vec<usize>, Vec<RxFrame>) = batch
                    .iter()
                    .filter(|(_, frame)| to(first(frame)) == destination)
                    .map(|&(i, frame)| (i, RxFrame { frame, hash: None }))
                    .unzip();
                deliver(rx, self, &source, &run, &mut |i| spool::mark_one(notes, base, numbers[i]))
                    .expect("rx");
            }
            spool.hand(notes, batch[batch.len() - 1].0);
        }
        spool.rewind(notes);
        !frames.is_empty()
    }
}

const POISON: u8 = 0xee;

/// Which of two destinations a packet with this first byte is for. What is for the second overtakes what is for the first.
fn to(first: u8) -> u8 {
    1 - first % 2
}

impl Copier for Outside {
    fn copy(&mut self, batch: &mut CopyBatch) -> Result<(), HvError> {
        batch.statuses.clear();
        for e in &batch.entries {
            self.fuel.step();
            let arena = if e.buffer == 2 { &self.uplink } else { &self.arena };
            self.pages.copy(e, &*arena.inner, |bytes| self.taste(bytes));
            batch.statuses.push(0);
        }
        Ok(())
    }
}

impl World for Outside {
    type Arena = Mem;
    fn arena(&self) -> &Mem {
        &self.arena
    }
    fn copy_ids(&self) -> (u16, u32) {
        (5, 1)
    }
    fn forward(
        &mut self,
        frames: &[Frame],
        _away: &mut Vec<CopyEntry>,
        fates: &mut [Fate],
        commit: &mut dyn FnMut(usize),
    ) {
        let packets = frames.iter().map(|frame| {
            let mut packet = vec![0; frame.len];
            self.arena.inner.copy_out(frame.at, &mut packet);
            packet
        });
        let mut packets: Vec<(usize, Vec<u8>)> = packets.enumerate().collect();
        packets.sort_by_key(|(_, packet)| to(packet[0]));
        for (i, packet) in packets {
            self.fuel.step();
            commit(i);
            self.fuel.step();
            self.from_guest.borrow_mut().push(packet);
            self.fuel.step();
            fates[i] = Fate::Sent;
        }
    }
    fn multicast(&mut self, _add: bool, _address: [u8; 6]) -> bool {
        true
    }
}

/// Rings of few slots wrap soon.
const RING: u32 = 8;

fn tx_layout() -> RingLayout {
    tx::layout().with_size(RING)
}
fn rx_layout() -> RingLayout {
    rx::layout().with_size(RING)
}

struct Scenario {
    from_guest: Vec<Outgoing>,
    /// With the size of the segments that they are to be cut into.
    to_guest: Vec<ToGuest>,
    slow: bool,
    poison: bool,
}

/// A packet that is TCP over IPv4 as far as anyone looks.
fn packet(number: u8, len: usize) -> Vec<u8> {
    let mut p: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(7).wrapping_add(number)).collect();
    p[0] = number;
    p[12..14].copy_from_slice(&[8, 0]);
    p[14..24].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6]);
    p[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
    p[46] = 0x50;
    p[50..52].copy_from_slice(&[0, 0]); // the checksum, which netback fills
    p
}

struct Outcome {
    /// Steps that each incarnation took.
    steps: Vec<u64>,
    crashes: usize,
}

/// Runs a scenario with the n-th incarnation dying after `plan[n]` steps, and judges what was seen.
fn run(scenario: &Scenario, plan: &[u64]) -> Outcome {
    let fuel = Rc::new(Fuel::default());
    let mem = |len| Mem { inner: Rc::new(HeapMem::new(len)), fuel: fuel.clone() };
    let (tx_ring, rx_ring) = (mem(4096), mem(4096));
    let (tx_journal, rx_journal) =
        (mem(tx::shape(&tx_layout()).bytes()), mem(rx::shape(&rx_layout()).bytes()));
    // One arena for all runs: making 4 MiB each time is what would take the time.
    thread_local! {
        static ARENA: Rc<HeapMem> = Rc::new(HeapMem::new(ARENA_BYTES));
        static UPLINK: Rc<HeapMem> = Rc::new(HeapMem::new(ARENA_BYTES));
    }
    let arena = Mem { inner: ARENA.with(Rc::clone), fuel: fuel.clone() };
    let uplink = Mem { inner: UPLINK.with(Rc::clone), fuel: fuel.clone() };
    let notes = mem(spool::notes_bytes(64));
    let mut guest = Guest::new(tx_ring.inner.clone(), tx_layout(), rx_ring.inner.clone(), rx_layout());
    guest.to_send = scenario.from_guest.clone().into();
    guest.slow = scenario.slow;
    guest.never_killed = false;
    let mut outside = Outside {
        arena: arena.clone(),
        uplink: uplink.clone(),
        to_guest: Rc::new(RefCell::new(scenario.to_guest.clone().into())),
        from_guest: Rc::default(),
        pages: guest.pages.clone(),
        fuel: fuel.clone(),
        poison: scenario.poison,
    };
    let target = RxTarget { domid: 5, headroom: 0 };
    let stats = Arc::new(Stats::default());
    let mut txq = Some(
        TxQueue::create(tx_ring.clone(), tx_layout(), tx_journal.clone(), [1; 6], stats.clone()).unwrap(),
    );
    let mut rxq = Some(
        RxQueue::create(
            rx_ring.clone(),
            rx_layout(),
            rx_journal.clone(),
            [1; 6],
            (arena.clone(), (1, 0)),
            target,
            stats.clone(),
        )
        .unwrap(),
    );
    Spool::create(&notes, 0, 64, 0..ARENA_BYTES);
    let mut outcome = Outcome { steps: Vec::new(), crashes: 0 };
    let (mut own_faults, mut own_fault) = (0, false);
    for life in 0.. {
        assert!(life < plan.len() + 12, "it never ends");
        fuel.left.set(plan.get(life).copied());
        fuel.used.set(0);
        let lived = catch_unwind(AssertUnwindSafe(|| {
            let mut tx = txq.take().unwrap_or_else(|| {
                TxQueue::reattach(tx_ring.clone(), tx_layout(), tx_journal.clone(), own_fault, stats.clone())
                    .expect("tx re-attach")
            });
            let mut rx = rxq.take().unwrap_or_else(|| {
                let (ring, journal) = (rx_ring.clone(), rx_journal.clone());
                let place = (arena.clone(), (1, 0));
                RxQueue::reattach(ring, rx_layout(), journal, own_fault, place, target, stats.clone())
                    .expect("rx re-attach")
            });
            let mut spool = Spool::recover(&notes, 0, 64, 0..ARENA_BYTES, &uplink, own_fault).expect("spool");
            let mut careful = own_fault;
            let mut idle = 0;
            while idle < 4 {
                guest.turn();
                let worked = tx.run(&mut outside, usize::MAX).expect("tx").worked
                    | outside.feed(&mut spool, &notes, &mut rx, std::mem::take(&mut careful))
                    | rx.flush(&mut outside).expect("rx").worked;
                let waits = tx.final_check().expect("tx") | rx.final_check().expect("rx");
                idle = if worked || waits || rx.waiting() > 0 { 0 } else { idle + 1 };
            }
        }));
        outcome.steps.push(fuel.used.get());
        fuel.left.set(None);
        match lived {
            Ok(()) => break,
            Err(crash) => match crash.downcast::<Crash>() {
                Ok(crash) => {
                    own_fault = crash.0;
                    own_faults += usize::from(crash.0);
                    outcome.crashes += 1;
                }
                Err(other) => resume_unwind(other),
            },
        }
    }
    guest.turn();
    let at = || format!("plan {plan:?}");
    assert!(guest.at_rest() && outside.to_guest.borrow().is_empty(), "{}", at());
    let honest = scenario.from_guest.iter().filter(|p| !p.broken);
    let sent: Vec<_> = honest.map(|p| p.bytes.clone()).collect();
    let blank = |p: &Vec<u8>| {
        let mut p = p.clone();
        p[50..52].copy_from_slice(&[0, 0]);
        p
    };
    let out: Vec<_> = outside.from_guest.borrow().iter().map(blank).collect();
    let to_guest: Vec<_> = scenario.to_guest.iter().map(|p| p.0.clone()).collect();
    for packet in &guest.received {
        let sent = scenario.to_guest.iter().find(|(bytes, _)| *bytes == packet.bytes);
        let (_, gso) = sent.unwrap_or_else(|| panic!("damaged, {}", at()));
        assert_eq!(packet.gso, *gso, "{}", at());
    }
    let received: Vec<_> = guest.received.iter().map(|p| p.bytes.clone()).collect();
    let lost = lost(&sent, &out, &at()) + lost(&to_guest, &received, &at());
    let poison = if scenario.poison { 2 } else { 0 };
    assert!(lost <= outcome.crashes - own_faults + poison, "{lost} packets lost, {}", at());
    if scenario.poison {
        assert!(own_faults <= 8, "{own_faults} crashes of two poison packets, {}", at());
    }
    outcome
}

/// How many of `sent` are not in `got`, which must be a part of it, in order for each destination.
fn lost(sent: &[Vec<u8>], got: &[Vec<u8>], at: &str) -> usize {
    for destination in 0..2 {
        let mut rest = sent.iter().filter(|p| to(p[0]) == destination);
        for packet in got.iter().filter(|p| to(p[0]) == destination) {
            assert!(rest.any(|p| p == packet), "packet {} twice, out of order or damaged, {at}", packet[0]);
        }
    }
    sent.len() - got.len()
}

fn explore(scenario: &Scenario, stride: usize) -> (usize, usize) {
    let whole = run(scenario, &[]);
    let (mut singles, mut pairs) = (0, 0);
    for first in 0..whole.steps[0] {
        let outcome = run(scenario, &[first]);
        assert!(outcome.crashes >= 1);
        singles += 1;
        if !(first as usize).is_multiple_of(stride) {
            continue;
        }
        let recovery = 60;
        for second in (0..recovery).chain((recovery..outcome.steps[1]).step_by(37)) {
            run(scenario, &[first, second]);
            pairs += 1;
        }
    }
    (singles, pairs)
}

fn outgoing(number: u8, len: usize, gso: bool) -> Outgoing {
    Outgoing { bytes: packet(number, len), gso: gso.then_some(1448), piece: 60, broken: false }
}

fn scenario(slow: bool) -> Scenario {
    Scenario {
        // 70 bytes are two slots, 130 are three.
        from_guest: vec![
            outgoing(1, 60, false),
            outgoing(2, 130, true),
            outgoing(3, 70, false),
            Outgoing { broken: true, ..outgoing(7, 170, true) },
            outgoing(4, 54, true),
            outgoing(5, 60, false),
            outgoing(6, 150, false),
            Outgoing { broken: true, ..outgoing(8, 130, false) },
        ],
        to_guest: vec![
            (packet(11, 60), None),
            (packet(12, 9000), Some(1448)),
            (packet(13, 100), None),
            (packet(14, 4097), None),
            (packet(16, 3000), Some(1000)),
            (packet(15, 64), None),
        ],
        slow,
        poison: false,
    }
}

#[test]
fn crash_at_every_step() {
    let (singles, pairs) = explore(&scenario(false), 3);
    println!("explored: {singles} single crashes, {pairs} pairs");
    assert!(singles > 200);
}

#[test]
fn crash_at_every_step_with_a_guest_short_of_slots() {
    let (singles, pairs) = explore(&scenario(true), 7);
    println!("explored: {singles} single crashes, {pairs} pairs");
    assert!(singles > 200);
}

#[test]
fn poison_packets_are_dropped_after_three_crashes() {
    let mut s = scenario(false);
    s.from_guest[2].bytes[0] = POISON;
    s.to_guest[2].0[0] = POISON;
    s.poison = true;
    run(&s, &[]);
    let steps = 300;
    for kill in (0..steps).step_by(5) {
        // SIGKILL from outside at any time beside it blames nobody.
        run(&s, &[kill]);
        run(&s, &[u64::MAX, kill]);
    }
}

#[test]
fn kinds_follow_from_the_slots_before() {
    let mut scanner = KindScanner::default();
    let first = NetifTxRequest { flags: NETTXF_EXTRA_INFO | NETTXF_MORE_DATA, ..Default::default() };
    let gso = NetifExtraInfo::new(Extra::Gso { size: 1, gso_type: 1, features: 0 }, false);
    let last = NetifTxRequest::default();
    assert_eq!(scanner.next(&first.into()), Kind::First);
    assert_eq!(scanner.next(&gso.into()), Kind::Extra);
    assert_eq!(scanner.next(&last.into()), Kind::Fragment);
    assert!(scanner.at_boundary());
}

//! Large packets whose end goes from the sender's pages to the receiver's at once: what was looked at is what is delivered, whatever
//! the sender writes meanwhile, and pages that cannot be copied are its own loss.

mod common;

use std::rc::Rc;
use std::sync::Arc;

use common::{Guest, Outgoing, Pages};
use domain_kit::grants::CopyBatch;
use domain_kit::hypercall::HvError;
use domain_kit::ring::HeapMem;
use hv_abi::CopyEntry;
use netback::offload::MAX_HEADERS;
use netback::queue::rx::{self, RxFrame, RxQueue, RxTarget, Share, Source, deliver_round};
use netback::queue::tx::{self, TxQueue};
use netback::queue::{ARENA_BYTES, Away, Copier, Fate, Frame, World};
use netback::stats::Stats;
use proptest::prelude::*;

type Mem = Rc<HeapMem>;
const SENDER: u16 = 5;
const RECEIVER: u16 = 6;

/// hv-core and the switch between two guests.
struct Between {
    arena: Mem,
    sender: Pages,
    receiver: Pages,
    rxq: RxQueue<Mem, Mem, Mem>,
    backlog: Mem,
    /// Pages of the sender's with these numbers cannot be copied.
    bad: fn(u32) -> bool,
    /// After it was looked at, the sender writes this all over a packet's first page.
    scribble: Option<u8>,
    /// Bytes that went from page to page, and those that went through the arena.
    direct: usize,
    fetched: usize,
}

impl Copier for Between {
    fn copy(&mut self, batch: &mut CopyBatch) -> Result<(), HvError> {
        batch.statuses.clear();
        for e in &batch.entries {
            if e.domid == SENDER && (self.bad)(e.gref) {
                batch.statuses.push(-1);
                continue;
            }
            match e.domid {
                SENDER if e.flags == 0 => self.sender.copy(e, &*self.arena, |_| {}),
                SENDER => {
                    let (domid, gref, offset) = e.other().expect("a page of the receiver's");
                    assert_eq!(domid, RECEIVER);
                    // By way of some memory that is nobody's.
                    let way = HeapMem::new(4096);
                    self.sender.copy(&CopyEntry { flags: 0, buffer_offset: 0, ..*e }, &way, |_| {});
                    let back = CopyEntry { domid, flags: 1, gref, offset, buffer_offset: 0, ..*e };
                    self.receiver.copy(&back, &way, |_| {});
                    self.direct += usize::from(e.len);
                }
                _ => {
                    let from = if e.buffer == 2 { &self.backlog } else { &self.arena };
                    self.receiver.copy(e, &**from, |_| {});
                }
            }
            batch.statuses.push(0);
        }
        Ok(())
    }
}

impl World for Between {
    type Arena = Mem;
    fn arena(&self) -> &Mem {
        &self.arena
    }
    fn copy_ids(&self) -> (u16, u32) {
        (SENDER, 1)
    }
    fn leaves_away(&mut self) -> bool {
        true
    }
    fn forward(
        &mut self,
        frames: &[Frame],
        away: &mut Vec<CopyEntry>,
        fates: &mut [Fate],
        commit: &mut dyn FnMut(usize),
    ) {
        for frame in frames {
            assert_eq!(frame.here(), if frame.away.is_nothing() { frame.len } else { MAX_HEADERS });
        }
        if let Some(byte) = self.scribble {
            self.sender.scribble(byte);
        }
        let mut run: Vec<RxFrame> = frames.iter().map(|&frame| RxFrame { frame, hash: None }).collect();
        let mut numbers: Vec<usize> = (0..frames.len()).collect();
        let (arena, mut batch, mut placed) = (self.arena.clone(), CopyBatch::default(), 0);
        let source = Source { arena: &arena, buffer: 1, base: 0, away };
        // Out of the way while it is the copier as well.
        let other = rxq(Rc::new(HeapMem::new(4096)), self.backlog.clone());
        let mut queue = std::mem::replace(&mut self.rxq, other);
        loop {
            let mut shares =
                [Share { queue: &mut queue, frames: &run, placed, wants_whole: false, over: None }];
            deliver_round(self, &mut batch, &source, &mut shares, &mut |_, i| commit(numbers[i]));
            let [Share { placed: now, wants_whole, over, .. }] = shares;
            placed = now;
            if let Some(over) = over {
                let dropped = over.expect("no fault of anybody's").dropped;
                numbers.iter().take(run.len() - dropped).for_each(|&i| fates[i] = Fate::Sent);
                break;
            }
            if !wants_whole {
                continue;
            }
            for k in (placed..run.len()).rev() {
                let pieces = run[k].frame.away;
                let mut fetch = CopyBatch { entries: pieces.of(away).to_vec(), statuses: Vec::new() };
                self.copy(&mut fetch).expect("the arena");
                self.fetched += fetch.entries.iter().map(|e| usize::from(e.len)).sum::<usize>();
                if fetch.statuses.iter().all(|&status| status == 0) {
                    run[k].frame.away = Away::NOTHING;
                } else {
                    run.remove(k);
                    fates[numbers.remove(k)] = Fate::Refused;
                }
            }
        }
        self.rxq = queue;
    }
    fn multicast(&mut self, _add: bool, _address: [u8; 6]) -> bool {
        true
    }
}

fn rxq(ring: Mem, backlog: Mem) -> RxQueue<Mem, Mem, Mem> {
    let journal = Rc::new(HeapMem::new(rx::shape(&rx::layout()).bytes()));
    let target = RxTarget { domid: RECEIVER, headroom: 0 };
    let place = (backlog, (2, 0));
    RxQueue::create(ring, rx::layout(), journal, [0; 6], place, target, Arc::new(Stats::default())).unwrap()
}

struct Run {
    sender: Guest,
    receiver: Guest,
    between: Between,
}

/// Sends these packets; `slow`: the receiver has few slots now and then.
fn run(packets: &[Outgoing], headroom: usize, slow: bool, bad: fn(u32) -> bool, scribble: Option<u8>) -> Run {
    let ring = || Rc::new(HeapMem::new(4096));
    // What is kept is known by its lengths alone, so both can be used again.
    thread_local! {
        static ARENA: Mem = Rc::new(HeapMem::new(ARENA_BYTES));
        static BACKLOG: Mem = Rc::new(HeapMem::new(ARENA_BYTES));
    }
    let (arena, backlog) = (ARENA.with(Rc::clone), BACKLOG.with(Rc::clone));
    let [tx, rx, unused_tx, unused_rx] = [ring(), ring(), ring(), ring()];
    let mut sender = Guest::new(tx.clone(), tx::layout(), unused_rx, rx::layout());
    let mut receiver = Guest::new(unused_tx, tx::layout(), rx.clone(), rx::layout());
    (receiver.slow, receiver.headroom) = (slow, headroom);
    // A packet that failed leaves bytes in a page that the next one takes, or is copied a second time.
    receiver.never_killed = false;
    sender.to_send = packets.to_vec().into();
    let journal = Rc::new(HeapMem::new(tx::shape(&tx::layout()).bytes()));
    let mut txq = TxQueue::create(tx, tx::layout(), journal, [0; 6], Arc::new(Stats::default())).unwrap();
    let mut rxq = rxq(rx, backlog.clone());
    rxq.set_headroom(headroom);
    let mut between = Between {
        arena,
        sender: sender.pages.clone(),
        receiver: receiver.pages.clone(),
        rxq,
        backlog: backlog.clone(),
        bad,
        scribble,
        direct: 0,
        fetched: 0,
    };
    let mut idle = 0;
    while idle < 300 {
        sender.turn();
        receiver.turn();
        idle = if txq.run(&mut between, 1 << 18).unwrap().worked { 0 } else { idle + 1 };
        let other = self::rxq(Rc::new(HeapMem::new(4096)), backlog.clone());
        let mut queue = std::mem::replace(&mut between.rxq, other);
        if queue.flush(&mut between).unwrap().worked {
            idle = 0;
        }
        between.rxq = queue;
    }
    assert!(sender.at_rest());
    Run { sender, receiver, between }
}

/// No IP, so that nothing of it is changed on its way.
fn packet(number: usize, len: usize, piece: usize) -> Outgoing {
    let mut bytes: Vec<u8> = (0..len).map(|i| (i / 3 + number) as u8).collect();
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    Outgoing { bytes, gso: None, piece, broken: false }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    /// Pieces of any size, pages with and without headroom: every byte arrives, in order, most of them directly.
    #[test]
    fn every_byte_arrives(
        lengths in proptest::collection::vec((14usize..65535, 3700usize..4089), 1..20),
        headroom in prop_oneof![Just(0usize), 1usize..=256], slow: bool,
    ) {
        let packets: Vec<Outgoing> =
            lengths.iter().enumerate().map(|(i, &(len, piece))| packet(i, len, piece)).collect();
        let Run { sender, receiver, between } = run(&packets, headroom, slow, |_| false, None);
        let sent: Vec<&Vec<u8>> = packets.iter().map(|p| &p.bytes).collect();
        let got: Vec<&Vec<u8>> = receiver.received.iter().map(|p| &p.bytes).collect();
        prop_assert_eq!(&sender.answers[1..], [0, 0]);
        prop_assert!(got == sent, "{} of {} packets", got.len(), sent.len());
        let large: usize = sent.iter().map(|b| b.len()).filter(|&len| len > 4096).map(|len| len - MAX_HEADERS).sum();
        prop_assert!(slow || between.direct == large, "{} of {large} bytes directly", between.direct);
    }
}

/// Some of the sender's pages are not granted: packets with one of them are refused, all others arrive, and the receiver hears of
/// none.
#[test]
fn pages_that_cannot_be_copied() {
    for slow in [false, true] {
        let packets: Vec<Outgoing> = (0..40).map(|i| packet(i, 3000 + 1500 * (i % 20), 4000)).collect();
        let Run { sender, receiver, between } = run(&packets, 0, slow, |gref| gref % 23 == 0, None);
        // Numbers are given to pages as they are sent, from 1001 on.
        let mut page = 1000;
        let mut slots = [0, 0, 0];
        let whole = |p: &&Outgoing| {
            let pages = p.bytes.len().div_ceil(p.piece) as u32;
            page += pages;
            let whole = (page + 1 - pages..=page).all(|gref| gref % 23 != 0);
            slots[usize::from(!whole)] += pages as usize;
            whole
        };
        let sent: Vec<&Vec<u8>> = packets.iter().filter(whole).map(|p| &p.bytes).collect();
        let got: Vec<&Vec<u8>> = receiver.received.iter().map(|p| &p.bytes).collect();
        assert!(got == sent && sent.len() < 40, "{} of {} packets", got.len(), sent.len());
        assert_eq!((sender.answers, receiver.errors), (slots, 0));
        assert!((slow || between.direct > 0) && between.fetched > 0);
    }
}

/// The sender writes over its pages once netback has looked at its headers: they arrive as they were looked at.
#[test]
fn what_was_looked_at_is_what_arrives() {
    let packets: Vec<Outgoing> = (0..10).map(|i| packet(i, 9000, 4000)).collect();
    let Run { receiver, .. } = run(&packets, 0, false, |_| false, Some(0xee));
    assert_eq!(receiver.received.len(), 10);
    for (packet, got) in packets.iter().zip(&receiver.received) {
        assert_eq!(packet.bytes[..MAX_HEADERS], got.bytes[..MAX_HEADERS]);
        assert!(got.bytes[MAX_HEADERS..].iter().all(|&byte| byte == 0xee));
    }
}

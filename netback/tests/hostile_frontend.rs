//! Frontends that do what they must not. Each class of `hazards.md` that touches the rings has a test named after it; those of
//! slots and headers stand beside the parsers.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use common::{Guest, Outgoing, Pages, deliver};
use domain_kit::grants::CopyBatch;
use domain_kit::hypercall::HvError;
use domain_kit::ring::{FrontRing, HeapMem, RingMem};
use hv_abi::{COPY_TO_GRANT, CopyEntry};
use netback::offload::{self, Family, Gso, Meta, VNET_HDR_LEN, VnetHdr};
use netback::queue::rx::{self, Delivery, RxFrame, RxQueue, RxTarget, Source};
use netback::queue::tx::{self, TxQueue};
use netback::queue::{ARENA_BYTES, Away, Copier, Fate, Frame, QueueError, World};
use netback::slots::{MAX_RX_PACKET, PacketHash};
use netback::stats::Stats;
use proptest::prelude::*;
use xen_abi::io::netif::*;
use xen_abi::io::ring::{REQ_PROD_OFFSET, RING_OFFSET, RSP_PROD_OFFSET};

type Mem = Rc<HeapMem>;

/// A hypervisor that refuses every third page, and a network that takes everything.
struct Outside {
    arena: Mem,
    sent: Vec<Vec<u8>>,
    copied_to_guest: usize,
    refuse: bool,
    turn: usize,
    /// The frontend's, if it has any; else each is full of its number's lowest byte.
    pages: Option<Pages>,
}

impl Outside {
    fn new(refuse: bool) -> Outside {
        // The arena is large and its content does not matter from one test to the next.
        thread_local!(static ARENA: Mem = Rc::new(HeapMem::new(ARENA_BYTES)));
        Outside {
            arena: ARENA.with(Rc::clone),
            sent: Vec::new(),
            copied_to_guest: 0,
            refuse,
            turn: 0,
            pages: None,
        }
    }

    /// Delivers `count` packets of `len` bytes; says what became of them, and how many marks were set.
    fn deliver(
        &mut self,
        queue: &mut RxQueue<Mem, Mem, Mem>,
        len: usize,
        count: usize,
    ) -> Result<(Delivery, usize), QueueError> {
        let arena = self.arena.clone();
        let at = ARENA_BYTES / 2 + 64;
        arena.copy_in(at - VNET_HDR_LEN, &[0; VNET_HDR_LEN]);
        let frame =
            RxFrame { frame: Frame { at, len, meta: Meta::default(), away: Away::NOTHING }, hash: None };
        let mut marks = 0;
        let source = Source { arena: &arena, buffer: 1, base: 0, away: &[] };
        let delivery = deliver(queue, self, &source, &vec![frame; count], &mut |i| {
            assert_eq!(i, marks, "each packet is marked once, in order");
            marks += 1;
        })?;
        Ok((delivery, marks))
    }
}

impl Copier for Outside {
    fn copy(&mut self, batch: &mut CopyBatch) -> Result<(), HvError> {
        batch.statuses.clear();
        for e in &batch.entries {
            assert!(usize::from(e.offset) + usize::from(e.len) <= 4096, "pieces stay in their page");
            assert!(e.buffer_offset as usize + usize::from(e.len) <= ARENA_BYTES);
            self.turn += 1;
            let refused = self.refuse && self.turn.is_multiple_of(3);
            batch.statuses.push(if refused { -2 } else { 0 });
            if let Some(pages) = self.pages.as_ref().filter(|_| !refused) {
                let arena = if e.buffer == 2 { backlog() } else { self.arena.clone() };
                pages.copy(e, &*arena, |_| {});
            } else if e.flags == COPY_TO_GRANT {
                self.copied_to_guest += usize::from(e.len);
            } else {
                let piece = vec![e.gref as u8; e.len.into()];
                self.arena.copy_in(e.buffer_offset as usize, &piece);
            }
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
        for (i, frame) in frames.iter().enumerate() {
            assert!(
                frame.at >= ARENA_BYTES / 2 && frame.at + frame.len <= ARENA_BYTES,
                "packets stay in their half"
            );
            commit(i);
            let mut packet = vec![0; frame.len];
            self.arena.copy_out(frame.at, &mut packet);
            self.sent.push(packet);
            fates[i] = Fate::Sent;
        }
    }
    fn multicast(&mut self, _add: bool, _address: [u8; 6]) -> bool {
        true
    }
}

fn txq<M: RingMem>(ring: M) -> TxQueue<M, Mem> {
    let journal = Rc::new(HeapMem::new(tx::shape(&tx::layout()).bytes()));
    TxQueue::create(ring, tx::layout(), journal, [0; 6], Arc::new(Stats::default())).unwrap()
}

/// Buffer 2: where packets wait for slots.
fn backlog() -> Mem {
    thread_local!(static BACKLOG: Mem = Rc::new(HeapMem::new(ARENA_BYTES)));
    BACKLOG.with(Rc::clone)
}

fn rxq(ring: Mem) -> RxQueue<Mem, Mem, Mem> {
    let journal = Rc::new(HeapMem::new(rx::shape(&rx::layout()).bytes()));
    let target = RxTarget { domid: 5, headroom: 0 };
    let place = (backlog(), (2, 0));
    RxQueue::create(ring, rx::layout(), journal, [0; 6], place, target, Arc::new(Stats::default())).unwrap()
}

fn ring() -> Mem {
    Rc::new(HeapMem::new(4096))
}

/// Counts how often each byte of the ring is copied out.
struct Counting {
    inner: Mem,
    copies: Rc<RefCell<HashMap<usize, u32>>>,
    flips: Cell<u8>,
}

impl RingMem for Counting {
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn load_u32(&self, offset: usize) -> u32 {
        assert!(offset < RING_OFFSET, "entries are copied, never read field by field");
        self.inner.load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.inner.store_u32(offset, value);
    }
    fn load_u64(&self, offset: usize) -> u64 {
        self.inner.load_u64(offset)
    }
    fn store_u64(&self, offset: usize, value: u64) {
        self.inner.store_u64(offset, value);
    }
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.inner.copy_out(offset, into);
        for i in 0..into.len() {
            *self.copies.borrow_mut().entry(offset + i).or_default() += 1;
        }
        // The frontend changes the slot behind our back.
        self.flips.set(self.flips.get().wrapping_add(1));
        self.inner.copy_in(offset, &vec![self.flips.get(); into.len()]);
    }
    fn copy_in(&self, offset: usize, from: &[u8]) {
        self.inner.copy_in(offset, from);
    }
}

#[test]
fn xsa_155_double_fetch() {
    let mem = ring();
    let mut front = FrontRing::init(mem.clone(), tx::layout());
    for i in 0..10 {
        let request = NetifTxRequest { gref: 100 + i, offset: 0, flags: 0, id: i as u16, size: 60 };
        front.put(&TxSlot::from(request).0);
    }
    front.push();
    let copies = Rc::<RefCell<HashMap<usize, u32>>>::default();
    let counting = Counting { inner: mem, copies: copies.clone(), flips: Cell::new(0) };
    let mut queue = txq(counting);
    let mut outside = Outside::new(false);
    queue.run(&mut outside, usize::MAX).unwrap();
    assert!(copies.borrow().values().all(|&n| n == 1), "a byte of a request was read twice");
    assert_eq!(copies.borrow().len(), 120);
    let sent: Vec<Vec<u8>> = (0..10).map(|i| vec![100 + i; 60]).collect();
    assert_eq!(outside.sent, sent, "what was judged is what was sent");
    for id in 0..10 {
        let mut response = [0; 4];
        front.take(&mut response);
        assert_eq!(response, [id, 0, 0, 0]);
    }
}

#[test]
fn xsa_216_no_byte_of_ours_in_a_response() {
    let mem = ring();
    let mut front = FrontRing::init(mem.clone(), tx::layout());
    for i in 0..256u32 {
        let request =
            NetifTxRequest { gref: 0xaaaa_aaaa, offset: 0xaaaa, flags: 0, id: i as u16, size: 0xaaaa };
        front.put(&TxSlot::from(request).0);
    }
    front.push();
    let mut queue = txq(mem.clone());
    queue.run(&mut Outside::new(false), usize::MAX).unwrap();
    let bytes = mem.snapshot();
    for slot in bytes[RING_OFFSET..RING_OFFSET + 256 * TX_ENTRY_SIZE].chunks(TX_ENTRY_SIZE).enumerate() {
        let (id, slot) = (slot.0 as u16, slot.1);
        assert_eq!(slot[..2], id.to_le_bytes());
        assert_eq!(slot[2..4], NETIF_RSP_ERROR.to_le_bytes());
        // Behind the response's four bytes stand the frontend's own.
        assert_eq!(slot[4..8], [0xaa, 0xaa, 0, 0]);
        assert_eq!(slot[8..10], id.to_le_bytes());
    }
    // An rx response fills its slot, so every byte of it is made for it.
    assert_eq!(rx::layout().rsp_size, rx::layout().entry_size);
}

#[test]
fn xsa_392_a_guest_that_posts_no_slots() {
    let mem = ring();
    let mut front = FrontRing::init(mem.clone(), rx::layout());
    let mut queue = rxq(mem);
    let mut outside = Outside::new(false);
    let mut dropped = 0;
    for _ in 0..1000 {
        let (delivery, marks) = outside.deliver(&mut queue, 9000, 10).unwrap();
        assert_eq!(marks, 10, "dropped or kept, they are over for the sender");
        dropped += delivery.dropped;
        assert!(!queue.final_check().unwrap());
    }
    let kept = queue.waiting();
    assert_eq!(kept + dropped, 10_000);
    assert!((100..=512).contains(&kept), "{kept} are kept, no more");
    assert_eq!(outside.copied_to_guest, 0);
    // Slots for one packet and two thirds: one comes, the next waits.
    for id in 0..5 {
        front.put(&[id, 0, 0, 0, id, 0, 0, 0]);
    }
    assert!(front.push(), "new slots raise an event");
    queue.flush(&mut outside).unwrap();
    assert_eq!((outside.copied_to_guest, queue.waiting()), (9000, kept - 1));
    assert!(!queue.final_check().unwrap());
    front.put(&[5, 0, 0, 0, 5, 0, 0, 0]);
    assert!(front.push(), "the missing slot raises an event");
    assert!(queue.final_check().unwrap());
    // What comes now goes behind those that wait.
    outside.deliver(&mut queue, 60, 1).unwrap();
    assert_eq!((outside.copied_to_guest, front.unconsumed()), (18_000, Ok(6)));
}

#[test]
fn indices_of_every_kind() {
    for req_prod in [257, 300, 0x8000_0000, u32::MAX] {
        let (tx, rx) = (ring(), ring());
        let mut txq = txq(tx.clone());
        let mut rxq = rxq(rx.clone());
        tx.store_u32(REQ_PROD_OFFSET, req_prod);
        rx.store_u32(REQ_PROD_OFFSET, req_prod);
        let mut outside = Outside::new(false);
        assert!(matches!(txq.run(&mut outside, usize::MAX), Err(QueueError::Journal(_))), "{req_prod}");
        assert!(matches!(outside.deliver(&mut rxq, 60, 1), Err(QueueError::Journal(_))), "{req_prod}");
    }
    // rsp_prod is ours: what the frontend writes there is not read while we live.
    let tx = ring();
    let mut front = FrontRing::init(tx.clone(), tx::layout());
    let mut queue = txq(tx.clone());
    let request = NetifTxRequest { gref: 1, offset: 0, flags: 0, id: 9, size: 60 };
    front.put(&TxSlot::from(request).0);
    front.push();
    tx.store_u32(RSP_PROD_OFFSET, 200);
    queue.run(&mut Outside::new(false), usize::MAX).unwrap();
    assert_eq!(tx.load_u32(RSP_PROD_OFFSET), 1);
}

/// TCP over IPv4 as far as anyone looks.
fn tcp(number: usize, len: usize) -> Vec<u8> {
    let mut p: Vec<u8> = (0..len).map(|i| (i / 251 + i + number) as u8).collect();
    if len >= 54 {
        p[12..14].copy_from_slice(&[8, 0]);
        p[14..24].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6]);
        p[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
        p[46] = 0x50;
    }
    p
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]
    /// Honest traffic of all sizes and kinds, both ways at once, with pages that hv-core refuses now and then, on rings that
    /// wrap: [`Guest`] holds every response and every copy against what it asked for.
    #[test]
    fn every_response_answers_one_request(
        out in proptest::collection::vec((14usize..=65521, any::<bool>(), 1000usize..=4089, 0u8..8), 0..60),
        back in proptest::collection::vec((54usize..=MAX_RX_PACKET, any::<bool>(), any::<bool>()), 0..60),
        small: bool, refuse: bool, slow: bool, headroom in prop_oneof![Just(0usize), Just(256)],
    ) {
        let (tx, rx) = (ring(), ring());
        let (mut txq, mut rxq) = (txq(tx.clone()), rxq(rx.clone()));
        rxq.set_headroom(headroom);
        let mut guest = Guest::new(tx, tx::layout(), rx, rx::layout());
        guest.headroom = headroom;
        guest.slow = slow;
        let shrink = |len: usize| if small { 54 + len % 1500 } else { len };
        guest.to_send = out.iter().enumerate().map(|(i, &(len, gso, piece, broken))| {
            let bytes = tcp(i, shrink(len));
            // So that no packet has more slots than a packet may have.
            let piece = piece.max(bytes.len().div_ceil(18));
            let gso = (gso && bytes.len() >= 54).then_some(500);
            Outgoing { broken: broken == 0 && bytes.len() > piece + 14, bytes, gso, piece }
        }).collect();
        let honest = guest.to_send.iter().filter(|p| !p.broken).count();
        let mut outside = Outside { pages: Some(guest.pages.clone()), ..Outside::new(refuse) };
        let arena = outside.arena.clone();
        let at = ARENA_BYTES - (256 << 10) + 64;
        let mut back = back.into_iter().enumerate();
        let (mut given, mut dropped, mut idle) = (Vec::new(), 0, 0);
        while idle < 600 {
            guest.turn();
            let sent = outside.sent.len();
            idle = if txq.run(&mut outside, 1 << 18).unwrap().worked { 0 } else { idle + 1 };
            prop_assert!(outside.sent.len() - sent <= 256);
            if let Some((i, (len, gso, hashed))) = back.next() {
                let bytes = tcp(i, shrink(len).min(MAX_RX_PACKET));
                arena.copy_in(at, &bytes);
                let gso = gso.then_some(Gso { family: Family::V4, size: 700 });
                let meta = Meta { csum_blank: gso.is_some(), data_validated: true, gso };
                let hdr = if gso.is_some() && offload::to_tap(meta, &bytes, bytes.len()).is_ok() {
                    offload::to_tap(meta, &bytes, bytes.len()).unwrap().hdr
                } else {
                    VnetHdr::validated()
                };
                arena.copy_in(at - VNET_HDR_LEN, &hdr.to_bytes());
                let meta = offload::from_tap(hdr);
                let hash = hashed.then_some(PacketHash { hash_type: 1, value: i as u32 });
                let frame = RxFrame { frame: Frame { at, len: bytes.len(), meta, away: Away::NOTHING }, hash };
                let source = Source { arena: &arena, buffer: 1, base: 0, away: &[] };
                dropped += deliver(&mut rxq, &mut outside, &source, &[frame], &mut |_| {}).unwrap().dropped;
                given.push((bytes, meta.gso.map(|g| g.size), hash.map(|h| h.value)));
                idle = 0;
            }
            prop_assert!(rxq.flush(&mut outside).is_ok());
            if slow && rxq.waiting() > 0 {
                idle = 0;
            }
        }
        prop_assert!(guest.at_rest());
        prop_assert!(refuse || (guest.answers[2] == 0 && outside.sent.len() == honest));
        prop_assert_eq!(guest.received.len() + guest.errors + dropped, given.len());
        prop_assert!(refuse || guest.errors == 0);
        let mut rest = given.iter();
        for packet in &guest.received {
            // Of packets that had to wait the hash is not told.
            let fits = |(bytes, gso, hash): &&(Vec<u8>, Option<u16>, Option<u32>)| {
                *bytes == packet.bytes && *gso == packet.gso && (packet.hash.is_none() || *hash == packet.hash)
            };
            prop_assert!(rest.find(fits).is_some(), "a packet twice, out of order or damaged");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Rings full of anything, over and over: no panic, nothing outside of its bounds (the world asserts it), and what is
    /// taken is answered, or the queue has given up.
    #[test]
    fn any_ring_content(
        rounds in proptest::collection::vec(
            (proptest::collection::vec(any::<[u8; 12]>(), 0..200), any::<[u8; 12]>(), 0u8..4), 1..5),
        packet in prop_oneof![Just(0usize), 14usize..=MAX_RX_PACKET], refuse: bool,
    ) {
        let (tx, rx) = (ring(), ring());
        let mut front = FrontRing::init(tx.clone(), tx::layout());
        let mut rx_front = FrontRing::init(rx.clone(), rx::layout());
        let (mut txq, mut rxq) = (txq(tx), rxq(rx));
        let mut outside = Outside::new(refuse);
        for (slots, last, shape) in rounds {
            for mut slot in slots {
                // Mostly sizes and flags that lead somewhere.
                if shape > 0 {
                    slot[6] &= 0x0f;
                    slot[7] = 0;
                    slot[5] &= 0x0f;
                    slot[11] &= 0x0f;
                }
                if shape > 1 {
                    slot[6] &= 0x03;
                }
                if front.free() == 0 {
                    break;
                }
                front.put(&slot);
                if rx_front.free() > 0 {
                    rx_front.put(&slot[..8]);
                }
            }
            if front.free() > 0 {
                let mut end = last;
                end[6] = 0;
                end[0] = 1;
                front.put(&end);
            }
            front.push();
            rx_front.push();
            match txq.run(&mut outside, usize::MAX) {
                Ok(_) => prop_assert_eq!(front.unconsumed(), Ok(front.pending())),
                Err(QueueError::Fatal(_)) => break,
                Err(e) => prop_assert!(false, "{e}"),
            }
            for _ in 0..front.unconsumed().unwrap() {
                front.take(&mut [0; 4]);
            }
            prop_assert!(packet == 0 || outside.deliver(&mut rxq, packet, 3).is_ok());
            prop_assert!(rxq.flush(&mut outside).is_ok());
            for _ in 0..rx_front.unconsumed().unwrap() {
                rx_front.take(&mut [0; 8]);
            }
        }
        prop_assert!(outside.sent.iter().all(|p| (14..=65535).contains(&p.len())));
    }
}

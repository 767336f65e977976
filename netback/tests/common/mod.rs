//! A frontend that believes nothing: its pages are granted for as long as netif says and no longer, and every response is held
//! against the request that it answers.
#![allow(dead_code, reason = "each test program uses a part")]

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use domain_kit::grants::CopyBatch;
use domain_kit::ring::{FrontRing, HeapMem, RingLayout, RingMem};
use hv_abi::{COPY_TO_GRANT, CopyEntry};
use netback::queue::rx::{Delivery, RxFrame, RxQueue, Share, Source, deliver_round};
use netback::queue::{Copier, QueueError};
use xen_abi::io::netif::*;

/// What a byte of an rx page is before the backend writes it.
const UNTOUCHED: u8 = 0x5a;

/// Gives packets to one queue alone; `commit(i)` is called just before packet `i` can be seen or is kept.
pub fn deliver<R: RingMem, J: RingMem, A: RingMem>(
    queue: &mut RxQueue<R, J, A>,
    copier: &mut impl Copier,
    from: &Source<'_, impl RingMem>,
    frames: &[RxFrame],
    commit: &mut dyn FnMut(usize),
) -> Result<Delivery, QueueError> {
    let mut batch = CopyBatch::default();
    let mut shares = [Share { queue, frames, placed: 0, wants_whole: false, over: None }];
    loop {
        deliver_round(copier, &mut batch, from, &mut shares, &mut |_, i| commit(i));
        if let Some(result) = shares[0].over.take() {
            return result;
        }
    }
}

struct Granted {
    bytes: Vec<u8>,
    /// Else it may only be read.
    writable: bool,
}

/// Pages that are granted now.
#[derive(Clone, Default)]
pub struct Pages(Rc<RefCell<HashMap<u32, Granted>>>);

impl Pages {
    fn grant(&self, gref: u32, bytes: Vec<u8>, writable: bool) {
        let before = self.0.borrow_mut().insert(gref, Granted { bytes, writable });
        assert!(before.is_none(), "grant references are used once");
    }

    /// Ends a grant: from here on a copy is a fault of the backend's.
    fn end(&self, gref: u32) -> Vec<u8> {
        self.0.borrow_mut().remove(&gref).expect("ended once").bytes
    }

    /// Whether any page is still granted for reading: a sent packet that was not answered.
    pub fn unanswered(&self) -> usize {
        self.0.borrow().values().filter(|page| !page.writable).count()
    }

    /// The guest fills all its sent pages with this.
    pub fn scribble(&self, byte: u8) {
        self.0.borrow_mut().values_mut().filter(|page| !page.writable).for_each(|page| page.bytes.fill(byte));
    }

    /// Carries a copy out as hv-core does. A copy from or to a page that is not granted (any more), to one granted for reading,
    /// or beyond a page fails the test.
    pub fn copy(&self, e: &CopyEntry, arena: &impl RingMem, taste: impl FnOnce(&[u8])) {
        let mut pages = self.0.borrow_mut();
        let page = pages.get_mut(&e.gref).unwrap_or_else(|| panic!("page {} is not granted", e.gref));
        let range = usize::from(e.offset)..usize::from(e.offset) + usize::from(e.len);
        assert!(range.end <= 4096, "a piece leaves its page");
        if e.flags == COPY_TO_GRANT {
            assert!(page.writable, "a write to a page that may only be read");
            let mut bytes = vec![0; range.len()];
            arena.copy_out(e.buffer_offset as usize, &mut bytes);
            taste(&bytes);
            page.bytes[range].copy_from_slice(&bytes);
        } else {
            assert!(!page.writable, "a read of an empty receive page");
            taste(&page.bytes[range.clone()]);
            arena.copy_in(e.buffer_offset as usize, &page.bytes[range]);
        }
    }
}

/// A packet to send.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// Goes with it, as extra info.
    pub gso: Option<u16>,
    /// Of each slot, so that a packet has several; at most 4089.
    pub piece: usize,
    /// Its first slot says it is longer than its slots hold: nobody can send it.
    pub broken: bool,
}

/// What a packet came with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Incoming {
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// Segment size.
    pub gso: Option<u16>,
    /// Hash.
    pub hash: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    First,
    /// Extra info; then: does data follow?
    Extra(bool),
    Data,
}

/// The frontend.
pub struct Guest {
    tx: FrontRing<Rc<HeapMem>>,
    rx: FrontRing<Rc<HeapMem>>,
    /// What is granted.
    pub pages: Pages,
    /// Not sent yet.
    pub to_send: VecDeque<Outgoing>,
    /// Slots sent and not answered: (id, page), `None` for extra info.
    tx_waiting: VecDeque<Option<(u16, u32)>>,
    /// (id, page) by ring slot.
    rx_posted: VecDeque<(u16, u32)>,
    expect: Expect,
    assembling: Incoming,
    slots: usize,
    /// A slot of the packet came with an error.
    damaged: bool,
    /// Whole packets.
    pub received: Vec<Incoming>,
    /// Packets of which a slot had an error.
    pub errors: usize,
    /// Of tx responses, by status: okay, error, dropped.
    pub answers: [usize; 3],
    /// The backend is never killed: then it writes no more of a page than it says. One that is killed between copy and response
    /// fills the same page again, with something shorter perhaps.
    pub never_killed: bool,
    /// Bytes that stay free at the start of each rx page.
    pub headroom: usize,
    next_id: u16,
    next_gref: u32,
    /// Posts rx slots only now and then.
    pub slow: bool,
    turn: u32,
}

impl Guest {
    pub fn new(tx: Rc<HeapMem>, tx_layout: RingLayout, rx: Rc<HeapMem>, rx_layout: RingLayout) -> Guest {
        Guest {
            tx: FrontRing::init(tx, tx_layout),
            rx: FrontRing::init(rx, rx_layout),
            pages: Pages::default(),
            to_send: VecDeque::new(),
            tx_waiting: VecDeque::new(),
            rx_posted: VecDeque::new(),
            expect: Expect::First,
            assembling: Incoming::default(),
            slots: 0,
            damaged: false,
            received: Vec::new(),
            errors: 0,
            answers: [0; 3],
            never_killed: true,
            headroom: 0,
            next_id: 0,
            next_gref: 1000,
            slow: false,
            turn: 0,
        }
    }

    /// True if nothing is sent and unanswered, nothing waits to be sent, and no packet is half there.
    pub fn at_rest(&self) -> bool {
        let open = self.expect != Expect::First || !self.assembling.bytes.is_empty();
        self.tx_waiting.is_empty() && self.to_send.is_empty() && !open && self.pages.unanswered() == 0
    }

    /// Takes answers, sends, and posts rx slots, as far as the rings have room.
    pub fn turn(&mut self) {
        self.turn += 1;
        self.reap();
        self.send();
        self.receive();
        let size = self.rx.free() + self.rx.pending();
        self.post(if self.slow { self.turn % 2 } else { size });
    }

    fn reap(&mut self) {
        for _ in 0..self.tx.unconsumed().expect("honest indices") {
            let mut bytes = [0; 4];
            self.tx.take(&mut bytes);
            let id = u16::from_le_bytes([bytes[0], bytes[1]]);
            let status = i16::from_le_bytes([bytes[2], bytes[3]]);
            match self.tx_waiting.pop_front().expect("no answer without a request") {
                None => assert_eq!(status, NETIF_RSP_NULL, "extra info is answered with NULL"),
                Some((want, gref)) => {
                    assert_eq!(id, want, "each request is answered once, in order");
                    let kind = [NETIF_RSP_OKAY, NETIF_RSP_ERROR, NETIF_RSP_DROPPED];
                    self.answers[kind.iter().position(|&k| k == status).expect("a status for packets")] += 1;
                    self.pages.end(gref);
                }
            }
        }
    }

    fn page(&mut self, bytes: Vec<u8>, writable: bool) -> (u16, u32) {
        self.next_gref += 1;
        self.next_id = (self.next_id + 1) % 1024;
        self.pages.grant(self.next_gref, bytes, writable);
        (self.next_id, self.next_gref)
    }

    fn send(&mut self) {
        while let Some(packet) = self.to_send.front() {
            let slots = packet.bytes.len().div_ceil(packet.piece) + usize::from(packet.gso.is_some());
            if (self.tx.free() as usize) < slots {
                break;
            }
            let Some(packet) = self.to_send.pop_front() else { break };
            let pieces: Vec<&[u8]> = packet.bytes.chunks(packet.piece).collect();
            for (i, piece) in pieces.iter().enumerate() {
                let mut page = vec![0; 4096];
                page[7..7 + piece.len()].copy_from_slice(piece);
                let (id, gref) = self.page(page, false);
                let mut flags = if i + 1 < pieces.len() { NETTXF_MORE_DATA } else { 0 };
                if i == 0 && packet.gso.is_some() {
                    flags |= NETTXF_EXTRA_INFO;
                }
                // A size that the other slots exceed: the packet makes no sense, and every slot is answered all the same.
                let whole = if packet.broken { 14 } else { packet.bytes.len() };
                let size = if i == 0 { whole } else { piece.len() } as u16;
                self.tx.put(&TxSlot::from(NetifTxRequest { gref, offset: 7, flags, id, size }).0);
                self.tx_waiting.push_back(Some((id, gref)));
                if let Some(size) = packet.gso.filter(|_| i == 0) {
                    let gso = Extra::Gso { size, gso_type: XEN_NETIF_GSO_TYPE_TCPV4, features: 0 };
                    self.tx.put(&TxSlot::from(NetifExtraInfo::new(gso, false)).0);
                    self.tx_waiting.push_back(None);
                }
            }
        }
        self.tx.push();
    }

    fn receive(&mut self) {
        for _ in 0..self.rx.unconsumed().expect("honest indices") {
            let mut slot = RxSlot::default();
            self.rx.take(&mut slot.0);
            let (id, gref) = self.rx_posted.pop_front().expect("no response without a request");
            let page = self.pages.end(gref);
            self.slots += 1;
            assert!(self.slots <= 18 + 3, "a packet without an end");
            if let Expect::Extra(more_data) = self.expect {
                let untouched = page.iter().all(|&b| b == UNTOUCHED);
                assert!(untouched || !self.never_killed, "extra info fills no page");
                let info = slot.extra_info();
                match info.extra().expect("known extra info") {
                    Extra::Gso { size, gso_type, .. } => {
                        assert!(size > 0 && gso_type == XEN_NETIF_GSO_TYPE_TCPV4);
                        assert!(self.assembling.gso.replace(size).is_none(), "once");
                    }
                    Extra::Hash { value, .. } => {
                        assert!(self.assembling.hash.replace(value).is_none(), "once");
                    }
                    Extra::Xdp { headroom } => assert_eq!(usize::from(headroom), self.headroom),
                    other => panic!("{other:?} is not for frontends"),
                }
                if !info.more() {
                    self.expect = if more_data { Expect::Data } else { Expect::First };
                }
            } else {
                let response = slot.response();
                assert_eq!(response.id, id, "responses are in their requests' slots");
                assert_eq!(response.offset, 0);
                let first = self.expect == Expect::First;
                let more = response.flags & NETRXF_MORE_DATA != 0;
                match usize::try_from(response.status) {
                    Err(_) => {
                        assert_eq!(response.status, NETIF_RSP_ERROR);
                        self.damaged = true;
                    }
                    Ok(end) => {
                        assert!((self.headroom + 1..=4096).contains(&end), "{end} bytes of a page");
                        let untouched = page[..self.headroom].iter().chain(&page[end..]);
                        let clean = untouched.into_iter().all(|&b| b == UNTOUCHED);
                        assert!(clean || !self.never_killed, "more was written than said");
                        assert!(!more || end == 4096, "slots are full but the last");
                        self.assembling.bytes.extend(&page[self.headroom..end]);
                    }
                }
                let extra = first && response.flags & NETRXF_EXTRA_INFO != 0;
                self.expect = match extra {
                    true => Expect::Extra(more),
                    false if more => Expect::Data,
                    false => Expect::First,
                };
            }
            if self.expect == Expect::First {
                self.slots = 0;
                let packet = std::mem::take(&mut self.assembling);
                match std::mem::take(&mut self.damaged) {
                    true => self.errors += 1,
                    false => self.received.push(packet),
                }
            }
        }
    }

    fn post(&mut self, most: u32) {
        for _ in 0..most.min(self.rx.free()) {
            let (id, gref) = self.page(vec![UNTOUCHED; 4096], true);
            let mut request = [0; 8];
            request[..2].copy_from_slice(&id.to_le_bytes());
            request[4..].copy_from_slice(&gref.to_le_bytes());
            self.rx.put(&request);
            self.rx_posted.push_back((id, gref));
        }
        self.rx.push();
    }
}

use std::sync::Arc;

use xen_abi::io::ring::RSP_PROD_OFFSET;

use super::format::*;
use super::*;
use crate::ring::{FrontRing, HeapMem, RingLayout, RingMem};

#[derive(Debug)]
struct Echo;
impl RingFormat for Echo {
    fn req_size(&self) -> usize {
        12
    }
    fn rsp_size(&self) -> usize {
        8
    }
    fn response(&self, request: &[u8], status: i16, aux: u32, out: &mut [u8]) {
        out[..2].copy_from_slice(&request[..2]);
        out[2..4].copy_from_slice(&status.to_le_bytes());
        out[4..].copy_from_slice(&aux.to_le_bytes());
    }
}

type Ring = JournaledRing<Arc<HeapMem>, Arc<HeapMem>, Echo>;

struct Setup {
    ring: Arc<HeapMem>,
    journal: Arc<HeapMem>,
    layout: RingLayout,
    shape: Shape,
}

impl Setup {
    fn new() -> (Self, FrontRing<Arc<HeapMem>>, Ring) {
        let layout = RingLayout::new(1, 12, 8).with_size(4);
        let shape = Ring::shape(&layout, 16, 64);
        let s = Setup {
            ring: Arc::new(HeapMem::new(4096)),
            journal: Arc::new(HeapMem::new(shape.bytes())),
            layout,
            shape,
        };
        let front = FrontRing::init(s.ring.clone(), layout);
        let back =
            JournaledRing::create(s.ring.clone(), layout, s.journal.clone(), shape, [1, 2, 3, 4, 5, 6], Echo)
                .unwrap();
        (s, front, back)
    }

    /// With `requests` sent, ids 0 and on, and taken.
    fn taken(requests: u16) -> (Self, FrontRing<Arc<HeapMem>>, Ring, Vec<Slot>) {
        let (s, mut front, mut back) = Setup::new();
        (0..requests).for_each(|id| send(&mut front, id));
        let mut slots = Vec::new();
        back.take(9, &mut slots).unwrap();
        (s, front, back, slots)
    }

    fn reattach(&self, own_fault: bool) -> Result<(Ring, Vec<Slot>), JournalError> {
        JournaledRing::reattach(
            self.ring.clone(),
            self.layout,
            self.journal.clone(),
            self.shape,
            Echo,
            own_fault,
        )
    }
}

fn send(front: &mut FrontRing<Arc<HeapMem>>, id: u16) {
    let mut request = [0; 12];
    request[..2].copy_from_slice(&id.to_le_bytes());
    front.put(&request);
    front.push();
}

fn receive(front: &mut FrontRing<Arc<HeapMem>>) -> Vec<(u16, i16, u32)> {
    (0..front.unconsumed().unwrap())
        .map(|_| {
            let mut r = [0; 8];
            front.take(&mut r);
            (
                u16::from_le_bytes([r[0], r[1]]),
                i16::from_le_bytes([r[2], r[3]]),
                u32::from_le_bytes([r[4], r[5], r[6], r[7]]),
            )
        })
        .collect()
}

#[test]
fn unanswered_come_back_in_order_answered_do_not() {
    let (s, mut front, mut back) = Setup::new();
    (0..4).for_each(|id| send(&mut front, id));
    let mut slots = Vec::new();
    back.take_with(9, &mut slots, |request| vec![request[0]; 3]).unwrap();
    back.respond(slots[2], -1, 77);
    back.push();
    back.respond(slots[0], 0, 5);
    drop(back);
    let (mut back, again) = s.reattach(false).unwrap();
    let ids: Vec<u8> = again.iter().map(|&slot| back.request(slot)[0]).collect();
    assert_eq!(ids, [1, 3]);
    assert_eq!(back.extra(again[1]), [3; 3]);
    back.push();
    assert_eq!(receive(&mut front), [(2, -1, 77), (0, 0, 5)], "the second from the journal alone");
    for slot in again {
        back.respond(slot, 0, 0);
    }
    back.push();
    assert_eq!(receive(&mut front).len(), 2);
    assert_eq!(back.journal().identity(), [1, 2, 3, 4, 5, 6]);
}

#[test]
fn only_what_ran_is_blamed_and_only_for_an_own_fault() {
    let (s, _front, mut back, mut slots) = Setup::taken(2);
    for (round, own_fault) in [false, true, true, false, true].into_iter().enumerate() {
        back.start(slots[0]);
        drop(back);
        let (again, list) = s.reattach(own_fault).unwrap();
        (back, slots) = (again, list);
        assert_eq!(back.attempts(slots[1]), 0);
        assert_eq!(back.attempts(slots[0]), [0, 1, 2, 2, 3][round]);
    }
    drop(back);
    let (back, slots) = s.reattach(true).unwrap();
    assert_eq!(back.attempts(slots[0]), MAX_ATTEMPTS, "not running: not blamed again");
}

#[test]
fn a_foreign_rsp_prod_fails_the_ring_for_good() {
    let (s, _front, mut back, slots) = Setup::taken(3);
    back.respond(slots[0], 0, 0);
    back.push();
    s.ring.store_u32(RSP_PROD_OFFSET, 3);
    assert_eq!(s.reattach(false).unwrap_err(), JournalError::ForeignRspProd { found: 3, from: 0, to: 1 });
    s.ring.store_u32(RSP_PROD_OFFSET, 1);
    assert_eq!(s.reattach(false).unwrap_err(), JournalError::FailedEarlier);
}

#[test]
fn rsp_prod_taken_back_by_the_frontend_fails_the_ring() {
    let (s, _front, mut back, slots) = Setup::taken(3);
    back.respond(slots[0], 0, 0);
    back.push();
    s.ring.store_u32(RSP_PROD_OFFSET, 0);
    assert!(matches!(s.reattach(false).unwrap_err(), JournalError::Damaged { .. }));
}

/// Every single damaged byte of a journal gives an error or the very same recovery, never another one.
#[test]
fn damage_is_an_error_not_a_wrong_answer() {
    let (s, mut front, mut back) = Setup::new();
    (0..4).for_each(|id| send(&mut front, id));
    let mut slots = Vec::new();
    back.take_with(9, &mut slots, |_| vec![9; 16]).unwrap();
    back.start(slots[1]);
    back.respond(slots[2], 0, 0);
    back.push();
    back.respond(slots[0], 0, 0);
    drop(back);
    let whole = s.journal.snapshot();
    let want = RingJournal::open(&*s.journal, s.shape).unwrap().recover(1, false).unwrap();
    let (mut errors, mut same) = (0, 0);
    for at in 0..s.shape.user() {
        for flip in [0x01, 0x80] {
            s.journal.copy_in(0, &whole);
            s.journal.copy_in(at, &[whole[at] ^ flip]);
            match RingJournal::open(&*s.journal, s.shape).and_then(|j| j.recover(1, false)) {
                Err(_) => errors += 1,
                // Bytes that carry no decision (unused ones, attempts, status and aux of an entry).
                Ok(found) => {
                    assert_eq!(found.unanswered, want.unanswered, "byte {at}");
                    assert_eq!((found.req_cons, found.rsp_prod), (want.req_cons, want.rsp_prod), "byte {at}");
                    same += 1;
                }
            }
        }
    }
    println!("{errors} damages seen, {same} without effect");
    assert!(errors > 300, "{errors}");
}

#[test]
fn garbage_never_panics() {
    use rand::{Rng, SeedableRng};
    let (s, ..) = Setup::new();
    let mut rng = rand::rngs::SmallRng::seed_from_u64(7);
    let fresh = s.journal.snapshot();
    for _ in 0..3000 {
        let mut bytes = fresh.clone();
        let from = if rng.random() { H_STATIC_END } else { HEADER_BYTES };
        rng.fill(&mut bytes[from..]);
        if rng.random() {
            bytes[H_FAILED..H_FAILED + 4].fill(0);
        }
        for slot in 0..s.shape.entries {
            let at = s.shape.entry(slot);
            bytes[at] = [0, 0x1d, 0x2b, 0x36, 5][rng.random_range(0..5)];
        }
        s.journal.copy_in(0, &bytes);
        drop(s.reattach(rng.random()));
    }
}

#[test]
fn a_frontend_that_runs_ahead_cannot_use_up_the_journal() {
    let (_s, mut front, mut back) = Setup::new();
    let mut slots = Vec::new();
    (0..4).for_each(|id| send(&mut front, id));
    back.take(9, &mut slots).unwrap();
    slots.drain(..).for_each(|slot| back.respond(slot, 0, 0));
    // Answered, not yet published: a hostile frontend pushes four more all the same.
    front.mem().store_u32(xen_abi::io::ring::REQ_PROD_OFFSET, 8);
    assert_eq!(back.take(9, &mut slots), Ok(0));
    back.push();
    assert_eq!(back.take(9, &mut slots), Ok(4));
}

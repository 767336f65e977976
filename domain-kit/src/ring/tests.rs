use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use xen_abi::io::ring::{REQ_PROD_OFFSET, RING_OFFSET, RSP_PROD_OFFSET};

use super::*;
use crate::mem::{Page, SharedMem};

fn layout() -> RingLayout {
    RingLayout::new(1, 112, 16)
}

fn pair() -> (FrontRing<Arc<HeapMem>>, BackRing<Arc<HeapMem>>) {
    let mem = Arc::new(HeapMem::new(4096));
    (FrontRing::init(mem.clone(), layout()), BackRing::attach(mem, layout(), 0, 0))
}

#[test]
fn requests_and_responses_pass() {
    let (mut front, mut back) = pair();
    let (mut req, mut rsp) = ([0; 112], [0; 16]);
    for round in 0..100u32 {
        for i in 0..32u32 {
            req[..4].copy_from_slice(&(round * 32 + i).to_le_bytes());
            front.put(&req);
        }
        assert_eq!(front.free(), 0);
        front.push();
        assert_eq!(back.unconsumed(), Ok(32));
        for i in 0..32u32 {
            back.take(&mut req);
            assert_eq!(req[..4], (round * 32 + i).to_le_bytes());
            rsp[..4].copy_from_slice(&req[..4]);
            back.put(&rsp);
        }
        back.push();
        assert_eq!(front.unconsumed(), Ok(32));
        for i in 0..32u32 {
            front.take(&mut rsp);
            assert_eq!(rsp[..4], (round * 32 + i).to_le_bytes());
        }
    }
}

#[test]
fn one_event_for_a_sleeper_none_for_the_awake() {
    let (mut front, mut back) = pair();
    front.put(&[0; 112]);
    assert!(front.push(), "a new ring asks for an event");
    front.put(&[0; 112]);
    assert!(!front.push(), "the backend has not asked again");
    back.take(&mut [0; 112]);
    back.take(&mut [0; 112]);
    assert_eq!(back.final_check(), Ok(false));
    front.put(&[0; 112]);
    assert!(front.push());
    assert_eq!(back.final_check(), Ok(true), "work arrived meanwhile");
}

/// XSA-38's class: every index that an honest peer cannot have written is an error.
#[test]
fn xsa_38_every_foreign_index_is_judged() {
    for cons in [0u32, 5, u32::MAX - 3] {
        let mem = HeapMem::new(4096);
        let back = BackRing::attach(&mem, layout(), cons, cons.wrapping_sub(2));
        for delta in (-100i32..100).chain([i32::MIN, i32::MAX]) {
            let req_prod = cons.wrapping_add_signed(delta);
            mem.store_u32(REQ_PROD_OFFSET, req_prod);
            let fine = (0..=30).contains(&delta);
            assert_eq!(back.unconsumed().is_ok(), fine, "cons {cons} delta {delta}");
            assert_eq!(back.final_check().is_ok(), fine);
        }
    }
    let mem = HeapMem::new(4096);
    let mut front = FrontRing::init(&mem, layout());
    front.put(&[0; 112]);
    front.put(&[0; 112]);
    front.push();
    front.put(&[0; 112]);
    for delta in -100i32..100 {
        mem.store_u32(RSP_PROD_OFFSET, delta as u32);
        assert_eq!(
            front.unconsumed().is_ok(),
            (0..=2).contains(&delta),
            "only pushed requests can be answered"
        );
    }
}

/// XSA-155: a frontend that changes a request while it is taken can tear it, but what was taken does not change any more.
#[test]
fn xsa_155_double_fetch() {
    let (mem, _fd) = SharedMem::create("xsa-155", 4096).unwrap();
    let mem = Arc::new(mem);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut fill = 0u8;
            while !stop.load(Ordering::Relaxed) {
                mem.copy_in(RING_OFFSET, &[fill; 112]);
                fill = fill.wrapping_add(1);
            }
        });
        mem.store_u32(REQ_PROD_OFFSET, 1);
        for _ in 0..20_000 {
            let mut back = BackRing::attach(Page::new(mem.clone(), 0), layout(), 0, 0);
            let mut copy = [0; 112];
            back.take(&mut copy);
            let judged = copy;
            std::hint::spin_loop();
            assert_eq!(judged, copy);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// XSA-216: poisoned memory, and every byte of a response is the backend's.
#[test]
fn xsa_216_no_unwritten_byte_leaves() {
    let mem = HeapMem::new(4096);
    mem.copy_in(RING_OFFSET, &[0xa5; 4096 - RING_OFFSET]);
    let mut back = BackRing::attach(&mem, layout(), 1, 0);
    back.put(&[7; 16]);
    let mut slot = [0; 17];
    mem.copy_out(RING_OFFSET, &mut slot);
    assert_eq!(slot[..16], [7; 16]);
    assert_eq!(slot[16], 0xa5, "and no byte beyond it is touched");
}

proptest! {
    /// Any interleaving of honest ends: order kept, nothing lost, events never missed.
    #[test]
    fn honest_ends_agree(steps in proptest::collection::vec(0u8..4, 1..400), start in any::<u32>()) {
        let mem = Arc::new(HeapMem::new(4096));
        let layout = layout().with_size(4);
        let mut front = FrontRing::init(mem.clone(), layout);
        // Start near any index, wraps included.
        for offset in [0, 8] {
            mem.store_u32(offset, start);
            mem.store_u32(offset + 4, start.wrapping_add(1));
        }
        front.req_prod_start(start);
        let mut back = BackRing::attach(mem, layout, start, start);
        let (mut sent, mut seen, mut answered, mut got) = (0u32, 0u32, 0u32, 0u32);
        let (mut back_asleep, mut front_asleep) = (false, false);
        for step in steps {
            match step {
                0 if front.free() > 0 => {
                    let mut req = [0; 112];
                    req[..4].copy_from_slice(&sent.to_le_bytes());
                    front.put(&req);
                    sent += 1;
                    if front.push() {
                        back_asleep = false;
                    } else {
                        prop_assert!(!back_asleep, "a sleeping backend was not woken");
                    }
                }
                1 if !back_asleep => {
                    if back.unconsumed().unwrap() > 0 {
                        let mut req = [0; 112];
                        back.take(&mut req);
                        prop_assert_eq!(&req[..4], &seen.to_le_bytes()[..]);
                        seen += 1;
                    } else {
                        back_asleep = !back.final_check().unwrap();
                    }
                }
                2 if answered < seen => {
                    let mut rsp = [0; 16];
                    rsp[..4].copy_from_slice(&answered.to_le_bytes());
                    back.put(&rsp);
                    answered += 1;
                    if back.push() {
                        front_asleep = false;
                    } else {
                        prop_assert!(!front_asleep, "a sleeping frontend was not woken");
                    }
                }
                3 if !front_asleep => {
                    if front.unconsumed().unwrap() > 0 {
                        let mut rsp = [0; 16];
                        front.take(&mut rsp);
                        prop_assert_eq!(&rsp[..4], &got.to_le_bytes()[..]);
                        got += 1;
                    } else {
                        front_asleep = !front.final_check().unwrap();
                    }
                }
                _ => {}
            }
        }
    }
}

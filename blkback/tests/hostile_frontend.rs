//! A frontend that breaks the rules, and a medium that fails: what the engine makes of them. Tests are named after the Xen Security
//! Advisory whose class they are about.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use blkback::engine::NoSpace;
use blkback::limit::{Limiter, Limits};
use common::world::{ABI, PAGES, SECTORS, world};
use domain_kit::journal::JournalError;
use nix::libc;
use xen_abi::io::blkif::*;
use xen_abi::io::ring::{REQ_PROD_OFFSET, RING_OFFSET, RSP_PROD_OFFSET};

/// XSA-155, 166, 197: a thread flips every byte of the slots and of the indirect and data pages while requests run. Nothing beyond the
/// granted pages and the disk is touched, the service lives, and an honest request is served afterwards.
#[test]
fn xsa_155_double_fetch() {
    let mut world = world();
    let guard = [0xc3; 4096];
    world.guest.copy_in(0, &guard);
    world.guest.copy_in((PAGES + 1) * 4096, &guard);
    let stop = AtomicBool::new(false);
    let (ring, guest) = (world.ring.clone(), world.guest.clone());
    let mut answered = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut x = 1u64;
            while !stop.load(Relaxed) {
                for _ in 0..64 {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    let at = RING_OFFSET + (x as usize >> 8) % (32 * 112);
                    // Mostly small values: they pass more checks.
                    let byte = if x & 3 == 0 { (x >> 40) as u8 } else { (x >> 40) as u8 % 8 };
                    ring.copy_in(at, &[byte]);
                    guest.copy_in(4096 + (x as usize >> 20) % (PAGES * 4096), &[byte]);
                }
            }
        });
        let until = Instant::now() + Duration::from_millis(700);
        let mut id = 0u64;
        while Instant::now() < until {
            while world.front.free() > 0 {
                id += 1;
                let gref = id as u32 % PAGES as u32;
                if id.is_multiple_of(2) {
                    world.write(id, id % SECTORS, gref);
                } else {
                    let mut request = BlkifRequestIndirect {
                        operation: BLKIF_OP_INDIRECT,
                        indirect_op: BLKIF_OP_READ,
                        nr_segments: 1 + id as u16 % 256,
                        id,
                        ..Default::default()
                    };
                    request.indirect_grefs[0] = gref;
                    world.put(&Request::Indirect(request));
                }
            }
            answered += world.settle().len();
        }
        stop.store(true, Relaxed);
    });
    world.settle();
    assert!(answered > 1000, "{answered} requests");
    for at in [0, (PAGES + 1) * 4096] {
        let mut bytes = [0; 4096];
        world.guest.copy_out(at, &mut bytes);
        assert_eq!(bytes, guard, "a page that was not granted");
    }
    world.guest.copy_in(4096, &[0x11; 4096]);
    world.write(77, 8, 0);
    assert_eq!(world.settle(), [(77, BLKIF_RSP_OKAY)]);
    assert_eq!(world.engine.disk().data[8 * 512..16 * 512], [0x11; 4096]);
}

/// blkfront's rules: whatever bytes are in a slot, it gets one response with its id, of the operation that it stands for, and the ring
/// goes on. (Any other response makes Linux's blkfront give the disk up.)
#[test]
fn every_slot_is_answered_once_whatever_is_in_it() {
    let mut world = world();
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let mut statuses = std::collections::BTreeSet::new();
    for round in 0..2000u64 {
        let mut asked = std::collections::BTreeMap::new();
        for n in 0..1 + random() % 32 {
            let mut slot = [0; MAX_ENTRY_SIZE];
            slot.chunks_mut(8)
                .for_each(|chunk| chunk.copy_from_slice(&random().to_le_bytes()[..chunk.len()]));
            // Mostly known operations and small numbers: they get further.
            if !random().is_multiple_of(4) {
                (slot[0], slot[1]) = ((random() % 7) as u8, (random() % 12) as u8);
                slot[16..24].copy_from_slice(&(random() % (SECTORS + 8)).to_le_bytes());
                for segment in slot[24..].chunks_exact_mut(8) {
                    segment.copy_from_slice(&[(random() % 20) as u8, 0, 0, 0, (random() % 9) as u8, 7, 0, 0]);
                }
            }
            let id = round << 8 | n;
            slot[8..16].copy_from_slice(&id.to_le_bytes());
            asked.insert(id, ABI.decode(&slot).operation());
            world.front.put(&slot);
        }
        world.front.push();
        while world.engine.poll().unwrap().more {}
        while world.front.unconsumed().unwrap() > 0 {
            let mut bytes = [0; 16];
            world.front.take(&mut bytes);
            let response = ABI.decode_response(&bytes);
            assert_eq!(asked.remove(&response.id), Some(response.operation), "{response:?}");
            statuses.insert(response.status);
        }
        assert!(asked.is_empty(), "not answered: {asked:?}");
    }
    assert_eq!(
        statuses.into_iter().collect::<Vec<_>>(),
        [BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY]
    );
}

/// XSA-216: the slot is poisoned, and no byte of it stays in the response.
#[test]
fn xsa_216_no_unwritten_byte_leaves() {
    let mut world = world();
    world.write(5, 0, 0);
    while world.engine.in_flight() == 0 {
        world.engine.round().unwrap();
    }
    world.ring.copy_in(RING_OFFSET, &[0xa5; 112]);
    while world.engine.poll().unwrap().more {}
    let mut bytes = [0; 16];
    world.ring.copy_out(RING_OFFSET, &mut bytes);
    assert_eq!(bytes, [5, 0, 0, 0, 0, 0, 0, 0, BLKIF_OP_WRITE, 0, 0, 0, 0, 0, 0, 0]);
}

/// XSA-38's class: an index that no honest frontend writes ends the ring for good.
#[test]
fn xsa_38_a_foreign_index_ends_the_ring() {
    for req_prod in [33, 1000, u32::MAX, 1 << 31] {
        let mut world = world();
        domain_kit::ring::RingMem::store_u32(&*world.ring, REQ_PROD_OFFSET, req_prod);
        assert!(matches!(world.engine.poll(), Err(JournalError::Ring(_))), "{req_prod}");
    }
}

/// A frontend that writes the backend's own index changes nothing: the backend keeps its own.
#[test]
fn rsp_prod_is_the_backends_own() {
    let mut world = world();
    domain_kit::ring::RingMem::store_u32(&*world.ring, RSP_PROD_OFFSET, 20);
    world.write(1, 0, 0);
    while world.engine.poll().unwrap().more {}
    assert_eq!(domain_kit::ring::RingMem::load_u32(&*world.ring, RSP_PROD_OFFSET), 1);
}

/// XSA-391: no event without a response, however often the backend is woken; and at most one for a batch.
#[test]
fn xsa_391_no_event_without_a_response() {
    let mut world = world();
    for _ in 0..1000 {
        assert!(!world.engine.poll().unwrap().notify);
    }
    for id in 0..8 {
        world.write(id, id * 8, id as u32);
    }
    let mut events = 0;
    loop {
        let polled = world.engine.poll().unwrap();
        events += u32::from(polled.notify);
        if !polled.more {
            break;
        }
    }
    assert_eq!(events, 1, "the frontend has not asked for a second one");
}

/// XSA-391: a frontend that asks for an event for each response gets no more than that, however it wakes the backend.
#[test]
fn xsa_391_no_more_events_than_responses() {
    let mut world = world();
    let (mut events, mut responses) = (0, 0);
    for id in 0..500 {
        world.write(id, id * 8 % SECTORS, id as u32 % PAGES as u32);
        for _ in 0..10 {
            events += u32::from(world.engine.poll().unwrap().notify);
        }
        while world.front.unconsumed().unwrap() > 0 {
            world.front.take(&mut [0; 16]);
            responses += 1;
        }
        // Asks for the next one.
        assert!(!world.front.final_check().unwrap());
    }
    assert!(responses == 500 && events <= responses, "{events} events for {responses} responses");
}

/// An error of the medium is that request's alone.
#[test]
fn a_medium_error_answers_that_request_alone() {
    let mut world = world();
    world.engine.disk().fail = vec![libc::EIO];
    for id in 0..4 {
        world.write(id, id * 8, id as u32);
    }
    let mut responses = world.settle();
    responses.sort_unstable();
    let errors: Vec<_> = responses.iter().filter(|(_, status)| *status == BLKIF_RSP_ERROR).collect();
    assert_eq!((responses.len(), errors.len(), world.stats.errors.get()), (4, 1, 1));
}

/// No room on the medium: reported, or the ring stops until there is room, and the statistics show it.
#[test]
fn no_space_is_reported_or_waited_for() {
    let mut plain = world();
    plain.engine.disk().fail = vec![libc::ENOSPC];
    plain.write(1, 0, 0);
    assert_eq!(plain.settle(), [(1, BLKIF_RSP_ERROR)]);

    let mut world = world();
    world.engine.set_no_space(NoSpace::Stop);
    world.engine.disk().fail = vec![libc::ENOSPC; 2];
    world.write(1, 0, 0);
    world.write(2, 8, 1);
    assert_eq!(world.settle(), []);
    assert_eq!(world.stats.no_space.get(), 1);
    let until = Instant::now() + Duration::from_secs(20);
    let mut responses = Vec::new();
    while responses.len() < 2 && Instant::now() < until {
        std::thread::sleep(world.engine.due().unwrap_or_default().min(Duration::from_secs(1)));
        responses.extend(world.settle());
    }
    responses.sort_unstable();
    assert_eq!(responses, [(1, BLKIF_RSP_OKAY), (2, BLKIF_RSP_OKAY)]);
    assert_eq!((world.stats.no_space.get(), world.stats.errors.get()), (0, 0));
}

/// A limit makes requests wait, and may be lifted while they do.
#[test]
fn limits_hold_and_change() {
    let mut world = world();
    let limiter = Arc::new(Limiter::default());
    limiter.set(Limits { iops: 1, iops_burst: 3, ..Limits::default() });
    world.engine.set_limiter(limiter.clone());
    for id in 0..8 {
        world.write(id, id * 8, id as u32);
    }
    assert_eq!(world.settle().len(), 3);
    let due = world.engine.due().expect("it waits for the limit");
    assert!(due > Duration::ZERO && due <= Duration::from_secs(2), "{due:?}");
    limiter.set(Limits::default());
    std::thread::sleep(due);
    assert_eq!(world.settle().len(), 5);
    assert!(world.stats.throttled.get() > 0);
}

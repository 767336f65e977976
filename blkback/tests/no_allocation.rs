//! A request costs no allocation, once the engine has run a while.
#![expect(unsafe_code, reason = "an allocator that counts")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::world::{PAGES, SECTORS, World, world};
use xen_abi::io::blkif::*;

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: all of it is the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller says.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller says.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller says.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Requests of each kind at depth 32.
fn batch(world: &mut World, round: u64) {
    for id in 0..32 {
        let sector_number = (round * 32 + id) * 8 % SECTORS;
        let gref = id as u32 % PAGES as u32;
        match id % 4 {
            0 => world.write(id, sector_number, gref),
            1 => {
                let mut request = BlkifRequestIndirect {
                    operation: BLKIF_OP_INDIRECT,
                    indirect_op: BLKIF_OP_READ,
                    nr_segments: 2,
                    id,
                    ..Default::default()
                };
                request.indirect_grefs[0] = PAGES as u32 - 1;
                world.put(&Request::Indirect(request));
            }
            2 => {
                let operation = BLKIF_OP_FLUSH_DISKCACHE;
                world.put(&Request::Direct(BlkifRequest { operation, id, ..Default::default() }));
            }
            _ => {
                let mut request = BlkifRequest {
                    operation: BLKIF_OP_READ,
                    id,
                    sector_number,
                    nr_segments: 1,
                    ..Default::default()
                };
                request.seg[0] = BlkifRequestSegment::new(gref, 0, 7);
                world.put(&Request::Direct(request));
            }
        }
    }
    while world.engine.poll().unwrap().more {}
    while world.front.unconsumed().unwrap() > 0 {
        world.front.take(&mut [0; 16]);
    }
}

#[test]
fn no_allocation_per_request() {
    let mut world = world();
    (0..20).for_each(|round| batch(&mut world, round));
    let (before, answered) = (COUNT.with(Cell::get), world.engine.answered());
    (20..220).for_each(|round| batch(&mut world, round));
    let (allocations, requests) = (COUNT.with(Cell::get) - before, world.engine.answered() - answered);
    assert_eq!((requests, allocations), (200 * 32, 0));
}

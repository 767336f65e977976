//! A journal that is cut short or has flipped bits: the daemon refuses, or starts from what is whole and says so. It never serves
//! another tree.

use std::rc::Rc;

use domain_kit::mem::sealed_memfd;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use xenstored::engine::{Engine, Options};
use xenstored::journal::JournalError;
use xenstored::journal::layout::{BEHAVIOUR, HALVES, PAGE, Parts, sb};
use xenstored::journal::log::Log;
use xenstored::journal::mem::Mem;
use xenstored::transport::stream::{self, StreamIo};

const HALF: u64 = 1 << 20;

fn options(salvage: bool) -> Options {
    Options { half_size: HALF, salvage, ..Options::default() }
}

/// Gives the daemon these bytes once, and takes all it sends.
struct Feed(std::cell::RefCell<Vec<u8>>);

impl StreamIo for Feed {
    fn recv(&self, mem: &Mem, hdr: usize, into: [(usize, usize); 2]) -> Result<(), nix::errno::Errno> {
        let mut bytes = self.0.borrow_mut();
        let n = bytes.len().min(into[0].1);
        mem.kernel_write(into[0].0, &bytes[..n]);
        mem.kernel_msg_len(hdr, n as u32);
        bytes.drain(..n);
        Ok(())
    }

    fn send(&self, mem: &Mem, hdr: usize, from: [&[u8]; 2]) -> Result<(), nix::errno::Errno> {
        mem.kernel_msg_len(hdr, (from[0].len() + from[1].len()) as u32);
        Ok(())
    }
}

/// Names with their depth, and values.
type Listing = Vec<(Vec<u8>, Vec<u8>)>;

/// A journal with a snapshot and 60 writes, and the states it went through, as listings of the tree.
fn journal() -> (Rc<Mem>, Vec<Listing>) {
    let len = Log::memory_len(HALF) as usize;
    let mem = Rc::new(Mem::map(sealed_memfd("damage", len).expect("memfd").into(), len).expect("map"));
    let (mut engine, _) = Engine::open(Rc::clone(&mem), &options(false)).expect("fresh");
    let conn = engine.open_socket().expect("room").expect("slot");
    let mut states = vec![listing(&engine)];
    for i in 0u32..60 {
        let payload = format!("/n/{i}\0value {i}");
        let head = [11u32, i, 0, payload.len() as u32].map(u32::to_ne_bytes).concat();
        let feed = Feed([&head[..], payload.as_bytes()].concat().into());
        stream::pull(&engine, conn, &feed);
        engine.process(conn, 8);
        stream::push(&mut engine, conn, &feed).expect("room");
        if i == 20 {
            engine.compact().expect("room");
        }
        states.push(listing(&engine));
    }
    (mem, states)
}

fn listing(engine: &Engine) -> Listing {
    let tree = &engine.store.tree;
    tree.walk()
        .map(|(depth, name, id)| ([&[depth as u8], name].concat(), tree.node(id).value.to_vec()))
        .collect()
}

#[test]
fn flipped_bits_never_give_another_tree() {
    let (mem, states) = journal();
    let last = states.last().expect("states").clone();
    let active = (mem.load_u64(sb::ACTIVE) & 1) as usize;
    let base = HALVES + active * HALF as usize;
    let tail = mem.load_u64(base) as usize;
    let mut rng = SmallRng::seed_from_u64(7);
    let (mut refused, mut salvaged) = (0, 0);
    for _ in 0..600 {
        // Anywhere in the active half's head and records.
        let at = base
            + if rng.random_bool(0.1) { rng.random_range(0..16) } else { 64 + rng.random_range(0..tail) };
        let mut byte = [0];
        mem.read(at, &mut byte);
        let good = byte[0];
        mem.write(at, &[good ^ 1 << rng.random_range(0..8)]);
        match Engine::open(Rc::clone(&mem), &options(false)) {
            Err(JournalError::Damaged(_)) => refused += 1,
            Err(e) => panic!("{e}"),
            // The padding between records is not anybody's.
            Ok((engine, opened)) => {
                assert!(opened.dropped.is_none());
                assert!(listing(&engine) == last, "byte {at}: another tree");
            }
        }
        let mut saved = vec![0; 64 + tail];
        mem.read(base, &mut saved);
        if let Ok((engine, opened)) = Engine::open(Rc::clone(&mem), &options(true)) {
            let found = listing(&engine);
            assert!(found == last || opened.dropped.is_some(), "byte {at}: dropped without a word");
            assert!(states.contains(&found), "byte {at}: a tree that never was");
            salvaged += usize::from(opened.dropped.is_some());
        }
        // As it was: salvaging wrote a new tail and more.
        saved[at - base] = good;
        mem.write(base, &saved);
    }
    println!("{refused} refused, {salvaged} salvaged");
    assert!(refused > 400 && salvaged > 100, "{refused} {salvaged}");
}

/// The tree's pages, their checksums, and the pages to put back: wherever a bit flips, the daemon serves what was there or
/// refuses.
#[test]
fn flipped_bits_of_the_tree_are_noticed() {
    let (mem, states) = journal();
    let last = states.last().expect("states").clone();
    let parts = Parts::new(HALF);
    let undo = (mem.load_u64(sb::UNDO) & 0xffff_ffff) as usize;
    assert!(undo > 2, "pages changed since the snapshot");
    let mut used = vec![0; PAGE];
    mem.read(parts.arena, &mut used);
    let used = u32::from_le_bytes(used[..4].try_into().expect("bump")) as usize * 8;
    let (mut whole, mut all) = (vec![0; parts.arena - parts.sums], vec![0; used.next_multiple_of(PAGE)]);
    mem.read(parts.sums, &mut whole);
    mem.read(parts.arena, &mut all);
    let mut rng = SmallRng::seed_from_u64(8);
    let (mut refused, mut served) = (0, 0);
    for round in 0..600 {
        let at = match round % 4 {
            0 => parts.sums + rng.random_range(0..used / PAGE * 4),
            1 => parts.undo_index + rng.random_range(0..undo * 4),
            2 => parts.undo + rng.random_range(0..undo * PAGE),
            _ => parts.arena + rng.random_range(0..used),
        };
        let mut byte = [0];
        mem.read(at, &mut byte);
        mem.write(at, &[byte[0] ^ 1 << rng.random_range(0..8)]);
        for salvage in [false, true] {
            match Engine::open(Rc::clone(&mem), &options(salvage)) {
                Err(JournalError::Damaged(_)) => refused += 1,
                Err(e) => panic!("{e}"),
                Ok((engine, opened)) => {
                    // Of a page that is put back anyway, nobody needs the damaged bytes.
                    assert!(opened.dropped.is_none() && listing(&engine) == last, "byte {at}: another tree");
                    served += 1;
                }
            }
        }
        mem.write(parts.sums, &whole);
        mem.write(parts.arena, &all);
        mem.store_u64(sb::UNDO, mem.load_u64(sb::ACTIVE) >> 1 << 32 | undo as u64);
    }
    println!("{refused} refused, {served} served");
    assert!(refused > 400 && served > 50, "{refused} {served}");
}

/// Blobs of all sizes, whose size class may reach into a page that nothing is written to: every page has its checksum.
#[test]
fn every_page_has_a_checksum() {
    let (mem, _) = journal();
    for round in 0u32..150 {
        let (mut engine, opened) = Engine::open(Rc::clone(&mem), &options(false)).expect("whole");
        assert!(opened.dropped.is_none());
        let conn = engine.store.conns().next().expect("connection").0;
        let payload = format!("/big/{round}\0{}", "v".repeat(round as usize * 26));
        let head = [11u32, round, 0, payload.len() as u32].map(u32::to_ne_bytes).concat();
        let feed = Feed([&head[..], payload.as_bytes()].concat().into());
        while !feed.0.borrow().is_empty() {
            stream::pull(&engine, conn, &feed);
        }
        engine.process(conn, 8);
        stream::push(&mut engine, conn, &feed).expect("room");
        engine.compact().expect("room");
    }
    let (engine, _) = Engine::open(mem, &options(false)).expect("whole");
    engine.store.check().expect("invariants");
    assert_eq!(engine.store.tree.len(), 5 + 1 + 60 + 1 + 150);
}

#[test]
fn truncated_file_is_refused() {
    let (mem, _) = journal();
    let active = (mem.load_u64(sb::ACTIVE) & 1) as usize;
    let base = HALVES + active * HALF as usize;
    let tail = mem.load_u64(base) as usize;
    // What a file cut at a record's middle and extended again with zeroes looks like.
    let zeroes = vec![0; tail / 2];
    mem.write(base + 64 + tail - zeroes.len(), &zeroes);
    assert!(matches!(Engine::open(Rc::clone(&mem), &options(false)), Err(JournalError::Damaged(_))));
    let (_, opened) = Engine::open(mem, &options(true)).expect("the rest is whole");
    assert!(opened.dropped.is_some_and(|what| what.contains("dropped")));
}

#[test]
fn journal_of_another_behaviour_is_refused_unless_compacted() {
    let (mem, states) = journal();
    mem.store_u64(sb::BEHAVIOUR, 99);
    assert!(matches!(
        Engine::open(Rc::clone(&mem), &options(false)),
        Err(JournalError::Behaviour { found: 99, .. })
    ));
    mem.store_u64(sb::BEHAVIOUR, BEHAVIOUR);
    let (mut engine, _) = Engine::open(Rc::clone(&mem), &options(false)).expect("ours");
    engine.compact().expect("room");
    drop(engine);
    mem.store_u64(sb::BEHAVIOUR, 99);
    let (engine, _) = Engine::open(mem, &options(false)).expect("a snapshot alone is anybody's");
    assert!(listing(&engine) == *states.last().expect("states"));
}

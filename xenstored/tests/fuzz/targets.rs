//! The targets. Each holds whatever its input is; what it gives are signs of what happened, for the fuzzer to look for new ones.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use domain_kit::mem::{Page, SharedMem, sealed_memfd};
use domain_kit::xs::SharedPage as _;
use nix::errno::Errno;
use xenstored::codec::Reader;
use xenstored::engine::{Engine, Options, Processed};
use xenstored::journal::JournalError;
use xenstored::journal::layout::{HALVES, Parts, SLOT_HEADS, sb};
use xenstored::journal::log::Log;
use xenstored::journal::mem::Mem;
use xenstored::migrate::{self, Ends, RingEnd, Sources};
use xenstored::store::{Class, ConnId, Event};
use xenstored::transport::ring::{self, BadIndex};
use xenstored::transport::stream::{self, StreamIo};

const HALF: u64 = 256 << 10;
/// Requests carried out for one input.
const REQUESTS: usize = 256;

fn memory() -> Rc<Mem> {
    let len = Log::memory_len(HALF) as usize;
    Rc::new(Mem::map(sealed_memfd("fuzz", len).expect("memfd").into(), len).expect("map"))
}

fn options(salvage: bool) -> Options {
    Options { half_size: HALF, salvage, ..Options::default() }
}

/// A client's two directions.
#[derive(Default)]
struct Wire {
    to_server: RefCell<Vec<u8>>,
    to_client: RefCell<Vec<u8>>,
}

impl StreamIo for Wire {
    fn recv(&self, mem: &Mem, hdr: usize, into: [(usize, usize); 2]) -> Result<(), Errno> {
        let mut bytes = self.to_server.borrow_mut();
        let n = bytes.len().min(into[0].1);
        if n == 0 {
            return Err(Errno::EAGAIN);
        }
        mem.kernel_write(into[0].0, &bytes[..n]);
        mem.kernel_msg_len(hdr, n as u32);
        bytes.drain(..n);
        Ok(())
    }

    fn send(&self, mem: &Mem, hdr: usize, from: [&[u8]; 2]) -> Result<(), Errno> {
        let mut bytes = self.to_client.borrow_mut();
        bytes.extend(from[0].iter().chain(from[1]));
        mem.kernel_msg_len(hdr, (from[0].len() + from[1].len()) as u32);
        Ok(())
    }
}

/// Depth and name, and value, of every node.
type Listing = Vec<(Vec<u8>, Vec<u8>)>;

fn listing(engine: &Engine) -> Listing {
    let tree = &engine.store.tree;
    tree.walk()
        .map(|(depth, name, id)| ([&[depth as u8], name].concat(), tree.node(id).value.to_vec()))
        .collect()
}

/// What the client was sent is whole messages; their types and errors are signs.
fn replies(bytes: &[u8], signs: &mut Vec<u64>) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let word = |i: usize| u32::from_ne_bytes(rest[4 * i..4 * i + 4].try_into().expect("a header"));
        let (kind, len) = (word(0), word(3) as usize);
        assert!(len <= 4096, "a message of {len} bytes");
        let payload = &rest[16..16 + len];
        let error = if kind == 16 { payload } else { &[] };
        let sign =
            error.iter().fold(u64::from(kind), |sign, b| sign.wrapping_mul(31).wrapping_add(u64::from(*b)));
        signs.push(sign << 8 | bits(len));
        rest = &rest[16 + len..];
    }
}

/// How many bits a number has: signs tell lengths apart by that.
fn bits(n: usize) -> u64 {
    u64::from(usize::BITS - n.leading_zeros())
}

/// Bytes of two clients, one of them a guest. First byte: who begins, and after how many bytes the other one goes on.
pub fn wire(input: &[u8]) -> Vec<u64> {
    let Some((first, bytes)) = input.split_first() else { return Vec::new() };
    let mem = memory();
    let (mut engine, _) = Engine::open(Rc::clone(&mem), &options(false)).expect("fresh");
    let dom0 = engine.open_socket().expect("room").expect("slot");
    let guest = engine.domain_up(5, 1, (1, 1), Class::Guest).expect("room").expect("slot");
    let clients = [(dom0, Wire::default()), (guest, Wire::default())];
    let mut signs = Vec::new();
    let mut requests = 0;
    // With an odd first byte the clients take turns after so many bytes; else one sends all.
    let turn = if first & 1 == 0 { usize::MAX } else { 16 + usize::from(first >> 2) };
    for (n, chunk) in bytes.chunks(turn.min(bytes.len().max(1))).enumerate() {
        let (id, wire) = &clients[(n + usize::from(first >> 1 & 1)) % 2];
        wire.to_server.borrow_mut().extend_from_slice(chunk);
        loop {
            let pulled = stream::pull(&engine, *id, wire);
            match engine.process(*id, 16) {
                Processed::Violation(_) => {
                    engine.cut_off(*id, 3).expect("room");
                    signs.push(1 << 40);
                }
                Processed::More => {}
                other => {
                    signs.push(2 << 40 | fingerprint(&format!("{other:?}")));
                }
            }
            // With the highest bit set, nobody reads before the end.
            for (id, wire) in clients.iter().filter(|_| first & 0x80 == 0) {
                stream::push(&mut engine, *id, wire).expect("room");
            }
            requests += 1;
            let more = engine.has_request(*id) || !wire.to_server.borrow().is_empty();
            if !more || requests > REQUESTS || pulled == xenstored::transport::Pulled::End {
                break;
            }
        }
    }
    for (id, wire) in &clients {
        stream::push(&mut engine, *id, wire).expect("room");
        replies(&wire.to_client.borrow(), &mut signs);
    }
    engine.store.check().expect("invariants");
    let before = listing(&engine);
    drop(engine);
    let (engine, opened) = Engine::open(mem, &options(false)).expect("its own journal");
    assert!(opened.dropped.is_none());
    engine.store.check().expect("invariants after a restart");
    assert!(listing(&engine) == before, "another tree after a restart");
    signs.push(3 << 40 | bits(before.len()));
    signs
}

/// A guest's doings in its page: 8 bytes each, what and with which number.
pub fn ring(input: &[u8]) -> Vec<u64> {
    let mem = memory();
    let (mut engine, _) = Engine::open(Rc::clone(&mem), &options(false)).expect("fresh");
    let conn: ConnId = engine.domain_up(5, 1, (1, 1), Class::Guest).expect("room").expect("slot");
    let (page_mem, _fd) = SharedMem::create("fuzz-ring", 4096).expect("page");
    let page = Page::new(Arc::new(page_mem), 0);
    ring::adopt(&engine, conn, &page);
    let mut signs = Vec::new();
    let mut rest = input;
    let mut steps = 0;
    while let Some((step, more)) = rest.split_first_chunk::<8>() {
        rest = more;
        steps += 1;
        if steps > REQUESTS {
            break;
        }
        let number = u32::from_ne_bytes([step[4], step[5], step[6], step[7]]);
        match step[0] % 6 {
            // req_cons, req_prod, rsp_cons, rsp_prod, features, connection, error: the page's words (io/xs_wire.h).
            0 => page.store_u32(2048 + 4 * usize::from(step[1] % 7), number),
            1 => {
                let len = more.len().min(usize::from(step[1]));
                let at = (number as usize) % 2048;
                page.write_bytes(at, &more[..len.min(4096 - at)]);
            }
            // A well-formed request, as a good client sends it.
            2 => {
                let prod = page.load_u32(2052);
                let path: &[u8] = b"/local/domain/5\0";
                let head = [u32::from(step[1]), number, 0, path.len() as u32].map(u32::to_ne_bytes).concat();
                for (i, byte) in head.iter().chain(path).enumerate() {
                    page.write_bytes((prod.wrapping_add(i as u32) % 1024) as usize, &[*byte]);
                }
                page.store_u32(2052, prod.wrapping_add(head.len() as u32 + path.len() as u32));
            }
            // It reads all replies.
            3 => page.store_u32(2056, page.load_u32(2060)),
            4 if ring::wants_reset(&page) => {
                ring::reset(&mut engine, conn, &page).expect("room");
                signs.push(5 << 40);
            }
            _ => {}
        }
        let bad = match ring::pull(&engine, conn, &page) {
            Ok(pulled) => {
                signs.push(6 << 40 | pulled as u64);
                false
            }
            Err(BadIndex) => true,
        };
        if let Processed::Violation(_) = engine.process(conn, 4) {
            engine.cut_off(conn, 3).expect("room");
            ring::publish(&engine, conn, &page);
            signs.push(7 << 40);
        }
        let push = ring::push(&mut engine, conn, &page).expect("room");
        if bad || push.is_err() {
            engine.cut_off(conn, 2).expect("room");
            ring::publish(&engine, conn, &page);
            signs.push(8 << 40 | u64::from(bad));
        }
        let ignored = engine.store.conn(conn).and_then(|c| c.ignored);
        signs.push(9 << 40 | u64::from(ignored.unwrap_or(0)));
    }
    engine.store.check().expect("invariants");
    drop(engine);
    let (engine, _) = Engine::open(mem, &options(false)).expect("its own journal");
    engine.store.check().expect("invariants after a restart");
    signs
}

/// The journal that is damaged, and the trees that it held one after the other.
fn good_journal() -> (Rc<Mem>, Vec<Listing>) {
    let mem = memory();
    let (mut engine, _) = Engine::open(Rc::clone(&mem), &options(false)).expect("fresh");
    let conn = engine.open_socket().expect("room").expect("slot");
    let mut states = vec![listing(&engine)];
    for i in 0u32..12 {
        let payload = format!("/n/{}\0value {i}", i % 5);
        let op: u32 = if i == 7 { 13 } else { 11 };
        let payload = if op == 13 { b"/n/1\0".to_vec() } else { payload.into_bytes() };
        let wire = Wire::default();
        let head = [op, i, 0, payload.len() as u32].map(u32::to_ne_bytes).concat();
        *wire.to_server.borrow_mut() = [head, payload].concat();
        stream::pull(&engine, conn, &wire);
        engine.process(conn, 8);
        stream::push(&mut engine, conn, &wire).expect("room");
        if i == 4 {
            engine.compact().expect("room");
        }
        states.push(listing(&engine));
    }
    (mem, states)
}

/// First byte even: the rest are events as they stand in records. Odd: patches of a good journal, each a part of it, a position, a
/// length and bytes; then it is opened both ways. It may be refused; it may not be another tree than one that was.
pub fn journal(input: &[u8]) -> Vec<u64> {
    let Some((first, rest)) = input.split_first() else { return Vec::new() };
    if first & 1 == 0 {
        let mut reader = Reader(rest);
        let mut signs = Vec::new();
        while let Some(event) = Event::decode(&mut reader) {
            let kind = std::mem::discriminant(&event);
            signs.push(10 << 40 | fingerprint(&kind));
            if reader.done() {
                break;
            }
        }
        return signs;
    }
    let (mem, states) = good_journal();
    let parts = Parts::new(HALF);
    let starts = [
        0,
        SLOT_HEADS,
        HALVES,
        HALVES + HALF as usize,
        parts.sums,
        parts.undo_index,
        parts.undo,
        parts.arena,
    ];
    let mut patches = rest;
    let mut signs = Vec::new();
    while let Some((head, more)) = patches.split_first_chunk::<4>() {
        let len = more.len().min(usize::from(head[3] % 64));
        let at = starts[usize::from(head[0] % 8)] + usize::from(u16::from_le_bytes([head[1], head[2]]));
        mem.write(at, &more[..len]);
        patches = &more[len..];
        signs.push(11 << 40 | u64::from(head[0] % 8));
    }
    let empty = mem.load_u64(sb::MAGIC) == 0;
    for salvage in [false, true] {
        match Engine::open(Rc::clone(&mem), &options(salvage)) {
            Ok((engine, opened)) => {
                engine.store.check().expect("invariants");
                let found = listing(&engine);
                // Eight zeroes at its beginning are no journal yet.
                assert_eq!(opened.fresh, empty, "a store thrown away");
                if opened.fresh {
                    return signs;
                }
                assert!(states.contains(&found), "a tree that never was");
                let whole = states.last() == Some(&found);
                assert!(whole || opened.dropped.is_some(), "dropped without a word");
                signs.push(12 << 40 | u64::from(salvage) << 1 | u64::from(whole));
            }
            Err(e) => {
                let text = match &e {
                    JournalError::Damaged(what) => {
                        what.split(|c: char| c.is_ascii_digit()).next().unwrap_or("")
                    }
                    _ => "other",
                };
                signs.push(13 << 40 | fingerprint(&text));
            }
        }
    }
    signs
}

/// Has the socket of every connection, and a ring for every domain.
struct AllEnds;

impl Ends for AllEnds {
    fn socket(&mut self, _number: u32, _fd: u32) -> bool {
        true
    }

    fn ring(&mut self, domid: u16) -> Option<RingEnd> {
        let (req_cons, rsp_prod) = (u32::from(domid) * 7, u32::MAX - u32::from(domid));
        Some(RingEnd { instance: 1, gref: 1, port: 1, class: Class::Guest, req_cons, rsp_prod, error: 0 })
    }
}

/// First byte even: a migration stream. Odd: requests of a client, whose store goes through a stream and back and is the same then.
pub fn stream(input: &[u8]) -> Vec<u64> {
    let Some((first, rest)) = input.split_first() else { return Vec::new() };
    let mut signs = Vec::new();
    if first & 1 == 0 {
        match Engine::import(memory(), &options(false), rest, &mut AllEnds) {
            Ok((engine, imported)) => {
                engine.store.check().expect("invariants");
                signs.extend(imported.kept.iter().chain(&imported.left_out).map(|n| 14 << 40 | bits(*n)));
            }
            Err(e) => {
                let text = e.to_string();
                let kind: String = text.chars().filter(|c| !c.is_ascii_digit()).collect();
                signs.push(15 << 40 | fingerprint(&kind));
            }
        }
        return signs;
    }
    let (mut engine, _) = Engine::open(memory(), &options(false)).expect("fresh");
    let conn = engine.open_socket().expect("room").expect("slot");
    let wire = Wire::default();
    wire.to_server.borrow_mut().extend_from_slice(rest);
    for _ in 0..REQUESTS / 16 {
        stream::pull(&engine, conn, &wire);
        if let Processed::Violation(_) = engine.process(conn, 16) {
            break;
        }
        // Half of the time it does not read.
        if first & 2 == 0 {
            stream::push(&mut engine, conn, &wire).expect("room");
        }
    }
    let export = |engine: &Engine| {
        let sources = Sources { input: &|id| engine.unread_input(id), socket: &|_| Some(7), listener: None };
        migrate::export(&engine.store, migrate::VERSION, &sources)
    };
    let written = export(&engine);
    let (again, imported) =
        Engine::import(memory(), &options(false), &written, &mut AllEnds).expect("its own stream");
    assert_eq!(imported.left_out, [0; 3]);
    again.store.check().expect("invariants");
    assert!(listing(&again) == listing(&engine), "another tree");
    let sides = [&engine, &again].map(|e| {
        let conn = e.store.conn(conn).expect("the same connection");
        let (a, b) = conn.out.pending();
        let txs: Vec<u32> = conn.txs.keys().copied().collect();
        ([a, b].concat(), e.unread_input(ConnId(1)), conn.watches.clone(), txs)
    });
    assert_eq!(sides[0], sides[1]);
    signs.push(16 << 40 | bits(sides[0].3.len()) << 8 | bits(sides[0].2.len()));
    signs
}

fn fingerprint(what: &impl std::hash::Hash) -> u64 {
    use std::hash::Hasher as _;
    let mut hasher = std::hash::DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish() & 0xffff_ffff
}

//! The journal's protocol, crashed at every step.
//!
//! Several clients on sockets and a ring send random requests while the daemon's engine is driven by a seeded schedule. Every
//! store to the journal, every system call and every publication in the ring is a point where the engine "dies": it unwinds,
//! its heap is lost, the journal's memory and the kernel's queues stay. Whatever the crash, each client must have received
//! exactly the bytes that a simple model of the store says: no reply twice, none missing, no event lost.
//!
//! `crash_at_every_step` explores all single crashes of its schedules; `seeded_storms` crashes many times in longer ones,
//! also during recovery. Compactions and live updates happen throughout.

#[path = "model/oracle.rs"]
mod oracle;
#[path = "model/world.rs"]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use domain_kit::xs::SharedPage as _;
use oracle::Oracle;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use world::{HALF, RingPage, Stream, memory};
use xenstored::engine::{Engine, Options};
use xenstored::journal::mem::{Crash, Mem};
use xenstored::store::{Class, ConnId};
use xenstored::transport::{ring, stream};
use xenstored::tree::View as _;

const CLIENTS: usize = 4;
/// The client that speaks over a ring.
const RING: usize = 3;

#[derive(Default)]
struct Client {
    conn: ConnId,
    /// Which life of the connection.
    tag: u64,
    /// All request bytes since the start (or the last reset); `given` of them are on the way.
    requests: Vec<u8>,
    given: usize,
    /// Bytes that the oracle has carried out.
    judged: usize,
    received: Vec<u8>,
    req_id: u32,
    open_txs: Vec<u32>,
    next_tx: u32,
}

struct World {
    mem: Rc<Mem>,
    engine: Option<Engine>,
    streams: Vec<Stream>,
    page: Arc<RingPage>,
    clients: Vec<Client>,
    oracle: Oracle,
    crashes: usize,
    resets: usize,
    updates: usize,
}

fn options() -> Options {
    Options { half_size: HALF, compact_at: 6000, ..Options::default() }
}

fn silence_crashes() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if info.payload().downcast_ref::<Crash>().is_none() {
                hook(info);
            }
        }));
    });
}

impl World {
    fn new() -> Self {
        silence_crashes();
        let mem = memory();
        let (mut engine, opened) = Engine::open(Rc::clone(&mem), &options()).expect("fresh");
        assert!(opened.fresh);
        let page = RingPage::new();
        let mut conns = Vec::new();
        for client in 0..CLIENTS {
            let conn = if client == RING {
                engine.domain_up(0, 1, (1, 1), Class::Dom0)
            } else {
                engine.open_socket()
            };
            conns.push(conn.expect("room").expect("slot"));
        }
        ring::adopt(&engine, conns[RING], &*page);
        let streams = (0..CLIENTS).map(|_| Stream { room: 100_000.into(), ..Stream::default() }).collect();
        let clients = conns.into_iter().map(|conn| Client {
            conn,
            tag: engine.store.conn(conn).expect("connection").tag,
            ..Client::default()
        });
        let clients = clients.collect();
        Self {
            mem,
            engine: Some(engine),
            streams,
            page,
            clients,
            oracle: Oracle::new(CLIENTS),
            crashes: 0,
            resets: 0,
            updates: 0,
        }
    }

    /// Runs something that may crash; if it does, brings the daemon back (which may crash too, `again` steps on).
    fn guarded(&mut self, again: u64, run: impl FnOnce(&mut Self)) {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| run(self))) {
            self.crash(payload);
            self.mem.crash_after(again);
        }
        while self.engine.is_none() {
            match catch_unwind(AssertUnwindSafe(|| self.recover())) {
                Ok(()) => {}
                Err(payload) => {
                    self.crash(payload);
                    self.mem.crash_after(0);
                }
            }
        }
        self.judge();
    }

    fn crash(&mut self, payload: Box<dyn std::any::Any + Send>) {
        if payload.downcast_ref::<Crash>().is_none() {
            std::panic::resume_unwind(payload);
        }
        self.engine = None;
        self.crashes += 1;
    }

    fn recover(&mut self) {
        let (engine, opened) = Engine::open(Rc::clone(&self.mem), &options()).expect("the journal is whole");
        assert!(!opened.fresh && opened.dropped.is_none());
        engine.store.check().expect("invariants");
        ring::publish(&engine, self.clients[RING].conn, &*self.page);
        self.engine = Some(engine);
    }

    /// Lets the oracle carry out what the daemon committed.
    fn judge(&mut self) {
        let engine = self.engine.as_ref().expect("alive");
        let mut advanced = 0;
        for (i, client) in self.clients.iter_mut().enumerate() {
            let conn = engine.store.conn(client.conn).expect("connection");
            if conn.tag != client.tag {
                // The ring was reset: nothing of before counts.
                self.oracle.forget(i);
                *client = Client { conn: client.conn, tag: conn.tag, ..Client::default() };
                self.resets += 1;
                continue;
            }
            let consumed = conn.consumed as usize;
            while client.judged < consumed {
                let at = client.judged;
                let len =
                    client.requests[at + 12..at + 16].try_into().map(u32::from_ne_bytes).expect("length");
                let end = at + 16 + len as usize;
                self.oracle.request(i, &client.requests[at..end]);
                client.judged = end;
                advanced += 1;
            }
            assert_eq!(client.judged, consumed, "requests are carried out whole");
        }
        assert!(advanced <= 1, "one step carries out one request");
        if advanced > 0 {
            self.compare_trees();
        }
    }

    fn compare_trees(&self) {
        let store = &self.engine.as_ref().expect("alive").store;
        let mut found = 0;
        for (path, value) in self.oracle.nodes() {
            match store.tree.find(path) {
                xenstored::tree::Lookup::Node(node) => assert_eq!(node.value, &value[..]),
                xenstored::tree::Lookup::Missing { .. } => {
                    panic!("{} is gone", String::from_utf8_lossy(path))
                }
            }
            found += 1;
        }
        // The two special nodes are not the oracle's.
        assert_eq!(store.tree.len(), found + 2);
        assert_eq!(store.watches.len(), self.oracle.watch_count());
    }

    fn send(&mut self, client: usize, op: u32, tx: u32, payload: &[u8]) {
        let c = &mut self.clients[client];
        for word in [op, c.req_id, tx, payload.len() as u32] {
            c.requests.extend_from_slice(&word.to_ne_bytes());
        }
        c.requests.extend_from_slice(payload);
        c.req_id += 1;
    }

    /// A random request.
    fn think(&mut self, client: usize, rng: &mut SmallRng) {
        const PATHS: [&str; 9] = ["/a", "/a/b", "/a/b/c", "/a/b/d", "/a/x", "/e", "/e/f/g", "/e/f", "/"];
        let path = PATHS[rng.random_range(0..PATHS.len())];
        let leaf = PATHS[rng.random_range(0..PATHS.len() - 1)];
        let open = &mut self.clients[client].open_txs;
        let tx =
            if open.is_empty() || rng.random_bool(0.4) { 0 } else { open[rng.random_range(0..open.len())] };
        match rng.random_range(0..100) {
            0..25 => {
                let size = if rng.random_bool(0.05) { 3000 } else { rng.random_range(0..40) };
                let value: Vec<u8> = (0..size).map(|_| rng.random()).collect();
                self.send(client, 11, tx, &[leaf.as_bytes(), b"\0", &value].concat());
            }
            25..40 => self.send(client, 2, tx, &[path.as_bytes(), b"\0"].concat()),
            40..48 => self.send(client, 1, tx, &[path.as_bytes(), b"\0"].concat()),
            48..56 => self.send(client, 13, tx, &[leaf.as_bytes(), b"\0"].concat()),
            56..62 => self.send(client, 12, tx, &[leaf.as_bytes(), b"\0"].concat()),
            62..72 => {
                let token = rng.random_range(0..3).to_string();
                self.send(client, 4, 0, &[path.as_bytes(), b"\0", token.as_bytes(), b"\0"].concat());
            }
            72..76 => {
                let token = rng.random_range(0..3).to_string();
                self.send(client, 5, 0, &[path.as_bytes(), b"\0", token.as_bytes(), b"\0"].concat());
            }
            76..88 => {
                if open.len() < 3 {
                    let c = &mut self.clients[client];
                    c.next_tx += 1;
                    c.open_txs.push(c.next_tx);
                    self.send(client, 6, 0, b"\0");
                }
            }
            88..96 => {
                if tx != 0 {
                    self.clients[client].open_txs.retain(|t| *t != tx);
                    let how: &[u8] = if rng.random_bool(0.8) { b"T\0" } else { b"F\0" };
                    self.send(client, 7, tx, how);
                }
            }
            96..99 => {
                // Quotas, also of a domain that never comes, and features.
                let value = rng.random_range(0..4).to_string();
                let which: &[u8] = if rng.random_bool(0.5) { b"" } else { b"7\0" };
                match rng.random_range(0..3) {
                    0 => self.send(client, 26, 0, &[which, b"nodes\0", value.as_bytes(), b"\0"].concat()),
                    1 => self.send(client, 25, 0, &[which, b"nodes\0"].concat()),
                    _ => self.send(client, 23, 0, b"\0"),
                }
            }
            _ if client == RING && rng.random_bool(0.7) => self.page.store_u32(2068, 1),
            _ => {
                self.clients[client].open_txs.clear();
                self.send(client, 21, 0, b"\0");
            }
        }
    }

    /// The client's side of its transport.
    fn client_io(&mut self, client: usize, most: usize) {
        let c = &mut self.clients[client];
        let unsent = &c.requests[c.given..];
        if client != RING {
            let n = unsent.len().min(most);
            self.streams[client].to_server.borrow_mut().extend(&unsent[..n]);
            c.given += n;
            c.received.extend(self.streams[client].to_client.borrow_mut().drain(..));
            return;
        }
        let page = &self.page;
        if page.load_u32(2068) == 1 {
            return;
        }
        let (req_cons, req_prod) = (page.load_u32(2048), page.load_u32(2052));
        assert_eq!(req_prod as usize, c.given);
        let used = req_prod.wrapping_sub(req_cons);
        assert!(used <= 1024);
        let n = unsent.len().min(most).min(1024 - used as usize);
        for (i, b) in unsent[..n].iter().enumerate() {
            page.write_bytes((c.given + i) % 1024, &[*b]);
        }
        c.given += n;
        page.store_u32(2052, c.given as u32);
        let (rsp_cons, rsp_prod) = (page.load_u32(2056), page.load_u32(2060));
        assert_eq!(rsp_cons as usize, c.received.len());
        for i in 0..rsp_prod.wrapping_sub(rsp_cons) {
            let mut b = [0];
            page.read_bytes(1024 + (rsp_cons.wrapping_add(i) % 1024) as usize, &mut b);
            c.received.push(b[0]);
        }
        page.store_u32(2056, rsp_prod);
    }

    /// The daemon's side: one call of each kind.
    fn daemon_io(&mut self, client: usize, at_once: usize) {
        let conn = self.clients[client].conn;
        *self.streams[client].at_once.borrow_mut() = at_once;
        let engine = self.engine.as_mut().expect("alive");
        if client == RING {
            if ring::wants_reset(&*self.page) {
                ring::reset(engine, conn, &*self.page).expect("room");
            }
            ring::pull(engine, conn, &*self.page).expect("indices");
        } else {
            stream::pull(engine, conn, &self.streams[client]);
        }
    }

    fn daemon_flush(&mut self, client: usize, at_once: usize) {
        let conn = self.clients[client].conn;
        *self.streams[client].at_once.borrow_mut() = at_once;
        let engine = self.engine.as_mut().expect("alive");
        if client == RING {
            ring::push(engine, conn, &*self.page).expect("room").expect("indices");
        } else {
            stream::push(engine, conn, &self.streams[client]).expect("room");
        }
    }

    /// As CONTROL live-update: the journal is compacted, and another process opens it.
    fn live_update(&mut self) {
        self.engine.as_mut().expect("alive").compact().expect("room");
        self.engine = None;
        let (engine, opened) = Engine::open(Rc::clone(&self.mem), &options()).expect("the journal is whole");
        assert_eq!(opened.replayed, 0, "nothing is left to run again");
        ring::publish(&engine, self.clients[RING].conn, &*self.page);
        self.engine = Some(engine);
    }

    fn act(&mut self, rng: &mut SmallRng, again: u64) {
        let client = rng.random_range(0..CLIENTS);
        let size = [3, 17, 40, 5000][rng.random_range(0..4)];
        match rng.random_range(0..5) {
            0 => self.think(client, rng),
            1 => self.client_io(client, size),
            2 => self.guarded(again, |w| w.daemon_io(client, size)),
            3 if rng.random_bool(0.02) => {
                self.updates += 1;
                self.guarded(again, |w| w.live_update());
            }
            3 => self.guarded(again, |w| {
                let conn = w.clients[client].conn;
                w.engine.as_mut().expect("alive").process(conn, 1);
            }),
            _ => self.guarded(again, |w| w.daemon_flush(client, size)),
        }
    }

    /// Lets everything that was begun come to its end, then compares every byte.
    fn finish(mut self) -> Outcome {
        for _ in 0..100_000 {
            let mut idle = true;
            for client in 0..CLIENTS {
                self.client_io(client, usize::MAX);
                self.guarded(0, |w| w.daemon_io(client, usize::MAX));
                let conn = self.clients[client].conn;
                self.guarded(0, |w| {
                    w.engine.as_mut().expect("alive").process(conn, 1);
                });
                self.guarded(0, |w| w.daemon_flush(client, usize::MAX));
                self.client_io(client, usize::MAX);
            }
            for (client, output) in self.clients.iter().zip(&self.oracle.output) {
                idle &= client.judged == client.requests.len() && client.received.len() >= output.len();
            }
            if idle {
                break;
            }
        }
        for (i, client) in self.clients.iter().enumerate() {
            assert_eq!(client.judged, client.requests.len(), "client {i}: all requests were carried out");
            let (got, want) = (messages(&client.received), messages(&self.oracle.output[i]));
            if let Some(at) = (0..got.len().max(want.len())).find(|n| got.get(*n) != want.get(*n)) {
                let near = |list: &[String]| {
                    list[at.saturating_sub(5)..].iter().take(8).cloned().collect::<Vec<_>>()
                };
                panic!("client {i} message {at}\ngot  {:#?}\nwant {:#?}", near(&got), near(&want));
            }
        }
        self.engine = None;
        self.recover();
        self.compare_trees();
        let compactions = self.mem.load_u64(xenstored::journal::layout::sb::ACTIVE) >> 1;
        let (crashes, resets, updates) = (self.crashes, self.resets, self.updates);
        Outcome { crashes, resets, updates, compactions, oracle: self.oracle }
    }
}

struct Outcome {
    crashes: usize,
    resets: usize,
    updates: usize,
    compactions: u64,
    oracle: Oracle,
}

/// Messages in readable form.
fn messages(mut bytes: &[u8]) -> Vec<String> {
    let mut out = Vec::new();
    while bytes.len() >= 16 {
        let word = |i: usize| u32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().expect("header"));
        let end = (16 + word(3) as usize).min(bytes.len());
        let text = String::from_utf8_lossy(&bytes[16..end.min(16 + 60)]).into_owned();
        out.push(format!("type {} req {} tx {} len {} {text:?}", word(0), word(1), word(2), word(3)));
        bytes = &bytes[end..];
    }
    out
}

fn schedule(seed: u64, length: usize, crash_at: u64) -> World {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut world = World::new();
    world.mem.crash_after(crash_at);
    for _ in 0..length {
        world.act(&mut rng, 0);
    }
    world
}

#[test]
fn crash_at_every_step() {
    let mut points = 0;
    for seed in 0..2 {
        let plain = schedule(seed, 400, 0);
        let before = World::new().mem.steps();
        let steps = plain.mem.steps() - before;
        plain.finish();
        for step in 1..=steps {
            let world = schedule(seed, 400, step);
            assert_eq!(world.finish().crashes, 1, "seed {seed} step {step}");
            points += 1;
        }
    }
    println!("{points} crash points explored");
}

#[test]
fn seeded_storms() {
    let (mut crashes, mut resets, mut compactions, mut commits, mut eagain) = (0, 0, 0, 0, 0);
    let (mut updates, mut quotas) = (0, 0);
    for seed in 100..130 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut world = World::new();
        for i in 0..3000 {
            if i % 10 == 0 {
                world.mem.crash_after(rng.random_range(1..60));
            }
            let again = if rng.random_bool(0.3) { rng.random_range(1..80) } else { 0 };
            world.act(&mut rng, again);
        }
        world.mem.crash_after(0);
        let outcome = world.finish();
        crashes += outcome.crashes;
        resets += outcome.resets;
        compactions += outcome.compactions;
        commits += outcome.oracle.commits;
        eagain += outcome.oracle.eagain;
        updates += outcome.updates;
        quotas += outcome.oracle.quotas_set;
    }
    println!(
        "{crashes} crashes, {compactions} compactions, {resets} ring resets, {commits} commits, {eagain} conflicts, \
         {updates} live updates, {quotas} quotas set"
    );
    assert!(updates > 50 && quotas > 20, "{updates} {quotas}");
    assert!(crashes > 1000 && compactions > 100 && resets > 10 && commits > 100 && eagain > 20);
}

//! One client: what it asks at random, and what it must be told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use domain_kit::xs::Op;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::ledger::Ledger;
use super::model::{Change, Model, Nodes, Request};
use super::run::RINGS;
use super::world::FIRST_GUEST;

/// XS_WATCH_EVENT and XS_ERROR (io/xs_wire.h).
const EVENT: u32 = 15;
const ERROR: u32 = 16;
/// Bytes of a header.
const HEADER: usize = 16;
/// Watches that an unprivileged domain may have.
const WATCHES: usize = 128;
/// The counter that all increment.
pub const COUNTER: &str = "/shared/counter";
/// What no guest may touch.
pub const SECRET: &str = "/soak/secret";

/// What all actors have in common.
#[derive(Debug, Default)]
pub struct Shared {
    /// Which events are due.
    pub ledger: Ledger,
    /// Numbers that a committed transaction wrote to the counter.
    pub counted: BTreeSet<u64>,
    /// Events of the counter's watch.
    pub counter_events: u64,
    /// Replies that were as they had to be.
    pub replies: u64,
    /// Longest wait for a reply since the last kill.
    pub longest: Duration,
    /// How often each error was the right answer.
    pub errors: BTreeMap<String, u64>,
}

/// What a reply must be.
#[derive(Debug)]
enum Due {
    /// This payload.
    Payload(Vec<u8>),
    /// These names, in any order.
    Names(Vec<u8>),
    /// One of these errors.
    Error(&'static [&'static str]),
    /// The number of a transaction of ours.
    Transaction,
    /// The counter's value.
    Counter,
    /// The end of a transaction that has set the counter.
    Counted(u64),
}

#[derive(Debug)]
struct Waiting {
    op: Op,
    req_id: u32,
    sent: Instant,
    due: Due,
    what: String,
}

#[derive(Debug)]
struct Tx {
    /// Known once the reply is there.
    id: Option<u32>,
    nodes: Nodes,
    changes: Vec<Change>,
    touched: BTreeSet<String>,
    left: u32,
}

/// What an actor does.
#[derive(Debug)]
enum Part {
    /// Everything, in a subtree of its own.
    Own,
    /// Increments the counter.
    Count { tx: Option<u32>, value: Option<u64>, written: bool },
}

/// A client.
#[derive(Debug)]
pub struct Actor {
    /// Its number.
    pub id: usize,
    /// Its subtree.
    pub model: Model,
    /// `/local/domain/<domid>` of a domain, which relative paths are relative to; else empty.
    home: String,
    part: Part,
    /// The connection.
    pub stream: UnixStream,
    rng: SmallRng,
    waiting: VecDeque<Waiting>,
    input: Vec<u8>,
    output: Vec<u8>,
    req_id: u32,
    tx: Option<Tx>,
    window: usize,
}

fn words(bytes: &[u8]) -> [u32; 4] {
    [0, 1, 2, 3].map(|i| u32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap_or_default()))
}

impl Actor {
    /// On a connection; `guest` is the domain whose ring is behind it.
    ///
    /// # Errors
    /// The socket's.
    pub fn new(id: usize, stream: UnixStream, guest: Option<u16>, counts: bool, seed: u64) -> Result<Actor> {
        stream.set_nonblocking(true)?;
        let home = guest.map(|domid| format!("/local/domain/{domid}")).unwrap_or_default();
        let base = if guest.is_some() { format!("{home}/data") } else { format!("/soak/s{id}") };
        let part = if counts { Part::Count { tx: None, value: None, written: false } } else { Part::Own };
        Ok(Actor {
            id,
            model: Model::new(&base, guest),
            home,
            part,
            stream,
            rng: SmallRng::seed_from_u64(seed << 8 | id as u64),
            waiting: VecDeque::new(),
            input: Vec::new(),
            output: Vec::new(),
            req_id: 0,
            tx: None,
            window: 1 + id % 6,
        })
    }

    /// Whether it waits for nothing and is in no transaction.
    pub fn idle(&self) -> bool {
        let counting = matches!(&self.part, Part::Count { tx, value, .. } if tx.is_some() || value.is_some());
        self.waiting.is_empty() && self.output.is_empty() && self.tx.is_none() && !counting
    }

    /// Whether bytes wait to be written.
    pub fn wants_to_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// How long the oldest request has been waiting.
    pub fn oldest(&self) -> Duration {
        self.waiting.front().map_or(Duration::ZERO, |w| w.sent.elapsed())
    }

    /// What it waits for, in words.
    pub fn describe(&self) -> String {
        format!("actor {} waits for {:?} ({} in all)", self.id, self.waiting.front(), self.waiting.len())
    }

    fn send(&mut self, op: Op, tx: u32, payload: &[u8], due: Due, what: &str) {
        self.req_id += 1;
        for word in [op as u32, self.req_id, tx, payload.len() as u32] {
            self.output.extend_from_slice(&word.to_ne_bytes());
        }
        self.output.extend_from_slice(payload);
        let what = what.to_owned();
        self.waiting.push_back(Waiting { op, req_id: self.req_id, sent: Instant::now(), due, what });
    }

    /// Sends any request with the reply that it must have, for the set-up.
    pub fn ask(&mut self, op: Op, parts: &[&str], due: &[u8]) {
        let payload: Vec<u8> = parts.iter().flat_map(|p| p.as_bytes()).copied().collect();
        self.send(op, 0, &payload, Due::Payload(due.to_vec()), parts[0]);
    }

    /// Sets a watch somewhere.
    pub fn watch(&mut self, ledger: &mut Ledger, path: &str, token: &str, blind: bool) {
        self.ask(Op::Watch, &[path, "\0", token, "\0"], b"OK\0");
        if token != "counter" {
            ledger.watch(self.id, token, path, 0, blind);
        }
    }

    /// Asks for more if the window has room. `ending`: only what ends a transaction.
    pub fn act(&mut self, shared: &mut Shared, ending: bool) {
        while self.waiting.len() < self.window {
            let before = self.waiting.len();
            match &self.part {
                Part::Count { .. } => self.count(ending),
                Part::Own => self.own(&mut shared.ledger, ending),
            }
            if self.waiting.len() == before {
                break;
            }
        }
    }

    fn count(&mut self, ending: bool) {
        let Part::Count { tx, value, written } = &mut self.part else { return };
        if !self.waiting.is_empty() {
            return;
        }
        let counter = format!("{COUNTER}\0");
        match (*tx, *value) {
            (None, _) if ending => {}
            (None, _) => self.send(Op::TransactionStart, 0, b"\0", Due::Transaction, "counter"),
            (Some(id), None) => self.send(Op::Read, id, counter.as_bytes(), Due::Counter, "counter"),
            (Some(id), Some(value)) if !*written => {
                *written = true;
                let payload = format!("{counter}{}", value + 1);
                self.send(Op::Write, id, payload.as_bytes(), Due::Payload(b"OK\0".to_vec()), "counter");
            }
            (Some(id), Some(value)) => {
                self.part = Part::Count { tx: None, value: None, written: false };
                self.send(Op::TransactionEnd, id, b"T\0", Due::Counted(value + 1), "counter");
            }
        }
    }

    /// A path in the subtree that is changed outside transactions.
    fn path(&mut self) -> String {
        let rng = &mut self.rng;
        let mut path = format!("{}/n{}", self.model.base, rng.random_range(0..6));
        for names in [4, 3] {
            if rng.random_bool(0.6) {
                path += &format!("/{}", rng.random_range(0..names));
            }
        }
        path
    }

    /// As it stands in the request: relative sometimes, if the client has a home.
    fn spelled(&mut self, path: &str) -> (String, usize) {
        let cut = self.home.len() + 1;
        if !self.home.is_empty() && self.rng.random_bool(0.5) {
            (path[cut..].to_owned(), cut)
        } else {
            (path.to_owned(), 0)
        }
    }

    fn value(&mut self) -> Vec<u8> {
        let len = match self.rng.random_range(0..20) {
            0 => self.rng.random_range(0..2100),
            1 => 0,
            _ => self.rng.random_range(0..60),
        };
        // All bytes occur in values, NUL among them.
        let first: u8 = self.rng.random();
        (0..len).map(|i| first.wrapping_add(i as u8)).collect()
    }

    fn own(&mut self, ledger: &mut Ledger, ending: bool) {
        match self.tx.as_ref().map(|tx| (tx.id, tx.left)) {
            Some((None, _)) => return,
            Some((Some(id), 0)) => return self.end(ledger, id),
            Some((Some(id), _)) if ending || self.rng.random_bool(0.8) => return self.inside(id),
            _ if ending => return,
            _ => {}
        }
        let path = self.path();
        let in_tx = self.tx.is_some();
        match self.rng.random_range(0..100) {
            0..24 => self.node(ledger, &path, &Request::Read),
            24..30 => self.node(ledger, &path, &Request::Directory),
            30..35 => self.node(ledger, &path, &Request::GetPerms),
            // What changes the tree waits until the transaction is over: it would be told of a conflict, or not, by chance.
            _ if in_tx => self.node(ledger, &path, &Request::Read),
            35..62 => {
                let value = self.value();
                self.node(ledger, &path, &Request::Write(value));
            }
            62..67 => self.node(ledger, &path, &Request::Mkdir),
            67..72 => self.node(ledger, &path, &Request::Rm),
            72..76 => {
                let perms = self.perms();
                self.node(ledger, &path, &Request::SetPerms(perms));
            }
            76..83 => self.set_watch(ledger),
            83..86 => self.unset_watch(ledger),
            86..93 => {
                self.tx = Some(Tx {
                    id: None,
                    nodes: self.model.nodes.clone(),
                    changes: Vec::new(),
                    touched: BTreeSet::new(),
                    left: self.rng.random_range(1..8),
                });
                self.send(Op::TransactionStart, 0, b"\0", Due::Transaction, "start");
            }
            93..97 if self.model.guest.is_some() => self.forbidden(),
            _ if self.model.guest.is_some() => {
                // Towards the quota of nodes, and back.
                let bulk = format!("{}/bulk", self.model.base);
                if self.rng.random_bool(0.002) {
                    return self.node(ledger, &bulk, &Request::Rm);
                }
                let child = format!("{bulk}/{}", self.rng.random_range(0..2000));
                self.node(ledger, &child, &Request::Mkdir);
            }
            _ => self.node(ledger, &path, &Request::Read),
        }
    }

    fn perms(&mut self) -> Vec<String> {
        let owner = self.model.guest.unwrap_or(0);
        let letter = |rng: &mut SmallRng| ["n", "r", "w", "b"][rng.random_range(0..4)];
        // What is not a guest's stays closed to all guests, whose watches there must stay silent.
        let others = if owner == 0 { "n" } else { letter(&mut self.rng) };
        let mut perms = vec![format!("{others}{owner}")];
        // Only to domains that exist: what is granted to others is dropped (XSA-417).
        for _ in 0..self.rng.random_range(0..4) {
            let domid = if owner == 0 { 0 } else { FIRST_GUEST + self.rng.random_range(0..RINGS) };
            perms.push(format!("{}{domid}", letter(&mut self.rng)));
        }
        perms
    }

    fn node(&mut self, ledger: &mut Ledger, path: &str, request: &Request) {
        let mut nodes = std::mem::take(&mut self.model.nodes);
        let mut changes = Vec::new();
        let reply = self.model.apply(&mut nodes, path, request, &mut changes);
        self.model.nodes = nodes;
        changes.iter().for_each(|change| ledger.change(&self.model.base, change));
        self.ask_node(0, path, request, reply);
    }

    fn ask_node(&mut self, tx: u32, path: &str, request: &Request, reply: super::model::Reply) {
        let (spelled, _) = self.spelled(path);
        let mut payload = format!("{spelled}\0").into_bytes();
        let op = match request {
            Request::Read => Op::Read,
            Request::Directory => Op::Directory,
            Request::Write(value) => {
                payload.extend_from_slice(value);
                Op::Write
            }
            Request::Mkdir => Op::Mkdir,
            Request::Rm => Op::Rm,
            Request::GetPerms => Op::GetPerms,
            Request::SetPerms(perms) => {
                perms.iter().for_each(|p| payload.extend_from_slice(format!("{p}\0").as_bytes()));
                Op::SetPerms
            }
        };
        let due = match reply {
            Ok(names) if *request == Request::Directory => Due::Names(names),
            Ok(payload) => Due::Payload(payload),
            Err("ENOENT") => Due::Error(&["ENOENT"]),
            Err(_) => Due::Error(&["ENOSPC"]),
        };
        self.send(op, tx, &payload, due, path);
    }

    fn set_watch(&mut self, ledger: &mut Ledger) {
        let number = self.rng.random_range(0..200);
        let token = format!("own-{number}");
        // A token stands for one path, so that an event's watch is known.
        let path = match ledger.path(self.id, &token) {
            Some(path) => path.to_owned(),
            None => format!("{}/n{}/{}", self.model.base, number % 6, number / 6 % 4),
        };
        let (spelled, strip) = self.spelled(&path);
        let known = ledger.path(self.id, &token).is_some();
        let full = self.model.guest.is_some() && ledger.count(self.id) >= WATCHES;
        let due = if known {
            Due::Error(&["EEXIST"])
        } else if full {
            Due::Error(&["ENOSPC", "E2BIG"])
        } else {
            ledger.watch(self.id, &token, &path, strip, false);
            Due::Payload(b"OK\0".to_vec())
        };
        self.send(Op::Watch, 0, format!("{spelled}\0{token}\0").as_bytes(), due, &path);
    }

    fn unset_watch(&mut self, ledger: &mut Ledger) {
        let number = self.rng.random_range(0..200);
        let token = format!("own-{number}");
        let path = format!("{}/n{}/{}", self.model.base, number % 6, number / 6 % 4);
        let due = if ledger.unwatch(self.id, &token) {
            Due::Payload(b"OK\0".to_vec())
        } else {
            Due::Error(&["ENOENT"])
        };
        self.send(Op::Unwatch, 0, format!("{path}\0{token}\0").as_bytes(), due, &path);
    }

    fn forbidden(&mut self) {
        let op = [Op::Read, Op::Write, Op::Rm, Op::SetPerms, Op::Directory][self.rng.random_range(0..5)];
        let more = match op {
            Op::Write => "x",
            Op::SetPerms => "b0\0",
            _ => "",
        };
        self.send(op, 0, format!("{SECRET}\0{more}").as_bytes(), Due::Error(&["EACCES"]), SECRET);
    }

    fn inside(&mut self, id: u32) {
        let Some(mut tx) = self.tx.take() else { return };
        tx.left -= 1;
        let path = format!("{}/t/{}", self.model.base, self.rng.random_range(0..12));
        let request = match self.rng.random_range(0..10) {
            0..4 => Request::Read,
            4 => Request::Rm,
            _ => Request::Write(self.value()),
        };
        // Each node is changed once, so that its one event needs no thought.
        let request =
            if request == Request::Read || tx.touched.insert(path.clone()) { request } else { Request::Read };
        let reply = self.model.apply(&mut tx.nodes, &path, &request, &mut tx.changes);
        self.tx = Some(tx);
        self.ask_node(id, &path, &request, reply);
    }

    fn end(&mut self, ledger: &mut Ledger, id: u32) {
        let Some(tx) = self.tx.take() else { return };
        let commit = self.rng.random_bool(0.85);
        if commit {
            self.model.nodes = tx.nodes;
            tx.changes.iter().for_each(|change| ledger.change(&self.model.base, change));
        }
        let payload: &[u8] = if commit { b"T\0" } else { b"F\0" };
        self.send(Op::TransactionEnd, id, payload, Due::Payload(b"OK\0".to_vec()), "end");
    }

    /// Writes what the connection takes.
    ///
    /// # Errors
    /// The connection ended.
    pub fn push(&mut self) -> Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e).with_context(|| format!("actor {}: its connection", self.id)),
            }
        }
        Ok(())
    }

    /// Reads what there is and checks it.
    ///
    /// # Errors
    /// The connection ended; a reply or event that must not be.
    pub fn pull(&mut self, shared: &mut Shared) -> Result<()> {
        let mut buffer = [0; 16 << 10];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("actor {}: xenstored closed its connection; {}", self.id, self.describe()),
                Ok(n) => self.input.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e).with_context(|| format!("actor {}: its connection", self.id)),
            }
        }
        let input = std::mem::take(&mut self.input);
        let mut at = 0;
        while input.len() - at >= HEADER {
            let [kind, req_id, _, len] = words(&input[at..]);
            let end = at + HEADER + len as usize;
            if input.len() < end {
                break;
            }
            let payload = &input[at + HEADER..end];
            self.take(shared, kind, req_id, payload).with_context(|| format!("actor {}", self.id))?;
            at = end;
        }
        self.input = input[at..].to_vec();
        Ok(())
    }

    fn take(&mut self, shared: &mut Shared, kind: u32, req_id: u32, payload: &[u8]) -> Result<()> {
        if kind == EVENT {
            let text = String::from_utf8_lossy(payload);
            let mut parts = text.split('\0');
            let (Some(path), Some(token)) = (parts.next(), parts.next()) else { bail!("event {text:?}") };
            if token == "counter" {
                ensure!(path == COUNTER, "the counter's watch told {path}");
                shared.counter_events += 1;
                return Ok(());
            }
            return shared.ledger.came(self.id, &self.home, path, token);
        }
        let waiting = self.waiting.pop_front().context("a reply to nothing")?;
        let got = String::from_utf8_lossy(payload);
        let tell = || {
            format!("{:?} {}: got {kind} {req_id} {got:?}, due {:?}", waiting.op, waiting.what, waiting.due)
        };
        ensure!(req_id == waiting.req_id, "request {} was due: {}", waiting.req_id, tell());
        shared.longest = shared.longest.max(waiting.sent.elapsed());
        shared.replies += 1;
        let error = got.trim_end_matches('\0');
        if kind == ERROR {
            *shared.errors.entry(error.to_owned()).or_default() += 1;
        }
        match &waiting.due {
            Due::Error(names) => ensure!(kind == ERROR && names.contains(&error), "{}", tell()),
            Due::Counted(_) if kind == ERROR => ensure!(error == "EAGAIN", "{}", tell()),
            _ => ensure!(kind == waiting.op as u32, "{}", tell()),
        }
        match waiting.due {
            Due::Payload(ref due) => ensure!(due == payload, "{}", tell()),
            Due::Names(ref due) => {
                let set = |bytes: &[u8]| {
                    let mut names: Vec<Vec<u8>> = bytes.split(|b| *b == 0).map(<[u8]>::to_vec).collect();
                    names.sort();
                    names
                };
                ensure!(set(due) == set(payload), "{}", tell());
            }
            Due::Transaction => {
                let id = error.parse().with_context(tell)?;
                match &mut self.part {
                    Part::Count { tx, .. } => *tx = Some(id),
                    Part::Own => self.tx.as_mut().context("no transaction was begun")?.id = Some(id),
                }
            }
            Due::Counter => {
                let number = error.parse().with_context(tell)?;
                if let Part::Count { value, .. } = &mut self.part {
                    *value = Some(number);
                }
            }
            Due::Counted(number) if kind != ERROR => {
                ensure!(shared.counted.insert(number), "the counter was set to {number} twice");
            }
            Due::Error(_) | Due::Counted(_) => {}
        }
        Ok(())
    }
}

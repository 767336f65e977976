//! A simple store: a sorted map, a list of watches, transactions as maps over the map. It says which bytes every client is to
//! get. Written apart from the daemon's code, for privileged clients with absolute paths.

use std::collections::{BTreeMap, BTreeSet};

type Path = Vec<u8>;
/// Message type and payload.
type Reply = (u32, Vec<u8>);
/// The same, with the path and token of an event that follows.
type Outcome = (u32, Vec<u8>, Option<(Path, Vec<u8>)>);

#[derive(Clone, Default)]
struct Tx {
    written: BTreeMap<Path, Vec<u8>>,
    removed: BTreeSet<Path>,
    steps: Vec<(u32, Vec<u8>, Reply)>,
    /// (path, was removed), each path once.
    changed: Vec<(Path, bool)>,
    start: u64,
}

#[derive(Default)]
pub struct Oracle {
    nodes: BTreeMap<Path, Vec<u8>>,
    changes: u64,
    watches: Vec<(usize, Path, Vec<u8>)>,
    txs: BTreeMap<(usize, u32), Tx>,
    next_tx: BTreeMap<usize, u32>,
    /// All bytes each client is to get, from the start.
    pub output: Vec<Vec<u8>>,
    pub eagain: usize,
    pub commits: usize,
    pub quotas_set: usize,
    /// The quota of nodes, global and of domain 7.
    quota: [Option<String>; 2],
}

fn message(kind: u32, req: u32, tx: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for word in [kind, req, tx, payload.len() as u32] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    out.extend_from_slice(payload);
    out
}

fn ancestors(path: &[u8]) -> Vec<Path> {
    let mut all = vec![b"/".to_vec()];
    let cuts = (1..path.len()).filter(|i| path[*i] == b'/');
    all.extend(cuts.map(|i| path[..i].to_vec()));
    if path != b"/" {
        all.push(path.to_vec());
    }
    all
}

fn below(path: &[u8], other: &[u8]) -> bool {
    other.len() > path.len() && other.starts_with(path) && (path == b"/" || other[path.len()] == b'/')
}

impl Tx {
    fn get<'a>(&'a self, nodes: &'a BTreeMap<Path, Vec<u8>>, path: &[u8]) -> Option<&'a Vec<u8>> {
        // Own writes are seen only below what exists: a parent that others removed hides them.
        for step in ancestors(path) {
            if !self.written.contains_key(&step) {
                let hidden = ancestors(&step).iter().any(|a| self.removed.contains(a));
                if hidden || !nodes.contains_key(&step) {
                    return None;
                }
            }
        }
        self.written.get(path).or_else(|| nodes.get(path))
    }
}

impl Oracle {
    pub fn new(clients: usize) -> Self {
        let nodes = ["/", "/tool", "/tool/xenstored"].map(|p| (p.as_bytes().to_vec(), Vec::new()));
        Self { nodes: nodes.into(), output: vec![Vec::new(); clients], ..Default::default() }
    }

    pub fn nodes(&self) -> &BTreeMap<Path, Vec<u8>> {
        &self.nodes
    }

    pub fn watch_count(&self) -> usize {
        self.watches.len()
    }

    /// The client's ring was reset.
    pub fn forget(&mut self, client: usize) {
        self.watches.retain(|(c, _, _)| *c != client);
        self.txs.retain(|(c, _), _| *c != client);
        self.next_tx.remove(&client);
        self.output[client].clear();
    }

    fn event(&mut self, client: usize, path: &[u8], token: &[u8]) {
        let payload = [path, b"\0", token, b"\0"].concat();
        self.output[client].extend(message(15, 0, 0, &payload));
    }

    fn fire(&mut self, path: &[u8], exact: bool) {
        let steps = if exact { vec![path.to_vec()] } else { ancestors(path) };
        for step in steps {
            for (client, watched, token) in self.watches.clone() {
                if watched == step {
                    self.event(client, path, &token);
                }
            }
        }
    }

    /// Tells watches below `path` of what goes with it.
    fn fire_below(&mut self, path: &[u8]) {
        let paths: BTreeSet<Path> = self.watches.iter().map(|(_, p, _)| p.clone()).collect();
        for watched in paths.iter().rev() {
            if below(path, watched) && self.nodes.contains_key(watched) {
                self.fire(watched, true);
            }
        }
    }

    /// Carries out one request of a client.
    pub fn request(&mut self, client: usize, bytes: &[u8]) {
        let word = |i: usize| u32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().expect("header"));
        let (op, req, tx) = (word(0), word(1), word(2));
        let payload = bytes[16..].to_vec();
        let (kind, answer, first) = self.carry_out(client, op, tx, &payload);
        let reply = message(kind, req, tx, &answer);
        self.output[client].extend(reply);
        if let Some((path, token)) = first {
            self.event(client, &path, &token);
        }
    }

    fn carry_out(&mut self, client: usize, op: u32, tx: u32, payload: &[u8]) -> Outcome {
        let fail = |name: &str| (16, format!("{name}\0").into_bytes(), None);
        let ok = |op| (op, b"OK\0".to_vec(), None);
        let strings: Vec<&[u8]> = payload.split(|b| *b == 0).collect();
        match op {
            4 => {
                let (path, token) = (strings[0].to_vec(), strings[1].to_vec());
                if self.watches.contains(&(client, path.clone(), token.clone())) {
                    return fail("EEXIST");
                }
                self.watches.push((client, path.clone(), token.clone()));
                (4, b"OK\0".to_vec(), Some((path, token)))
            }
            5 => {
                let key = (client, strings[0].to_vec(), strings[1].to_vec());
                let Some(at) = self.watches.iter().position(|w| *w == key) else { return fail("ENOENT") };
                self.watches.remove(at);
                ok(5)
            }
            6 => {
                let next = self.next_tx.entry(client).or_insert(1);
                let id = *next;
                *next += 1;
                self.txs.insert((client, id), Tx { start: self.changes, ..Tx::default() });
                (6, format!("{id}\0").into_bytes(), None)
            }
            7 => self.end(client, tx, strings[0] == b"T"),
            21 => {
                self.watches.retain(|(c, _, _)| *c != client);
                self.txs.retain(|(c, _), _| *c != client);
                ok(21)
            }
            23 => (23, b"15\0".to_vec(), None),
            25 | 26 => {
                let of_domain = strings[0] == b"7";
                let slot = &mut self.quota[usize::from(of_domain)];
                if op == 26 {
                    let value = strings[if of_domain { 2 } else { 1 }];
                    *slot = Some(String::from_utf8_lossy(value).into_owned());
                    self.quotas_set += 1;
                    return ok(26);
                }
                match (&*slot, of_domain) {
                    (Some(value), _) => (25, format!("{value}\0").into_bytes(), None),
                    (None, false) => (25, b"1000\0".to_vec(), None),
                    (None, true) => fail("ENOENT"),
                }
            }
            _ if tx != 0 => {
                let Some(mut open) = self.txs.remove(&(client, tx)) else { return fail("ENOENT") };
                let reply = self.node_op(&mut open, op, payload);
                open.steps.push((op, payload.to_vec(), reply.clone()));
                self.txs.insert((client, tx), open);
                (reply.0, reply.1, None)
            }
            _ => {
                let mut now = Tx { start: self.changes, ..Tx::default() };
                let reply = self.node_op(&mut now, op, payload);
                self.commit(now);
                (reply.0, reply.1, None)
            }
        }
    }

    fn end(&mut self, client: usize, tx: u32, commit: bool) -> Outcome {
        let Some(open) = self.txs.remove(&(client, tx)) else { return (16, b"ENOENT\0".to_vec(), None) };
        if commit {
            let mut again = open;
            if again.start != self.changes {
                let steps = std::mem::take(&mut again.steps);
                again = Tx::default();
                for (op, payload, answer) in steps {
                    if self.node_op(&mut again, op, &payload) != answer {
                        self.eagain += 1;
                        return (16, b"EAGAIN\0".to_vec(), None);
                    }
                }
            }
            self.commits += 1;
            self.commit(again);
        }
        (7, b"OK\0".to_vec(), None)
    }

    /// Events first for what goes, from the deepest; then the change; the daemon tells in the order of first mention.
    fn commit(&mut self, tx: Tx) {
        let before = self.nodes.clone();
        let mut after = before.clone();
        for gone in &tx.removed {
            after.retain(|p, _| p != gone && !below(gone, p));
        }
        for (path, value) in &tx.written {
            after.insert(path.clone(), value.clone());
        }
        for (path, removed) in &tx.changed {
            let (was, is) = (before.contains_key(path), after.contains_key(path));
            if *removed && was {
                self.fire_below(path);
            }
            if is || (*removed && was) {
                self.fire(path, false);
            }
        }
        if before != after || !tx.changed.is_empty() {
            self.changes += 1;
        }
        self.nodes = after;
    }

    fn node_op(&self, tx: &mut Tx, op: u32, payload: &[u8]) -> Reply {
        let fail = |name: &str| (16, format!("{name}\0").into_bytes());
        let end = payload.iter().position(|b| *b == 0).expect("a path");
        let path = payload[..end].to_vec();
        let touch = |tx: &mut Tx, removed: bool| match tx.changed.iter_mut().find(|(p, _)| *p == path) {
            Some((_, r)) => *r |= removed,
            None => tx.changed.push((path.clone(), removed)),
        };
        match op {
            1 => {
                if tx.get(&self.nodes, &path).is_none() {
                    return fail("ENOENT");
                }
                let all: BTreeSet<&Path> = self.nodes.keys().chain(tx.written.keys()).collect();
                let mut out = Vec::new();
                for child in all {
                    let name = child.strip_prefix(&path[..]).unwrap_or_default();
                    let name = name.strip_prefix(b"/").unwrap_or(if path == b"/" { name } else { b"" });
                    let direct = below(&path, child) && !name.is_empty() && !name.contains(&b'/');
                    if direct && tx.get(&self.nodes, child).is_some() {
                        out.extend_from_slice(name);
                        out.push(0);
                    }
                }
                (1, out)
            }
            2 => match tx.get(&self.nodes, &path) {
                Some(value) => (2, value.clone()),
                None => fail("ENOENT"),
            },
            11 | 12 => {
                let exists = tx.get(&self.nodes, &path).is_some();
                if op == 12 && exists {
                    return (op, b"OK\0".to_vec());
                }
                for step in ancestors(&path) {
                    if tx.get(&self.nodes, &step).is_none() {
                        // Made anew: nothing of what the tree may have below it shines through.
                        tx.removed.insert(step.clone());
                        tx.written.retain(|p, _| !below(&step, p));
                        tx.written.insert(step, Vec::new());
                    }
                }
                let value = if op == 11 { payload[end + 1..].to_vec() } else { Vec::new() };
                tx.written.insert(path.clone(), value);
                touch(tx, false);
                (op, b"OK\0".to_vec())
            }
            13 => {
                if path == b"/" {
                    return fail("EINVAL");
                }
                if tx.get(&self.nodes, &path).is_none() {
                    let parents = ancestors(&path);
                    let parent = &parents[parents.len() - 2];
                    return match tx.get(&self.nodes, parent) {
                        Some(_) => (op, b"OK\0".to_vec()),
                        None => fail("ENOENT"),
                    };
                }
                tx.written.retain(|p, _| *p != path && !below(&path, p));
                tx.removed.insert(path.clone());
                touch(tx, true);
                (op, b"OK\0".to_vec())
            }
            _ => fail("ENOSYS"),
        }
    }
}

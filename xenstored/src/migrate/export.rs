//! Writing a stream.

use std::collections::{BTreeMap, BTreeSet};

use xen_abi::xs_wire::XsMsgType as Op;

use super::{
    CONNECTION_DATA, DOMAIN_DATA, DOMID_INVALID, END, GLOBAL_DATA, GLOBAL_QUOTA_DATA, IDENT, NODE_DATA, SEEN,
    TRANSACTION_DATA, WATCH_DATA, WATCH_DATA_EXTENDED, WRITTEN,
};
use crate::path::{canonicalize, prefixes};
use crate::perms::{Perm, READ, WRITE};
use crate::store::{Conn, ConnId, Item, Quota, Store, Transaction};
use crate::tree::{Change, Found, Lookup, View as _};
use crate::wire::strings;

/// What belongs to the stream and not to the store.
pub struct Sources<'a> {
    /// What was received of a connection and not yet carried out.
    pub input: &'a dyn Fn(ConnId) -> Vec<u8>,
    /// The descriptor of a socket, for whoever inherits it.
    pub socket: &'a dyn Fn(ConnId) -> Option<u32>,
    /// The listening socket's.
    pub listener: Option<u32>,
}

struct Stream(Vec<u8>);

impl Stream {
    fn record(&mut self, kind: u32, body: &[u8]) {
        self.0.extend_from_slice(&kind.to_le_bytes());
        self.0.extend_from_slice(&(body.len() as u32).to_le_bytes());
        self.0.extend_from_slice(body);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    /// A node; `tx` is connection and transaction of a pending one, `found` is none if it is not there.
    fn node(&mut self, tx: (u32, u32), access: u16, path: &[u8], found: Option<(&[u8], &[Perm])>) {
        let (value, perms) = found.unwrap_or_default();
        let mut body = [tx.0.to_le_bytes(), tx.1.to_le_bytes()].concat();
        for half in [path.len() + 1, value.len(), usize::from(access), perms.len()] {
            body.extend_from_slice(&(half as u16).to_le_bytes());
        }
        for perm in perms {
            let letter = match perm.access & (READ | WRITE) {
                0 => b'n',
                READ => b'r',
                WRITE => b'w',
                _ => b'b',
            };
            body.extend_from_slice(&[letter, 0]);
            body.extend_from_slice(&perm.domid.to_le_bytes());
        }
        body.extend_from_slice(path);
        body.push(0);
        body.extend_from_slice(value);
        self.record(NODE_DATA, &body);
    }
}

fn quotas(body: &mut Vec<u8>, quota: &Quota) {
    let all = || [false, true].into_iter().flat_map(|soft| Item::ALL.map(|i| (i, soft)));
    for (item, soft) in all() {
        body.extend_from_slice(&quota.get(item, soft).to_le_bytes());
    }
    for (item, soft) in all() {
        if soft {
            body.extend_from_slice(b"soft-");
        }
        body.extend_from_slice(item.name().as_bytes());
        body.push(0);
    }
}

/// Quotas in a record.
const QUOTAS: u16 = 2 * Item::ALL.len() as u16;

/// Writes the whole state as a stream of this version (1 has no quotas, features and watch depths).
pub fn export(store: &Store, version: u32, sources: &Sources<'_>) -> Vec<u8> {
    let mut out = Stream(Vec::new());
    out.0.extend_from_slice(IDENT);
    out.0.extend_from_slice(&version.to_be_bytes());
    out.0.extend_from_slice(&0u32.to_be_bytes());
    let sockets = [sources.listener.unwrap_or(u32::MAX), u32::MAX];
    out.record(GLOBAL_DATA, &sockets.map(u32::to_le_bytes).concat());
    if version > 1 {
        let mut body = [QUOTAS.to_le_bytes(), [0; 2]].concat();
        quotas(&mut body, &store.limits().guest);
        out.record(GLOBAL_QUOTA_DATA, &body);
    }
    // Their own numbers, by which a live update finds their sockets again; after four billion of them, others.
    let own = store.conns().all(|(id, _)| u32::try_from(id.0).is_ok());
    let numbers: BTreeMap<ConnId, u32> =
        (1..).zip(store.conns()).map(|(n, (id, _))| (id, if own { id.0 as u32 } else { n })).collect();
    for (id, conn) in store.conns() {
        connection(&mut out, store, version, numbers[&id], id, conn, sources);
    }
    let mut path = Vec::new();
    let mut ends: Vec<usize> = Vec::new();
    for (depth, name, id) in store.tree.walk() {
        ends.truncate(depth - 1);
        path.truncate(ends.last().copied().unwrap_or(0));
        if depth > 1 {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        ends.push(path.len());
        let found = store.tree.node(id);
        let shown: &[u8] = if path.is_empty() { b"/" } else { &path };
        out.node((0, 0), 0, shown, Some((found.value, found.perms.entries())));
    }
    for (id, conn) in store.conns() {
        for (tx, open) in &conn.txs {
            pending(&mut out, store, (numbers[&id], *tx), conn, open);
        }
    }
    for (domid, domain) in store.domains().filter(|_| version > 1) {
        let mut body = [domid.to_le_bytes(), QUOTAS.to_le_bytes()].concat();
        body.extend_from_slice(&domain.features.to_le_bytes());
        quotas(&mut body, &domain.quota);
        out.record(DOMAIN_DATA, &body);
    }
    out.record(END, &[]);
    out.0
}

fn connection(
    out: &mut Stream,
    store: &Store,
    version: u32,
    number: u32,
    id: ConnId,
    conn: &Conn,
    sources: &Sources<'_>,
) {
    let (a, b) = conn.out.pending();
    let input = (sources.input)(id);
    let mut body = number.to_le_bytes().to_vec();
    let ring = conn.domid.and_then(|d| Some((d, store.domain(d)?)));
    body.extend_from_slice(&u16::from(ring.is_none()).to_le_bytes());
    body.extend_from_slice(&u16::from(ring.is_some() && version > 1).to_le_bytes());
    match &ring {
        Some((domid, domain)) => {
            body.extend_from_slice(&domid.to_le_bytes());
            body.extend_from_slice(&domain.target.unwrap_or(DOMID_INVALID).to_le_bytes());
            body.extend_from_slice(&domain.ring.map_or(0, |(_, port)| port).to_le_bytes());
        }
        None => {
            body.extend_from_slice(&(sources.socket)(id).unwrap_or(u32::MAX).to_le_bytes());
            body.extend_from_slice(&[0; 4]);
        }
    }
    body.extend_from_slice(&(input.len() as u16).to_le_bytes());
    body.extend_from_slice(&(conn.out.partial().min(usize::from(u16::MAX)) as u16).to_le_bytes());
    body.extend_from_slice(&((a.len() + b.len()) as u32).to_le_bytes());
    for part in [&input[..], a, b] {
        body.extend_from_slice(part);
    }
    if let Some((_, domain)) = ring.filter(|_| version > 1) {
        body.resize(body.len().next_multiple_of(8), 0);
        body.extend_from_slice(&domain.instance.to_le_bytes());
    }
    out.record(CONNECTION_DATA, &body);
    for (path, watch) in store.watches.iter().filter(|(_, w)| w.conn == id) {
        // As the client sees it: relative to its home.
        let path = &path[watch.strip.min(path.len())..];
        let mut body = number.to_le_bytes().to_vec();
        let mut halves = vec![path.len() as u16 + 1, watch.token.len() as u16 + 1];
        if version > 1 {
            halves.push(watch.depth.map_or(u16::MAX, |d| d.min(u32::from(u16::MAX) - 1) as u16));
            halves.push(0);
        }
        halves.iter().for_each(|half| body.extend_from_slice(&half.to_le_bytes()));
        for text in [path, &watch.token] {
            body.extend_from_slice(text);
            body.push(0);
        }
        out.record(if version > 1 { WATCH_DATA_EXTENDED } else { WATCH_DATA }, &body);
    }
    for tx in conn.txs.keys() {
        out.record(TRANSACTION_DATA, &[number.to_le_bytes(), tx.to_le_bytes()].concat());
    }
}

/// What a transaction saw of the tree, then what it changed.
fn pending(out: &mut Stream, store: &Store, tx: (u32, u32), conn: &Conn, open: &Transaction) {
    let path_of = |payload: &[u8]| {
        let raw = strings(payload).next().unwrap_or_default().to_vec();
        canonicalize(&raw, &conn.base, true, usize::MAX).ok().map(|path| path.into_owned())
    };
    let looks = |op: Op| matches!(op, Op::Read | Op::Directory | Op::DirectoryPart | Op::GetPerms);
    let paths = |all: bool| open.ops.iter().filter(move |s| all || looks(s.op));
    // What it also changed among it: it may have read it before.
    let seen: BTreeSet<Vec<u8>> = paths(false).filter_map(|s| path_of(&s.payload)).collect();
    let found = |path: &[u8]| match store.tree.find(path) {
        Lookup::Node(Found { value, perms, .. }) => Some((value, perms.entries())),
        Lookup::Missing { .. } => None,
    };
    // What it saw is no longer so: its end is to fail. The stream has no word for that, so it says it saw the contrary of what is.
    if !store.would_commit(conn, open)
        && let Some(path) = paths(true).find_map(|s| path_of(&s.payload))
    {
        let owner = [Perm { domid: 0, access: 0 }];
        out.node(tx, SEEN, &path, if found(&path).is_some() { None } else { Some((&b""[..], &owner[..])) });
    }
    for path in &seen {
        out.node(tx, SEEN, path, found(path));
    }
    let mut changes: BTreeMap<Vec<u8>, &Change> = open.changed().collect();
    // In the order in which they were made, as watches are told of them; what was made on the way to one, before it.
    let told = open.changes.list.iter().flat_map(|c| prefixes(&c.path)).map(<[u8]>::to_vec);
    let rest: Vec<Vec<u8>> = changes.keys().cloned().collect();
    for path in told.chain(rest) {
        match changes.remove(&path) {
            None | Some(Change::None) => {}
            Some(Change::Removed) => out.node(tx, 0, &path, None),
            Some(Change::Put { value, perms, fresh }) => {
                // Made anew, the children that the tree has are not its own.
                if *fresh && found(&path).is_some() {
                    out.node(tx, 0, &path, None);
                }
                out.node(tx, WRITTEN, &path, Some((value, perms.entries())));
            }
        }
    }
}

//! Xen's migration stream (docs/designs/xenstore-migration.md, version 2): the store's state for other implementations, and
//! theirs for this one.
//!
//! Written: global data, quotas, connections with their unread bytes, watches, transactions, nodes (those of transactions too)
//! and domains. Read: nodes with permissions, quotas and features. Connections in a stream belong to sockets and event channels
//! of the process that wrote it; a stream that is read from a file finds neither, so they are counted and left out, as are
//! transactions.
#![forbid(unsafe_code)]

use crate::perms::{Perm, Perms, READ, WRITE};
use crate::store::{Conn, ConnId, Event, FEATURES, Item, Quota, Store};
use crate::tree::{Change, View as _};

const IDENT: &[u8; 8] = b"xenstore";
const VERSION: u32 = 2;

const END: u32 = 0;
const GLOBAL_DATA: u32 = 1;
const CONNECTION_DATA: u32 = 2;
const WATCH_DATA: u32 = 3;
const TRANSACTION_DATA: u32 = 4;
const NODE_DATA: u32 = 5;
const GLOBAL_QUOTA_DATA: u32 = 6;
const DOMAIN_DATA: u32 = 7;
const WATCH_DATA_EXTENDED: u32 = 8;

/// DOMID_INVALID of xen.h.
const DOMID_INVALID: u16 = 0x7ff4;
/// A permission that is to be ignored.
const STALE: u8 = 1;
/// Access flag of a pending node: written in the transaction.
const WRITTEN: u16 = 2;

/// The stream can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// No stream, of another version, or of the other byte order.
    #[error("not a xenstore migration stream of version 1 or 2 in little-endian order")]
    Header,
    /// It ends before its END record.
    #[error("the stream ends at byte {0}, before its END record")]
    Short(usize),
    /// A record's content makes no sense.
    #[error("record of type {kind} at byte {at}: {why}")]
    Record {
        /// Its type.
        kind: u32,
        /// Where it begins.
        at: usize,
        /// What is wrong.
        why: &'static str,
    },
}

/// What was read, and what was left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Imported {
    /// Nodes.
    pub nodes: usize,
    /// Domains with quotas or features.
    pub domains: usize,
    /// Connections that were left out.
    pub connections: usize,
    /// Watches of those.
    pub watches: usize,
    /// Transactions of those, and their nodes.
    pub transactions: usize,
}

struct Stream(Vec<u8>);

impl Stream {
    fn record(&mut self, kind: u32, body: &[u8]) {
        self.0.extend_from_slice(&kind.to_le_bytes());
        self.0.extend_from_slice(&(body.len() as u32).to_le_bytes());
        self.0.extend_from_slice(body);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }
}

fn put_perms(body: &mut Vec<u8>, perms: &[Perm]) {
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
}

fn node(conn: u32, tx: u32, access: u16, path: &[u8], value: &[u8], perms: &[Perm]) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&conn.to_le_bytes());
    body.extend_from_slice(&tx.to_le_bytes());
    for half in [path.len() + 1, value.len(), usize::from(access), perms.len()] {
        body.extend_from_slice(&(half as u16).to_le_bytes());
    }
    put_perms(&mut body, perms);
    body.extend_from_slice(path);
    body.push(0);
    body.extend_from_slice(value);
    body
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

/// Writes the whole state. `input` gives what was received of a connection and not yet carried out.
pub fn export(store: &Store, input: impl Fn(ConnId, &Conn) -> Vec<u8>) -> Vec<u8> {
    let mut out = Stream(Vec::new());
    out.0.extend_from_slice(IDENT);
    out.0.extend_from_slice(&VERSION.to_be_bytes());
    out.0.extend_from_slice(&0u32.to_be_bytes());
    // Descriptors mean nothing to whoever reads this.
    out.record(GLOBAL_DATA, &[0xff; 8]);
    let mut body = [QUOTAS.to_le_bytes(), [0; 2]].concat();
    quotas(&mut body, &store.limits().guest);
    out.record(GLOBAL_QUOTA_DATA, &body);
    for (number, (id, conn)) in (1u32..).zip(store.conns()) {
        connection(&mut out, store, number, id, conn, &input(id, conn));
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
        out.record(NODE_DATA, &node(0, 0, 0, shown, found.value, found.perms.entries()));
    }
    for (number, (_, conn)) in (1u32..).zip(store.conns()) {
        for (tx, open) in &conn.txs {
            pending(&mut out, number, *tx, open);
        }
    }
    for (domid, domain) in store.domains() {
        let mut body = [domid.to_le_bytes(), QUOTAS.to_le_bytes()].concat();
        body.extend_from_slice(&domain.features.to_le_bytes());
        quotas(&mut body, &domain.quota);
        out.record(DOMAIN_DATA, &body);
    }
    out.record(END, &[]);
    out.0
}

fn connection(out: &mut Stream, store: &Store, number: u32, id: ConnId, conn: &Conn, input: &[u8]) {
    let (a, b) = conn.out.pending();
    let mut body = number.to_le_bytes().to_vec();
    let ring = conn.domid.and_then(|d| Some((d, store.domain(d)?)));
    body.extend_from_slice(&u16::from(ring.is_none()).to_le_bytes());
    body.extend_from_slice(&u16::from(ring.is_some()).to_le_bytes());
    match &ring {
        Some((domid, domain)) => {
            body.extend_from_slice(&domid.to_le_bytes());
            body.extend_from_slice(&domain.target.unwrap_or(DOMID_INVALID).to_le_bytes());
            body.extend_from_slice(&domain.ring.map_or(0, |(_, port)| port).to_le_bytes());
        }
        // The descriptor, which is of no use to others.
        None => body.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]),
    }
    body.extend_from_slice(&(input.len() as u16).to_le_bytes());
    body.extend_from_slice(&(conn.out.partial().min(usize::from(u16::MAX)) as u16).to_le_bytes());
    body.extend_from_slice(&((a.len() + b.len()) as u32).to_le_bytes());
    for part in [input, a, b] {
        body.extend_from_slice(part);
    }
    if let Some((_, domain)) = ring {
        body.resize(body.len().next_multiple_of(8), 0);
        body.extend_from_slice(&domain.instance.to_le_bytes());
    }
    out.record(CONNECTION_DATA, &body);
    for (path, watch) in store.watches.iter().filter(|(_, w)| w.conn == id) {
        // As the client sees it: relative to its home.
        let path = &path[watch.strip.min(path.len())..];
        let mut body = number.to_le_bytes().to_vec();
        let depth = watch.depth.map_or(u16::MAX, |d| d.min(u32::from(u16::MAX) - 1) as u16);
        for half in [path.len() as u16 + 1, watch.token.len() as u16 + 1, depth, 0] {
            body.extend_from_slice(&half.to_le_bytes());
        }
        for text in [path, &watch.token] {
            body.extend_from_slice(text);
            body.push(0);
        }
        out.record(WATCH_DATA_EXTENDED, &body);
    }
    for tx in conn.txs.keys() {
        out.record(TRANSACTION_DATA, &[number.to_le_bytes(), tx.to_le_bytes()].concat());
    }
}

fn pending(out: &mut Stream, conn: u32, tx: u32, open: &crate::store::Transaction) {
    let mut trail: Vec<&[u8]> = Vec::new();
    for (depth, name, over) in open.over.walk() {
        trail.truncate(depth - 1);
        trail.push(name);
        let joined = trail.join(&b"/"[..]);
        let path: &[u8] = if joined.is_empty() { b"/" } else { &joined };
        match &over.change {
            Change::None => {}
            Change::Removed => out.record(NODE_DATA, &node(conn, tx, 0, path, b"", &[])),
            Change::Put { value, perms, .. } => {
                out.record(NODE_DATA, &node(conn, tx, WRITTEN, path, value, perms.entries()));
            }
        }
    }
}

/// Reads a record's fields.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }
    fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }
}

/// Puts a stream's nodes, quotas and features into a fresh store, as events for `apply`: limits first, nodes then.
///
/// # Errors
/// [`StreamError`]; the store is of no use then.
pub fn import(stream: &[u8], store: &mut Store) -> Result<Imported, StreamError> {
    let be = |at: usize| stream.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    if stream.get(..8) != Some(&IDENT[..]) || !matches!(be(8), Some(1 | 2)) || be(12) != Some(0) {
        return Err(StreamError::Header);
    }
    let version = be(8).unwrap_or(0);
    let mut imported = Imported::default();
    let mut at = 16;
    loop {
        let mut head = Body(stream.get(at..).unwrap_or_default());
        let (Some(kind), Some(len)) = (head.u32(), head.u32()) else { return Err(StreamError::Short(at)) };
        if kind == END {
            return Ok(imported);
        }
        let Some(body) = head.take(len as usize) else { return Err(StreamError::Short(at)) };
        let record = |why| StreamError::Record { kind, at, why };
        let mut body = Body(body);
        match kind {
            GLOBAL_DATA => {}
            CONNECTION_DATA => imported.connections += 1,
            WATCH_DATA | WATCH_DATA_EXTENDED => imported.watches += 1,
            TRANSACTION_DATA => imported.transactions += 1,
            NODE_DATA => imported.nodes += import_node(&mut body, store).map_err(record)?,
            GLOBAL_QUOTA_DATA => {
                let n = body.u16().zip(body.u16()).ok_or(record("too short"))?.0;
                let mut limits = store.limits().clone();
                import_quotas(&mut body, n, &mut limits.guest).ok_or(record("too short"))?;
                store.apply(&Event::Limits(limits));
            }
            DOMAIN_DATA => {
                let fields = body.u16().zip(body.u16()).zip(body.u32());
                let ((domid, n), features) = fields.ok_or(record("too short"))?;
                let mut quota = store.limits().guest.clone();
                import_quotas(&mut body, n, &mut quota).ok_or(record("too short"))?;
                let features = if version > 1 { features & FEATURES } else { FEATURES };
                if domid != 0 {
                    store.prepare(domid, features, quota);
                    imported.domains += 1;
                }
            }
            _ => return Err(record("unknown type")),
        }
        at += 8 + (len as usize).next_multiple_of(8);
    }
}

fn import_quotas(body: &mut Body<'_>, n: u16, quota: &mut Quota) -> Option<()> {
    let values: Vec<u32> = (0..n).map(|_| body.u32()).collect::<Option<_>>()?;
    for (value, name) in values.into_iter().zip(body.0.split(|b| *b == 0)) {
        // Names that are not known have no effect.
        if let Some((item, soft)) = std::str::from_utf8(name).ok().and_then(Item::parse) {
            quota.set(item, soft, value);
        }
    }
    Some(())
}

/// Returns how many nodes were made or set: none for those of a transaction.
fn import_node(body: &mut Body<'_>, store: &mut Store) -> Result<usize, &'static str> {
    let short = "too short";
    let conn = body.u32().ok_or(short)?;
    body.u32().ok_or(short)?;
    let (path_len, value_len) = body.u16().zip(body.u16()).ok_or(short)?;
    let (_, count) = body.u16().zip(body.u16()).ok_or(short)?;
    let mut perms = Vec::new();
    for _ in 0..count {
        let entry = body.take(4).ok_or(short)?;
        let domid = u16::from_le_bytes([entry[2], entry[3]]);
        let access = match entry[0] {
            b'n' => 0,
            b'r' => READ,
            b'w' => WRITE,
            b'b' => READ | WRITE,
            _ => return Err("a permission that is none of n, r, w, b"),
        };
        // A stale entry is nobody's; the owner's stays.
        if perms.is_empty() || entry[1] & STALE == 0 {
            perms.push(Perm { domid, access });
        }
    }
    let (path, nul) =
        body.take(usize::from(path_len)).and_then(|p| p.split_last().map(|(n, p)| (p, *n))).ok_or(short)?;
    let value = body.take(usize::from(value_len)).ok_or(short)?;
    if conn != 0 {
        return Ok(0);
    }
    let perms = Perms::new(perms).ok_or("a node without permissions")?;
    let valid = crate::path::canonicalize(path, b"", true, usize::MAX).is_ok();
    if nul != 0 || !valid || value.len() > crate::wire::PAYLOAD_MAX {
        return Err("a path or value that can't be");
    }
    let tree = &mut store.tree;
    match tree.lookup(path) {
        Some(id) => {
            tree.set_value_of(id, value);
            tree.set_perms_of(id, perms);
        }
        None => {
            tree.create(path, value, perms);
            if tree.lookup(path).is_none() {
                return Err("a node without a parent");
            }
        }
    }
    Ok(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Lookup;

    fn filled() -> Store {
        let mut store = Store::new();
        let owner = |d| Perms::new(vec![Perm { domid: d, access: READ }, Perm { domid: 9, access: WRITE }]);
        for (path, domid) in [("/local", 0), ("/local/domain", 0), ("/local/domain/5", 5), ("/b", 0)] {
            store.tree.create(path.as_bytes(), path.as_bytes(), owner(domid).expect("perms"));
        }
        store.apply(&Event::Open { slot: 0 });
        store
    }

    #[test]
    fn nodes_go_round() {
        let store = filled();
        let stream = export(&store, |_, _| b"in".to_vec());
        assert_eq!(stream.len() % 8, 0);
        let mut other = Store::new();
        let imported = import(&stream, &mut other).expect("whole");
        assert_eq!((imported.nodes, imported.connections), (store.tree.len(), 1));
        let list = |s: &Store| -> Vec<_> {
            let tree = &s.tree;
            let node = |id| (tree.node(id).value.to_vec(), tree.node(id).perms.clone());
            tree.walk().map(|(d, name, id)| (d, name.to_vec(), node(id))).collect()
        };
        assert_eq!(list(&store), list(&other));
        other.check().expect("invariants");
        assert!(matches!(other.tree.find(b"/local/domain/5"), Lookup::Node(_)));
    }

    #[test]
    fn damaged_streams_are_refused() {
        let stream = export(&filled(), |_, _| Vec::new());
        for end in 0..stream.len() {
            assert!(import(&stream[..end], &mut Store::new()).is_err() || end > stream.len() - 8, "{end}");
        }
        for at in 0..stream.len() {
            let mut bad = stream.clone();
            bad[at] ^= 0xff;
            let mut store = Store::new();
            if import(&bad, &mut store).is_ok() {
                store.check().expect("invariants");
            }
        }
    }
}

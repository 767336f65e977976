//! All state but what is in the arena (nodes and watches) as a series of records, and back. Of the arena's pages, those
//! that changed since the last snapshot are listed with their checksums.

use std::sync::Arc;

use xen_abi::xs_wire::XsMsgType;

use super::nodes::Changed;
use super::requests::WATCH_COST;
use super::{
    Account, Changes, Class, Conn, ConnId, Domain, Folded, Limits, OutQueue, Prepared, Quota, Store,
    Transaction, TxOp,
};
use crate::codec::{Reader, Writer};
use crate::journal::arena::Arena;
use crate::perms::{Perm, Perms};
use crate::tree::{Change, Overlay, OverlayNode, Totals, Tree};
use crate::watches::WatchIndex;

const META: u8 = 32;
const PAGES: u8 = 33;
const DOMAIN: u8 = 34;
const PREPARED: u8 = 36;
const CONN: u8 = 35;
const TX: u8 = 37;
const TX_OPS: u8 = 38;
const TX_CHANGES: u8 = 39;
const TX_NODES: u8 = 40;
const END: u8 = 41;

/// Bytes after which a batch of nodes becomes a record.
const BATCH: usize = 32 << 10;

fn put_perms(out: &mut Writer, perms: &Perms) {
    out.u16(perms.entries().len() as u16);
    for perm in perms.entries() {
        out.u16(perm.domid);
        out.u8(perm.access);
    }
}

fn get_perms(input: &mut Reader<'_>) -> Option<Perms> {
    let n = input.u16()?;
    let entry = |_| Some(Perm { domid: input.u16()?, access: input.u8()? });
    Perms::new((0..n).map(entry).collect::<Option<Vec<_>>>()?)
}

fn put_option(out: &mut Writer, value: Option<u64>) {
    out.u8(u8::from(value.is_some()));
    out.u64(value.unwrap_or(0));
}

fn get_option(input: &mut Reader<'_>) -> Option<Option<u64>> {
    let some = input.u8()? != 0;
    let value = input.u64()?;
    Some(some.then_some(value))
}

/// Writes the snapshot; `sums` are the arena's changed pages. `sent` gives a connection's handed-over output position, so that only the rest is kept.
///
/// # Errors
/// That of `sink`.
pub fn write_snapshot<E>(
    store: &Store,
    sums: &[(u32, u32)],
    sent: impl Fn(&Conn) -> u64,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut out = Writer::default();
    out.u8(META);
    out.u64(store.next_conn);
    out.u64(store.next_tag);
    let totals = store.tree.totals();
    out.u64(totals.generation);
    out.u64(totals.nodes);
    out.u64(totals.buried);
    out.u32(totals.owned.len() as u32);
    for (domid, nodes) in &totals.owned {
        out.u16(*domid);
        out.u64(*nodes);
        out.u64(totals.bytes.get(domid).copied().unwrap_or(0));
    }
    out.u32(store.tree.arena().pages());
    store.limits.guest.encode(&mut out);
    store.limits.service.encode(&mut out);
    out.u32(store.released.len() as u32);
    for (domid, instance) in &store.released {
        out.u16(*domid);
        out.u64(*instance);
    }
    store.peaks.encode(&mut out);
    out.u8(u8::from(store.log_requests));
    sink(&out.0)?;
    for (domid, prepared) in &store.prepared {
        let mut out = Writer::default();
        out.u8(PREPARED);
        out.u16(*domid);
        put_option(&mut out, prepared.features.map(u64::from));
        out.u8(u8::from(prepared.quota.is_some()));
        prepared.quota.as_ref().unwrap_or(&Quota::GUEST).encode(&mut out);
        sink(&out.0)?;
    }

    for some in sums.chunks(BATCH / 8) {
        let mut out = Writer::default();
        out.u8(PAGES);
        for (page, sum) in some {
            out.u32(*page);
            out.u32(*sum);
        }
        sink(&out.0)?;
    }
    for (domid, domain) in &store.domains {
        let mut out = Writer::default();
        out.u8(DOMAIN);
        out.u16(*domid);
        out.u64(domain.instance);
        put_option(&mut out, domain.conn.map(|c| c.0));
        put_option(&mut out, domain.ring.map(|(gref, port)| u64::from(gref) << 32 | u64::from(port)));
        out.u8(u8::from(domain.shutdown));
        put_option(&mut out, domain.target.map(u64::from));
        out.u32(domain.features);
        domain.quota.encode(&mut out);
        domain.account.encode(&mut out);
        sink(&out.0)?;
    }
    for (id, conn) in store.conns() {
        write_conn(id, conn, sent(conn), &mut sink)?;
    }
    let mut out = Writer::default();
    out.u8(END);
    out.u64(store.watches.len() as u64);
    sink(&out.0)
}

fn write_conn<E>(
    id: ConnId,
    conn: &Conn,
    sent: u64,
    sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut out = Writer::default();
    out.u8(CONN);
    out.u64(id.0);
    put_option(&mut out, conn.domid.map(u64::from));
    out.u8(conn.class as u8);
    out.u32(conn.slot);
    out.u64(conn.tag);
    out.u64(conn.consumed);
    out.u64(conn.drained);
    out.u32(conn.next_tx);
    put_option(&mut out, conn.ignored.map(u64::from));
    let skip = (sent.saturating_sub(conn.out.base())) as usize;
    let (a, b) = conn.out.pending();
    let (a, b) =
        if skip < a.len() { (&a[skip..], b) } else { (&[][..], &b[(skip - a.len()).min(b.len())..]) };
    out.u64(conn.out.end() - (a.len() + b.len()) as u64);
    out.bytes(&[a, b].concat());
    out.u32(conn.folded.len() as u32);
    for ((path, token), position) in &conn.folded {
        out.bytes(path);
        out.bytes(token);
        out.u64(*position);
    }
    sink(&out.0)?;
    for (tx_id, tx) in &conn.txs {
        write_tx(id, *tx_id, tx, sink)?;
    }
    Ok(())
}

fn write_tx<E>(
    id: ConnId,
    tx_id: u32,
    tx: &Transaction,
    sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let start = |kind| {
        let mut out = Writer::default();
        out.u8(kind);
        out.u64(id.0);
        out.u32(tx_id);
        out
    };
    let mut out = start(TX);
    out.u64(tx.start);
    out.u64(tx.bytes as u64);
    out.u64(tx.over.serial);
    out.u64(tx.over.nodes as u64);
    out.u64(tx.over.root.touched);
    out.u32(tx.over.owned.len() as u32);
    for (domid, by) in &tx.over.owned {
        out.u16(*domid);
        out.u64(*by as u64);
    }
    sink(&out.0)?;
    let mut out = start(TX_OPS);
    let empty = out.0.len();
    for step in &tx.ops {
        out.u32(step.op.raw());
        out.bytes(&step.payload);
        out.u64(step.answer);
        if out.0.len() > BATCH {
            sink(&out.0)?;
            out.0.truncate(empty);
        }
    }
    sink(&out.0)?;
    let mut out = start(TX_CHANGES);
    for change in &tx.changes.list {
        out.bytes(&change.path);
        out.u8(u8::from(change.exact) | u8::from(change.removed) << 1);
        out.u16(change.perms.len() as u16);
        for perms in &change.perms {
            put_perms(&mut out, perms);
        }
        if out.0.len() > BATCH {
            sink(&out.0)?;
            out.0.truncate(empty);
        }
    }
    sink(&out.0)?;
    let mut out = start(TX_NODES);
    for (depth, name, node) in tx.over.walk() {
        out.u16(depth as u16);
        out.bytes(name);
        out.u64(node.touched);
        match &node.change {
            Change::None => out.u8(0),
            Change::Removed => out.u8(1),
            Change::Put { value, perms, fresh } => {
                out.u8(if *fresh { 3 } else { 2 });
                out.bytes(value);
                put_perms(&mut out, perms);
            }
        }
    }
    sink(&out.0)
}

/// Builds a store from snapshot records and the arena.
pub struct Loader {
    store: Store,
    /// Until the last record.
    arena: Option<Arena>,
    totals: Totals,
    pages: u32,
    sums: Vec<(u32, u32)>,
}

/// What a record did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loaded {
    /// More records follow.
    Part,
    /// It was the last one.
    Complete,
}

impl Loader {
    /// For this arena, as it was when the snapshot was made.
    pub fn new(arena: Arena) -> Self {
        Self {
            store: Store::new(),
            arena: Some(arena),
            totals: Totals::default(),
            pages: 0,
            sums: Vec::new(),
        }
    }

    /// Takes one record.
    ///
    /// # Errors
    /// What is damaged or out of place.
    pub fn record(&mut self, record: &[u8]) -> Result<Loaded, String> {
        if record.first() == Some(&END) {
            return self.end(&record[1..]);
        }
        self.part(record).ok_or_else(|| "not a snapshot record".to_owned())
    }

    fn end(&mut self, record: &[u8]) -> Result<Loaded, String> {
        let mut arena = self.arena.take().ok_or("two ends of a snapshot")?;
        arena.verify(self.pages, &self.sums)?;
        let watches = WatchIndex::open(&arena);
        let mut input = Reader(record);
        if input.u64() != Some(watches.len() as u64) || !input.done() {
            return Err(format!("{} watches, which is not what the snapshot says", watches.len()));
        }
        for (path, watch) in watches.iter() {
            let conn = self.store.conns.get_mut(&watch.conn).ok_or("a watch without its connection")?;
            conn.watch_bytes += (path.len() + watch.token.len()) as u64 + WATCH_COST;
            conn.watches.insert((Arc::clone(path), watch.token.clone()));
        }
        self.store.watches = watches;
        self.store.tree = Tree::open(arena, std::mem::take(&mut self.totals))?;
        Ok(Loaded::Complete)
    }

    fn part(&mut self, record: &[u8]) -> Option<Loaded> {
        let mut input = Reader(record);
        let input = &mut input;
        match input.u8()? {
            META => {
                self.store.next_conn = input.u64()?;
                self.store.next_tag = input.u64()?;
                self.totals.generation = input.u64()?;
                self.totals.nodes = input.u64()?;
                self.totals.buried = input.u64()?;
                for _ in 0..input.u32()? {
                    let domid = input.u16()?;
                    self.totals.owned.insert(domid, input.u64()?);
                    self.totals.bytes.insert(domid, input.u64()?);
                }
                self.pages = input.u32()?;
                self.store.limits = Limits { guest: Quota::decode(input)?, service: Quota::decode(input)? };
                for _ in 0..input.u32()? {
                    self.store.released.insert(input.u16()?, input.u64()?);
                }
                self.store.peaks = Account::decode(input)?;
                self.store.log_requests = input.u8()? != 0;
            }
            PAGES => {
                while !input.done() {
                    self.sums.push((input.u32()?, input.u32()?));
                }
            }
            DOMAIN => {
                let domid = input.u16()?;
                let domain = Domain {
                    instance: input.u64()?,
                    conn: get_option(input)?.map(ConnId),
                    ring: get_option(input)?.map(|r| ((r >> 32) as u32, r as u32)),
                    shutdown: input.u8()? != 0,
                    target: get_option(input)?.map(|t| t as u16),
                    features: input.u32()?,
                    quota: Quota::decode(input)?,
                    account: Account::decode(input)?,
                };
                self.store.domains.insert(domid, domain);
            }
            PREPARED => {
                let domid = input.u16()?;
                let features = get_option(input)?.map(|f| f as u32);
                let quota = (input.u8()? != 0, Quota::decode(input)?);
                let prepared = Prepared { features, quota: quota.0.then_some(quota.1) };
                self.store.prepared.insert(domid, prepared);
            }
            CONN => self.conn(input)?,
            TX => {
                let (conn, tx_id) = (ConnId(input.u64()?), input.u32()?);
                let mut tx =
                    Transaction { start: input.u64()?, bytes: input.u64()? as usize, ..Default::default() };
                tx.over.serial = input.u64()?;
                tx.over.nodes = input.u64()? as usize;
                tx.over.root.touched = input.u64()?;
                for _ in 0..input.u32()? {
                    tx.over.owned.insert(input.u16()?, input.u64()? as i64);
                }
                self.store.conns.get_mut(&conn)?.txs.insert(tx_id, tx);
            }
            TX_OPS => {
                let tx = self.tx(input)?;
                while !input.done() {
                    tx.ops.push(TxOp {
                        op: XsMsgType::from_raw(input.u32()?)?,
                        payload: input.bytes()?.into(),
                        answer: input.u64()?,
                    });
                }
            }
            TX_CHANGES => {
                let tx = self.tx(input)?;
                let mut list = Vec::new();
                while !input.done() {
                    let path = input.bytes()?.into();
                    let flags = input.u8()?;
                    let n = input.u16()?;
                    let perms = (0..n).map(|_| get_perms(input)).collect::<Option<Vec<_>>>()?;
                    list.push(Changed { path, exact: flags & 1 != 0, removed: flags & 2 != 0, perms });
                }
                Changes::merge(&mut tx.changes, list);
            }
            TX_NODES => overlay_nodes(&mut self.tx(input)?.over, input)?,
            _ => return None,
        }
        input.done().then_some(Loaded::Part)
    }

    fn tx(&mut self, input: &mut Reader<'_>) -> Option<&mut Transaction> {
        let (conn, tx_id) = (ConnId(input.u64()?), input.u32()?);
        self.store.conns.get_mut(&conn)?.txs.get_mut(&tx_id)
    }

    fn conn(&mut self, input: &mut Reader<'_>) -> Option<()> {
        let id = ConnId(input.u64()?);
        let domid = get_option(input)?.map(|d| d as u16);
        let class = Class::from_raw(input.u8()?)?;
        let (slot, tag) = (input.u32()?, input.u64()?);
        let mut conn = Conn::new(domid, class, slot, tag);
        conn.consumed = input.u64()?;
        conn.drained = input.u64()?;
        conn.next_tx = input.u32()?;
        conn.ignored = get_option(input)?.map(|e| e as u32);
        conn.out = OutQueue::restore(input.u64()?, input.bytes()?);
        let mut folded = Folded::new();
        for _ in 0..input.u32()? {
            let key = (input.bytes()?.into(), input.bytes()?.into());
            folded.insert(key, input.u64()?);
        }
        conn.folded = folded;
        self.store.conns.insert(id, conn);
        Some(())
    }

    /// The store, once [`Loaded::Complete`] was answered.
    pub fn finish(self) -> Store {
        self.store
    }
}

fn overlay_nodes(over: &mut Overlay, input: &mut Reader<'_>) -> Option<()> {
    let mut trail: Vec<Vec<u8>> = Vec::new();
    while !input.done() {
        let depth = usize::from(input.u16()?);
        if depth == 0 || depth > trail.len() + 1 {
            return None;
        }
        trail.truncate(depth - 1);
        trail.push(input.bytes()?.to_vec());
        let touched = input.u64()?;
        let change = match input.u8()? {
            0 => Change::None,
            1 => Change::Removed,
            kind @ (2 | 3) => {
                Change::Put { value: input.bytes()?.into(), perms: get_perms(input)?, fresh: kind == 3 }
            }
            _ => return None,
        };
        let mut node = &mut over.root;
        for name in &trail {
            node = node.children.entry(name[..].into()).or_default();
        }
        *node = OverlayNode { change, touched, children: Default::default() };
    }
    Some(())
}

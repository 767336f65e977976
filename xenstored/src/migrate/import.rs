//! Reading a stream.

use std::collections::BTreeMap;

use super::{
    CONNECTION_DATA, DOMAIN_DATA, DOMID_INVALID, END, GLOBAL_DATA, GLOBAL_QUOTA_DATA, IDENT, NODE_DATA, SEEN,
    STALE, StreamError, TRANSACTION_DATA, WATCH_DATA, WATCH_DATA_EXTENDED, WRITTEN,
};
use crate::journal::layout::{INPUT, SLOTS};
use crate::path::canonicalize;
use crate::perms::{Perm, Perms, READ, WRITE};
use crate::store::{Class, ConnId, Event, FEATURES, Item, Quota, Step, Store};
use crate::tree::View as _;
use crate::wire::PAYLOAD_MAX;

/// A domain's ring as it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingEnd {
    /// Serial number of the domain's creation.
    pub instance: u64,
    /// Grant of the ring page.
    pub gref: u32,
    /// The domain's port.
    pub port: u32,
    /// Which quota the domain gets.
    pub class: Class,
    /// The page's `req_cons`: up to there the predecessor took requests.
    pub req_cons: u32,
    /// The page's `rsp_prod`: up to there it handed replies over.
    pub rsp_prod: u32,
    /// The page's error code; 0 for none.
    pub error: u32,
}

/// The ends of connections that outlived the process which wrote the stream.
pub trait Ends {
    /// Whether the socket of the connection with this number is there; the stream says that its descriptor was `fd`.
    fn socket(&mut self, number: u32, fd: u32) -> bool;

    /// The ring of this domain, if there is such a domain and it has one.
    fn ring(&mut self, domid: u16) -> Option<RingEnd>;
}

/// None: the stream comes from a file.
pub struct NoEnds;

impl Ends for NoEnds {
    fn socket(&mut self, _number: u32, _fd: u32) -> bool {
        false
    }

    fn ring(&mut self, _domid: u16) -> Option<RingEnd> {
        None
    }
}

/// What a connection's slot has to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub conn: ConnId,
    /// Input position of the first of these bytes.
    pub from: u64,
    /// What was received and not carried out.
    pub bytes: Vec<u8>,
    /// Output position up to which bytes were handed over.
    pub sent: u64,
}

/// What was read, and what was left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Imported {
    /// Nodes.
    pub nodes: usize,
    /// Domains with quotas or features.
    pub domains: usize,
    /// Connections, watches and transactions.
    pub kept: [usize; 3],
    /// The same of connections without an end.
    pub left_out: [usize; 3],
    /// What the connections' slots have to hold.
    pub waiting: Vec<Waiting>,
    /// The listening socket's descriptor.
    pub listener: Option<u32>,
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
    /// Text of so many bytes, the NUL at its end included.
    fn text(&mut self, n: u16) -> Option<&'a [u8]> {
        self.take(usize::from(n))?.strip_suffix(b"\0")
    }
}

type Why = &'static str;
const SHORT: Why = "too short";

/// Memory of the arena that a record's content can take, at most: each byte of a path may be a node.
const GROWTH: u64 = 40;
/// The same, besides.
const SMALL: u64 = 16 << 10;

struct Reading<'a> {
    store: &'a mut Store,
    ends: &'a mut dyn Ends,
    version: u32,
    done: Imported,
    /// What transactions did, to be done again when all nodes are there.
    pending: BTreeMap<(ConnId, u32), Vec<Step>>,
}

/// Puts a stream into a fresh store.
///
/// # Errors
/// [`StreamError`]; the store is of no use then.
pub fn import(stream: &[u8], store: &mut Store, ends: &mut dyn Ends) -> Result<Imported, StreamError> {
    let be = |at: usize| stream.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    let version = be(8).filter(|v| matches!(v, 1 | 2));
    let (Some(IDENT), Some(version), Some(0)) = (stream.first_chunk(), version, be(12)) else {
        return Err(StreamError::Header);
    };
    let mut reading = Reading { store, ends, version, done: Imported::default(), pending: BTreeMap::new() };
    let mut at = 16;
    loop {
        let mut head = Body(stream.get(at..).unwrap_or_default());
        let (Some(kind), Some(len)) = (head.u32(), head.u32()) else { return Err(StreamError::Short(at)) };
        let record = |why| StreamError::Record { kind, at, why };
        if kind == END {
            reading.transactions().map_err(record)?;
            return Ok(reading.done);
        }
        let Some(body) = head.take(len as usize) else { return Err(StreamError::Short(at)) };
        reading.record(kind, Body(body)).map_err(record)?;
        at += 8 + (len as usize).next_multiple_of(8);
    }
}

impl Reading<'_> {
    fn record(&mut self, kind: u32, mut body: Body<'_>) -> Result<(), Why> {
        let most = GROWTH * body.0.len() as u64 + SMALL;
        self.store.tree.arena_mut().reserve(most).map_err(|_| "no room for it in the journal")?;
        match kind {
            GLOBAL_DATA => self.done.listener = body.u32().filter(|fd| *fd != u32::MAX),
            CONNECTION_DATA => self.connection(body)?,
            WATCH_DATA => self.watch(body, false)?,
            WATCH_DATA_EXTENDED => self.watch(body, true)?,
            TRANSACTION_DATA => {
                let (conn, tx) = body.u32().zip(body.u32()).ok_or(SHORT)?;
                let kept = self.store.conn(conn_id(conn)).is_some() && tx != 0;
                if kept {
                    self.pending.insert((conn_id(conn), tx), Vec::new());
                }
                self.count(2, kept);
            }
            NODE_DATA => self.node(body)?,
            GLOBAL_QUOTA_DATA => {
                let n = body.u16().zip(body.u16()).ok_or(SHORT)?.0;
                let mut limits = self.store.limits().clone();
                quotas(&mut body, n, &mut limits.guest).ok_or(SHORT)?;
                self.store.apply(&Event::Limits(limits));
            }
            DOMAIN_DATA => {
                let ((domid, n), features) = body.u16().zip(body.u16()).zip(body.u32()).ok_or(SHORT)?;
                let mut quota = self.store.limits().guest.clone();
                quotas(&mut body, n, &mut quota).ok_or(SHORT)?;
                let features = if self.version > 1 { features & FEATURES } else { FEATURES };
                if domid != 0 {
                    self.store.prepare(domid, features, quota);
                    self.done.domains += 1;
                }
            }
            _ => return Err("unknown type"),
        }
        Ok(())
    }

    fn count(&mut self, what: usize, kept: bool) {
        let counts = if kept { &mut self.done.kept } else { &mut self.done.left_out };
        counts[what] += 1;
    }

    fn connection(&mut self, mut body: Body<'_>) -> Result<(), Why> {
        let (number, kind) = body.u32().zip(body.u16()).ok_or(SHORT)?;
        body.u16().ok_or(SHORT)?;
        let mut spec = Body(body.take(8).ok_or(SHORT)?);
        let (input, _) = body.u16().zip(body.u16()).ok_or(SHORT)?;
        let output = body.u32().ok_or(SHORT)?;
        let (input, output) = body.take(usize::from(input)).zip(body.take(output as usize)).ok_or(SHORT)?;
        let id = conn_id(number);
        if number == 0 || self.store.conn(id).is_some() || input.len() > INPUT {
            return Err("a connection whose number or input can't be");
        }
        let slot = self.done.kept[0] as u32;
        if slot == SLOTS {
            return Err("more connections than there can be");
        }
        let ring = match kind {
            0 => {
                let (domid, target) = spec.u16().zip(spec.u16()).ok_or(SHORT)?;
                let target = Some(target).filter(|t| *t != DOMID_INVALID);
                match self.ends.ring(domid) {
                    Some(end) if self.store.domain(domid).is_none() => Some((domid, target, end)),
                    _ => {
                        self.count(0, false);
                        return Ok(());
                    }
                }
            }
            1 => {
                if !self.ends.socket(number, spec.u32().ok_or(SHORT)?) {
                    self.count(0, false);
                    return Ok(());
                }
                None
            }
            _ => return Err("a connection of unknown type"),
        };
        // A ring's positions are those that its page shows, and go round at 4 GiB.
        let from = ring.map_or(0, |(.., end)| {
            let (end, len) = (u64::from(end.req_cons), input.len() as u64);
            end.checked_sub(len).unwrap_or(end + (1 << 32) - len)
        });
        let sent = ring.map_or(0, |(.., end)| u64::from(end.rsp_prod));
        self.store.import_connection(id, slot, from, sent, output, ring);
        self.done.waiting.push(Waiting { conn: id, from, bytes: input.to_vec(), sent });
        self.count(0, true);
        Ok(())
    }

    fn watch(&mut self, mut body: Body<'_>, extended: bool) -> Result<(), Why> {
        let conn = conn_id(body.u32().ok_or(SHORT)?);
        let (path, token) = body.u16().zip(body.u16()).ok_or(SHORT)?;
        let depth = if extended { Some(body.u16().zip(body.u16()).ok_or(SHORT)?.0) } else { None };
        let depth = depth.filter(|d| *d != u16::MAX).map(u32::from);
        let (path, token) = body.text(path).zip(body.text(token)).ok_or(SHORT)?;
        if self.store.conn(conn).is_none() {
            self.count(1, false);
            return Ok(());
        }
        if path.len() + token.len() + 2 > PAYLOAD_MAX || !self.store.import_watch(conn, path, token, depth) {
            return Err("a watch that can't be");
        }
        self.count(1, true);
        Ok(())
    }

    fn node(&mut self, mut body: Body<'_>) -> Result<(), Why> {
        let (conn, tx) = body.u32().zip(body.u32()).ok_or(SHORT)?;
        let (path_len, value_len) = body.u16().zip(body.u16()).ok_or(SHORT)?;
        let (access, count) = body.u16().zip(body.u16()).ok_or(SHORT)?;
        let mut perms = Vec::new();
        for _ in 0..count {
            let entry = body.take(4).ok_or(SHORT)?;
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
        let path = body.text(path_len).ok_or(SHORT)?;
        let value = body.take(usize::from(value_len)).ok_or(SHORT)?;
        if canonicalize(path, b"", true, usize::MAX).is_err() || value.len() > PAYLOAD_MAX {
            return Err("a path or value that can't be");
        }
        if conn != 0 {
            if let Some(steps) = self.pending.get_mut(&(conn_id(conn), tx)) {
                step(steps, access, path, value, perms);
            }
            return Ok(());
        }
        let perms = Perms::new(perms).ok_or("a node without permissions")?;
        let tree = &mut self.store.tree;
        match tree.lookup(path) {
            Some(id) => {
                tree.set_value_of(id, value);
                tree.set_perms_of(id, perms);
            }
            None => {
                tree.create(path, value, perms);
                tree.lookup(path).ok_or("a node without a parent")?;
            }
        }
        self.done.nodes += 1;
        Ok(())
    }

    fn transactions(&mut self) -> Result<(), Why> {
        for ((conn, tx), steps) in std::mem::take(&mut self.pending) {
            self.store.import_transaction(conn, tx, &steps);
        }
        Ok(())
    }
}

fn conn_id(number: u32) -> ConnId {
    ConnId(number.into())
}

/// What a transaction saw of a node, or did to it.
fn step(steps: &mut Vec<Step>, access: u16, path: &[u8], value: &[u8], perms: Vec<Perm>) {
    let path = path.to_vec();
    let perms = Perms::new(perms);
    if access & SEEN != 0 {
        steps.push(Step::Seen { path: path.clone(), value: perms.as_ref().map(|_| value.to_vec()) });
    }
    match perms {
        Some(perms) if access & WRITTEN != 0 => steps.push(Step::Put { path, value: value.to_vec(), perms }),
        None if access & SEEN == 0 => steps.push(Step::Removed { path }),
        _ => {}
    }
}

fn quotas(body: &mut Body<'_>, n: u16, quota: &mut Quota) -> Option<()> {
    let values: Vec<u32> = (0..n).map(|_| body.u32()).collect::<Option<_>>()?;
    for (value, name) in values.into_iter().zip(body.0.split(|b| *b == 0)) {
        // Names that are not known have no effect.
        if let Some((item, soft)) = std::str::from_utf8(name).ok().and_then(Item::parse) {
            quota.set(item, soft, value);
        }
    }
    Some(())
}

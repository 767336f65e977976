//! The store itself: a state machine without input or output.
//!
//! [`Store::apply`] takes one [`Event`] and changes the tree, the connections and what waits to be sent to them.
//! It uses no clock, no randomness and no order that is not fixed, so that the journal can run events again.
#![forbid(unsafe_code)]

mod admin;
mod conns;
mod control;
mod event;
mod growth;
mod imported;
pub mod nodes;
mod queue;
mod quota;
mod requests;
mod snapshot;
mod transaction;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use xen_abi::xs_wire::XsMsgType;

pub use admin::{
    FEATURE_DOMID_ANY, FEATURE_ERROR, FEATURE_RECONNECTION, FEATURE_WATCHDEPTH, FEATURES, Prepared,
};
pub use conns::{ConnMap, IdHasher};
pub use event::Event;
pub use imported::Step;
pub use queue::{Folded, OutQueue, WatchKey};
pub use quota::{Account, ITEMS, Item, Limits, Notice, Quota};
pub use snapshot::{Loaded, Loader, write_snapshot};
pub use transaction::{Changes, Transaction, TxOp};

use crate::journal::arena::Arena;
use crate::path;
use crate::perms::{Caller, Perms, READ};
use crate::tree::Tree;
use crate::watches::{Watch, WatchIndex};
use crate::wire::{Header, PAYLOAD_MAX};
use nodes::Changed;

/// Unread output at which watch events are folded to one per watch (bytes).
pub const FOLD_AT: u64 = 256 << 10;
/// Removed nodes whose memory is taken back with each event.
const REAP: usize = 16;
/// Output after which the journal is told how much of it was read (bytes).
pub const DRAIN_NOTE: u64 = 64 << 10;

/// Names a connection; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ConnId(pub u64);

/// Which quota a domain gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// A guest.
    Guest = 0,
    /// A service or driver domain.
    Service = 1,
    /// dom0.
    Dom0 = 2,
}

impl Class {
    pub(crate) fn from_raw(raw: u8) -> Option<Self> {
        [Self::Guest, Self::Service, Self::Dom0].into_iter().find(|c| *c as u8 == raw)
    }
}

/// One client.
#[derive(Debug)]
pub struct Conn {
    /// The domain of a ring; `None` for a socket.
    pub domid: Option<u16>,
    /// Its quota.
    pub class: Class,
    /// Which journal slot keeps its input.
    pub slot: u32,
    /// Names this life of the connection's byte streams; the slot is valid when it carries the same.
    pub tag: u64,
    /// Input position up to which requests were carried out.
    pub consumed: u64,
    /// Output.
    pub out: OutQueue,
    /// Output position up to which the journal knows that it was handed over.
    pub drained: u64,
    /// Watches whose events are folded.
    pub folded: Folded,
    /// (path, token) of its watches.
    pub watches: BTreeSet<WatchKey>,
    /// Bytes of those.
    pub watch_bytes: u64,
    /// What its relative paths are relative to.
    pub base: Rc<[u8]>,
    /// Open transactions.
    pub txs: BTreeMap<u32, Transaction>,
    /// Next transaction id to try.
    pub next_tx: u32,
    /// Ring error code while the ring is out of service.
    pub ignored: Option<u32>,
    /// Commits in a row that ended in EAGAIN (not journalled: only the order of service depends on it).
    pub conflicts: u32,
}

impl Conn {
    fn new(domid: Option<u16>, class: Class, slot: u32, tag: u64) -> Self {
        Self {
            domid,
            class,
            slot,
            tag,
            consumed: 0,
            out: OutQueue::default(),
            drained: 0,
            folded: Folded::new(),
            watches: BTreeSet::new(),
            watch_bytes: 0,
            base: Store::base_of(domid),
            txs: BTreeMap::new(),
            next_tx: 1,
            ignored: None,
            conflicts: 0,
        }
    }

    /// Whether the journal should hear how far the output was handed over ([`Event::Drained`]): at the latest before
    /// the next request, or a watch could stay folded although its event was read.
    pub fn wants_drain_note(&self, sent: u64) -> bool {
        sent > self.drained && (!self.folded.is_empty() || self.out.end() - self.drained > DRAIN_NOTE)
    }

    /// dom0's ring and sockets.
    pub fn privileged(&self) -> bool {
        self.class == Class::Dom0
    }
}

/// A domain that the store knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Serial number of its creation; 0 if it was only introduced by request.
    pub instance: u64,
    /// Its ring's connection.
    pub conn: Option<ConnId>,
    /// Grant and port of its ring.
    pub ring: Option<(u32, u32)>,
    /// Whether its shutdown was announced.
    pub shutdown: bool,
    /// The domain it may act for.
    pub target: Option<u16>,
    /// FEATURE_* bits offered to it.
    pub features: u32,
    /// What it may use.
    pub quota: Quota,
    /// What it used at most, and was refused.
    pub account: Account,
}

/// All state.
#[derive(Debug)]
pub struct Store {
    /// The nodes.
    pub tree: Tree,
    /// The watches of all connections.
    pub watches: WatchIndex,
    conns: ConnMap<Conn>,
    domains: BTreeMap<u16, Domain>,
    /// Living domains that RELEASE cut off: the instance by domid, until another domain has the domid.
    released: BTreeMap<u16, u64>,
    /// What was set for domains before they are introduced.
    prepared: BTreeMap<u16, Prepared>,
    /// The greatest values seen of any domain.
    peaks: Account,
    next_conn: u64,
    next_tag: u64,
    limits: Limits,
    /// Connections with new output since the last [`Store::take_touched`].
    touched: Vec<ConnId>,
    /// Connections removed since the last [`Store::take_closed`].
    closed: Vec<ConnId>,
    /// Their slots.
    freed: Vec<u32>,
    /// Checksum over the output of the current event.
    digest: u32,
    /// Requests carried out since the process started.
    pub requests: u64,
    /// Requests refused by quotas since the process started.
    pub refusals: u64,
    notices: Vec<Notice>,
    /// Domains that were told of because they do not read.
    gated: BTreeSet<u16>,
    /// CONTROL log: each request goes to the log.
    log_requests: bool,
    reply: Vec<u8>,
}

impl Store {
    /// A fresh store without a journal.
    pub fn new() -> Self {
        Self::in_arena(Arena::heap())
    }

    /// A fresh store in an empty arena.
    pub fn in_arena(arena: Arena) -> Self {
        Self::with_tree(Tree::fresh(arena), WatchIndex::default())
    }

    fn with_tree(tree: Tree, watches: WatchIndex) -> Self {
        Self {
            tree,
            watches,
            conns: ConnMap::default(),
            domains: BTreeMap::new(),
            released: BTreeMap::new(),
            prepared: BTreeMap::new(),
            peaks: Account::default(),
            next_conn: 1,
            next_tag: 1,
            limits: Limits::default(),
            touched: Vec::new(),
            closed: Vec::new(),
            freed: Vec::new(),
            digest: 0,
            requests: 0,
            refusals: 0,
            notices: Vec::new(),
            gated: BTreeSet::new(),
            log_requests: false,
            reply: Vec::new(),
        }
    }

    /// Carries out one event. Returns a checksum over all output it caused.
    pub fn apply(&mut self, event: &Event<'_>) -> u32 {
        self.digest = 0;
        self.tree.reap(REAP);
        match event {
            Event::Open { slot } => {
                self.open(None, Class::Dom0, *slot);
            }
            Event::Close(conn) => self.close(*conn),
            Event::Ignore { conn, error } => self.ignore(*conn, *error),
            Event::Reset(conn) => self.reset(*conn),
            Event::Request { conn, consumed, message } => self.request(*conn, *consumed, message),
            Event::Answer { conn, consumed, message, error, text } => {
                self.answer(*conn, *consumed, message, *error, text);
            }
            Event::Drained { conn, upto } => {
                if let Some(conn) = self.conns.get_mut(conn) {
                    conn.drained = *upto;
                    conn.folded.retain(|_, position| *position > *upto);
                }
            }
            Event::DomainUp { domid, instance, gref, port, class, slot } => {
                self.domain_up(*domid, *instance, (*gref, *port), *class, *slot);
            }
            Event::DomainDown(domid) => self.release(*domid),
            Event::DomainShutdown(domid) => {
                if let Some(domain) = self.domains.get_mut(domid)
                    && !domain.shutdown
                {
                    domain.shutdown = true;
                    self.fire_special(path::RELEASE, *domid);
                }
            }
            Event::Limits(limits) => self.limits = limits.clone(),
            Event::SetQuota { domid: None, item, soft, value } => {
                self.limits.guest.set(*item, *soft, *value);
            }
            Event::SetQuota { domid: Some(domid), item, soft, value } => {
                self.set_quota(*domid, *item, *soft, *value);
            }
        }
        self.digest
    }

    /// A connection.
    pub fn conn(&self, id: ConnId) -> Option<&Conn> {
        self.conns.get(&id)
    }

    /// Forgets output that was handed over. Not an event: what is left follows from the journal and the position.
    pub fn drop_output(&mut self, id: ConnId, sent: u64) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.out.drop_until(sent);
        }
    }

    /// All connections in order.
    pub fn conns(&self) -> impl Iterator<Item = (ConnId, &Conn)> {
        let mut ids: Vec<ConnId> = self.conns.keys().copied().collect();
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| Some((id, self.conns.get(&id)?)))
    }

    /// Number of domains.
    pub fn domain_count(&self) -> usize {
        self.domains.len()
    }

    /// Domains for which something was set before they are introduced.
    pub fn prepared(&self) -> impl Iterator<Item = u16> {
        self.prepared.keys().copied()
    }

    /// The quota that new domains of a class get.
    pub fn quota_of(&self, class: Class) -> &Quota {
        match class {
            Class::Guest => &self.limits.guest,
            Class::Service | Class::Dom0 => &self.limits.service,
        }
    }

    /// All domains in order.
    pub fn domains(&self) -> impl Iterator<Item = (u16, &Domain)> {
        self.domains.iter().map(|(id, domain)| (*id, domain))
    }

    /// A domain.
    pub fn domain(&self, domid: u16) -> Option<&Domain> {
        self.domains.get(&domid)
    }

    /// Whether RELEASE cut this living domain off.
    pub fn was_released(&self, domid: u16, instance: u64) -> bool {
        self.released.get(&domid) == Some(&instance)
    }

    /// The id that the next connection gets.
    pub fn next_conn(&self) -> ConnId {
        ConnId(self.next_conn)
    }

    /// The limits in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Connections that got output since the last call.
    pub fn take_touched(&mut self) -> Vec<ConnId> {
        std::mem::take(&mut self.touched)
    }

    /// Connections that are gone since the last call.
    pub fn take_closed(&mut self) -> Vec<ConnId> {
        std::mem::take(&mut self.closed)
    }

    /// The slots of connections that are gone since the last call.
    pub fn take_freed_into(&mut self, free: &mut Vec<u32>) {
        free.append(&mut self.freed);
    }

    fn new_tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag - 1
    }

    fn open(&mut self, domid: Option<u16>, class: Class, slot: u32) -> ConnId {
        let id = ConnId(self.next_conn);
        self.next_conn += 1;
        let tag = self.new_tag();
        self.conns.insert(id, Conn::new(domid, class, slot, tag));
        id
    }

    fn drop_watches(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let watches = std::mem::take(&mut conn.watches);
        conn.folded.clear();
        conn.watch_bytes = 0;
        self.watches.remove_all(self.tree.arena_mut(), id, watches.iter().map(|(path, _)| &path[..]));
    }

    fn close(&mut self, id: ConnId) {
        self.drop_watches(id);
        let Some(conn) = self.conns.remove(&id) else { return };
        self.closed.push(id);
        self.freed.push(conn.slot);
        if let Some(domain) = conn.domid.and_then(|d| self.domains.get_mut(&d)) {
            domain.conn = None;
            domain.ring = None;
        }
    }

    fn ignore(&mut self, id: ConnId, error: u32) {
        self.reset(id);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.ignored = Some(error);
        }
    }

    fn reset(&mut self, id: ConnId) {
        self.drop_watches(id);
        let tag = self.new_tag();
        if let Some(conn) = self.conns.get_mut(&id) {
            *conn = Conn::new(conn.domid, conn.class, conn.slot, tag);
        }
    }

    fn domain_up(&mut self, domid: u16, instance: u64, ring: (u32, u32), class: Class, slot: u32) {
        self.released.remove(&domid);
        let known = self.domains.get(&domid).map(|d| (d.instance, d.conn));
        match known {
            // Introduced by request before its ring was known.
            Some((0, None)) => {}
            Some((old, None)) if old == instance => {}
            // The same domain with another ring.
            Some((old, Some(conn))) if old == instance => self.close(conn),
            Some(_) => self.release(domid),
            None => {}
        }
        let fresh = !self.domains.contains_key(&domid);
        let conn = self.open(Some(domid), class, slot);
        if fresh {
            let domain = self.new_domain(domid, class);
            self.domains.insert(domid, domain);
        }
        let Some(domain) = self.domains.get_mut(&domid) else { return };
        domain.instance = instance;
        domain.conn = Some(conn);
        domain.ring = Some(ring);
        if fresh && domid != 0 {
            self.fire_special(path::INTRODUCE, domid);
        }
    }

    /// A domain that is introduced now, with what was set for it before.
    fn new_domain(&mut self, domid: u16, class: Class) -> Domain {
        let prepared = self.prepared.remove(&domid).unwrap_or_default();
        Domain {
            instance: 0,
            conn: None,
            ring: None,
            shutdown: false,
            target: None,
            features: prepared.features.unwrap_or(FEATURES),
            quota: prepared.quota.unwrap_or_else(|| self.quota_of(class).clone()),
            account: Account::default(),
        }
    }

    /// A domain is gone: its connection, its nodes and what others granted to its domid go with it.
    fn release(&mut self, domid: u16) {
        self.prepared.remove(&domid);
        self.gated.remove(&domid);
        let Some(domain) = self.domains.remove(&domid) else { return };
        if let Some(conn) = domain.conn {
            self.close(conn);
        }
        for other in self.domains.values_mut() {
            other.target = other.target.filter(|t| *t != domid);
        }
        let mut changes = Vec::new();
        let watches = &self.watches;
        self.tree.forget_domain(domid, |tree, path| nodes::removed(tree, watches, path, &mut changes));
        for change in &changes {
            self.fire(change);
        }
        self.fire_special(path::RELEASE, domid);
    }

    /// The caller that a connection's requests run as.
    fn caller(&self, conn: &Conn) -> Caller {
        let domid = conn.domid.unwrap_or(0);
        let target = self.domains.get(&domid).and_then(|d| d.target);
        Caller { domid, privileged: conn.privileged(), target }
    }

    /// Tells the watches of a change, each watcher only if it may read there (XSA-115).
    fn fire(&mut self, change: &Changed) {
        let watches = std::mem::take(&mut self.watches);
        let wanted = |w: &Watch| {
            self.conns.get(&w.conn).is_some_and(|conn| {
                let caller = self.caller(conn);
                change.perms.iter().any(|p| p.allowed(&caller) & READ != 0)
            })
        };
        let hits: Vec<(&[u8], &Watch)> = if change.exact {
            watches.at(&change.path).filter(|w| wanted(w)).map(|w| (&change.path[..], w)).collect()
        } else {
            watches.matching(&change.path).filter(|(_, w)| wanted(w)).collect()
        };
        for (watched, watch) in hits {
            self.send_event(watched, &change.path, watch);
        }
        self.watches = watches;
    }

    /// Tells of a domain's coming or going: plain special watches, and those with the domid form.
    fn fire_special(&mut self, name: &'static [u8], domid: u16) {
        let Some(perms) = self.special_perms(name) else { return };
        let with_domid = [name, b"/", domid.to_string().as_bytes()].concat();
        let watches = std::mem::take(&mut self.watches);
        let plain = watches.at(name).map(|w| {
            let path = if w.depth.is_some() { &with_domid[..] } else { name };
            (w.depth != Some(0), name, path, w)
        });
        let exact = watches.at(&with_domid).map(|w| (true, &with_domid[..], &with_domid[..], w));
        for (wanted, watched, path, watch) in plain.chain(exact) {
            let readable =
                self.conns.get(&watch.conn).is_some_and(|conn| perms.allowed(&self.caller(conn)) & READ != 0);
            if wanted && readable {
                self.send_event(watched, path, watch);
            }
        }
        self.watches = watches;
    }

    fn special_perms(&self, name: &[u8]) -> Option<Perms> {
        self.tree.lookup(name).map(|id| self.tree.node(id).perms.clone())
    }

    /// Queues a watch event. A client that does not read gets one event per watch, on the watched path, that
    /// stands for all further ones: so its memory is bounded and yet it misses nothing (XSA-326).
    fn send_event(&mut self, watched: &[u8], path: &[u8], watch: &Watch) {
        let Some(conn) = self.conns.get_mut(&watch.conn) else { return };
        let mut told = &path[watch.strip.min(path.len())..];
        let behind = conn.out.end() - conn.drained > FOLD_AT;
        // A path that does not fit (XSA-324) is told by the watched one, which did fit its request.
        if behind || told.len() + watch.token.len() + 2 > PAYLOAD_MAX {
            told = &watched[watch.strip.min(watched.len())..];
        }
        if behind {
            let key: WatchKey = (watched.into(), watch.token.clone());
            let position = conn.out.end();
            match conn.folded.entry(key) {
                std::collections::btree_map::Entry::Occupied(_) => return,
                std::collections::btree_map::Entry::Vacant(slot) => slot.insert(position + 1),
            };
        }
        let len = told.len() + watch.token.len() + 2;
        if len > PAYLOAD_MAX {
            return;
        }
        let head = Header { kind: XsMsgType::WatchEvent.raw(), req_id: 0, tx_id: 0, len };
        let parts: [&[u8]; 5] = [&head.encode(), told, b"\0", &watch.token, b"\0"];
        self.emit(watch.conn, &parts);
    }

    /// Queues one message.
    fn emit(&mut self, id: ConnId, parts: &[&[u8]]) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        self.digest = crc32c::crc32c_append(self.digest, &id.0.to_le_bytes());
        for part in parts {
            self.digest = crc32c::crc32c_append(self.digest, part);
            conn.out.push(part);
        }
        conn.out.end_message();
        if self.touched.last() != Some(&id) {
            self.touched.push(id);
        }
    }

    /// Checks the state's invariants.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check(&self) -> Result<(), String> {
        self.tree.check()?;
        let listed: usize = self.conns.values().map(|c| c.watches.len()).sum();
        if listed != self.watches.len() {
            return Err(format!("connections list {listed} watches, the index {}", self.watches.len()));
        }
        for (path, watch) in self.watches.iter() {
            let key = (std::sync::Arc::clone(path), watch.token.clone());
            if !self.conns.get(&watch.conn).is_some_and(|c| c.watches.contains(&key)) {
                return Err(format!("a watch of connection {} without its owner", watch.conn.0));
            }
        }
        for (domid, domain) in &self.domains {
            if domain.conn.is_some_and(|c| self.conns.get(&c).map(|c| c.domid) != Some(Some(*domid))) {
                return Err(format!("domain {domid} names a connection that is not its own"));
            }
        }
        Ok(())
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

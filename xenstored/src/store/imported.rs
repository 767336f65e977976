//! Putting connections of a migration stream into a fresh store.

use std::sync::Arc;

use xen_abi::xs_wire::XsMsgType as Op;

use super::nodes::Env;
use super::requests::WATCH_COST;
use super::transaction::{TxOp, UNKNOWN, digest};
use super::{Conn, ConnId, FEATURE_DOMID_ANY, OutQueue, Store, Transaction};
use crate::migrate::RingEnd;
use crate::path;
use crate::perms::Perms;
use crate::tree::{Lookup, Tree, TxView, View as _};
use crate::watches::Watch;
use crate::wire::Errno;

/// What a transaction saw of a node, or did to it.
pub enum Step {
    /// It was read, and this was there.
    Seen {
        /// The node.
        path: Vec<u8>,
        /// Its value; none: there was no such node.
        value: Option<Vec<u8>>,
    },
    /// It was removed.
    Removed {
        /// The node.
        path: Vec<u8>,
    },
    /// It was written or made.
    Put {
        /// The node.
        path: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
        /// Its permissions.
        perms: Perms,
    },
}

/// Does a transaction's steps again, as the requests that they can have been.
struct Again<'a> {
    tree: &'a Tree,
    env: Env<'a>,
    tx: Transaction,
}

impl Again<'_> {
    fn run(&mut self, op: Op, path: &[u8], rest: &[u8]) -> Result<(), Errno> {
        self.tx.run(self.tree, &self.env, op, &[path, b"\0", rest].concat(), &mut Vec::new())
    }

    /// One that changes something, which must not be lost.
    fn change(&mut self, op: Op, path: &[u8], rest: &[u8]) {
        if self.run(op, path, rest).is_err() {
            self.tx.doom();
        }
    }

    fn seen(&mut self, path: &[u8], value: Option<&[u8]>) {
        // Refused for its size, it is not in the list.
        let _ = self.run(Op::Read, path, b"");
        let answer = match value {
            Some(value) => digest(Ok(()), value),
            None => digest(Err(Errno::ENOENT), b""),
        };
        match self.tx.ops.last_mut() {
            Some(done) => done.answer = answer,
            None => self.tx.doom(),
        }
        if value.is_some() {
            // Which of its other sides it saw is not told, so all of them have to stay as they are.
            let _ = self.run(Op::Directory, path, b"");
            let _ = self.run(Op::GetPerms, path, b"");
        }
    }

    fn set_perms(&mut self, path: &[u8], perms: &Perms) {
        let view = TxView { base: self.tree, over: &mut self.tx.over };
        let now = match view.find(path) {
            Lookup::Node(found) => Some(found.perms.clone()),
            Lookup::Missing { .. } => None,
        };
        if now.is_none() {
            self.change(Op::Mkdir, path, b"");
        }
        if now.as_ref() != Some(perms) {
            let mut texts = Vec::new();
            perms.entries().iter().for_each(|perm| perm.format(&mut texts));
            self.change(Op::SetPerms, path, &texts);
        }
    }

    fn all(&mut self, steps: &[Step]) {
        let mut implied = Vec::new();
        for (i, step) in steps.iter().enumerate() {
            match step {
                Step::Seen { path, value } => self.seen(path, value.as_deref()),
                Step::Removed { path } => self.change(Op::Rm, path, b""),
                Step::Put { path, value, perms } => {
                    let below = [path.strip_suffix(b"/").unwrap_or(path), b"/"].concat();
                    let made = |s: &Step| matches!(s, Step::Put { path, .. } if path.starts_with(&below));
                    if value.is_empty() && steps[i + 1..].iter().any(made) {
                        // Most likely made for the one below it, and watches are not told of those.
                        implied.push((path, perms));
                    } else {
                        self.change(Op::Write, path, value);
                        self.set_perms(path, perms);
                    }
                }
            }
        }
        implied.into_iter().for_each(|(path, perms)| self.set_perms(path, perms));
    }
}

impl Store {
    /// A connection with this output. `from`: input position of its next request; `sent`: output position of these bytes.
    pub(crate) fn import_connection(
        &mut self,
        id: ConnId,
        slot: u32,
        from: u64,
        sent: u64,
        output: &[u8],
        ring: Option<(u16, Option<u16>, RingEnd)>,
    ) {
        let tag = self.new_tag();
        let class = ring.map_or(super::Class::Dom0, |(.., end)| end.class);
        let mut conn = Conn::new(ring.map(|(domid, ..)| domid), class, slot, tag);
        (conn.consumed, conn.drained) = (from, sent);
        conn.out = OutQueue::restore(sent, output);
        if let Some((domid, target, end)) = ring {
            conn.ignored = Some(end.error).filter(|e| *e != 0);
            let mut domain = self.new_domain(domid, class);
            (domain.instance, domain.conn, domain.target) = (end.instance, Some(id), target);
            domain.ring = Some((end.gref, end.port));
            self.domains.insert(domid, domain);
        }
        self.conns.insert(id, conn);
        self.next_conn = self.next_conn.max(id.0 + 1);
    }

    /// A watch; false if it is none.
    pub(crate) fn import_watch(&mut self, id: ConnId, raw: &[u8], token: &[u8], depth: Option<u32>) -> bool {
        let Some(conn) = self.conns.get_mut(&id) else { return false };
        let Ok(path) = path::canonicalize(raw, &conn.base, true, usize::MAX) else { return false };
        let relative = !matches!(raw.first(), Some(b'/' | b'@'));
        let strip = if relative { conn.base.len() + 1 } else { 0 };
        let key = (Arc::from(&path[..]), Box::from(token));
        if conn.watches.contains(&key) {
            return false;
        }
        let watch = Watch { conn: id, token: token.into(), depth, strip };
        let shared = self.watches.add(self.tree.arena_mut(), &path, watch);
        conn.watch_bytes += (path.len() + token.len()) as u64 + WATCH_COST;
        conn.watches.insert((shared, key.1));
        true
    }

    fn environment<'a>(&'a self, conn: &'a Conn, quota: &'a super::Quota) -> Env<'a> {
        let mut env = Env::new(self.caller(conn), &conn.base, quota);
        env.any = self.features_of(conn.domid) & FEATURE_DOMID_ANY != 0;
        env.domains = Some(&self.domains);
        env.watches = Some(&self.watches);
        env
    }

    fn quota_for(&self, conn: &Conn) -> &super::Quota {
        conn.domid.and_then(|d| self.domains.get(&d)).map_or(&self.limits.service, |d| &d.quota)
    }

    /// A transaction that did this. What can't be done again makes its end fail with EAGAIN.
    pub(crate) fn import_transaction(&mut self, id: ConnId, tx_id: u32, steps: &[Step]) {
        let Some(conn) = self.conns.get(&id) else { return };
        let env = self.environment(conn, self.quota_for(conn));
        let mut again = Again { tree: &self.tree, env, tx: Transaction::new(&self.tree) };
        again.all(steps);
        let mut tx = again.tx;
        // What it saw is judged at its end, whatever happens until then.
        tx.start = UNKNOWN;
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.txs.insert(tx_id, tx);
            conn.next_tx = conn.next_tx.max(tx_id.wrapping_add(1));
        }
    }

    /// Whether a transaction would commit if it ended now.
    pub(crate) fn would_commit(&self, conn: &Conn, tx: &Transaction) -> bool {
        tx.start == self.tree.generation()
            || tx.again(&self.tree, &self.environment(conn, self.quota_for(conn))).is_ok()
    }
}

impl Transaction {
    /// Lets its end fail: no answer has this digest but by chance.
    fn doom(&mut self) {
        let payload = b"/\0".as_slice().into();
        self.ops.push(TxOp { op: Op::Read, payload, answer: digest(Err(Errno::EAGAIN), b"doomed") });
    }
}

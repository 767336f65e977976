//! Transactions: an overlay to read from, and the list of what was done with what was answered.
//!
//! At commit the operations run again on the tree as it is now, unless nothing that they touched changed since the start.
//! If every reply comes out the same, the transaction could just as well have run now as a whole, so its
//! changes are carried out; if one differs, the answer is EAGAIN. Hence two transactions conflict only if one
//! of them *saw* what the other changed: writers of the same node do not starve each other (XSA-206), and a
//! commit is all or nothing (XSA-415, XSA-421).

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher as _};

use xen_abi::xs_wire::XsMsgType as Op;

use super::Item;
use super::nodes::{self, Changed, Env};
use crate::path::canonicalize;
use crate::tree::{Change, Lookup, Overlay, Tree, TxView, View as _};
use crate::watches::WatchIndex;
use crate::wire::{Errno, strings};

/// Most bytes of requests in a transaction, whoever's it is.
const BYTES_MAX: usize = 64 << 20;
/// Start of a transaction of which is not known when it began.
pub(super) const UNKNOWN: u64 = u64::MAX;
/// Changes among which one is found by looking at all.
const FEW: usize = 16;

/// One operation of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxOp {
    /// What.
    pub op: Op,
    /// Its payload.
    pub payload: Box<[u8]>,
    /// Digest of its answer.
    pub answer: u64,
}

/// An open transaction.
#[derive(Debug, Default)]
pub struct Transaction {
    /// The tree's generation at the start.
    pub start: u64,
    /// Its changes.
    pub over: Overlay,
    /// All it did, in order.
    pub ops: Vec<TxOp>,
    /// Bytes of `ops`, for the quota.
    pub bytes: usize,
    /// What to tell watches at commit; each path once.
    pub changes: Changes,
}

/// Digest of an answer. `DefaultHasher::new` has fixed keys, so a digest holds across restarts of one binary.
pub(super) fn digest(result: Result<(), Errno>, reply: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    match result {
        Ok(()) => hasher.write(reply),
        Err(e) => hasher.write_u32(1 << 16 | e as u32),
    }
    hasher.finish()
}

/// A list of changes in which each path stands once.
#[derive(Debug, Default)]
pub struct Changes {
    /// In the order of their first mention.
    pub list: Vec<Changed>,
    /// Where each path is, once they are not few.
    index: HashMap<Box<[u8]>, usize>,
}

impl Changes {
    /// Adds what one operation did.
    pub fn merge(&mut self, from: Vec<Changed>) {
        for change in from {
            match self.position(&change.path) {
                Some(at) => {
                    let known = &mut self.list[at];
                    known.removed |= change.removed;
                    for perms in change.perms {
                        if !known.perms.contains(&perms) {
                            known.perms.push(perms);
                        }
                    }
                }
                None => self.list.push(change),
            }
        }
    }

    fn position(&mut self, path: &[u8]) -> Option<usize> {
        if self.list.len() <= FEW {
            return self.list.iter().position(|c| *c.path == *path);
        }
        for at in self.index.len()..self.list.len() {
            self.index.insert(self.list[at].path.clone(), at);
        }
        self.index.get(path).copied()
    }
}

impl Transaction {
    /// A transaction that begins now.
    pub fn new(tree: &Tree) -> Self {
        Self { start: tree.generation(), ..Self::default() }
    }

    /// Runs one operation inside the transaction.
    ///
    /// # Errors
    /// The error to answer with; ENOSPC also when the transaction has become too large.
    pub fn run(
        &mut self,
        tree: &Tree,
        env: &Env<'_>,
        op: Op,
        payload: &[u8],
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        env.within(Item::TransactionNodes, self.over.nodes as u64)?;
        let cost = payload.len() + size_of::<TxOp>();
        if self.bytes + cost > BYTES_MAX || self.changes_memory_over(env, cost) {
            return Err(Errno::ENOMEM);
        }
        let mut changes = Vec::new();
        let mut view = TxView { base: tree, over: &mut self.over };
        let result = nodes::run(&mut view, env, op, payload, reply, &mut changes);
        self.changes.merge(changes);
        self.bytes += cost;
        self.ops.push(TxOp { op, payload: payload.into(), answer: digest(result, reply) });
        result
    }

    /// Reads count too: what was read is kept until the end.
    fn changes_memory_over(&self, env: &Env<'_>, cost: usize) -> bool {
        !env.caller.privileged && env.quota.exceeds(Item::Memory, false, (self.bytes + cost) as u64)
    }

    /// Whether what it saw and changed is as it was at its start, so that it would run the same again.
    fn undisturbed(&self, tree: &Tree, env: &Env<'_>) -> bool {
        // What others did to its owner's quota or to domains that permissions name is not in the nodes.
        let alone = env.caller.privileged
            || self.over.owned.values().all(|by| *by == 0) && !self.ops.iter().any(|s| s.op == Op::SetPerms);
        alone
            && self.start != UNKNOWN
            && self.ops.iter().all(|step| {
                let raw = strings(&step.payload).next().unwrap_or_default();
                let path = canonicalize(raw, env.base, true, usize::MAX);
                // What is no path gets the same answer whatever the tree is.
                path.map_or(true, |path| tree.last_change(&path) <= self.start)
            })
    }

    /// Runs all of it again on the tree as it is now.
    ///
    /// # Errors
    /// EAGAIN when something that the transaction saw has changed.
    pub fn again(&self, tree: &Tree, env: &Env<'_>) -> Result<Transaction, Errno> {
        let mut again = Transaction::new(tree);
        let mut reply = Vec::new();
        for step in &self.ops {
            reply.clear();
            let mut changes = Vec::new();
            let mut view = TxView { base: tree, over: &mut again.over };
            let result = nodes::run(&mut view, env, step.op, &step.payload, &mut reply, &mut changes);
            if digest(result, &reply) != step.answer {
                return Err(Errno::EAGAIN);
            }
            again.changes.merge(changes);
        }
        Ok(again)
    }

    /// The nodes that it wrote or removed.
    pub fn changed(&self) -> impl Iterator<Item = (Vec<u8>, &Change)> {
        let mut trail: Vec<&[u8]> = Vec::new();
        self.over.walk().filter_map(move |(depth, name, over)| {
            trail.truncate(depth - 1);
            trail.push(name);
            let path = trail.join(&b"/"[..]);
            let path = if path.is_empty() { b"/".to_vec() } else { path };
            (over.change != Change::None).then_some((path, &over.change))
        })
    }

    /// Commits. Returns what watches are to hear of.
    ///
    /// # Errors
    /// EAGAIN when something that the transaction saw has changed; the tree is untouched then.
    pub fn commit(
        mut self,
        tree: &mut Tree,
        env: &Env<'_>,
        watches: &WatchIndex,
    ) -> Result<Vec<Changed>, Errno> {
        if tree.generation() != self.start && !self.undisturbed(tree, env) {
            self = self.again(tree, env)?;
        }
        let mut told = Vec::new();
        for change in std::mem::take(&mut self.changes.list) {
            let heard = watches.concern(&change.path);
            if !heard && (!change.removed || watches.is_empty()) {
                continue;
            }
            let before = match tree.find(&change.path) {
                Lookup::Node(found) => Some(found.perms.clone()),
                Lookup::Missing { .. } => None,
            };
            let view = TxView { base: tree, over: &mut self.over };
            let now = nodes::modified(&view, &change.path, before.clone());
            let exists = matches!(view.find(&change.path), Lookup::Node(_));
            if change.removed && before.is_some() {
                // Watches below hear of what really goes; what was made again is told of by its own entry.
                nodes::removed_below(tree, watches, &change.path, &mut told);
                if !exists && heard {
                    told.push(Changed { removed: true, ..nodes::modified(tree, &change.path, None) });
                }
            }
            if exists && heard {
                let mut perms = now.perms;
                perms.extend(change.perms);
                told.push(Changed { perms, ..change });
            }
        }
        self.over.apply(tree);
        Ok(told)
    }
}

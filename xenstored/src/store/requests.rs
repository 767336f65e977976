//! From a request's bytes to its reply.

use std::rc::Rc;

use xen_abi::xs_wire::XsMsgType as Op;

use super::nodes::{self, Env};
use super::{
    Class, ConnId, FEATURE_DOMID_ANY, FEATURE_WATCHDEPTH, Item, Quota, Store, Transaction, WatchKey,
};
use crate::path;
use crate::perms::Caller;
use crate::tree::View as _;
use crate::watches::Watch;
use crate::wire::{Errno, HEADER, Header, decimal, one_string, strings};

/// What an operation needs to know about who called it.
pub(super) struct Ctx {
    pub id: ConnId,
    pub caller: Caller,
    base: Rc<[u8]>,
    pub quota: Quota,
    tx_id: u32,
    features: u32,
}

/// Bytes that a watch counts for, besides its path and token.
pub(super) const WATCH_COST: u64 = 64;

impl Store {
    pub(super) fn request(&mut self, id: ConnId, consumed: u64, message: &[u8]) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.consumed = consumed;
        self.requests += 1;
        let Some((head, payload)) = message.split_first_chunk::<HEADER>() else { return };
        let Ok(head) = Header::decode(head) else { return };
        if self.log_requests {
            let text = String::from_utf8_lossy(&payload[..payload.len().min(80)]).into_owned();
            tracing::info!(conn = id.0, op = head.kind, tx = head.tx_id, len = head.len, text, "request");
        }
        let mut reply = std::mem::take(&mut self.reply);
        reply.clear();
        let outcome = self.execute(id, &head, payload, &mut reply);
        let (kind, body) = match &outcome {
            Ok(()) => (head.kind, &reply[..]),
            Err(e) => (Op::Error.raw(), e.payload()),
        };
        let answer = Header { kind, len: body.len(), ..head };
        self.emit(id, &[&answer.encode(), body]);
        self.reply = reply;
        // The events of a WATCH come after its reply (xenstore.txt: it is triggered once straight away).
        if outcome.is_ok() && head.op() == Some(Op::Watch) {
            self.first_event(id, payload);
        }
    }

    pub(super) fn answer(&mut self, id: ConnId, consumed: u64, message: &[u8], error: bool, text: &[u8]) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.consumed = consumed;
        self.requests += 1;
        let Some((head, _)) = message.split_first_chunk::<HEADER>() else { return };
        let Ok(head) = Header::decode(head) else { return };
        let kind = if error { Op::Error.raw() } else { head.kind };
        let answer = Header { kind, len: text.len(), ..head };
        self.emit(id, &[&answer.encode(), text]);
    }

    fn context(&self, id: ConnId, tx_id: u32) -> Option<Ctx> {
        let conn = self.conns.get(&id)?;
        let domain = conn.domid.and_then(|d| self.domains.get(&d));
        let quota = domain.map_or(&self.limits.service, |d| &d.quota).clone();
        let features = self.features_of(conn.domid);
        Some(Ctx { id, caller: self.caller(conn), base: Rc::clone(&conn.base), quota, tx_id, features })
    }

    fn execute(
        &mut self,
        id: ConnId,
        head: &Header,
        payload: &[u8],
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let op = head.op().ok_or(Errno::ENOSYS)?;
        let ctx = self.context(id, head.tx_id).ok_or(Errno::EINVAL)?;
        let privileged_only = matches!(
            op,
            Op::Control
                | Op::Introduce
                | Op::Release
                | Op::IsDomainIntroduced
                | Op::Resume
                | Op::SetTarget
                | Op::SetFeature
                | Op::GetQuota
                | Op::SetQuota
        );
        if privileged_only && !ctx.caller.privileged {
            return Err(Errno::EACCES);
        }
        let ignores_tx = matches!(op, Op::Watch | Op::Unwatch);
        let has_tx = |s: &Self| s.conns.get(&id).is_some_and(|c| c.txs.contains_key(&head.tx_id));
        if !ignores_tx && head.tx_id != 0 && !has_tx(self) {
            return Err(Errno::ENOENT);
        }
        let ok = |reply: &mut Vec<u8>| reply.extend_from_slice(b"OK\0");
        match op {
            Op::Read
            | Op::Directory
            | Op::DirectoryPart
            | Op::GetPerms
            | Op::Write
            | Op::Mkdir
            | Op::Rm
            | Op::SetPerms => return self.node_op(&ctx, op, payload, reply),
            Op::Watch => self.watch(&ctx, payload)?,
            Op::Unwatch => self.unwatch(&ctx, payload)?,
            Op::ResetWatches => {
                self.drop_watches(id);
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.txs.clear();
                }
            }
            Op::TransactionStart => return self.transaction_start(&ctx, reply),
            Op::TransactionEnd => self.transaction_end(&ctx, payload)?,
            Op::Introduce => self.introduce(payload)?,
            Op::Release => {
                let domid = self.known_domain(payload)?;
                if let Some(instance) = self.domains.get(&domid).map(|d| d.instance).filter(|i| *i != 0) {
                    self.released.insert(domid, instance);
                }
                self.release(domid);
            }
            Op::Resume => {
                let domid = self.known_domain(payload)?;
                if let Some(domain) = self.domains.get_mut(&domid) {
                    domain.shutdown = false;
                }
            }
            Op::IsDomainIntroduced => {
                let domid: u16 = decimal(one_string(payload)?)?;
                let known =
                    domid == 0 || domid == xen_abi::xen::DOMID_SELF || self.domains.contains_key(&domid);
                reply.extend_from_slice(if known { b"T\0" } else { b"F\0" });
                return Ok(());
            }
            Op::GetDomainPath => {
                reply.extend_from_slice(&path::domain_path(decimal(one_string(payload)?)?));
                reply.push(0);
                return Ok(());
            }
            Op::SetTarget => {
                let mut args = strings(payload);
                let (Some(domid), Some(target)) = (args.next(), args.next()) else {
                    return Err(Errno::EINVAL);
                };
                let (domid, target): (u16, u16) = (decimal(domid)?, decimal(target)?);
                if !self.domains.contains_key(&target) {
                    return Err(Errno::ENOENT);
                }
                self.domains.get_mut(&domid).ok_or(Errno::ENOENT)?.target = Some(target);
            }
            Op::Control => return self.control(payload, reply),
            Op::GetFeature | Op::SetFeature | Op::GetQuota | Op::SetQuota => {
                return self.admin(&ctx, op, payload, reply);
            }
            Op::WatchEvent | Op::Error => return Err(Errno::ENOSYS),
        }
        ok(reply);
        Ok(())
    }

    fn node_op(&mut self, ctx: &Ctx, op: Op, payload: &[u8], reply: &mut Vec<u8>) -> Result<(), Errno> {
        let changes_tree = matches!(op, Op::Write | Op::Mkdir | Op::SetPerms);
        if changes_tree && !ctx.caller.privileged {
            let after = self.memory_of(ctx.caller.domid) + payload.len() as u64;
            self.charge(ctx, Item::Memory, after, Errno::ENOMEM)?;
        }
        let mut env = Env::new(ctx.caller, &ctx.base, &ctx.quota);
        env.any = ctx.features & FEATURE_DOMID_ANY != 0;
        env.domains = Some(&self.domains);
        (env.watches, env.later) = (Some(&self.watches), ctx.tx_id != 0);
        if ctx.tx_id != 0 {
            let tx =
                self.conns.get_mut(&ctx.id).and_then(|c| c.txs.get_mut(&ctx.tx_id)).ok_or(Errno::ENOENT)?;
            let result = tx.run(&self.tree, &env, op, payload, reply);
            let touched = tx.over.nodes as u64;
            return self.settle(ctx, env.refused(), result, Some((Item::TransactionNodes, touched)));
        }
        let mut changes = Vec::new();
        let result = nodes::run(&mut self.tree, &env, op, payload, reply, &mut changes);
        let refused = env.refused();
        for change in &changes {
            self.fire(change);
        }
        let owned = changes_tree.then(|| (Item::Nodes, self.tree.owned(ctx.caller.domid)));
        self.settle(ctx, refused, result, owned)
    }

    /// Books what an operation used or was refused.
    fn settle(
        &mut self,
        ctx: &Ctx,
        refused: Option<Item>,
        result: Result<(), Errno>,
        used: Option<(Item, u64)>,
    ) -> Result<(), Errno> {
        if ctx.caller.privileged {
            return result;
        }
        if let Some(item) = refused {
            self.refused(ctx.caller.domid, item);
        } else if let Some((item, value)) = used.filter(|_| result.is_ok()) {
            // Only to be told of: it is within its hard quota, or dom0 put it over.
            let value = value.min(ctx.quota.most(item) as u64);
            self.charge(ctx, item, value, Errno::ENOSPC)?;
        }
        result
    }

    fn watch(&mut self, ctx: &Ctx, payload: &[u8]) -> Result<(), Errno> {
        let (path, watch) = parse_watch(ctx, payload)?;
        let conn = self.conns.get(&ctx.id).ok_or(Errno::EINVAL)?;
        let key: WatchKey = (path[..].into(), watch.token.clone());
        if conn.watches.contains(&key) {
            return Err(Errno::EEXIST);
        }
        let cost = (path.len() + watch.token.len()) as u64 + WATCH_COST;
        let count = conn.watches.len() as u64 + 1;
        self.charge(ctx, Item::Watches, count, Errno::ENOSPC)?;
        if !ctx.caller.privileged {
            self.charge(ctx, Item::Memory, self.memory_of(ctx.caller.domid) + cost, Errno::ENOMEM)?;
        }
        let shared = self.watches.add(self.tree.arena_mut(), &path, watch);
        let conn = self.conns.get_mut(&ctx.id).ok_or(Errno::EINVAL)?;
        conn.watch_bytes += cost;
        conn.watches.insert((shared, key.1));
        Ok(())
    }

    fn first_event(&mut self, id: ConnId, payload: &[u8]) {
        let Some(ctx) = self.context(id, 0) else { return };
        if let Ok((path, watch)) = parse_watch(&ctx, payload) {
            self.send_event(&path, &path, &watch);
        }
    }

    fn unwatch(&mut self, ctx: &Ctx, payload: &[u8]) -> Result<(), Errno> {
        let mut args = strings(payload);
        let (Some(raw), Some(token)) = (args.next(), args.next()) else { return Err(Errno::EINVAL) };
        let path = path::canonicalize(raw, &ctx.base, true, path_max(ctx))?;
        let conn = self.conns.get_mut(&ctx.id).ok_or(Errno::EINVAL)?;
        let key: WatchKey = (path[..].into(), token.into());
        if !conn.watches.remove(&key) {
            return Err(Errno::ENOENT);
        }
        conn.folded.remove(&key);
        conn.watch_bytes -= (path.len() + token.len()) as u64 + WATCH_COST;
        self.watches.remove(self.tree.arena_mut(), &path, ctx.id, token);
        Ok(())
    }

    fn transaction_start(&mut self, ctx: &Ctx, reply: &mut Vec<u8>) -> Result<(), Errno> {
        if ctx.tx_id != 0 {
            return Err(Errno::EBUSY);
        }
        let open = self.conns.get(&ctx.id).map_or(0, |c| c.txs.len() as u64);
        self.charge(ctx, Item::Transactions, open + 1, Errno::ENOSPC)?;
        let conn = self.conns.get_mut(&ctx.id).ok_or(Errno::EINVAL)?;
        while conn.next_tx == 0 || conn.txs.contains_key(&conn.next_tx) {
            conn.next_tx = conn.next_tx.wrapping_add(1);
        }
        let tx_id = conn.next_tx;
        conn.next_tx = tx_id.wrapping_add(1);
        conn.txs.insert(tx_id, Transaction::new(&self.tree));
        reply.extend_from_slice(tx_id.to_string().as_bytes());
        reply.push(0);
        Ok(())
    }

    fn transaction_end(&mut self, ctx: &Ctx, payload: &[u8]) -> Result<(), Errno> {
        let commit = match one_string(payload)? {
            b"T" => true,
            b"F" => false,
            _ => return Err(Errno::EINVAL),
        };
        let conn = self.conns.get_mut(&ctx.id).ok_or(Errno::EINVAL)?;
        let tx = conn.txs.remove(&ctx.tx_id).ok_or(Errno::ENOENT)?;
        if !commit {
            return Ok(());
        }
        let mut env = Env::new(ctx.caller, &ctx.base, &ctx.quota);
        env.any = ctx.features & FEATURE_DOMID_ANY != 0;
        env.domains = Some(&self.domains);
        env.watches = Some(&self.watches);
        match tx.commit(&mut self.tree, &env, &self.watches) {
            Ok(changes) => {
                conn.conflicts = 0;
                for change in &changes {
                    self.fire(change);
                }
                Ok(())
            }
            Err(e) => {
                conn.conflicts = conn.conflicts.saturating_add(1);
                Err(e)
            }
        }
    }

    /// INTRODUCE: the ring is found by the daemon itself (hv-core tells of domains), so only the fact is noted.
    fn introduce(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let args: Vec<&[u8]> = strings(payload).take(3).collect();
        let [domid, _gfn, port] = args[..] else { return Err(Errno::EINVAL) };
        let domid: u16 = decimal(domid)?;
        if decimal::<u32>(port)? == 0 || domid >= xen_abi::xen::DOMID_FIRST_RESERVED {
            return Err(Errno::EINVAL);
        }
        if domid != 0 && !self.domains.contains_key(&domid) {
            let domain = self.new_domain(domid, Class::Guest);
            self.domains.insert(domid, domain);
            self.fire_special(path::INTRODUCE, domid);
        }
        Ok(())
    }

    /// The one argument of RELEASE and RESUME: a domain that is introduced, not dom0.
    fn known_domain(&self, payload: &[u8]) -> Result<u16, Errno> {
        let domid: u16 = decimal(one_string(payload)?)?;
        if domid == 0 {
            return Err(Errno::EINVAL);
        }
        if !self.domains.contains_key(&domid) {
            return Err(Errno::ENOENT);
        }
        Ok(domid)
    }
}

fn path_max(ctx: &Ctx) -> usize {
    if ctx.caller.privileged { usize::MAX } else { ctx.quota.most(Item::PathMax) }
}

fn parse_watch(ctx: &Ctx, payload: &[u8]) -> Result<(Vec<u8>, Watch), Errno> {
    let args: Vec<&[u8]> = strings(payload).take(4).collect();
    let (raw, token, depth) = match args[..] {
        [raw, token] => (raw, token, None),
        [raw, token, depth] if ctx.features & FEATURE_WATCHDEPTH != 0 => (raw, token, Some(decimal(depth)?)),
        _ => return Err(Errno::EINVAL),
    };
    let path = path::canonicalize(raw, &ctx.base, true, path_max(ctx))?.into_owned();
    let relative = !matches!(raw.first(), Some(b'/' | b'@'));
    let strip = if relative { ctx.base.len() + 1 } else { 0 };
    Ok((path, Watch { conn: ctx.id, token: token.into(), depth, strip }))
}

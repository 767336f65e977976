//! GET_FEATURE, SET_FEATURE, GET_QUOTA, SET_QUOTA, and how quotas are enforced and told of.

use xen_abi::xs_wire::XsMsgType as Op;

use super::requests::Ctx;
use super::{ConnId, Item, Notice, Quota, Store};
use crate::path;
use crate::wire::{Errno, decimal, strings};

/// Features offered to domains (docs/misc/xenstore-ring.txt): reconnection, error indicator, WATCH with depth, DOMID_ANY in
/// permissions.
pub const FEATURES: u32 = FEATURE_RECONNECTION | FEATURE_ERROR | FEATURE_WATCHDEPTH | FEATURE_DOMID_ANY;
/// Ring reconnection.
pub const FEATURE_RECONNECTION: u32 = 1;
/// The ring page's error field.
pub const FEATURE_ERROR: u32 = 2;
/// WATCH with depth.
pub const FEATURE_WATCHDEPTH: u32 = 4;
/// DOMID_ANY in permissions.
pub const FEATURE_DOMID_ANY: u32 = 8;

/// What was set for a domain that is not introduced yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prepared {
    /// Features.
    pub features: Option<u32>,
    /// Quotas.
    pub quota: Option<Quota>,
}

fn text(bytes: &[u8]) -> Result<&str, Errno> {
    std::str::from_utf8(bytes).map_err(|_| Errno::EINVAL)
}

fn item(name: &[u8]) -> Result<(Item, bool), Errno> {
    Item::parse(text(name)?).ok_or(Errno::EINVAL)
}

/// A domid that a domain can have; dom0 is always introduced.
fn domid(arg: &[u8]) -> Result<u16, Errno> {
    let domid: u16 = decimal(arg)?;
    if domid >= xen_abi::xen::DOMID_FIRST_RESERVED { Err(Errno::ENOENT) } else { Ok(domid) }
}

impl Store {
    /// The features that a domain has.
    pub fn features_of(&self, domid: Option<u16>) -> u32 {
        domid.and_then(|d| self.domains.get(&d)).map_or(FEATURES, |d| d.features)
    }

    /// Runs one of the four operations.
    pub(super) fn admin(
        &mut self,
        ctx: &Ctx,
        op: Op,
        payload: &[u8],
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let args: Vec<&[u8]> = strings(payload).filter(|s| op != Op::GetFeature || !s.is_empty()).collect();
        match (op, &args[..]) {
            (Op::GetFeature, []) => {
                let domid = self.conns.get(&ctx.id).and_then(|c| c.domid);
                reply.extend_from_slice(self.features_of(domid).to_string().as_bytes());
            }
            (Op::GetFeature, [who]) => {
                if !ctx.caller.privileged {
                    return Err(Errno::EACCES);
                }
                let who = domid(who)?;
                let known = self.domains.get(&who).map(|d| d.features);
                let prepared = self.prepared.get(&who).map(|p| p.features.unwrap_or(FEATURES));
                let features = known.or(prepared).or((who == 0).then_some(FEATURES)).ok_or(Errno::ENOENT)?;
                reply.extend_from_slice(features.to_string().as_bytes());
            }
            (Op::SetFeature, [who, value]) => {
                let (who, value) = (domid(who)?, decimal::<u32>(value)?);
                if who == 0 || self.domains.contains_key(&who) {
                    return Err(Errno::EBUSY);
                }
                if value & !FEATURES != 0 {
                    return Err(Errno::EINVAL);
                }
                self.prepared.entry(who).or_default().features = Some(value);
                reply.extend_from_slice(b"OK");
            }
            (Op::GetQuota, [] | [b""]) => {
                let soft = Item::ALL.iter().map(|i| format!("soft-{}", i.name()));
                let names: Vec<String> = Item::ALL.iter().map(|i| i.name().to_owned()).chain(soft).collect();
                reply.extend_from_slice(names.join(" ").as_bytes());
            }
            (Op::GetQuota, [name]) => {
                let (item, soft) = item(name)?;
                reply.extend_from_slice(self.limits.guest.get(item, soft).to_string().as_bytes());
            }
            (Op::GetQuota, [who, name]) => {
                let (who, (item, soft)) = (domid(who)?, item(name)?);
                let prepared = self.prepared.get(&who).and_then(|p| p.quota.as_ref());
                let quota = self.domains.get(&who).map(|d| &d.quota).or(prepared).ok_or(Errno::ENOENT)?;
                reply.extend_from_slice(quota.get(item, soft).to_string().as_bytes());
            }
            (Op::SetQuota, [name, value]) => {
                let ((item, soft), value) = (item(name)?, decimal(value)?);
                self.limits.guest.set(item, soft, value);
                reply.extend_from_slice(b"OK");
            }
            (Op::SetQuota, [who, name, value]) => {
                let (who, (item, soft), value) = (domid(who)?, item(name)?, decimal(value)?);
                self.set_quota(who, item, soft, value);
                reply.extend_from_slice(b"OK");
            }
            _ => return Err(Errno::EINVAL),
        }
        reply.push(0);
        Ok(())
    }

    /// Sets what a domain has, or gets when it is introduced.
    pub(crate) fn prepare(&mut self, domid: u16, features: u32, quota: Quota) {
        if let Some(domain) = self.domains.get_mut(&domid) {
            (domain.features, domain.quota) = (features, quota);
            return;
        }
        self.prepared.insert(domid, Prepared { features: Some(features), quota: Some(quota) });
    }

    pub(super) fn set_quota(&mut self, domid: u16, item: Item, soft: bool, value: u32) {
        let quota = match self.domains.get_mut(&domid) {
            Some(domain) => &mut domain.quota,
            None => {
                let prepared = self.prepared.entry(domid).or_default();
                prepared.quota.get_or_insert_with(|| self.limits.guest.clone())
            }
        };
        quota.set(item, soft, value);
    }

    /// What a domain uses of a quota now; for those of single nodes and transactions, the most it ever did.
    pub fn used(&self, domid: u16, item: Item) -> u64 {
        let conn = self.domains.get(&domid).and_then(|d| self.conns.get(&d.conn?));
        match item {
            Item::Nodes => self.tree.owners().get(&domid).copied().unwrap_or(0),
            Item::Watches => conn.map_or(0, |c| c.watches.len() as u64),
            Item::Outstanding => conn.map_or(0, |c| c.out.messages() as u64),
            Item::Memory => self.memory_of(domid),
            Item::Transactions => conn.map_or(0, |c| c.txs.len() as u64),
            Item::TransactionNodes | Item::NodePermissions | Item::PathMax | Item::NodeSize => {
                self.domains.get(&domid).map_or(0, |d| u64::from(d.account.peak(item)))
            }
        }
    }

    /// Bytes of a domain's nodes, watches and transactions.
    pub fn memory_of(&self, domid: u16) -> u64 {
        let conn = self.domains.get(&domid).and_then(|d| self.conns.get(&d.conn?));
        let txs: usize = conn.into_iter().flat_map(|c| c.txs.values()).map(|tx| tx.bytes).sum();
        self.tree.bytes_of(domid) + conn.map_or(0, |c| c.watch_bytes) + txs as u64
    }

    /// Judges a domain's use of a quota as it would be.
    pub(super) fn charge(&mut self, ctx: &Ctx, item: Item, value: u64, error: Errno) -> Result<(), Errno> {
        if ctx.caller.privileged {
            return Ok(());
        }
        if ctx.quota.exceeds(item, false, value) {
            self.refused(ctx.caller.domid, item);
            return Err(error);
        }
        let Some(domain) = self.domains.get_mut(&ctx.caller.domid) else { return Ok(()) };
        domain.account.seen(item, value);
        self.peaks.seen(item, value);
        if !ctx.quota.exceeds(item, true, value) {
            domain.account.below(item);
        } else if domain.account.tell(item, true) {
            let limit = ctx.quota.get(item, true);
            self.notices.push(Notice { domid: ctx.caller.domid, item, soft: true, limit });
        }
        Ok(())
    }

    /// Counts a refusal, and tells of the first.
    pub(super) fn refused(&mut self, domid: u16, item: Item) {
        let Some(domain) = self.domains.get_mut(&domid) else { return };
        domain.account.refuse(item);
        self.refusals += 1;
        if domain.account.tell(item, false) {
            let limit = domain.quota.get(item, false);
            self.notices.push(Notice { domid, item, soft: false, limit });
        }
    }

    /// Notes that a domain is not served because it does not read. Not an event: it is counted, and told of once, in each
    /// process.
    pub fn note_gated(&mut self, id: ConnId) {
        if let Some(domid) = self.conns.get(&id).and_then(|c| c.domid)
            && self.gated.insert(domid)
        {
            let limit = self.domains.get(&domid).map_or(0, |d| d.quota.get(Item::Outstanding, false));
            self.notices.push(Notice { domid, item: Item::Outstanding, soft: false, limit });
        }
    }

    /// What the log is to be told since the last call.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    pub(super) fn base_of(domid: Option<u16>) -> std::rc::Rc<[u8]> {
        domid.map(path::domain_path).unwrap_or_default().into()
    }
}

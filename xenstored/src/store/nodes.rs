//! The operations on nodes, written once for the tree and for transactions.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;

use xen_abi::xs_wire::XsMsgType as Op;

use super::{Domain, Item, Quota};
use crate::path::{self, canonicalize};
use crate::perms::{Caller, DOMID_ANY, OWNER, Perm, Perms, READ, WRITE};
use crate::tree::{Found, Lookup, View};
use crate::watches::WatchIndex;
use crate::wire::{Errno, PAYLOAD_MAX, one_string, strings};

/// Whose request it is and what bounds it.
pub struct Env<'a> {
    /// The caller.
    pub caller: Caller,
    /// What relative paths are relative to.
    pub base: &'a [u8],
    /// The caller's quota; ignored for privileged callers.
    pub quota: &'a Quota,
    /// All watches: what none of them hears of needs no preparation.
    pub watches: Option<&'a WatchIndex>,
    /// The operation is part of a transaction: watches hear of it at the commit.
    pub later: bool,
    /// The caller may use DOMID_ANY in permissions.
    pub any: bool,
    /// The domains that exist, as far as the store knows.
    pub domains: Option<&'a BTreeMap<u16, Domain>>,
    refused: Cell<Option<Item>>,
}

/// Something that watches are to hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The node.
    pub path: Box<[u8]>,
    /// Only watches on exactly this path (a node that went with its ancestor).
    pub exact: bool,
    /// It was removed (or removed and made again).
    pub removed: bool,
    /// A watcher must be able to read by at least one of these (XSA-115): the node's permissions, its
    /// parent's, and those it had before.
    pub perms: Vec<Perms>,
}

/// Runs one operation. The reply's payload is appended to `reply`; "OK" stands for success without one.
///
/// # Errors
/// The error to answer with. Nothing is changed then.
pub fn run<V: View>(
    view: &mut V,
    env: &Env<'_>,
    op: Op,
    payload: &[u8],
    reply: &mut Vec<u8>,
    changes: &mut Vec<Changed>,
) -> Result<(), Errno> {
    match op {
        Op::Read => {
            let path = env.path(one_string(payload)?, false)?;
            reply.extend_from_slice(readable(view, env, &path)?.value);
        }
        Op::Directory => {
            let path = env.path(one_string(payload)?, false)?;
            readable(view, env, &path)?;
            for name in view.children(&path) {
                reply.extend_from_slice(name);
                reply.push(0);
                if reply.len() > PAYLOAD_MAX {
                    return Err(Errno::E2BIG);
                }
            }
        }
        Op::DirectoryPart => directory_part(view, env, payload, reply)?,
        Op::GetPerms => {
            let path = env.path(one_string(payload)?, true)?;
            for perm in readable(view, env, &path)?.perms.entries() {
                perm.format(reply);
            }
            if reply.len() > PAYLOAD_MAX {
                return Err(Errno::E2BIG);
            }
        }
        Op::Write => {
            let end = payload.iter().position(|b| *b == 0).ok_or(Errno::EINVAL)?;
            write(view, env, &payload[..end], Some(&payload[end + 1..]), changes)?;
            reply.extend_from_slice(b"OK\0");
        }
        Op::Mkdir => {
            write(view, env, one_string(payload)?, None, changes)?;
            reply.extend_from_slice(b"OK\0");
        }
        Op::Rm => {
            remove(view, env, one_string(payload)?, changes)?;
            reply.extend_from_slice(b"OK\0");
        }
        Op::SetPerms => {
            set_perms(view, env, payload, changes)?;
            reply.extend_from_slice(b"OK\0");
        }
        _ => return Err(Errno::ENOSYS),
    }
    Ok(())
}

impl<'a> Env<'a> {
    /// Inside of a transaction, or outside with `later` and `watches` set.
    pub fn new(caller: Caller, base: &'a [u8], quota: &'a Quota) -> Self {
        Self {
            caller,
            base,
            quota,
            watches: None,
            later: true,
            any: true,
            domains: None,
            refused: Cell::new(None),
        }
    }

    /// The quota for which something was refused.
    pub fn refused(&self) -> Option<Item> {
        self.refused.get()
    }

    /// Judges a use by the caller's quota.
    ///
    /// # Errors
    /// ENOSPC.
    pub fn within(&self, item: Item, value: u64) -> Result<(), Errno> {
        if self.caller.privileged || !self.quota.exceeds(item, false, value) {
            return Ok(());
        }
        self.refused.set(Some(item));
        Err(Errno::ENOSPC)
    }

    fn path<'p>(&self, raw: &'p [u8], special_ok: bool) -> Result<Cow<'p, [u8]>, Errno> {
        let path_max = if self.caller.privileged { usize::MAX } else { self.quota.most(Item::PathMax) };
        canonicalize(raw, self.base, special_ok, path_max)
    }
}

/// A caller who could not even write at the nearest ancestor learns nothing about what exists.
fn missing(env: &Env<'_>, nearest: &Perms, wanted: u8) -> Errno {
    if nearest.allowed(&env.caller) & wanted != 0 { Errno::ENOENT } else { Errno::EACCES }
}

fn readable<'v, V: View>(view: &'v V, env: &Env<'_>, path: &[u8]) -> Result<Found<'v>, Errno> {
    match view.find(path) {
        Lookup::Node(found) if found.perms.allowed(&env.caller) & READ != 0 => Ok(found),
        Lookup::Node(_) => Err(Errno::EACCES),
        Lookup::Missing { perms, .. } => Err(missing(env, perms, READ)),
    }
}

fn directory_part<V: View>(
    view: &V,
    env: &Env<'_>,
    payload: &[u8],
    reply: &mut Vec<u8>,
) -> Result<(), Errno> {
    let mut args = strings(payload);
    let (Some(raw), Some(offset), None) = (args.next(), args.next(), args.next()) else {
        return Err(Errno::EINVAL);
    };
    let path = env.path(raw, false)?;
    let found = readable(view, env, &path)?;
    // As atoi(3): what is no number counts as 0.
    let digits = offset.iter().take_while(|b| b.is_ascii_digit());
    let offset = digits.fold(0usize, |n, b| n.saturating_mul(10).saturating_add(usize::from(b - b'0')));
    reply.extend_from_slice(found.generation.to_string().as_bytes());
    reply.push(0);
    let room = PAYLOAD_MAX - 1;
    let mut at = 0usize;
    for name in view.children(&path) {
        let start = at;
        at += name.len() + 1;
        if at <= offset {
            continue;
        }
        // A client's offset is always at a name's start; a stray one begins inside a name, as in Xen's daemon.
        let skip = offset.saturating_sub(start);
        if reply.len() + name.len() - skip + 1 > room {
            return Ok(());
        }
        reply.extend_from_slice(&name[skip..]);
        reply.push(0);
    }
    // The list's end is told by an empty name.
    reply.push(0);
    Ok(())
}

fn parent_perms<V: View>(view: &V, path: &[u8]) -> Option<Perms> {
    match view.find(path::parent(path)?) {
        Lookup::Node(found) => Some(found.perms.clone()),
        Lookup::Missing { .. } => None,
    }
}

/// What watches are told of a node that exists now.
pub fn modified<V: View>(view: &V, path: &[u8], old: Option<Perms>) -> Changed {
    let own = match view.find(path) {
        Lookup::Node(found) => Some(found.perms.clone()),
        Lookup::Missing { .. } => None,
    };
    let perms = own.into_iter().chain(parent_perms(view, path)).chain(old).collect();
    Changed { path: path.into(), exact: false, removed: false, perms }
}

/// What watches below a node are told when it is about to go.
pub fn removed_below<V: View>(view: &V, watches: &WatchIndex, path: &[u8], changes: &mut Vec<Changed>) {
    for below in watches.paths_below(path) {
        if matches!(view.find(&below), Lookup::Node(_)) {
            changes.push(Changed { exact: true, removed: true, ..modified(view, &below, None) });
        }
    }
}

/// What watches are told of a subtree that is about to go: those below it first.
pub fn removed<V: View>(view: &V, watches: &WatchIndex, path: &[u8], changes: &mut Vec<Changed>) {
    removed_below(view, watches, path, changes);
    if watches.concern(path) {
        changes.push(Changed { removed: true, ..modified(view, path, None) });
    }
}

/// Notes a change for the watches that hear of it. In a transaction there may be others at its end.
fn note<V: View>(view: &V, env: &Env<'_>, path: &[u8], old: Option<Perms>, changes: &mut Vec<Changed>) {
    match (env.watches.is_none_or(|w| w.concern(path)), env.later) {
        (true, _) => changes.push(modified(view, path, old)),
        (false, true) => {
            changes.push(Changed { path: path.into(), exact: false, removed: false, perms: Vec::new() });
        }
        (false, false) => {}
    }
}

/// WRITE (`value` given) and MKDIR.
fn write<V: View>(
    view: &mut V,
    env: &Env<'_>,
    raw: &[u8],
    value: Option<&[u8]>,
    changes: &mut Vec<Changed>,
) -> Result<(), Errno> {
    let path = env.path(raw, false)?;
    let (existing, perms) = match view.find(&path) {
        Lookup::Node(found) => {
            if found.perms.allowed(&env.caller) & WRITE == 0 {
                return Err(Errno::EACCES);
            }
            let Some(value) = value else { return Ok(()) };
            env.within(Item::NodeSize, value.len() as u64)?;
            view.set_value(&path, value);
            note(view, env, &path, None, changes);
            return Ok(());
        }
        Lookup::Missing { existing, perms } => (existing, perms.clone()),
    };
    if perms.allowed(&env.caller) & WRITE == 0 {
        return Err(Errno::EACCES);
    }
    env.within(Item::NodeSize, value.unwrap_or_default().len() as u64)?;
    let new: Vec<&[u8]> = path::prefixes(&path).skip(existing).collect();
    // Unprivileged domains own what they make; the rest is inherited.
    let perms = if env.caller.privileged { perms } else { perms.owned_by(env.caller.domid) };
    env.within(Item::Nodes, view.owned(env.caller.domid) + new.len() as u64)?;
    for step in &new {
        let value = if step.len() == path.len() { value.unwrap_or_default() } else { b"" };
        view.create(step, value, perms.clone());
    }
    note(view, env, &path, None, changes);
    Ok(())
}

fn remove<V: View>(view: &mut V, env: &Env<'_>, raw: &[u8], changes: &mut Vec<Changed>) -> Result<(), Errno> {
    let path = env.path(raw, false)?;
    match view.find(&path) {
        Lookup::Node(found) if found.perms.allowed(&env.caller) & WRITE == 0 => return Err(Errno::EACCES),
        Lookup::Node(_) if *path == *b"/" => return Err(Errno::EINVAL),
        Lookup::Node(_) => {}
        Lookup::Missing { existing, perms } => {
            let why = missing(env, perms, WRITE);
            // Gone already is fine as long as the parent exists.
            let parent_exists = existing + 1 == path::names(&path).count();
            return if why == Errno::ENOENT && parent_exists { Ok(()) } else { Err(why) };
        }
    }
    match env.watches.filter(|_| !env.later) {
        Some(watches) => removed(view, watches, &path, changes),
        None => {
            changes.push(Changed { path: (*path).into(), exact: false, removed: true, perms: Vec::new() })
        }
    }
    view.remove(&path);
    Ok(())
}

fn set_perms<V: View>(
    view: &mut V,
    env: &Env<'_>,
    payload: &[u8],
    changes: &mut Vec<Changed>,
) -> Result<(), Errno> {
    let mut args = strings(payload);
    let raw = args.next().ok_or(Errno::EINVAL)?;
    let texts: Vec<&[u8]> = args.collect();
    if texts.is_empty() || payload.last() != Some(&0) {
        return Err(Errno::EINVAL);
    }
    env.within(Item::NodePermissions, texts.len() as u64)?;
    let mut list = texts.into_iter().map(Perm::parse).collect::<Result<Vec<_>, _>>()?;
    if !env.any {
        // Xen's daemon keeps such an entry and marks it as ignored; as nobody else sees it, it is not kept here.
        let owner = list.first().copied();
        list.retain(|p| p.domid != DOMID_ANY);
        if list.first() != owner.as_ref() {
            return Err(Errno::EINVAL);
        }
    }
    if let (false, Some(domains)) = (env.caller.privileged, env.domains) {
        // XSA-417: what is granted to a domain that does not exist is not kept for the next one of that number.
        let mut first = true;
        list.retain(|p| {
            std::mem::take(&mut first)
                || p.domid == 0
                || p.domid == DOMID_ANY
                || domains.contains_key(&p.domid)
        });
    }
    let perms = Perms::new(list).ok_or(Errno::EINVAL)?;
    let path = env.path(raw, true)?;
    let old = match view.find(&path) {
        Lookup::Node(found) => found.perms.clone(),
        Lookup::Missing { perms, .. } => return Err(missing(env, perms, WRITE | OWNER)),
    };
    if old.allowed(&env.caller) & (WRITE | OWNER) != WRITE | OWNER {
        return Err(Errno::EACCES);
    }
    if !env.caller.privileged && perms.owner() != old.owner() {
        return Err(Errno::EPERM);
    }
    view.set_perms(&path, perms);
    note(view, env, &path, Some(old), changes);
    Ok(())
}

//! Node permissions: a list of entries, the first of which names the owner and what everybody else may do.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::wire::{Errno, decimal};

/// May read.
pub const READ: u8 = 1;
/// May write.
pub const WRITE: u8 = 2;
/// Owns the node (never stored, only computed).
pub const OWNER: u8 = 4;

/// An entry for every domain (Xen's `DOMID_ANY`, xenstore.h of Xen's master).
pub const DOMID_ANY: u16 = 0x7FF5;

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Perm {
    /// Whom it concerns; in the first entry, the owner.
    pub domid: u16,
    /// [`READ`] and [`WRITE`] bits; in the first entry, everybody else's.
    pub access: u8,
}

impl Perm {
    /// Parses `r3`, `w3`, `b3`, `n3`.
    ///
    /// # Errors
    /// EINVAL.
    pub fn parse(text: &[u8]) -> Result<Self, Errno> {
        let (letter, domid) = text.split_first().ok_or(Errno::EINVAL)?;
        let access = match letter {
            b'n' => 0,
            b'r' => READ,
            b'w' => WRITE,
            b'b' => READ | WRITE,
            _ => return Err(Errno::EINVAL),
        };
        Ok(Self { domid: decimal(domid)?, access })
    }

    /// Appends the text form and its nul.
    pub fn format(self, out: &mut Vec<u8>) {
        out.push(match self.access {
            0 => b'n',
            READ => b'r',
            WRITE => b'w',
            _ => b'b',
        });
        out.extend_from_slice(self.domid.to_string().as_bytes());
        out.push(0);
    }
}

/// A node's entries; at least one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Perms(Arc<[Perm]>);

impl Perms {
    /// Takes a list of entries; `None` if it is empty.
    pub fn new(list: Vec<Perm>) -> Option<Self> {
        (!list.is_empty()).then(|| Self(list.into()))
    }

    /// Only the owner (and privileged domains) may do anything.
    pub fn private(owner: u16) -> Self {
        Self(Arc::new([Perm { domid: owner, access: 0 }]))
    }

    /// The entries.
    pub fn entries(&self) -> &[Perm] {
        &self.0
    }

    /// The owner's domid.
    pub fn owner(&self) -> u16 {
        self.0.first().map_or(0, |p| p.domid)
    }

    /// The same entries with another owner.
    pub fn owned_by(&self, owner: u16) -> Self {
        if self.owner() == owner {
            return self.clone();
        }
        let mut list = self.0.to_vec();
        list[0].domid = owner;
        Self(list.into())
    }

    /// The same entries without those for `domid`, the owner's excepted. `None` if there are none to drop.
    pub fn without(&self, domid: u16) -> Option<Self> {
        if !self.0[1..].iter().any(|p| p.domid == domid) {
            return None;
        }
        let kept = self.0.iter().enumerate().filter(|(i, p)| *i == 0 || p.domid != domid);
        Some(Self(kept.map(|(_, p)| *p).collect()))
    }

    /// What `who` may do: a mask of [`READ`], [`WRITE`], [`OWNER`].
    pub fn allowed(&self, who: &Caller) -> u8 {
        let is_me = |domid| domid == who.domid || Some(domid) == who.target || domid == DOMID_ANY;
        if who.privileged || is_me(self.owner()) {
            return READ | WRITE | OWNER;
        }
        let entry = self.0[1..].iter().find(|p| is_me(p.domid)).or(self.0.first());
        entry.map_or(0, |p| p.access)
    }
}

/// On whose behalf a request runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The domain; socket clients act as dom0.
    pub domid: u16,
    /// dom0 and socket clients: all nodes are theirs, quotas do not apply.
    pub privileged: bool,
    /// The domain that SET_TARGET lets this one act for.
    pub target: Option<u16>,
}

impl Caller {
    /// dom0.
    pub const DOM0: Self = Self { domid: 0, privileged: true, target: None };

    /// An unprivileged domain without a target.
    pub fn guest(domid: u16) -> Self {
        Self { domid, privileged: false, target: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn perms(list: &[&str]) -> Perms {
        Perms::new(list.iter().map(|s| Perm::parse(s.as_bytes()).expect("perm")).collect()).expect("entries")
    }

    #[test]
    fn who_may_what() {
        let p = perms(&["n1", "r2", "w3", "b4", "n5"]);
        let all = |d| p.allowed(&Caller::guest(d));
        assert_eq!([1, 2, 3, 4, 5, 6].map(all), [7, READ, WRITE, READ | WRITE, 0, 0]);
        assert_eq!(p.allowed(&Caller::DOM0), 7);
        assert_eq!(p.allowed(&Caller { target: Some(1), ..Caller::guest(6) }), 7);
        assert_eq!(perms(&["r1"]).allowed(&Caller::guest(9)), READ);
        // The entry that names the domain wins over the default, also when it gives less.
        assert_eq!(perms(&["b1", "n2"]).allowed(&Caller::guest(2)), 0);
    }

    #[test]
    fn text_form() {
        let mut out = Vec::new();
        for p in ["n0", "r65535", "w7", "b12"] {
            Perm::parse(p.as_bytes()).expect("perm").format(&mut out);
        }
        assert_eq!(out, b"n0\0r65535\0w7\0b12\0");
        for bad in [&b""[..], b"x1", b"r", b"r65536", b"r-1", b"r1 "] {
            assert_eq!(Perm::parse(bad), Err(Errno::EINVAL));
        }
    }

    #[test]
    fn dropping_entries() {
        let p = perms(&["n1", "r2", "b1", "w2"]);
        assert_eq!(p.without(2), Some(perms(&["n1", "b1"])));
        assert_eq!(p.without(1), Some(perms(&["n1", "r2", "w2"])));
        assert_eq!(p.without(3), None);
    }
}

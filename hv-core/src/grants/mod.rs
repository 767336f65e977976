//! Grants: who lets whom use which page, and what is mapped now.
//!
//! ```text
//!   GrantMap ──► LIVE ──process dies──► PREDECESSOR'S ──GrantClaim──► LIVE
//!                 │                        │ Served, 30 s, or the granter goes
//!                 │ GrantUnmap             ▼
//!                 └─────────────────► RELEASING ──dma-buf proved gone──► pins cleared
//!                                       │ 2 s and still there
//!                                       └──► VIOLATION: the holder is killed; pins clear once it is gone
//! ```
//! A map of a process domain's region has nothing to prove: its memory is no one else's and lives as long as it is used.

pub mod copy;
pub mod pvh;
pub mod region;
pub mod release;
pub mod udmabuf;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hv_abi::GrantMapInfo;
use nix::errno::Errno;

use crate::ports::Peer;
use pvh::Pvh;

/// The pins of a map of a PVH domain's pages. They must be given to [`release::Releaser`]; nothing else may end them.
#[derive(Debug)]
pub struct PvhPins {
    /// Whose.
    pub pvh: Arc<Pvh>,
    /// Pinned for writing.
    pub grefs: Vec<u32>,
    /// The dma-buf's inode.
    pub ino: u64,
}

/// A grant map.
#[derive(Debug)]
pub struct Map {
    /// What the mapper has mapped: a region's memfd or a dma-buf.
    pub fd: Arc<OwnedFd>,
    /// For each grant reference, its page in `fd`.
    pub pages: Vec<u32>,
    /// Length of `fd` in pages.
    pub fd_pages: u32,
    /// Whose pages.
    pub granter: Peer,
    /// The mapper's mark.
    pub tag: u64,
    /// The incarnation that made or claimed it.
    pub generation: u32,
    /// For a PVH granter.
    pub pins: Option<PvhPins>,
}

/// Most maps of one domain: each may be a descriptor of hv-core's.
const MAX_MAPS: usize = 8192;

/// A domain's maps of others' pages.
#[derive(Debug)]
pub struct Maps {
    maps: BTreeMap<u64, Map>,
    next: u32,
    /// Pages in `maps`, and those of maps that are being made.
    pages: u32,
    limit: u32,
}

impl Maps {
    /// None yet, at most `limit` pages.
    pub fn new(limit: u32) -> Self {
        Maps { maps: BTreeMap::new(), next: 1, pages: 0, limit }
    }

    /// Sets pages aside for a map that is to be made.
    ///
    /// # Errors
    /// `ENOSPC`.
    pub fn reserve(&mut self, pages: u32) -> Result<(), Errno> {
        if self.maps.len() >= MAX_MAPS {
            return Err(Errno::ENOSPC);
        }
        let sum = self.pages.checked_add(pages).filter(|&s| s <= self.limit).ok_or(Errno::ENOSPC)?;
        self.pages = sum;
        Ok(())
    }

    /// Gives pages back that were set aside.
    pub fn unreserve(&mut self, pages: u32) {
        self.pages -= pages;
    }

    /// Enters a map whose pages were set aside; its handle: the making generation above a running number.
    pub fn insert(&mut self, map: Map) -> u64 {
        loop {
            let handle = u64::from(map.generation) << 32 | u64::from(self.next);
            self.next = self.next.wrapping_add(1);
            if let std::collections::btree_map::Entry::Vacant(free) = self.maps.entry(handle) {
                free.insert(map);
                return handle;
            }
        }
    }

    /// Takes a map out.
    ///
    /// # Errors
    /// `ESTALE` there is none of that handle.
    pub fn remove(&mut self, handle: u64) -> Result<Map, Errno> {
        let map = self.maps.remove(&handle).ok_or(Errno::ESTALE)?;
        self.pages -= map.pages.len() as u32;
        Ok(map)
    }

    /// Whose pages a map is of; `None` for a region's, which stays valid without its granter.
    ///
    /// # Errors
    /// `ESTALE`.
    pub fn granter(&self, handle: u64) -> Result<Option<Peer>, Errno> {
        let map = self.maps.get(&handle).ok_or(Errno::ESTALE)?;
        Ok(map.pins.as_ref().map(|_| map.granter))
    }

    /// Makes a map the given incarnation's own.
    ///
    /// # Errors
    /// `ESTALE`.
    pub fn claim(&mut self, handle: u64, generation: u32) -> Result<&Map, Errno> {
        let map = self.maps.get_mut(&handle).ok_or(Errno::ESTALE)?;
        map.generation = generation;
        Ok(map)
    }

    /// As the ABI tells them.
    pub fn list(&self, generation: u32, after: u64) -> impl Iterator<Item = GrantMapInfo> {
        let rest = self.maps.range((Bound::Excluded(after), Bound::Unbounded));
        rest.map(move |(handle, m)| GrantMapInfo {
            handle: *handle,
            tag: m.tag,
            domid: m.granter.domid,
            mine: (m.generation == generation).into(),
            count: m.pages.len() as u32,
        })
    }

    /// Takes out all maps that fit.
    pub fn take_if(&mut self, fits: impl Fn(&Map) -> bool) -> Vec<Map> {
        let (taken, rest): (BTreeMap<_, _>, _) =
            std::mem::take(&mut self.maps).into_iter().partition(|(_, m)| fits(m));
        self.maps = rest;
        let taken: Vec<Map> = taken.into_values().collect();
        self.pages -= taken.iter().map(|m| m.pages.len() as u32).sum::<u32>();
        taken
    }

    /// True if a map of this granter is there.
    pub fn any_of(&self, granter: Peer) -> bool {
        self.maps.values().any(|m| m.granter == granter)
    }

    /// Pages mapped.
    pub fn pages(&self) -> u32 {
        self.pages
    }
}

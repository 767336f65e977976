//! Regions: what a process domain can grant. One sealed memfd for exactly one peer, with grant references of its own that are
//! never used again.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use hv_abi::{MAX_REGION_PAGES, PAGE_SIZE, RegionInfo};
use nix::errno::Errno;

use crate::ports::Peer;
use crate::sys::{self, shm::Shm};

/// First grant reference of a process domain: the reserved ones of xen-abi's GNTTAB_NR_RESERVED_ENTRIES are not used.
const FIRST_GREF: u32 = xen_abi::grant_table::GNTTAB_NR_RESERVED_ENTRIES;

/// Most regions of one domain: each is a descriptor of hv-core's.
const MAX_REGIONS: usize = 4096;

/// A region's memory; lives as long as anyone maps it.
#[derive(Debug)]
pub struct RegionMem {
    /// The memfd.
    pub fd: Arc<OwnedFd>,
    /// Pages.
    pub pages: u32,
    map: OnceLock<Shm>,
}

impl RegionMem {
    /// Mapped here, for copies.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn map(&self) -> nix::Result<&Shm> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let map = Shm::map(&self.fd, self.pages as usize * PAGE_SIZE)?;
        Ok(self.map.get_or_init(|| map))
    }
}

/// A region.
#[derive(Clone, Debug)]
pub struct Region {
    /// As the ABI tells it.
    pub info: RegionInfo,
    /// The one domain that may map it.
    pub peer: Peer,
    /// Its memory.
    pub mem: Arc<RegionMem>,
}

/// A domain's regions.
#[derive(Debug)]
pub struct Regions {
    /// By first grant reference.
    by_gref: BTreeMap<u32, Region>,
    next_region: u32,
    next_gref: u32,
    pages: u32,
    limit: u32,
}

impl Regions {
    /// None yet, at most `limit` pages in all.
    pub fn new(limit: u32) -> Self {
        Regions { by_gref: BTreeMap::new(), next_region: 1, next_gref: FIRST_GREF, pages: 0, limit }
    }

    /// Makes one.
    ///
    /// # Errors
    /// `EINVAL` page count, `ENOSPC` quota or numbers used up; else as memfd_create(2).
    pub fn create(&mut self, peer: Peer, pages: u32, tag: u64) -> Result<&Region, Errno> {
        if pages == 0 || pages > MAX_REGION_PAGES {
            return Err(Errno::EINVAL);
        }
        if self.pages + pages > self.limit || self.by_gref.len() >= MAX_REGIONS {
            return Err(Errno::ENOSPC);
        }
        let first_gref = self.next_gref;
        let after = first_gref.checked_add(pages).ok_or(Errno::ENOSPC)?;
        let next_region = self.next_region.checked_add(1).ok_or(Errno::ENOSPC)?;
        let fd = Arc::new(sys::sealed_memfd(c"region", u64::from(pages) * PAGE_SIZE as u64)?);
        let info = RegionInfo { region: self.next_region, first_gref, pages, peer: peer.domid, pad: 0, tag };
        (self.next_region, self.next_gref) = (next_region, after);
        self.pages += pages;
        let mem = Arc::new(RegionMem { fd, pages, map: OnceLock::new() });
        Ok(self.by_gref.entry(first_gref).or_insert(Region { info, peer, mem }))
    }

    /// Takes one away. Who maps it keeps its memory.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn delete(&mut self, region: u32) -> Result<Region, Errno> {
        let first = self.find(region).ok_or(Errno::ENOENT)?.info.first_gref;
        let gone = self.by_gref.remove(&first).ok_or(Errno::ENOENT)?;
        self.pages -= gone.info.pages;
        Ok(gone)
    }

    /// By number.
    pub fn find(&self, region: u32) -> Option<&Region> {
        self.by_gref.values().find(|r| r.info.region == region)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.by_gref.values()
    }

    /// The region and the page in it of a grant reference, if it is granted to `peer`.
    pub fn resolve(&self, gref: u32, peer: Peer) -> Option<(&Region, u32)> {
        let (first, region) = self.by_gref.range(..=gref).next_back()?;
        let page = gref - first;
        (page < region.info.pages && region.peer == peer).then_some((region, page))
    }

    /// Pages in all.
    pub fn pages(&self) -> u32 {
        self.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grefs_are_the_peers_alone_and_never_used_again() {
        let (peer, other, reborn) =
            (Peer { domid: 3, instance: 7 }, Peer { domid: 4, instance: 8 }, Peer { domid: 3, instance: 9 });
        let mut regions = Regions::new(10);
        let first = regions.create(peer, 2, 0).unwrap().info;
        let second = regions.create(other, 3, 0).unwrap().info;
        assert_eq!(regions.resolve(first.first_gref + 1, peer).unwrap().1, 1);
        assert!(regions.resolve(first.first_gref + 2, peer).is_none(), "the neighbour's");
        assert!(regions.resolve(first.first_gref - 1, peer).is_none());
        assert!(regions.resolve(first.first_gref, other).is_none());
        assert!(regions.resolve(first.first_gref, reborn).is_none(), "a domid used again inherits nothing");
        assert!(regions.resolve(second.first_gref + 3, other).is_none());
        assert!(regions.resolve(u32::MAX, other).is_none());
        regions.delete(first.region).unwrap();
        assert_eq!(regions.delete(first.region).unwrap_err(), Errno::ENOENT);
        let third = regions.create(peer, 7, 0).unwrap().info;
        assert!(third.first_gref >= second.first_gref + 3 && third.region > second.region);
        assert_eq!(regions.create(peer, 1, 0).unwrap_err(), Errno::ENOSPC);
        assert_eq!(regions.create(peer, 0, 0).unwrap_err(), Errno::EINVAL);
        assert_eq!(regions.create(peer, u32::MAX, 0).unwrap_err(), Errno::EINVAL);
        assert_eq!(regions.pages(), 10);
    }
}

//! The guest's pages by grants: persistent ones stay mapped, others are copied by hv-core.
//!
//! Which grants are mapped is recorded in the owner's area of the ring journal, so that the next incarnation takes the maps
//! over when it first needs each, rather than mapping all again. A record is written after the map was made; a map without a
//! record (killed in between) is given back at re-attach.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use domain_kit::grants::{CopyBatch, CopyBuffer, GrantError, MappedGrants};
use domain_kit::hypercall::{CopyEntryExt, HvResult, Hypercall};
use domain_kit::journal::Slot;
use domain_kit::ring::RingMem;
use hv_abi::CopyEntry;
use nix::errno::Errno;

use crate::disk::uring::buffer_offset;
use crate::engine::{Direction, GuestPages};
use crate::request::Prepared;
use crate::stats::Stats;

/// Most grants of one map.
const MAP_GREFS: usize = 32;
/// Most maps of one ring; what is beyond is copied. 32 requests of 11 pages need 352 pages: 11 to 352 maps.
const MAX_MAPS: usize = 384;

const RECORD: usize = 16 + 4 * MAP_GREFS;

/// Bytes that the records take in the journal's user area.
pub const RECORDS_BYTES: u32 = (MAX_MAPS * RECORD) as u32;

/// Tag of a ring's map of its persistent grants, for a device.
pub fn persistent_tag(device: u32) -> u64 {
    u64::from(device) << 8 | 2
}

/// Tag of a ring's map of its ring pages.
pub fn ring_tag(device: u32) -> u64 {
    u64::from(device) << 8 | 1
}

struct Map {
    handle: u64,
    /// `None` until this incarnation claims it.
    mapped: Option<MappedGrants>,
}

/// See the module. `J`: the journal's memory.
pub struct GrantPages<J> {
    hv: Hypercall,
    domid: u16,
    tag: u64,
    buffers: Arc<CopyBuffer>,
    persistent: bool,
    maps: Vec<Option<Map>>,
    /// Places in `maps`, and among the records.
    free: Vec<u32>,
    unclaimed: Vec<u32>,
    /// gref → (map, position in it).
    index: HashMap<u32, (u32, u32)>,
    records: J,
    records_at: usize,
    stats: Arc<Stats>,
    copies: CopyBatch,
    /// Slot of each entry of `copies`.
    owners: Vec<Slot>,
    wanted: Vec<u32>,
}

impl<J: RingMem> GrantPages<J> {
    /// Pages of `domid`, with a hypercall channel of its own. `records` at `records_at` are [`RECORDS_BYTES`] of kept memory,
    /// zero at first. With `persistent`, grants stay mapped.
    ///
    /// # Errors
    /// The hypercalls'.
    #[expect(clippy::too_many_arguments, reason = "made in one place")]
    pub fn new(
        hv: Hypercall,
        domid: u16,
        device: u32,
        buffers: Arc<CopyBuffer>,
        persistent: bool,
        records: J,
        records_at: usize,
        stats: Arc<Stats>,
    ) -> HvResult<Self> {
        let mut this = GrantPages {
            hv,
            domid,
            tag: persistent_tag(device),
            buffers,
            persistent,
            maps: (0..MAX_MAPS).map(|_| None).collect(),
            free: Vec::new(),
            unclaimed: Vec::new(),
            index: HashMap::new(),
            records,
            records_at,
            stats,
            copies: CopyBatch::default(),
            owners: Vec::new(),
            wanted: Vec::new(),
        };
        this.recover()?;
        Ok(this)
    }

    fn recover(&mut self) -> HvResult<()> {
        let known: Vec<_> = self
            .hv
            .grant_list()?
            .into_iter()
            .filter(|m| m.tag == self.tag && m.domid == self.domid)
            .collect();
        for i in (0..MAX_MAPS).rev() {
            let at = self.records_at + i * RECORD;
            let handle = self.records.load_u64(at + 8);
            let count = (self.records.load_u32(at) as usize).min(MAP_GREFS);
            if count == 0 || !known.iter().any(|m| m.handle == handle && m.count as usize == count) {
                self.records.store_u32(at, 0);
                self.free.push(i as u32);
                continue;
            }
            for n in 0..count {
                let gref = self.records.load_u32(at + 16 + 4 * n);
                self.index.insert(gref, (i as u32, n as u32));
            }
            self.maps[i] = Some(Map { handle, mapped: None });
            self.unclaimed.push(i as u32);
        }
        for map in known {
            if !self.maps.iter().flatten().any(|m| m.handle == map.handle) {
                self.hv.grant_unmap(map.handle)?;
            }
        }
        self.count();
        Ok(())
    }

    fn count(&self) {
        self.stats.mapped_pages.store(self.index.len() as u64, Relaxed);
    }

    /// Maps those of `wanted` that fit; what cannot be mapped is copied.
    fn map_wanted(&mut self) {
        let wanted = std::mem::take(&mut self.wanted);
        for grefs in wanted.chunks(MAP_GREFS) {
            let Some(slot) = self.free.pop() else { break };
            let mapped = match MappedGrants::map(&self.hv, self.domid, grefs, self.tag) {
                Ok(mapped) => mapped,
                Err(error) => {
                    self.free.push(slot);
                    if !matches!(&error, GrantError::Hypercall(e) if e.is(Errno::EACCES)) {
                        tracing::warn!(domid = self.domid, %error, "grants cannot be mapped: all further ones are copied");
                        self.persistent = false;
                        break;
                    }
                    // A read-only or bad grant among them: the copies will tell which.
                    tracing::debug!(domid = self.domid, %error, "grants not mapped");
                    continue;
                }
            };
            let at = self.records_at + slot as usize * RECORD;
            self.records.store_u64(at + 8, mapped.handle);
            for (n, &gref) in grefs.iter().enumerate() {
                self.records.store_u32(at + 16 + 4 * n, gref);
                self.index.insert(gref, (slot, n as u32));
            }
            self.records.store_u32(at, grefs.len() as u32);
            self.maps[slot as usize] = Some(Map { handle: mapped.handle, mapped: Some(mapped) });
        }
        self.wanted = wanted;
        self.wanted.clear();
        self.count();
    }

    /// The mapping that a gref lies in, claimed from the predecessor if need be.
    fn locate(&mut self, gref: u32) -> Option<(&MappedGrants, u32)> {
        let (slot, position) = *self.index.get(&gref)?;
        self.claim(slot);
        let mapped = self.maps[slot as usize].as_ref()?.mapped.as_ref()?;
        Some((mapped, position))
    }

    fn claim(&mut self, slot: u32) {
        let Some(map) = &mut self.maps[slot as usize] else { return };
        if map.mapped.is_some() {
            return;
        }
        match MappedGrants::claim(&self.hv, map.handle) {
            Ok(mapped) => map.mapped = Some(mapped),
            Err(error) => {
                tracing::warn!(domid = self.domid, handle = map.handle, %error, "a kept map is lost");
                self.maps[slot as usize] = None;
                self.records.store_u32(self.records_at + slot as usize * RECORD, 0);
                self.free.push(slot);
                self.index.retain(|_, (s, _)| *s != slot);
            }
        }
    }

    /// Claims one map that nothing has needed yet; false if there is none left. hv-core drops what is not claimed when the
    /// service says that it serves.
    pub fn claim_one(&mut self) -> bool {
        let Some(slot) = self.unclaimed.pop() else { return false };
        self.claim(slot);
        true
    }

    /// Gives all maps back.
    pub fn unmap_all(&mut self) {
        self.index.clear();
        self.unclaimed.clear();
        for (slot, map) in self.maps.iter_mut().enumerate() {
            let Some(map) = map.take() else { continue };
            self.records.store_u32(self.records_at + slot * RECORD, 0);
            let result = match map.mapped {
                Some(mapped) => mapped.unmap(&self.hv),
                None => self.hv.grant_unmap(map.handle),
            };
            if let Err(error) = result {
                tracing::warn!(domid = self.domid, %error, "grants not unmapped");
            }
        }
        self.free = (0..MAX_MAPS as u32).rev().collect();
        self.count();
    }
}

impl<J: RingMem> GuestPages for GrantPages<J> {
    fn transfer(
        &mut self,
        direction: Direction,
        slots: &[Slot],
        requests: &[Prepared],
        failed: &mut Vec<Slot>,
    ) {
        if self.persistent {
            let new = slots.iter().flat_map(|s| &requests[s.0 as usize].segments).map(|s| s.gref);
            for gref in new {
                if !self.index.contains_key(&gref) && !self.wanted.contains(&gref) {
                    self.wanted.push(gref);
                }
            }
            if !self.wanted.is_empty() {
                self.map_wanted();
            }
        }
        self.copies.clear();
        self.owners.clear();
        for &slot in slots {
            let mut at = buffer_offset(slot);
            let buffers = self.buffers.clone();
            for segment in &requests[slot.0 as usize].segments {
                let len = usize::from(segment.len);
                match self.locate(segment.gref) {
                    Some((mapped, position)) => {
                        let page = mapped.offset(position as usize) + usize::from(segment.offset);
                        match direction {
                            Direction::Fetch => buffers.mem.copy_from(at, &mapped.mem, page, len),
                            Direction::Store => mapped.mem.copy_from(page, &buffers.mem, at, len),
                        }
                    }
                    None => {
                        let make = match direction {
                            Direction::Fetch => CopyEntry::from_grant,
                            Direction::Store => CopyEntry::to_grant,
                        };
                        let (id, at) = (self.buffers.id, at as u64);
                        self.copies.entries.push(make(
                            self.domid,
                            segment.gref,
                            segment.offset,
                            segment.len,
                            id,
                            at,
                        ));
                        self.owners.push(slot);
                    }
                }
                at += len;
            }
        }
        if self.copies.entries.is_empty() {
            return;
        }
        self.stats.copy_calls.fetch_add(1, Relaxed);
        if let Err(error) = self.copies.run(&self.hv) {
            tracing::error!(domid = self.domid, %error, "grant copy");
            failed.extend(self.owners.iter());
        } else {
            failed.extend(
                self.owners.iter().zip(&self.copies.statuses).filter(|(_, s)| **s != 0).map(|(slot, _)| slot),
            );
        }
    }
}

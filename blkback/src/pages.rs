//! The guest's pages by grants: persistent ones stay mapped, others are copied by hv-core.
//!
//! Which grants are mapped is recorded in the owner's area of the ring journal, so that the next incarnation takes the maps
//! over when it first needs each, rather than mapping all again. A record is written after the map was made; a map without a
//! record (killed in between) is given back at re-attach.
//!
//! A map is of up to 32 grants that were first seen together. When there is no room for another, those that were not used for
//! a while are given back, the least recently used first; if all are in use, further grants are copied.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain_kit::grants::{CopyBatch, CopyBuffer, GrantError, MappedGrants};
use domain_kit::hypercall::{CopyEntryExt, HvResult, Hypercall};
use domain_kit::journal::Slot;
use domain_kit::ring::RingMem;
use hv_abi::CopyEntry;
use nix::errno::Errno;

use crate::disk::attachment::BUFFER_CHUNK;
use crate::engine::{ARENA_CHUNKS, Direction, GuestPages, IndirectPage};
use crate::request::{MAX_INDIRECT_BYTES, Prepared};
use crate::stats::Stats;

/// Most grants of one map.
const MAP_GREFS: usize = 32;
/// Most maps of one ring; what is beyond is copied. 32 requests of 11 pages need 352 pages: 11 to 352 maps.
const MAX_MAPS: usize = 384;
/// A map that was not used for so long makes room for another.
const STALE: Duration = Duration::from_secs(1);
/// Time between two looks for stale maps.
const LOOK: Duration = Duration::from_millis(100);
/// A map that was not used for so long is given back even if there is room (as Linux's blkback does).
const UNUSED: Duration = Duration::from_secs(60);

/// Indirect pages that are copied at once: as many as a ring has slots at most.
const SCRATCH_PAGES: usize = BUFFER_CHUNK / MAX_INDIRECT_BYTES;

const RECORD: usize = 16 + 4 * MAP_GREFS;

/// Bytes that the records take in the journal's user area.
pub const RECORDS_BYTES: u32 = (MAX_MAPS * RECORD) as u32;

/// What hv-core knows a ring's maps by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tags {
    /// The ring's own pages.
    pub ring: u64,
    /// Persistent grants.
    pub persistent: u64,
}

impl Tags {
    /// Those of queue `queue` of device `device`.
    pub fn new(device: u32, queue: u32) -> Self {
        let base = u64::from(device) << 16 | u64::from(queue & 0xff) << 8;
        Tags { ring: base | 1, persistent: base | 2 }
    }

    /// Whether a tag is of any queue of that device.
    pub fn of_device(tag: u64, device: u32) -> bool {
        tag >> 16 == u64::from(device) && matches!(tag & 0xff, 1 | 2)
    }
}

/// Grant references are small numbers that their granter chooses; who makes them collide slows down its own ring alone.
#[derive(Default)]
struct GrefHasher(u64);

impl Hasher for GrefHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u32(b.into()));
    }
    fn write_u32(&mut self, n: u32) {
        self.0 = (self.0 ^ u64::from(n)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }
}

struct Map {
    handle: u64,
    /// `None` until this incarnation claims it.
    mapped: Option<MappedGrants>,
    used: Instant,
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
    index: HashMap<u32, (u32, u32), BuildHasherDefault<GrefHasher>>,
    records: J,
    records_at: usize,
    stats: Arc<Stats>,
    copies: CopyBatch,
    /// Slot of each entry of `copies`.
    owners: Vec<Slot>,
    wanted: Vec<u32>,
    now: Instant,
    looked: Instant,
}

impl<J: RingMem> GrantPages<J> {
    /// Pages of `domid`, with a hypercall channel of its own; maps of persistent grants carry `tag`. `records` at `records_at`
    /// are [`RECORDS_BYTES`] of kept memory, zero at first. With `persistent`, grants stay mapped.
    ///
    /// # Errors
    /// The hypercalls'.
    #[expect(clippy::too_many_arguments, reason = "made in one place")]
    pub fn new(
        hv: Hypercall,
        domid: u16,
        tag: u64,
        buffers: Arc<CopyBuffer>,
        persistent: bool,
        records: J,
        records_at: usize,
        stats: Arc<Stats>,
    ) -> HvResult<Self> {
        let now = Instant::now();
        let mut this = GrantPages {
            hv,
            domid,
            tag,
            buffers,
            persistent,
            maps: (0..MAX_MAPS).map(|_| None).collect(),
            free: Vec::new(),
            unclaimed: Vec::new(),
            index: HashMap::default(),
            records,
            records_at,
            stats,
            copies: CopyBatch::default(),
            owners: Vec::new(),
            wanted: Vec::new(),
            now,
            looked: now,
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
            self.maps[i] = Some(Map { handle, mapped: None, used: self.now });
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

    /// Tells hv-core of service, on the channel of these pages.
    ///
    /// # Errors
    /// The hypercall's.
    pub fn served(&self) -> HvResult<()> {
        self.hv.served()
    }

    fn count(&self) {
        self.stats.mapped_pages.set(self.index.len() as u64);
    }

    /// Maps those of `wanted` that fit; what cannot be mapped is copied.
    fn map_wanted(&mut self) {
        let wanted = std::mem::take(&mut self.wanted);
        for grefs in wanted.chunks(MAP_GREFS) {
            if self.free.is_empty() && self.now >= self.looked + LOOK {
                self.looked = self.now;
                self.give_back(STALE, MAX_MAPS / 8);
            }
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
            self.maps[slot as usize] =
                Some(Map { handle: mapped.handle, mapped: Some(mapped), used: self.now });
        }
        self.wanted = wanted;
        self.wanted.clear();
        self.count();
    }

    /// The mapping that a gref lies in, claimed from the predecessor if need be.
    fn locate(&mut self, gref: u32) -> Option<(&MappedGrants, u32)> {
        let (slot, position) = *self.index.get(&gref)?;
        self.claim(slot);
        let map = self.maps[slot as usize].as_mut()?;
        map.used = self.now;
        Some((map.mapped.as_ref()?, position))
    }

    /// Gives back up to `most` maps that were not used for `age`, the least recently used first.
    fn give_back(&mut self, age: Duration, most: usize) {
        let mut stale: Vec<(Instant, u32)> = (0u32..)
            .zip(&self.maps)
            .filter_map(|(i, map)| map.as_ref().map(|m| (m.used, i)))
            .filter(|(used, _)| self.now.saturating_duration_since(*used) >= age)
            .collect();
        stale.sort_unstable();
        for (_, slot) in stale.into_iter().take(most) {
            self.unmap(slot);
        }
        self.count();
    }

    fn unmap(&mut self, slot: u32) {
        let Some(map) = self.maps[slot as usize].take() else { return };
        // The record goes first: a map without one is given back by the next incarnation.
        self.records.store_u32(self.records_at + slot as usize * RECORD, 0);
        let result = match map.mapped {
            Some(mapped) => mapped.unmap(&self.hv),
            None => self.hv.grant_unmap(map.handle),
        };
        if let Err(error) = result {
            tracing::warn!(domid = self.domid, %error, "grants not unmapped");
        }
        self.index.retain(|_, (s, _)| *s != slot);
        self.unclaimed.retain(|s| *s != slot);
        self.free.push(slot);
    }

    /// Maps those of the grants that are not mapped.
    fn want(&mut self, grefs: impl Iterator<Item = u32>) {
        self.now = Instant::now();
        if !self.persistent {
            return;
        }
        for gref in grefs {
            if !self.index.contains_key(&gref) && !self.wanted.contains(&gref) {
                self.wanted.push(gref);
            }
        }
        if !self.wanted.is_empty() {
            self.map_wanted();
        }
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
        for slot in 0..MAX_MAPS as u32 {
            self.unmap(slot);
        }
        self.index.clear();
        self.unclaimed.clear();
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
        self.want(slots.iter().flat_map(|s| &requests[s.0 as usize].segments).map(|s| s.gref));
        self.copies.clear();
        self.owners.clear();
        for &slot in slots {
            let mut at = requests[slot.0 as usize].buffer as usize;
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
        self.stats.copy_calls.add(1);
        if let Err(error) = self.copies.run(&self.hv) {
            tracing::error!(domid = self.domid, %error, "grant copy");
            failed.extend(self.owners.iter());
        } else {
            failed.extend(
                self.owners.iter().zip(&self.copies.statuses).filter(|(_, s)| **s != 0).map(|(slot, _)| slot),
            );
        }
    }

    fn indirect(&mut self, pages: &[IndirectPage], each: &mut dyn FnMut(Slot, Option<&[u8]>)) {
        self.want(pages.iter().map(|p| p.gref));
        self.copies.clear();
        self.owners.clear();
        let mut bytes = [0; MAX_INDIRECT_BYTES];
        let scratch = |i: usize| ARENA_CHUNKS * BUFFER_CHUNK + i % SCRATCH_PAGES * MAX_INDIRECT_BYTES;
        for (i, page) in pages.iter().enumerate() {
            let len = (page.len as usize).min(MAX_INDIRECT_BYTES);
            if let Some((mapped, position)) = self.locate(page.gref) {
                mapped.mem.copy_out(mapped.offset(position as usize), &mut bytes[..len]);
                each(page.slot, Some(&bytes[..len]));
            } else {
                let (id, at) = (self.buffers.id, scratch(i) as u64);
                let entry = CopyEntry::from_grant(self.domid, page.gref, 0, len as u16, id, at);
                self.copies.entries.push(entry);
                self.owners.push(Slot(i as u32));
            }
        }
        if self.copies.entries.is_empty() {
            return;
        }
        self.stats.copy_calls.add(1);
        let copied = self.copies.run(&self.hv);
        if let Err(error) = &copied {
            tracing::error!(domid = self.domid, %error, "grant copy");
        }
        for (n, i) in self.owners.iter().enumerate() {
            let page = &pages[i.0 as usize];
            let fine = copied.is_ok() && self.copies.statuses.get(n) == Some(&0);
            let len = (page.len as usize).min(MAX_INDIRECT_BYTES);
            if fine {
                self.buffers.mem.copy_out(scratch(i.0 as usize), &mut bytes[..len]);
            }
            each(page.slot, fine.then_some(&bytes[..len]));
        }
    }

    fn idle(&mut self) {
        self.now = Instant::now();
        self.give_back(UNUSED, MAX_MAPS);
        if let Err(error) = self.buffers.mem.release(0, self.buffers.mem.len()) {
            tracing::debug!(%error, "buffers keep their memory");
        }
    }
}

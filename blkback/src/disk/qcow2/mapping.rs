//! From guest clusters to host clusters.

use std::io::Result;

use super::header::corrupt;
use super::log::Entry;
use super::{Image, State};

/// Refcount is exactly one: may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
/// Compressed.
const COMPRESSED: u64 = 1 << 62;
/// Reads as zeroes (version 3).
pub(super) const ZERO: u64 = 1;
/// Offset of a table or cluster.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Where a guest cluster's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Not here.
    Backing,
    /// Zeroes; a cluster of the file may be set aside for it.
    Zero { host: u64, own: bool },
    /// At byte `host` of the file; `own`: nobody else refers to it.
    Data { host: u64, own: bool },
    /// `len` bytes from byte `host` of the file on, compressed.
    Compressed { host: u64, len: u64 },
}

impl Image {
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster_size() / 8
    }

    /// The raw L2 entry of a guest cluster, and whether its table is this image's alone.
    fn entry(&self, st: &mut State, guest: u64) -> Result<(u64, bool)> {
        let index = guest / self.l2_entries();
        let (table, own) = match st.log.tables.get(&index) {
            Some((_, source)) => (source << self.header.cluster_bits, true),
            None => {
                let entry = st.l1.get(index as usize).copied().unwrap_or(0);
                (entry & OFFSET, entry & COPIED != 0)
            }
        };
        if let Some(entry) = st.log.l2.get(&guest) {
            return Ok((*entry, own));
        }
        if table == 0 {
            return Ok((0, own));
        }
        if table & (self.cluster_size() - 1) != 0 {
            return Err(corrupt(format!("L1 entry {index} is damaged; run qemu-img check")));
        }
        let mut entry = st.cache.word(&*self.file, table + guest % self.l2_entries() * 8)?;
        if st.log.tables.contains_key(&index) {
            // Of a table that snapshots share: so are its clusters.
            entry &= !COPIED;
        }
        Ok((entry, own))
    }

    pub(super) fn mapping(&self, st: &mut State, guest: u64) -> Result<Mapping> {
        let (entry, own_table) = self.entry(st, guest)?;
        if entry & COMPRESSED != 0 {
            let shift = 62 - (self.header.cluster_bits - 8);
            let host = entry & ((1 << shift) - 1);
            let sectors = ((entry & !(COPIED | COMPRESSED)) >> shift) + 1;
            return Ok(Mapping::Compressed { host, len: sectors * 512 - host % 512 });
        }
        let (host, own) = (entry & OFFSET, own_table && entry & COPIED != 0);
        if host & (self.cluster_size() - 1) != 0 {
            return Err(corrupt(format!("the L2 entry of cluster {guest} is damaged; run qemu-img check")));
        }
        if own && host != 0 && self.is_fixed(st, host) {
            return Err(corrupt(format!("cluster {guest} overlaps a table; run qemu-img check")));
        }
        Ok(match (entry & ZERO != 0 && self.v3(), host) {
            (true, _) => Mapping::Zero { host, own },
            (false, 0) => Mapping::Backing,
            (false, _) => Mapping::Data { host, own },
        })
    }

    /// Header, L1 or refcount table: no data is ever there.
    fn is_fixed(&self, st: &State, host: u64) -> bool {
        let within = |start: u64, len: u64| host + self.cluster_size() > start && host < start + len;
        within(0, 1)
            || within(st.l1_offset, st.l1.len() as u64 * 8)
            || within(st.reftable_offset, st.reftable.len() as u64 * 8)
    }

    /// Makes sure that the table of a guest cluster is this image's alone. Four entries of the log at most.
    pub(super) fn own_table(&self, st: &mut State, guest: u64) -> Result<()> {
        let index = guest / self.l2_entries();
        if st.log.tables.contains_key(&index) {
            return Ok(());
        }
        let entry = st.l1.get(index as usize).copied().ok_or_else(|| corrupt("beyond the L1 table"))?;
        let old = entry & OFFSET;
        if old & (self.cluster_size() - 1) != 0 {
            return Err(corrupt(format!("L1 entry {index} is damaged; run qemu-img check")));
        }
        if old != 0 && entry & COPIED != 0 {
            return Ok(());
        }
        let cluster = self.allocate(st)?;
        let source = old >> self.header.cluster_bits;
        st.fresh = st.fresh.max((cluster + 1) << self.header.cluster_bits);
        st.log.append(Entry::Table { index, cluster, source });
        if source != 0 {
            st.log.append(Entry::Free { cluster: source });
        }
        Ok(())
    }

    /// Changes the mapping of a guest cluster, whose table is own, and lets go of what was there. `kept` is the host cluster
    /// (bytes) that the new entry goes on using.
    pub(super) fn remap(&self, st: &mut State, guest: u64, entry: u64, old: Mapping, kept: u64) {
        st.log.append(Entry::L2 { guest, entry });
        let bits = self.header.cluster_bits;
        match old {
            Mapping::Backing => {}
            Mapping::Zero { host, .. } | Mapping::Data { host, .. } => {
                if host != 0 && host != kept {
                    st.log.append(Entry::Free { cluster: host >> bits });
                }
            }
            Mapping::Compressed { host, len } => {
                for cluster in host >> bits..=(host + len - 1) >> bits {
                    st.log.append(Entry::Free { cluster });
                }
            }
        }
    }
}

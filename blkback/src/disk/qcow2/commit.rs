//! The log's changes to the medium.
//!
//! ```text
//!   data is in the file ─► 1 refcounts, new L2 tables ─► 2 flush ─► 3 L2 entries, L1 entries ─► 4 flush ─► 5 log begins anew,
//!                                                                                             then references are taken away
//! ```
//! Whatever a power failure leaves of 1, nothing refers to it. Whatever it leaves of 3, what is referred to is on the medium and
//! counted. What is referred to no longer keeps its count until 4 is over. All of it can be done again after a kill.

use std::collections::BTreeMap;
use std::io::Result;
use std::sync::PoisonError;

use super::mapping::COPIED;
use super::refcount::set;
use super::{Image, State};

impl Image {
    /// A flush: everything that was answered is on the medium.
    pub(super) fn commit(&self) -> Result<()> {
        {
            let mut st = self.state();
            if st.log.is_empty() && st.ready.is_empty() {
                drop(st);
                return self.file.flush();
            }
            self.write_tables(&mut st)?;
            if st.ready.is_empty() {
                return Ok(());
            }
        }
        let _shut = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut st = self.state();
        self.apply_frees(&mut st)
    }

    /// Steps 1 to 5, but for the references that go.
    pub(super) fn write_tables(&self, st: &mut State) -> Result<()> {
        self.write_refcounts(st)?;
        self.write_new_tables(st)?;
        self.file.flush()?;
        self.write_entries(st)?;
        self.file.flush()?;
        let freed = st.log.reset();
        st.ready.extend(freed);
        Ok(())
    }

    fn write_refcounts(&self, st: &mut State) -> Result<()> {
        let mut pieces: BTreeMap<u64, Vec<(usize, u64)>> = BTreeMap::new();
        let refs: Vec<(u64, u64)> = st.log.refs.iter().map(|(cluster, count)| (*cluster, *count)).collect();
        for (cluster, count) in refs {
            let block = self.block_of(st, cluster)?;
            if block == 0 {
                return Err(super::header::corrupt("a refcount block is gone; run qemu-img check"));
            }
            let (base, index) = self.place(st, block, cluster);
            pieces.entry(base).or_default().push((index, count));
        }
        let order = self.header.refcount_order;
        for (base, counts) in pieces {
            st.cache.update(&*self.file, base, |bytes| {
                counts.iter().for_each(|(index, count)| set(bytes, order, *index, *count));
            })?;
        }
        Ok(())
    }

    /// Nothing refers to them on the medium yet, so they are written whole and in any order.
    fn write_new_tables(&self, st: &mut State) -> Result<()> {
        let bits = self.header.cluster_bits;
        for (index, (cluster, source)) in st.log.tables.clone() {
            let mut table = vec![0; self.cluster_size() as usize];
            if source != 0 {
                self.file.read(source << bits, &mut table)?;
                // What a snapshot shares is nobody's own.
                table.chunks_exact_mut(8).for_each(|entry| entry[0] &= !((COPIED >> 56) as u8));
            }
            let first = index * self.l2_entries();
            for guest in first..first + self.l2_entries() {
                if let Some(entry) = st.log.l2.get(&guest) {
                    let at = (guest - first) as usize * 8;
                    table[at..at + 8].copy_from_slice(&entry.to_be_bytes());
                }
            }
            self.file.write(cluster << bits, &table)?;
            st.cache.forget(cluster << bits, self.cluster_size());
        }
        Ok(())
    }

    fn write_entries(&self, st: &mut State) -> Result<()> {
        let mut pieces: BTreeMap<u64, Vec<(usize, u64)>> = BTreeMap::new();
        let piece_len = st.cache.piece_len();
        for (guest, entry) in &st.log.l2 {
            let index = guest / self.l2_entries();
            if st.log.tables.contains_key(&index) {
                continue;
            }
            let table = st.l1.get(index as usize).copied().unwrap_or(0) & super::mapping::OFFSET;
            if table == 0 {
                return Err(super::header::corrupt("an L2 table is gone; run qemu-img check"));
            }
            let at = table + guest % self.l2_entries() * 8;
            pieces.entry(at - at % piece_len).or_default().push(((at % piece_len) as usize, *entry));
        }
        for (base, entries) in pieces {
            st.cache.update(&*self.file, base, |bytes| {
                for (at, entry) in &entries {
                    bytes[*at..at + 8].copy_from_slice(&entry.to_be_bytes());
                }
            })?;
        }
        for (index, (cluster, _)) in st.log.tables.clone() {
            let entry = (cluster << self.header.cluster_bits) | COPIED;
            self.file.write(st.l1_offset + index * 8, &entry.to_be_bytes())?;
            // Known at once; the log says the same until it is reset.
            st.l1[index as usize] = entry;
        }
        Ok(())
    }
}

//! Counting references: what `qemu-img check` does. Repairs the refcounts of an image that was left dirty.

use std::io::Result;

use super::header::corrupt;
use super::log::Entry;
#[cfg(test)]
use super::mapping::COPIED;
use super::mapping::OFFSET;
use super::{Image, State};

/// Most clusters that are counted: 256 MiB of memory.
const MOST: u64 = 1 << 26;

impl Image {
    /// How often each host cluster is referred to by what is on the medium.
    pub(super) fn count_references(&self, st: &mut State) -> Result<Vec<u32>> {
        let (bits, size) = (self.header.cluster_bits, self.cluster_size());
        let clusters = self.file.len().div_ceil(size);
        if clusters > MOST {
            return Err(corrupt("too large to be repaired here; run qemu-img check -r all"));
        }
        let mut counts = vec![0u32; clusters as usize];
        let mut count = |offset: u64, len: u64| -> Result<()> {
            for cluster in offset >> bits..(offset + len).div_ceil(size) {
                let entry = counts.get_mut(cluster as usize);
                *entry.ok_or_else(|| corrupt("a table refers beyond the file; run qemu-img check"))? += 1;
            }
            Ok(())
        };
        count(0, 1)?;
        count(st.reftable_offset, st.reftable.len() as u64 * 8)?;
        for block in st.reftable.iter().map(|entry| entry & !0x1ff).filter(|block| *block != 0) {
            count(block, 1)?;
        }
        let mut tables = vec![(st.l1_offset, st.l1.len() as u64)];
        let (snapshots, table_len) = self.snapshot_tables()?;
        if table_len > 0 {
            count(self.header.snapshots_offset, table_len)?;
        }
        tables.extend(snapshots);
        for (offset, entries) in tables {
            if entries > 0 {
                count(offset, entries * 8)?;
            }
            let mut l1 = vec![0; entries as usize * 8];
            self.file.read(offset, &mut l1)?;
            for entry in l1.chunks_exact(8).map(be64).map(|entry| entry & OFFSET).filter(|e| *e != 0) {
                count(entry, 1)?;
                let mut l2 = vec![0; size as usize];
                self.file.read(entry, &mut l2)?;
                for entry in l2.chunks_exact(8).map(be64) {
                    if entry & 1 << 62 != 0 {
                        let shift = 62 - (bits - 8);
                        let host = entry & ((1 << shift) - 1);
                        let sectors = ((entry & !(3 << 62)) >> shift) + 1;
                        let start = host & !511;
                        count(start, sectors * 512)?;
                    } else if entry & OFFSET != 0 {
                        count(entry & OFFSET, 1)?;
                    }
                }
            }
        }
        Ok(counts)
    }

    /// Place and entries of each snapshot's L1 table; length of the table of snapshots.
    fn snapshot_tables(&self) -> Result<(Vec<(u64, u64)>, u64)> {
        let mut out = Vec::new();
        let start = self.header.snapshots_offset;
        let mut at = start;
        for _ in 0..self.header.snapshots {
            let mut fixed = [0; 40];
            self.file.read(at, &mut fixed)?;
            let half = |at: usize| u64::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
            let word = |at: usize| half(at) << 16 | half(at + 2);
            let entries = word(8);
            if entries * 8 > 32 << 20 {
                return Err(corrupt("a snapshot's table is damaged; run qemu-img check"));
            }
            out.push((be64(&fixed[..8]), entries));
            at += (40 + word(36) + half(12) + half(14)).next_multiple_of(8);
        }
        Ok((out, at - start))
    }

    /// Sets every refcount to what is counted, for an image whose owner with lazy refcounts did not close it.
    pub(super) fn repair_refcounts(&self) -> Result<()> {
        tracing::warn!("qcow2: left dirty by its last user; counting references again");
        let counts = self.count_references(&mut self.state())?;
        for (cluster, want) in counts.into_iter().enumerate() {
            let (cluster, want) = (cluster as u64, u64::from(want));
            let full = {
                let mut st = self.state();
                if self.refcount(&mut st, cluster)? != want {
                    if self.block_of(&st, cluster)? == 0 {
                        return Err(corrupt("a refcount block is missing; run qemu-img check -r all"));
                    }
                    st.log.append(Entry::Ref { cluster, count: want });
                }
                st.log.room() < 64
            };
            if full {
                self.commit()?;
            }
        }
        self.commit()
    }

    /// What is wrong on the medium, in words, and how many references too many are counted (leaks).
    ///
    /// # Errors
    /// The file's.
    #[cfg(test)]
    pub(super) fn check(&self) -> Result<(Vec<String>, u64)> {
        let mut st = self.state();
        let st = &mut *st;
        let mut wrong = Vec::new();
        let mut leaks = 0;
        let counts = match self.count_references(st) {
            Ok(counts) => counts,
            Err(e) => return Ok((vec![e.to_string()], 0)),
        };
        for (cluster, want) in counts.iter().enumerate() {
            let have = self.refcount(st, cluster as u64)?;
            match u64::from(*want) {
                want if have < want => {
                    wrong.push(format!("cluster {cluster}: refcount {have}, {want} references"))
                }
                want => leaks += have - want,
            }
        }
        for index in 0..st.l1.len() {
            let entry = st.l1[index];
            if entry & OFFSET == 0 {
                continue;
            }
            let own = self.refcount(st, (entry & OFFSET) >> self.header.cluster_bits)? == 1;
            if own != (entry & COPIED != 0) {
                wrong.push(format!("L1 entry {index}: copied flag"));
            }
            let mut l2 = vec![0; self.cluster_size() as usize];
            self.file.read(entry & OFFSET, &mut l2)?;
            for (n, entry) in l2.chunks_exact(8).map(be64).enumerate() {
                if entry & 1 << 62 != 0 || entry & OFFSET == 0 {
                    continue;
                }
                let count = self.refcount(st, (entry & OFFSET) >> self.header.cluster_bits)?;
                if (count == 1) != (entry & COPIED != 0) {
                    wrong.push(format!("L2 entry {index}/{n}: copied flag, refcount {count}"));
                }
            }
        }
        Ok((wrong, leaks))
    }
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_be_bytes)
}

//! Refcounts and the allocation of host clusters.

use std::io;

use super::header::{corrupt, field};
use super::log::Entry;
use super::{Image, State};

/// Reads refcount number `index` of a piece of a refcount block.
pub(super) fn get(bytes: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let width = 1usize << order;
            let per_byte = 8 / width;
            let shift = (index % per_byte) * width;
            u64::from(bytes[index / per_byte] >> shift) & ((1 << width) - 1)
        }
        _ => {
            let width = 1usize << (order - 3);
            bytes[index * width..][..width].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
        }
    }
}

/// Writes it.
pub(super) fn set(bytes: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let width = 1usize << order;
            let per_byte = 8 / width;
            let shift = (index % per_byte) * width;
            let mask = (((1u16 << width) - 1) as u8) << shift;
            let byte = &mut bytes[index / per_byte];
            *byte = *byte & !mask | ((value as u8) << shift) & mask;
        }
        _ => {
            let width = 1usize << (order - 3);
            bytes[index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
    }
}

impl Image {
    /// Refcounts in a block.
    pub(super) fn per_block(&self) -> u64 {
        (self.cluster_size() * 8) >> self.header.refcount_order
    }

    /// Offset of the refcount block of a cluster; 0 if there is none.
    pub(super) fn block_of(&self, st: &State, cluster: u64) -> io::Result<u64> {
        let index = cluster / self.per_block();
        let entry = st.reftable.get(index as usize).copied().unwrap_or(0) & !0x1ff;
        if entry & (self.cluster_size() - 1) != 0 || entry >> 56 != 0 {
            return Err(corrupt("a refcount block is not where one may be; run qemu-img check"));
        }
        Ok(entry)
    }

    /// The refcount of a host cluster as it is now.
    pub(super) fn refcount(&self, st: &mut State, cluster: u64) -> io::Result<u64> {
        if let Some(count) = st.log.refs.get(&cluster) {
            return Ok(*count);
        }
        let block = self.block_of(st, cluster)?;
        if block == 0 {
            return Ok(0);
        }
        let (base, index) = self.place(st, block, cluster);
        Ok(get(st.cache.piece(&*self.file, base)?, self.header.refcount_order, index))
    }

    /// Where the refcount of a cluster is: base of the piece, index in it.
    pub(super) fn place(&self, st: &State, block: u64, cluster: u64) -> (u64, usize) {
        let per_piece = (st.cache.piece_len() * 8) >> self.header.refcount_order;
        let index = cluster % self.per_block();
        (block + index / per_piece * st.cache.piece_len(), (index % per_piece) as usize)
    }

    /// A cluster with no reference, now with one. Two entries of the log at most.
    pub(super) fn allocate(&self, st: &mut State) -> io::Result<u64> {
        loop {
            let cluster = match st.free.pop() {
                Some(cluster) => cluster,
                None => self.find_free(st)?,
            };
            if cluster >= self.max_cluster() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            if self.refcount(st, cluster)? != 0 {
                continue;
            }
            if self.block_of(st, cluster)? == 0 {
                self.add_block(st, cluster)?;
                continue;
            }
            st.cache.forget(cluster << self.header.cluster_bits, self.cluster_size());
            st.log.append(Entry::Ref { cluster, count: 1 });
            return Ok(cluster);
        }
    }

    /// The next cluster that may be free, and moves on behind it.
    fn find_free(&self, st: &mut State) -> io::Result<u64> {
        let order = self.header.refcount_order;
        loop {
            let cluster = st.next_free;
            let block = self.block_of(st, cluster)?;
            if block == 0 {
                st.next_free += 1;
                return Ok(cluster);
            }
            let (base, first) = self.place(st, block, cluster);
            let piece = st.cache.piece(&*self.file, base)?;
            let count = (piece.len() * 8) >> order;
            match (first..count).find(|index| get(piece, order, *index) == 0) {
                Some(index) => {
                    let found = cluster + (index - first) as u64;
                    st.next_free = found + 1;
                    if st.log.refs.get(&found).is_none_or(|count| *count == 0) {
                        return Ok(found);
                    }
                }
                None => st.next_free += (count - first) as u64,
            }
        }
    }

    /// Offsets have 56 bits in L2 entries.
    pub(super) fn max_cluster(&self) -> u64 {
        1 << (56 - self.header.cluster_bits)
    }

    /// Makes the refcount block that covers `cluster`, in `cluster`. On the medium when it returns: nothing refers to what it
    /// covers before.
    pub(super) fn add_block(&self, st: &mut State, cluster: u64) -> io::Result<()> {
        let index = cluster / self.per_block();
        if index as usize >= st.reftable.len() {
            return self.grow_reftable(st, index);
        }
        let offset = cluster << self.header.cluster_bits;
        let mut block = vec![0; self.cluster_size() as usize];
        set(&mut block, self.header.refcount_order, (cluster % self.per_block()) as usize, 1);
        self.file.write(offset, &block)?;
        self.file.flush()?;
        let at = st.reftable_offset + index * 8;
        self.file.write(at, &offset.to_be_bytes())?;
        self.file.flush()?;
        st.cache.forget(offset, self.cluster_size());
        st.reftable[index as usize] = offset;
        Ok(())
    }

    /// A longer refcount table, behind everything that the old one covers, with the blocks that cover it.
    fn grow_reftable(&self, st: &mut State, index: u64) -> io::Result<()> {
        let (per_block, bits) = (self.per_block(), self.header.cluster_bits);
        let per_cluster = self.cluster_size() / 8;
        let old = st.reftable.len() as u64;
        let wanted = (index + 1).max(old + old / 2);
        let first = old * per_block;
        // The blocks that cover the table and themselves.
        let mut blocks = 1;
        let clusters = loop {
            let clusters = (wanted.max(old + blocks)).div_ceil(per_cluster);
            if (clusters + blocks).div_ceil(per_block) <= blocks {
                break clusters;
            }
            blocks += 1;
        };
        if clusters > self.header.reftable_max() || first + clusters + blocks >= self.max_cluster() {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "qcow2: no more refcounts with clusters of this size",
            ));
        }
        let mut table = st.reftable.clone();
        table.resize((clusters * per_cluster) as usize, 0);
        let mut contents = vec![0; ((blocks + clusters) << bits) as usize];
        for block in 0..blocks {
            table[(old + block) as usize] = (first + block) << bits;
        }
        for used in 0..blocks + clusters {
            let block = &mut contents[((used / per_block) << bits) as usize..][..1 << bits];
            set(block, self.header.refcount_order, (used % per_block) as usize, 1);
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        contents[(blocks << bits) as usize..].copy_from_slice(&bytes);
        self.file.write(first << bits, &contents)?;
        self.file.flush()?;
        let offset = (first + blocks) << bits;
        let mut pointer = offset.to_be_bytes().to_vec();
        pointer.extend((clusters as u32).to_be_bytes());
        self.file.write(field::REFTABLE, &pointer)?;
        self.file.flush()?;
        st.cache.forget(first << bits, (blocks + clusters) << bits);
        let old_first = st.reftable_offset >> bits;
        st.reftable = table;
        st.reftable_offset = offset;
        // Not by the log, which may have no room: a kill before the next commit leaks them.
        st.ready.extend((old_first..).take((old / per_cluster) as usize));
        Ok(())
    }

    /// Takes one reference from each cluster that is ready for it. Nothing of the guest's is under way (the gate is shut).
    pub(super) fn apply_frees(&self, st: &mut State) -> io::Result<()> {
        while let Some(cluster) = st.ready.pop() {
            if st.log.room() < 64 {
                st.ready.push(cluster);
                return Ok(());
            }
            match self.refcount(st, cluster)? {
                0 => {
                    tracing::warn!(cluster, "qcow2: freed although nothing refers to it; run qemu-img check")
                }
                1 => {
                    st.log.append(Entry::Ref { cluster, count: 0 });
                    let (offset, len) = (cluster << self.header.cluster_bits, self.cluster_size());
                    st.cache.forget(offset, len);
                    self.file.discard(offset, len)?;
                    if st.free.len() < 4096 {
                        st.free.push(cluster);
                    } else {
                        st.next_free = st.next_free.min(cluster);
                    }
                }
                count => st.log.append(Entry::Ref { cluster, count: count - 1 }),
            }
        }
        Ok(())
    }
}

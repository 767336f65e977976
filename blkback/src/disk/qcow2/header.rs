//! The qcow2 header (QEMU's `docs/interop/qcow2.rst`, "Header"): parsed, checked, made.

use std::io;

use crate::disk::layer::Layer;

/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header.
const V2_LEN: usize = 72;
/// Bytes of the version 3 header that is written here.
const V3_LEN: usize = 112;
/// Largest L1 table, bytes: as QEMU's.
const MAX_L1: u64 = 32 << 20;
/// Largest refcount table, bytes: as QEMU's.
const MAX_REFTABLE: u64 = 8 << 20;
/// Most snapshots: as QEMU's.
const MAX_SNAPSHOTS: u32 = 65536;

/// Byte offsets of the fields that are written while an image is in use.
pub mod field {
    /// u64.
    pub const SIZE: u64 = 24;
    /// u32, then the u64 of the L1 table's offset: one write.
    pub const L1_SIZE: u64 = 36;
    /// u64, then the u32 of its clusters: one write.
    pub const REFTABLE: u64 = 48;
    /// u64.
    pub const INCOMPATIBLE: u64 = 72;
    /// u64.
    pub const AUTOCLEAR: u64 = 88;
}

/// Incompatible feature bits.
pub mod incompatible {
    /// Refcounts may be wrong (lazy refcounts, not closed).
    pub const DIRTY: u64 = 1;
    /// Found to be damaged.
    pub const CORRUPT: u64 = 2;
    /// Data in another file.
    pub const DATA_FILE: u64 = 4;
    /// Compressed otherwise than by deflate.
    pub const COMPRESSION: u64 = 8;
    /// Extended L2 entries.
    pub const EXTENDED_L2: u64 = 16;
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Deflate,
    /// Zstandard.
    Zstd,
}

/// A checked header. Offsets are aligned to clusters, tables are of sizes that QEMU allows.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// 9 to 21.
    pub cluster_bits: u32,
    /// Virtual size, bytes.
    pub size: u64,
    /// Entries.
    pub l1_size: u32,
    /// Bytes.
    pub l1_offset: u64,
    /// Bytes.
    pub reftable_offset: u64,
    /// Clusters.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Of their table, bytes.
    pub snapshots_offset: u64,
    /// Features.
    pub incompatible: u64,
    /// Features.
    pub autoclear: u64,
    /// Width of a refcount is 1 << this bits.
    pub refcount_order: u32,
    /// See there.
    pub compression: Compression,
    /// The backing file's name as it stands in the image. Compared with the approved one, never opened.
    pub backing: Option<String>,
}

/// An error about an image's contents: one line.
pub fn corrupt(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("qcow2: {what}"))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Header {
    /// Reads and checks.
    ///
    /// # Errors
    /// `InvalidData` with one line; the file's.
    pub fn read(file: &dyn Layer) -> io::Result<Header> {
        let mut start = [0; V3_LEN];
        file.read(0, &mut start)?;
        if be32(&start, 0) != MAGIC {
            return Err(corrupt("this is no qcow2 image; correct format in the configuration"));
        }
        let bits = be32(&start, 20);
        if !(9..=21).contains(&bits) {
            return Err(corrupt(format!("clusters of 2^{bits} bytes are not allowed (9 to 21)")));
        }
        let mut cluster = vec![0; (1 << bits).max(V3_LEN)];
        file.read(0, &mut cluster)?;
        Self::parse(&cluster)
    }

    /// Checks the first cluster.
    ///
    /// # Errors
    /// `InvalidData` with one line.
    pub fn parse(bytes: &[u8]) -> io::Result<Header> {
        let version = be32(bytes, 4);
        if be32(bytes, 0) != MAGIC || !(2..=3).contains(&version) {
            return Err(corrupt(format!("version {version} is not known (2 and 3 are)")));
        }
        let cluster_bits = be32(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(corrupt(format!("clusters of 2^{cluster_bits} bytes are not allowed (9 to 21)")));
        }
        if be32(bytes, 32) != 0 {
            return Err(corrupt(
                "encrypted by qcow2's own means, which is not supported; use format luks+qcow2, or convert it",
            ));
        }
        let v3 = version == 3;
        let word = |at| if v3 { be64(bytes, at) } else { 0 };
        let header_len = if v3 { be32(bytes, 100) as usize } else { V2_LEN };
        let compression_byte = if v3 && header_len > 104 { bytes.get(104).copied().unwrap_or(0) } else { 0 };
        let mut header = Header {
            version,
            cluster_bits,
            size: be64(bytes, 24),
            l1_size: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            reftable_offset: be64(bytes, 48),
            reftable_clusters: be32(bytes, 56),
            snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible: word(72),
            autoclear: word(88),
            refcount_order: if v3 { be32(bytes, 96) } else { 4 },
            compression: Compression::Deflate,
            backing: None,
        };
        header.check_features(compression_byte)?;
        header.check_places(header_len)?;
        let (at, len) = (be64(bytes, 8), be32(bytes, 16) as usize);
        if at != 0 {
            let name = usize::try_from(at)
                .ok()
                .filter(|_| len <= 1023)
                .and_then(|at| bytes.get(at..at.checked_add(len)?))
                .and_then(|name| std::str::from_utf8(name).ok())
                .ok_or_else(|| corrupt("the backing file's name is damaged"))?;
            header.backing = Some(name.to_owned());
        }
        Ok(header)
    }

    fn check_features(&mut self, compression: u8) -> io::Result<()> {
        let bits = self.incompatible;
        if bits & incompatible::CORRUPT != 0 {
            return Err(corrupt("marked as damaged; run qemu-img check -r all"));
        }
        if bits & incompatible::DATA_FILE != 0 {
            return Err(corrupt("its data is in another file, which is not supported; convert it"));
        }
        if bits & incompatible::EXTENDED_L2 != 0 {
            return Err(corrupt(
                "extended L2 entries (subclusters) are not supported; convert it with -o extended_l2=off",
            ));
        }
        if bits & !(incompatible::DIRTY | incompatible::COMPRESSION) != 0 {
            return Err(corrupt(format!("it uses features that are not known ({bits:#x})")));
        }
        self.compression = match (bits & incompatible::COMPRESSION != 0, compression) {
            (_, 0) => Compression::Deflate,
            (true, 1) => Compression::Zstd,
            (_, other) => return Err(corrupt(format!("compression type {other} is not known"))),
        };
        if self.refcount_order > 6 {
            return Err(corrupt(format!("refcounts of 2^{} bits are not allowed", self.refcount_order)));
        }
        Ok(())
    }

    fn check_places(&self, header_len: usize) -> io::Result<()> {
        let mask = self.cluster_size() - 1;
        if self.version == 3 && !(104..=self.cluster_size() as usize).contains(&header_len) {
            return Err(corrupt(format!("its header of {header_len} bytes is damaged")));
        }
        if self.l1_offset & mask != 0 || self.reftable_offset & mask != 0 || self.snapshots_offset & 7 != 0 {
            return Err(corrupt("a table does not begin where it may; run qemu-img check"));
        }
        let reftable = u64::from(self.reftable_clusters) << self.cluster_bits;
        if self.reftable_offset == 0 || reftable == 0 || reftable > MAX_REFTABLE {
            return Err(corrupt("its refcount table is missing or too large"));
        }
        if u64::from(self.l1_size) * 8 > MAX_L1 || self.snapshots > MAX_SNAPSHOTS {
            return Err(corrupt("a table is larger than is allowed"));
        }
        if self.size > i64::MAX as u64 || u64::from(self.l1_size) < self.l1_needed(self.size)? {
            return Err(corrupt("its L1 table is too short for its size; run qemu-img check"));
        }
        if self.l1_size > 0 && self.l1_offset == 0 {
            return Err(corrupt("its L1 table is missing"));
        }
        // Offsets have 56 bits.
        if (self.l1_offset | self.reftable_offset | self.snapshots_offset) >> 56 != 0 {
            return Err(corrupt("a table lies beyond what is addressable"));
        }
        Ok(())
    }

    /// Bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// L1 entries that `size` bytes need.
    ///
    /// # Errors
    /// More than there may be.
    pub fn l1_needed(&self, size: u64) -> io::Result<u64> {
        let per_entry = self.cluster_size() * (self.cluster_size() / 8);
        let needed = size.div_ceil(per_entry);
        if needed * 8 > MAX_L1 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("qcow2: {size} bytes are too much for clusters of {} bytes", self.cluster_size()),
            ));
        }
        Ok(needed)
    }

    /// Most clusters of a refcount table.
    pub fn reftable_max(&self) -> u64 {
        (MAX_REFTABLE >> self.cluster_bits).max(1)
    }
}

/// What a new image is like.
#[derive(Clone, Debug)]
pub struct NewImage<'a> {
    /// Virtual size, bytes.
    pub size: u64,
    /// 9 to 21; 16 is usual.
    pub cluster_bits: u32,
    /// The backing file's name and format, for other programs.
    pub backing: Option<(&'a str, &'a str)>,
}

/// Writes an empty version 3 image. The file's old contents do not matter.
///
/// # Errors
/// `InvalidInput`; the file's.
pub fn create(file: &dyn Layer, new: &NewImage<'_>) -> io::Result<()> {
    let bits = new.cluster_bits;
    let cluster = 1u64 << bits;
    let per_entry = cluster * (cluster / 8);
    let l1_size = new.size.div_ceil(per_entry).max(1);
    let l1_clusters = (l1_size * 8).div_ceil(cluster);
    // Cluster 0 header, 1 refcount table, 2 first refcount block, 3… L1 table.
    let used = 3 + l1_clusters;
    if l1_size * 8 > MAX_L1 || used > cluster / 2 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "qcow2: too large for its clusters"));
    }
    let mut bytes = vec![0u8; (used << bits) as usize];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &MAGIC.to_be_bytes());
    put(4, &3u32.to_be_bytes());
    put(20, &bits.to_be_bytes());
    put(24, &new.size.to_be_bytes());
    put(36, &(l1_size as u32).to_be_bytes());
    put(40, &(3 * cluster).to_be_bytes());
    put(48, &cluster.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &(V3_LEN as u32).to_be_bytes());
    let mut at = V3_LEN;
    if let Some((name, format)) = new.backing {
        if name.len() > 1023 || format.len() > 64 || V3_LEN + 96 + name.len() > cluster as usize {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "qcow2: the backing file's name is too long",
            ));
        }
        // Header extension 0xe2792aca: the backing file's format.
        put(at, &0xe279_2acau32.to_be_bytes());
        put(at + 4, &(format.len() as u32).to_be_bytes());
        put(at + 8, format.as_bytes());
        at += 8 + format.len().next_multiple_of(8);
        // Then the end of the extensions, 8 zero bytes.
        put(8, &((at + 8) as u64).to_be_bytes());
        put(16, &(name.len() as u32).to_be_bytes());
        put(at + 8, name.as_bytes());
    }
    put(cluster as usize, &(2 * cluster).to_be_bytes());
    for index in 0..used as usize {
        put(2 * cluster as usize + 2 * index, &1u16.to_be_bytes());
    }
    // What holds it together before the magic that makes it an image.
    file.write(cluster, &bytes[cluster as usize..])?;
    file.flush()?;
    file.write(0, &bytes[..cluster as usize])?;
    file.flush()
}

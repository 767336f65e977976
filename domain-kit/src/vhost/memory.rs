//! The guest's memory.

use std::fs::File;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::log::DirtyLog;
use crate::mem::SharedMem;

/// Most regions of a table (the vhost-user specification's 8 without memory slots).
pub const MAX_REGIONS: usize = 8;
/// Longest mapping, bytes.
const MAX_BYTES: u64 = 1 << 42;

/// A region as the frontend describes it.
#[derive(Clone, Copy, Debug)]
pub struct RegionInfo {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// The frontend's own address of it: ring addresses are such.
    pub user: u64,
    /// Where it starts in the file.
    pub offset: u64,
}

#[derive(Debug)]
struct Region {
    info: RegionInfo,
    mem: Arc<SharedMem>,
}

/// A piece of it.
#[derive(Clone, Debug)]
pub struct Place {
    /// The mapping.
    pub mem: Arc<SharedMem>,
    /// First byte in it.
    pub offset: usize,
    /// Its guest-physical address.
    pub gpa: u64,
}

impl Place {
    /// So many bytes further.
    #[must_use]
    pub fn skip(mut self, bytes: usize) -> Place {
        self.offset += bytes;
        self.gpa += bytes as u64;
        self
    }
}

/// What the frontend shared with us.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
    log: Arc<DirtyLog>,
}

impl GuestMemory {
    /// Maps a table's regions.
    ///
    /// # Errors
    /// One line: a region that is empty, overlaps, is longer than its file, or whose file can be made shorter (then touching it would
    /// end this process).
    pub fn map(table: &[(RegionInfo, File)]) -> Result<GuestMemory, String> {
        if table.is_empty() || table.len() > MAX_REGIONS {
            return Err(format!("{} memory regions; 1 to {MAX_REGIONS} are possible", table.len()));
        }
        let mut regions: Vec<Region> = Vec::new();
        for (info, file) in table {
            let end = info.offset.checked_add(info.len).filter(|end| *end <= MAX_BYTES);
            let end = end.filter(|_| info.len > 0).ok_or("a memory region is empty or too long")?;
            if info.gpa.checked_add(info.len).is_none() || info.user.checked_add(info.len).is_none() {
                return Err("a memory region's addresses overflow".into());
            }
            let overlaps =
                |a: u64, b: u64, len: u64| a < b.saturating_add(len) && b < a.saturating_add(info.len);
            if regions.iter().any(|r| {
                overlaps(info.gpa, r.info.gpa, r.info.len) || overlaps(info.user, r.info.user, r.info.len)
            }) {
                return Err("memory regions overlap".into());
            }
            must_not_shrink(file)?;
            let there = file.metadata().map_err(|e| format!("guest memory: {e}"))?.len();
            if end > there {
                return Err(format!("a memory region ends at {end}, its file at {there}"));
            }
            let mem = SharedMem::map(file, end as usize).map_err(|e| format!("mapping guest memory: {e}"))?;
            regions.push(Region { info: *info, mem: Arc::new(mem) });
        }
        Ok(GuestMemory { regions, log: Arc::default() })
    }

    /// The same, whose writers note their writes there.
    #[must_use]
    pub fn with_log(mut self, log: Arc<DirtyLog>) -> GuestMemory {
        self.log = log;
        self
    }

    /// Where writes are noted.
    pub fn log(&self) -> &DirtyLog {
        &self.log
    }

    fn find(&self, at: u64, len: u64, start: impl Fn(&RegionInfo) -> u64) -> Option<Place> {
        let region = self.regions.iter().find(|r| {
            at.checked_sub(start(&r.info))
                .and_then(|into| into.checked_add(len))
                .is_some_and(|end| end <= r.info.len)
        })?;
        let into = at - start(&region.info);
        let offset = (region.info.offset + into) as usize;
        Some(Place { mem: region.mem.clone(), offset, gpa: region.info.gpa + into })
    }

    /// `len` bytes at a guest-physical address, inside one region.
    pub fn at_gpa(&self, gpa: u64, len: u64) -> Option<Place> {
        self.find(gpa, len, |info| info.gpa)
    }

    /// `len` bytes at an address of the frontend's.
    pub fn at_user(&self, user: u64, len: u64) -> Option<Place> {
        self.find(user, len, |info| info.user)
    }
}

/// A file whose end can move under a mapping would end this process.
///
/// # Errors
/// One line.
pub fn must_not_shrink(file: &File) -> Result<(), String> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    match seals {
        Ok(seals) if seals.contains(SealFlag::F_SEAL_SHRINK) => Ok(()),
        _ => Err("shared memory is not a memfd sealed against shrinking; give the guest memory-backend-memfd,share=on,seal=on".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::sealed_memfd;

    fn file(len: usize) -> File {
        sealed_memfd("guest", len).unwrap().into()
    }

    fn info(gpa: u64, len: u64, user: u64, offset: u64) -> RegionInfo {
        RegionInfo { gpa, len, user, offset }
    }

    #[test]
    fn addresses_are_found_inside_one_region() {
        let table =
            [(info(0, 8192, 1 << 40, 0), file(16384)), (info(1 << 20, 8192, 1 << 41, 8192), file(16384))];
        let memory = GuestMemory::map(&table).unwrap();
        assert_eq!(memory.at_gpa((1 << 20) + 5, 100).unwrap().offset, 8192 + 5);
        let last = memory.at_user((1 << 41) + 8190, 1).unwrap().skip(1);
        assert_eq!((last.offset, last.gpa), (16383, (1 << 20) + 8191));
        for (gpa, len) in [(8190, 3), (8192, 1), ((1 << 20) - 1, 2), (u64::MAX, 2), (5, u64::MAX)] {
            assert!(memory.at_gpa(gpa, len).is_none(), "{gpa} {len}");
        }
        assert!(memory.at_user(0, 1).is_none());
    }

    #[test]
    fn tables_that_lie_are_refused() {
        let refused = |table: &[(RegionInfo, File)]| GuestMemory::map(table).unwrap_err();
        assert!(refused(&[]).contains("regions"));
        assert!(refused(&[(info(0, 0, 0, 0), file(4096))]).contains("empty"));
        assert!(refused(&[(info(0, u64::MAX, 0, 2), file(4096))]).contains("too long"));
        assert!(refused(&[(info(u64::MAX, 2, 0, 0), file(4096))]).contains("overflow"));
        assert!(refused(&[(info(0, 4096, 0, 4096), file(4096))]).contains("its file at"));
        let twice = [(info(0, 4096, 0, 0), file(4096)), (info(4095, 4096, 1 << 30, 0), file(4096))];
        assert!(refused(&twice).contains("overlap"));
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(4096).unwrap();
        assert!(refused(&[(info(0, 4096, 0, 0), plain)]).contains("sealed"));
    }
}

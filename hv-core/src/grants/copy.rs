//! Grant copy: batches of pieces between granted pages and the caller's own buffers. Everything is resolved under the table's
//! lock; bytes move outside of it, with the pages pinned.

use std::collections::HashMap;
use std::sync::Arc;

use hv_abi::{COPY_TO_GRANT, CopyEntry, PAGE_SIZE};
use xen_abi::grant_table::*;

use super::pvh::Pvh;
use super::region::RegionMem;
use crate::sys::shm::Shm;

/// Where a granted page is.
#[derive(Clone, Debug)]
pub enum Source {
    /// A process domain's region, and the page in it.
    Region(Arc<RegionMem>, u32),
    /// A PVH domain; its table decides.
    Pvh(Arc<Pvh>),
}

/// A piece that is allowed as far as the tables know, or the status that it gets.
pub type Resolved = Result<(Source, Arc<Shm>), i16>;

/// Checks what does not need any table: flags and the range in the page.
///
/// # Errors
/// A negative GNTST_*.
pub fn check(entry: &CopyEntry) -> Result<(), i16> {
    if entry.flags & !COPY_TO_GRANT != 0 {
        return Err(GNTST_GENERAL_ERROR);
    }
    if usize::from(entry.offset) + usize::from(entry.len) > PAGE_SIZE {
        return Err(GNTST_BAD_COPY_ARG);
    }
    Ok(())
}

/// Carries out one piece; its status.
pub fn one(entry: &CopyEntry, resolved: &Resolved, caller: u16) -> i16 {
    let (source, buffer) = match resolved {
        Ok(found) => found,
        Err(status) => return *status,
    };
    let write = entry.flags & COPY_TO_GRANT != 0;
    let (len, offset) = (usize::from(entry.len), u64::from(entry.offset));
    let copy = |map: &Shm, page: u64| {
        let done = if write {
            map.copy_from(page + offset, buffer, entry.buffer_offset, len)
        } else {
            buffer.copy_from(entry.buffer_offset, map, page + offset, len)
        };
        if done.is_some() { GNTST_OKAY } else { GNTST_BAD_COPY_ARG }
    };
    match source {
        Source::Region(mem, page) => match mem.map() {
            Ok(map) => copy(map, u64::from(*page) * PAGE_SIZE as u64),
            Err(_) => GNTST_GENERAL_ERROR,
        },
        Source::Pvh(pvh) => {
            let page = match pvh.pin(entry.gref, caller, write) {
                Ok(page) => page,
                Err(status) => return status,
            };
            let status = match pvh.ram_map() {
                Ok(map) => copy(map, page),
                Err(_) => GNTST_GENERAL_ERROR,
            };
            pvh.unpin(entry.gref, write);
            status
        }
    }
}

/// A domain's buffers for grant copies; they die with the incarnation.
#[derive(Debug, Default)]
pub struct Buffers {
    by_id: HashMap<u32, Arc<Shm>>,
    next: u32,
    bytes: u64,
}

/// Largest single buffer (hv-abi, BufferReq::len).
pub const MAX_BUFFER_LEN: u64 = 64 << 20;

impl Buffers {
    /// Adds a mapped buffer; gives it back if the quota (so many, so many bytes of all) is used up.
    pub fn add(&mut self, map: Arc<Shm>, most: u32, most_bytes: u64) -> Result<u32, Arc<Shm>> {
        let len = map.len() as u64;
        let Some(next) = self.next.checked_add(1) else { return Err(map) };
        if self.by_id.len() >= most as usize || self.bytes.saturating_add(len) > most_bytes {
            return Err(map);
        }
        self.next = next;
        self.bytes += len;
        self.by_id.insert(next, map);
        Ok(next)
    }

    /// Looks one up.
    pub fn get(&self, id: u32) -> Option<&Arc<Shm>> {
        self.by_id.get(&id)
    }

    /// Takes one out.
    pub fn remove(&mut self, id: u32) -> Option<Arc<Shm>> {
        let map = self.by_id.remove(&id)?;
        self.bytes -= map.len() as u64;
        Some(map)
    }

    /// Takes all out, for an incarnation that ends.
    pub fn take(&mut self) -> Vec<Arc<Shm>> {
        std::mem::take(self).by_id.into_values().collect()
    }
}

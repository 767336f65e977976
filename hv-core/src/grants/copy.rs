//! Grant copy: batches of pieces between granted pages and the caller's own buffers, or from granted page to granted page.
//! Everything is resolved under the table's lock; bytes move outside of it, with the pages pinned.

use std::collections::HashMap;
use std::sync::Arc;

use hv_abi::{COPY_TO_GRANT, COPY_TO_OTHER_GRANT, CopyEntry, PAGE_SIZE};
use xen_abi::grant_table::*;

use super::pvh::Pvh;
use super::region::RegionMem;
use crate::sys::shm::Shm;

/// Memory that a batch uses, and keeps from going meanwhile.
#[derive(Clone, Debug)]
pub enum Held {
    /// A process domain's region.
    Region(Arc<RegionMem>),
    /// A PVH domain.
    Pvh(Arc<Pvh>),
    /// A buffer of the caller's.
    Buffer(Arc<Shm>),
}

impl Held {
    fn is(&self, other: &Held) -> bool {
        match (self, other) {
            (Held::Region(a), Held::Region(b)) => Arc::ptr_eq(a, b),
            (Held::Pvh(a), Held::Pvh(b)) => Arc::ptr_eq(a, b),
            (Held::Buffer(a), Held::Buffer(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Where one end of a piece is in its memory.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// At this byte.
    Byte(u64),
    /// A PVH domain's page: its table decides. Grant reference, and first byte in the page.
    Granted(u32, u16),
}

/// One end of a piece.
#[derive(Clone, Copy, Debug)]
pub struct End {
    held: usize,
    place: Place,
}

/// A piece that is allowed as far as the tables know.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Where its bytes are.
    pub from: End,
    /// Where they go.
    pub to: End,
    /// How many.
    pub len: u16,
}

/// Checks what does not need any table: flags and the ranges in pages.
///
/// # Errors
/// A negative GNTST_*.
pub fn check(entry: &CopyEntry) -> Result<(), i16> {
    if ![0, COPY_TO_GRANT, COPY_TO_OTHER_GRANT].contains(&entry.flags) {
        return Err(GNTST_GENERAL_ERROR);
    }
    let fits = |offset: u16| usize::from(offset) + usize::from(entry.len) <= PAGE_SIZE;
    let other = entry.flags == COPY_TO_OTHER_GRANT;
    if !fits(entry.offset) || (other && !entry.other().is_some_and(|(_, _, offset)| fits(offset))) {
        return Err(GNTST_BAD_COPY_ARG);
    }
    Ok(())
}

/// Pieces with the memory that they use.
#[derive(Debug, Default)]
pub struct Batch {
    held: Vec<Held>,
    pieces: Vec<Result<Piece, i16>>,
}

impl Batch {
    /// One for so many pieces.
    pub fn new(pieces: usize) -> Batch {
        Batch { held: Vec::new(), pieces: Vec::with_capacity(pieces) }
    }

    /// An end of a piece. What is next to each other is mostly in the same memory.
    pub fn end(&mut self, held: Held, place: Place) -> End {
        let at = self.held.iter().rposition(|h| h.is(&held)).unwrap_or_else(|| {
            self.held.push(held);
            self.held.len() - 1
        });
        End { held: at, place }
    }

    /// The next piece, or the status that it gets.
    pub fn push(&mut self, piece: Result<Piece, i16>) {
        self.pieces.push(piece);
    }

    /// Carries all out in order; their statuses.
    pub fn run(&self, caller: u16) -> Vec<i16> {
        let done = |piece: &Result<Piece, i16>| match piece {
            Ok(piece) => self.one(piece, caller).err().unwrap_or(GNTST_OKAY),
            Err(status) => *status,
        };
        self.pieces.iter().map(done).collect()
    }

    fn one(&self, piece: &Piece, caller: u16) -> Result<(), i16> {
        let from = self.open(piece.from, caller, false)?;
        let to = self.open(piece.to, caller, true)?;
        to.map.copy_from(to.at, from.map, from.at, usize::from(piece.len)).ok_or(GNTST_BAD_COPY_ARG)
    }

    /// Pins a PVH domain's page for as long as what is returned.
    fn open(&self, end: End, caller: u16, write: bool) -> Result<Opened<'_>, i16> {
        let at = match end.place {
            Place::Byte(at) => at,
            Place::Granted(..) => 0,
        };
        let mapped = |map| Ok(Opened { map, at, pin: None });
        match (&self.held[end.held], end.place) {
            (Held::Buffer(map), _) => mapped(map),
            (Held::Region(mem), _) => mapped(mem.map().map_err(|_| GNTST_GENERAL_ERROR)?),
            (Held::Pvh(pvh), Place::Granted(gref, offset)) => {
                let map = pvh.ram_map().map_err(|_| GNTST_GENERAL_ERROR)?;
                let page = pvh.pin(gref, caller, write)?;
                Ok(Opened { map, at: page + u64::from(offset), pin: Some((pvh, gref, write)) })
            }
            // Its memory is reached by its table alone.
            (Held::Pvh(_), Place::Byte(_)) => Err(GNTST_GENERAL_ERROR),
        }
    }
}

/// An end whose bytes can be moved.
struct Opened<'a> {
    map: &'a Shm,
    at: u64,
    pin: Option<(&'a Pvh, u32, bool)>,
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        if let Some((pvh, gref, write)) = self.pin {
            pvh.unpin(gref, write);
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

//! The arena: memory for what is large (nodes, watches), changed in place and yet safe from kills.
//!
//! Between two snapshots a page is copied to the undo pages before its first change. After a kill those pages are put
//! back, which gives the arena as it was at the snapshot, and the log's events are run again. Hence a snapshot costs
//! what changed since the last one, whatever the tree's size, and starting again costs no loading. The snapshot
//! carries a checksum of each page that changed; all are verified at the start.
//!
//! Space comes from one end (`bump`) and from free lists, one for each size class, whose heads are in the first page.
//! Addresses are in units of 8 bytes; 0 is none.
#![forbid(unsafe_code)]

use std::os::fd::AsFd as _;
use std::rc::Rc;

use nix::fcntl::{FallocateFlags, fallocate};

use super::JournalError;
use super::layout::{PAGE, Parts, sb};
use super::log::Full;
use super::mem::{Mem, Owned};

/// An address in the arena, in [`UNIT`]s.
pub type Unit = u32;
/// Bytes of a unit.
pub const UNIT: usize = 8;
/// The first unit that is given out.
pub const FIRST: Unit = (HEADER / UNIT) as Unit;

/// Bytes of the header.
const HEADER: usize = 4096;
const BUMP: usize = 0;
const FREE: usize = 64;
/// Free words of the header, for those who keep things in the arena.
const ROOTS: usize = 2048;
/// Sizes up to this many units have a class each, longer ones four to each power of two.
const EXACT: u32 = 16;
/// Space is taken from the file system in steps of this many bytes.
const CHUNK: u64 = 256 << 10;
/// Undo pages that are kept for the next round (bytes).
const KEEP: u64 = 1 << 20;

/// See the module's description.
pub struct Arena {
    back: Backing,
}

enum Backing {
    /// Ordinary memory: a store without a journal.
    Heap(Vec<u8>),
    Shared(Box<Shared>),
}

struct Shared {
    own: Owned,
    mem: Rc<Mem>,
    parts: Parts,
    epoch: u64,
    /// Pages that the active snapshot knows: only they can be asked for again.
    known: u32,
    /// Which pages changed since, as bits and in order.
    dirty: Vec<u64>,
    changed: Vec<u32>,
    undo: u32,
    /// Bytes that the file system has given.
    allocated: u64,
    undo_allocated: u64,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arena({} bytes)", self.used())
    }
}

/// The class of a size in units, and the units that all of that class have.
fn class(units: u32) -> (usize, u32) {
    let units = units.max(1);
    if units <= EXACT {
        return (units as usize - 1, units);
    }
    let top = 31 - (units - 1).leading_zeros();
    let step = 1u32 << (top - 2);
    let rounded = units.next_multiple_of(step);
    let quarter = rounded / step - 5;
    (EXACT as usize + ((top - 4) * 4 + quarter) as usize, rounded)
}

impl Arena {
    /// An arena in ordinary memory.
    pub fn heap() -> Self {
        let mut arena = Self { back: Backing::Heap(vec![0; HEADER]) };
        arena.set_u32_at(BUMP, FIRST);
        arena
    }

    /// An empty arena in a journal that is being made; it counts from the first snapshot on.
    ///
    /// # Errors
    /// [`JournalError`] when there is no room.
    pub fn format(mem: &Rc<Mem>, half_size: u64) -> Result<Self, JournalError> {
        mem.store_u64(sb::UNDO, 0);
        let mut arena = Self { back: Backing::Shared(Box::new(Shared::new(mem, half_size, 0)?)) };
        arena.reserve(HEADER as u64)?;
        arena.write(0, &[0; HEADER]);
        arena.set_u32_at(BUMP, FIRST);
        Ok(arena)
    }

    /// Opens the arena as it was when the snapshot of `epoch` was made.
    ///
    /// # Errors
    /// [`JournalError`] when it can't be so.
    pub fn open(mem: &Rc<Mem>, half_size: u64, epoch: u64) -> Result<Self, JournalError> {
        let mut shared = Shared::new(mem, half_size, epoch)?;
        shared.take_back()?;
        Ok(Self { back: Backing::Shared(Box::new(shared)) })
    }

    /// Bytes in use from the start, free ones among them included.
    pub fn used(&self) -> usize {
        self.u32_at(BUMP) as usize * UNIT
    }

    /// Pages in use.
    pub fn pages(&self) -> u32 {
        self.used().div_ceil(PAGE) as u32
    }

    /// Lends bytes.
    #[inline]
    pub fn bytes(&self, at: Unit, skip: usize, len: usize) -> &[u8] {
        self.slice(at as usize * UNIT + skip, len)
    }

    #[inline]
    fn slice(&self, off: usize, len: usize) -> &[u8] {
        match &self.back {
            Backing::Heap(bytes) => &bytes[off..off + len],
            Backing::Shared(shared) => shared.own.bytes(off, len),
        }
    }

    #[inline]
    fn u32_at(&self, off: usize) -> u32 {
        match self.slice(off, 4).first_chunk() {
            Some(bytes) => u32::from_le_bytes(*bytes),
            None => 0,
        }
    }

    fn set_u32_at(&mut self, off: usize, value: u32) {
        self.write(off, &value.to_le_bytes());
    }

    /// Reads a word.
    #[inline]
    pub fn u32(&self, at: Unit, skip: usize) -> u32 {
        self.u32_at(at as usize * UNIT + skip)
    }

    /// Writes a word.
    pub fn set_u32(&mut self, at: Unit, skip: usize, value: u32) {
        self.set_u32_at(at as usize * UNIT + skip, value);
    }

    /// Reads one of the header's words.
    pub fn root(&self, which: usize) -> u32 {
        self.u32_at(ROOTS + 4 * which)
    }

    /// Writes one of the header's words.
    pub fn set_root(&mut self, which: usize, value: u32) {
        self.set_u32_at(ROOTS + 4 * which, value);
    }

    /// Writes bytes.
    pub fn put(&mut self, at: Unit, skip: usize, bytes: &[u8]) {
        self.write(at as usize * UNIT + skip, bytes);
    }

    fn write(&mut self, off: usize, bytes: &[u8]) {
        match &mut self.back {
            Backing::Heap(memory) => memory[off..off + bytes.len()].copy_from_slice(bytes),
            Backing::Shared(shared) => {
                let last = (off + bytes.len().max(1) - 1) / PAGE;
                for page in off / PAGE..=last {
                    shared.touch(page as u32);
                }
                shared.own.write(off, bytes);
            }
        }
    }

    /// Makes sure that `bytes` more can be used.
    ///
    /// # Errors
    /// [`Full`].
    pub fn reserve(&mut self, bytes: u64) -> Result<(), Full> {
        let used = self.used() as u64;
        match &mut self.back {
            Backing::Heap(_) => Ok(()),
            Backing::Shared(shared) => shared.reserve(used, used + bytes),
        }
    }

    /// How many bytes of these sizes the free lists do not have.
    pub fn beyond_free(&self, sizes: impl Iterator<Item = usize>) -> u64 {
        let mut heads = std::collections::BTreeMap::new();
        let mut more = 0;
        for len in sizes {
            let (class, units) = class(len.div_ceil(UNIT) as u32);
            let free = heads.entry(class).or_insert_with(|| self.u32_at(FREE + 4 * class));
            if *free == 0 {
                more += u64::from(units) * UNIT as u64;
            } else {
                *free = self.u32(*free, 0);
            }
        }
        more
    }

    /// Gives `len` bytes out.
    pub fn alloc(&mut self, len: usize) -> Unit {
        let (class, units) = class(len.div_ceil(UNIT) as u32);
        let head = FREE + 4 * class;
        let free = self.u32_at(head);
        if free != 0 {
            let next = self.u32(free, 0);
            self.set_u32_at(head, next);
            return free;
        }
        let at = self.u32_at(BUMP);
        let end = (at + units) as usize * UNIT;
        match &mut self.back {
            Backing::Heap(bytes) => {
                if bytes.len() < end {
                    bytes.resize((end * 2).max(64 << 10), 0);
                }
            }
            Backing::Shared(shared) => {
                let start = at as u64 * UNIT as u64;
                // Requests reserve before they run (`Engine::commit`); this is for what could not be foreseen.
                if let Err(e) = shared.reserve(start, end as u64) {
                    panic!("{e}: the journal's file system or size is exhausted");
                }
                // The end of the last one may never be written, and yet it gets a checksum.
                for page in start as usize / PAGE..=(end - 1) / PAGE {
                    shared.touch(page as u32);
                }
            }
        }
        self.set_u32_at(BUMP, at + units);
        at
    }

    /// Whether another `len` bytes would land in the same place: such a value can be replaced where it is.
    pub fn fits(old: usize, new: usize) -> bool {
        class(old.div_ceil(UNIT) as u32).0 == class(new.div_ceil(UNIT) as u32).0
    }

    /// Takes `len` bytes back.
    pub fn free(&mut self, at: Unit, len: usize) {
        let head = FREE + 4 * class(len.div_ceil(UNIT) as u32).0;
        let next = self.u32_at(head);
        self.set_u32(at, 0, next);
        self.set_u32_at(head, at);
    }

    /// Bytes of pages that changed since the snapshot.
    pub fn changed_len(&self) -> u64 {
        match &self.back {
            Backing::Heap(_) => 0,
            Backing::Shared(shared) => (shared.changed.len() * PAGE) as u64,
        }
    }

    /// The pages that changed since the snapshot, with their checksums: for the next snapshot.
    pub fn changed(&self) -> Vec<(u32, u32)> {
        match &self.back {
            Backing::Heap(_) => Vec::new(),
            Backing::Shared(shared) => shared.changed.iter().map(|p| (*p, shared.sum(*p))).collect(),
        }
    }

    /// A snapshot of `epoch` with these checksums became the active one.
    pub fn snapshot_done(&mut self, epoch: u64, sums: &[(u32, u32)]) {
        let pages = self.pages();
        if let Backing::Shared(shared) = &mut self.back {
            shared.keep_sums(sums);
            for page in std::mem::take(&mut shared.changed) {
                shared.dirty[page as usize / 64] = 0;
            }
            (shared.epoch, shared.known, shared.undo) = (epoch, pages, 0);
            shared.give_back();
        }
    }

    /// After opening: takes over the active snapshot's checksums and verifies every page.
    ///
    /// # Errors
    /// What is damaged.
    pub fn verify(&mut self, pages: u32, sums: &[(u32, u32)]) -> Result<(), String> {
        let Backing::Shared(shared) = &mut self.back else { return Ok(()) };
        if pages as usize * PAGE > shared.own.len() || pages < (HEADER / PAGE) as u32 {
            return Err(format!("an arena of {pages} pages"));
        }
        if sums.iter().any(|(page, _)| *page as usize * PAGE >= shared.own.len()) {
            return Err("a checksum of a page that can't be".into());
        }
        shared.keep_sums(sums);
        shared.known = pages;
        for page in 0..pages {
            if shared.sum(page) != shared.kept_sum(page) {
                return Err(format!("page {page} of {pages} of the tree has a bad checksum"));
            }
        }
        if self.pages() != pages {
            return Err("the tree's size is not what the snapshot says".into());
        }
        Ok(())
    }
}

impl Shared {
    fn new(mem: &Rc<Mem>, half_size: u64, epoch: u64) -> Result<Self, JournalError> {
        let parts = Parts::new(half_size);
        let own = Owned::take(mem, parts.arena)
            .ok_or_else(|| JournalError::Damaged("the file is too short for its arena".into()))?;
        let dirty = vec![0; (parts.arena_len / PAGE).div_ceil(64)];
        Ok(Self {
            own,
            mem: Rc::clone(mem),
            parts,
            epoch,
            known: 0,
            dirty,
            changed: Vec::new(),
            undo: 0,
            allocated: 0,
            undo_allocated: 0,
        })
    }

    /// Puts the changed pages back. They stay noted: a kill in the middle only means doing it again.
    fn take_back(&mut self) -> Result<(), JournalError> {
        let word = self.mem.load_u64(sb::UNDO);
        if word >> 32 != self.epoch & 0xffff_ffff {
            return Ok(());
        }
        self.undo = word as u32;
        let pages = (self.own.len() / PAGE) as u32;
        if self.undo > pages {
            return Err(JournalError::Damaged(format!("{} undo pages of at most {pages}", self.undo)));
        }
        let mut bytes = [0; PAGE];
        for i in 0..self.undo as usize {
            let mut page = [0; 4];
            self.mem.read(self.parts.undo_index + 4 * i, &mut page);
            let page = u32::from_le_bytes(page);
            if page >= pages {
                return Err(JournalError::Damaged(format!("undo page {i} names page {page} of {pages}")));
            }
            self.mem.read(self.parts.undo + i * PAGE, &mut bytes);
            self.own.write(page as usize * PAGE, &bytes);
            self.mark(page);
        }
        Ok(())
    }

    fn mark(&mut self, page: u32) {
        self.dirty[page as usize / 64] |= 1 << (page % 64);
        self.changed.push(page);
    }

    /// Before a change of a page.
    #[inline]
    fn touch(&mut self, page: u32) {
        if self.dirty[page as usize / 64] & 1 << (page % 64) == 0 {
            self.save(page);
        }
    }

    fn save(&mut self, page: u32) {
        if page < self.known {
            let i = self.undo as usize;
            let end = ((i + 1) * PAGE) as u64;
            if end > self.undo_allocated {
                let upto = end.next_multiple_of(CHUNK);
                if let Err(e) = self.allocate(self.parts.undo, self.undo_allocated, upto) {
                    panic!("{e}: the journal's file system is full");
                }
                self.undo_allocated = upto;
            }
            let bytes = self.own.bytes(page as usize * PAGE, PAGE);
            self.mem.write(self.parts.undo + i * PAGE, bytes);
            self.mem.write(self.parts.undo_index + 4 * i, &page.to_le_bytes());
            self.undo += 1;
            self.mem.store_u64(sb::UNDO, self.epoch << 32 | u64::from(self.undo));
        }
        self.mark(page);
    }

    fn sum(&self, page: u32) -> u32 {
        crc32c::crc32c(self.own.bytes(page as usize * PAGE, PAGE))
    }

    fn kept_sum(&self, page: u32) -> u32 {
        let mut sum = [0; 4];
        self.mem.read(self.parts.sums + 4 * page as usize, &mut sum);
        u32::from_le_bytes(sum)
    }

    /// Done again at the next start if a kill comes in between: the active snapshot has the list.
    fn keep_sums(&self, sums: &[(u32, u32)]) {
        self.mem.crash_point();
        for (page, sum) in sums {
            self.mem.kernel_write(self.parts.sums + 4 * *page as usize, &sum.to_le_bytes());
        }
        self.mem.crash_point();
    }

    fn reserve(&mut self, from: u64, upto: u64) -> Result<(), Full> {
        if upto <= self.allocated {
            return Ok(());
        }
        if upto > self.own.len() as u64 {
            return Err(Full(upto));
        }
        let upto = upto.next_multiple_of(CHUNK).min(self.own.len() as u64);
        // What is in use was written, so it is there.
        let from = self.allocated.max(from.saturating_sub(8192) / 4096 * 4096);
        self.allocate(self.parts.arena, from, upto)?;
        self.allocated = upto;
        Ok(())
    }

    fn allocate(&self, base: usize, from: u64, upto: u64) -> Result<(), Full> {
        // A store into a page that the file system can't give would be a SIGBUS.
        let (offset, len) = (base as i64 + from as i64, (upto - from) as i64);
        fallocate(self.mem.file().as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)
            .map_err(|_| Full(upto))
    }

    /// Gives memory of undo pages back that one large change took.
    fn give_back(&mut self) {
        if self.undo_allocated <= KEEP {
            return;
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (self.parts.undo as i64 + KEEP as i64, (self.undo_allocated - KEEP) as i64);
        match fallocate(self.mem.file().as_fd(), flags, offset, len) {
            Ok(()) => self.undo_allocated = KEEP,
            Err(e) => tracing::debug!(error = %e, "undo pages keep their memory"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_grow_and_hold_what_they_say() {
        let mut last = (0, 1);
        for units in 1..2000 {
            let (class, size) = class(units);
            assert!(size >= units && size <= units + units / 3 + 1, "{units} in {size}");
            assert!(class >= last.0 && (class == last.0) == (size == last.1), "{units}: {class} {last:?}");
            assert!(class <= last.0 + 1);
            last = (class, size);
        }
        assert!(FREE + 4 * last.0 + 4 <= ROOTS);
    }

    #[test]
    fn freed_space_is_used_again() {
        let mut arena = Arena::heap();
        let (a, b) = (arena.alloc(48), arena.alloc(100));
        arena.put(b, 0, &[7; 100]);
        arena.free(a, 48);
        arena.free(b, 100);
        assert_eq!((arena.alloc(100), arena.alloc(45)), (b, a));
        let used = arena.used();
        assert!(arena.alloc(48) as usize * UNIT >= used);
    }
}

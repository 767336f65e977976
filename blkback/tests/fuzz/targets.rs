//! What is fuzzed: the request parser, and a whole engine whose ring, pages and disk do as the input says. Used by `tests/fuzz.rs` and by
//! libFuzzer (`cargo xtask fuzz`).

#[path = "../common/pages.rs"]
mod pages;

use std::cell::RefCell;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blkback::disk::attachment::{
    BUFFER_CHUNK, Completions, Discard, DiskError, DiskQueue, DiskRequest, Geometry, MAX_OPERATION_BYTES,
    Operation, Tag,
};
use blkback::engine::{BUFFERS_BYTES, Engine};
use blkback::request::{BlkifFormat, Kind, MAX_INDIRECT_BYTES, Prepared, SECTOR, indirect_page};
use blkback::stats::Stats;
use domain_kit::journal::{JournaledRing, RingFormat, Shape};
use domain_kit::mem::SharedMem;
use domain_kit::ring::{HeapMem, RingLayout, RingMem};
use pages::PlainPages;
use xen_abi::io::blkif::{Abi, MAX_ENTRY_SIZE};
use xen_abi::io::ring::{REQ_PROD_OFFSET, RSP_PROD_OFFSET, entry_offset};

/// Takes the input apart.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// So many, or what there is.
    fn some(&mut self, n: usize) -> &'a [u8] {
        let (these, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        these
    }

    fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let some = self.some(8);
        bytes[..some.len()].copy_from_slice(some);
        u64::from_le_bytes(bytes)
    }
}

fn abi_of(flags: u8) -> Abi {
    if flags & 1 == 0 { Abi::X86_64 } else { Abi::X86_32 }
}

fn geometry_of(flags: u8, sectors: u64) -> Geometry {
    let logical = if flags & 2 == 0 { 512 } else { 4096 };
    let discard = Discard { granularity: 512, alignment: 0, secure: flags & 16 != 0 };
    Geometry {
        // Of storage: below 2^63 bytes, in whole sectors.
        sectors: (sectors & (u64::MAX >> 10)) & !7,
        read_only: flags & 4 != 0,
        logical,
        physical: logical,
        discard: (flags & 8 != 0).then_some(discard),
    }
}

/// A byte of flags, the disk's size, a slot of the ring, and what its indirect page holds: what passes lies on the disk and in its
/// pages.
pub fn request(input: &[u8]) {
    let mut input = Bytes(input);
    let Some(flags) = input.byte() else { return };
    let (abi, disk) = (abi_of(flags), geometry_of(flags, input.number()));
    let mut slot = input.some(abi.entry_size()).to_vec();
    let page = indirect_page(abi, &slot);
    assert!(page.is_none_or(|(_, len)| (8..=MAX_INDIRECT_BYTES).contains(&(len as usize))));
    let mut prepared = Prepared::default();
    match prepared.check(abi, &slot, input.0, &disk) {
        Ok(()) => passed(&prepared, &disk),
        Err(refusal) => assert!(!prepared.has_data() && refusal.status() < 0),
    }
    let format = BlkifFormat(abi);
    let mut out = vec![0; format.rsp_size()];
    slot.resize(format.req_size(), 0);
    format.response(&slot, 0, 0, &mut out);
}

fn passed(prepared: &Prepared, disk: &Geometry) {
    let unit = u64::from(disk.logical);
    let end = prepared.offset.checked_add(prepared.len).expect("no overflow");
    assert!(end <= disk.sectors * SECTOR);
    assert!(prepared.offset.is_multiple_of(unit) && prepared.len.is_multiple_of(unit));
    assert!(!disk.read_only || matches!(prepared.kind, Kind::Read | Kind::Flush) || prepared.len == 0);
    let mut bytes = 0;
    for segment in &prepared.segments {
        assert!(segment.len >= 512 && segment.offset + segment.len <= 4096);
        assert!(
            u64::from(segment.offset).is_multiple_of(unit) && u64::from(segment.len).is_multiple_of(unit)
        );
        bytes += u64::from(segment.len);
    }
    if prepared.has_data() {
        assert_eq!(bytes, prepared.len);
        assert!(bytes <= MAX_OPERATION_BYTES as u64);
    }
    if matches!(prepared.kind, Kind::Discard { .. }) {
        assert!(disk.discard.is_some() && !prepared.has_data());
    }
}

/// Operations that the disk has and has not completed.
#[derive(Default)]
struct Pending {
    operations: Vec<Tag>,
    done: Completions,
}

/// A disk without content that completes what the input says, when it says.
struct Slow {
    geometry: Geometry,
    pending: Rc<RefCell<Pending>>,
}

impl DiskQueue for Slow {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn submit(&mut self, tag: Tag, request: &DiskRequest) {
        let mut pending = self.pending.borrow_mut();
        assert!(!pending.operations.contains(&tag), "{tag:?} is busy");
        let size = self.geometry.sectors * SECTOR;
        assert!(request.offset.checked_add(request.len).is_some_and(|end| end <= size), "{request:?}");
        if matches!(request.operation, Operation::Read | Operation::Write { .. }) {
            let (from, len) = (request.buffer as usize, request.len as usize);
            assert!(len > 0 && from + len <= BUFFERS_BYTES, "{request:?}");
            assert_eq!(from / BUFFER_CHUNK, (from + len - 1) / BUFFER_CHUNK, "{request:?}");
        }
        pending.operations.push(tag);
    }
    fn kick(&mut self) {}
    fn completed(&mut self, into: &mut Completions) {
        into.append(&mut self.pending.borrow_mut().done);
    }
    fn ready(&mut self) -> bool {
        !self.pending.borrow().done.is_empty()
    }
    fn wait(&mut self, _events: &[BorrowedFd<'_>], _timeout: Option<Duration>) -> std::io::Result<()> {
        Ok(())
    }
    fn finish(&mut self) {}
}

/// Pages that are granted.
const PAGES: usize = 4;
/// Units of 512 bytes on the disk.
const SECTORS: u64 = 512;

type Memory = Rc<HeapMem>;

/// One device of one ring, its frontend the input's.
struct Device {
    abi: Abi,
    geometry: Geometry,
    layout: RingLayout,
    shape: Shape,
    ring: Memory,
    journal: Memory,
    guest: Arc<SharedMem>,
    pending: Rc<RefCell<Pending>>,
    engine: Engine<Memory, Memory, PlainPages, Slow>,
    /// Taken and not answered: id and operation.
    open: Vec<(u64, u8)>,
    /// The frontend wrote what is the backend's.
    scribbled: bool,
}

fn memory(len: usize) -> Arc<SharedMem> {
    Arc::new(SharedMem::create("fuzz", len).expect("a memfd").0)
}

impl Device {
    fn new(flags: u8) -> Device {
        let (abi, geometry) = (abi_of(flags), geometry_of(flags, SECTORS));
        let layout = RingLayout::new(1, abi.entry_size(), abi.response_size());
        let shape =
            JournaledRing::<Memory, Memory, BlkifFormat>::shape(&layout, MAX_INDIRECT_BYTES as u32, 0);
        let (ring, journal) = (Rc::new(HeapMem::new(4096)), Rc::new(HeapMem::new(shape.bytes())));
        let (guest, pending) = (memory(PAGES * 4096), Rc::new(RefCell::default()));
        let back =
            JournaledRing::create(ring.clone(), layout, journal.clone(), shape, [0; 6], BlkifFormat(abi))
                .expect("an empty ring");
        let pages = PlainPages::all(guest.clone(), memory(BUFFERS_BYTES));
        let disk = Slow { geometry, pending: Rc::clone(&pending) };
        let engine = Engine::new(back, abi, Vec::new(), pages, disk, Arc::default());
        let open = Vec::new();
        Device { abi, geometry, layout, shape, ring, journal, guest, pending, engine, open, scribbled: false }
    }

    fn slot(&self, index: u32) -> [u8; MAX_ENTRY_SIZE] {
        let mut bytes = [0; MAX_ENTRY_SIZE];
        let at = entry_offset(index, self.layout.size, self.layout.entry_size);
        self.ring.copy_out(at, &mut bytes[..self.layout.entry_size]);
        bytes
    }

    /// A round, and what it took and answered. False: the ring failed.
    fn round(&mut self) -> bool {
        let (cons, rsp) = (self.engine.ring().ring().req_cons(), self.engine.ring().ring().rsp_prod());
        let before: Vec<_> = (0..self.layout.size).map(|n| self.slot(cons.wrapping_add(n))).collect();
        if self.engine.round().is_err() {
            return false;
        }
        self.compare(cons, rsp, &before);
        true
    }

    fn compare(&mut self, cons: u32, rsp: u32, before: &[[u8; MAX_ENTRY_SIZE]]) {
        let ring = self.engine.ring().ring();
        let (taken, answered) = (ring.req_cons().wrapping_sub(cons), ring.rsp_prod().wrapping_sub(rsp));
        assert!(taken <= self.layout.size && answered <= self.layout.size);
        for slot in &before[..taken as usize] {
            let request = self.abi.decode(slot);
            self.open.push((request.id(), request.operation()));
        }
        for n in 0..answered {
            let mut bytes = [0; 16];
            let slot = self.slot(rsp.wrapping_add(n));
            let size = self.abi.response_size();
            bytes[..size].copy_from_slice(&slot[..size]);
            let response = self.abi.decode_response(&bytes);
            let (id, operation) = (response.id, response.operation);
            let asked = self.open.iter().position(|open| *open == (id, operation));
            assert!((-2..=0).contains(&response.status), "{}", response.status);
            self.open.swap_remove(asked.expect("a response to what was asked"));
        }
        assert_eq!(self.open.len(), self.engine.in_flight() as usize);
    }

    /// SIGKILL, and the next incarnation. False: the ring failed, which only a frontend that wrote `rsp_prod` can have done.
    fn kill(&mut self, own_fault: bool) -> bool {
        *self.pending.borrow_mut() = Pending::default();
        let rsp = self.engine.ring().ring().rsp_prod();
        let (ring, journal) = (self.ring.clone(), self.journal.clone());
        let format = BlkifFormat(self.abi);
        let again = JournaledRing::reattach(ring, self.layout, journal, self.shape, format, own_fault);
        let (back, unanswered) = match again {
            Ok(again) => again,
            Err(error) => {
                assert!(self.scribbled, "{error}");
                return false;
            }
        };
        assert_eq!(unanswered.len(), self.open.len());
        assert_eq!(back.ring().rsp_prod(), rsp);
        let pages = PlainPages::all(self.guest.clone(), memory(BUFFERS_BYTES));
        let disk = Slow { geometry: self.geometry, pending: Rc::clone(&self.pending) };
        self.engine = Engine::new(back, self.abi, unanswered, pages, disk, Arc::<Stats>::default());
        true
    }

    /// One step of the input. False: it is over.
    fn step(&mut self, input: &mut Bytes<'_>) -> Option<bool> {
        let go_on = match input.byte()? % 8 {
            // A slot's bytes, and published.
            0 => {
                let prod = self.ring.load_u32(REQ_PROD_OFFSET);
                let at = entry_offset(prod, self.layout.size, self.layout.entry_size);
                self.ring.copy_in(at, input.some(self.layout.entry_size));
                self.ring.store_u32(REQ_PROD_OFFSET, prod.wrapping_add(1));
                true
            }
            // Bytes anywhere behind the indices.
            1 => {
                let at = 64 + usize::from(input.byte()?) * 15;
                let len = usize::from(input.byte()?).min(4096 - at);
                self.ring.copy_in(at, input.some(len));
                true
            }
            // Bytes of a granted page.
            2 => {
                let (page, at) = (input.byte()?, usize::from(input.byte()?) * 8);
                let len = usize::from(input.byte()?);
                self.guest.copy_in(usize::from(page) % PAGES * 4096 + at, input.some(len));
                true
            }
            3 => self.round(),
            // The disk completes an operation: done, or with an errno.
            4 => {
                let (which, errno) = (usize::from(input.byte()?), i32::from(input.byte()?));
                let mut pending = self.pending.borrow_mut();
                if !pending.operations.is_empty() {
                    let which = which % pending.operations.len();
                    let tag = pending.operations.swap_remove(which);
                    pending.done.push((tag, if errno == 0 { Ok(()) } else { Err(DiskError(errno)) }));
                }
                true
            }
            5 => {
                let own_fault = input.byte()? & 1 != 0;
                self.kill(own_fault)
            }
            6 => {
                let prod = self.ring.load_u32(REQ_PROD_OFFSET);
                let by = i32::from(input.byte()?.cast_signed());
                self.ring.store_u32(REQ_PROD_OFFSET, prod.wrapping_add_signed(by));
                true
            }
            _ => {
                let prod = self.ring.load_u32(RSP_PROD_OFFSET);
                let by = i32::from(input.byte()?.cast_signed());
                self.scribbled |= by != 0;
                self.ring.store_u32(RSP_PROD_OFFSET, prod.wrapping_add_signed(by));
                true
            }
        };
        Some(go_on)
    }
}

/// A byte of flags, then what frontend, disk and fate do to a device: no panic, every response to what was asked and once, nothing asked of
/// the disk that is not on it, and a kill loses nothing.
pub fn device(input: &[u8]) {
    let mut input = Bytes(input);
    let Some(flags) = input.byte() else { return };
    let mut device = Device::new(flags);
    while device.step(&mut input) == Some(true) {}
}

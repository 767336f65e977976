//! virtio-blk requests (virtio 1.2, 5.2): parsed on a private copy, judged, and copied piece by piece.

use domain_kit::mem::SharedMem;
use domain_kit::vhost::queue::{Chain, Segment};

use crate::disk::attachment::{Discard, Geometry, Operation};
use crate::request::Kind;

/// VIRTIO_BLK_F_* as numbers of bits (5.2.3).
pub mod feature {
    /// Most segments of a request.
    pub const SEG_MAX: u64 = 1 << 2;
    /// Writes are refused.
    pub const RO: u64 = 1 << 5;
    /// Bytes of a sector.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// Flushes.
    pub const FLUSH: u64 = 1 << 9;
    /// Physical sectors.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// Several queues.
    pub const MQ: u64 = 1 << 12;
    /// Discards.
    pub const DISCARD: u64 = 1 << 13;
    /// Ranges that read as zeroes.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// What a request is answered with.
pub const S_OK: u8 = 0;
/// It failed.
pub const S_IOERR: u8 = 1;
/// It is not offered.
pub const S_UNSUPP: u8 = 2;

/// Bytes of a header and of a range of a discard.
const HEADER: usize = 16;
/// Units of the header's and the configuration's sectors, bytes.
const SECTOR: u64 = 512;
/// Bytes of the identification.
const ID_BYTES: usize = 20;
/// Segments of data in one request.
const SEG_MAX: u32 = 254;
/// Longest discard or range of zeroes, sectors.
const RANGE_MAX: u32 = 1 << 22;

/// What the driver is offered for a disk.
pub fn features(geometry: &Geometry, read_only: bool, queues: u16) -> u64 {
    use feature::*;
    let mut all = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY;
    if read_only {
        all |= RO;
    } else {
        all |= WRITE_ZEROES;
        if geometry.discard.is_some() {
            all |= DISCARD;
        }
    }
    if queues > 1 {
        all |= MQ;
    }
    all
}

/// The configuration space (5.2.4).
pub fn config(geometry: &Geometry, queues: u16) -> Vec<u8> {
    let mut out = vec![0; 60];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &geometry.sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &geometry.logical.to_le_bytes());
    put(24, &[(geometry.physical / geometry.logical).max(1).ilog2() as u8]);
    // Writes are cached, or not, as the disk has it: flushes are always needed.
    put(32, &[1]);
    put(34, &queues.to_le_bytes());
    if let Some(Discard { granularity, .. }) = geometry.discard {
        put(36, &RANGE_MAX.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &((granularity / SECTOR as u32).max(1)).to_le_bytes());
    }
    put(48, &RANGE_MAX.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    out
}

/// Segments one behind the other.
#[derive(Clone, Debug, Default)]
pub struct Bytes {
    segments: Vec<Segment>,
    len: u64,
}

impl Bytes {
    fn set(&mut self, segments: &[Segment], skip: usize, drop_last: usize) {
        self.segments.clear();
        self.len = 0;
        let all: usize = segments.iter().map(|s| s.len).sum();
        let (mut at, end) = (0, all.saturating_sub(drop_last));
        for segment in segments {
            let (from, to) = (skip.max(at), end.min(at + segment.len));
            if from < to {
                let mut part = segment.clone();
                part.place = part.place.skip(from - at);
                part.len = to - from;
                self.len += part.len as u64;
                self.segments.push(part);
            }
            at += segment.len;
        }
    }

    /// Calls for each part of `len` bytes from `pos` on: the mapping, its offset, how far from `pos` it is, its length.
    fn parts(&self, pos: u64, len: usize, mut each: impl FnMut(&SharedMem, usize, usize, usize)) {
        let (mut skip, mut done) = (pos, 0);
        for segment in &self.segments {
            if done == len {
                return;
            }
            if skip >= segment.len as u64 {
                skip -= segment.len as u64;
                continue;
            }
            let n = (segment.len - skip as usize).min(len - done);
            each(&segment.place.mem, segment.place.offset + skip as usize, done, n);
            (skip, done) = (0, done + n);
        }
    }

    /// Into the guest.
    pub fn store(&self, pos: u64, len: usize, from: &SharedMem, offset: usize) {
        self.parts(pos, len, |mem, at, into, n| mem.copy_from(at, from, offset + into, n));
    }

    /// Out of the guest.
    pub fn fetch(&self, pos: u64, len: usize, to: &SharedMem, offset: usize) {
        self.parts(pos, len, |mem, at, into, n| to.copy_from(offset + into, mem, at, n));
    }

    /// Where they lie.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    fn write(&self, bytes: &[u8]) -> usize {
        let n = (self.len as usize).min(bytes.len());
        self.parts(0, n, |mem, at, into, n| mem.copy_in(at, &bytes[into..into + n]));
        n
    }

    fn read(&self, into: &mut [u8]) -> bool {
        let n = into.len();
        self.parts(0, n, |mem, at, from, n| mem.copy_out(at, &mut into[from..from + n]));
        self.len >= n as u64
    }
}

/// A request from its taking on.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// What it is, for the statistics.
    pub kind: Kind,
    /// Zeroes are to be written.
    pub zeroes: bool,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes on the disk.
    pub len: u64,
    /// The guest's memory of its data.
    pub data: Bytes,
    status: Bytes,
}

/// What is to be done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The disk has to do it.
    Run,
    /// It is answered with this status; so many bytes of data were written for the driver.
    Answer(u8, u32),
}

impl Request {
    /// Whether its data go through a buffer.
    pub fn has_data(&self) -> bool {
        !self.zeroes && self.len > 0 && matches!(self.kind, Kind::Read | Kind::Write)
    }

    /// What the disk is asked for, but for discards' and flushes' own calls.
    pub fn operation(&self) -> Operation {
        match self.kind {
            Kind::Read => Operation::Read,
            Kind::Write if self.zeroes => Operation::WriteZeroes,
            Kind::Write => Operation::Write { fua: false },
            Kind::Flush | Kind::Barrier => Operation::Flush,
            Kind::Discard { secure } => Operation::Discard { secure },
        }
    }

    /// Memory of its status.
    pub fn status(&self) -> &[Segment] {
        self.status.segments()
    }

    /// Puts the status where the driver looks for it.
    pub fn set_status(&self, status: u8) {
        self.status.write(&[status]);
    }

    /// Takes a request's header and judges it.
    pub fn check(&mut self, chain: &Chain, geometry: &Geometry, read_only: bool) -> Verdict {
        let writable: usize = chain.writable.iter().map(|s| s.len).sum();
        self.status.set(&chain.writable, writable.saturating_sub(1), 0);
        (self.kind, self.zeroes, self.offset, self.len) = (Kind::Flush, false, 0, 0);
        let mut head = Bytes::default();
        head.set(&chain.readable, 0, 0);
        let mut header = [0; HEADER];
        if !head.read(&mut header) || self.status.len == 0 {
            return Verdict::Answer(S_IOERR, 0);
        }
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let write_refused = read_only || geometry.read_only;
        match u32::from_le_bytes([header[0], header[1], header[2], header[3]]) {
            T_IN => {
                self.data.set(&chain.writable, 0, 1);
                self.kind = Kind::Read;
                self.range(sector, self.data.len, geometry)
            }
            T_OUT => {
                self.data.set(&chain.readable, HEADER, 0);
                self.kind = Kind::Write;
                if write_refused {
                    Verdict::Answer(S_IOERR, 0)
                } else {
                    self.range(sector, self.data.len, geometry)
                }
            }
            T_FLUSH => Verdict::Run,
            T_GET_ID => {
                let mut id = [0; ID_BYTES];
                id[..8].copy_from_slice(b"bulkhead");
                self.data.set(&chain.writable, 0, 1);
                let n = self.data.write(&id) as u32;
                Verdict::Answer(S_OK, n)
            }
            what @ (T_DISCARD | T_WRITE_ZEROES) => {
                self.data.set(&chain.readable, HEADER, 0);
                let mut range = [0; HEADER];
                // One range, as the configuration space says.
                if self.data.len != HEADER as u64 || !self.data.read(&mut range) {
                    return Verdict::Answer(S_UNSUPP, 0);
                }
                sector_range(&range).map_or(Verdict::Answer(S_UNSUPP, 0), |(first, count, flags)| {
                    let unmap = flags == 1 && what == T_WRITE_ZEROES;
                    if (flags != 0 && !unmap) || count > RANGE_MAX {
                        return Verdict::Answer(S_UNSUPP, 0);
                    }
                    self.zeroes = what == T_WRITE_ZEROES;
                    self.kind = if self.zeroes { Kind::Write } else { Kind::Discard { secure: false } };
                    if write_refused || (!self.zeroes && geometry.discard.is_none()) {
                        return Verdict::Answer(S_IOERR, 0);
                    }
                    self.range(first, u64::from(count) * SECTOR, geometry)
                })
            }
            _ => Verdict::Answer(S_UNSUPP, 0),
        }
    }

    fn range(&mut self, sector: u64, len: u64, geometry: &Geometry) -> Verdict {
        let unit = u64::from(geometry.logical);
        let offset = sector.checked_mul(SECTOR);
        let end = offset.and_then(|offset| offset.checked_add(len));
        let inside = end.is_some_and(|end| end <= geometry.sectors.saturating_mul(SECTOR));
        let Some(offset) = offset.filter(|_| inside && len > 0) else { return Verdict::Answer(S_IOERR, 0) };
        if !offset.is_multiple_of(unit) || !len.is_multiple_of(unit) {
            return Verdict::Answer(S_IOERR, 0);
        }
        (self.offset, self.len) = (offset, len);
        Verdict::Run
    }
}

/// Sector, number of sectors and flags of a discard's range.
fn sector_range(bytes: &[u8; HEADER]) -> Option<(u64, u32, u32)> {
    let long = u64::from_le_bytes(bytes[..8].try_into().ok()?);
    let short = |at: usize| Some(u32::from_le_bytes(bytes[at..at + 4].try_into().ok()?));
    Some((long, short(8)?, short(12)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_kit::vhost::memory::Place;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn memory() -> Arc<SharedMem> {
        Arc::new(SharedMem::create("guest", 65536).unwrap().0)
    }

    fn segment(mem: &Arc<SharedMem>, offset: usize, len: usize) -> Segment {
        Segment { place: Place { mem: mem.clone(), offset, gpa: offset as u64 }, len }
    }

    fn header(mem: &SharedMem, at: usize, kind: u32, sector: u64) {
        mem.copy_in(at, &kind.to_le_bytes());
        mem.copy_in(at + 8, &sector.to_le_bytes());
    }

    const DISK: Geometry = Geometry::plain(1000, false);

    #[test]
    fn a_read_over_several_segments() {
        let mem = memory();
        header(&mem, 0, T_IN, 8);
        let chain = Chain {
            // The header itself in two pieces.
            readable: vec![segment(&mem, 0, 5), segment(&mem, 5, 11)],
            writable: vec![segment(&mem, 4096, 512), segment(&mem, 8192, 513)],
        };
        let mut request = Request::default();
        assert_eq!(request.check(&chain, &DISK, false), Verdict::Run);
        assert_eq!((request.kind, request.offset, request.len), (Kind::Read, 4096, 1024));
        let private = SharedMem::create("private", 4096).unwrap().0;
        let pattern: Vec<u8> = (0..1024).map(|i| (i % 251) as u8).collect();
        private.copy_in(0, &pattern);
        request.data.store(0, 1024, &private, 0);
        request.set_status(S_OK);
        let mut got = vec![0; 512];
        mem.copy_out(8192, &mut got);
        assert_eq!(got, pattern[512..]);
        assert_eq!(mem.load_u8(8192 + 512, std::sync::atomic::Ordering::Relaxed), S_OK);
        // A piece in the middle, as long requests are done.
        request.data.store(500, 24, &private, 0);
        mem.copy_out(4096 + 500, &mut got[..12]);
        assert_eq!(got[..12], pattern[..12]);
    }

    #[test]
    fn what_does_not_fit_is_answered() {
        let mem = memory();
        let chain = |kind, sector, data: usize| {
            header(&mem, 0, kind, sector);
            Chain {
                readable: vec![segment(&mem, 0, 16), segment(&mem, 4096, data)],
                writable: vec![segment(&mem, 100, 1)],
            }
        };
        let mut request = Request::default();
        let mut judge = |chain: &Chain, read_only| request.check(chain, &DISK, read_only);
        assert_eq!(judge(&chain(T_OUT, 999, 512), false), Verdict::Run);
        assert_eq!(judge(&chain(T_OUT, 999, 512), true), Verdict::Answer(S_IOERR, 0));
        assert_eq!(judge(&chain(T_OUT, 999, 1024), false), Verdict::Answer(S_IOERR, 0));
        assert_eq!(judge(&chain(T_OUT, u64::MAX, 512), false), Verdict::Answer(S_IOERR, 0));
        assert_eq!(judge(&chain(T_OUT, 0, 100), false), Verdict::Answer(S_IOERR, 0));
        assert_eq!(judge(&chain(77, 0, 512), false), Verdict::Answer(S_UNSUPP, 0));
        assert_eq!(judge(&chain(T_DISCARD, 0, 16), false), Verdict::Answer(S_IOERR, 0), "none offered");
        assert_eq!(judge(&Chain::default(), false), Verdict::Answer(S_IOERR, 0));
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 64), cut in 1usize..40, data in 0usize..3000) {
            let mem = memory();
            mem.copy_in(0, &bytes);
            let chain = Chain {
                readable: vec![segment(&mem, 0, cut), segment(&mem, cut, data)],
                writable: vec![segment(&mem, 8192, data), segment(&mem, 20000, 1)],
            };
            let mut request = Request::default();
            if request.check(&chain, &DISK, false) == Verdict::Run {
                prop_assert!(request.offset + request.len <= 1000 * 512);
            }
        }
    }
}

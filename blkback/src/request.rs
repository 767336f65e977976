//! From the copied bytes of a ring slot to a checked request.
//!
//! Nothing of a [`Prepared`] is an allegation any more: its range lies on the disk, its segments inside their pages. Only the
//! grant references are still the frontend's word; hv-core judges those.

use domain_kit::journal::RingFormat;
use xen_abi::io::blkif::{
    self, Abi, BLKIF_DISCARD_SECURE, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_INDIRECT, BLKIF_OP_READ,
    BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER, BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BlkifRequest,
    BlkifRequestDiscard, BlkifRequestIndirect, BlkifRequestSegment, MAX_ENTRY_SIZE, Request,
};
use zerocopy::FromBytes;

use crate::disk::attachment::Geometry;

/// Bytes of the unit of all of blkif's sector numbers.
pub const SECTOR: u64 = blkif::SECTOR_SIZE as u64;
/// Most segments of an indirect request: all of them lie in one page.
pub const MAX_INDIRECT_SEGMENTS: u16 = 256;
/// Bytes of that many segments, and of what is kept of them in the journal.
pub const MAX_INDIRECT_BYTES: usize = MAX_INDIRECT_SEGMENTS as usize * SEGMENT_BYTES;
const SEGMENT_BYTES: usize = size_of::<BlkifRequestSegment>();

/// What a request wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Disk to guest.
    #[default]
    Read,
    /// Guest to disk.
    Write,
    /// Everything answered before is on the medium when this is answered; with segments, then a write that is too.
    Flush,
    /// As a flush, and nothing overtakes it in either direction.
    Barrier,
    /// The range's content is not needed any more.
    Discard {
        /// And must not be recoverable.
        secure: bool,
    },
}

/// A piece of a granted page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Whose grant is for hv-core to judge.
    pub gref: u32,
    /// First byte in the page.
    pub offset: u16,
    /// Bytes, a multiple of 512; the piece ends inside the page.
    pub len: u16,
}

/// A checked request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    /// What to do.
    pub kind: Kind,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes: the sum of the segments, or of a discard's range.
    pub len: u64,
    /// Where in the guest, in order.
    pub segments: Vec<Segment>,
    /// Where its data are in the ring's buffers, once it runs; the engine's.
    pub buffer: u32,
}

/// Why a request is answered with an error and goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Operation not offered.
    #[error("operation {0} is not supported")]
    Unsupported(u8),
    /// A field is out of range.
    #[error("{0}")]
    Invalid(&'static str),
}

impl Refusal {
    /// The response's status.
    pub fn status(self) -> i16 {
        match self {
            Refusal::Unsupported(_) => BLKIF_RSP_EOPNOTSUPP,
            Refusal::Invalid(_) => BLKIF_RSP_ERROR,
        }
    }
}

impl Prepared {
    /// Whether it has data, and so a buffer.
    pub fn has_data(&self) -> bool {
        !self.segments.is_empty()
    }

    /// Checks a copied ring slot; `extra` is the copy of an indirect request's segments. What is in `self` before is
    /// overwritten; its memory is used again.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&mut self, abi: Abi, slot: &[u8], extra: &[u8], disk: &Geometry) -> Result<(), Refusal> {
        self.segments.clear();
        self.len = 0;
        self.offset = 0;
        let checked = match decode(abi, slot) {
            Request::Direct(request) => self.direct(&request, disk),
            Request::Indirect(request) => self.indirect(&request, extra, disk),
            Request::Discard(request) => self.discard(&request, disk),
            Request::Unknown { operation, .. } => Err(Refusal::Unsupported(operation)),
        };
        if checked.is_err() {
            self.segments.clear();
        }
        checked
    }

    fn direct(&mut self, request: &BlkifRequest, disk: &Geometry) -> Result<(), Refusal> {
        self.kind = match request.operation {
            BLKIF_OP_READ => Kind::Read,
            BLKIF_OP_WRITE => Kind::Write,
            BLKIF_OP_WRITE_BARRIER => Kind::Barrier,
            BLKIF_OP_FLUSH_DISKCACHE => Kind::Flush,
            other => return Err(Refusal::Unsupported(other)),
        };
        let segments = request.segments().ok_or(Refusal::Invalid("more than 11 segments"))?;
        if segments.is_empty() && matches!(self.kind, Kind::Read | Kind::Write) {
            return Err(Refusal::Invalid("no segments"));
        }
        self.segments(segments.iter().copied(), request.sector_number, disk)
    }

    fn indirect(
        &mut self,
        request: &BlkifRequestIndirect,
        extra: &[u8],
        disk: &Geometry,
    ) -> Result<(), Refusal> {
        self.kind = match request.indirect_op {
            BLKIF_OP_READ => Kind::Read,
            BLKIF_OP_WRITE => Kind::Write,
            _ => return Err(Refusal::Invalid("an indirect request that neither reads nor writes")),
        };
        if request.nr_segments == 0 {
            return Err(Refusal::Invalid("no segments"));
        }
        if request.nr_segments > MAX_INDIRECT_SEGMENTS {
            return Err(Refusal::Invalid("more indirect segments than were offered"));
        }
        if extra.len() != usize::from(request.nr_segments) * SEGMENT_BYTES {
            return Err(Refusal::Invalid("its indirect page is not there"));
        }
        let segments = extra
            .chunks_exact(SEGMENT_BYTES)
            .map(|bytes| BlkifRequestSegment::read_from_bytes(bytes).unwrap_or_default());
        self.segments(segments, request.sector_number, disk)
    }

    fn discard(&mut self, request: &BlkifRequestDiscard, disk: &Geometry) -> Result<(), Refusal> {
        let Some(offered) = disk.discard else { return Err(Refusal::Unsupported(request.operation)) };
        let secure = request.flag & BLKIF_DISCARD_SECURE != 0;
        if secure && !offered.secure {
            return Err(Refusal::Unsupported(request.operation));
        }
        self.kind = Kind::Discard { secure };
        if request.nr_sectors == 0 {
            return Err(Refusal::Invalid("a discard of nothing"));
        }
        self.range(request.sector_number, request.nr_sectors, disk)
    }

    fn segments(
        &mut self,
        segments: impl Iterator<Item = BlkifRequestSegment>,
        sector_number: u64,
        disk: &Geometry,
    ) -> Result<(), Refusal> {
        let mut sectors = 0u64;
        for segment in segments {
            let count = segment.sectors().ok_or(Refusal::Invalid("a segment leaves its page"))?;
            sectors += u64::from(count);
            let unit = disk.logical / SECTOR as u32;
            if !u32::from(segment.first_sect).is_multiple_of(unit) || !count.is_multiple_of(unit) {
                return Err(Refusal::Invalid("a segment of other than whole sectors of the disk"));
            }
            self.segments.push(Segment {
                gref: segment.gref,
                offset: u16::from(segment.first_sect) * SECTOR as u16,
                len: count as u16 * SECTOR as u16,
            });
        }
        if sectors == 0 { Ok(()) } else { self.range(sector_number, sectors, disk) }
    }

    fn range(&mut self, first: u64, sectors: u64, disk: &Geometry) -> Result<(), Refusal> {
        let end = first.checked_add(sectors);
        if end.is_none_or(|end| end > disk.sectors) {
            return Err(Refusal::Invalid("beyond the end of the disk"));
        }
        if disk.read_only && self.kind != Kind::Read {
            return Err(Refusal::Invalid("a write to a read-only disk"));
        }
        // Below disk.sectors, which is bytes / 512: no overflow.
        self.offset = first * SECTOR;
        self.len = sectors * SECTOR;
        let unit = u64::from(disk.logical);
        if !self.offset.is_multiple_of(unit) || !self.len.is_multiple_of(unit) {
            return Err(Refusal::Invalid("not in whole sectors of the disk"));
        }
        Ok(())
    }
}

fn decode(abi: Abi, slot: &[u8]) -> Request {
    let mut whole = [0; MAX_ENTRY_SIZE];
    let n = slot.len().min(MAX_ENTRY_SIZE);
    whole[..n].copy_from_slice(&slot[..n]);
    abi.decode(&whole)
}

/// The grant of the page with an indirect request's segments, and how many bytes of it they are. `None` for other requests, and
/// for those that [`Prepared::check`] refuses whatever is in the page.
pub fn indirect_page(abi: Abi, slot: &[u8]) -> Option<(u32, u32)> {
    if slot.first() != Some(&BLKIF_OP_INDIRECT) {
        return None;
    }
    match decode(abi, slot) {
        Request::Indirect(r) if (1..=MAX_INDIRECT_SEGMENTS).contains(&r.nr_segments) => {
            Some((r.indirect_grefs[0], u32::from(r.nr_segments) * SEGMENT_BYTES as u32))
        }
        _ => None,
    }
}

/// Whether it is a barrier: the operation is the first byte in every ABI.
pub fn is_barrier(slot: &[u8]) -> bool {
    slot.first() == Some(&BLKIF_OP_WRITE_BARRIER)
}

/// blkif's entries for the journal.
#[derive(Clone, Copy, Debug)]
pub struct BlkifFormat(pub Abi);

impl RingFormat for BlkifFormat {
    fn req_size(&self) -> usize {
        self.0.entry_size()
    }
    fn rsp_size(&self) -> usize {
        self.0.response_size()
    }
    fn response(&self, request: &[u8], status: i16, _aux: u32, out: &mut [u8]) {
        let request = decode(self.0, request);
        let bytes = self.0.encode_response(request.id(), request.operation(), status);
        let n = out.len();
        out.copy_from_slice(&bytes[..n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::attachment::{Discard, MAX_OPERATION_BYTES};
    use proptest::prelude::*;

    const DISK: Geometry = Geometry::plain(1000, false);

    fn check(request: BlkifRequest, disk: &Geometry) -> Result<Prepared, Refusal> {
        let mut prepared = Prepared::default();
        for abi in [Abi::X86_64, Abi::X86_32] {
            let slot = abi.encode(&Request::Direct(request));
            prepared.check(abi, &slot[..abi.entry_size()], &[], disk)?;
        }
        Ok(prepared)
    }

    fn request(operation: u8, sector_number: u64, segs: &[(u8, u8)]) -> BlkifRequest {
        let mut request =
            BlkifRequest { operation, nr_segments: segs.len() as u8, sector_number, ..Default::default() };
        for (to, &(first, last)) in request.seg.iter_mut().zip(segs) {
            *to = BlkifRequestSegment::new(7, first, last);
        }
        request
    }

    #[test]
    fn edges_of_every_field() {
        assert!(check(request(BLKIF_OP_READ, 992, &[(0, 7)]), &DISK).is_ok());
        assert!(check(request(BLKIF_OP_READ, 993, &[(0, 7)]), &DISK).is_err());
        assert!(check(request(BLKIF_OP_READ, u64::MAX, &[(0, 7)]), &DISK).is_err());
        assert!(check(request(BLKIF_OP_READ, u64::MAX - 7, &[(0, 7)]), &DISK).is_err());
        assert!(check(request(BLKIF_OP_READ, 0, &[]), &DISK).is_err());
        assert!(check(request(BLKIF_OP_WRITE, 0, &[(3, 2)]), &DISK).is_err());
        assert!(check(request(BLKIF_OP_WRITE, 0, &[(0, 8)]), &DISK).is_err());
        assert!(check(request(BLKIF_OP_WRITE, 0, &[(0, 255)]), &DISK).is_err());
        assert!(check(request(BLKIF_OP_FLUSH_DISKCACHE, 5000, &[]), &DISK).is_ok());
        let many = BlkifRequest { nr_segments: 12, ..request(BLKIF_OP_READ, 0, &[(0, 7); 11]) };
        assert!(check(many, &DISK).is_err());
        for operation in [4, 5, 7, 255] {
            let e = check(request(operation, 0, &[(0, 7)]), &DISK).unwrap_err();
            assert_eq!(e.status(), BLKIF_RSP_EOPNOTSUPP);
        }
        let read_only = Geometry { read_only: true, ..DISK };
        assert!(check(request(BLKIF_OP_WRITE, 0, &[(0, 0)]), &read_only).is_err());
        assert!(check(request(BLKIF_OP_WRITE_BARRIER, 0, &[(0, 0)]), &read_only).is_err());
        assert!(check(request(BLKIF_OP_READ, 0, &[(0, 0)]), &read_only).is_ok());
    }

    fn indirect(operation: u8, nr_segments: u16, sector_number: u64) -> BlkifRequestIndirect {
        BlkifRequestIndirect {
            operation: BLKIF_OP_INDIRECT,
            indirect_op: operation,
            nr_segments,
            sector_number,
            indirect_grefs: [77, 1, 2, 3, 4, 5, 6, 7],
            ..Default::default()
        }
    }

    #[test]
    fn indirect_requests() {
        use zerocopy::IntoBytes;
        let big = Geometry::plain(1 << 20, false);
        let whole = [BlkifRequestSegment::new(5, 0, 7); 257];
        let try_it = |request: BlkifRequestIndirect, segments: &[BlkifRequestSegment]| {
            let mut prepared = Prepared::default();
            for abi in [Abi::X86_64, Abi::X86_32] {
                let slot = abi.encode(&Request::Indirect(request));
                let slot = &slot[..abi.entry_size()];
                let page = indirect_page(abi, slot);
                let wanted = (1..=256).contains(&request.nr_segments);
                assert_eq!(page, wanted.then_some((77, u32::from(request.nr_segments) * 8)));
                prepared.check(abi, slot, segments.as_bytes(), &big)?;
            }
            Ok::<_, Refusal>(prepared)
        };
        let fine = try_it(indirect(BLKIF_OP_WRITE, 256, 8), &whole[..256]).unwrap();
        assert_eq!((fine.kind, fine.offset, fine.len), (Kind::Write, 4096, 1 << 20));
        assert_eq!(fine.segments[255], Segment { gref: 5, offset: 0, len: 4096 });
        assert!(try_it(indirect(BLKIF_OP_READ, 1, 8), &whole[..1]).is_ok());
        assert!(try_it(indirect(BLKIF_OP_READ, 257, 8), &whole).is_err());
        assert!(try_it(indirect(BLKIF_OP_READ, 0, 8), &[]).is_err());
        assert!(try_it(indirect(BLKIF_OP_READ, 2, 8), &whole[..1]).is_err(), "not all segments are there");
        assert!(try_it(indirect(BLKIF_OP_READ, 1, 1 << 20), &whole[..1]).is_err(), "beyond the end");
        for operation in [BLKIF_OP_WRITE_BARRIER, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_INDIRECT, 255] {
            assert!(try_it(indirect(operation, 1, 8), &whole[..1]).is_err());
        }
        let torn = [whole[0], BlkifRequestSegment::new(5, 4, 3)];
        assert!(try_it(indirect(BLKIF_OP_READ, 2, 8), &torn).is_err());
    }

    /// blkif.h: all numbers are in units of 512 bytes, aligned to the disk's sectors.
    #[test]
    fn sectors_of_4096_bytes() {
        let disk = Geometry { logical: 4096, physical: 4096, sectors: 1000, ..DISK };
        let fine = check(request(BLKIF_OP_WRITE, 8, &[(0, 7), (0, 7)]), &disk).unwrap();
        assert_eq!((fine.offset, fine.len), (4096, 8192));
        for bad in [
            request(BLKIF_OP_READ, 1, &[(0, 7)]),
            request(BLKIF_OP_READ, 8, &[(0, 3)]),
            request(BLKIF_OP_READ, 8, &[(0, 3), (4, 7)]),
            request(BLKIF_OP_WRITE_BARRIER, 12, &[(0, 7)]),
            request(BLKIF_OP_FLUSH_DISKCACHE, 8, &[(0, 0)]),
        ] {
            assert_eq!(check(bad, &disk).unwrap_err().status(), BLKIF_RSP_ERROR);
        }
    }

    #[test]
    fn discards() {
        let offered = Some(Discard { granularity: 512, alignment: 0, secure: false });
        let disk = Geometry { discard: offered, ..DISK };
        let try_it = |sector_number, nr_sectors, flag, disk: &Geometry| {
            let request = BlkifRequestDiscard {
                operation: xen_abi::io::blkif::BLKIF_OP_DISCARD,
                flag,
                sector_number,
                nr_sectors,
                ..Default::default()
            };
            let mut prepared = Prepared::default();
            for abi in [Abi::X86_64, Abi::X86_32] {
                let slot = abi.encode(&Request::Discard(request));
                prepared.check(abi, &slot[..abi.entry_size()], &[], disk)?;
            }
            Ok::<_, Refusal>(prepared)
        };
        let fine = try_it(0, 1000, 0, &disk).unwrap();
        assert_eq!((fine.kind, fine.len, fine.has_data()), (Kind::Discard { secure: false }, 512_000, false));
        assert!(try_it(1, 1000, 0, &disk).is_err());
        assert!(try_it(u64::MAX, 2, 0, &disk).is_err());
        assert!(try_it(0, 0, 0, &disk).is_err());
        assert_eq!(try_it(0, 8, 1, &disk).unwrap_err().status(), BLKIF_RSP_EOPNOTSUPP);
        assert_eq!(try_it(0, 8, 0, &DISK).unwrap_err().status(), BLKIF_RSP_EOPNOTSUPP);
        assert!(try_it(0, 8, 0, &Geometry { read_only: true, ..disk }).is_err());
        let secure = Some(Discard { granularity: 512, alignment: 0, secure: true });
        let fine = try_it(0, 8, 1, &Geometry { discard: secure, ..DISK }).unwrap();
        assert_eq!(fine.kind, Kind::Discard { secure: true });
    }

    /// All 65,536 segments, in direct and indirect requests of both layouts: taken is what lies in its page, in whole sectors.
    #[test]
    fn every_pair_of_sectors() {
        use zerocopy::IntoBytes;
        let mut prepared = Prepared::default();
        for logical in [512u32, 4096] {
            let disk = Geometry { logical, physical: logical, ..DISK };
            for (first, last) in (0..=u8::MAX).flat_map(|f| (0..=u8::MAX).map(move |l| (f, l))) {
                let whole = logical == 512 || (first == 0 && last == 7);
                let fine = first <= last && last < 8 && whole;
                let segment = BlkifRequestSegment::new(7, first, last);
                let len = fine.then(|| (u64::from(last) + 1 - u64::from(first)) * SECTOR);
                for abi in [Abi::X86_64, Abi::X86_32] {
                    let direct = abi.encode(&Request::Direct(request(BLKIF_OP_READ, 8, &[(first, last)])));
                    let checked = prepared.check(abi, &direct[..abi.entry_size()], &[], &disk);
                    assert_eq!(checked.ok().map(|()| prepared.len), len, "{first} {last}");
                    let indirect = abi.encode(&Request::Indirect(indirect(BLKIF_OP_WRITE, 1, 8)));
                    let checked =
                        prepared.check(abi, &indirect[..abi.entry_size()], segment.as_bytes(), &disk);
                    assert_eq!(checked.ok().map(|()| prepared.len), len, "{first} {last}");
                }
            }
        }
    }

    /// Every combination of the values at the edges of every field, in both layouts and with both sizes of sectors: what passes lies on
    /// the disk and in its pages, to the byte.
    #[test]
    fn every_small_field() {
        let discard = Some(Discard { granularity: 512, alignment: 0, secure: true });
        let sectors = [0, 1, 7, 8, 991, 992, 999, 1000, u64::MAX - 7, u64::MAX];
        let edges = [0, 1, 3, 4, 7, 8, 255];
        let (mut passed, mut refused) = (0, 0);
        let mut prepared = Prepared::default();
        let mut judge = |slot: &[u8], abi: Abi, extra: &[u8], disk: &Geometry| {
            if prepared.check(abi, slot, extra, disk).is_err() {
                assert!(!prepared.has_data());
                refused += 1;
                return;
            }
            passed += 1;
            let unit = u64::from(disk.logical);
            assert!(
                prepared.offset.checked_add(prepared.len).is_some_and(|end| end <= disk.sectors * SECTOR)
            );
            assert!(prepared.offset.is_multiple_of(unit) && prepared.len.is_multiple_of(unit));
            for segment in &prepared.segments {
                let (offset, len) = (u64::from(segment.offset), u64::from(segment.len));
                assert!(
                    len > 0
                        && offset + len <= 4096
                        && offset.is_multiple_of(unit)
                        && len.is_multiple_of(unit)
                );
            }
        };
        for abi in [Abi::X86_64, Abi::X86_32] {
            for logical in [512, 4096] {
                let disk = Geometry { logical, physical: logical, discard, ..DISK };
                for operation in 0..=8 {
                    for sector_number in sectors {
                        for (first, last) in edges.iter().flat_map(|f| edges.iter().map(move |l| (*f, *l))) {
                            for nr_segments in [0, 1, 2, 11, 12, 255] {
                                let mut direct = request(operation, sector_number, &[(0, 7); 11]);
                                direct.nr_segments = nr_segments;
                                direct.seg[usize::from(nr_segments).clamp(1, 11) - 1] =
                                    BlkifRequestSegment::new(7, first, last);
                                judge(
                                    &abi.encode(&Request::Direct(direct))[..abi.entry_size()],
                                    abi,
                                    &[],
                                    &disk,
                                );
                            }
                        }
                        for nr_sectors in sectors {
                            for flag in [0, 1, 2, 255] {
                                let discard = BlkifRequestDiscard {
                                    operation: blkif::BLKIF_OP_DISCARD,
                                    flag,
                                    sector_number,
                                    nr_sectors,
                                    ..Default::default()
                                };
                                judge(
                                    &abi.encode(&Request::Discard(discard))[..abi.entry_size()],
                                    abi,
                                    &[],
                                    &disk,
                                );
                            }
                        }
                        for nr_segments in [0, 1, 2, 255, 256, 257, u16::MAX] {
                            for there in [0usize, 8, 16, 2040, 2048] {
                                let request = indirect(operation, nr_segments, sector_number);
                                let slot = abi.encode(&Request::Indirect(request));
                                let extra = [5, 0, 0, 0, 0, 7, 0, 0].repeat(there / 8);
                                judge(&slot[..abi.entry_size()], abi, &extra, &disk);
                            }
                        }
                    }
                }
            }
        }
        assert!(passed > 1000 && refused > 10_000, "{passed} passed, {refused} refused");
    }

    proptest! {
        /// Whatever bytes a frontend writes: no panic, and what passes lies on the disk and in its pages.
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..=112), op in 0u8..8, nr in 0u8..14,
                     sector in 0u64..1100, abi in prop_oneof![Just(Abi::X86_64), Just(Abi::X86_32)], plain: bool,
                     extra in proptest::collection::vec(any::<u8>(), 0..100), logical in prop_oneof![Just(512u32), Just(4096)]) {
            let mut bytes = bytes;
            let disk = Geometry {
                logical,
                discard: Some(Discard { granularity: 512, alignment: 0, secure: false }),
                ..DISK
            };
            if plain && bytes.len() >= 24 {
                (bytes[0], bytes[1]) = (op, nr);
                let at = if abi == Abi::X86_64 { 16 } else { 12 };
                bytes[at..at + 8].copy_from_slice(&sector.to_le_bytes());
            }
            let mut prepared = Prepared::default();
            let page = indirect_page(abi, &bytes);
            prop_assert!(page.is_none_or(|(_, len)| (8..=MAX_INDIRECT_BYTES).contains(&(len as usize))));
            if prepared.check(abi, &bytes, &extra, &disk).is_ok() {
                prop_assert!(prepared.offset + prepared.len <= DISK.sectors * SECTOR);
                prop_assert!(prepared.offset.is_multiple_of(u64::from(logical)) && prepared.len.is_multiple_of(u64::from(logical)));
                if prepared.has_data() {
                    prop_assert!(prepared.len as usize <= MAX_OPERATION_BYTES);
                    prop_assert_eq!(prepared.segments.iter().map(|s| u64::from(s.len)).sum::<u64>(), prepared.len);
                }
                prop_assert!(prepared.segments.iter().all(|s| s.offset + s.len <= 4096 && s.len >= 512));
            }
            let format = BlkifFormat(abi);
            let mut out = vec![0; format.rsp_size()];
            bytes.resize(format.req_size(), 0);
            format.response(&bytes, 0, 0, &mut out);
        }
    }
}

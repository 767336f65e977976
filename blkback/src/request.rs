//! From the copied bytes of a ring slot to a checked request.
//!
//! Nothing of a [`Prepared`] is an allegation any more: its range lies on the disk, its segments inside their pages. Only the
//! grant references are still the frontend's word; hv-core judges those.

use domain_kit::journal::RingFormat;
use xen_abi::io::blkif::{
    self, Abi, BLKIF_MAX_SEGMENTS_PER_REQUEST, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_READ, BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER, BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BlkifRequest, MAX_ENTRY_SIZE, Request,
};

/// Bytes of the unit of all of blkif's sector numbers.
pub const SECTOR: u64 = blkif::SECTOR_SIZE as u64;
/// Most bytes of one request without indirect segments.
pub const MAX_REQUEST_BYTES: usize = BLKIF_MAX_SEGMENTS_PER_REQUEST as usize * 4096;

/// What of the disk a request is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskShape {
    /// Units of 512 bytes on it.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
}

/// What a request wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Disk to guest.
    #[default]
    Read,
    /// Guest to disk.
    Write,
    /// Everything answered before is on the medium when this is answered; with segments, then a write.
    Flush,
    /// Nothing overtakes it in either direction; a flush, a write if there are segments, a flush.
    Barrier,
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
    /// Bytes, the sum of the segments.
    pub len: u32,
    /// Where in the guest, in order.
    pub segments: Vec<Segment>,
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
    /// Checks a copied ring slot. What is in `self` before is overwritten; its memory is used again.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&mut self, abi: Abi, slot: &[u8], disk: &DiskShape) -> Result<(), Refusal> {
        self.segments.clear();
        self.len = 0;
        self.offset = 0;
        match decode(abi, slot) {
            Request::Direct(request) => self.direct(&request, disk),
            other => Err(Refusal::Unsupported(other.operation())),
        }
    }

    fn direct(&mut self, request: &BlkifRequest, disk: &DiskShape) -> Result<(), Refusal> {
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
        let mut sectors = 0u64;
        for segment in segments {
            let count = segment.sectors().ok_or(Refusal::Invalid("a segment leaves its page"))?;
            sectors += u64::from(count);
            self.segments.push(Segment {
                gref: segment.gref,
                offset: u16::from(segment.first_sect) * SECTOR as u16,
                len: count as u16 * SECTOR as u16,
            });
        }
        if sectors > 0 {
            let end = request.sector_number.checked_add(sectors);
            if end.is_none_or(|end| end > disk.sectors) {
                return Err(Refusal::Invalid("beyond the end of the disk"));
            }
            if disk.read_only && self.kind != Kind::Read {
                return Err(Refusal::Invalid("a write to a read-only disk"));
            }
            // Below disk.sectors, which is bytes / 512: no overflow.
            self.offset = request.sector_number * SECTOR;
            self.len = (sectors * SECTOR) as u32;
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
    use proptest::prelude::*;
    use xen_abi::io::blkif::BlkifRequestSegment;

    const DISK: DiskShape = DiskShape { sectors: 1000, read_only: false };

    fn check(request: BlkifRequest, disk: &DiskShape) -> Result<Prepared, Refusal> {
        let mut prepared = Prepared::default();
        for abi in [Abi::X86_64, Abi::X86_32] {
            let slot = abi.encode(&Request::Direct(request));
            prepared.check(abi, &slot[..abi.entry_size()], disk)?;
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
        for operation in [4, 5, 6, 7, 255] {
            let e = check(request(operation, 0, &[(0, 7)]), &DISK).unwrap_err();
            assert_eq!(e.status(), BLKIF_RSP_EOPNOTSUPP);
        }
        let read_only = DiskShape { read_only: true, ..DISK };
        assert!(check(request(BLKIF_OP_WRITE, 0, &[(0, 0)]), &read_only).is_err());
        assert!(check(request(BLKIF_OP_WRITE_BARRIER, 0, &[(0, 0)]), &read_only).is_err());
        assert!(check(request(BLKIF_OP_READ, 0, &[(0, 0)]), &read_only).is_ok());
    }

    proptest! {
        /// Whatever bytes a frontend writes: no panic, and what passes lies on the disk and in its pages.
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..=112), op in 0u8..4, nr in 0u8..14,
                     sector in 0u64..1100, abi in prop_oneof![Just(Abi::X86_64), Just(Abi::X86_32)], plain: bool) {
            let mut bytes = bytes;
            if plain && bytes.len() >= 24 {
                (bytes[0], bytes[1]) = (op, nr);
                let at = if abi == Abi::X86_64 { 16 } else { 12 };
                bytes[at..at + 8].copy_from_slice(&sector.to_le_bytes());
            }
            let mut prepared = Prepared::default();
            if prepared.check(abi, &bytes, &DISK).is_ok() {
                prop_assert!(prepared.offset + u64::from(prepared.len) <= DISK.sectors * SECTOR);
                prop_assert!(prepared.len as usize <= MAX_REQUEST_BYTES);
                prop_assert_eq!(prepared.segments.iter().map(|s| u32::from(s.len)).sum::<u32>(), prepared.len);
                prop_assert!(prepared.segments.iter().all(|s| s.offset + s.len <= 4096 && s.len >= 512));
            }
            let format = BlkifFormat(abi);
            let mut out = vec![0; format.rsp_size()];
            bytes.resize(format.req_size(), 0);
            format.response(&bytes, 0, 0, &mut out);
        }
    }
}

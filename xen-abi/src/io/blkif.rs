//! `io/blkif.h`: the block device protocol, with the entry layouts of x86_64 and of x86_32 frontends.
//!
//! A ring slot is copied out once as bytes and decoded by its frontend's [`Abi`] into a [`Request`], whose fields
//! are still allegations: check `nr_segments`, the segments' sectors and the grant references before use.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of the unit of `sector_number`, `first_sect` and `last_sect`, whatever the device's sector size is.
pub const SECTOR_SIZE: u32 = 512;
/// Units of [`SECTOR_SIZE`] in a page, the bound of `last_sect`.
pub const SECTORS_PER_PAGE: u32 = 8;
/// Entries of [`BlkifRequestSegment`] in one indirect page.
pub const SEGMENTS_PER_INDIRECT_PAGE: u32 = 512;

consts! { "io/blkif.h";
    u8 {
        BLKIF_OP_READ = 0;
        BLKIF_OP_WRITE = 1;
        /// A write (or none) that no request may overtake in either direction.
        BLKIF_OP_WRITE_BARRIER = 2;
        /// What was answered before is on the medium when this is answered.
        BLKIF_OP_FLUSH_DISKCACHE = 3;
        BLKIF_OP_DISCARD = 5;
        /// A read or write whose segments lie in granted pages.
        BLKIF_OP_INDIRECT = 6;
        /// Flag of a discard: the data must be unrecoverable.
        BLKIF_DISCARD_SECURE = 1;
    }
    u32 {
        BLKIF_MAX_SEGMENTS_PER_REQUEST = 11;
        BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST = 8;
        /// Bit of the backend's `info` node.
        VDISK_CDROM = 1;
        /// Bit of the backend's `info` node.
        VDISK_REMOVABLE = 2;
        /// Bit of the backend's `info` node.
        VDISK_READONLY = 4;
    }
    i16 {
        BLKIF_RSP_OKAY = 0;
        BLKIF_RSP_ERROR = -1;
        /// The frontend stops using the operation.
        BLKIF_RSP_EOPNOTSUPP = -2;
    }
}

/// Names of the nodes that blkfront and blkback exchange (`xen/io/blkif.h`).
pub mod node {
    /// Backend: write barriers work.
    pub const FEATURE_BARRIER: &str = "feature-barrier";
    /// Backend: flushes work.
    pub const FEATURE_FLUSH_CACHE: &str = "feature-flush-cache";
    /// Backend: discards work.
    pub const FEATURE_DISCARD: &str = "feature-discard";
    /// Backend: secure discards work.
    pub const DISCARD_SECURE: &str = "discard-secure";
    /// Backend: bytes from the start to the first discardable unit.
    pub const DISCARD_ALIGNMENT: &str = "discard-alignment";
    /// Backend: bytes of a discardable unit.
    pub const DISCARD_GRANULARITY: &str = "discard-granularity";
    /// Both: grants may stay mapped between requests.
    pub const FEATURE_PERSISTENT: &str = "feature-persistent";
    /// Backend: most segments of an indirect request.
    pub const FEATURE_MAX_INDIRECT_SEGMENTS: &str = "feature-max-indirect-segments";
    /// Backend: log2 of the most pages of a ring.
    pub const MAX_RING_PAGE_ORDER: &str = "max-ring-page-order";
    /// Backend: most pages of a ring; the older way to say it.
    pub const MAX_RING_PAGES: &str = "max-ring-pages";
    /// Frontend: pages of its ring; the older way to say it.
    pub const NUM_RING_PAGES: &str = "num-ring-pages";
    /// Frontend: log2 of the pages of its ring.
    pub const RING_PAGE_ORDER: &str = "ring-page-order";
    /// Backend: most queues.
    pub const MULTI_QUEUE_MAX_QUEUES: &str = "multi-queue-max-queues";
    /// Frontend: number of queues.
    pub const MULTI_QUEUE_NUM_QUEUES: &str = "multi-queue-num-queues";
    /// Frontend: grant reference of the ring; with more than one page `ring-ref0` and up.
    pub const RING_REF: &str = "ring-ref";
    /// Frontend: its port.
    pub const EVENT_CHANNEL: &str = "event-channel";
    /// Frontend: name of its [`Abi`](super::Abi).
    pub const PROTOCOL: &str = "protocol";
    /// Backend: units of [`SECTOR_SIZE`](super::SECTOR_SIZE) on the device.
    pub const SECTORS: &str = "sectors";
    /// Backend: bytes of a logical sector.
    pub const SECTOR_SIZE: &str = "sector-size";
    /// Backend: bytes of a physical sector.
    pub const PHYSICAL_SECTOR_SIZE: &str = "physical-sector-size";
    /// Backend: `VDISK_*` bits.
    pub const INFO: &str = "info";
    /// Both: the device's number, major and minor in Linux's old encoding.
    pub const VIRTUAL_DEVICE: &str = "virtual-device";
    /// Frontend: it takes all sector numbers in units of `sector-size`.
    pub const FEATURE_LARGE_SECTOR_SIZE: &str = "feature-large-sector-size";
    /// Toolstack, in the backend's directory: 0 if discards are not to be offered.
    pub const DISCARD_ENABLE: &str = "discard-enable";
    /// Toolstack, in both directories: "disk" or "cdrom".
    pub const DEVICE_TYPE: &str = "device-type";
    /// Toolstack, in the backend's directory: 1 for a medium that can be taken out.
    pub const REMOVABLE: &str = "removable";
    /// Backend: "connected" once there is a disk to offer.
    pub const HOTPLUG_STATUS: &str = "hotplug-status";
    /// Backend: "r" or "w"; "w!" for a disk that several write.
    pub const MODE: &str = "mode";
}

abi! { "io/blkif.h";
    /// A run of sectors within one granted page; the same bytes in both ABIs.
    pub struct BlkifRequestSegment("struct blkif_request_segment") [8] {
        gref: u32 = 0,
        /// First 512-byte unit of the page, 0 to 7.
        first_sect: u8 = 4,
        /// Last 512-byte unit of the page, inclusive, not below `first_sect`.
        last_sect: u8 = 5,
        _pad: u16 = 6,
    }
    /// A read, write, barrier or flush.
    pub struct BlkifRequest("struct blkif_request") [112] {
        operation: u8 = 0,
        nr_segments: u8 = 1,
        handle: u16 = 2,
        _pad: u32 = 4,
        /// Echoed in the response.
        id: u64 = 8,
        /// First sector on the disk, in units of 512 bytes.
        sector_number: u64 = 16,
        seg: [BlkifRequestSegment; BLKIF_MAX_SEGMENTS_PER_REQUEST as usize] = 24,
    }
    /// A discard.
    pub struct BlkifRequestDiscard("struct blkif_request_discard") [32] {
        operation: u8 = 0,
        /// [`BLKIF_DISCARD_SECURE`] or 0.
        flag: u8 = 1,
        handle: u16 = 2,
        _pad: u32 = 4,
        id: u64 = 8,
        sector_number: u64 = 16,
        /// In units of 512 bytes.
        nr_sectors: u64 = 24,
    }
    /// A read or write of more than 11 segments.
    pub struct BlkifRequestIndirect("struct blkif_request_indirect") [64] {
        operation: u8 = 0,
        /// [`BLKIF_OP_READ`] or [`BLKIF_OP_WRITE`].
        indirect_op: u8 = 1,
        /// Segments in all indirect pages together.
        nr_segments: u16 = 2,
        _pad0: u32 = 4,
        id: u64 = 8,
        sector_number: u64 = 16,
        handle: u16 = 24,
        _pad1: u16 = 26,
        indirect_grefs: [u32; BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST as usize] = 28,
        _pad2: u32 = 60,
    }
    /// A response.
    pub struct BlkifResponse("struct blkif_response") [16] {
        id: u64 = 0,
        operation: u8 = 8,
        _pad0: u8 = 9,
        /// `BLKIF_RSP_*`.
        status: i16 = 10,
        _pad1: u32 = 12,
    }
}

/// The same structs as a 32-bit x86 frontend lays them out: 64-bit fields are aligned to 4 bytes.
pub mod x86_32 {
    use super::*;

    abi! { "io/blkif.h";
        /// A read, write, barrier or flush.
        pub struct BlkifRequest32("struct blkif_request") [108] {
            operation: u8 = 0,
            nr_segments: u8 = 1,
            handle: U16 = 2,
            id: U64 = 4,
            sector_number: U64 = 12,
            seg: [BlkifRequestSegment; BLKIF_MAX_SEGMENTS_PER_REQUEST as usize] = 20,
        }
        /// A discard.
        pub struct BlkifRequestDiscard32("struct blkif_request_discard") [28] {
            operation: u8 = 0,
            flag: u8 = 1,
            handle: U16 = 2,
            id: U64 = 4,
            sector_number: U64 = 12,
            nr_sectors: U64 = 20,
        }
        /// A read or write of more than 11 segments.
        pub struct BlkifRequestIndirect32("struct blkif_request_indirect") [64] {
            operation: u8 = 0,
            indirect_op: u8 = 1,
            nr_segments: U16 = 2,
            id: U64 = 4,
            sector_number: U64 = 12,
            handle: U16 = 20,
            _pad0: U16 = 22,
            indirect_grefs: [U32; BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST as usize] = 24,
            _pad1("pad"): U64 = 56,
        }
        /// A response.
        pub struct BlkifResponse32("struct blkif_response") [12] {
            id: U64 = 0,
            operation: u8 = 8,
            _pad: u8 = 9,
            status: zerocopy::little_endian::I16 = 10,
        }
    }
}
use x86_32::{BlkifRequest32, BlkifRequestDiscard32, BlkifRequestIndirect32, BlkifResponse32};

/// Converts between the two layouts field by field; padding becomes zero.
macro_rules! convert {
    ($a:ident, $b:ident { $($field:ident),* } $(, $array:ident)?) => {
        convert!(@one $a, $b, $($field),* $(, [$array])?);
        convert!(@one $b, $a, $($field),* $(, [$array])?);
    };
    (@one $a:ident, $b:ident, $($field:ident),* $(, [$array:ident])?) => {
        impl From<$a> for $b {
            fn from(from: $a) -> Self {
                let mut to = Self::default();
                $( to.$field = from.$field.into(); )*
                $( to.$array = from.$array.map(Into::into); )?
                to
            }
        }
    };
}
convert!(BlkifRequest, BlkifRequest32 { operation, nr_segments, handle, id, sector_number }, seg);
convert!(
    BlkifRequestDiscard,
    BlkifRequestDiscard32 { operation, flag, handle, id, sector_number, nr_sectors }
);
convert!(
    BlkifRequestIndirect,
    BlkifRequestIndirect32 { operation, indirect_op, nr_segments, id, sector_number, handle },
    indirect_grefs
);
convert!(BlkifResponse, BlkifResponse32 { id, operation, status });

impl BlkifRequestSegment {
    /// A segment of the sectors `first_sect` to `last_sect`, both inclusive.
    pub const fn new(gref: u32, first_sect: u8, last_sect: u8) -> Self {
        Self { gref, first_sect, last_sect, _pad: 0 }
    }

    /// How many 512-byte units it covers, 1 to 8; `None` if it leaves its page or ends before it starts.
    pub const fn sectors(&self) -> Option<u32> {
        if self.first_sect > self.last_sect || self.last_sect as u32 >= SECTORS_PER_PAGE {
            return None;
        }
        Some((self.last_sect - self.first_sect) as u32 + 1)
    }
}

impl BlkifRequest {
    /// The segments, or `None` if the frontend claims more than there can be.
    pub fn segments(&self) -> Option<&[BlkifRequestSegment]> {
        self.seg.get(..usize::from(self.nr_segments))
    }
}

/// A copied request by operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read, write, barrier or flush.
    Direct(BlkifRequest),
    /// Discard.
    Discard(BlkifRequestDiscard),
    /// Indirect read or write.
    Indirect(BlkifRequestIndirect),
    /// An operation that the header doesn't define; answer it with [`BLKIF_RSP_EOPNOTSUPP`].
    Unknown {
        /// As given.
        operation: u8,
        /// To be echoed.
        id: u64,
    },
}

impl Request {
    /// The id to echo in the response.
    pub const fn id(&self) -> u64 {
        match self {
            Self::Direct(request) => request.id,
            Self::Discard(request) => request.id,
            Self::Indirect(request) => request.id,
            Self::Unknown { id, .. } => *id,
        }
    }

    /// The operation to echo in the response: of an indirect request it is the one that it stands for. `blkif.h` does not
    /// say so, but Linux's xen-blkfront takes any other for a lie and disables the disk.
    pub const fn operation(&self) -> u8 {
        match self {
            Self::Direct(request) => request.operation,
            Self::Discard(request) => request.operation,
            Self::Indirect(request) => request.indirect_op,
            Self::Unknown { operation, .. } => *operation,
        }
    }
}

/// How a frontend lays out its ring, named by its `protocol` node (`xen/io/protocols.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// `x86_64-abi`, 112-byte slots.
    X86_64,
    /// `x86_32-abi`, 108-byte slots.
    X86_32,
}

/// The greatest slot of any [`Abi`] in bytes, and how many bytes [`Abi::decode`] looks at.
pub const MAX_ENTRY_SIZE: usize = size_of::<BlkifRequest>();

impl Abi {
    /// The ABI of a frontend that writes no `protocol` node to an x86_64 backend.
    pub const NATIVE: Self = Self::X86_64;

    /// The ABI by the text of the `protocol` node.
    pub fn from_protocol(protocol: &str) -> Option<Self> {
        match protocol {
            "x86_64-abi" => Some(Self::X86_64),
            "x86_32-abi" => Some(Self::X86_32),
            _ => None,
        }
    }

    /// The text of the `protocol` node.
    pub const fn protocol(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-abi",
            Self::X86_32 => "x86_32-abi",
        }
    }

    /// Bytes of a slot, by which [`super::ring`] computes sizes and offsets.
    pub const fn entry_size(self) -> usize {
        match self {
            Self::X86_64 => size_of::<BlkifRequest>(),
            Self::X86_32 => size_of::<BlkifRequest32>(),
        }
    }

    /// Bytes of a response at the start of its slot.
    pub const fn response_size(self) -> usize {
        match self {
            Self::X86_64 => size_of::<BlkifResponse>(),
            Self::X86_32 => size_of::<BlkifResponse32>(),
        }
    }

    /// Decodes the private copy of a slot; bytes beyond this ABI's [`Self::entry_size`] are not looked at.
    pub fn decode(self, slot: &[u8; MAX_ENTRY_SIZE]) -> Request {
        fn view<A: FromBytes, T: From<A> + Default>(slot: &[u8]) -> T {
            const { assert!(size_of::<A>() <= MAX_ENTRY_SIZE) };
            A::read_from_prefix(slot).map_or_else(|_| T::default(), |(value, _)| value.into())
        }
        match (slot[0], self) {
            (BLKIF_OP_READ..=BLKIF_OP_FLUSH_DISKCACHE, Self::X86_64) => {
                Request::Direct(view::<BlkifRequest, _>(slot))
            }
            (BLKIF_OP_READ..=BLKIF_OP_FLUSH_DISKCACHE, Self::X86_32) => {
                Request::Direct(view::<BlkifRequest32, _>(slot))
            }
            (BLKIF_OP_DISCARD, Self::X86_64) => Request::Discard(view::<BlkifRequestDiscard, _>(slot)),
            (BLKIF_OP_DISCARD, Self::X86_32) => Request::Discard(view::<BlkifRequestDiscard32, _>(slot)),
            (BLKIF_OP_INDIRECT, Self::X86_64) => Request::Indirect(view::<BlkifRequestIndirect, _>(slot)),
            (BLKIF_OP_INDIRECT, Self::X86_32) => Request::Indirect(view::<BlkifRequestIndirect32, _>(slot)),
            (operation, Self::X86_64) => {
                Request::Unknown { operation, id: view::<BlkifRequest, BlkifRequest>(slot).id }
            }
            (operation, Self::X86_32) => {
                Request::Unknown { operation, id: view::<BlkifRequest32, BlkifRequest>(slot).id }
            }
        }
    }

    /// Encodes a request as a slot; only the first [`Self::entry_size`] bytes are to be written to the ring.
    pub fn encode(self, request: &Request) -> [u8; MAX_ENTRY_SIZE] {
        let mut slot = [0; MAX_ENTRY_SIZE];
        let mut put = |bytes: &[u8]| slot[..bytes.len()].copy_from_slice(bytes);
        match (*request, self) {
            (Request::Direct(r), Self::X86_64) => put(r.as_bytes()),
            (Request::Direct(r), Self::X86_32) => put(BlkifRequest32::from(r).as_bytes()),
            (Request::Discard(r), Self::X86_64) => put(r.as_bytes()),
            (Request::Discard(r), Self::X86_32) => put(BlkifRequestDiscard32::from(r).as_bytes()),
            (Request::Indirect(r), Self::X86_64) => put(r.as_bytes()),
            (Request::Indirect(r), Self::X86_32) => put(BlkifRequestIndirect32::from(r).as_bytes()),
            (Request::Unknown { operation, id }, abi) => {
                return abi.encode(&Request::Direct(BlkifRequest { operation, id, ..Default::default() }));
            }
        }
        slot
    }

    /// Decodes the private copy of a response.
    pub fn decode_response(self, bytes: &[u8; size_of::<BlkifResponse>()]) -> BlkifResponse {
        match self {
            Self::X86_64 => BlkifResponse::read_from_bytes(bytes).unwrap_or_default(),
            Self::X86_32 => BlkifResponse32::read_from_prefix(bytes)
                .map(|(response, _)| response.into())
                .unwrap_or_default(),
        }
    }

    /// Encodes a response, padding zeroed (XSA-216); only the first [`Self::response_size`] bytes are to be written.
    pub fn encode_response(self, id: u64, operation: u8, status: i16) -> [u8; size_of::<BlkifResponse>()] {
        let response = BlkifResponse { id, operation, status, ..Default::default() };
        let mut bytes = [0; size_of::<BlkifResponse>()];
        match self {
            Self::X86_64 => bytes.copy_from_slice(response.as_bytes()),
            Self::X86_32 => {
                let response = BlkifResponse32::from(response);
                bytes[..size_of_val(&response)].copy_from_slice(response.as_bytes());
            }
        }
        bytes
    }
}

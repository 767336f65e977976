//! From slots to packets and back: the netif wire format (`io/netif.h`, "Guest transmit" and "Guest receive").
//!
//! Works on private copies only and decides nothing by itself but form: every length, offset and chain is checked
//! before anything is used (the class of XSA-423, 432, 448).

use xen_abi::PAGE_SIZE;
use xen_abi::io::netif::*;

use crate::offload::{Family, Gso, Meta};

/// Slots with data that a packet may have at most; what every frontend may use.
pub const MAX_DATA_SLOTS: usize = XEN_NETIF_NR_SLOTS_MIN as usize;
/// Beyond so many slots of one packet, extra info included, the frontend is broken and the ring is given up.
pub const FATAL_SLOTS: usize = 32;
/// Smallest packet: an Ethernet header.
pub const MIN_PACKET: usize = 14;
/// Largest packet towards a frontend: 64 KiB of IP and an Ethernet header.
pub const MAX_RX_PACKET: usize = 65535 + MIN_PACKET;

/// What a tx slot is; follows from the slots before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A packet's first request.
    First = 0,
    /// Extra info; answered with [`NETIF_RSP_NULL`].
    Extra = 1,
    /// A further request of a packet.
    Fragment = 2,
}

impl Kind {
    /// From its number.
    pub fn from_u8(kind: u8) -> Option<Kind> {
        [Kind::First, Kind::Extra, Kind::Fragment].into_iter().find(|k| *k as u8 == kind)
    }
}

/// Tells the kinds of a sequence of tx slots.
#[derive(Clone, Copy, Debug)]
pub struct KindScanner {
    next: Kind,
    /// The packet goes on behind its extra info.
    more_data: bool,
}

impl Default for KindScanner {
    fn default() -> Self {
        KindScanner { next: Kind::First, more_data: false }
    }
}

impl KindScanner {
    /// The kind of the next slot.
    pub fn next(&mut self, slot: &TxSlot) -> Kind {
        let kind = self.next;
        let more = |more_data| if more_data { Kind::Fragment } else { Kind::First };
        self.next = match kind {
            Kind::Extra if slot.extra_info().more() => Kind::Extra,
            Kind::Extra => more(self.more_data),
            Kind::First | Kind::Fragment => {
                let flags = slot.request().flags;
                self.more_data = flags & NETTXF_MORE_DATA != 0;
                if kind == Kind::First && flags & NETTXF_EXTRA_INFO != 0 {
                    Kind::Extra
                } else {
                    more(self.more_data)
                }
            }
        };
        kind
    }

    /// True between packets.
    pub fn at_boundary(&self) -> bool {
        self.next == Kind::First
    }
}

/// A piece of a packet in a granted page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// The page.
    pub gref: u32,
    /// First byte in it.
    pub offset: u16,
    /// Bytes, 0 allowed.
    pub len: u16,
}

/// What one packet's slots mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxItem {
    /// A packet to send.
    Packet(TxPacket),
    /// No packet: a change of the frontend's multicast filter. The request that carries it is a dummy.
    Multicast {
        /// Adds, else removes.
        add: bool,
        /// The group's Ethernet address.
        address: [u8; 6],
    },
}

/// A packet that the frontend wants sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TxPacket {
    /// Where it is, in order; the lengths add up to `len`.
    pub fragments: Vec<Fragment>,
    /// Bytes in all, at least [`MIN_PACKET`].
    pub len: usize,
    /// Checksum and segmentation.
    pub meta: Meta,
}

/// Why a packet is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPacket {
    /// More data slots than [`MAX_DATA_SLOTS`].
    #[error("too many slots")]
    TooManySlots,
    /// Less than an Ethernet header.
    #[error("too short")]
    TooShort,
    /// The slots hold more than the first one says the packet has.
    #[error("fragments are longer than the packet")]
    FragmentsTooLong,
    /// A slot's data leaves its page.
    #[error("data crosses the page")]
    CrossesPage,
    /// Extra info of a kind that was not offered, unknown, or there twice.
    #[error("bad extra info")]
    BadExtra,
    /// Segmentation of an unknown kind or to size 0.
    #[error("bad segmentation")]
    BadGso,
}

/// Why the ring has to be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FatalTx {
    /// The frontend published half a packet.
    #[error("a packet's last slots are missing")]
    Incomplete,
    /// More than [`FATAL_SLOTS`].
    #[error("a packet without an end")]
    Endless,
}

/// How many slots the packet at the front has.
///
/// # Errors
/// [`FatalTx`].
pub fn extent(slots: &[TxSlot]) -> Result<usize, FatalTx> {
    let mut scanner = KindScanner::default();
    for (i, slot) in slots.iter().enumerate().take(FATAL_SLOTS) {
        scanner.next(slot);
        if scanner.at_boundary() {
            return Ok(i + 1);
        }
    }
    Err(if slots.len() < FATAL_SLOTS { FatalTx::Incomplete } else { FatalTx::Endless })
}

/// Judges one packet; `slots` are exactly its slots as [`extent`] tells them.
///
/// # Errors
/// [`BadPacket`]: all of its slots are to be answered with an error.
pub fn parse(slots: &[TxSlot]) -> Result<TxItem, BadPacket> {
    let mut scanner = KindScanner::default();
    // Each type of extra info once at most.
    let mut seen = 0u8;
    let mut multicast = None;
    let mut meta = Meta::default();
    let mut fragments: Vec<Fragment> = Vec::with_capacity(slots.len());
    let (mut total, mut rest) = (0, 0);
    for slot in slots {
        match scanner.next(slot) {
            Kind::Extra => {
                let info = slot.extra_info();
                let bit = 1u8.checked_shl(info.r#type.into()).unwrap_or(0);
                if bit == 0 || seen & bit != 0 {
                    return Err(BadPacket::BadExtra);
                }
                seen |= bit;
                match info.extra() {
                    Some(Extra::Gso { size, gso_type, features: _ }) => {
                        let family = match gso_type {
                            XEN_NETIF_GSO_TYPE_TCPV4 => Family::V4,
                            XEN_NETIF_GSO_TYPE_TCPV6 => Family::V6,
                            _ => return Err(BadPacket::BadGso),
                        };
                        if size == 0 {
                            return Err(BadPacket::BadGso);
                        }
                        meta.gso = Some(Gso { family, size });
                    }
                    Some(Extra::McastAdd(address)) => {
                        multicast = Some(TxItem::Multicast { add: true, address })
                    }
                    Some(Extra::McastDel(address)) => {
                        multicast.get_or_insert(TxItem::Multicast { add: false, address });
                    }
                    // Of use to nobody here: queues are chosen by what is computed on the bytes themselves.
                    Some(Extra::Hash { .. }) => {}
                    _ => return Err(BadPacket::BadExtra),
                }
            }
            kind => {
                let NetifTxRequest { gref, offset, flags, id: _, size } = slot.request();
                if kind == Kind::First {
                    total = usize::from(size);
                    meta.csum_blank = flags & NETTXF_CSUM_BLANK != 0;
                    meta.data_validated = flags & (NETTXF_CSUM_BLANK | NETTXF_DATA_VALIDATED) != 0;
                } else {
                    rest += usize::from(size);
                }
                fragments.push(Fragment { gref, offset, len: size });
            }
        }
    }
    if let Some(change) = multicast {
        return Ok(change);
    }
    if fragments.len() > MAX_DATA_SLOTS {
        return Err(BadPacket::TooManySlots);
    }
    if total < MIN_PACKET {
        return Err(BadPacket::TooShort);
    }
    // The first slot says the whole packet's size; its own part is what the others leave.
    let first = total.checked_sub(rest).ok_or(BadPacket::FragmentsTooLong)?;
    match fragments.first_mut() {
        Some(fragment) => fragment.len = first as u16,
        None => return Err(BadPacket::TooShort),
    }
    if fragments.iter().any(|f| usize::from(f.offset) + usize::from(f.len) > PAGE_SIZE) {
        return Err(BadPacket::CrossesPage);
    }
    Ok(TxItem::Packet(TxPacket { fragments, len: total, meta }))
}

/// A packet's hash as the frontend is told it: `hash_type` is a bit number of `XEN_NETIF_CTRL_HASH_TYPE_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketHash {
    /// Over which fields.
    pub hash_type: u8,
    /// Toeplitz.
    pub value: u32,
}

/// How a packet goes into rx slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxShape {
    /// Bytes, at most [`MAX_RX_PACKET`].
    pub len: usize,
    /// Checksum and segmentation.
    pub meta: Meta,
    /// Its hash, if the frontend asked for hashes.
    pub hash: Option<PacketHash>,
    /// Bytes that stay free at the start of each page, at most [`MAX_HEADROOM`].
    pub headroom: usize,
}

/// Largest headroom that a frontend may ask for: what XDP programs of Linux have.
pub const MAX_HEADROOM: usize = 256;

/// What one rx slot of a packet says and carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxPart {
    /// `len` bytes from `offset` of the packet, behind the headroom of the slot's page.
    Data {
        /// First byte in the packet.
        offset: usize,
        /// Bytes.
        len: usize,
        /// `NETRXF_*`.
        flags: u16,
    },
    /// No data: extra info.
    Extra {
        /// Which.
        extra: Extra,
        /// More of it follows.
        more: bool,
    },
}

impl RxShape {
    /// Extra info, in the order in which it goes behind the first slot.
    fn extras(&self) -> impl Iterator<Item = Extra> {
        let gso = self.meta.gso.map(|gso| Extra::Gso {
            size: gso.size,
            gso_type: match gso.family {
                Family::V4 => XEN_NETIF_GSO_TYPE_TCPV4,
                Family::V6 => XEN_NETIF_GSO_TYPE_TCPV6,
            },
            features: 0,
        });
        let xdp = (self.headroom > 0).then_some(Extra::Xdp { headroom: self.headroom as u16 });
        let hash = self.hash.map(|PacketHash { hash_type, value }| Extra::Hash {
            hash_type,
            algorithm: XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ as u8,
            value,
        });
        [gso, xdp, hash].into_iter().flatten()
    }

    fn room(&self) -> usize {
        PAGE_SIZE - self.headroom.min(MAX_HEADROOM)
    }

    /// Slots with data.
    pub fn data_slots(&self) -> usize {
        self.len.div_ceil(self.room()).max(1)
    }

    /// All slots.
    pub fn slots(&self) -> usize {
        self.data_slots() + self.extras().count()
    }

    /// The `index`th slot (below [`RxShape::slots`]).
    pub fn part(&self, index: usize) -> RxPart {
        let extras = self.extras().count();
        if index > 0
            && let Some(extra) = self.extras().nth(index - 1)
        {
            return RxPart::Extra { extra, more: index < extras };
        }
        let data_index = if index == 0 { 0 } else { index - extras };
        let offset = data_index * self.room();
        let part = self.len.saturating_sub(offset).min(self.room());
        let mut flags = 0;
        if offset + part < self.len {
            flags |= NETRXF_MORE_DATA;
        }
        if index == 0 {
            if self.meta.csum_blank {
                flags |= NETRXF_CSUM_BLANK | NETRXF_DATA_VALIDATED;
            } else if self.meta.data_validated {
                flags |= NETRXF_DATA_VALIDATED;
            }
            if extras > 0 {
                flags |= NETRXF_EXTRA_INFO;
            }
        }
        RxPart::Data { offset, len: part, flags }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(slots: &[TxSlot]) -> Result<TxPacket, BadPacket> {
        parse(slots).map(|item| match item {
            TxItem::Packet(packet) => packet,
            other => panic!("{other:?}"),
        })
    }

    fn request(size: u16, offset: u16, flags: u16) -> TxSlot {
        NetifTxRequest { gref: 7, offset, flags, id: 1, size }.into()
    }

    fn gso(size: u16, gso_type: u8, more: bool) -> TxSlot {
        NetifExtraInfo::new(Extra::Gso { size, gso_type, features: 0 }, more).into()
    }

    #[test]
    fn a_packet_of_every_kind_of_slot() {
        let slots = [
            request(10_000, 100, NETTXF_CSUM_BLANK | NETTXF_EXTRA_INFO | NETTXF_MORE_DATA),
            gso(1448, XEN_NETIF_GSO_TYPE_TCPV4, false),
            request(4096, 0, NETTXF_MORE_DATA),
            request(4096, 0, 0),
            request(60, 0, 0),
        ];
        assert_eq!(extent(&slots), Ok(4));
        let packet = parsed(&slots[..4]).unwrap();
        assert_eq!(packet.len, 10_000);
        assert_eq!(packet.fragments[0], Fragment { gref: 7, offset: 100, len: 1808 });
        assert_eq!(packet.meta.gso, Some(Gso { family: Family::V4, size: 1448 }));
        assert!(packet.meta.csum_blank);
        assert_eq!(extent(&slots[4..]), Ok(1));
    }

    #[test]
    fn xsa_423_too_many_slots() {
        let mut slots = vec![request(60_000, 0, NETTXF_MORE_DATA)];
        slots.resize(MAX_DATA_SLOTS, request(1, 0, NETTXF_MORE_DATA));
        let mut good = slots.clone();
        good[MAX_DATA_SLOTS - 1] = request(1, 0, 0);
        assert_eq!(extent(&good), Ok(MAX_DATA_SLOTS));
        assert_eq!(parsed(&good), Err(BadPacket::CrossesPage), "the first slot cannot hold the rest");
        slots.push(request(1, 0, 0));
        assert_eq!(extent(&slots), Ok(MAX_DATA_SLOTS + 1));
        assert_eq!(parsed(&slots), Err(BadPacket::TooManySlots));
        let endless = vec![request(1, 0, NETTXF_MORE_DATA); 256];
        assert_eq!(extent(&endless), Err(FatalTx::Endless));
        assert_eq!(extent(&endless[..5]), Err(FatalTx::Incomplete));
    }

    #[test]
    fn xsa_432_split_headers() {
        // A header of one byte, the rest in further slots, is a packet like any other.
        let slots =
            [request(60, 4095, NETTXF_MORE_DATA), request(13, 0, NETTXF_MORE_DATA), request(46, 0, 0)];
        let packet = parsed(&slots).unwrap();
        assert_eq!(packet.fragments.iter().map(|f| f.len).collect::<Vec<_>>(), [1, 13, 46]);
    }

    #[test]
    fn xsa_448_zero_length_slots() {
        let slots = [request(60, 0, NETTXF_MORE_DATA), request(0, 0, NETTXF_MORE_DATA), request(0, 4096, 0)];
        assert_eq!(parsed(&slots).unwrap().fragments[1].len, 0);
        assert_eq!(parsed(&[request(0, 0, 0)]), Err(BadPacket::TooShort));
        assert_eq!(parsed(&[request(13, 0, 0)]), Err(BadPacket::TooShort));
        let all_in_second = [request(60, 4096, NETTXF_MORE_DATA), request(60, 0, 0)];
        assert_eq!(parsed(&all_in_second).unwrap().fragments[0].len, 0);
    }

    #[test]
    fn lengths_that_do_not_fit() {
        assert_eq!(parsed(&[request(100, 4000, 0)]), Err(BadPacket::CrossesPage));
        assert_eq!(parsed(&[request(100, u16::MAX, 0)]), Err(BadPacket::CrossesPage));
        let longer = [request(60, 0, NETTXF_MORE_DATA), request(61, 0, 0)];
        assert_eq!(parsed(&longer), Err(BadPacket::FragmentsTooLong));
        let extra = |e| [request(60, 0, NETTXF_EXTRA_INFO), e];
        assert_eq!(parsed(&extra(gso(0, 1, false))), Err(BadPacket::BadGso));
        assert_eq!(parsed(&extra(gso(9, 3, false))), Err(BadPacket::BadGso));
        assert_eq!(parsed(&extra(TxSlot([0; 12]))), Err(BadPacket::BadExtra));
        let twice = [request(60, 0, NETTXF_EXTRA_INFO), gso(9, 1, true), gso(9, 1, false)];
        assert_eq!(parsed(&twice), Err(BadPacket::BadExtra));
    }

    fn any_slot() -> impl Strategy<Value = TxSlot> {
        let sizes = prop_oneof![Just(0u16), Just(14), Just(4096), Just(u16::MAX), any::<u16>()];
        let offsets = prop_oneof![Just(0u16), Just(4095), Just(4096), any::<u16>()];
        prop_oneof![
            6 => (sizes, offsets, 0u16..16).prop_map(|(s, o, f)| request(s, o, f)),
            1 => any::<[u8; 12]>().prop_map(TxSlot),
            1 => (any::<u16>(), 0u8..4, any::<bool>()).prop_map(|(s, t, m)| gso(s, t, m)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// Whatever the slots: no panic, a packet's parts are inside their pages and add up.
        #[test]
        fn any_slots(slots in proptest::collection::vec(any_slot(), 0..64)) {
            let mut rest = &slots[..];
            while let Ok(n) = extent(rest) {
                prop_assert!((1..=FATAL_SLOTS).contains(&n));
                if let Ok(TxItem::Packet(packet)) = parse(&rest[..n]) {
                    let sum: usize = packet.fragments.iter().map(|f| usize::from(f.len)).sum();
                    prop_assert_eq!(sum, packet.len);
                    prop_assert!(packet.len >= MIN_PACKET && packet.len <= usize::from(u16::MAX));
                    prop_assert!(packet.fragments.len() <= MAX_DATA_SLOTS);
                    prop_assert!(packet.fragments.iter().all(|f| usize::from(f.offset) + usize::from(f.len) <= PAGE_SIZE));
                }
                rest = &rest[n..];
            }
        }

        #[test]
        fn rx_parts_cover_the_packet(
            len in 14usize..=MAX_RX_PACKET, large: bool, csum_blank: bool, xdp: bool,
            hash in proptest::option::of(any::<u32>()),
        ) {
            let gso = large.then_some(Gso { family: Family::V4, size: 1448 });
            let meta = Meta { csum_blank, data_validated: false, gso };
            let hash = hash.map(|value| PacketHash { hash_type: 1, value });
            let shape = RxShape { len, meta, hash, headroom: if xdp { MAX_HEADROOM } else { 0 } };
            let n = shape.slots();
            let extras = usize::from(large) + usize::from(xdp) + usize::from(hash.is_some());
            prop_assert!(n - extras <= MAX_DATA_SLOTS);
            let (mut at, mut seen) = (0, 0);
            for i in 0..n {
                match shape.part(i) {
                    RxPart::Extra { more, .. } => {
                        seen += 1;
                        prop_assert_eq!(i, seen, "extra info comes behind the first slot");
                        prop_assert_eq!(more, seen < extras);
                    }
                    RxPart::Data { offset, len: part, flags } => {
                        prop_assert_eq!(offset, at);
                        prop_assert!(part > 0 && part + shape.headroom <= PAGE_SIZE);
                        at += part;
                        prop_assert_eq!(flags & NETRXF_MORE_DATA != 0, at < len);
                        prop_assert_eq!(flags & NETRXF_EXTRA_INFO != 0, i == 0 && extras > 0);
                    }
                }
            }
            prop_assert_eq!((at, seen), (len, extras));
        }
    }

    #[test]
    fn multicast_changes_are_no_packets() {
        let add = Extra::McastAdd([1, 0, 0x5e, 0, 0, 1]);
        // Whatever the dummy request says of itself.
        let slots = [request(0, 5000, NETTXF_EXTRA_INFO), NetifExtraInfo::new(add, false).into()];
        assert_eq!(extent(&slots), Ok(2));
        assert_eq!(parse(&slots), Ok(TxItem::Multicast { add: true, address: [1, 0, 0x5e, 0, 0, 1] }));
        let twice = [slots[0], NetifExtraInfo::new(add, true).into(), NetifExtraInfo::new(add, false).into()];
        assert_eq!(parse(&twice), Err(BadPacket::BadExtra));
    }
}

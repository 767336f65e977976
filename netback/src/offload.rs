//! Checksum and segmentation offload: netif's flags and extra info against Linux's `virtio_net_hdr`.
//!
//! Both directions leave the checksum of TCP and UDP undone ("blank": the field holds the pseudo-header's sum) as
//! long as the receiver can finish it. What a frontend says about its packet is never believed: the headers are
//! parsed here on a private copy, and where they do not fit the packet is dropped.

/// Bytes of the virtio_net_hdr that the TAP carries before each packet (linux/virtio_net.h, without `num_buffers`).
pub const VNET_HDR_LEN: usize = 10;
/// Most bytes of headers that are looked at: Ethernet, IPv6 with extension headers, TCP.
pub const MAX_HEADERS: usize = 256;

/// linux/if_tun.h: packets without checksum are welcome.
pub const TUN_F_CSUM: u32 = 0x01;
/// linux/if_tun.h: large TCPv4 segments are welcome.
pub const TUN_F_TSO4: u32 = 0x02;
/// linux/if_tun.h: large TCPv6 segments are welcome.
pub const TUN_F_TSO6: u32 = 0x04;

const F_NEEDS_CSUM: u8 = 1;
const F_DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

const ETH_LEN: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const PROTO_TCP: u8 = 6;
const PROTO_UDP: u8 = 17;

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A packet to be segmented by whoever sends it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// TCP over which.
    pub family: Family,
    /// Bytes of payload in each segment, not 0.
    pub size: u16,
}

/// What is known of a packet beside its bytes, in neither side's terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// The TCP or UDP checksum is still to be made.
    pub csum_blank: bool,
    /// Somebody checked it.
    pub data_validated: bool,
    /// To be segmented.
    pub gso: Option<Gso>,
}

/// Linux's `struct virtio_net_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHdr {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl VnetHdr {
    /// Of a packet whose checksum is known to be right.
    pub fn validated() -> Self {
        VnetHdr { flags: F_DATA_VALID, ..VnetHdr::default() }
    }

    /// As the TAP wants it.
    pub fn to_bytes(self) -> [u8; VNET_HDR_LEN] {
        let mut out = [0; VNET_HDR_LEN];
        out[0] = self.flags;
        out[1] = self.gso_type;
        out[2..4].copy_from_slice(&self.hdr_len.to_le_bytes());
        out[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
        out[6..8].copy_from_slice(&self.csum_start.to_le_bytes());
        out[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
        out
    }

    /// As the TAP gives it.
    pub fn from_bytes(b: &[u8; VNET_HDR_LEN]) -> Self {
        let u16_at = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        VnetHdr {
            flags: b[0],
            gso_type: b[1],
            hdr_len: u16_at(2),
            gso_size: u16_at(4),
            csum_start: u16_at(6),
            csum_offset: u16_at(8),
        }
    }
}

/// Why a packet's headers do not fit what is said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    /// Headers reach beyond the packet, or beyond [`MAX_HEADERS`].
    #[error("headers are cut short")]
    Truncated,
    /// Checksum or segmentation asked for in what is not TCP or UDP over IP, or in a fragment.
    #[error("not TCP or UDP over IP, or a fragment")]
    NotTransport,
    /// Segmentation of another kind than the packet's protocol.
    #[error("segmentation does not fit the protocol")]
    GsoMismatch,
}

/// Where the transport header of a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    /// Over which.
    pub family: Family,
    /// TCP, else UDP.
    pub tcp: bool,
    /// First byte of the transport header in the packet.
    pub start: usize,
    /// Bytes from there that the IP header says there are (capped to the packet).
    pub len: usize,
    /// Sum over the pseudo-header, folded, not inverted.
    pub pseudo: u16,
}

impl Transport {
    /// Offset of the checksum field from [`Transport::start`].
    pub fn csum_offset(&self) -> usize {
        if self.tcp { 16 } else { 6 }
    }

    /// Finds TCP or UDP in a packet of `packet_len` bytes whose first bytes are `headers`.
    ///
    /// # Errors
    /// [`OffloadError::Truncated`], [`OffloadError::NotTransport`].
    pub fn find(headers: &[u8], packet_len: usize) -> Result<Transport, OffloadError> {
        match be16(headers, 12)? {
            ETHERTYPE_IPV4 => Self::find_v4(headers, packet_len),
            ETHERTYPE_IPV6 => Self::find_v6(headers, packet_len),
            _ => Err(OffloadError::NotTransport),
        }
    }

    fn find_v4(h: &[u8], packet_len: usize) -> Result<Transport, OffloadError> {
        let first = byte(h, ETH_LEN)?;
        let ihl = usize::from(first & 0xf) * 4;
        if first >> 4 != 4 || ihl < 20 {
            return Err(OffloadError::NotTransport);
        }
        // More fragments, or not the first one: the checksum covers more than is here.
        if be16(h, ETH_LEN + 6)? & 0x3fff != 0 {
            return Err(OffloadError::NotTransport);
        }
        let total = usize::from(be16(h, ETH_LEN + 2)?);
        let start = ETH_LEN + ihl;
        let len = Self::transport_len(total.checked_sub(ihl), start, packet_len)?;
        let addresses = h.get(ETH_LEN + 12..ETH_LEN + 20).ok_or(OffloadError::Truncated)?;
        Self::new(Family::V4, byte(h, ETH_LEN + 9)?, h, start, len, addresses)
    }

    fn find_v6(h: &[u8], packet_len: usize) -> Result<Transport, OffloadError> {
        let total = usize::from(be16(h, ETH_LEN + 4)?);
        let mut next = byte(h, ETH_LEN + 6)?;
        let mut start = ETH_LEN + 40;
        // Hop-by-hop, routing, destination options, authentication; a fragment header ends it.
        for _ in 0..8 {
            let bytes = match next {
                0 | 43 | 60 => (usize::from(byte(h, start + 1)?) + 1) * 8,
                51 => (usize::from(byte(h, start + 1)?) + 2) * 4,
                _ => break,
            };
            next = byte(h, start)?;
            start += bytes;
        }
        let len = Self::transport_len((total + ETH_LEN + 40).checked_sub(start), start, packet_len)?;
        let addresses = h.get(ETH_LEN + 8..ETH_LEN + 40).ok_or(OffloadError::Truncated)?;
        Self::new(Family::V6, next, h, start, len, addresses)
    }

    fn transport_len(said: Option<usize>, start: usize, packet_len: usize) -> Result<usize, OffloadError> {
        let there = packet_len.checked_sub(start).ok_or(OffloadError::Truncated)?;
        match said {
            Some(said) if said <= there => Ok(said),
            _ => Err(OffloadError::Truncated),
        }
    }

    fn new(
        family: Family,
        protocol: u8,
        h: &[u8],
        start: usize,
        len: usize,
        addresses: &[u8],
    ) -> Result<Transport, OffloadError> {
        let (tcp, least) = match protocol {
            PROTO_TCP => (true, 20),
            PROTO_UDP => (false, 8),
            _ => return Err(OffloadError::NotTransport),
        };
        if len < least || h.len() < start + least {
            return Err(OffloadError::Truncated);
        }
        let mut sum = Sum::default();
        sum.add(addresses);
        sum.add(&[0, protocol]);
        sum.add(&(len as u32).to_be_bytes());
        Ok(Transport { family, tcp, start, len, pseudo: sum.fold() })
    }

    /// Bytes of all headers up to the payload.
    fn header_len(&self, headers: &[u8]) -> Result<usize, OffloadError> {
        let transport = if self.tcp { usize::from(byte(headers, self.start + 12)? >> 4) * 4 } else { 8 };
        if transport < 8 || transport > self.len {
            return Err(OffloadError::Truncated);
        }
        Ok(self.start + transport)
    }
}

/// What to do to a packet before it goes to the TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToTap {
    /// Goes before it.
    pub hdr: VnetHdr,
    /// Two bytes to write over the packet's: (offset, value).
    pub patch: Option<(usize, [u8; 2])>,
}

/// Translates for a packet of `packet_len` bytes from a frontend, whose first bytes (up to [`MAX_HEADERS`]) are `headers`.
///
/// # Errors
/// [`OffloadError`]: drop it.
pub fn to_tap(meta: Meta, headers: &[u8], packet_len: usize) -> Result<ToTap, OffloadError> {
    let mut hdr = VnetHdr::default();
    // A packet to be segmented has a blank checksum by necessity; some frontends forget to say so.
    if !meta.csum_blank && meta.gso.is_none() {
        if meta.data_validated {
            hdr.flags = F_DATA_VALID;
        }
        return Ok(ToTap { hdr, patch: None });
    }
    let transport = Transport::find(headers, packet_len)?;
    hdr.flags = F_NEEDS_CSUM;
    hdr.csum_start = transport.start as u16;
    hdr.csum_offset = transport.csum_offset() as u16;
    let field = transport.start + transport.csum_offset();
    if let Some(gso) = meta.gso {
        if !transport.tcp || transport.family != gso.family {
            return Err(OffloadError::GsoMismatch);
        }
        let header_len = transport.header_len(headers)?;
        // What fits one segment is an ordinary packet.
        if packet_len - header_len > usize::from(gso.size) {
            hdr.gso_type = if gso.family == Family::V4 { GSO_TCPV4 } else { GSO_TCPV6 };
            hdr.gso_size = gso.size;
            hdr.hdr_len = header_len as u16;
        }
    }
    Ok(ToTap { hdr, patch: Some((field, transport.pseudo.to_be_bytes())) })
}

/// What is known of a packet that came from the TAP.
pub fn from_tap(hdr: VnetHdr) -> Meta {
    let gso = match hdr.gso_type {
        GSO_TCPV4 if hdr.gso_size != 0 => Some(Gso { family: Family::V4, size: hdr.gso_size }),
        GSO_TCPV6 if hdr.gso_size != 0 => Some(Gso { family: Family::V6, size: hdr.gso_size }),
        _ => None,
    };
    let csum_blank = hdr.flags & F_NEEDS_CSUM != 0;
    Meta { csum_blank, data_validated: csum_blank || hdr.flags & F_DATA_VALID != 0, gso }
}

/// The finished checksum of a whole packet with a blank one: (offset of the field, value).
///
/// # Errors
/// [`OffloadError`] if there is no TCP or UDP in it.
pub fn finish_checksum(packet: &[u8]) -> Result<(usize, [u8; 2]), OffloadError> {
    let transport = Transport::find(packet, packet.len())?;
    let field = transport.start + transport.csum_offset();
    let mut sum = Sum::default();
    sum.add(&transport.pseudo.to_be_bytes());
    let segment =
        packet.get(transport.start..transport.start + transport.len).ok_or(OffloadError::Truncated)?;
    let (before, after) = segment.split_at(transport.csum_offset());
    sum.add(before);
    sum.add(after.get(2..).ok_or(OffloadError::Truncated)?);
    let value = !sum.fold();
    // UDP: 0 says "none".
    let value = if value == 0 && !transport.tcp { 0xffff } else { value };
    Ok((field, value.to_be_bytes()))
}

/// The internet checksum of `bytes` (RFC 1071), as it goes into a header.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = Sum::default();
    sum.add(bytes);
    !sum.fold()
}

/// Whether the packet is IPv6.
pub fn is_ipv6(headers: &[u8]) -> bool {
    be16(headers, 12) == Ok(ETHERTYPE_IPV6)
}

fn byte(b: &[u8], at: usize) -> Result<u8, OffloadError> {
    b.get(at).copied().ok_or(OffloadError::Truncated)
}

fn be16(b: &[u8], at: usize) -> Result<u16, OffloadError> {
    Ok(u16::from_be_bytes([byte(b, at)?, byte(b, at + 1)?]))
}

/// One's-complement sum (RFC 1071). Pieces but the last must be of even length.
#[derive(Clone, Copy, Debug, Default)]
struct Sum(u64);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(2);
        for word in &mut words {
            self.0 += u64::from(u16::from_be_bytes([word[0], word[1]]));
        }
        if let [last] = words.remainder() {
            self.0 += u64::from(*last) << 8;
        }
    }

    fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ethernet + IPv4 + TCP with `payload` bytes.
    fn tcp4(payload: usize) -> Vec<u8> {
        let mut p = vec![0; 14 + 20 + 20 + payload];
        p[12..14].copy_from_slice(&[8, 0]);
        p[14] = 0x45;
        p[16..18].copy_from_slice(&((40 + payload) as u16).to_be_bytes());
        p[23] = 6;
        p[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        p[46] = 0x50;
        p
    }

    fn udp6(payload: usize) -> Vec<u8> {
        let mut p = vec![0; 14 + 40 + 8 + 8 + payload];
        p[12..14].copy_from_slice(&[0x86, 0xdd]);
        p[14] = 0x60;
        p[18..20].copy_from_slice(&((16 + payload) as u16).to_be_bytes());
        p[20] = 60; // destination options first
        p[54] = 17;
        p
    }

    #[test]
    fn blank_checksum_gets_a_pseudo_header() {
        let p = tcp4(100);
        let out = to_tap(Meta { csum_blank: true, ..Meta::default() }, &p, p.len()).unwrap();
        assert_eq!(out.hdr.flags, F_NEEDS_CSUM);
        assert_eq!((out.hdr.csum_start, out.hdr.csum_offset), (34, 16));
        // 0a00 + 0001 + 0a00 + 0002 + 0006 + 120
        assert_eq!(out.patch, Some((50, (0x1409u16 + 120).to_be_bytes())));
        assert_eq!(out.hdr.gso_type, 0);
    }

    #[test]
    fn segmentation_says_where_headers_end() {
        let p = tcp4(9000);
        let gso = Some(Gso { family: Family::V4, size: 1448 });
        let out = to_tap(Meta { gso, ..Meta::default() }, &p[..MAX_HEADERS], p.len()).unwrap();
        assert_eq!((out.hdr.gso_type, out.hdr.gso_size, out.hdr.hdr_len), (GSO_TCPV4, 1448, 54));
        let back = from_tap(VnetHdr::from_bytes(&out.hdr.to_bytes()));
        assert_eq!(back, Meta { csum_blank: true, data_validated: true, gso });
        let wrong = Some(Gso { family: Family::V6, size: 1448 });
        let refused = to_tap(Meta { gso: wrong, ..Meta::default() }, &p, p.len());
        assert_eq!(refused, Err(OffloadError::GsoMismatch));
    }

    #[test]
    fn xsa_448_headers_beyond_the_packet() {
        let blank = Meta { csum_blank: true, ..Meta::default() };
        let p = tcp4(0);
        for len in 0..p.len() {
            assert!(to_tap(blank, &p[..len], len).is_err(), "{len} bytes are not enough");
        }
        let mut p = tcp4(10);
        p[17] = 200; // the IP header claims more than there is
        assert_eq!(to_tap(blank, &p, p.len()), Err(OffloadError::Truncated));
        let mut p = tcp4(0);
        p[20] = 0x20; // more fragments
        assert_eq!(to_tap(blank, &p, p.len()), Err(OffloadError::NotTransport));
    }

    #[test]
    fn finished_checksums_add_up() {
        for mut p in [tcp4(0), tcp4(1), tcp4(1000), udp6(0), udp6(33)] {
            for (i, b) in p.iter_mut().enumerate().skip(90) {
                *b = i as u8;
            }
            let t = Transport::find(&p, p.len()).unwrap();
            let (at, value) = finish_checksum(&p).unwrap();
            p[at..at + 2].copy_from_slice(&value);
            let mut sum = Sum(u64::from(t.pseudo));
            sum.add(&p[t.start..]);
            assert_eq!(sum.fold(), 0xffff);
        }
    }

    proptest! {
        #[test]
        fn any_headers_never_panic(
            headers in proptest::collection::vec(any::<u8>(), 0..MAX_HEADERS),
            v6 in any::<bool>(), extra in 0usize..66_000, size in 1u16.., csum_blank in any::<bool>(),
        ) {
            let mut headers = headers;
            if headers.len() > 14 {
                headers[12..14].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
                headers[14] = if v6 { 0x60 } else { 0x45 };
            }
            let len = headers.len() + extra;
            let family = if v6 { Family::V6 } else { Family::V4 };
            for gso in [None, Some(Gso { family, size })] {
                let meta = Meta { csum_blank, data_validated: false, gso };
                if let Ok(out) = to_tap(meta, &headers, len)
                    && let Some((at, _)) = out.patch
                {
                    prop_assert!(at + 2 <= len);
                    prop_assert!(usize::from(out.hdr.hdr_len) <= len);
                }
            }
            let _ = finish_checksum(&headers);
        }
    }
}

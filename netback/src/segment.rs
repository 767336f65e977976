//! Segmentation of large TCP packets for frontends that cannot take them whole.

use crate::headers::{ETH_LEN, ETHERTYPE_IPV4};
use crate::offload::{self, Gso, Transport};

/// Most segments that one packet is cut into; more is what nobody sane asks for.
pub const MAX_SEGMENTS: usize = 128;

/// Cuts `packet` (headers and payload) into whole packets with finished checksums. `None` if it is no TCP packet, or
/// would be more than [`MAX_SEGMENTS`].
pub fn segment(packet: &[u8], gso: Gso) -> Option<Vec<Vec<u8>>> {
    let transport = Transport::find(packet, packet.len()).ok()?;
    if !transport.tcp || transport.family != gso.family {
        return None;
    }
    let tcp = transport.start;
    let header = tcp + usize::from(packet.get(tcp + 12)? >> 4) * 4;
    if header < tcp + 20 || header > tcp + transport.len {
        return None;
    }
    let payload = packet.get(header..tcp + transport.len)?;
    let count = payload.len().div_ceil(gso.size.into()).max(1);
    if count > MAX_SEGMENTS {
        return None;
    }
    let field = |at: usize| packet.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
    let sequence = field(tcp + 4)?;
    let ipv4 = packet.get(12..14)? == ETHERTYPE_IPV4.to_be_bytes();
    let id = u16::from_be_bytes([*packet.get(ETH_LEN + 4)?, *packet.get(ETH_LEN + 5)?]);
    let mut out = Vec::with_capacity(count);
    for (i, piece) in (0..count).map(|i| (i, payload.chunks(gso.size.into()).nth(i).unwrap_or_default())) {
        let mut p = Vec::with_capacity(header + piece.len());
        p.extend_from_slice(&packet[..header]);
        p.extend_from_slice(piece);
        let sent = (i * usize::from(gso.size)) as u32;
        p[tcp + 4..tcp + 8].copy_from_slice(&sequence.wrapping_add(sent).to_be_bytes());
        // FIN and PSH belong to the last one, CWR to the first.
        if i + 1 < count {
            p[tcp + 13] &= !0x09;
        }
        if i > 0 {
            p[tcp + 13] &= !0x80;
        }
        if ipv4 {
            let total = (p.len() - ETH_LEN) as u16;
            p[ETH_LEN + 2..ETH_LEN + 4].copy_from_slice(&total.to_be_bytes());
            p[ETH_LEN + 4..ETH_LEN + 6].copy_from_slice(&id.wrapping_add(i as u16).to_be_bytes());
            p[ETH_LEN + 10..ETH_LEN + 12].fill(0);
            let sum = offload::checksum(&p[ETH_LEN..ETH_LEN + usize::from(p[ETH_LEN] & 0xf) * 4]);
            p[ETH_LEN + 10..ETH_LEN + 12].copy_from_slice(&sum.to_be_bytes());
        } else {
            let total = (p.len() - ETH_LEN - 40) as u16;
            p[ETH_LEN + 4..ETH_LEN + 6].copy_from_slice(&total.to_be_bytes());
        }
        let (at, value) = offload::finish_checksum(&p).ok()?;
        p[at..at + 2].copy_from_slice(&value);
        out.push(p);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::Family;
    use proptest::prelude::*;

    fn packet(v6: bool, payload: usize) -> Vec<u8> {
        let ip = if v6 { 40 } else { 20 };
        let mut p = vec![0; 14 + ip + 20];
        p.extend((0..payload).map(|i| i as u8));
        let tcp = 14 + ip;
        if v6 {
            p[12..14].copy_from_slice(&[0x86, 0xdd]);
            p[14] = 0x60;
            p[18..20].copy_from_slice(&((20 + payload) as u16).to_be_bytes());
            p[20] = 6;
        } else {
            p[12..14].copy_from_slice(&[8, 0]);
            p[14] = 0x45;
            p[16..18].copy_from_slice(&((40 + payload) as u16).to_be_bytes());
            p[23] = 6;
        }
        p[tcp + 4..tcp + 8].copy_from_slice(&0xffff_fff0u32.to_be_bytes());
        p[tcp + 12] = 0x50;
        p[tcp + 13] = 0x99; // CWR ACK PSH FIN
        p
    }

    proptest! {
        #[test]
        fn segments_are_the_packet_again(v6: bool, payload in 0usize..60_000, size in 500u16..9000) {
            let whole = packet(v6, payload);
            let family = if v6 { Family::V6 } else { Family::V4 };
            let segments = segment(&whole, Gso { family, size }).unwrap();
            let header = whole.len() - payload;
            let tcp = header - 20;
            let mut bytes = Vec::new();
            for (i, s) in segments.iter().enumerate() {
                prop_assert!(s.len() - header <= usize::from(size));
                let seq = u32::from_be_bytes(s[tcp + 4..tcp + 8].try_into().unwrap());
                prop_assert_eq!(seq, 0xffff_fff0u32.wrapping_add(bytes.len() as u32));
                let last = i + 1 == segments.len();
                prop_assert_eq!(s[tcp + 13], 0x10 | if i == 0 { 0x80 } else { 0 } | if last { 9 } else { 0 });
                // A finished checksum: making it again gives the same.
                let (at, value) = offload::finish_checksum(s).unwrap();
                prop_assert_eq!(&s[at..at + 2], &value);
                if !v6 {
                    prop_assert_eq!(offload::checksum(&s[14..34]), 0);
                }
                bytes.extend_from_slice(&s[header..]);
            }
            prop_assert_eq!(&bytes[..], &whole[header..]);
        }

        #[test]
        fn nonsense_is_none_or_some(bytes in proptest::collection::vec(any::<u8>(), 0..200), size in 1u16..) {
            let mut bytes = bytes;
            if bytes.len() > 40 {
                bytes[12..15].copy_from_slice(&[8, 0, 0x45]);
                bytes[23] = 6;
            }
            let _ = segment(&bytes, Gso { family: Family::V4, size });
        }
    }

    #[test]
    fn tiny_segments_are_refused() {
        assert!(segment(&packet(false, 60_000), Gso { family: Family::V4, size: 1 }).is_none());
    }
}

//! What the driver domain answers itself: ARP and neighbour discovery for others, router advertisements.
//!
//! A routed guest sees its gateway alone: whatever it asks for is at the gateway's Ethernet address. And the domain's
//! own kernel, which routes, gets its answers for guests here: no guest is woken for them.

use std::net::{IpAddr, Ipv6Addr};

use crate::headers::{Arp, ETHERTYPE_ARP, ETHERTYPE_IPV6, Headers, Mac};
use crate::offload;

fn ethernet(dst: Mac, src: Mac, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(128);
    frame.extend(dst);
    frame.extend(src);
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// The answer that `mac` has what `request` asks for.
pub fn arp(request: &Arp, mac: Mac) -> Vec<u8> {
    let (asker, asker_ip) = request.sender;
    let mut frame = ethernet(asker, mac, ETHERTYPE_ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend(mac);
    frame.extend(request.target.octets());
    frame.extend(asker);
    frame.extend(asker_ip.octets());
    frame
}

/// An ICMPv6 message with its checksum.
fn icmpv6(dst_mac: Mac, src_mac: Mac, dst: Ipv6Addr, src: Ipv6Addr, body: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(dst_mac, src_mac, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((body.len() as u16).to_be_bytes());
    // Hop limit 255: proof that no router was in between (RFC 4861).
    frame.extend([58, 255]);
    frame.extend(src.octets());
    frame.extend(dst.octets());
    let mut sum = Vec::with_capacity(40 + body.len());
    sum.extend(src.octets());
    sum.extend(dst.octets());
    sum.extend((body.len() as u32).to_be_bytes());
    sum.extend([0, 0, 0, 58]);
    sum.extend(body);
    let mut body = body.to_vec();
    body[2..4].copy_from_slice(&offload::checksum(&sum).to_be_bytes());
    frame.extend(body);
    frame
}

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The advertisement that `mac` has what a neighbour solicitation in `h` asks for. `None` if there is none in it.
pub fn neighbour(h: &Headers<'_>, mac: Mac) -> Option<Vec<u8>> {
    let (135, target) = h.neighbour()? else { return None };
    let IpAddr::V6(asker) = h.ip()?.src() else { return None };
    // Somebody checks whether an address is free (RFC 4862): the answer goes to all.
    let (dst, solicited) = if asker.is_unspecified() { (ALL_NODES, 0) } else { (asker, 0x40) };
    let mut body = vec![136, 0, 0, 0, solicited | 0x20, 0, 0, 0];
    body.extend(target.octets());
    body.extend([2, 1]);
    body.extend(mac);
    Some(icmpv6(h.src(), mac, dst, target, &body))
}

/// What a router advertisement says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Router {
    /// Its Ethernet address.
    pub mac: Mac,
    /// The guests' network: an address in it and the length of its prefix.
    pub prefix: (Ipv6Addr, u8),
    /// Greatest packet.
    pub mtu: u32,
}

/// The link-local address made of an Ethernet address (RFC 4291).
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let mut out = [0; 16];
    out[..2].copy_from_slice(&[0xfe, 0x80]);
    out[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    out.into()
}

/// A router advertisement for the guest that sent the router solicitation in `h`. `None` if there is none in it.
pub fn advertise(h: &Headers<'_>, router: &Router) -> Option<Vec<u8>> {
    if h.protocol() != Some(58) || h.icmp_type() != Some(133) {
        return None;
    }
    Some(advertisement(h.src(), router))
}

/// A router advertisement for this guest.
pub fn advertisement(to: Mac, router: &Router) -> Vec<u8> {
    // Hop limit 64, no flags, a router for half an hour; then its address, the MTU and the prefix.
    let mut body = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    body.extend([1, 1]);
    body.extend(router.mac);
    body.extend([5, 1, 0, 0]);
    body.extend(router.mtu.to_be_bytes());
    let (prefix, len) = router.prefix;
    // Autonomous, a day; not on link: other guests are reached by the router.
    body.extend([3, 4, len, 0x40]);
    body.extend([0, 1, 0x51, 0x80, 0, 1, 0x51, 0x80, 0, 0, 0, 0]);
    let network = u128::from(prefix) & u128::MAX.checked_shl(128 - u32::from(len.min(128))).unwrap_or(0);
    body.extend(network.to_be_bytes());
    icmpv6(to, router.mac, ALL_NODES, link_local(router.mac), &body)
}

/// Takes one from the hop limit of an IP packet that is routed here, in its first bytes `h`. False if it must not go on.
pub fn hop(bytes: &mut [u8]) -> bool {
    match bytes.get(12..14) {
        Some([8, 0]) if bytes.len() >= 34 => {
            if bytes[22] <= 1 {
                return false;
            }
            bytes[22] -= 1;
            // The checksum's word of time-to-live and protocol is one less in its upper byte (RFC 1624).
            let sum = u16::from_be_bytes([bytes[24], bytes[25]]);
            let sum = u32::from(sum) + 0x100;
            let sum = (sum & 0xffff) + (sum >> 16);
            bytes[24..26].copy_from_slice(&(sum as u16).to_be_bytes());
            true
        }
        Some([0x86, 0xdd]) if bytes.len() >= 54 => {
            if bytes[21] <= 1 {
                return false;
            }
            bytes[21] -= 1;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Mac = [0, 0x16, 0x3e, 0, 0, 1];
    const US: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];

    /// Sums an ICMPv6 message with its pseudo-header: 0 if the checksum is right.
    fn icmpv6_sum(frame: &[u8]) -> u16 {
        let mut sum = frame[22..54].to_vec();
        sum.extend(((frame.len() - 54) as u32).to_be_bytes());
        sum.extend([0, 0, 0, 58]);
        sum.extend(&frame[54..]);
        offload::checksum(&sum)
    }

    #[test]
    fn an_arp_answer() {
        let request =
            Arp { request: true, sender: (GUEST, [10, 0, 0, 2].into()), target: [10, 0, 0, 1].into() };
        let frame = arp(&request, US);
        let h = Headers::parse(&frame);
        assert_eq!((h.dst(), h.src()), (GUEST, US));
        let want = Arp { request: false, sender: (US, [10, 0, 0, 1].into()), target: [10, 0, 0, 2].into() };
        assert_eq!(h.arp(), Some(want));
    }

    #[test]
    fn neighbours_and_routers() {
        let target: Ipv6Addr = "2001:db8::1".parse().unwrap();
        let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
        body.extend(target.octets());
        let ask = icmpv6(US, GUEST, target, link_local(GUEST), &body);
        assert_eq!(icmpv6_sum(&ask), 0);
        let answer = neighbour(&Headers::parse(&ask), US).unwrap();
        assert_eq!(icmpv6_sum(&answer), 0);
        let h = Headers::parse(&answer);
        assert_eq!((h.neighbour(), h.dst()), (Some((136, target)), GUEST));
        assert!(neighbour(&h, US).is_none());
        let ask = icmpv6(
            [0x33, 0x33, 0, 0, 0, 2],
            GUEST,
            ALL_NODES,
            link_local(GUEST),
            &[133, 0, 0, 0, 0, 0, 0, 0],
        );
        let router = Router { mac: US, prefix: ("2001:db8::".parse().unwrap(), 64), mtu: 1500 };
        let answer = advertise(&Headers::parse(&ask), &router).unwrap();
        assert_eq!(icmpv6_sum(&answer), 0);
        assert_eq!(Headers::parse(&answer).icmp_type(), Some(134));
        assert_eq!(link_local(GUEST), "fe80::216:3eff:fe00:1".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn a_hop_keeps_the_checksum_right() {
        let mut p = vec![0; 60];
        p[12..14].copy_from_slice(&[8, 0]);
        p[14] = 0x45;
        for ttl in (2..=255u8).rev() {
            p[22] = ttl;
            p[24..26].fill(0);
            let sum = offload::checksum(&p[14..34]);
            p[24..26].copy_from_slice(&sum.to_be_bytes());
            assert!(hop(&mut p));
            assert_eq!((p[22], offload::checksum(&p[14..34])), (ttl - 1, 0));
        }
        assert!(!hop(&mut p), "the last hop");
    }
}

//! A packet's headers, as far as forwarding and filtering look at them.
//!
//! Parsed on a private copy of the first bytes. Nothing here fails: what is not there or not understood is `None`, and who
//! filters decides what that means.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// To everybody.
pub const BROADCAST: Mac = [0xff; 6];

/// Bytes of an Ethernet header.
pub const ETH_LEN: usize = 14;
/// IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// A VLAN tag.
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Source and destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpAddrs {
    /// IPv4.
    V4 {
        /// From.
        src: Ipv4Addr,
        /// To.
        dst: Ipv4Addr,
    },
    /// IPv6.
    V6 {
        /// From.
        src: Ipv6Addr,
        /// To.
        dst: Ipv6Addr,
    },
}

impl IpAddrs {
    /// From.
    pub fn src(&self) -> IpAddr {
        match *self {
            IpAddrs::V4 { src, .. } => src.into(),
            IpAddrs::V6 { src, .. } => src.into(),
        }
    }

    /// To.
    pub fn dst(&self) -> IpAddr {
        match *self {
            IpAddrs::V4 { dst, .. } => dst.into(),
            IpAddrs::V6 { dst, .. } => dst.into(),
        }
    }
}

/// An ARP packet over Ethernet and IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// Who has, else an answer.
    pub request: bool,
    /// Sender.
    pub sender: (Mac, Ipv4Addr),
    /// Whom it is about.
    pub target: Ipv4Addr,
}

/// The parsed headers.
#[derive(Clone, Copy, Debug)]
pub struct Headers<'a> {
    bytes: &'a [u8],
    ethertype: u16,
    ip: Option<IpAddrs>,
    protocol: Option<u8>,
    /// Where the transport header begins, if this is not a later fragment.
    transport: Option<usize>,
    fragment: bool,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

impl<'a> Headers<'a> {
    /// Looks at the first bytes of a packet; an Ethernet header at least, or there is nothing in it.
    pub fn parse(bytes: &'a [u8]) -> Headers<'a> {
        let ethertype = be16(bytes, 12).unwrap_or(0);
        let mut this =
            Headers { bytes, ethertype, ip: None, protocol: None, transport: None, fragment: false };
        // What does not parse to its end is as if it had no IP header at all.
        let _ = match ethertype {
            ETHERTYPE_IPV4 => this.ipv4(),
            ETHERTYPE_IPV6 => this.ipv6(),
            _ => None,
        };
        this
    }

    fn ipv4(&mut self) -> Option<()> {
        let first = *self.bytes.get(ETH_LEN)?;
        let header = usize::from(first & 0xf) * 4;
        if first >> 4 != 4 || header < 20 {
            return None;
        }
        let src = array::<4>(self.bytes, ETH_LEN + 12)?.into();
        let dst = array::<4>(self.bytes, ETH_LEN + 16)?.into();
        self.ip = Some(IpAddrs::V4 { src, dst });
        self.protocol = Some(*self.bytes.get(ETH_LEN + 9)?);
        let fragment = be16(self.bytes, ETH_LEN + 6)?;
        self.fragment = fragment & 0x3fff != 0;
        if fragment & 0x1fff == 0 {
            self.transport = Some(ETH_LEN + header);
        }
        Some(())
    }

    fn ipv6(&mut self) -> Option<()> {
        if self.bytes.get(ETH_LEN)? >> 4 != 6 {
            return None;
        }
        let src = array::<16>(self.bytes, ETH_LEN + 8)?.into();
        let dst = array::<16>(self.bytes, ETH_LEN + 24)?.into();
        self.ip = Some(IpAddrs::V6 { src, dst });
        let mut next = *self.bytes.get(ETH_LEN + 6)?;
        let mut at = ETH_LEN + 40;
        // Extension headers (RFC 8200): hop-by-hop, routing, destination options, authentication, fragment.
        for _ in 0..8 {
            let len = match next {
                0 | 43 | 60 => (usize::from(*self.bytes.get(at + 1)?) + 1) * 8,
                51 => (usize::from(*self.bytes.get(at + 1)?) + 2) * 4,
                44 => {
                    self.fragment = true;
                    if be16(self.bytes, at + 2)? & 0xfff8 != 0 {
                        self.protocol = Some(*self.bytes.get(at)?);
                        return Some(());
                    }
                    8
                }
                _ => {
                    self.protocol = Some(next);
                    self.transport = Some(at);
                    return Some(());
                }
            };
            next = *self.bytes.get(at)?;
            at += len;
        }
        None
    }

    /// To whom.
    pub fn dst(&self) -> Mac {
        array(self.bytes, 0).unwrap_or_default()
    }

    /// From whom.
    pub fn src(&self) -> Mac {
        array(self.bytes, 6).unwrap_or_default()
    }

    /// To a group; broadcast is one.
    pub fn is_multicast(&self) -> bool {
        self.dst()[0] & 1 != 0
    }

    /// What it carries.
    pub fn ethertype(&self) -> u16 {
        self.ethertype
    }

    /// IP addresses.
    pub fn ip(&self) -> Option<IpAddrs> {
        self.ip
    }

    /// IP protocol of the payload.
    pub fn protocol(&self) -> Option<u8> {
        self.protocol
    }

    /// A fragment of an IP packet, the first one included.
    pub fn is_fragment(&self) -> bool {
        self.fragment
    }

    /// Where the transport header begins.
    pub fn transport(&self) -> Option<usize> {
        self.transport
    }

    /// Source and destination port of TCP, UDP or SCTP.
    pub fn ports(&self) -> Option<(u16, u16)> {
        let at = self.transport.filter(|_| matches!(self.protocol, Some(6 | 17 | 132)))?;
        Some((be16(self.bytes, at)?, be16(self.bytes, at + 2)?))
    }

    /// Type of an ICMP or ICMPv6 message.
    pub fn icmp_type(&self) -> Option<u8> {
        self.transport
            .filter(|_| matches!(self.protocol, Some(1 | 58)))
            .and_then(|at| self.bytes.get(at).copied())
    }

    /// The ARP packet in it.
    pub fn arp(&self) -> Option<Arp> {
        // Ethernet, IPv4, and the lengths of their addresses.
        if self.ethertype != ETHERTYPE_ARP || array(self.bytes, ETH_LEN)? != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        let request = match be16(self.bytes, ETH_LEN + 6)? {
            1 => true,
            2 => false,
            _ => return None,
        };
        Some(Arp {
            request,
            sender: (array(self.bytes, ETH_LEN + 8)?, array::<4>(self.bytes, ETH_LEN + 14)?.into()),
            target: array::<4>(self.bytes, ETH_LEN + 24)?.into(),
        })
    }

    /// Target of a neighbour solicitation (135) or advertisement (136) in it: (type, target).
    pub fn neighbour(&self) -> Option<(u8, Ipv6Addr)> {
        let kind = self.icmp_type().filter(|t| self.protocol == Some(58) && matches!(t, 135 | 136))?;
        Some((kind, array::<16>(self.bytes, self.transport? + 8)?.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        /// Whatever the bytes: no panic, and nothing is said of bytes that are not there.
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u8..4) {
            let mut bytes = bytes;
            if bytes.len() > 14 {
                let types = [[8, 0], [8, 6], [0x86, 0xdd], [bytes[12], bytes[13]]];
                bytes[12..14].copy_from_slice(&types[usize::from(kind)]);
                bytes[14] = match kind { 0 => 0x45, 2 => 0x60, _ => bytes[14] };
            }
            let h = Headers::parse(&bytes);
            let _ = (h.dst(), h.src(), h.arp(), h.neighbour(), h.icmp_type(), h.is_fragment());
            if h.ports().is_some() {
                prop_assert!(h.transport().unwrap() + 4 <= bytes.len());
            }
            if h.ip().is_some() {
                prop_assert!(bytes.len() >= ETH_LEN + 20);
            }
        }
    }

    #[test]
    fn fragments_and_extension_headers() {
        let mut v4 = [0; 60];
        v4[12..14].copy_from_slice(&[8, 0]);
        v4[14] = 0x46;
        v4[23] = 17;
        v4[38..42].copy_from_slice(&[0, 53, 1, 0]);
        assert_eq!(Headers::parse(&v4).ports(), Some((53, 256)));
        v4[21] = 1; // offset 8
        let h = Headers::parse(&v4);
        assert!(h.is_fragment() && h.ports().is_none() && h.protocol() == Some(17));
        let mut v6 = [0; 100];
        v6[12..14].copy_from_slice(&[0x86, 0xdd]);
        v6[14] = 0x60;
        v6[20] = 0;
        v6[54] = 44; // hop-by-hop, then a fragment header
        v6[62] = 6;
        v6[70..74].copy_from_slice(&[1, 1, 0, 80]);
        let h = Headers::parse(&v6);
        assert_eq!((h.protocol(), h.ports(), h.is_fragment()), (Some(6), Some((257, 80)), true));
    }
}

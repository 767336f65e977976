//! What the toolstack says of a vif, and whether a packet of its guest agrees with it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::rules::Firewall;
use crate::headers::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Headers, IpAddrs, Mac};

/// Bytes in a time: Xen's "rate" of a vif.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Bytes per second, not 0.
    pub bytes: u64,
    /// Bytes that may go at once, at least one large packet.
    pub burst: u64,
}

/// A vif's settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// The guest's Ethernet address.
    pub mac: Option<Mac>,
    /// The guest's addresses; without any, only its Ethernet address is checked.
    pub ipv4: Vec<Ipv4Addr>,
    /// The same for IPv6; link-local ones are its own in any case.
    pub ipv6: Vec<Ipv6Addr>,
    /// What the guest sends must carry its own addresses.
    pub antispoof: bool,
    /// No packets to and from other guests.
    pub isolated: bool,
    /// Greatest IP packet towards the guest, bytes.
    pub mtu: u32,
    /// Limit of what the guest sends.
    pub rate: Option<Rate>,
    /// Rules for what it sends.
    pub firewall: Firewall,
    /// Routed: DHCP requests are answered.
    pub dhcp: bool,
    /// Routed: routers are advertised.
    pub ra: bool,
    /// The cable is not pulled: packets pass.
    pub link: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            mac: None,
            ipv4: Vec::new(),
            ipv6: Vec::new(),
            antispoof: true,
            isolated: false,
            mtu: 1500,
            rate: None,
            firewall: Firewall::default(),
            dhcp: true,
            ra: true,
            link: true,
        }
    }
}

/// Why a packet goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// With addresses that are not the guest's.
    Spoofed,
    /// A rule says so.
    Rule,
    /// To a guest or by a guest that is isolated, to nobody, or with the cable pulled.
    NoWay,
}

impl Settings {
    /// True if its address is known and checked: nothing needs to be learned of it.
    pub fn locked(&self) -> bool {
        self.antispoof && self.mac.is_some()
    }

    /// Whether the guest may send this with these addresses.
    ///
    /// # Errors
    /// [`Denied::Spoofed`]; [`Denied::NoWay`] if the cable is pulled.
    pub fn admit(&self, h: &Headers<'_>) -> Result<(), Denied> {
        if !self.link {
            return Err(Denied::NoWay);
        }
        if !self.antispoof {
            return Ok(());
        }
        let spoofed = Err(Denied::Spoofed);
        let Some(mac) = self.mac else { return Ok(()) };
        if h.src() != mac {
            return spoofed;
        }
        if self.ipv4.is_empty() && self.ipv6.is_empty() {
            return Ok(());
        }
        let ok = match h.ethertype() {
            ETHERTYPE_ARP => h.arp().is_some_and(|arp| {
                let (sender, ip) = arp.sender;
                // A probe (RFC 5227) has no sender address yet.
                sender == mac && (self.ipv4.contains(&ip) || (ip.is_unspecified() && arp.request))
            }),
            ETHERTYPE_IPV4 => match h.ip() {
                Some(IpAddrs::V4 { src, .. }) => {
                    // A DHCP client has none yet.
                    let dhcp = || src.is_unspecified() && h.ports() == Some((68, 67));
                    self.ipv4.contains(&src) || dhcp()
                }
                _ => false,
            },
            ETHERTYPE_IPV6 => match h.ip() {
                Some(IpAddrs::V6 { src, .. }) => {
                    let own = |a: &Ipv6Addr| self.ipv6.contains(a) || a.is_unicast_link_local();
                    let source = own(&src) || src.is_unspecified();
                    // What it says of itself to its neighbours, too.
                    source && h.neighbour().is_none_or(|(kind, target)| kind != 136 || own(&target))
                }
                _ => false,
            },
            // VLAN tags hide what is in them; of other protocols nothing was allowed.
            _ => false,
        };
        if ok { Ok(()) } else { spoofed }
    }

    /// Whether the address is the guest's.
    pub fn has(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.ipv4.contains(&a),
            IpAddr::V6(a) => self.ipv6.contains(&a),
        }
    }
}

/// How much may be sent now.
#[derive(Debug)]
pub struct Bucket {
    rate: Rate,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(rate: Rate, now: Instant) -> Bucket {
        Bucket { rate, tokens: rate.burst as f64, at: now }
    }

    /// Bytes that may be sent now, 0: none yet.
    pub fn budget(&mut self, now: Instant) -> usize {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.rate.bytes as f64;
        self.at = now;
        self.tokens = (self.tokens + gained).min(self.rate.burst as f64);
        // Waits are rounded to milliseconds; less than what comes in one is none.
        if self.tokens < 1.0 { 0 } else { self.tokens as usize }
    }

    /// Bytes were sent; a packet may overdraw it.
    pub fn take(&mut self, bytes: usize) {
        self.tokens -= bytes as f64;
    }

    /// How long until there is a budget again.
    pub fn wait(&self) -> Duration {
        Duration::from_secs_f64(((1.0 - self.tokens).max(0.0) / self.rate.bytes.max(1) as f64).min(10.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [0, 0x16, 0x3e, 0, 0, 1];

    fn settings() -> Settings {
        Settings {
            mac: Some(MAC),
            ipv4: vec![[10, 0, 0, 2].into()],
            ipv6: vec!["2001:db8::2".parse().unwrap()],
            ..Settings::default()
        }
    }

    fn frame(src: Mac, ethertype: [u8; 2]) -> Vec<u8> {
        let mut f = vec![0; 90];
        f[6..12].copy_from_slice(&src);
        f[12..14].copy_from_slice(&ethertype);
        f
    }

    fn admitted(s: &Settings, f: &[u8]) -> bool {
        s.admit(&Headers::parse(f)).is_ok()
    }

    #[test]
    fn only_own_addresses() {
        let s = settings();
        let mut v4 = frame(MAC, [8, 0]);
        v4[14] = 0x45;
        v4[26..30].copy_from_slice(&[10, 0, 0, 2]);
        assert!(admitted(&s, &v4));
        v4[29] = 3;
        assert!(!admitted(&s, &v4), "another's address");
        let mut other = v4.clone();
        other[29] = 2;
        other[11] = 9;
        assert!(!admitted(&s, &other), "another's Ethernet address");
        v4[26..30].fill(0);
        assert!(!admitted(&s, &v4));
        v4[23] = 17;
        v4[34..38].copy_from_slice(&[0, 68, 0, 67]);
        assert!(admitted(&s, &v4), "DHCP");
        let mut arp = frame(MAC, [8, 6]);
        arp[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
        arp[22..28].copy_from_slice(&MAC);
        assert!(admitted(&s, &arp), "a probe");
        arp[21] = 2;
        assert!(!admitted(&s, &arp));
        arp[28..32].copy_from_slice(&[10, 0, 0, 2]);
        assert!(admitted(&s, &arp));
        arp[27] = 7;
        assert!(!admitted(&s, &arp), "says that its address is somebody else's");
        let mut v6 = frame(MAC, [0x86, 0xdd]);
        v6[14] = 0x60;
        v6[20] = 58;
        v6[22..38].copy_from_slice(&"fe80::1".parse::<Ipv6Addr>().unwrap().octets());
        v6[54] = 136;
        v6[62..78].copy_from_slice(&"2001:db8::2".parse::<Ipv6Addr>().unwrap().octets());
        assert!(admitted(&s, &v6));
        v6[77] = 1;
        assert!(!admitted(&s, &v6), "advertises its neighbour's");
        assert!(!admitted(&s, &frame(MAC, [0x81, 0])));
        let free = Settings { antispoof: false, ..s };
        assert!(admitted(&free, &frame([2; 6], [0x81, 0])));
    }

    #[test]
    fn a_bucket_lets_through_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Rate { bytes: 1000, burst: 500 }, start);
        assert_eq!(bucket.budget(start), 500);
        bucket.take(700);
        assert_eq!(bucket.budget(start), 0);
        assert!(bucket.wait() > Duration::from_millis(199));
        let mut sent = 0;
        for ms in 0..2000 {
            let budget = bucket.budget(start + Duration::from_millis(ms));
            if budget > 0 {
                bucket.take(100);
                sent += 100;
            }
        }
        assert!((1700..=1900).contains(&sent), "{sent}");
    }
}

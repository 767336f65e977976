//! Firewall rules of a vif, in the form in which Qubes keeps them: `action=accept dst4=10.0.0.0/8 proto=tcp dstports=443-443`.
//!
//! They are about what the guest sends. The first rule that fits decides; if none does, the policy.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::headers::Headers;
use crate::names::{Names, is_host_name};

/// Most rules of a vif.
pub const MAX_RULES: usize = 512;

/// What is done with a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It goes on.
    #[default]
    Accept,
    /// It is dropped.
    Drop,
}

impl FromStr for Action {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        match text.trim() {
            "accept" => Ok(Action::Accept),
            // Qubes' "reject" tells the guest; here it is dropped all the same.
            "drop" | "reject" | "deny" => Ok(Action::Drop),
            _ => Err(RuleError(format!("action {text:?} is neither accept nor drop"))),
        }
    }
}

/// A network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// Its address.
    pub address: IpAddr,
    /// Length of its prefix.
    pub prefix: u8,
}

impl Net {
    /// Whether `address` is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        let prefix = u32::from(self.prefix);
        match (self.address, address) {
            (IpAddr::V4(net), IpAddr::V4(a)) => {
                (u32::from(net) ^ u32::from(a)).checked_shr(32 - prefix.min(32)).unwrap_or(0) == 0
            }
            (IpAddr::V6(net), IpAddr::V6(a)) => {
                (u128::from(net) ^ u128::from(a)).checked_shr(128 - prefix.min(128)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Net {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let wrong = || RuleError(format!("{text:?} is no address or network"));
        let (address, prefix) = text.split_once('/').map_or((text, None), |(a, p)| (a, Some(p)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(most), |p| p.parse().map_err(|_| wrong()))?;
        if prefix > most {
            return Err(wrong());
        }
        Ok(Net { address, prefix })
    }
}

/// A rule that cannot be understood. The whole set is then refused: a firewall with holes is worse than none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("firewall rule: {0}")]
pub struct RuleError(pub(crate) String);

/// One rule; what is `None` fits everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// What is done.
    pub action: Action,
    /// Where to.
    pub dst: Option<Net>,
    /// The same by its name, which the domain resolves. While it is not resolved, a rule that accepts fits nothing and one that drops
    /// fits every address.
    #[serde(default)]
    pub host: Option<String>,
    /// IP protocols, empty: all.
    pub protocols: Vec<u8>,
    /// Destination ports, both ends included.
    pub ports: Option<(u16, u16)>,
    /// Type of an ICMP message.
    pub icmp_type: Option<u8>,
    /// DNS to the domain's own resolvers (Qubes' `specialtarget=dns`): port 53 of TCP and UDP.
    pub dns: bool,
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let mut rule = Rule::default();
        let mut action = None;
        for word in text.split_whitespace() {
            let (key, value) =
                word.split_once('=').ok_or_else(|| RuleError(format!("{word:?} is not key=value")))?;
            let number =
                || value.parse::<u8>().map_err(|_| RuleError(format!("{word:?}: no number up to 255")));
            match key {
                "action" => action = Some(value.parse()?),
                "dst4" | "dst6" => {
                    let net: Net = value.parse()?;
                    if net.address.is_ipv4() != (key == "dst4") {
                        return Err(RuleError(format!("{word:?}: of the other address family")));
                    }
                    rule.dst = Some(net);
                }
                "proto" => {
                    rule.protocols = match value {
                        "tcp" => vec![6],
                        "udp" => vec![17],
                        "icmp" => vec![1, 58],
                        _ => return Err(RuleError(format!("{word:?}: tcp, udp or icmp"))),
                    }
                }
                "dstports" => {
                    let (low, high) = value.split_once('-').unwrap_or((value, value));
                    let port =
                        |p: &str| p.parse().map_err(|_| RuleError(format!("{word:?}: ports are 0 to 65535")));
                    let (low, high) = (port(low)?, port(high)?);
                    if low > high {
                        return Err(RuleError(format!("{word:?}: the first port is above the last")));
                    }
                    rule.ports = Some((low, high));
                }
                "icmptype" => rule.icmp_type = Some(number()?),
                "specialtarget" if value == "dns" => rule.dns = true,
                // Qubes allows a network here, too.
                "dsthost" => match value.parse() {
                    Ok(net) => rule.dst = Some(net),
                    Err(_) if is_host_name(value) => rule.host = Some(value.to_ascii_lowercase()),
                    Err(_) => return Err(RuleError(format!("{word:?}: no name, address or network"))),
                },
                // Told to people, not to us.
                "comment" => {}
                _ => return Err(RuleError(format!("{key:?} is not known"))),
            }
        }
        rule.action = action.ok_or_else(|| RuleError("action is missing".into()))?;
        Ok(rule)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "action={}", if self.action == Action::Accept { "accept" } else { "drop" })?;
        if let Some(net) = self.dst {
            let family = if net.address.is_ipv4() { 4 } else { 6 };
            write!(f, " dst{family}={}/{}", net.address, net.prefix)?;
        }
        if let Some(host) = &self.host {
            write!(f, " dsthost={host}")?;
        }
        match self.protocols[..] {
            [6] => write!(f, " proto=tcp")?,
            [17] => write!(f, " proto=udp")?,
            [_, ..] => write!(f, " proto=icmp")?,
            [] => {}
        }
        if let Some((low, high)) = self.ports {
            write!(f, " dstports={low}-{high}")?;
        }
        if let Some(kind) = self.icmp_type {
            write!(f, " icmptype={kind}")?;
        }
        if self.dns { write!(f, " specialtarget=dns") } else { Ok(()) }
    }
}

impl Rule {
    fn fits(&self, headers: &Headers<'_>, dst: IpAddr, names: &Names) -> bool {
        let protocol = headers.protocol();
        let port = headers.ports().map(|(_, dst)| dst);
        let named = |host: &String| match names.get(host) {
            Some(addresses) => addresses.contains(&dst),
            None => self.action == Action::Drop,
        };
        self.host.as_ref().is_none_or(named)
            && self.dst.is_none_or(|net| net.contains(dst))
            && (self.protocols.is_empty() || protocol.is_some_and(|p| self.protocols.contains(&p)))
            && self.ports.is_none_or(|(low, high)| port.is_some_and(|p| (low..=high).contains(&p)))
            && self.icmp_type.is_none_or(|kind| headers.icmp_type() == Some(kind))
            && (!self.dns || (port == Some(53) && matches!(protocol, Some(6 | 17))))
    }
}

/// A vif's rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Firewall {
    /// In order.
    pub rules: Vec<Rule>,
    /// What happens to a packet that no rule fits.
    pub policy: Action,
}

impl Firewall {
    /// Whether a packet from the guest may go on. What is not IP (ARP) may.
    ///
    /// A later fragment has no ports: rules with ports do not fit it.
    pub fn allows(&self, headers: &Headers<'_>, names: &Names) -> bool {
        if self.rules.is_empty() && self.policy == Action::Accept {
            return true;
        }
        let Some(ip) = headers.ip() else {
            // An IP packet that does not parse is not let through by rules that could not see it.
            return !matches!(
                headers.ethertype(),
                crate::headers::ETHERTYPE_IPV4 | crate::headers::ETHERTYPE_IPV6
            );
        };
        if neighbour_discovery(headers) {
            return true;
        }
        let found = self.rules.iter().find(|rule| rule.fits(headers, ip.dst(), names));
        found.map_or(self.policy, |rule| rule.action) == Action::Accept
    }
}

/// IPv6 has no ARP: without these messages no rule that accepts anything would work.
fn neighbour_discovery(headers: &Headers<'_>) -> bool {
    headers.protocol() == Some(58) && matches!(headers.icmp_type(), Some(133..=136))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(protocol: u8, dst: [u8; 4], port: u16) -> Vec<u8> {
        let mut p = vec![0; 60];
        p[12..14].copy_from_slice(&[8, 0]);
        p[14] = 0x45;
        p[23] = protocol;
        p[30..34].copy_from_slice(&dst);
        p[36..38].copy_from_slice(&port.to_be_bytes());
        p
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = [
            "action=drop dst4=10.1.0.0/16",
            "action=accept dst4=10.0.0.0/8 proto=tcp dstports=80-443",
            "action=accept specialtarget=dns",
            "action=accept proto=icmp icmptype=8",
        ];
        let rules: Vec<Rule> = rules.iter().map(|r| r.parse().unwrap()).collect();
        let firewall = Firewall { rules, policy: Action::Drop };
        let allowed = |protocol, dst, port| {
            firewall.allows(&Headers::parse(&packet(protocol, dst, port)), &Names::new())
        };
        assert!(allowed(6, [10, 2, 0, 1], 443));
        assert!(!allowed(6, [10, 1, 0, 1], 443), "the first");
        assert!(!allowed(6, [10, 2, 0, 1], 444));
        assert!(!allowed(17, [10, 2, 0, 1], 443));
        assert!(allowed(17, [9, 9, 9, 9], 53));
        let mut echo = packet(1, [9, 9, 9, 9], 0);
        echo[34] = 8;
        assert!(firewall.allows(&Headers::parse(&echo), &Names::new()));
        echo[34] = 13;
        assert!(!firewall.allows(&Headers::parse(&echo), &Names::new()));
        let mut fragment = packet(6, [10, 2, 0, 1], 443);
        fragment[21] = 1;
        assert!(!firewall.allows(&Headers::parse(&fragment), &Names::new()));
        let mut cut = packet(6, [10, 2, 0, 1], 443);
        cut[14] = 0x41;
        assert!(!firewall.allows(&Headers::parse(&cut), &Names::new()), "not parsed, not accepted");
        assert!(Firewall::default().allows(&Headers::parse(&cut), &Names::new()));
    }

    #[test]
    fn rules_are_read_and_written() {
        for text in [
            "action=accept",
            "action=drop dst4=10.0.0.0/8 proto=tcp dstports=1-65535",
            "action=accept dst6=2001:db8::/32 proto=icmp icmptype=128",
            "action=accept specialtarget=dns",
            "action=accept dsthost=example.org proto=tcp",
        ] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "accept",
            "action=maybe",
            "action=drop dst4=::/0",
            "action=drop dst4=1.2.3.4/33",
            "action=drop dstports=2-1",
            "action=drop dstports=70000",
            "action=drop proto=gre",
            "action=drop x=y",
            "action=accept dsthost=a..b",
        ] {
            assert!(bad.parse::<Rule>().is_err(), "{bad}");
        }
        assert!("10.0.0.0/0".parse::<Net>().unwrap().contains([1, 2, 3, 4].into()));
        assert!(!"10.0.0.0/8".parse::<Net>().unwrap().contains([11, 2, 3, 4].into()));
    }

    #[test]
    fn names_fit_what_they_resolve_to() {
        let rule = |text: &str| Firewall { rules: vec![text.parse().unwrap()], policy: Action::Drop };
        let names = Names::from([("example.org".to_owned(), vec![[10, 2, 0, 1].into()])]);
        let to = |dst| packet(6, dst, 443);
        let accept = rule("action=accept dsthost=Example.org");
        assert!(accept.allows(&Headers::parse(&to([10, 2, 0, 1])), &names));
        assert!(!accept.allows(&Headers::parse(&to([10, 2, 0, 2])), &names));
        assert!(!accept.allows(&Headers::parse(&to([10, 2, 0, 1])), &Names::new()), "not resolved yet");
        let drop = Firewall { policy: Action::Accept, ..rule("action=drop dsthost=example.org") };
        assert!(!drop.allows(&Headers::parse(&to([10, 2, 0, 1])), &names));
        assert!(drop.allows(&Headers::parse(&to([10, 2, 0, 2])), &names));
        assert!(!drop.allows(&Headers::parse(&to([10, 2, 0, 2])), &Names::new()), "it might be that one");
        assert!(rule("action=accept dsthost=10.0.0.0/8").allows(&Headers::parse(&to([10, 9, 9, 9])), &names));
    }
}

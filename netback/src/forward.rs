//! Wiring of the driver domain's own network namespace: how packets get from the switch's TAP to the uplink.
//!
//! *Bridged* and *isolated*: TAP and uplink are the two ends of a bridge inside the namespace that does nothing but join them.
//! *Routed* and *NAT*: the kernel routes between them.
//!
//! Everything here is idempotent. hv-core keeps the namespace while the domain lives, so after a restart the
//! bridge, the addresses, the routes and the connections that NAT knows are found as they were and nothing flaps.

use std::net::Ipv4Addr;
use std::str::FromStr;

use crate::netlink::{Ipv4Conf, Link, Netlink, NetlinkError};
use crate::nft;

/// The bridge's name in [`Mode::Bridge`].
pub const BRIDGE: &str = "br0";
/// Hardware address of the kernel's end of every TAP, as Xen has it: the highest, so that a bridge never takes it as its own.
pub const TAP_MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
/// Packets that wait in the TAP at most, before the kernel drops: what comes while netback is away for some milliseconds.
pub const TAP_QUEUE_PACKETS: u32 = 1024;

/// How packets are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Guests and uplink are one Ethernet.
    #[value(name = "bridged", alias = "bridge")]
    Bridge,
    /// The same, but guests reach the uplink alone.
    Isolated,
    /// The guest sees its gateway; the kernel routes, and answers ARP for guests on the uplink.
    Routed,
    /// The guest sees its gateway; outside, its packets carry the uplink's address.
    Nat,
}

impl Mode {
    /// Guests see a gateway.
    pub fn is_routed(self) -> bool {
        matches!(self, Mode::Routed | Mode::Nat)
    }
}

/// An IPv4 address with its prefix length, written `A.B.C.D/N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Prefix {
    /// The address.
    pub address: Ipv4Addr,
    /// 0 to 32.
    pub prefix: u8,
}

impl FromStr for Ipv4Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not A.B.C.D/N");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().map_err(|_| wrong())?;
        if prefix > 32 {
            return Err(wrong());
        }
        Ok(Ipv4Prefix { address, prefix })
    }
}

/// What the administrator asked for.
#[derive(Clone, Debug)]
pub struct Wiring {
    /// How.
    pub mode: Mode,
    /// The interface towards the outside, moved into this namespace by hv-core. None: guests of this domain reach
    /// only each other.
    pub uplink: Option<String>,
    /// Routed: the gateway that guests see.
    pub gateway: Option<Ipv4Prefix>,
    /// Routed: an address for the uplink itself.
    pub uplink_address: Option<Ipv4Prefix>,
    /// Routed: where everything else goes; without it, on link.
    pub uplink_gateway: Option<Ipv4Addr>,
}

/// Why the namespace could not be wired.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    /// Routed mode needs one.
    #[error("modes routed and nat need --gateway A.B.C.D/N, the address that guests use as their gateway")]
    NoGateway,
    /// The uplink is not in this namespace.
    #[error(
        "uplink {0} is not in this domain's network namespace: name it in the domain's netdevs, and check that nobody else took it"
    )]
    NoUplink(String),
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

impl Wiring {
    /// Sets up everything around the TAP of this name.
    ///
    /// # Errors
    /// [`WiringError`]; a later call tries again from where it is.
    pub fn prepare(&self, netlink: &mut Netlink, tap: &str) -> Result<(), WiringError> {
        if self.mode.is_routed() && self.gateway.is_none() {
            return Err(WiringError::NoGateway);
        }
        let uplink = match &self.uplink {
            Some(name) => Some(netlink.link(name).map_err(|_| WiringError::NoUplink(name.clone()))?),
            None => None,
        };
        let tap = netlink.link(tap)?;
        if tap.mac != TAP_MAC {
            netlink.set_mac(tap.index, TAP_MAC)?;
            netlink.no_ipv6_of_its_own(tap.index)?;
            netlink.set_txqueuelen(tap.index, TAP_QUEUE_PACKETS)?;
        }
        // Whatever fits the uplink fits the TAP; a bridge takes the smallest.
        let mtu = uplink.map_or(1500, |uplink| uplink.mtu).max(1500);
        if tap.mtu != mtu {
            netlink.set_mtu(tap.index, mtu)?;
        }
        if self.mode.is_routed() {
            self.prepare_routes(netlink, tap, uplink)
        } else {
            Self::prepare_bridge(netlink, tap, uplink)
        }
    }

    fn prepare_bridge(netlink: &mut Netlink, tap: Link, uplink: Option<Link>) -> Result<(), WiringError> {
        let bridge = netlink.ensure_bridge(BRIDGE)?;
        if !bridge.up {
            netlink.no_ipv6_of_its_own(bridge.index)?;
            netlink.set_up(bridge.index)?;
        }
        for port in [Some(tap), uplink].into_iter().flatten() {
            if !port.up {
                netlink.no_ipv6_of_its_own(port.index)?;
            }
            if port.master != bridge.index {
                netlink.set_master(port.index, bridge.index)?;
            }
            if !port.up {
                netlink.set_up(port.index)?;
            }
        }
        Ok(())
    }

    fn prepare_routes(
        &self,
        netlink: &mut Netlink,
        tap: Link,
        uplink: Option<Link>,
    ) -> Result<(), WiringError> {
        let gateway = self.gateway.ok_or(WiringError::NoGateway)?;
        if !tap.up {
            netlink.set_up(tap.index)?;
        }
        netlink.set_ipv4_conf(tap.index, ROUTER)?;
        netlink.ensure_address(tap.index, gateway.address, gateway.prefix)?;
        let Some(uplink) = uplink else { return Ok(()) };
        netlink.set_up(uplink.index)?;
        netlink.set_ipv4_conf(uplink.index, if self.mode == Mode::Nat { NAT_ROUTER } else { ROUTER })?;
        if let Some(Ipv4Prefix { address, prefix }) = self.uplink_address {
            netlink.ensure_address(uplink.index, address, prefix)?;
        }
        netlink.ensure_route(Ipv4Addr::UNSPECIFIED, 0, uplink.index, self.uplink_gateway)?;
        if self.mode == Mode::Nat {
            nft::ensure_masquerade(uplink.index)?;
        }
        Ok(())
    }

    /// A guest's address is reached by the TAP, also if it is not in the gateway's network.
    ///
    /// # Errors
    /// [`WiringError`].
    pub fn route_to(&self, netlink: &mut Netlink, tap: &str, guest: Ipv4Addr) -> Result<(), WiringError> {
        if self.mode.is_routed() {
            let tap = netlink.link(tap)?;
            netlink.ensure_route(guest, 32, tap.index, None)?;
        }
        Ok(())
    }
}

/// Nobody outside is to know of the guests' addresses.
const NAT_ROUTER: &[(Ipv4Conf, u32)] =
    &[(Ipv4Conf::Forwarding, 1), (Ipv4Conf::SendRedirects, 0), (Ipv4Conf::RpFilter, 0)];

const ROUTER: &[(Ipv4Conf, u32)] = &[
    (Ipv4Conf::Forwarding, 1),
    (Ipv4Conf::ProxyArp, 1),
    (Ipv4Conf::SendRedirects, 0),
    (Ipv4Conf::RpFilter, 0),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        let p: Ipv4Prefix = "10.0.0.1/24".parse().unwrap();
        assert_eq!((p.address, p.prefix), (Ipv4Addr::new(10, 0, 0, 1), 24));
        for bad in ["10.0.0.1", "10.0.0.1/33", "x/24", "/", ""] {
            assert!(bad.parse::<Ipv4Prefix>().is_err(), "{bad}");
        }
    }
}

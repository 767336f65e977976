//! Wiring of the driver domain's own network namespace: how packets get from the switch's TAP to the uplink.
//!
//! *Bridged* and *isolated*: TAP and uplink are the two ends of a bridge inside the namespace that does nothing but join them.
//! *Routed* and *NAT*: the kernel routes between them.
//!
//! Everything here is idempotent. hv-core keeps the namespace while the domain lives, so after a restart the
//! bridge, the addresses, the routes and the connections that NAT knows are found as they were and nothing flaps.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::netlink::{Ipv4Conf, Link, Netlink, NetlinkError};
use crate::nft;
use crate::switch::answer::link_local;

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

/// An address with its prefix length, written `ADDRESS/N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix<A> {
    /// The address.
    pub address: A,
    /// 0 to 32, or 128.
    pub prefix: u8,
}

/// Of IPv4.
pub type Ipv4Prefix = Prefix<Ipv4Addr>;
/// Of IPv6.
pub type Ipv6Prefix = Prefix<Ipv6Addr>;

impl<A: FromStr + Into<IpAddr> + Copy> FromStr for Prefix<A> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not ADDRESS/N");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: A = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().map_err(|_| wrong())?;
        let most = if address.into().is_ipv4() { 32 } else { 128 };
        if prefix > most {
            return Err(wrong());
        }
        Ok(Prefix { address, prefix })
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
    /// Routed: the gateway's IPv6 address and the guests' network, mostly of 64 bits. None: no IPv6 for guests.
    pub gateway6: Option<Ipv6Prefix>,
    /// Routed: an IPv6 address for the uplink itself; without it the uplink takes what routers there advertise.
    pub uplink_address6: Option<Ipv6Prefix>,
    /// Routed: where everything else goes; without it, where routers on the uplink say.
    pub uplink_gateway6: Option<Ipv6Addr>,
    /// DNS servers: what guests are told by DHCP, and who is asked for names in firewall rules.
    pub dns: Vec<IpAddr>,
    /// Routed: DHCP is offered.
    pub dhcp: bool,
    /// Routed: IPv6 routers are advertised.
    pub ra: bool,
}

impl Wiring {
    /// One of a mode, with nothing else asked for.
    pub fn new(mode: Mode) -> Wiring {
        Wiring {
            mode,
            uplink: None,
            gateway: None,
            uplink_address: None,
            uplink_gateway: None,
            gateway6: None,
            uplink_address6: None,
            uplink_gateway6: None,
            dns: Vec::new(),
            dhcp: true,
            ra: true,
        }
    }
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
    /// The kernel's switches for IPv6 routing cannot be reached.
    #[error(
        "IPv6 routing: {path}: {source}; the domain needs /proc/sys/net bound in, and the kernel IPv6; or leave gateway6 out"
    )]
    Sysctl {
        /// Which.
        path: String,
        /// How it failed.
        source: std::io::Error,
    },
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// Sets one of the network namespace's switches that have no netlink message.
fn sysctl(name: &str, value: &str) -> Result<(), WiringError> {
    let path = format!("/proc/sys/net/{name}");
    // Written only if it has to change: writing some has effects of its own.
    if std::fs::read_to_string(&path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    std::fs::write(&path, value).map_err(|source| WiringError::Sysctl { path, source })
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
        netlink.ensure_address(tap.index, gateway.address.into(), gateway.prefix)?;
        if let Some(gateway) = self.gateway6 {
            sysctl("ipv6/conf/all/forwarding", "1")?;
            // The router that guests are told of; and without one the kernel asks for no neighbour.
            netlink.ensure_address(tap.index, link_local(TAP_MAC).into(), 64)?;
            netlink.ensure_address(tap.index, gateway.address.into(), gateway.prefix)?;
        }
        let Some(uplink) = uplink else { return Ok(()) };
        netlink.set_up(uplink.index)?;
        netlink.set_ipv4_conf(uplink.index, if self.mode == Mode::Nat { NAT_ROUTER } else { ROUTER })?;
        if let Some(Ipv4Prefix { address, prefix }) = self.uplink_address {
            netlink.ensure_address(uplink.index, address.into(), prefix)?;
        }
        let all = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        netlink.ensure_route(all, 0, uplink.index, self.uplink_gateway.map(IpAddr::V4))?;
        if let (Some(_), Some(name)) = (self.gateway6, &self.uplink) {
            self.prepare_ipv6(netlink, uplink, name)?;
        }
        if self.mode == Mode::Nat {
            nft::ensure_masquerade(uplink.index)?;
        }
        Ok(())
    }

    fn prepare_ipv6(&self, netlink: &mut Netlink, uplink: Link, name: &str) -> Result<(), WiringError> {
        match self.uplink_address6 {
            Some(Ipv6Prefix { address, prefix }) => {
                netlink.ensure_address(uplink.index, address.into(), prefix)?;
            }
            // A router hears advertisements only if it is told to.
            None => sysctl(&format!("ipv6/conf/{name}/accept_ra"), "2")?,
        }
        if self.mode == Mode::Routed {
            sysctl(&format!("ipv6/conf/{name}/proxy_ndp"), "1")?;
        }
        if self.uplink_gateway6.is_some() || self.uplink_address6.is_some() {
            let all = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
            netlink.ensure_route(all, 0, uplink.index, self.uplink_gateway6.map(IpAddr::V6))?;
        }
        Ok(())
    }

    /// A guest's address is reached by the TAP, also if it is not in the gateway's network; and, where the outside knows of guests,
    /// the uplink answers for it.
    ///
    /// # Errors
    /// [`WiringError`].
    pub fn route_to(&self, netlink: &mut Netlink, tap: &str, guest: IpAddr) -> Result<(), WiringError> {
        if !self.mode.is_routed() || (guest.is_ipv6() && self.gateway6.is_none()) {
            return Ok(());
        }
        let tap = netlink.link(tap)?;
        netlink.ensure_route(guest, if guest.is_ipv4() { 32 } else { 128 }, tap.index, None)?;
        if let (IpAddr::V6(guest), Mode::Routed, Some(uplink)) = (guest, self.mode, &self.uplink) {
            let uplink = netlink.link(uplink)?;
            netlink.ensure_proxy(uplink.index, guest)?;
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

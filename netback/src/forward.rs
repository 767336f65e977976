//! Wiring of the driver domain's own network namespace: how packets get from a vif's TAP to the uplink.
//!
//! Everything here is idempotent. hv-core keeps the namespace while the domain lives, so after a restart the
//! bridge, the ports and the routes are found as they were and nothing flaps.

use std::net::Ipv4Addr;
use std::str::FromStr;

use crate::netlink::{Ipv4Conf, Netlink, NetlinkError};

/// The bridge's name in [`Mode::Bridge`].
pub const BRIDGE: &str = "br0";
/// Hardware address of the kernel's end of every TAP, as Xen has it: the highest, so that a bridge never takes it as its own.
pub const TAP_MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
/// Packets that wait for a frontend at most, before the kernel drops (XSA-392: bounded whatever the guest does).
pub const TAP_QUEUE_PACKETS: u32 = 512;

/// How packets are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// TAPs and uplink are ports of one Linux bridge.
    #[value(name = "bridged", alias = "bridge")]
    Bridge,
    /// The guest sees its gateway on the TAP; the kernel routes, and answers ARP for the guest on the uplink.
    Routed,
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
    #[error("mode routed needs --gateway A.B.C.D/N, the address that guests use as their gateway")]
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
    /// Sets up what does not depend on a vif: loopback, uplink, bridge or routes.
    ///
    /// # Errors
    /// [`WiringError`]; a later call tries again from where it is.
    pub fn prepare(&self, netlink: &mut Netlink) -> Result<(), WiringError> {
        if self.mode == Mode::Routed && self.gateway.is_none() {
            return Err(WiringError::NoGateway);
        }
        let uplink = match &self.uplink {
            Some(name) => Some(netlink.link(name).map_err(|_| WiringError::NoUplink(name.clone()))?),
            None => None,
        };
        match self.mode {
            Mode::Bridge => {
                let bridge = netlink.ensure_bridge(BRIDGE)?;
                if !bridge.up {
                    netlink.no_ipv6_of_its_own(bridge.index)?;
                    netlink.set_up(bridge.index)?;
                }
                if let Some(uplink) = uplink {
                    if !uplink.up {
                        netlink.no_ipv6_of_its_own(uplink.index)?;
                    }
                    if uplink.master != bridge.index {
                        netlink.set_master(uplink.index, bridge.index)?;
                    }
                    netlink.set_up(uplink.index)?;
                }
            }
            Mode::Routed => {
                if let Some(uplink) = uplink {
                    netlink.set_up(uplink.index)?;
                    netlink.set_ipv4_conf(uplink.index, ROUTER)?;
                    if let Some(Ipv4Prefix { address, prefix }) = self.uplink_address {
                        netlink.ensure_address(uplink.index, address, prefix)?;
                    }
                    netlink.ensure_route(Ipv4Addr::UNSPECIFIED, 0, uplink.index, self.uplink_gateway)?;
                }
            }
        }
        Ok(())
    }

    /// Wires a vif's TAP in. `guest_ip` is what xenstore's `ip` node says.
    ///
    /// # Errors
    /// [`WiringError`].
    pub fn attach(
        &self,
        netlink: &mut Netlink,
        tap: &str,
        mtu: u32,
        guest_ip: Option<Ipv4Addr>,
    ) -> Result<(), WiringError> {
        let link = netlink.link(tap)?;
        if link.mac != TAP_MAC {
            netlink.set_mac(link.index, TAP_MAC)?;
            netlink.no_ipv6_of_its_own(link.index)?;
            netlink.set_txqueuelen(link.index, TAP_QUEUE_PACKETS)?;
        }
        if link.mtu != mtu {
            netlink.set_mtu(link.index, mtu)?;
        }
        match self.mode {
            Mode::Bridge => {
                let bridge = netlink.link(BRIDGE)?;
                if link.master != bridge.index {
                    netlink.set_master(link.index, bridge.index)?;
                }
                if !link.up {
                    netlink.set_up(link.index)?;
                }
            }
            Mode::Routed => {
                let gateway = self.gateway.ok_or(WiringError::NoGateway)?;
                if !link.up {
                    netlink.set_up(link.index)?;
                }
                netlink.set_ipv4_conf(link.index, ROUTER)?;
                // With the guest's address known, only that is routed here and many vifs can share the gateway.
                let prefix = if guest_ip.is_some() { 32 } else { gateway.prefix };
                netlink.ensure_address(link.index, gateway.address, prefix)?;
                if let Some(ip) = guest_ip {
                    netlink.ensure_route(ip, 32, link.index, None)?;
                }
            }
        }
        Ok(())
    }
}

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

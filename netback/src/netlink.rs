//! The little of rtnetlink that a driver domain needs to wire its own network namespace: links, addresses,
//! routes, per-interface IPv4 settings. Synchronous, one request and one acknowledgement at a time; every
//! operation succeeds if what it asks for is there already.
//!
//! Message layouts: linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLA_F_NESTED: u16 = 0x8000;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_TXQLEN: u16 = 13;
const IFLA_LINKINFO: u16 = 18;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFF_UP: u32 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;
const NDA_DST: u16 = 1;
const NTF_PROXY: u8 = 8;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

/// linux/ip.h: numbers of the per-interface IPv4 settings used here.
#[derive(Clone, Copy, Debug)]
#[repr(u16)]
pub enum Ipv4Conf {
    /// Forward packets that arrive here.
    Forwarding = 1,
    /// Answer ARP for what is routed elsewhere.
    ProxyArp = 3,
    /// Send redirects.
    SendRedirects = 6,
    /// Reverse-path filter.
    RpFilter = 8,
}

/// What netlink calls end in.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket failed.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused.
    #[error("{what}: {errno}")]
    Refused {
        /// What was asked.
        what: String,
        /// Its answer.
        errno: Errno,
    },
    /// The kernel's answer made no sense.
    #[error("{0}: the kernel's answer is cut short")]
    Answer(String),
}

impl NetlinkError {
    /// True if the kernel refused with this errno.
    pub fn is(&self, wanted: Errno) -> bool {
        matches!(self, NetlinkError::Refused { errno, .. } if *errno == wanted)
    }
}

/// A link as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface number in this namespace.
    pub index: u32,
    /// Index of the bridge it belongs to, or 0.
    pub master: u32,
    /// Administratively up.
    pub up: bool,
    /// Greatest packet, bytes.
    pub mtu: u32,
    /// Hardware address, zero if it has none.
    pub mac: [u8; 6],
}

/// A netlink socket in this process's network namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    seq: u32,
}

/// A message being built: everything after `nlmsghdr`.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// `struct ifinfomsg`.
    fn link(index: u32, flags: u32, change: u32) -> Self {
        let mut m = Vec::with_capacity(128);
        m.extend([0; 4]);
        m.extend(index.to_ne_bytes());
        m.extend(flags.to_ne_bytes());
        m.extend(change.to_ne_bytes());
        Message(m)
    }

    fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.0.extend((value.len() as u16 + 4).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    fn nested(&mut self, kind: u16, build: impl FnOnce(&mut Message)) -> &mut Self {
        let mut inner = Message::default();
        build(&mut inner);
        self.attr(kind | NLA_F_NESTED, &inner.0)
    }
}

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    /// socket(2)'s.
    pub fn open() -> Result<Self, NetlinkError> {
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
                .map_err(io::Error::from)?;
        Ok(Netlink { socket, seq: 0 })
    }

    /// Sends a request and gives the body of the answer (empty for a mere acknowledgement).
    fn call(&mut self, what: &str, kind: u16, flags: u16, body: &Message) -> Result<Vec<u8>, NetlinkError> {
        self.seq += 1;
        let mut msg = Vec::with_capacity(16 + body.0.len());
        msg.extend((16 + body.0.len() as u32).to_ne_bytes());
        msg.extend(kind.to_ne_bytes());
        msg.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        msg.extend(self.seq.to_ne_bytes());
        msg.extend([0; 4]);
        msg.extend(&body.0);
        sendto(self.socket.as_raw_fd(), &msg, &NetlinkAddr::new(0, 0), MsgFlags::empty())
            .map_err(io::Error::from)?;
        let mut answer = vec![0; 32 * 1024];
        loop {
            let got =
                recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(io::Error::from)?;
            let cut = || NetlinkError::Answer(what.to_string());
            let message = answer.get(..got).ok_or_else(cut)?;
            let field = |at: usize| -> Result<u32, NetlinkError> {
                let bytes = message.get(at..at + 4).ok_or_else(cut)?;
                Ok(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            };
            if field(8)? != self.seq {
                continue;
            }
            let len = field(0)? as usize;
            if field(4)? as u16 != NLMSG_ERROR {
                return Ok(message.get(16..len).ok_or_else(cut)?.to_vec());
            }
            return match field(16)? as i32 {
                0 => Ok(Vec::new()),
                errno => Err(NetlinkError::Refused {
                    what: what.to_string(),
                    errno: Errno::from_raw(errno.wrapping_neg()),
                }),
            };
        }
    }

    fn change(&mut self, what: &str, kind: u16, flags: u16, body: &Message) -> Result<(), NetlinkError> {
        self.call(what, kind, flags | NLM_F_ACK, body).map(drop)
    }

    /// Looks an interface up.
    ///
    /// # Errors
    /// `ENODEV` if there is none of that name.
    pub fn link(&mut self, name: &str) -> Result<Link, NetlinkError> {
        let what = format!("looking up interface {name}");
        let mut body = Message::link(0, 0, 0);
        body.text(IFLA_IFNAME, name);
        let answer = self.call(&what, RTM_GETLINK, 0, &body)?;
        parse_link(&answer).ok_or(NetlinkError::Answer(what))
    }

    /// The bridge `name`, made if there is none: no spanning tree, no delay, no multicast snooping.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the kernel has no bridges.
    pub fn ensure_bridge(&mut self, name: &str) -> Result<Link, NetlinkError> {
        let mut body = Message::link(0, 0, 0);
        body.text(IFLA_IFNAME, name).nested(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "bridge").nested(IFLA_INFO_DATA, |data| {
                data.attr(IFLA_BR_FORWARD_DELAY, &0u32.to_ne_bytes()).attr(IFLA_BR_MCAST_SNOOPING, &[0]);
            });
        });
        let made =
            self.change(&format!("making bridge {name}"), RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &body);
        match made {
            Err(e) if !e.is(Errno::EEXIST) => Err(e),
            _ => self.link(name),
        }
    }

    /// Makes a veth pair (for tests and for the host's end of an uplink).
    ///
    /// # Errors
    /// `EEXIST` if one of the names is taken.
    pub fn add_veth(&mut self, name: &str, peer: &str) -> Result<(), NetlinkError> {
        const VETH_INFO_PEER: u16 = 1;
        let mut body = Message::link(0, 0, 0);
        body.text(IFLA_IFNAME, name).nested(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |p| {
                    p.0.extend(Message::link(0, 0, 0).0);
                    p.text(IFLA_IFNAME, peer);
                });
            });
        });
        self.change(&format!("making veth {name}"), RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &body)
    }

    /// Removes an interface.
    ///
    /// # Errors
    /// `ENODEV`; `EOPNOTSUPP` for real ones.
    pub fn delete_link(&mut self, index: u32) -> Result<(), NetlinkError> {
        self.change(&format!("removing interface {index}"), RTM_DELLINK, 0, &Message::link(index, 0, 0))
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_up(&mut self, index: u32) -> Result<(), NetlinkError> {
        self.change(
            &format!("setting interface {index} up"),
            RTM_NEWLINK,
            0,
            &Message::link(index, IFF_UP, IFF_UP),
        )
    }

    fn set(&mut self, index: u32, what: &str, attr: u16, value: &[u8]) -> Result<(), NetlinkError> {
        let mut body = Message::link(index, 0, 0);
        body.attr(attr, value);
        self.change(&format!("{what} of interface {index}"), RTM_NEWLINK, 0, &body)
    }

    /// Puts an interface into a bridge (0: takes it out).
    ///
    /// # Errors
    /// The kernel's; `ELOOP`, `EBUSY` for interfaces that cannot be in one.
    pub fn set_master(&mut self, index: u32, bridge: u32) -> Result<(), NetlinkError> {
        self.set(index, "bridge", IFLA_MASTER, &bridge.to_ne_bytes())
    }

    /// Sets the MTU.
    ///
    /// # Errors
    /// `EINVAL` out of the device's range.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), NetlinkError> {
        self.set(index, "MTU", IFLA_MTU, &mtu.to_ne_bytes())
    }

    /// Sets the hardware address.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_mac(&mut self, index: u32, mac: [u8; 6]) -> Result<(), NetlinkError> {
        self.set(index, "hardware address", IFLA_ADDRESS, &mac)
    }

    /// Sets how many packets wait in the device's queue at most: for a TAP, the bound of what waits for the frontend.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_txqueuelen(&mut self, index: u32, packets: u32) -> Result<(), NetlinkError> {
        self.set(index, "queue length", IFLA_TXQLEN, &packets.to_ne_bytes())
    }

    /// Keeps the kernel from talking IPv6 of its own on the interface. Kernels without IPv6 have nothing to say.
    ///
    /// # Errors
    /// The kernel's, `EAFNOSUPPORT` excepted.
    pub fn no_ipv6_of_its_own(&mut self, index: u32) -> Result<(), NetlinkError> {
        let mut body = Message::link(index, 0, 0);
        body.nested(IFLA_AF_SPEC, |spec| {
            spec.nested(nix::libc::AF_INET6 as u16, |v6| {
                v6.attr(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
            });
        });
        match self.change(&format!("IPv6 of interface {index}"), RTM_NEWLINK, 0, &body) {
            Err(e) if e.is(Errno::EAFNOSUPPORT) || e.is(Errno::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    /// Sets per-interface IPv4 settings (what /proc/sys/net/ipv4/conf holds; there is no /proc in the sandbox).
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_ipv4_conf(&mut self, index: u32, settings: &[(Ipv4Conf, u32)]) -> Result<(), NetlinkError> {
        let mut body = Message::link(index, 0, 0);
        body.nested(IFLA_AF_SPEC, |spec| {
            spec.nested(nix::libc::AF_INET as u16, |v4| {
                v4.nested(IFLA_INET_CONF, |conf| {
                    for (setting, value) in settings {
                        conf.attr(*setting as u16, &value.to_ne_bytes());
                    }
                });
            });
        });
        self.change(&format!("IPv4 settings of interface {index}"), RTM_NEWLINK, 0, &body)
    }

    /// Gives an interface an address.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ensure_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> Result<(), NetlinkError> {
        let (family, octets) = octets(address);
        let mut body = Message(vec![family, prefix, 0, RT_SCOPE_UNIVERSE]);
        body.0.extend(index.to_ne_bytes());
        body.attr(IFA_LOCAL, &octets).attr(IFA_ADDRESS, &octets);
        if address.is_ipv6() {
            // Of use at once: nobody else on the link was given it.
            body.attr(IFA_FLAGS, &IFA_F_NODAD.to_ne_bytes());
        }
        let what = format!("address {address}/{prefix} on interface {index}");
        self.change(&what, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body)
    }

    /// Routes `to`/`prefix` to an interface: on link, or by `gateway`.
    ///
    /// # Errors
    /// `ENETUNREACH` for a gateway that no link reaches.
    pub fn ensure_route(
        &mut self,
        to: IpAddr,
        prefix: u8,
        index: u32,
        gateway: Option<IpAddr>,
    ) -> Result<(), NetlinkError> {
        let scope = if gateway.is_some() || to.is_ipv6() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
        let (family, to_octets) = octets(to);
        let mut body =
            Message(vec![family, prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST, 0, 0, 0, 0]);
        if prefix > 0 {
            body.attr(RTA_DST, &to_octets);
        }
        body.attr(RTA_OIF, &index.to_ne_bytes());
        if let Some(gateway) = gateway {
            body.attr(RTA_GATEWAY, &octets(gateway).1);
        }
        let what = format!("route to {to}/{prefix}");
        self.change(&what, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body)
    }

    /// Answers neighbour solicitations for `address` on an interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ensure_proxy(&mut self, index: u32, address: Ipv6Addr) -> Result<(), NetlinkError> {
        let mut body = Message(vec![nix::libc::AF_INET6 as u8, 0, 0, 0]);
        body.0.extend(index.to_ne_bytes());
        body.0.extend([0, 0, NTF_PROXY, RTN_UNICAST]);
        body.attr(NDA_DST, &address.octets());
        let what = format!("proxy for {address} on interface {index}");
        self.change(&what, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &body)
    }
}

fn octets(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(a) => (nix::libc::AF_INET as u8, a.octets().to_vec()),
        IpAddr::V6(a) => (nix::libc::AF_INET6 as u8, a.octets().to_vec()),
    }
}

fn parse_link(answer: &[u8]) -> Option<Link> {
    let u32_at = |b: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(b.get(at..at + 4)?.try_into().ok()?))
    };
    let mut link = Link {
        index: u32_at(answer, 4)?,
        master: 0,
        up: u32_at(answer, 8)? & IFF_UP != 0,
        mtu: 0,
        mac: [0; 6],
    };
    let mut rest = answer.get(16..)?;
    while rest.len() >= 4 {
        let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]);
        let value = rest.get(4..len)?;
        match kind {
            IFLA_MASTER => link.master = u32_at(value, 0)?,
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            IFLA_ADDRESS if value.len() == 6 => link.mac.copy_from_slice(value),
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(link)
}

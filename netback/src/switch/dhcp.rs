//! DHCP (RFC 2131) for guests of a routed domain. The wire format is smoltcp's.
//!
//! A guest whose address the toolstack knows gets that one. Others get a lease out of the gateway's network, by their Ethernet
//! address, which the toolstack knows: nobody can take all. Leases are kept in memory that outlives the incarnation, and are
//! kept before they are told.

use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use domain_kit::ring::Span;
use serde::{Deserialize, Serialize};
use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};

use crate::headers::{ETHERTYPE_IPV4, Headers, Mac};
use crate::offload;
use domain_kit::kept;

/// Bytes of memory that the leases take.
pub const BYTES: usize = kept::BYTES;
/// Most leases.
const MAX_LEASES: usize = 1024;
/// Seconds of a lease; half of it later the guest asks again.
const TIME: u32 = 3600;
/// Seconds for which an address that was offered is kept for who it was offered to.
const OFFERED: u32 = 60;
/// Seconds for which an address is not given to anybody after a guest found it in use.
const DECLINED: u32 = 600;
/// Longest request that is looked at, bytes of its frame.
pub const MAX_FRAME: usize = 1514;
const OPTION_MTU: u8 = 26;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Lease {
    mac: Mac,
    ip: Ipv4Addr,
    /// Second of [`super::seconds`] at which it ends.
    until: u32,
    /// Taken, not only offered.
    taken: bool,
}

/// The leases.
#[derive(Debug)]
pub struct Leases {
    mem: Span,
    list: Mutex<Vec<Lease>>,
}

/// What guests are told beside their address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// DNS servers, of which three are told.
    pub dns: Vec<Ipv4Addr>,
}

/// The network in which addresses are given.
#[derive(Clone, Copy, Debug)]
pub struct Network<'a> {
    /// The gateway's Ethernet address.
    pub mac: Mac,
    /// The gateway, which is the server.
    pub gateway: Ipv4Addr,
    /// Its network.
    pub prefix: u8,
    /// What else is told.
    pub options: &'a Options,
}

impl Network<'_> {
    fn contains(&self, ip: Ipv4Addr) -> bool {
        let mask = mask(self.prefix);
        let host = u32::from(ip) & !mask;
        u32::from(ip) & mask == u32::from(self.gateway) & mask && host != 0 && host != !mask
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its address if the toolstack gave it one.
    pub fixed: Option<Ipv4Addr>,
    /// Greatest packet.
    pub mtu: u32,
}

/// What comes of a request.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Goes back.
    pub answer: Option<Vec<u8>>,
    /// The leases have changed: somebody's address is another now.
    pub changed: bool,
}

impl Leases {
    /// Takes up what a predecessor kept.
    pub fn new(mem: Span) -> Leases {
        let list = Mutex::new(kept::load(&mem).unwrap_or_default());
        Leases { mem, list }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Lease>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address that this guest has by a lease.
    pub fn of(&self, mac: Mac, now: u32) -> Option<Ipv4Addr> {
        let list = self.lock();
        list.iter().find(|l| l.mac == mac && l.taken && l.until > now).map(|l| l.ip)
    }

    /// How many addresses are taken.
    pub fn taken(&self, now: u32) -> usize {
        self.lock().iter().filter(|l| l.taken && l.until > now).count()
    }

    fn save(&self, list: &[Lease]) {
        if let Err(error) = kept::save(&self.mem, &list) {
            tracing::error!(%error, "leases are not kept");
        }
    }

    /// The address that is this client's, made its own for `time` seconds. `None`: none is free.
    fn assign(
        &self,
        network: &Network<'_>,
        client: &Client,
        wish: Option<Ipv4Addr>,
        others: impl Fn(Ipv4Addr) -> bool,
        (now, time, taken): (u32, u32, bool),
    ) -> Option<(Ipv4Addr, bool)> {
        if let Some(ip) = client.fixed {
            return Some((ip, false));
        }
        let mut list = self.lock();
        list.retain(|l| l.until > now);
        let until = now.saturating_add(time);
        if let Some(own) = list.iter_mut().find(|l| l.mac == client.mac) {
            let changed = taken && !own.taken;
            own.until = own.until.max(until);
            own.taken |= taken;
            let ip = own.ip;
            self.save(&list);
            return Some((ip, changed));
        }
        let free = |ip: Ipv4Addr| {
            network.contains(ip) && ip != network.gateway && !others(ip) && list.iter().all(|l| l.ip != ip)
        };
        // The same guest finds the same address again as long as it is free, also after its lease is over.
        let size = !mask(network.prefix);
        let first = crc32c::crc32c(&client.mac);
        let at = |i: u32| {
            Ipv4Addr::from(u32::from(network.gateway) & mask(network.prefix) | (first.wrapping_add(i) & size))
        };
        let found = wish.filter(|&ip| free(ip));
        let ip = found.or_else(|| (0..=size.min(4096)).map(at).find(|&ip| free(ip)))?;
        if list.len() >= MAX_LEASES {
            return None;
        }
        list.push(Lease { mac: client.mac, ip, until, taken });
        self.save(&list);
        Some((ip, taken))
    }

    fn release(&self, mac: Mac) -> bool {
        let mut list = self.lock();
        let before = list.len();
        list.retain(|l| l.mac != mac);
        if list.len() != before {
            self.save(&list);
        }
        list.len() != before
    }

    /// Somebody else has the address: it is given to nobody for a while.
    fn decline(&self, client: &Client, now: u32) -> bool {
        let mut list = self.lock();
        let Some(own) = list.iter_mut().find(|l| l.mac == client.mac) else { return false };
        (own.mac, own.taken, own.until) = ([0; 6], false, now.saturating_add(DECLINED));
        self.save(&list);
        true
    }

    /// Deals with the DHCP request in `frame`. `others` says whether somebody else has an address.
    pub fn serve(
        &self,
        frame: &[u8],
        network: &Network<'_>,
        client: &Client,
        others: impl Fn(Ipv4Addr) -> bool,
        now: u32,
    ) -> Outcome {
        let nothing = Outcome::default();
        let headers = Headers::parse(frame);
        let Some(bytes) = headers.transport().and_then(|at| frame.get(at + 8..)) else { return nothing };
        let Ok(packet) = DhcpPacket::new_checked(bytes) else { return nothing };
        let Ok(request) = DhcpRepr::parse(&packet) else { return nothing };
        if request.client_hardware_address != EthernetAddress(client.mac) {
            return nothing;
        }
        let reply =
            |kind, ip, changed| Outcome { answer: reply(network, client, &request, kind, ip), changed };
        match request.message_type {
            DhcpMessageType::Discover => {
                let terms = (now, OFFERED, false);
                match self.assign(network, client, request.requested_ip, others, terms) {
                    Some((ip, changed)) => reply(DhcpMessageType::Offer, ip, changed),
                    None => {
                        tracing::warn!("no address is free for a guest that asks by DHCP");
                        nothing
                    }
                }
            }
            DhcpMessageType::Request => {
                if request.server_identifier.is_some_and(|server| server != network.gateway) {
                    // It chose another server's offer.
                    return Outcome { answer: None, changed: self.release(client.mac) };
                }
                let wish = request.requested_ip.or(Some(request.client_ip)).filter(|ip| !ip.is_unspecified());
                let own = client.fixed.or_else(|| self.known(client.mac, now));
                // After the leases were lost, a guest that goes on with its address may keep it if it is free.
                if own.is_some() && own != wish {
                    return reply(DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED, false);
                }
                match self.assign(network, client, wish, others, (now, TIME, true)) {
                    Some((ip, changed)) if Some(ip) == wish => reply(DhcpMessageType::Ack, ip, changed),
                    Some(_) => {
                        self.release(client.mac);
                        reply(DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED, true)
                    }
                    None => reply(DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED, false),
                }
            }
            DhcpMessageType::Release => Outcome { answer: None, changed: self.release(client.mac) },
            DhcpMessageType::Decline => Outcome { answer: None, changed: self.decline(client, now) },
            DhcpMessageType::Inform => reply(DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED, false),
            _ => nothing,
        }
    }

    fn known(&self, mac: Mac, now: u32) -> Option<Ipv4Addr> {
        self.lock().iter().find(|l| l.mac == mac && l.until > now).map(|l| l.ip)
    }
}

fn reply(
    network: &Network<'_>,
    client: &Client,
    request: &DhcpRepr<'_>,
    kind: DhcpMessageType,
    ip: Ipv4Addr,
) -> Option<Vec<u8>> {
    let refused = kind == DhcpMessageType::Nak;
    let leased = !refused && !ip.is_unspecified();
    let mtu = (client.mtu.min(u32::from(u16::MAX)) as u16).to_be_bytes();
    let options = [DhcpOption { kind: OPTION_MTU, data: &mtu }];
    // An address outside of the gateway's network is a network by itself, with the gateway on the link.
    let prefix = if network.contains(ip) { network.prefix } else { 32 };
    let time = if client.fixed.is_some() { 12 * TIME } else { TIME };
    let repr = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if leased { request.client_ip } else { Ipv4Addr::UNSPECIFIED },
        your_ip: ip,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: (!refused).then_some(network.gateway),
        subnet_mask: leased.then(|| mask(prefix).into()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(network.gateway),
        parameter_request_list: None,
        dns_servers: (!refused && !network.options.dns.is_empty())
            .then(|| network.options.dns.iter().take(3).copied().collect()),
        max_size: None,
        lease_duration: leased.then_some(time),
        renew_duration: leased.then_some(time / 2),
        rebind_duration: leased.then_some(time / 8 * 7),
        additional_options: if refused { &[] } else { &options },
    };
    // BOOTP's least.
    let mut body = vec![0; repr.buffer_len().max(300)];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut body)).ok()?;
    let dst =
        if request.client_ip.is_unspecified() || refused { Ipv4Addr::BROADCAST } else { request.client_ip };
    Some(udp(network, client.mac, dst, &body))
}

/// A frame with a UDP packet from the server to a client.
fn udp(network: &Network<'_>, to: Mac, dst: Ipv4Addr, body: &[u8]) -> Vec<u8> {
    let mut f = Vec::with_capacity(42 + body.len());
    f.extend(to);
    f.extend(network.mac);
    f.extend(ETHERTYPE_IPV4.to_be_bytes());
    f.extend([0x45, 0x10]);
    f.extend((28 + body.len() as u16).to_be_bytes());
    f.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    f.extend(network.gateway.octets());
    f.extend(dst.octets());
    let sum = offload::checksum(&f[14..34]);
    f[24..26].copy_from_slice(&sum.to_be_bytes());
    f.extend([0, 67, 0, 68]);
    f.extend((8 + body.len() as u16).to_be_bytes());
    f.extend([0, 0]);
    f.extend(body);
    if let Ok((at, value)) = offload::finish_checksum(&f) {
        f[at..at + 2].copy_from_slice(&value);
    }
    f
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use domain_kit::mem::SharedMem;

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);

    fn mem() -> Span {
        Span::new(Arc::new(SharedMem::create("test", BYTES).unwrap().0), 0, BYTES)
    }

    fn client(n: u8) -> Client {
        Client { mac: [0, 0x16, 0x3e, 0, 0, n], fixed: None, mtu: 1400 }
    }

    pub(in crate::switch) fn request(
        c: &Client,
        kind: DhcpMessageType,
        wish: Option<Ipv4Addr>,
        own: Ipv4Addr,
    ) -> Vec<u8> {
        let repr = DhcpRepr {
            message_type: kind,
            transaction_id: 7,
            secs: 0,
            client_hardware_address: EthernetAddress(c.mac),
            client_ip: own,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip: wish,
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut body = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut body)).unwrap();
        let mut f = udp(
            &Network { mac: c.mac, gateway: own, prefix: 24, options: &Options::default() },
            [0xff; 6],
            Ipv4Addr::BROADCAST,
            &body,
        );
        f[34..38].copy_from_slice(&[0, 68, 0, 67]);
        f
    }

    struct Net {
        leases: Leases,
        mem: Span,
        prefix: u8,
        now: u32,
    }

    impl Net {
        fn new(prefix: u8) -> Net {
            let mem = mem();
            Net { leases: Leases::new(mem.clone()), mem, prefix, now: 100 }
        }

        /// Kind, address, DNS servers, mask, MTU of the answer.
        fn ask(
            &self,
            c: &Client,
            kind: DhcpMessageType,
            wish: Option<Ipv4Addr>,
            own: Ipv4Addr,
        ) -> Option<(DhcpMessageType, Ipv4Addr, Option<Ipv4Addr>)> {
            let options = Options { dns: vec![[9, 9, 9, 9].into()] };
            let network =
                Network { mac: [0xfe; 6], gateway: GATEWAY, prefix: self.prefix, options: &options };
            let frame = request(c, kind, wish, own);
            let others = |ip: Ipv4Addr| ip.octets()[3] == 77;
            let answer = self.leases.serve(&frame, &network, c, others, self.now).answer?;
            let h = Headers::parse(&answer);
            assert_eq!((h.dst(), h.src(), h.ports()), (c.mac, [0xfe; 6], Some((67, 68))));
            assert_eq!(offload::checksum(&answer[14..34]), 0);
            let packet = DhcpPacket::new_checked(&answer[42..]).unwrap();
            let repr = DhcpRepr::parse(&packet).unwrap();
            assert_eq!((repr.transaction_id, repr.server_identifier), (7, Some(GATEWAY)));
            if repr.message_type != DhcpMessageType::Nak {
                assert_eq!(repr.dns_servers.as_ref().map(|d| d[0]), Some([9, 9, 9, 9].into()));
                assert_eq!(repr.router, Some(GATEWAY));
                let mtu = packet.options().find(|o| o.kind == OPTION_MTU).map(|o| o.data.to_vec());
                assert_eq!(mtu, Some(1400u16.to_be_bytes().to_vec()));
            }
            Some((repr.message_type, repr.your_ip, repr.subnet_mask))
        }

        fn lease(&self, c: &Client) -> Option<Ipv4Addr> {
            let (kind, ip, _) = self.ask(c, DhcpMessageType::Discover, None, Ipv4Addr::UNSPECIFIED)?;
            assert_eq!(kind, DhcpMessageType::Offer);
            let (kind, got, mask) = self.ask(c, DhcpMessageType::Request, Some(ip), Ipv4Addr::UNSPECIFIED)?;
            assert_eq!((kind, got, mask), (DhcpMessageType::Ack, ip, Some(super::mask(self.prefix).into())));
            Some(ip)
        }
    }

    #[test]
    fn leases_outlive_the_server_and_are_its_guests_own() {
        let mut net = Net::new(24);
        let ips: Vec<_> = (1..=100).map(|n| net.lease(&client(n)).unwrap()).collect();
        let mut unique = ips.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), 100);
        assert!(
            unique
                .iter()
                .all(|ip| ip.octets()[..3] == [10, 9, 0] && ![0, 1, 77, 255].contains(&ip.octets()[3]))
        );
        // A new incarnation.
        net.leases = Leases::new(net.mem.clone());
        assert_eq!(net.leases.taken(net.now), 100);
        for (n, ip) in (1..=100).zip(&ips) {
            assert_eq!(net.leases.of(client(n).mac, net.now), Some(*ip));
            // Renewing: from its own address, to the server.
            let (kind, again, _) = net.ask(&client(n), DhcpMessageType::Request, None, *ip).unwrap();
            assert_eq!((kind, again), (DhcpMessageType::Ack, *ip));
        }
        // Another's address is refused.
        let (kind, ..) =
            net.ask(&client(1), DhcpMessageType::Request, Some(ips[1]), Ipv4Addr::UNSPECIFIED).unwrap();
        assert_eq!(kind, DhcpMessageType::Nak);
        // It comes to an end, and the same guest finds the same address again.
        net.now += TIME + 1;
        assert_eq!(net.leases.of(client(1).mac, net.now), None);
        assert_eq!(net.lease(&client(1)), Some(ips[0]));
        net.ask(&client(1), DhcpMessageType::Release, None, ips[0]);
        assert_eq!(net.leases.of(client(1).mac, net.now), None);
    }

    #[test]
    fn the_toolstacks_address_comes_first() {
        let net = Net::new(24);
        let fixed = Client { fixed: Some([10, 9, 0, 5].into()), ..client(3) };
        assert_eq!(net.lease(&fixed), Some([10, 9, 0, 5].into()));
        assert_eq!(net.leases.taken(net.now), 0);
        let outside = Client { fixed: Some([172, 16, 0, 5].into()), ..client(4) };
        let (_, ip, mask) =
            net.ask(&outside, DhcpMessageType::Discover, None, Ipv4Addr::UNSPECIFIED).unwrap();
        assert_eq!((ip, mask), ([172, 16, 0, 5].into(), Some(Ipv4Addr::BROADCAST)));
        let (kind, ..) = net
            .ask(&fixed, DhcpMessageType::Request, Some([10, 9, 0, 6].into()), Ipv4Addr::UNSPECIFIED)
            .unwrap();
        assert_eq!(kind, DhcpMessageType::Nak);
    }

    #[test]
    fn a_network_that_is_full_and_an_address_in_use() {
        let mut net = Net::new(29);
        let ips: Vec<_> = (1..=5).map(|n| net.lease(&client(n))).collect();
        assert!(ips.iter().all(Option::is_some), "{ips:?}");
        assert_eq!(net.lease(&client(6)), None);
        net.ask(&client(2), DhcpMessageType::Decline, ips[1], Ipv4Addr::UNSPECIFIED);
        assert_eq!(net.lease(&client(2)), None, "all others are taken");
        net.now += DECLINED + 1;
        assert_eq!(net.lease(&client(2)), ips[1]);
    }

    proptest::proptest! {
        #[test]
        fn nonsense_is_not_answered(mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600), cut in 0usize..700) {
            let net = Net::new(24);
            let options = Options::default();
            let network = Network { mac: [0xfe; 6], gateway: GATEWAY, prefix: 24, options: &options };
            let mut frame = request(&client(1), DhcpMessageType::Discover, None, Ipv4Addr::UNSPECIFIED);
            // Random options behind an honest beginning, and honest requests cut anywhere.
            frame.truncate(frame.len().min(cut.max(43)));
            let _ = net.leases.serve(&frame, &network, &client(1), |_| false, 1);
            frame.truncate(frame.len().min(42 + 240));
            frame.append(&mut bytes);
            let _ = net.leases.serve(&frame, &network, &client(1), |_| false, 1);
        }
    }
}

//! Decisions, by ports without queues.

use std::net::Ipv6Addr;

use domain_kit::mem::SharedMem;

use super::port::{Groups, PortParts};
use super::*;
use crate::connection::VifId;
use crate::hash::HashConfig;
use crate::offload;
use crate::tap::Offloads;

const US: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
const OUTSIDE: Mac = [2, 0, 0, 0, 0, 9];

fn mac(n: u8) -> Mac {
    [0, 0x16, 0x3e, 0, 0, n]
}

struct Net {
    switch: Switch,
    arena: Span,
}

impl Net {
    fn new(plan: Plan) -> Net {
        let span = |len| Span::new(Arc::new(SharedMem::create("test", len).unwrap().0), 0, len);
        let memory = Memory { fdb: span(fdb::BYTES), leases: span(dhcp::BYTES), rules: span(RULES_BYTES) };
        Net { switch: Switch::new(plan, memory), arena: span(8192) }
    }

    fn routed() -> Net {
        Net::new(Plan {
            routed: Some(Gateway {
                mac: US,
                ipv4: ([10, 0, 0, 254].into(), 24),
                ipv6: Some(("fd00:0:0:7::1".parse().unwrap(), 64)),
                dhcp: Some(dhcp::Options::default()),
                ra: true,
            }),
            isolated: false,
        })
    }

    /// A port with this number and address 10.0.0.<number>, if it is to have one.
    fn port(&self, n: u8, change: impl FnOnce(&mut Settings)) -> Arc<Port> {
        let mut settings =
            Settings { mac: Some(mac(n)), ipv4: vec![[10, 0, 0, n].into()], ..Settings::default() };
        change(&mut settings);
        let parts = PortParts {
            slot: n.into(),
            id: VifId { frontend: n.into(), handle: 0 },
            offloads: Offloads { csum: true, sg: true, gso_tcpv4: true, ..Offloads::default() },
            queues: Vec::new(),
            settings,
            hash: HashConfig::default(),
            groups: Groups::default(),
            headroom: 0,
            stats: Arc::default(),
        };
        let port = Arc::new(Port::new(parts, |why| panic!("{why}")));
        self.switch.attach(port.clone());
        port
    }

    fn decide_at(&self, origin: Origin<'_>, bytes: &[u8], now: u32) -> Verdict {
        self.arena.copy_in(64, bytes);
        let frame = Frame { at: 64, len: bytes.len(), meta: offload::Meta::default(), away: Away::NOTHING };
        self.switch.decide(&self.switch.table(), origin, &self.arena, &frame, now)
    }

    fn decide(&self, origin: Origin<'_>, bytes: &[u8]) -> Verdict {
        self.decide_at(origin, bytes, 100)
    }

    /// The slot that it goes to.
    fn slot(&self, origin: Origin<'_>, bytes: &[u8]) -> Option<u16> {
        match self.decide(origin, bytes) {
            Verdict::Port { slot, .. } => Some(slot),
            _ => None,
        }
    }
}

fn ip(dst: Mac, src: Mac, from: u8, to: [u8; 4]) -> Vec<u8> {
    let mut f = vec![0; 60];
    f[..6].copy_from_slice(&dst);
    f[6..12].copy_from_slice(&src);
    f[12..14].copy_from_slice(&[8, 0]);
    f[14] = 0x45;
    f[17] = 46;
    f[22] = 64;
    f[23] = 17;
    f[26..30].copy_from_slice(&[10, 0, 0, from]);
    f[30..34].copy_from_slice(&to);
    f
}

fn arp(src: Mac, from: u8, target: [u8; 4]) -> Vec<u8> {
    let mut f = vec![0; 42];
    f[..6].fill(0xff);
    f[6..12].copy_from_slice(&src);
    f[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    f[22..28].copy_from_slice(&src);
    f[28..32].copy_from_slice(&[10, 0, 0, from]);
    f[38..42].copy_from_slice(&target);
    f
}

const NO_WAY: Verdict = Verdict::Drop(Denied::NoWay);

#[test]
fn bridged_knows_and_learns() {
    let net = Net::new(Plan::default());
    let (a, _b) = (net.port(1, |_| {}), net.port(2, |_| {}));
    let free = net.port(3, |s| s.antispoof = false);
    let from_a = Origin::Vif(&a);
    let to = |dst, src, n| ip(dst, src, n, [10, 0, 0, 99]);
    assert_eq!(net.slot(from_a, &to(mac(2), mac(1), 1)), Some(2));
    assert_eq!(net.decide(from_a, &to(mac(1), mac(1), 1)), NO_WAY, "to itself");
    assert_eq!(net.decide(from_a, &to(OUTSIDE, mac(1), 1)), Verdict::Flood, "not known yet");
    assert_eq!(net.decide(from_a, &arp(mac(1), 1, [10, 0, 0, 2])), Verdict::Flood);
    assert_eq!(net.decide(from_a, &to(mac(2), mac(2), 1)), Verdict::Drop(Denied::Spoofed));
    // The uplink teaches, and so does a vif that may use any address.
    assert_eq!(net.slot(Origin::Uplink, &to(mac(1), OUTSIDE, 9)), Some(1));
    assert_eq!(net.decide(from_a, &to(OUTSIDE, mac(1), 1)), Verdict::Uplink);
    let many = [2, 2, 2, 2, 2, 2];
    net.decide(Origin::Vif(&free), &to(mac(1), many, 7));
    assert_eq!(net.slot(from_a, &to(many, mac(1), 1)), Some(3));
    // A guest's fixed address cannot be taken over from elsewhere.
    net.decide(Origin::Uplink, &to(mac(1), mac(2), 9));
    net.decide(Origin::Vif(&free), &to(mac(1), mac(2), 9));
    assert_eq!(net.slot(from_a, &to(mac(2), mac(1), 1)), Some(2));
    // What comes from the uplink does not go back there; what was learned is forgotten in time, and with its port.
    assert_eq!(net.decide(Origin::Uplink, &to(OUTSIDE, OUTSIDE, 9)), NO_WAY);
    let late = net.decide_at(from_a, &to(OUTSIDE, mac(1), 1), 101 + fdb::MAX_AGE);
    assert_eq!(late, Verdict::Flood);
    net.switch.detach(3);
    assert_eq!(net.decide(from_a, &to(many, mac(1), 1)), Verdict::Flood);
}

#[test]
fn isolated_guests_reach_the_uplink_alone() {
    for all in [false, true] {
        let net = Net::new(Plan { routed: None, isolated: all });
        let a = net.port(1, |_| {});
        let b = net.port(2, |s| s.isolated = !all);
        assert_eq!(net.decide(Origin::Vif(&a), &ip(mac(2), mac(1), 1, [10, 0, 0, 2])), NO_WAY);
        assert_eq!(net.decide(Origin::Vif(&b), &ip(mac(1), mac(2), 2, [10, 0, 0, 1])), NO_WAY);
        assert_eq!(net.slot(Origin::Uplink, &ip(mac(2), OUTSIDE, 9, [10, 0, 0, 2])), Some(2));
    }
}

#[test]
fn a_routed_guest_sees_its_gateway_alone() {
    let net = Net::routed();
    let (a, _b) = (net.port(1, |_| {}), net.port(2, |_| {}));
    let _far = net.port(3, |s| s.isolated = true);
    let from_a = Origin::Vif(&a);
    // Everything is at the gateway's address, but its own.
    for target in [[10, 0, 0, 2], [10, 0, 0, 254], [9, 9, 9, 9]] {
        let Verdict::Answer(answer) = net.decide(from_a, &arp(mac(1), 1, target)) else {
            panic!("{target:?}")
        };
        let said = Headers::parse(&answer).arp().unwrap();
        assert_eq!(said.sender, (US, target.into()));
    }
    assert_eq!(net.decide(from_a, &arp(mac(1), 1, [10, 0, 0, 1])), NO_WAY);
    // To another guest by the short cut: its address, ours, and one hop less.
    let Verdict::Port { slot, frame, .. } = net.decide(from_a, &ip(US, mac(1), 1, [10, 0, 0, 2])) else {
        panic!()
    };
    let mut bytes = [0; 60];
    net.arena.copy_out(frame.at, &mut bytes);
    assert_eq!((slot, &bytes[..6], &bytes[6..12], bytes[22]), (2, &mac(2)[..], &US[..], 63));
    let mut last_hop = ip(US, mac(1), 1, [10, 0, 0, 2]);
    last_hop[22] = 1;
    assert_eq!(net.decide(from_a, &last_hop), NO_WAY);
    assert_eq!(net.decide(from_a, &ip(US, mac(1), 1, [10, 0, 0, 3])), NO_WAY, "isolated");
    // The rest is for the kernel; past the gateway goes nothing.
    assert_eq!(net.decide(from_a, &ip(US, mac(1), 1, [9, 9, 9, 9])), Verdict::Uplink);
    for dst in [mac(2), OUTSIDE, [0xff; 6]] {
        assert_eq!(net.decide(from_a, &ip(dst, mac(1), 1, [10, 0, 0, 2])), NO_WAY);
    }
}

#[test]
fn the_kernel_gets_its_answers_for_guests() {
    let net = Net::routed();
    let address: Ipv6Addr = "2001:db8::2".parse().unwrap();
    let _guest = net.port(2, |s| s.ipv6.push(address));
    let Verdict::Answer(answer) = net.decide(Origin::Uplink, &arp(US, 1, [10, 0, 0, 2])) else { panic!() };
    assert_eq!(Headers::parse(&answer).arp().unwrap().sender, (mac(2), [10, 0, 0, 2].into()));
    assert_eq!(net.decide(Origin::Uplink, &arp(US, 1, [10, 0, 0, 7])), NO_WAY);
    assert_eq!(net.slot(Origin::Uplink, &ip(mac(2), US, 1, [10, 0, 0, 2])), Some(2));
    assert_eq!(net.decide(Origin::Uplink, &ip([0xff; 6], US, 1, [10, 0, 0, 255])), NO_WAY);
}

#[test]
fn what_does_not_fit_a_port_is_not_given_to_it() {
    let net = Net::new(Plan::default());
    let (a, b) = (net.port(1, |_| {}), net.port(2, |s| s.mtu = 1500));
    let mut long = ip(mac(2), mac(1), 1, [10, 0, 0, 2]);
    long.resize(1519, 0);
    assert_eq!(net.decide(Origin::Vif(&a), &long), Verdict::Unfit);
    assert_eq!(b.stats.rx_dropped.get(), 1);
    net.switch.settings_changed(2, Settings { mtu: 9000, ..(*b.settings()).clone() });
    assert_eq!(net.slot(Origin::Vif(&a), &long), Some(2), "jumbo");
}

#[test]
fn addresses_that_the_domain_gives() {
    use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr};
    let net = Net::routed();
    let a = net.port(1, |s| s.ipv4.clear());
    let b = net.port(2, |s| {
        s.ipv4.clear();
        (s.dhcp, s.ra) = (false, false);
    });
    let client = |n: u8| dhcp::Client { mac: mac(n), fixed: None, mtu: 1500 };
    let none = Ipv4Addr::UNSPECIFIED;
    let ask = |port: &Port, n: u8, kind, wish| {
        let frame = dhcp::tests::request(&client(n), kind, wish, none);
        net.arena.copy_in(64, &frame);
        let frame = Frame { at: 64, len: frame.len(), meta: offload::Meta::default(), away: Away::NOTHING };
        let table = net.switch.table();
        match net.switch.decide(&table, Origin::Vif(port), &net.arena, &frame, seconds()) {
            Verdict::Answer(bytes) => {
                let packet = DhcpPacket::new_checked(&bytes[42..]).unwrap();
                let repr = DhcpRepr::parse(&packet).unwrap();
                Some((repr.message_type, repr.your_ip))
            }
            _ => None,
        }
    };
    let (kind, ip) = ask(&a, 1, DhcpMessageType::Discover, None).unwrap();
    assert_eq!((kind, a.settings().ipv4.len()), (DhcpMessageType::Offer, 0), "an offer is not taken yet");
    let took = ask(&a, 1, DhcpMessageType::Request, Some(ip)).unwrap();
    assert_eq!(took, (DhcpMessageType::Ack, ip));
    assert_eq!(a.settings().ipv4, [ip], "its own from now on, and what it sends is checked against it");
    assert_eq!(net.slot(Origin::Uplink, &self::ip(mac(1), US, 9, ip.octets())), Some(1));
    let Verdict::Answer(answer) = net.decide(Origin::Uplink, &arp(US, 9, ip.octets())) else { panic!() };
    assert_eq!(Headers::parse(&answer).arp().unwrap().sender, (mac(1), ip));
    assert!(ask(&b, 2, DhcpMessageType::Discover, None).is_none(), "not for this vif");
    assert!(ask(&a, 2, DhcpMessageType::Discover, None).is_none(), "in another's name");
    // IPv6: the address that it makes of the advertisement.
    let autonomous: Ipv6Addr = "fd00::7:216:3eff:fe00:1".parse().unwrap();
    assert_eq!((&a.settings().ipv6[..], b.settings().ipv6.len()), (&[autonomous][..], 0));
    // What the toolstack changes leaves the lease.
    net.switch.settings_changed(1, Settings { mtu: 9000, ..(*a.configured()).clone() });
    assert_eq!((a.settings().ipv4.clone(), a.settings().mtu), (vec![ip], 9000));
    net.switch
        .settings_changed(1, Settings { ipv4: vec![[10, 0, 0, 9].into()], ..(*a.configured()).clone() });
    assert_eq!(a.settings().ipv4, [Ipv4Addr::new(10, 0, 0, 9)], "its word counts");
}

#[test]
fn rules_by_source_and_by_name() {
    let net = Net::new(Plan::default());
    let (a, _b) = (net.port(1, |s| s.firewall.rules.clear()), net.port(2, |_| {}));
    let packet = ip(mac(2), mac(1), 1, [10, 0, 0, 2]);
    assert_eq!(net.slot(Origin::Vif(&a), &packet), Some(2));
    let rules = "action=accept dsthost=b.example".parse().unwrap();
    let firewall = rules::Firewall { rules: vec![rules], policy: rules::Action::Drop };
    net.switch.set_sources(Sources::from([(IpAddr::from([10, 0, 0, 1]), firewall)]));
    assert_eq!(net.decide(Origin::Vif(&a), &packet), Verdict::Drop(Denied::Rule));
    assert_eq!(net.switch.names_wanted(), ["b.example"]);
    net.switch.set_names(Names::from([("b.example".into(), vec![[10, 0, 0, 2].into()])]));
    assert_eq!(net.slot(Origin::Vif(&a), &packet), Some(2));
    // The next incarnation's switch knows both.
    let rules: Rules = kept::load(&net.switch.rules).unwrap();
    assert_eq!((rules.sources.len(), rules.names["b.example"].len()), (1, 1));
    net.switch.set_sources(Sources::new());
    assert_eq!(net.switch.names_wanted().len(), 0);
}

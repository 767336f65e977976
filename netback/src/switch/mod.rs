//! Forwarding between the domain's vifs and its uplink: a learning switch, or a router's guest side.
//!
//! ```text
//!   vif 5.0 ─tx thread─┐                        ┌─► rx queues of vif 6.0
//!   vif 6.0 ─tx thread─┼─► forward: admit, rules, answer, find ─► …
//!   uplink  ─thread────┘                        └─► the uplink's TAP
//! ```
//!
//! Whoever has a packet runs it to its end: the sender's thread decides, copies from its own arena into the receiver's
//! pages and notifies it. Checksums stay blank and large packets whole as long as the receiver can take them so.
//!
//! *Bridged*: one Ethernet; what is known of a vif's address comes from the toolstack, what is not is learned. *Routed*: a
//! guest sees its gateway alone. Everything that it asks for is at the gateway's address; packets to other guests of the
//! domain take a short cut, the rest goes to the domain's kernel.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, PoisonError, RwLock};

use domain_kit::grants::CopyBatch;
use domain_kit::hypercall::{HvError, Hypercall};
use domain_kit::ring::RingMem;
use hv_abi::CopyEntry;
use serde::{Deserialize, Serialize};

use crate::capture::Captures;
use crate::headers::{Headers, Mac};
use crate::names::Names;
use crate::offload::MAX_HEADERS;
use crate::qubes::Sources;
use crate::queue::rx::RxFrame;
use crate::queue::{Away, Copier, Fate, Frame};
use crate::slots::PacketHash;
use crate::stats::Stats;
use crate::tap::Tap;
use domain_kit::kept;
use domain_kit::ring::Span;

pub mod answer;
mod deliver;
pub mod dhcp;
pub mod fdb;
pub mod port;
pub mod rules;
pub mod settings;

use deliver::{Run, to_port};
use fdb::Fdb;
use port::{Port, lock};
use settings::{Denied, Settings};

/// The uplink's number among the ports.
pub const UPLINK: u16 = 0;
/// Where a packet comes from.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// A guest.
    Vif(&'a Port),
    /// The uplink, or the domain's own kernel.
    Uplink,
}

/// What a thread that forwards has of its own.
#[derive(Debug)]
pub struct Lane {
    /// Where its packets lie; its scratch is at the end.
    pub arena: Span,
    /// hv-core's number for the arena.
    pub buffer: u32,
    /// A hypercall channel.
    pub hv: Hypercall,
    /// Packets are to be handed on as they came, whomever they are for: whoever marks them knows no other order.
    pub in_order: bool,
    /// What the packets' [`Away`] is about that are being handed on.
    pub away: Vec<CopyEntry>,
    /// So many rounds more, packets are copied as a whole at once.
    whole: u32,
    /// Copies of a round, here to keep its memory.
    copies: CopyBatch,
}

/// Rounds in which packets are copied as a whole at once after one that had to be fetched: what follows is mostly for the same.
const WHOLE_ROUNDS: u32 = 32;

impl Lane {
    /// One with these.
    pub fn new(arena: Span, buffer: u32, hv: Hypercall) -> Lane {
        let (away, copies) = (Vec::new(), CopyBatch::default());
        Lane { arena, buffer, hv, in_order: false, away, whole: 0, copies }
    }

    /// Whether the end of large packets is to stay in their sender's pages this time.
    pub fn leaves_away(&mut self) -> bool {
        let whole = self.whole > 0;
        self.whole = self.whole.saturating_sub(1);
        !whole
    }

    /// Fetches what is away of packets, with one round of copies; says of each whether it is there now.
    fn fetch(&mut self, which: &[Away]) -> Vec<bool> {
        self.whole = WHOLE_ROUNDS;
        let mut batch = CopyBatch::default();
        let mut ranges = Vec::with_capacity(which.len());
        for away in which {
            let first = batch.entries.len();
            batch.entries.extend_from_slice(away.of(&self.away));
            ranges.push(first..batch.entries.len());
        }
        if let Err(error) = batch.run(&self.hv) {
            tracing::error!(%error, "grant copy");
            return vec![false; which.len()];
        }
        let came = |range| batch.statuses.get(range).is_some_and(|s: &[i16]| s.iter().all(|&s| s == 0));
        ranges.into_iter().map(came).collect()
    }
}

impl Copier for Lane {
    fn copy(&mut self, batch: &mut CopyBatch) -> Result<(), HvError> {
        batch.run(&self.hv)
    }
}

/// How packets are forwarded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Guests see the gateway alone.
    pub routed: Option<Gateway>,
    /// No packets from guest to guest.
    pub isolated: bool,
}

/// The gateway that routed guests see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its IPv4 address, and the length of the guests' network's prefix.
    pub ipv4: (Ipv4Addr, u8),
    /// Its IPv6 address, if it has one, and the guests' network's.
    pub ipv6: Option<(Ipv6Addr, u8)>,
    /// DHCP is offered, with this.
    pub dhcp: Option<dhcp::Options>,
    /// Routers are advertised.
    pub ra: bool,
}

impl Gateway {
    /// The address that a guest makes of a router advertisement and its Ethernet address (RFC 4862): the one address of the
    /// guests' network that it may use without the toolstack's word.
    fn autonomous(&self, mac: Mac) -> Option<Ipv6Addr> {
        let (gateway, _) = self.ipv6.filter(|(_, prefix)| self.ra && *prefix == 64)?;
        let (network, interface) = (gateway.octets(), answer::link_local(mac).octets());
        let mut out = [0; 16];
        out[..8].copy_from_slice(&network[..8]);
        out[8..].copy_from_slice(&interface[8..]);
        Some(out.into())
    }
}

#[derive(Debug, Default)]
struct Table {
    ports: BTreeMap<u16, Arc<Port>>,
    by_mac: HashMap<Mac, u16>,
    by_ip: HashMap<IpAddr, u16>,
    /// Rules by source address.
    sources: Arc<Sources>,
    /// What names in rules mean.
    names: Arc<Names>,
}

impl Table {
    /// Whether rules let a guest with these settings send this.
    fn allows(&self, settings: &Settings, h: &Headers<'_>) -> bool {
        let more = || match h.ip() {
            Some(ip) if !self.sources.is_empty() => {
                self.sources.get(&ip.src()).is_none_or(|rules| rules.allows(h, &self.names))
            }
            _ => true,
        };
        settings.firewall.allows(h, &self.names) && more()
    }
}

/// What is kept of the rules that are no vif's.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Rules {
    sources: Sources,
    names: Names,
}

/// Bytes of kept memory that the switch wants: see [`Memory`].
pub const RULES_BYTES: usize = kept::BYTES;

/// What a switch remembers in memory that outlives the incarnation.
#[derive(Debug)]
pub struct Memory {
    /// [`fdb::BYTES`].
    pub fdb: Span,
    /// [`dhcp::BYTES`].
    pub leases: Span,
    /// [`RULES_BYTES`].
    pub rules: Span,
}

/// The switch.
#[derive(Debug)]
pub struct Switch {
    plan: Plan,
    table: RwLock<Arc<Table>>,
    fdb: Fdb<Span>,
    leases: dhcp::Leases,
    rules: Span,
    uplink: RwLock<Option<Arc<Tap>>>,
    /// The uplink's counters.
    pub stats: Arc<Stats>,
    captures: Arc<Captures>,
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Drop(Denied),
    Port {
        slot: u16,
        queue: usize,
        hash: Option<PacketHash>,
        frame: Frame,
        segment: bool,
        /// Its checksum is to be made first.
        finish: bool,
    },
    Uplink,
    Flood,
    /// Nobody else sees it; this goes back.
    Answer(Vec<u8>),
    /// It cannot be given to whom it is for.
    Unfit,
}

impl Verdict {
    /// Whether it cannot be carried out without all of the packet's bytes.
    fn wants_whole(&self, table: &Table) -> bool {
        match self {
            Verdict::Uplink | Verdict::Flood => true,
            Verdict::Port { slot, queue, segment, finish, .. } => {
                let handle = table.ports.get(slot).and_then(|port| port.queues.get(*queue));
                *segment || *finish || handle.is_some_and(|handle| handle.vhost.is_some())
            }
            Verdict::Drop(_) | Verdict::Answer(_) | Verdict::Unfit => false,
        }
    }
}

/// Seconds of a clock that goes on when processes end.
pub fn seconds() -> u32 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() as u32)
}

impl Switch {
    /// One without ports, that knows what its predecessor knew.
    pub fn new(plan: Plan, memory: Memory) -> Switch {
        let Rules { sources, names } = kept::load(&memory.rules).unwrap_or_default();
        let table = Table { sources: Arc::new(sources), names: Arc::new(names), ..Table::default() };
        Switch {
            plan,
            table: RwLock::new(Arc::new(table)),
            fdb: Fdb::new(memory.fdb),
            leases: dhcp::Leases::new(memory.leases),
            rules: memory.rules,
            uplink: RwLock::new(None),
            stats: Arc::default(),
            captures: Arc::default(),
        }
    }

    /// The same, with copies for these.
    pub fn with_captures(self, captures: Arc<Captures>) -> Switch {
        Switch { captures, ..self }
    }

    /// Whether anybody captures packets.
    pub fn captures(&self) -> bool {
        self.captures.any()
    }

    fn table(&self) -> Arc<Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Packets for the outside go there from now on.
    pub fn set_uplink(&self, tap: Arc<Tap>) {
        *self.uplink.write().unwrap_or_else(PoisonError::into_inner) = Some(tap);
    }

    /// Learned addresses.
    pub fn learned(&self) -> usize {
        self.fdb.len()
    }

    /// Addresses that guests have by DHCP.
    pub fn leased(&self) -> usize {
        self.leases.taken(seconds())
    }

    /// The lowest number that no port has.
    pub fn free_slot(&self) -> u16 {
        let table = self.table();
        (1..=u16::MAX).find(|slot| !table.ports.contains_key(slot)).unwrap_or(u16::MAX)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<u16, Arc<Port>>)) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let mut ports = table.ports.clone();
        change(&mut ports);
        let now = seconds();
        for port in ports.values() {
            port.settle(|settings| self.give_addresses(settings, now));
        }
        let (mut by_mac, mut by_ip) = (HashMap::new(), HashMap::new());
        for (&slot, port) in &ports {
            let settings = port.settings();
            // The first one has it: another vif with the same address cannot take it over.
            if settings.locked()
                && let Some(mac) = settings.mac
            {
                by_mac.entry(mac).or_insert(slot);
            }
            for ip in settings
                .ipv4
                .iter()
                .copied()
                .map(IpAddr::V4)
                .chain(settings.ipv6.iter().copied().map(IpAddr::V6))
            {
                by_ip.entry(ip).or_insert(slot);
            }
        }
        let (sources, names) = (table.sources.clone(), table.names.clone());
        *table = Arc::new(Table { ports, by_mac, by_ip, sources, names });
    }

    /// Rules by source address.
    pub fn sources(&self) -> Sources {
        (*self.table().sources).clone()
    }

    /// What names mean.
    pub fn names(&self) -> Names {
        (*self.table().names).clone()
    }

    /// Other rules by source address, from the next batch of packets on.
    pub fn set_sources(&self, sources: Sources) {
        self.change_rules(|table| table.sources = Arc::new(sources));
    }

    /// Names mean something else, from the next batch of packets on.
    pub fn set_names(&self, names: Names) {
        self.change_rules(|table| table.names = Arc::new(names));
    }

    fn change_rules(&self, change: impl FnOnce(&mut Table)) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let Table { ports, by_mac, by_ip, sources, names } = &**table;
        let (ports, by_mac, by_ip) = (ports.clone(), by_mac.clone(), by_ip.clone());
        let mut next = Table { ports, by_mac, by_ip, sources: sources.clone(), names: names.clone() };
        change(&mut next);
        let rules = Rules { sources: (*next.sources).clone(), names: (*next.names).clone() };
        if let Err(error) = kept::save(&self.rules, &rules) {
            tracing::error!(%error, "rules are not kept: after a restart they hold once the store was read");
        }
        *table = Arc::new(next);
    }

    /// Names in all rules.
    pub fn names_wanted(&self) -> Vec<String> {
        let table = self.table();
        let mut out = Vec::new();
        let settings: Vec<_> = table.ports.values().map(|port| port.configured()).collect();
        let firewalls = settings.iter().map(|s| &s.firewall).chain(table.sources.values());
        out.extend(firewalls.flat_map(|f| &f.rules).filter_map(|rule| rule.host.clone()));
        out.sort_unstable();
        out.dedup();
        out
    }

    /// Adds the addresses that the domain itself gives to those of the toolstack's.
    fn give_addresses(&self, settings: &mut Settings, now: u32) {
        let (Some(gateway), Some(mac)) = (&self.plan.routed, settings.mac) else { return };
        if settings.ipv4.is_empty() && settings.dhcp && gateway.dhcp.is_some() {
            settings.ipv4.extend(self.leases.of(mac, now));
        }
        if settings.ipv6.is_empty() && settings.ra {
            settings.ipv6.extend(gateway.autonomous(mac));
        }
    }

    /// Adds a port.
    pub fn attach(&self, port: Arc<Port>) {
        self.change(|ports| {
            ports.insert(port.slot, port);
        });
    }

    /// Removes a port, and what was learned at it. Nobody delivers to it when this returns.
    pub fn detach(&self, slot: u16) {
        let mut gone = None;
        self.change(|ports| gone = ports.remove(&slot));
        self.fdb.forget(slot);
        if let Some(port) = gone {
            // Threads that still have the old table find nothing there.
            port.queues.iter().for_each(|q| drop(lock(&q.queue).take()));
        }
    }

    /// A port's settings have changed.
    pub fn settings_changed(&self, slot: u16, settings: Settings) {
        if let Some(port) = self.table().ports.get(&slot) {
            port.set(settings);
        }
        self.change(|_| {});
    }

    /// Hands packets of the lane's arena on. What goes to a vif's queue goes together, see [`crate::queue::World::forward`].
    pub fn forward(
        &self,
        origin: Origin<'_>,
        lane: &mut Lane,
        frames: &[Frame],
        fates: &mut [Fate],
        commit: &mut dyn FnMut(usize),
    ) {
        let table = self.table();
        let now = seconds();
        if let Origin::Vif(port) = origin {
            self.captures.add(port.id, false, &lane.arena, frames.iter());
        }
        let mut verdicts: Vec<Verdict> =
            frames.iter().map(|frame| self.decide(&table, origin, &lane.arena, frame, now)).collect();
        complete(&table, lane, frames, &mut verdicts, fates);
        let mut runs: Vec<Run<'_>> = Vec::new();
        for (i, (frame, verdict)) in frames.iter().zip(verdicts).enumerate() {
            let to = match &verdict {
                Verdict::Port { slot, queue, segment: false, .. } => Some((*slot, *queue)),
                _ => None,
            };
            // What is the same packet's, or meant for all, comes behind what was before it.
            let behind = matches!(verdict, Verdict::Port { segment: true, .. } | Verdict::Flood);
            if behind || (lane.in_order && runs.iter().any(|run| to != Some(run.to()))) {
                self.deliver(&mut runs, lane, fates, commit);
            }
            match verdict {
                Verdict::Port { slot, queue, hash, mut frame, segment: false, finish } => {
                    if finish {
                        deliver::finish(&lane.arena, &mut frame);
                    }
                    let frame = RxFrame { frame, hash };
                    match runs.iter_mut().find(|run| run.to() == (slot, queue)) {
                        Some(run) => run.push(i, frame),
                        None => runs.extend(table.ports.get(&slot).map(|p| Run::new(p, queue, i, frame))),
                    }
                }
                Verdict::Port { slot, queue, frame, segment: true, .. } => {
                    if let Some(port) = table.ports.get(&slot) {
                        fates[i] = self.give_segments(port, queue, lane, &frame, &mut || commit(i));
                    }
                }
                Verdict::Uplink => {
                    commit(i);
                    fates[i] = self.to_uplink(lane, frame);
                }
                Verdict::Flood => {
                    commit(i);
                    let frame = Frame { away: Away::NOTHING, ..*frame };
                    self.flood(&table, origin, lane, &frame);
                    fates[i] = Fate::Sent;
                }
                Verdict::Answer(bytes) => {
                    fates[i] = Fate::Sent;
                    self.answer(origin, lane, &bytes);
                }
                Verdict::Drop(why) => self.count(origin, why),
                Verdict::Unfit => {}
            }
        }
        self.deliver(&mut runs, lane, fates, commit);
    }

    fn count(&self, origin: Origin<'_>, why: Denied) {
        let stats = match origin {
            Origin::Vif(port) => &port.stats,
            Origin::Uplink => &self.stats,
        };
        match why {
            Denied::Spoofed => stats.tx_spoofed.add(1),
            Denied::Rule => stats.tx_denied.add(1),
            Denied::NoWay => stats.tx_no_way.add(1),
        }
    }

    fn decide(&self, table: &Table, origin: Origin<'_>, arena: &Span, frame: &Frame, now: u32) -> Verdict {
        let mut bytes = [0; MAX_HEADERS];
        let bytes = &mut bytes[..frame.len.min(MAX_HEADERS)];
        arena.copy_out(frame.at, bytes);
        let verdict = {
            let h = Headers::parse(bytes);
            match (origin, &self.plan.routed) {
                (Origin::Vif(port), None) => self.guest_sends(table, port, &h, now),
                (Origin::Vif(port), Some(gateway)) => self.routed_guest_sends(table, port, gateway, &h),
                (Origin::Uplink, None) => self.uplink_sends(table, &h, now),
                (Origin::Uplink, Some(_)) => self.kernel_sends(table, &h),
            }
        };
        match verdict {
            Target::Drop(why) => Verdict::Drop(why),
            Target::Uplink => Verdict::Uplink,
            Target::Flood => Verdict::Flood,
            Target::Answer(answer) => Verdict::Answer(answer),
            // No such request is that long.
            Target::Dhcp if !frame.away.is_nothing() => Verdict::Drop(Denied::NoWay),
            Target::Dhcp => {
                let mut whole = vec![0; frame.len.min(dhcp::MAX_FRAME)];
                arena.copy_out(frame.at, &mut whole);
                let answer = match origin {
                    Origin::Vif(port) => self.dhcp(table, port, &whole, now),
                    Origin::Uplink => None,
                };
                answer.map_or(Verdict::Drop(Denied::NoWay), Verdict::Answer)
            }
            Target::Port(slot) => to_port(table, slot, frame, bytes),
            Target::Route { slot, gateway } => {
                let mac = table.ports.get(&slot).and_then(|p| p.settings().mac);
                let Some(mac) = mac.filter(|_| answer::hop(bytes)) else {
                    return Verdict::Drop(Denied::NoWay);
                };
                bytes[..6].copy_from_slice(&mac);
                bytes[6..12].copy_from_slice(&gateway);
                arena.copy_in(frame.at, bytes);
                to_port(table, slot, frame, bytes)
            }
        }
    }

    /// The answer to a guest's DHCP request.
    fn dhcp(&self, table: &Table, port: &Port, frame: &[u8], now: u32) -> Option<Vec<u8>> {
        let gateway = self.plan.routed.as_ref()?;
        let (options, settings) = (gateway.dhcp.as_ref()?, port.configured());
        let (ipv4, prefix) = gateway.ipv4;
        let network = dhcp::Network { mac: gateway.mac, gateway: ipv4, prefix, options };
        let fixed = settings.ipv4.first().copied();
        let client = dhcp::Client { mac: settings.mac.filter(|_| settings.dhcp)?, fixed, mtu: settings.mtu };
        let others = |ip: Ipv4Addr| table.by_ip.get(&ip.into()).is_some_and(|&slot| slot != port.slot);
        let outcome = self.leases.serve(frame, &network, &client, others, now);
        if outcome.changed {
            self.change(|_| {});
        }
        outcome.answer
    }

    /// Advertises the router to all guests that want it. They ask when they start; this keeps it from expiring.
    pub fn advertise(&self, lane: &mut Lane) {
        for port in self.table().ports.values() {
            let settings = port.settings();
            let (Some(router), Some(mac)) = (self.router(&settings), settings.mac) else { continue };
            let advertisement = answer::advertisement(mac, &router);
            self.answer(Origin::Vif(port), lane, &advertisement);
        }
    }

    fn router(&self, settings: &Settings) -> Option<answer::Router> {
        let gateway = self.plan.routed.as_ref().filter(|gateway| gateway.ra && settings.ra)?;
        Some(answer::Router { mac: gateway.mac, prefix: gateway.ipv6?, mtu: settings.mtu })
    }

    /// Whether two guests may talk.
    fn may_talk(&self, a: &Settings, b: &Settings) -> bool {
        !self.plan.isolated && !a.isolated && !b.isolated
    }

    fn guest_sends(&self, table: &Table, port: &Port, h: &Headers<'_>, now: u32) -> Target {
        let settings = port.settings();
        if let Err(why) = settings.admit(h) {
            return Target::Drop(why);
        }
        if !table.allows(&settings, h) {
            return Target::Drop(Denied::Rule);
        }
        if !settings.locked() && h.src()[0] & 1 == 0 && !table.by_mac.contains_key(&h.src()) {
            self.fdb.learn(h.src(), port.slot, now);
        }
        if h.is_multicast() {
            return Target::Flood;
        }
        let known = table.by_mac.get(&h.dst()).copied();
        match known.or_else(|| self.fdb.find(h.dst(), now)) {
            Some(UPLINK) => Target::Uplink,
            Some(slot) if slot == port.slot => Target::Drop(Denied::NoWay),
            Some(slot) => match table.ports.get(&slot) {
                Some(other) if self.may_talk(&settings, &other.settings()) => Target::Port(slot),
                Some(_) => Target::Drop(Denied::NoWay),
                // Its vif is away for the moment.
                None => Target::Uplink,
            },
            None => Target::Flood,
        }
    }

    fn uplink_sends(&self, table: &Table, h: &Headers<'_>, now: u32) -> Target {
        if h.src()[0] & 1 == 0 && !table.by_mac.contains_key(&h.src()) {
            self.fdb.learn(h.src(), UPLINK, now);
        }
        if h.is_multicast() {
            return Target::Flood;
        }
        let known = table.by_mac.get(&h.dst()).copied();
        match known.or_else(|| self.fdb.find(h.dst(), now)) {
            Some(UPLINK) => Target::Drop(Denied::NoWay),
            Some(slot) if table.ports.contains_key(&slot) => Target::Port(slot),
            _ => Target::Flood,
        }
    }

    fn routed_guest_sends(&self, table: &Table, port: &Port, gateway: &Gateway, h: &Headers<'_>) -> Target {
        let settings = port.settings();
        if let Err(why) = settings.admit(h) {
            return Target::Drop(why);
        }
        // Whatever it asks for is at the gateway, but its own address: it checks whether that is free.
        if let Some(arp) = h.arp() {
            let ask = arp.request && !settings.has(arp.target.into()) && arp.sender.1 != arp.target;
            return if ask {
                Target::Answer(answer::arp(&arp, gateway.mac))
            } else {
                Target::Drop(Denied::NoWay)
            };
        }
        if let Some((kind, target)) = h.neighbour() {
            let ask = kind == 135
                && !settings.has(target.into())
                && h.ip().is_some_and(|ip| !ip.src().is_unspecified());
            let answer = ask.then(|| answer::neighbour(h, gateway.mac)).flatten();
            return answer.map_or(Target::Drop(Denied::NoWay), Target::Answer);
        }
        if let Some(router) = self.router(&settings)
            && let Some(answer) = answer::advertise(h, &router)
        {
            return Target::Answer(answer);
        }
        if h.protocol() == Some(17) && h.ports() == Some((68, 67)) && gateway.dhcp.is_some() && settings.dhcp
        {
            return Target::Dhcp;
        }
        if !table.allows(&settings, h) {
            return Target::Drop(Denied::Rule);
        }
        let Some(ip) = h.ip().filter(|_| h.dst() == gateway.mac) else { return Target::Drop(Denied::NoWay) };
        match table.by_ip.get(&ip.dst()).and_then(|slot| table.ports.get(slot)) {
            Some(other) if other.slot == port.slot => Target::Drop(Denied::NoWay),
            Some(other) if self.may_talk(&settings, &other.settings()) => {
                Target::Route { slot: other.slot, gateway: gateway.mac }
            }
            Some(_) => Target::Drop(Denied::NoWay),
            None => Target::Uplink,
        }
    }

    /// From the domain's own kernel, which routes.
    fn kernel_sends(&self, table: &Table, h: &Headers<'_>) -> Target {
        let at = |ip: IpAddr| {
            table.by_ip.get(&ip).and_then(|slot| table.ports.get(slot)).and_then(|port| port.settings().mac)
        };
        let no_way = Target::Drop(Denied::NoWay);
        if let Some(arp) = h.arp() {
            let mac = at(arp.target.into()).filter(|_| arp.request);
            return mac.map_or(no_way, |mac| Target::Answer(answer::arp(&arp, mac)));
        }
        if let Some((135, target)) = h.neighbour() {
            let answer = at(target.into()).and_then(|mac| answer::neighbour(h, mac));
            return answer.map_or(no_way, Target::Answer);
        }
        table.by_mac.get(&h.dst()).map_or(no_way, |&slot| Target::Port(slot))
    }
}

/// Fetches what is away of those packets for which that must be done; what does not come is refused.
fn complete(table: &Table, lane: &mut Lane, frames: &[Frame], verdicts: &mut [Verdict], fates: &mut [Fate]) {
    let wants = |(frame, verdict): (&Frame, &Verdict)| !frame.away.is_nothing() && verdict.wants_whole(table);
    let wanted: Vec<usize> = (0..frames.len()).filter(|&i| wants((&frames[i], &verdicts[i]))).collect();
    if wanted.is_empty() {
        return;
    }
    let which: Vec<Away> = wanted.iter().map(|&i| frames[i].away).collect();
    for (i, came) in wanted.into_iter().zip(lane.fetch(&which)) {
        match &mut verdicts[i] {
            Verdict::Port { frame, .. } if came => frame.away = Away::NOTHING,
            _ if came => {}
            verdict => {
                *verdict = Verdict::Unfit;
                fates[i] = Fate::Refused;
            }
        }
    }
}

/// Where a packet goes by its headers.
enum Target {
    Drop(Denied),
    Port(u16),
    /// To another guest, by way of the gateway.
    Route {
        slot: u16,
        gateway: Mac,
    },
    Uplink,
    Flood,
    Answer(Vec<u8>),
    /// To the domain's DHCP server.
    Dhcp,
}

#[cfg(test)]
mod tests;

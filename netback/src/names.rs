//! DNS names in firewall rules: asked for here, by the driver domain, and asked for again when their time is over.
//!
//! The wire format is smoltcp's. Only who is asked may answer (a connected socket, a random port and number, the same
//! question). While no server answers, what was known stays known. An address is good for twice its time to live: a guest may
//! have asked just before it changed.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use smoltcp::wire::{
    DnsFlags, DnsOpcode, DnsPacket, DnsQueryType, DnsQuestion, DnsRcode, DnsRecord, DnsRecordData, DnsRepr,
};

use crate::switch::Switch;
use crate::worker::Control;

/// The addresses of names, as rules look them up.
pub type Names = HashMap<String, Vec<IpAddr>>;

/// Most names that are asked for.
pub const MAX_NAMES: usize = 1024;
/// Most addresses of a name.
const MAX_ADDRESSES: usize = 64;
const PORT: u16 = 53;
const PATIENCE: Duration = Duration::from_secs(1);
/// How often names are asked for at most and at least, whatever they say.
const LEAST: Duration = Duration::from_secs(5);
const MOST: Duration = Duration::from_secs(3600);
/// The rest between two looks at what is due.
const ROUND: Duration = Duration::from_millis(500);

/// Whether this can be a host's name.
pub fn is_host_name(text: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len()) && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    text.len() <= 253 && text.split('.').all(label)
}

fn wire_name(name: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len() + 2);
    for label in name.split('.') {
        out.push(label.len() as u8);
        out.extend(label.as_bytes());
    }
    out.push(0);
    out
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// What an answer says: addresses and for how long.
fn read_answer(bytes: &[u8], id: u16, name: &[u8], kind: DnsQueryType) -> io::Result<(Vec<IpAddr>, u32)> {
    let packet = DnsPacket::new_checked(bytes).map_err(|_| damaged("no DNS packet"))?;
    if packet.transaction_id() != id || !packet.flags().contains(DnsFlags::RESPONSE) {
        return Err(damaged("an answer to something else"));
    }
    match packet.rcode() {
        DnsRcode::NoError => {}
        // There is no such name: it has no addresses.
        DnsRcode::NXDomain => return Ok((Vec::new(), 60)),
        _ => return Err(damaged("the server could not answer")),
    }
    let cut = |_| damaged("cut short");
    let (mut rest, question) = DnsQuestion::parse(packet.payload()).map_err(cut)?;
    if packet.question_count() != 1 || !question.name.eq_ignore_ascii_case(name) || question.type_ != kind {
        return Err(damaged("an answer to another question"));
    }
    let (mut out, mut ttl) = (Vec::new(), u32::MAX);
    for _ in 0..packet.answer_record_count() {
        // Truncated: what is there counts.
        let Ok((behind, record)) = DnsRecord::parse(rest) else { break };
        rest = behind;
        let address: Option<IpAddr> = match record.data {
            DnsRecordData::A(a) => Some(a.into()),
            DnsRecordData::Aaaa(a) => Some(a.into()),
            // A name's other names: the server follows them, and their addresses come with the same answer.
            _ => None,
        };
        ttl = ttl.min(record.ttl);
        out.extend(address.filter(|_| out.len() < MAX_ADDRESSES));
    }
    Ok((out, if ttl == u32::MAX { 60 } else { ttl }))
}

/// Asks one server.
fn ask(server: SocketAddr, name: &str, kind: DnsQueryType) -> io::Result<(Vec<IpAddr>, u32)> {
    use std::hash::{BuildHasher, RandomState};
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    let id = RandomState::new().hash_one(name) as u16;
    let name = wire_name(name);
    let repr = DnsRepr {
        transaction_id: id,
        opcode: DnsOpcode::Query,
        flags: DnsFlags::RECURSION_DESIRED,
        question: DnsQuestion { name: &name, type_: kind },
    };
    let mut query = vec![0; repr.buffer_len()];
    repr.emit(&mut DnsPacket::new_unchecked(&mut query));
    socket.send(&query)?;
    let deadline = Instant::now() + PATIENCE;
    let mut bytes = [0; 1500];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let got = socket.recv(&mut bytes)?;
        match read_answer(&bytes[..got], id, &name, kind) {
            // Perhaps the right one comes still.
            Err(e) if e.kind() == io::ErrorKind::InvalidData && Instant::now() < deadline => continue,
            other => return other,
        }
    }
}

#[derive(Debug)]
struct Known {
    addresses: Vec<(IpAddr, Instant)>,
    due: Instant,
}

/// Asks for names.
#[derive(Debug)]
pub struct Resolver {
    servers: Vec<SocketAddr>,
    known: BTreeMap<String, Known>,
}

impl Resolver {
    /// One that asks these servers, in order.
    pub fn new(servers: &[IpAddr]) -> Resolver {
        Self::with_ports(servers.iter().map(|&ip| SocketAddr::new(ip, PORT)).collect())
    }

    fn with_ports(servers: Vec<SocketAddr>) -> Resolver {
        Resolver { servers, known: BTreeMap::new() }
    }

    fn resolve(&self, name: &str) -> io::Result<(Vec<IpAddr>, u32)> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no DNS server is set (--dns)");
        for &server in &self.servers {
            let both = ask(server, name, DnsQueryType::A)
                .and_then(|four| Ok((four, ask(server, name, DnsQueryType::Aaaa)?)));
            match both {
                Ok(((mut all, ttl), (six, ttl6))) => {
                    let least = if six.is_empty() { ttl } else { ttl.min(ttl6) };
                    all.extend(six);
                    return Ok((all, least));
                }
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// Asks for those of `wanted` that are due; true if an address came or went.
    fn step(&mut self, mut wanted: Vec<String>, now: Instant) -> bool {
        wanted.truncate(MAX_NAMES);
        let before = self.known.len();
        self.known.retain(|name, _| wanted.contains(name));
        let mut changed = self.known.len() != before;
        for name in wanted {
            if self.known.get(&name).is_some_and(|known| known.due > now) {
                continue;
            }
            match self.resolve(&name) {
                Ok((addresses, ttl)) => {
                    let life = Duration::from_secs(ttl.into()).clamp(LEAST, MOST);
                    let known = self.known.entry(name).or_insert(Known { addresses: Vec::new(), due: now });
                    known.due = now + life;
                    for address in addresses {
                        let until = now + 2 * life;
                        match known.addresses.iter_mut().find(|(a, _)| *a == address) {
                            Some(old) => old.1 = old.1.max(until),
                            None => {
                                known.addresses.push((address, until));
                                changed = true;
                            }
                        }
                    }
                    let count = known.addresses.len();
                    known.addresses.retain(|(_, until)| *until > now);
                    known.addresses.truncate(MAX_ADDRESSES);
                    changed |= known.addresses.len() != count;
                }
                Err(error) => {
                    tracing::warn!(name, %error, "a name in a firewall rule cannot be resolved");
                    let known = self.known.entry(name).or_insert(Known { addresses: Vec::new(), due: now });
                    known.due = now + LEAST;
                }
            }
        }
        changed
    }

    fn names(&self) -> Names {
        let of = |known: &Known| known.addresses.iter().map(|(address, _)| *address).collect();
        self.known
            .iter()
            .filter(|(_, known)| !known.addresses.is_empty())
            .map(|(name, known)| (name.clone(), of(known)))
            .collect()
    }

    /// Runs until it is stopped. What a predecessor knew counts until the first answer.
    pub fn run(&mut self, control: &Control, switch: &Arc<Switch>) {
        while !control.stopping() {
            if self.step(switch.names_wanted(), Instant::now()) {
                let mut names = switch.names();
                let now = self.names();
                // One that no server has answered yet keeps what the predecessor knew.
                names.retain(|name, _| self.known.get(name).is_some_and(|known| known.addresses.is_empty()));
                names.extend(now);
                switch.set_names(names);
            }
            control.sleep(&[], Some(ROUND));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An answer: the question, an alias, then addresses.
    fn answer(query: &[u8], four: &[[u8; 4]], ttl: u32, rcode: u8) -> Vec<u8> {
        let mut out = query.to_vec();
        out[2] |= 0x80;
        out[3] = 0x80 | rcode;
        let a = query[query.len() - 3] == 1;
        let four = if a { four } else { &[] };
        out[7] = four.len() as u8 + u8::from(!four.is_empty());
        if !four.is_empty() {
            out.extend([0xc0, 12, 0, 5, 0, 1]);
            out.extend(ttl.to_be_bytes());
            out.extend([0, 4, 1, b'x', 0xc0, 12]);
        }
        for address in four {
            out.extend([0xc0, 12, 0, 1, 0, 1]);
            out.extend(ttl.to_be_bytes());
            out.extend([0, 4]);
            out.extend(address);
        }
        out
    }

    #[test]
    fn names_are_asked_for_and_asked_again() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = server.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 512];
            let mut asked = 0u8;
            // Two rounds of A and AAAA.
            for i in 0..4 {
                let (n, from) = server.recv_from(&mut bytes).unwrap();
                asked += 1;
                let query = &bytes[..n];
                // One that is not asked for is not believed.
                let mut wrong = answer(query, &[[6, 6, 6, 6]], 9, 0);
                wrong[0] ^= 0xff;
                server.send_to(&wrong, from).unwrap();
                let second: &[[u8; 4]] =
                    if i < 2 { &[[10, 0, 0, 1], [10, 0, 0, 2]] } else { &[[10, 0, 0, 3]] };
                server.send_to(&answer(query, second, 7, 0), from).unwrap();
            }
            asked
        });
        let mut resolver = Resolver::with_ports(vec![at]);
        let wanted = || vec!["Example.org".to_owned()];
        let start = Instant::now();
        assert!(resolver.step(wanted(), start));
        let four = |n: u8| IpAddr::from([10, 0, 0, n]);
        assert_eq!(resolver.names()["Example.org"], [four(1), four(2)]);
        assert!(!resolver.step(wanted(), start + Duration::from_secs(6)), "not due");
        assert!(resolver.step(wanted(), start + Duration::from_secs(8)));
        assert_eq!(resolver.names()["Example.org"], [four(1), four(2), four(3)], "the old ones for a while");
        assert_eq!(thread.join().unwrap(), 4);
        // Nobody answers any more: what is known stays known.
        assert!(!resolver.step(wanted(), start + Duration::from_secs(30)));
        assert_eq!(resolver.names()["Example.org"].len(), 3);
        assert!(resolver.step(Vec::new(), start + Duration::from_secs(31)), "nobody wants it any more");
        assert!(resolver.names().is_empty());
    }

    #[test]
    fn host_names() {
        for good in ["example.org", "a", "x-1.y_z.org", &"a.".repeat(126)[..251]] {
            assert!(is_host_name(good), "{good}");
        }
        for bad in ["", ".", "a..b", "a b", "ä.org", "a.", &"a".repeat(64), &"a.".repeat(130)] {
            assert!(!is_host_name(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_answer(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), honest: bool) {
            let name = wire_name("example.org");
            if honest {
                let mut head = vec![0, 7, 0x81, 0x80, 0, 1, 0, 9, 0, 0, 0, 0];
                head.extend(&name);
                head.extend([0, 1, 0, 1]);
                head.append(&mut bytes);
                bytes = head;
            }
            if let Ok((addresses, _)) = read_answer(&bytes, 7, &name, DnsQueryType::A) {
                prop_assert!(addresses.len() <= MAX_ADDRESSES);
            }
        }
    }
}

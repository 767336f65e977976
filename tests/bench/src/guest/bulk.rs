//! A sender of TCP that leaves cutting and checksums to those below, as a guest's kernel does; smoltcp makes packets of one MTU each.
//! One connection, and as much of RFC 9293 as a sender of bulk needs: the receiver's window, no congestion control, go back to the
//! first byte that was not acknowledged after three repeated acknowledgements or 200 ms.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use frontends::netfront::{NetFront, PacketMeta};

use super::packets::WAIT;

/// The guest's address on this NIC.
const OWN: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);
const MSS: usize = 1460;
/// Payload of a packet: as many whole segments as 64 KiB of IP hold.
const PAYLOAD: usize = (65_535 - 40) / MSS * MSS;
const HEADERS: usize = 54;
/// Shift of the windows that we announce.
const SCALE: u8 = 7;
const AGAIN: Duration = Duration::from_millis(200);
const CONNECT: Duration = Duration::from_secs(5);

const FIN_RST_SYN: u8 = 7;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const PSH: u8 = 8;

/// What the other end says.
#[derive(Clone, Copy, Debug)]
struct Segment {
    flags: u8,
    seq: u32,
    ack: u32,
    window: u16,
    /// Shift of its windows, in a SYN.
    scale: u8,
}

/// The connection.
struct Bulk<'a> {
    front: &'a mut NetFront,
    peer: SocketAddrV4,
    port: u16,
    /// The peer's Ethernet address.
    mac: [u8; 6],
    /// Next byte that is expected of the peer.
    expected: u32,
    packet: Vec<u8>,
}

fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | w.get(1).map_or(0, |b| u32::from(*b))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

impl Bulk<'_> {
    /// Sends one packet of `len` bytes of payload; false if the ring has no room.
    fn send(&mut self, flags: u8, seq: u32, options: &[u8], len: usize) -> bool {
        let header = HEADERS + options.len();
        let total = header + len;
        let f = &mut self.packet;
        f[..6].copy_from_slice(&self.mac);
        f[6..12].copy_from_slice(&self.front.mac());
        f[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        f[16..18].copy_from_slice(&((total - 14) as u16).to_be_bytes());
        f[18..26].copy_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0]);
        f[26..30].copy_from_slice(&OWN.octets());
        f[30..34].copy_from_slice(&self.peer.ip().octets());
        let check = sum(&f[14..34]);
        f[24..26].copy_from_slice(&check.to_be_bytes());
        f[34..36].copy_from_slice(&self.port.to_be_bytes());
        f[36..38].copy_from_slice(&self.peer.port().to_be_bytes());
        f[38..42].copy_from_slice(&seq.to_be_bytes());
        f[42..46].copy_from_slice(&self.expected.to_be_bytes());
        f[46] = (((20 + options.len()) / 4) << 4) as u8;
        f[47] = flags;
        f[48..54].copy_from_slice(&[0xff, 0xff, 0, 0, 0, 0]);
        f[54..header].copy_from_slice(options);
        let large = len > MSS;
        let meta =
            PacketMeta { csum_blank: true, gso_tcpv4: large.then_some(MSS as u16), ..PacketMeta::default() };
        self.front.queue().send(&self.packet[..total], meta)
    }

    fn send_small(&mut self, flags: u8, seq: u32, options: &[u8], len: usize) -> Result<()> {
        let end = Instant::now() + CONNECT;
        loop {
            self.front.queue().reap()?;
            let sent = self.send(flags, seq, options, len);
            self.front.flush();
            if sent {
                return Ok(());
            }
            ensure!(Instant::now() < end, "no room in the ring for {} s", CONNECT.as_secs());
            self.front.wait(WAIT)?;
        }
    }

    fn arp(&mut self, kind: u8, mac: [u8; 6], ip: [u8; 4]) {
        let mut f = if kind == 1 { vec![0xff; 6] } else { mac.to_vec() };
        f.extend(self.front.mac());
        f.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, kind]);
        f.extend(self.front.mac());
        f.extend(OWN.octets());
        f.extend(mac);
        f.extend(ip);
        // Asked again if there is no room.
        let _ = self.front.queue().send(&f, PacketMeta::default());
        self.front.flush();
    }

    /// The next word of the peer's about this connection; answers questions for our address meanwhile.
    fn hear(&mut self) -> Result<Option<Segment>> {
        // Room for what is to be sent again, also behind a ring full of the connection before.
        self.front.queue().reap()?;
        while let Some(packet) = self.front.receive_any()? {
            let f = &packet.bytes;
            if f.len() >= 42 && f[12..14] == [8, 6] && f[38..42] == OWN.octets() {
                let (mac, ip): ([u8; 6], [u8; 4]) = (f[22..28].try_into()?, f[28..32].try_into()?);
                if ip == self.peer.ip().octets() {
                    self.mac = mac;
                }
                if f[21] == 1 {
                    self.arp(2, mac, ip);
                }
                continue;
            }
            if f.len() < HEADERS
                || f[12..15] != [8, 0, 0x45]
                || f[23] != 6
                || f[36..38] != self.port.to_be_bytes()
            {
                continue;
            }
            let options = &f[HEADERS..f.len().min(34 + usize::from(f[46] >> 4) * 4)];
            return Ok(Some(Segment {
                flags: f[47],
                seq: word(f, 38),
                ack: word(f, 42),
                window: u16::from_be_bytes([f[48], f[49]]),
                scale: scale(options),
            }));
        }
        Ok(None)
    }

    /// Waits for something until `done` gives it.
    fn until<T>(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Self, Option<Segment>) -> Result<Option<T>>,
    ) -> Result<T> {
        let end = Instant::now() + CONNECT;
        loop {
            let heard = self.hear()?;
            self.front.flush();
            let waits = heard.is_none();
            if let Some(done) = done(self, heard)? {
                return Ok(done);
            }
            ensure!(Instant::now() < end, "{what}: not within {} s", CONNECT.as_secs());
            if waits {
                self.front.wait(WAIT)?;
            }
        }
    }
}

/// The shift of windows among TCP options; 0 if it is not there.
fn scale(mut options: &[u8]) -> u8 {
    while let [kind, rest @ ..] = options {
        match (kind, rest) {
            (0, _) => return 0,
            (1, _) => options = rest,
            (3, [3, shift, ..]) => return (*shift).min(14),
            (_, [len, ..]) if *len >= 2 => options = options.get(usize::from(*len)..).unwrap_or_default(),
            _ => return 0,
        }
    }
    0
}

/// Sends to a sink for about `time`; bytes that were acknowledged, a second.
///
/// # Errors
/// The device's; nobody answers.
pub fn send(front: &mut NetFront, peer: SocketAddrV4, port: u16, time: Duration) -> Result<f64> {
    let mut this =
        Bulk { front, peer, port, mac: [0; 6], expected: 0, packet: vec![0x42; HEADERS + PAYLOAD + 8] };
    // What is left of the time before.
    while this.front.receive_any()?.is_some() {}
    let mut asked = None::<Instant>;
    this.until("an answer to ARP", |this, _| {
        if asked.is_none_or(|at| at.elapsed() > AGAIN) {
            asked = Some(Instant::now());
            this.arp(1, [0; 6], peer.ip().octets());
        }
        Ok((this.mac != [0; 6]).then_some(()))
    })?;
    let first = u32::from(port) << 16;
    let mut asked = None::<Instant>;
    let scale = this.until("an answer to SYN", |this, heard| {
        if let Some(s) =
            heard.filter(|s| s.flags & (SYN | ACK) == SYN | ACK && s.ack == first.wrapping_add(1))
        {
            this.expected = s.seq.wrapping_add(1);
            return Ok(Some(s.scale));
        }
        if asked.is_none_or(|at| at.elapsed() > AGAIN) {
            asked = Some(Instant::now());
            this.send_small(SYN, first, &[2, 4, (MSS >> 8) as u8, MSS as u8, 1, 3, 3, SCALE], 0)?;
        }
        Ok(None)
    })?;
    // Bytes since the SYN: acknowledged, sent. The first tells the sink what is wanted.
    let seq = |at: u64| first.wrapping_add(1).wrapping_add(at as u32);
    let (mut una, mut nxt, mut window) = (0u64, 0u64, MSS as u64);
    this.packet[HEADERS..].fill(crate::endpoint::Direction::Out as u8);
    let (start, mut moved, mut repeated) = (Instant::now(), Instant::now(), 0);
    while start.elapsed() < time {
        this.front.queue().reap()?;
        let mut worked = false;
        while let Some(s) = this.hear()? {
            worked = true;
            ensure!(s.flags & RST == 0, "the connection was reset");
            if s.flags & FIN_RST_SYN != 0 {
                continue;
            }
            window = u64::from(s.window) << scale;
            let acked = u64::from(s.ack.wrapping_sub(seq(una)));
            if acked > 0 && una + acked <= nxt {
                (una, repeated, moved) = (una + acked, 0, Instant::now());
            } else if acked == 0 && nxt > una {
                repeated += 1;
            }
        }
        if repeated == 3 || (nxt > una && moved.elapsed() > AGAIN) {
            (nxt, moved) = (una, Instant::now());
        }
        // Whole packets, unless the window never holds one.
        let most = if window >= PAYLOAD as u64 { PAYLOAD } else { MSS };
        while nxt - una + most as u64 <= window && this.send(ACK | PSH, seq(nxt), &[], most) {
            nxt += most as u64;
            worked = true;
        }
        this.front.flush();
        if !worked {
            this.front.wait(WAIT)?;
        }
    }
    let rate = una as f64 / start.elapsed().as_secs_f64();
    this.send_small(RST | ACK, seq(nxt), &[], 0)?;
    Ok(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_sums() {
        // As Linux orders them: MSS, SACK permitted, timestamps, no-op, window scale.
        let linux = [2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 3, 7];
        assert_eq!(scale(&linux), 7);
        assert_eq!(
            (scale(&linux[..17]), scale(&[]), scale(&[3]), scale(&[9, 0]), scale(&[0, 3, 3, 7])),
            (0, 0, 0, 0, 0)
        );
        assert_eq!(sum(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}

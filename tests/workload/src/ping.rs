//! ICMP echo at a fixed rate through a datagram ICMP socket (icmp(7)), which checks sums and
//! identifiers itself. Needs a group within `net.ipv4.ping_group_range`.

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, connect, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Without a reply for so long an echo request counts as lost.
pub const LOST_AFTER: Duration = Duration::from_secs(5);

/// Totals so far. All counters only grow, but for the interval's round-trip time.
#[derive(Debug, Default)]
pub struct PingStats {
    /// Echo requests sent.
    pub sent: AtomicU64,
    /// Replies received.
    pub received: AtomicU64,
    /// Requests that had no reply in [`LOST_AFTER`], or could not be sent.
    pub lost: AtomicU64,
    max_rtt_ns: AtomicU64,
}

impl PingStats {
    /// Notes a reply.
    pub fn answered(&self, rtt: Duration) {
        self.received.fetch_add(1, Relaxed);
        let ns = u64::try_from(rtt.as_nanos()).unwrap_or(u64::MAX);
        self.max_rtt_ns.fetch_max(ns, Relaxed);
    }

    /// The longest round trip among replies since the last call.
    pub fn take_max_rtt(&self) -> Duration {
        Duration::from_nanos(self.max_rtt_ns.swap(0, Relaxed))
    }
}

/// Sends an echo request every `interval` until told to stop, then waits for late replies.
///
/// # Errors
/// When the socket cannot be made.
pub fn run(peer: Ipv4Addr, interval: Duration, stop: &AtomicBool, stats: &PingStats) -> io::Result<()> {
    let sock = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
    connect(sock.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(peer, 0)))?;
    setsockopt(&sock, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))?;
    let mut waiting: VecDeque<(u16, Instant)> = VecDeque::new();
    let mut seq: u16 = 0;
    let mut next = Instant::now();
    let mut buf = [0; 1500];
    loop {
        let stopping = stop.load(Relaxed);
        if stopping && waiting.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        if !stopping && now >= next {
            seq = seq.wrapping_add(1);
            stats.sent.fetch_add(1, Relaxed);
            match send(sock.as_raw_fd(), &request(seq), MsgFlags::empty()) {
                Ok(_) => waiting.push_back((seq, now)),
                Err(_) => {
                    stats.lost.fetch_add(1, Relaxed);
                }
            }
            // After a pause of our own, go on from here: no burst.
            next = (next + interval).max(now);
        }
        if let Ok(n) = recv(sock.as_raw_fd(), &mut buf, MsgFlags::empty())
            && let Some(got) = reply(&buf[..n])
            && let Some(at) = waiting.iter().position(|(s, _)| *s == got)
        {
            let rtt = waiting[at].1.elapsed();
            waiting.remove(at);
            stats.answered(rtt);
        }
        while waiting.front().is_some_and(|(_, at)| at.elapsed() > LOST_AFTER) {
            waiting.pop_front();
            stats.lost.fetch_add(1, Relaxed);
        }
    }
}

/// Type 8 (echo), code 0; the kernel fills in checksum and identifier (RFC 792).
fn request(seq: u16) -> [u8; 64] {
    let mut out = [0; 64];
    out[0] = 8;
    out[6..8].copy_from_slice(&seq.to_be_bytes());
    out
}

/// The sequence number of an echo reply.
fn reply(bytes: &[u8]) -> Option<u16> {
    (bytes.len() >= 8 && bytes[0] == 0).then(|| u16::from_be_bytes([bytes[6], bytes[7]]))
}

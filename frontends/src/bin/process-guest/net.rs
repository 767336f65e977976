//! The network load: one thread that runs smoltcp over netfront, with a checked TCP stream and a ping.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use frontends::netfront::NetFront;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{icmp, tcp};
use smoltcp::time::Instant as NetInstant;
use smoltcp::wire::{EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Address, Ipv4Cidr};
use workload::pattern::{check_stream, fill_stream, mix};
use workload::ping::{LOST_AFTER, PingStats};
use workload::stream::{self, StreamStats};

use crate::options::{Network, Options, Work};
use crate::plug::Plug;
use workload::report::Report;

/// Bytes of each of the TCP socket's buffers.
const TCP_BUFFER: usize = 256 << 10;
/// Most bytes made at once.
const PIECE: usize = 16 << 10;
const PING_IDENT: u16 = 0x4248;
/// Greatest wait without an event, so that a stop is seen.
const TICK: Duration = Duration::from_millis(50);
/// A connection that is not made by then is tried anew.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What the reporter reads.
#[derive(Clone, Debug, Default)]
pub struct NetStats {
    /// Of the stream; `None` if it was not asked for.
    pub tcp: Option<Arc<StreamStats>>,
    /// Of the ping.
    pub ping: Option<Arc<PingStats>>,
}

/// The running load.
pub struct NetLoad {
    plug: Plug,
    front: NetFront,
    iface: Interface,
    sockets: SocketSet<'static>,
    base: Instant,
    stream: Option<Stream>,
    ping: Option<Ping>,
}

impl NetLoad {
    /// Sets an interface up over a connected device. What was asked for without an address of a peer is reported.
    pub fn new(
        mut front: NetFront,
        plug: Plug,
        network: Network,
        options: &Options,
        reporter: &dyn Report,
    ) -> (NetLoad, NetStats) {
        let base = Instant::now();
        let mut config = Config::new(EthernetAddress(front.mac()).into());
        config.random_seed = options.seed;
        let mut iface = Interface::new(config, &mut front, NetInstant::ZERO);
        iface.update_ip_addrs(|addresses| {
            let cidr = IpCidr::Ipv4(Ipv4Cidr::new(network.address, network.prefix));
            if addresses.push(cidr).is_err() {
                reporter.error("net", &"no room for the address");
            }
        });
        if let Some(gateway) = options.gateway
            && iface.routes_mut().add_default_ipv4_route(gateway).is_err()
        {
            reporter.error("net", &"no room for the route");
        }
        let mut sockets = SocketSet::new(Vec::new());
        let mut stats = NetStats::default();
        let mut stream = None;
        if options.wants(Work::Tcp) {
            match options.peer {
                Some(peer) => {
                    let shared = Arc::new(StreamStats::default());
                    stats.tcp = Some(shared.clone());
                    stream = Some(Stream::new(&mut sockets, peer, options.seed, options.rate, shared));
                }
                None => reporter.error("tcp", &"needs --peer IP:PORT"),
            }
        }
        let mut ping = None;
        if options.wants(Work::Ping) {
            match options.ping_peer() {
                Some(peer) => {
                    let shared = Arc::new(PingStats::default());
                    stats.ping = Some(shared.clone());
                    let interval = Duration::from_millis(options.ping_ms.max(1));
                    ping = Some(Ping::new(&mut sockets, peer, interval, shared));
                }
                None => reporter.error("ping", &"needs --ping IP or --peer IP:PORT"),
            }
        }
        (NetLoad { plug, front, iface, sockets, base, stream, ping }, stats)
    }

    fn now(&self) -> NetInstant {
        NetInstant::from_micros(i64::try_from(self.base.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Runs until `stop`, then until the stream has ended in order and late echo replies came, or `limit` later.
    pub fn run(mut self, stop: &AtomicBool, limit: Duration, reporter: &dyn Report) {
        let mut stopping: Option<Instant> = None;
        loop {
            if self.plug.closed() {
                // Addresses and connections stay as they are: all that changes is the cable.
                match self.plug.again() {
                    Ok(front) => self.front = front,
                    Err(e) => {
                        reporter.error("net", &format!("the device was taken away: {e}"));
                        return;
                    }
                }
            }
            self.front.clear();
            if stopping.is_none() && stop.load(Relaxed) {
                stopping = Some(Instant::now());
            }
            let mut wait = TICK;
            // Twice: what the loads do at the first may let something be sent at the second.
            for _ in 0..2 {
                let now = self.now();
                while self.iface.poll(now, &mut self.front, &mut self.sockets)
                    == PollResult::SocketStateChanged
                {}
                if let Some(stream) = &mut self.stream {
                    wait = wait.min(stream.run(&mut self.iface, &mut self.sockets, stopping.is_some()));
                }
                if let Some(ping) = &mut self.ping {
                    wait = wait.min(ping.run(&mut self.sockets, stopping.is_some()));
                }
            }
            self.front.flush();
            let over =
                self.stream.as_ref().is_none_or(Stream::over) && self.ping.as_ref().is_none_or(Ping::over);
            if stopping.is_some_and(|since| over || since.elapsed() > limit) {
                return;
            }
            match self.front.final_check() {
                Ok(true) => continue,
                Ok(false) => {}
                Err(e) => {
                    reporter.error("net", &e);
                    return;
                }
            }
            let now = self.now();
            if let Some(delay) = self.iface.poll_delay(now, &self.sockets) {
                wait = wait.min(delay.into());
            }
            // Rounded up: a rest below a millisecond must not spin.
            let timeout = u16::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
            let mut fds: Vec<_> =
                self.front.all_wait_fds().into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            if wait > Duration::ZERO {
                let _interrupted_is_woken = poll(&mut fds, PollTimeout::from(timeout));
            }
        }
    }
}

/// Where the stream is.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// No connection; not before then.
    Idle(Instant),
    /// SYN sent.
    Connecting(Instant),
    /// Both ways.
    Open {
        since: Instant,
        seed: u64,
        /// Bytes of the opening sent.
        hello: usize,
        tx: u64,
        rx: u64,
    },
    /// Ended for good.
    Over,
}

/// The client's end of a checked stream; see [`workload::stream`] for what is on the wire.
struct Stream {
    socket: SocketHandle,
    peer: std::net::SocketAddrV4,
    seed: u64,
    rate: u64,
    round: u64,
    phase: Phase,
    stats: Arc<StreamStats>,
    piece: Vec<u8>,
}

impl Stream {
    fn new(
        sockets: &mut SocketSet<'static>,
        peer: std::net::SocketAddrV4,
        seed: u64,
        rate: u64,
        stats: Arc<StreamStats>,
    ) -> Self {
        let buffer = || tcp::SocketBuffer::new(vec![0; TCP_BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let socket = sockets.add(socket);
        let piece = if rate == 0 { PIECE } else { PIECE.min((rate as usize / 50).max(64)) };
        let phase = Phase::Idle(Instant::now());
        Stream { socket, peer, seed, rate, round: 0, phase, stats, piece: vec![0; piece] }
    }

    fn over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    fn lost(&mut self, what: &str) {
        self.stats.problem(&self.stats.resets, || what.to_owned());
        self.stats.rx_gap.pause();
        self.phase = Phase::Idle(Instant::now() + Duration::from_millis(200));
    }

    /// Does what can be done now; gives how long nothing is to do but for what comes in.
    fn run(&mut self, iface: &mut Interface, sockets: &mut SocketSet<'_>, stopping: bool) -> Duration {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        match self.phase {
            Phase::Over => {}
            Phase::Idle(_) if stopping => self.phase = Phase::Over,
            Phase::Idle(at) => {
                if let Some(left) = at.checked_duration_since(Instant::now()).filter(|l| !l.is_zero()) {
                    return left;
                }
                self.round += 1;
                let port = 49152 + (self.round % 16000) as u16;
                let peer = (IpAddress::Ipv4(*self.peer.ip()), self.peer.port());
                socket.abort();
                if socket.connect(iface.context(), peer, port).is_ok() {
                    self.phase = Phase::Connecting(Instant::now());
                } else {
                    self.phase = Phase::Idle(Instant::now() + TICK);
                }
            }
            Phase::Connecting(since) => {
                if socket.may_send() {
                    self.stats.connects.fetch_add(1, Relaxed);
                    self.stats.rx_gap.progress();
                    let seed = mix(self.seed ^ self.round);
                    self.phase = Phase::Open { since: Instant::now(), seed, hello: 0, tx: 0, rx: 0 };
                    return Duration::ZERO;
                } else if !socket.is_open() || since.elapsed() > CONNECT_TIMEOUT {
                    // Not up yet: no connection existed, so none was lost.
                    socket.abort();
                    self.phase = Phase::Idle(Instant::now() + Duration::from_millis(200));
                }
            }
            Phase::Open { since, seed, mut hello, mut tx, mut rx } => {
                let received = receive(socket, mix(seed), &mut rx, &self.stats);
                if let Err(at) = received {
                    self.stats.problem(&self.stats.corrupt, || format!("wrong byte at offset {at}"));
                    socket.abort();
                    self.stats.rx_gap.pause();
                    self.phase = Phase::Idle(Instant::now() + Duration::from_millis(200));
                    return Duration::ZERO;
                }
                let wait = if socket.may_send() && !stopping {
                    self.send(socket, since, seed, &mut hello, &mut tx)
                } else {
                    TICK
                };
                self.phase = Phase::Open { since, seed, hello, tx, rx };
                if !socket.is_active() && !socket.may_recv() {
                    self.lost("the connection was reset");
                } else if !socket.may_recv() && socket.recv_queue() == 0 {
                    // The other end closed in order.
                    self.stats.closed.fetch_add(1, Relaxed);
                    self.stats.rx_gap.pause();
                    socket.close();
                    self.phase = Phase::Over;
                } else if stopping {
                    socket.close();
                }
                return wait;
            }
        }
        TICK
    }

    fn send(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        since: Instant,
        seed: u64,
        hello: &mut usize,
        tx: &mut u64,
    ) -> Duration {
        let opening = stream::hello(seed);
        if *hello < opening.len() {
            *hello += socket.send_slice(&opening[*hello..]).unwrap_or(0);
            return TICK;
        }
        loop {
            if self.rate != 0 {
                let due = Duration::from_secs_f64(*tx as f64 / self.rate as f64);
                let ahead = due.saturating_sub(since.elapsed());
                if !ahead.is_zero() {
                    return ahead.min(TICK);
                }
            }
            let room = socket.send_capacity() - socket.send_queue();
            let n = room.min(self.piece.len());
            if n == 0 {
                return TICK;
            }
            fill_stream(seed, *tx, &mut self.piece[..n]);
            let sent = socket.send_slice(&self.piece[..n]).unwrap_or(0);
            if sent == 0 {
                return TICK;
            }
            *tx += sent as u64;
            self.stats.tx_bytes.fetch_add(sent as u64, Relaxed);
        }
    }
}

/// Takes and compares what came; the offset of a wrong byte if there is one.
fn receive(socket: &mut tcp::Socket<'_>, seed: u64, rx: &mut u64, stats: &StreamStats) -> Result<(), u64> {
    while socket.can_recv() {
        let checked = socket.recv(|bytes| (bytes.len(), (bytes.len(), check_stream(seed, *rx, bytes))));
        match checked {
            Ok((_, Some(at))) => return Err(at),
            Ok((n, None)) if n > 0 => {
                *rx += n as u64;
                stats.rx_bytes.fetch_add(n as u64, Relaxed);
                stats.rx_gap.progress();
            }
            _ => break,
        }
    }
    Ok(())
}

/// ICMP echo at a fixed rate.
struct Ping {
    socket: SocketHandle,
    peer: Ipv4Address,
    interval: Duration,
    next: Instant,
    seq: u16,
    waiting: VecDeque<(u16, Instant)>,
    stats: Arc<PingStats>,
    stopped: bool,
}

impl Ping {
    fn new(
        sockets: &mut SocketSet<'static>,
        peer: Ipv4Address,
        interval: Duration,
        stats: Arc<PingStats>,
    ) -> Self {
        let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 64], vec![0; 64 * 128]);
        let socket = sockets.add(icmp::Socket::new(buffer(), buffer()));
        let next = Instant::now();
        Ping { socket, peer, interval, next, seq: 0, waiting: VecDeque::new(), stats, stopped: false }
    }

    fn over(&self) -> bool {
        self.stopped && self.waiting.is_empty()
    }

    fn run(&mut self, sockets: &mut SocketSet<'_>, stopping: bool) -> Duration {
        self.stopped = stopping;
        let socket = sockets.get_mut::<icmp::Socket<'_>>(self.socket);
        if !socket.is_open() && socket.bind(icmp::Endpoint::Ident(PING_IDENT)).is_err() {
            return TICK;
        }
        while let Ok((bytes, from)) = socket.recv() {
            if from == IpAddress::Ipv4(self.peer)
                && let Some(seq) = reply(bytes)
                && let Some(at) = self.waiting.iter().position(|(s, _)| *s == seq)
                && let Some((_, sent)) = self.waiting.remove(at)
            {
                self.stats.answered(sent.elapsed());
            }
        }
        let now = Instant::now();
        if !stopping && now >= self.next {
            self.seq = self.seq.wrapping_add(1);
            self.stats.sent.fetch_add(1, Relaxed);
            let echo = Icmpv4Repr::EchoRequest { ident: PING_IDENT, seq_no: self.seq, data: &[0x42; 56] };
            match socket.send(echo.buffer_len(), IpAddress::Ipv4(self.peer)) {
                Ok(buffer) => {
                    echo.emit(&mut Icmpv4Packet::new_unchecked(buffer), &ChecksumCapabilities::default());
                    self.waiting.push_back((self.seq, now));
                }
                Err(_) => {
                    self.stats.lost.fetch_add(1, Relaxed);
                }
            }
            // After a pause of our own, go on from here: no burst.
            self.next = (self.next + self.interval).max(now);
        }
        while self.waiting.front().is_some_and(|(_, at)| at.elapsed() > LOST_AFTER) {
            self.waiting.pop_front();
            self.stats.lost.fetch_add(1, Relaxed);
        }
        self.next.saturating_duration_since(now)
    }
}

/// The sequence number of an echo reply of ours.
fn reply(bytes: &[u8]) -> Option<u16> {
    let packet = Icmpv4Packet::new_checked(bytes).ok()?;
    match Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).ok()? {
        Icmpv4Repr::EchoReply { ident: PING_IDENT, seq_no, .. } => Some(seq_no),
        _ => None,
    }
}

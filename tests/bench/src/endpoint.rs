//! One TCP/IP endpoint for every contestant: smoltcp, over a netfront inside a domain or over a raw socket on a veth, so that the
//! only difference is the way between it and the outside.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device};
use smoltcp::socket::{icmp, tcp};
use smoltcp::time::Instant as Clock;
use smoltcp::wire::{EthernetAddress, HardwareAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr};

/// A device that can be waited for.
pub trait Link: Device {
    /// Hands on what was sent, where the device does not do so at once.
    fn flush(&mut self) {}

    /// Waits until something can be received, or sent again, or `timeout` is over.
    ///
    /// # Errors
    /// The device's.
    fn wait(&mut self, timeout: Duration) -> Result<()>;
}

/// What a TCP connection does; its first byte tells the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// The endpoint sends.
    Out = b'O',
    /// The endpoint receives.
    In = b'I',
}

/// The endpoint.
pub struct Endpoint<D: Link> {
    device: D,
    interface: Interface,
    started: Instant,
    next_port: u16,
    next_seq: u16,
}

/// Bytes of each socket buffer.
const BUFFER: usize = 256 << 10;
/// Longest wait for a device, so that a lost event would show as slowness and not as a hang.
const WAIT: Duration = Duration::from_millis(100);
/// Without any progress for so long a measurement has failed.
const STUCK: Duration = Duration::from_secs(10);

impl<D: Link> Endpoint<D> {
    /// On `device`, with a static address in a network of 24 bits.
    pub fn new(mut device: D, mac: [u8; 6], address: Ipv4Addr) -> Endpoint<D> {
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(mac)));
        let mut interface = Interface::new(config, &mut device, Clock::from_micros(0));
        interface.update_ip_addrs(|list| {
            // There is room for at least one.
            let _ = list.push(IpCidr::new(IpAddress::from(address), 24));
        });
        Endpoint { device, interface, started: Instant::now(), next_port: 49_152, next_seq: 0 }
    }

    fn now(&self) -> Clock {
        Clock::from_micros(i64::try_from(self.started.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Lets the stack work, calls `step` until it has nothing to do, and waits; until `step` says that it is over.
    fn drive(
        &mut self,
        sockets: &mut SocketSet<'_>,
        longest_wait: Duration,
        mut step: impl FnMut(&mut Interface, &mut SocketSet<'_>) -> Result<Step>,
    ) -> Result<()> {
        let mut progress = Instant::now();
        loop {
            self.interface.poll(self.now(), &mut self.device, sockets);
            self.device.flush();
            match step(&mut self.interface, sockets)? {
                Step::Over => return Ok(()),
                Step::Moved => progress = Instant::now(),
                Step::Again => {}
                Step::Idle => {
                    ensure!(progress.elapsed() < STUCK, "no progress for {} s", STUCK.as_secs());
                    let delay = self.interface.poll_delay(self.now(), sockets);
                    let delay = delay.map_or(longest_wait, Duration::from);
                    if !delay.is_zero() {
                        self.device.wait(delay.min(longest_wait))?;
                    }
                }
            }
        }
    }

    fn connect(&mut self, peer: Ipv4Addr, port: u16) -> Result<(SocketSet<'static>, SocketHandle)> {
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        self.next_port = self.next_port.checked_add(1).unwrap_or(49_152);
        let remote = (IpAddress::from(peer), port);
        socket.connect(self.interface.context(), remote, self.next_port)?;
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        self.drive(&mut sockets, WAIT, |_, sockets| {
            let socket = sockets.get::<tcp::Socket<'_>>(handle);
            if !socket.is_active() {
                bail!("the outside refused the connection");
            }
            Ok(if socket.may_send() { Step::Over } else { Step::Idle })
        })?;
        Ok((sockets, handle))
    }

    /// MiB a second over one TCP connection to a [`crate::peers::sink`], for about `time`.
    ///
    /// # Errors
    /// No connection, or no progress.
    pub fn stream(&mut self, peer: Ipv4Addr, port: u16, way: Direction, time: Duration) -> Result<f64> {
        let (mut sockets, handle) = self.connect(peer, port)?;
        let chunk = vec![0x42; BUFFER];
        let mut moved = 0usize;
        let mut first = Some(way as u8);
        let mut start = Instant::now();
        self.drive(&mut sockets, WAIT, |_, sockets| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            if let Some(byte) = first {
                if socket.can_send() {
                    socket.send_slice(&[byte])?;
                    first = None;
                    start = Instant::now();
                    return Ok(Step::Moved);
                }
                return Ok(Step::Idle);
            }
            let n = match way {
                Direction::Out if socket.can_send() => socket.send_slice(&chunk)?,
                Direction::In if socket.can_recv() => socket.recv(|data| (data.len(), data.len()))?,
                _ => 0,
            };
            moved += n;
            ensure!(socket.may_send(), "the connection was closed");
            Ok(match n {
                _ if start.elapsed() >= time => Step::Over,
                0 => Step::Idle,
                _ => Step::Moved,
            })
        })?;
        // What still waits in the buffer has not crossed.
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        let crossed = if way == Direction::Out { moved.saturating_sub(socket.send_queue()) } else { moved };
        let rate = crossed as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64();
        socket.abort();
        self.interface.poll(self.now(), &mut self.device, &mut sockets);
        self.device.flush();
        Ok(rate)
    }

    /// Echoes, one after the other, until `each` (called with every one's time) says that it is enough. One without a reply for
    /// `again` is sent once more, and its time goes on.
    ///
    /// # Errors
    /// A device's; no reply at all for long.
    pub fn pings(
        &mut self,
        peer: Ipv4Addr,
        again: Duration,
        mut each: impl FnMut(Duration) -> bool,
    ) -> Result<()> {
        let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 64], vec![0; 8192]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(IDENT))?;
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        // When the echo was first asked for, and when last.
        let mut asked: Option<(Instant, Instant)> = None;
        let mut seq_no = self.next_seq;
        // Replies to earlier ones than this are late answers to what was sent once more.
        let mut oldest = seq_no;
        let result = self.drive(&mut sockets, again, |_, sockets| {
            let socket = sockets.get_mut::<icmp::Socket<'_>>(handle);
            if socket.can_recv() {
                let (bytes, _) = socket.recv()?;
                let packet = Icmpv4Packet::new_checked(bytes)?;
                let reply = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::ignored())?;
                let Icmpv4Repr::EchoReply { seq_no: n, .. } = reply else { return Ok(Step::Moved) };
                // Within what this echo was sent as; sequence numbers go round.
                if n.wrapping_sub(oldest) < seq_no.wrapping_sub(oldest)
                    && let Some((first, _)) = asked.take()
                    && !each(first.elapsed())
                {
                    return Ok(Step::Over);
                }
                return Ok(Step::Moved);
            }
            let now = Instant::now();
            let due = asked.is_none_or(|(_, last)| now.duration_since(last) >= again);
            if !due || !socket.can_send() {
                return Ok(Step::Idle);
            }
            if asked.is_none() {
                oldest = seq_no;
            }
            let echo = Icmpv4Repr::EchoRequest { ident: IDENT, seq_no, data: &[0x42; 56] };
            let bytes = socket.send(echo.buffer_len(), IpAddress::from(peer))?;
            echo.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
            seq_no = seq_no.wrapping_add(1);
            let first = asked.map_or(now, |(first, _)| first);
            asked = Some((first, now));
            // Not progress: an outside that never answers must end in an error.
            Ok(Step::Again)
        });
        self.next_seq = seq_no;
        result
    }
}

/// Identifier of our echo requests.
const IDENT: u16 = 0x4248;

/// What a step of a measurement says.
enum Step {
    /// It is over.
    Over,
    /// Something came or went: look again at once.
    Moved,
    /// Something was asked for: look again at once, though it is no sign of life.
    Again,
    /// Nothing to do until the device says so.
    Idle,
}

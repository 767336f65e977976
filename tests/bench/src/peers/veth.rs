//! What a virtual wire of the kernel's can do: veth pairs beside the one that leads to netback, in the same outside.

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::outside::Outside;
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RawSocket, TxToken, wait as wait_fd};
use smoltcp::time::Instant as Clock;

use crate::endpoint::{Endpoint, Link};

/// Address of the kernel's end of the wire to [`Raw`].
pub const RAW_PEER: Ipv4Addr = Ipv4Addr::new(10, 78, 1, 1);
const RAW_OWN: Ipv4Addr = Ipv4Addr::new(10, 78, 1, 2);
/// Address of the outside's end of the wire between two kernels' TCP.
pub const KERNEL_PEER: Ipv4Addr = Ipv4Addr::new(10, 78, 2, 1);
/// Not that of the interface: the kernel there must not take the packets for its own.
const MAC: [u8; 6] = [0x02, 0x42, 0x48, 0, 0, 1];

/// smoltcp's end of a veth pair.
pub struct Raw(RawSocket);

impl Device for Raw {
    type RxToken<'a> = <RawSocket as Device>::RxToken<'a>;
    type TxToken<'a> = Sender<<RawSocket as Device>::TxToken<'a>>;

    fn receive(&mut self, now: Clock) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        self.0.receive(now).map(|(rx, tx)| (rx, Sender(tx)))
    }

    fn transmit(&mut self, now: Clock) -> Option<Self::TxToken<'_>> {
        self.0.transmit(now).map(Sender)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = self.0.capabilities();
        capabilities.medium = Medium::Ethernet;
        // The kernel leaves checksums to a card that is not there.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.icmpv4 = Checksum::Tx;
        capabilities
    }
}

/// Passes frames on.
pub struct Sender<T>(T);

impl<T: TxToken> TxToken for Sender<T> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.0.consume(len, f)
    }
}

impl Link for Raw {
    fn wait(&mut self, timeout: Duration) -> Result<()> {
        Ok(wait_fd(self.0.as_raw_fd(), Some(timeout.into()))?)
    }
}

thread_local! {
    // A raw socket of smoltcp's stays on one thread: the outside's own.
    static WIRE: RefCell<Option<Endpoint<Raw>>> = const { RefCell::new(None) };
}

/// A wire between the outside's kernel and an [`Endpoint`] in this process.
#[derive(Debug)]
pub struct Wire<'a>(&'a Outside);

impl<'a> Wire<'a> {
    /// Makes it.
    ///
    /// # Errors
    /// Those of `ip` and of raw sockets.
    pub fn new(outside: &'a Outside) -> Result<Wire<'a>> {
        outside.run(|| -> Result<()> {
            ip(&["link", "add", "bench-v0", "type", "veth", "peer", "name", "bench-v1"])?;
            ip(&["addr", "add", &format!("{RAW_PEER}/24"), "dev", "bench-v0"])?;
            // smoltcp takes no packets longer than the wire's MTU.
            ip(&["link", "set", "bench-v0", "gso_max_segs", "1"])?;
            ip(&["link", "set", "bench-v0", "up"])?;
            ip(&["link", "set", "bench-v1", "up"])?;
            let socket = RawSocket::new("bench-v1", Medium::Ethernet)?;
            WIRE.set(Some(Endpoint::new(Raw(socket), MAC, RAW_OWN)));
            Ok(())
        })??;
        Ok(Wire(outside))
    }

    /// Runs `job` with the endpoint, on the outside's thread.
    ///
    /// # Errors
    /// `job`'s.
    pub fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Endpoint<Raw>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.0.run(|| WIRE.with_borrow_mut(|wire| job(wire.as_mut().context("the wire is cut")?)))?
    }
}

/// A wire between the outside and another namespace, with the kernel's TCP on both ends. Gives the other namespace.
///
/// # Errors
/// Those of `ip`.
pub fn kernel(outside: &Outside) -> Result<Outside> {
    let other = Outside::new()?;
    let there = other.run(nix::unistd::gettid)?;
    outside.run(move || -> Result<()> {
        ip(&["link", "add", "bench-w0", "type", "veth", "peer", "name", "bench-w1"])?;
        ip(&["link", "set", "bench-w1", "netns", &there.to_string()])?;
        ip(&["addr", "add", &format!("{KERNEL_PEER}/24"), "dev", "bench-w0"])?;
        ip(&["link", "set", "bench-w0", "up"])
    })??;
    other.run(|| -> Result<()> {
        ip(&["addr", "add", "10.78.2.2/24", "dev", "bench-w1"])?;
        ip(&["link", "set", "bench-w1", "up"])
    })??;
    Ok(other)
}

/// Runs ip(8) in the calling thread's network namespace.
///
/// # Errors
/// What it says.
pub fn ip(args: &[&str]) -> Result<()> {
    let out = Command::new("ip").args(args).output().context("running ip (package iproute2)")?;
    ensure!(out.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::Direction;
    use crate::peers::sink;

    #[test]
    fn both_wires_carry() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("not root: no namespaces");
        }
        let outside = Outside::new().unwrap();
        let wire = Wire::new(&outside).unwrap();
        let port = outside.run(|| sink::start(RAW_PEER)).unwrap().unwrap();
        let time = Duration::from_millis(50);
        for way in [Direction::Out, Direction::In] {
            assert!(wire.run(move |e| e.stream(RAW_PEER, port, way, time)).unwrap() > 1.0);
        }
        let mut left = 10;
        let enough = move |_| {
            left -= 1;
            left > 0
        };
        wire.run(move |e| e.pings(RAW_PEER, Duration::from_secs(1), enough)).unwrap();
        let other = kernel(&outside).unwrap();
        let port = outside.run(|| sink::start(KERNEL_PEER)).unwrap().unwrap();
        let rate = other.run(move || sink::stream(KERNEL_PEER, port, Direction::Out, time)).unwrap().unwrap();
        assert!(rate > 1.0);
    }
}

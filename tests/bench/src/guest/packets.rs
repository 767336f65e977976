//! Packets by themselves, without a TCP of the guest's: what netfront, ring, netback and ring again carry.

use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use domain_kit::Domain;
use domain_kit::xs::XsClient;
use frontends::netfront::{NetFront, Options, PacketMeta};
use serde_json::{Value, json};

/// How long the backend may take.
const CONNECT: Duration = Duration::from_secs(10);
/// Packets between two looks at the clock.
const BURST: usize = 64;

/// The NIC that is for this alone, connected at first use.
#[derive(Default)]
pub struct Packets {
    front: Option<NetFront>,
    /// Of bulk's last connection.
    port: u16,
}

/// TCP over IPv4 as far as netback looks, `len` bytes from the Ethernet header on; short ones are UDP of this flow, or no IP.
fn frame(to: [u8; 6], from: [u8; 6], len: usize, flow: Option<u16>) -> Vec<u8> {
    let mut f = vec![0x5a; len];
    f[..6].copy_from_slice(&to);
    f[6..12].copy_from_slice(&from);
    if let Some(flow) = flow {
        f[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        f[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
        f[18..34].copy_from_slice(&[0, 1, 0, 0, 64, 17, 0, 0, 10, 77, 9, 1, 10, 77, 9, 2]);
        f[34..36].copy_from_slice(&(4000 + flow).to_be_bytes());
        return f;
    }
    if len < 1000 {
        // An ethertype for experiments (IEEE 802).
        f[12..14].copy_from_slice(&[0x88, 0xb5]);
        return f;
    }
    f[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    f[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
    f[18..34].copy_from_slice(&[0, 1, 0, 0, 64, 6, 0, 0, 10, 77, 9, 1, 10, 77, 9, 2]);
    f[46] = 0x50;
    f
}

/// How long to wait for the backend.
pub(super) const WAIT: Duration = Duration::from_millis(20);

impl Packets {
    fn front(&mut self, domain: &Domain, xs: &XsClient, command: &Value) -> Result<&mut NetFront> {
        let queues = command["queues"].as_u64().unwrap_or(1) as usize;
        if self.front.as_mut().is_none_or(|front| front.queues().len() != queues) {
            let vif = u32::try_from(super::number(command, "vif")?)?;
            self.front = None;
            let options = Options { queues, ..Options::default() };
            let front = NetFront::connect_with(&domain.hv, xs, domain.domid(), vif, options, CONNECT)?;
            self.front = Some(front);
        }
        self.front.as_mut().context("the NIC")
    }

    /// Its Ethernet address.
    pub fn mac(&mut self, domain: &Domain, xs: &XsClient, command: &Value) -> Result<Value> {
        Ok(json!({"mac": self.front(domain, xs, command)?.mac()}))
    }

    /// TCP to the outside for a time, segmentation left to netback and what comes after it.
    pub fn bulk(&mut self, domain: &Domain, xs: &XsClient, command: &Value) -> Result<Value> {
        self.port = self.port % 10_000 + 1;
        let from = 20_000 + self.port;
        let peer = SocketAddrV4::new(
            super::text(command, "peer")?.parse().context("peer")?,
            u16::try_from(super::number(command, "port")?)?,
        );
        let time = Duration::from_millis(super::number(command, "ms")?);
        let rate = super::bulk::send(self.front(domain, xs, command)?, peer, from, time)?;
        Ok(json!({"mib_s": rate / f64::from(1 << 20)}))
    }

    /// Sends packets of one length for a time, as many as there is room for, on all queues.
    pub fn send(&mut self, domain: &Domain, xs: &XsClient, command: &Value) -> Result<Value> {
        let to: [u8; 6] = serde_json::from_value(command["to"].clone()).context("to")?;
        let len = super::number(command, "len")? as usize;
        let time = Duration::from_millis(super::number(command, "ms")?);
        let front = self.front(domain, xs, command)?;
        let large = len > 1514;
        let queues = front.queues().len();
        // Several flows a queue, so that the receiver's queues all have some.
        let flows: Vec<Vec<u8>> = match queues {
            1 => vec![frame(to, front.mac(), len, None)],
            n => (0..4 * n).map(|i| frame(to, front.mac(), len, Some(i as u16))).collect(),
        };
        let meta =
            PacketMeta { csum_blank: large, gso_tcpv4: large.then_some(1448), ..PacketMeta::default() };
        let (start, mut sent) = (Instant::now(), 0u64);
        while start.elapsed() < time {
            let before = sent;
            for (i, queue) in front.queues().iter_mut().enumerate() {
                queue.rings.reap()?;
                // Broadcasts come here as well, and what waits to be taken lets nobody sleep.
                while queue.rings.receive_bytes()?.is_some() {}
                let mut burst = 0;
                while burst < BURST && queue.rings.send(&flows[(i + burst * queues) % flows.len()], meta) {
                    burst += 1;
                }
                sent += burst as u64;
                queue.flush();
            }
            if sent == before {
                front.wait(WAIT)?;
            }
        }
        Ok(json!({"packets": sent}))
    }

    /// Takes packets for a time that begins with the first one.
    pub fn take(&mut self, domain: &Domain, xs: &XsClient, command: &Value) -> Result<Value> {
        let time = Duration::from_millis(super::number(command, "ms")?);
        let front = self.front(domain, xs, command)?;
        // What is left of the time before.
        while front.receive_any()?.is_some() {}
        front.flush();
        let (mut first, began) = (None, Instant::now());
        let (mut packets, mut bytes) = (0u64, 0u64);
        loop {
            let mut burst = 0;
            for queue in front.queues() {
                let mut of_this = 0;
                while of_this < BURST {
                    let Some((packet, _)) = queue.rings.receive_bytes()? else { break };
                    (of_this, packets, bytes) = (of_this + 1, packets + 1, bytes + packet.len() as u64);
                }
                if of_this > 0 {
                    queue.flush();
                }
                burst += of_this;
            }
            let start = match first {
                None if burst > 0 => {
                    // The first burst only starts the clock.
                    (packets, bytes) = (0, 0);
                    *first.insert(Instant::now())
                }
                None => began + Duration::from_secs(5),
                Some(start) => start,
            };
            if start.elapsed() >= time || (first.is_none() && Instant::now() > start) {
                let seconds = first.map_or(0.0, |start| start.elapsed().as_secs_f64());
                return Ok(json!({"packets": packets, "bytes": bytes, "seconds": seconds}));
            }
            if burst == 0 {
                front.wait(WAIT)?;
            }
        }
    }
}

//! The guest's network: netfront with smoltcp on it.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use domain_kit::Domain;
use domain_kit::xs::XsClient;
use frontends::netfront::NetFront;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use smoltcp::phy::{Device, DeviceCapabilities};
use smoltcp::time::Instant as Clock;

use crate::cases::net::LOST;
use crate::cases::world::GUEST_ADDRESS;
use crate::endpoint::{Direction, Endpoint, Link};
use crate::stats::Series;

/// netfront, with kicks taken and given at the right moments.
pub struct Nic(NetFront);

impl Device for Nic {
    type RxToken<'a> = <NetFront as Device>::RxToken<'a>;
    type TxToken<'a> = <NetFront as Device>::TxToken<'a>;

    fn receive(&mut self, now: Clock) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        self.0.receive(now)
    }

    fn transmit(&mut self, now: Clock) -> Option<Self::TxToken<'_>> {
        self.0.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.0.capabilities()
    }
}

impl Link for Nic {
    fn flush(&mut self) {
        self.0.flush();
    }

    fn wait(&mut self, timeout: Duration) -> Result<()> {
        self.0.flush();
        // Asks for an event for the next response, unless there is one already.
        if self.0.queue().final_check()? {
            return Ok(());
        }
        let [tx, rx] = self.0.wait_fds();
        let mut fds = [tx, rx].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        // Rounded up, so that a rest below a millisecond does not spin.
        let ms = PollTimeout::try_from(timeout.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, ms) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        self.0.clear();
        Ok(())
    }
}

/// The first NIC, connected at first use.
#[derive(Default)]
pub struct Net {
    endpoint: Option<Arc<Mutex<Endpoint<Nic>>>>,
}

/// How long the backend may take.
const CONNECT: Duration = Duration::from_secs(10);

impl Net {
    /// The endpoint. A load keeps it locked for as long as it runs.
    pub fn endpoint(&mut self, domain: &Domain, xs: &XsClient) -> Result<Arc<Mutex<Endpoint<Nic>>>> {
        if let Some(endpoint) = &self.endpoint {
            return Ok(endpoint.clone());
        }
        let front = NetFront::connect(&domain.hv, xs, domain.domid(), 0, CONNECT)?;
        let mac = front.mac();
        let endpoint = Arc::new(Mutex::new(Endpoint::new(Nic(front), mac, GUEST_ADDRESS.parse()?)));
        Ok(self.endpoint.insert(endpoint).clone())
    }
}

impl Endpoint<Nic> {
    /// One TCP stream with the outside.
    pub fn stream_command(&mut self, command: &Value) -> Result<Value> {
        let way = if command["out"].as_bool().unwrap_or(true) { Direction::Out } else { Direction::In };
        let time = Duration::from_millis(super::number(command, "ms")?);
        let port = u16::try_from(super::number(command, "port")?)?;
        Ok(json!({"mib_s": self.stream(peer(command)?, port, way, time)?}))
    }

    /// Median of some echoes, microseconds.
    pub fn ping_command(&mut self, command: &Value) -> Result<Value> {
        let count = super::number(command, "count")? as usize;
        let mut times = Series::default();
        self.pings(peer(command)?, LOST, |time| {
            times.push(time.as_secs_f64() * 1e6);
            times.len() < count
        })?;
        Ok(json!({"us": times.median()}))
    }
}

/// Between two echoes of a load, and until one without a reply is sent again.
const LOAD_AGAIN: Duration = Duration::from_millis(2);

impl Endpoint<Nic> {
    /// One echo of a light load: over when the outside has answered one of them.
    pub fn load_echo(&mut self, peer: Ipv4Addr) -> Result<()> {
        self.pings(peer, LOAD_AGAIN, |_| false)
    }
}

fn peer(command: &Value) -> Result<Ipv4Addr> {
    Ok(super::text(command, "peer")?.parse()?)
}

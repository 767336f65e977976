//! netfront: a network device of a process guest.
//!
//! | module | what |
//! |---|---|
//! | [`queue`] | the rings and buffers, and every check of what the backend says |
//! | [`phy`] | the device as [`smoltcp`] wants one |
//!
//! [`NetFront`] connects by xenbus and adds event channels. All of its pages lie in one region that only the backend
//! may map.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use domain_kit::evtchn::Port;
use domain_kit::grants::{GrantError, Region};
use domain_kit::hypercall::{HvError, Hypercall};
use domain_kit::mem::{Page, SharedMem};
use domain_kit::ring::RingMem;
use domain_kit::xenbus::{Frontend, XenbusState};
use domain_kit::xs::{XsClient, XsError};
use hv_abi::PAGE_SIZE;
use xen_abi::io::netif::node;

pub mod phy;
pub mod queue;

use queue::{BUFFER_PAGES, NetQueue};
pub use queue::{Packet, PacketMeta, QueueError};

/// Pages before the buffers: the rings.
const RING_PAGES: usize = 2;

/// Why a device could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// xenstore.
    #[error(transparent)]
    Store(#[from] XsError),
    /// hv-core.
    #[error(transparent)]
    Hypercall(#[from] HvError),
    /// Memory.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// The device's own nodes.
    #[error("vif {0}: {1}")]
    Node(u32, &'static str),
}

/// The buffers' part of the region.
#[derive(Debug)]
pub struct Buffers {
    region: std::sync::Arc<SharedMem>,
}

impl RingMem for Buffers {
    fn size(&self) -> usize {
        self.region.len() - RING_PAGES * PAGE_SIZE
    }
    fn load_u32(&self, offset: usize) -> u32 {
        RingMem::load_u32(&*self.region, RING_PAGES * PAGE_SIZE + offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        RingMem::store_u32(&*self.region, RING_PAGES * PAGE_SIZE + offset, value);
    }
    fn load_u64(&self, offset: usize) -> u64 {
        RingMem::load_u64(&*self.region, RING_PAGES * PAGE_SIZE + offset)
    }
    fn store_u64(&self, offset: usize, value: u64) {
        RingMem::store_u64(&*self.region, RING_PAGES * PAGE_SIZE + offset, value);
    }
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.region.copy_out(RING_PAGES * PAGE_SIZE + offset, into);
    }
    fn copy_in(&self, offset: usize, from: &[u8]) {
        self.region.copy_in(RING_PAGES * PAGE_SIZE + offset, from);
    }
}

/// A connected network device.
#[derive(Debug)]
pub struct NetFront {
    queue: NetQueue<Page, Buffers>,
    /// tx, rx.
    ports: [Port; 2],
    mac: [u8; 6],
    mtu: usize,
}

impl NetFront {
    /// Connects device `id` of domain `domid`, waiting up to `timeout` for its backend.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(
        hv: &Hypercall,
        xs: &XsClient,
        domid: u16,
        id: u32,
        timeout: Duration,
    ) -> Result<NetFront, ConnectError> {
        let front = Frontend::open(xs, domid, "vif", id)?;
        let mac = front.own_node(node::MAC)?.and_then(|text| parse_mac(&text));
        let mac = mac.ok_or(ConnectError::Node(id, "the node mac is missing or is no MAC address"))?;
        let mtu = front.own_node("mtu")?.and_then(|text| text.trim().parse().ok()).unwrap_or(1500);
        front.wait_backend(&[XenbusState::InitWait], timeout)?;
        if front.backend_number::<u32>(node::FEATURE_RX_COPY)?.unwrap_or(0) == 0 {
            return Err(ConnectError::Node(id, "the backend does not copy"));
        }
        let split = front.backend_number::<u32>(node::FEATURE_SPLIT_EVENT_CHANNELS)?.unwrap_or(0) != 0;
        if !split {
            return Err(ConnectError::Node(id, "the backend has no separate event channels"));
        }
        let tag = u64::from_le_bytes(*b"netfront").wrapping_add(u64::from(id));
        let pages = (RING_PAGES + BUFFER_PAGES) as u32;
        let region = Region::create(hv, front.backend_domid, pages, tag)?;
        let page = |i| Page::new(region.mem.clone(), i);
        let buffers = Buffers { region: region.mem.clone() };
        let mut queue = NetQueue::new(page(0), page(1), buffers, region.gref(RING_PAGES as u32));
        // The backend is not there yet: nobody to notify.
        queue.push();
        let ports =
            [hv.port_alloc_unbound(front.backend_domid)?, hv.port_alloc_unbound(front.backend_domid)?];
        let one = || "1".to_owned();
        front.publish(
            &[
                (node::TX_RING_REF, region.gref(0).to_string()),
                (node::RX_RING_REF, region.gref(1).to_string()),
                (node::EVENT_CHANNEL_TX, ports[0].port.to_string()),
                (node::EVENT_CHANNEL_RX, ports[1].port.to_string()),
                (node::REQUEST_RX_COPY, one()),
                (node::FEATURE_RX_NOTIFY, one()),
                (node::FEATURE_SG, one()),
                (node::FEATURE_GSO_TCPV4, one()),
            ],
            XenbusState::Connected,
        )?;
        front.wait_backend(&[XenbusState::Connected], timeout)?;
        Ok(NetFront { queue, ports, mac, mtu })
    }

    /// The device's address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Greatest IP packet, bytes.
    pub fn mtu(&self) -> usize {
        self.mtu
    }

    /// The rings.
    pub fn queue(&mut self) -> &mut NetQueue<Page, Buffers> {
        &mut self.queue
    }

    /// Publishes what was sent and posted, and notifies the backend where it wants that.
    pub fn flush(&mut self) {
        let (tx, rx) = self.queue.push();
        for (wanted, port) in [tx, rx].into_iter().zip(&self.ports) {
            if wanted {
                port.notify();
            }
        }
    }

    /// Descriptors that become readable when the backend has answered. [`NetFront::clear`] makes them wait again.
    pub fn wait_fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.ports[0].rx(), self.ports[1].rx()]
    }

    /// Takes latched events; to be called before the rings are looked at.
    pub fn clear(&self) {
        for port in &self.ports {
            port.clear();
        }
    }
}

/// Parses aa:bb:cc:dd:ee:ff.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.trim().split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        *byte = (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok())??;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::parse_mac;

    #[test]
    fn mac_addresses() {
        assert_eq!(parse_mac("00:16:3e:77:00:02\n"), Some([0, 0x16, 0x3e, 0x77, 0, 2]));
        for bad in ["", "00:16:3e:77:00", "00:16:3e:77:00:02:03", "0:16:3e:77:00:02", "xx:16:3e:77:00:02"] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}

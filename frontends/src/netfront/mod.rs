//! netfront: a network device of a process guest.
//!
//! | module | what |
//! |---|---|
//! | [`queue`] | the rings and buffers, and every check of what the backend says |
//! | [`ctrl`] | the control ring: hash configuration |
//! | [`phy`] | the device as [`smoltcp`] wants one |
//!
//! [`NetFront`] connects by xenbus and adds event channels. All of its pages lie in one region that only the backend
//! may map.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use domain_kit::Hypercall;
use domain_kit::evtchn::Port;
use domain_kit::grants::Region;
use domain_kit::mem::Page;
use domain_kit::ring::Span;
use domain_kit::xenbus::{Frontend, XenbusState};
use domain_kit::xs::{XsClient, XsError, XsOps};
use hv_abi::PAGE_SIZE;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xen_abi::io::netif::node;

use crate::ConnectError;

pub mod ctrl;
pub mod phy;
pub mod queue;

pub use ctrl::{Ctrl, CtrlError};
use queue::{BUFFER_PAGES, NetQueue};
pub use queue::{Packet, PacketMeta, QueueError};

/// Rings of each queue.
const RINGS: usize = 2;

/// What a device is asked for, beyond what every backend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Queues, if the backend has as many; else as many as it has.
    pub queues: usize,
    /// Packets to groups only after [`queue::NetQueue::send_multicast`].
    pub multicast_control: bool,
    /// A control ring, for hashes.
    pub ctrl: bool,
    /// Bytes to leave free at the start of each rx page.
    pub headroom: usize,
    /// IPv6 packets with blank checksums, and large ones, are welcome.
    pub ipv6_offloads: bool,
    /// Large TCP packets over IPv4 are welcome.
    pub gso: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            queues: 1,
            multicast_control: false,
            ctrl: false,
            headroom: 0,
            ipv6_offloads: true,
            gso: true,
        }
    }
}

/// One queue with its event channels; can go to a thread of its own.
#[derive(Debug)]
pub struct Queue {
    /// The rings.
    pub rings: NetQueue<Page, Span>,
    /// tx, rx.
    ports: [Port; 2],
}

impl Queue {
    /// Publishes what was sent and posted, and notifies the backend where it wants that.
    pub fn flush(&mut self) {
        let (tx, rx) = self.rings.push();
        for (wanted, port) in [tx, rx].into_iter().zip(&self.ports) {
            if wanted {
                port.notify();
            }
        }
    }

    /// Notifies the backend without a reason, as a frontend may.
    pub fn kick(&self) {
        self.ports.iter().for_each(Port::notify);
    }

    /// Descriptors that become readable when the backend has answered.
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

/// A connected network device.
#[derive(Debug)]
pub struct NetFront {
    /// At least one.
    queues: Vec<Queue>,
    ctrl: Option<Ctrl>,
    mac: [u8; 6],
    mtu: usize,
    next: usize,
}

impl NetFront {
    /// Connects device `id` of domain `domid` with one queue, waiting up to `timeout` for its backend.
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
        Self::connect_with(hv, xs, domid, id, Options::default(), timeout)
    }

    /// The same with options. A device that is connected already is closed and connected anew.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect_with(
        hv: &Hypercall,
        xs: &XsClient,
        domid: u16,
        id: u32,
        options: Options,
        timeout: Duration,
    ) -> Result<NetFront, ConnectError> {
        let front = Frontend::open(xs, domid, "vif", id)?;
        let mac = front.own_node(node::MAC)?.and_then(|text| parse_mac(&text));
        let mac = mac.ok_or(ConnectError::Node("vif", id, "the node mac is missing or is no MAC address"))?;
        let mtu = front.own_node("mtu")?.and_then(|text| text.trim().parse().ok()).unwrap_or(1500);
        if front.own_state()? != XenbusState::Initialising {
            front.publish(&[], XenbusState::Initialising)?;
        }
        front.wait_backend(&[XenbusState::InitWait], timeout)?;
        let offered = |name: &str| Ok::<_, XsError>(front.backend_number::<usize>(name)?.unwrap_or(0));
        if offered(node::FEATURE_RX_COPY)? == 0 {
            return Err(ConnectError::Node("vif", id, "the backend does not copy"));
        }
        if offered(node::FEATURE_SPLIT_EVENT_CHANNELS)? == 0 {
            return Err(ConnectError::Node("vif", id, "the backend has no separate event channels"));
        }
        let missing = [
            (options.ctrl, node::FEATURE_CTRL_RING),
            (options.multicast_control, node::FEATURE_MULTICAST_CONTROL),
            (options.headroom > 0, node::FEATURE_XDP_HEADROOM),
        ];
        for (wanted, name) in missing {
            if wanted && offered(name)? == 0 {
                return Err(ConnectError::Node("vif", id, name));
            }
        }
        let count = options.queues.clamp(1, offered(node::MULTI_QUEUE_MAX_QUEUES)?.max(1));

        // The rings first, then the control ring and a page for what its requests point at, then the buffers.
        let ring_pages = RINGS * count + 2;
        let tag = u64::from_le_bytes(*b"netfront").wrapping_add(u64::from(id));
        if let Some(old) = Region::find(hv, tag)? {
            // A connection before this one; the backend has let go of it.
            hv.region_delete(old.info.region)?;
        }
        let pages = (ring_pages + count * BUFFER_PAGES) as u32;
        let region = Region::create(hv, front.backend_domid, pages, tag)?;
        let page = |i| Page::new(region.mem.clone(), i);
        let mut nodes: Vec<(String, String)> = Vec::new();
        let mut queues = Vec::new();
        for i in 0..count {
            let first = ring_pages + i * BUFFER_PAGES;
            let buffers = Span::new(region.mem.clone(), first * PAGE_SIZE, BUFFER_PAGES * PAGE_SIZE);
            let rings =
                NetQueue::new(page(RINGS * i), page(RINGS * i + 1), buffers, region.gref(first as u32));
            let mut rings = rings.with_headroom(options.headroom);
            // The backend is not there yet: nobody to notify.
            rings.push();
            let ports =
                [hv.port_alloc_unbound(front.backend_domid)?, hv.port_alloc_unbound(front.backend_domid)?];
            let prefix = if count > 1 { format!("queue-{i}/") } else { String::new() };
            for (name, value) in [
                (node::TX_RING_REF, region.gref((RINGS * i) as u32)),
                (node::RX_RING_REF, region.gref((RINGS * i + 1) as u32)),
                (node::EVENT_CHANNEL_TX, ports[0].port),
                (node::EVENT_CHANNEL_RX, ports[1].port),
            ] {
                nodes.push((format!("{prefix}{name}"), value.to_string()));
            }
            queues.push(Queue { rings, ports });
        }
        let ctrl_page = RINGS * count;
        let ctrl = match options.ctrl {
            false => {
                // Of a connection before this one.
                let _absent_is_fine = xs.rm(&format!("{}/{}", front.path, node::CTRL_RING_REF));
                None
            }
            true => {
                let port = hv.port_alloc_unbound(front.backend_domid)?;
                let gref = region.gref(ctrl_page as u32);
                nodes.push((node::CTRL_RING_REF.into(), gref.to_string()));
                nodes.push((node::EVENT_CHANNEL_CTRL.into(), port.port.to_string()));
                let shared = (page(ctrl_page + 1), region.gref(ctrl_page as u32 + 1));
                Some(Ctrl::new(page(ctrl_page), shared, port))
            }
        };
        let flags = [
            (node::REQUEST_RX_COPY, true),
            (node::FEATURE_RX_NOTIFY, true),
            (node::FEATURE_SG, true),
            (node::FEATURE_GSO_TCPV4, options.gso),
            (node::FEATURE_GSO_TCPV6, options.gso && options.ipv6_offloads),
            (node::FEATURE_IPV6_CSUM_OFFLOAD, options.ipv6_offloads),
            (node::REQUEST_MULTICAST_CONTROL, options.multicast_control),
        ];
        nodes.extend(flags.map(|(name, on)| (name.into(), u8::from(on).to_string())));
        nodes.push((node::MULTI_QUEUE_NUM_QUEUES.into(), count.to_string()));
        nodes.push((node::XDP_HEADROOM.into(), options.headroom.to_string()));
        let nodes: Vec<(&str, String)> =
            nodes.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        front.publish(&nodes, XenbusState::Connected)?;
        front.wait_backend(&[XenbusState::Connected], timeout)?;
        Ok(NetFront { queues, ctrl, mac, mtu, next: 0 })
    }

    /// The device's address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Greatest IP packet, bytes.
    pub fn mtu(&self) -> usize {
        self.mtu
    }

    /// The first queue's rings.
    pub fn queue(&mut self) -> &mut NetQueue<Page, Span> {
        // There is always one.
        &mut self.queues[0].rings
    }

    /// All queues.
    pub fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    /// The queues by themselves, for threads.
    pub fn into_queues(self) -> Vec<Queue> {
        self.queues
    }

    /// The control ring, if it was asked for.
    pub fn ctrl(&mut self) -> Option<&mut Ctrl> {
        self.ctrl.as_mut()
    }

    /// The next packet of any queue.
    ///
    /// # Errors
    /// [`QueueError`].
    pub fn receive_any(&mut self) -> Result<Option<Packet>, QueueError> {
        for _ in 0..self.queues.len() {
            self.next = (self.next + 1) % self.queues.len();
            if let Some(packet) = self.queues[self.next].rings.receive()? {
                return Ok(Some(packet));
            }
        }
        Ok(None)
    }

    /// Waits until the backend has something for this end, `timeout` at most, and takes the events. To be called when the rings
    /// were looked at and had nothing, with everything flushed.
    ///
    /// # Errors
    /// [`QueueError`].
    pub fn wait(&mut self, timeout: Duration) -> Result<(), QueueError> {
        if self.final_check()? {
            return Ok(());
        }
        let fds = self.all_wait_fds();
        let mut fds: Vec<_> = fds.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        // Interrupted is as good as woken.
        let _ = poll(&mut fds, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX));
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let ports = self.queues.iter().flat_map(|queue| &queue.ports);
        for (port, ready) in ports.zip(ready) {
            if ready {
                port.clear();
            }
        }
        Ok(())
    }

    /// Publishes what was sent and posted, and notifies the backend where it wants that.
    pub fn flush(&mut self) {
        self.queues.iter_mut().for_each(Queue::flush);
    }

    /// Descriptors of the first queue that become readable when the backend has answered. [`NetFront::clear`] makes them wait
    /// again.
    pub fn wait_fds(&self) -> [BorrowedFd<'_>; 2] {
        self.queues[0].wait_fds()
    }

    /// The same of all queues.
    pub fn all_wait_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.queues.iter().flat_map(Queue::wait_fds).collect()
    }

    /// To be asked before sleeping, as [`NetQueue::final_check`]; of all queues.
    ///
    /// # Errors
    /// [`QueueError`].
    pub fn final_check(&mut self) -> Result<bool, QueueError> {
        self.queues.iter_mut().try_fold(false, |any, queue| Ok(any | queue.rings.final_check()?))
    }

    /// Takes latched events; to be called before the rings are looked at.
    pub fn clear(&self) {
        self.queues.iter().for_each(Queue::clear);
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

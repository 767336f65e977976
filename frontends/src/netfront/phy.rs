//! [`NetFront`] as a device of smoltcp.
//!
//! Checksums of TCP and UDP are left to the backend on the way out, and on the way in taken as the backend says: a
//! packet from the same host may have none yet.

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::{NetFront, PacketMeta};

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// A received packet.
#[derive(Debug)]
pub struct Received(Vec<u8>);

/// Room to send one packet.
#[derive(Debug)]
pub struct Room<'a>(&'a mut NetFront);

impl Device for NetFront {
    type RxToken<'a> = Received;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Received, Room<'_>)> {
        // An error is kept in the queue, and every later call finds it there.
        let _answers = self.queue().reap();
        if !self.can_send() {
            return None;
        }
        let packet = self.receive_any().ok().flatten()?;
        Some((Received(packet.bytes), Room(self)))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Room<'_>> {
        let _answers = self.queue().reap();
        self.can_send().then_some(Room(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + ETHERNET;
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.udp = Checksum::None;
        capabilities
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        let meta = PacketMeta { csum_blank: is_tcp_or_udp(&packet), ..PacketMeta::default() };
        if !self.0.queue().send(&packet, meta) {
            tracing::warn!(len, "a packet did not fit the ring");
        }
        result
    }
}

impl NetFront {
    /// Room for a packet of the largest size without segmentation.
    fn can_send(&mut self) -> bool {
        let most = self.mtu + ETHERNET;
        self.queue().can_send(most, PacketMeta::default())
    }
}

fn is_tcp_or_udp(packet: &[u8]) -> bool {
    // IPv4, and its protocol field.
    packet.get(12..14) == Some(&[8, 0]) && matches!(packet.get(23), Some(6 | 17))
}

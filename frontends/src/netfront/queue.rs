//! The two rings of a network device, seen from the frontend.
//!
//! The backend is not trusted: indices are checked by the rings, every response's id, offset, length and chain is
//! checked here, and bytes are copied out of shared pages once. Whatever is wrong ends in [`QueueError`], after which the
//! device is not used any more (XSA-396/403: pages are never given back to other uses while the backend may hold them).

use domain_kit::ring::{FrontRing, RingError, RingLayout, RingMem};
use hv_abi::PAGE_SIZE;
use xen_abi::io::netif::*;

/// Slots of each ring: what fits in its page.
pub const SLOTS: usize = 256;
/// Buffer pages that a queue needs: one for each slot of each ring.
pub const BUFFER_PAGES: usize = 2 * SLOTS;
/// Slots with data that a packet may take.
const MAX_DATA_SLOTS: usize = XEN_NETIF_NR_SLOTS_MIN as usize;
/// Largest packet towards the backend, bytes.
pub const MAX_TX_PACKET: usize = XEN_NETIF_MAX_TX_SIZE as usize;
/// Largest packet that is put together from the backend's slots, bytes.
const MAX_RX_PACKET: usize = 65535 + 14;

/// Why a device cannot be used any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// An index that no honest backend writes.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A tx response to nothing.
    #[error("tx response with id {0}, which is not in flight")]
    UnknownId(u16),
    /// An rx response for another buffer than that of its slot.
    #[error("rx response with id {0} in the slot of another")]
    OtherBuffer(u16),
    /// More responses of the extra-info kind than there was extra info.
    #[error("tx response without a request")]
    NullResponse,
    /// An rx response beyond its page.
    #[error("rx response with {len} bytes at {offset}")]
    OutOfPage {
        /// First byte.
        offset: u16,
        /// Bytes.
        len: i16,
    },
    /// A packet of too many slots or bytes.
    #[error("an rx packet without an end")]
    Endless,
    /// Extra info of an unknown kind.
    #[error("rx extra info of an unknown kind")]
    BadExtra,
}

/// What goes with a packet's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketMeta {
    /// The TCP or UDP checksum is not made yet.
    pub csum_blank: bool,
    /// TCP over IPv4, to be cut into segments with so many bytes of payload.
    pub gso_tcpv4: Option<u16>,
    /// The same over IPv6; not both.
    pub gso_tcpv6: Option<u16>,
    /// Towards the guest: the hash that it asked for, with the type of its `XEN_NETIF_CTRL_HASH_TYPE_*` bit.
    pub hash: Option<(u8, u32)>,
}

impl PacketMeta {
    /// Segmentation: kind and size.
    fn gso(&self) -> Option<(u8, u16)> {
        let v4 = self.gso_tcpv4.map(|size| (XEN_NETIF_GSO_TYPE_TCPV4, size));
        v4.or(self.gso_tcpv6.map(|size| (XEN_NETIF_GSO_TYPE_TCPV6, size)))
    }
}

/// A packet from the backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// Checksum and segmentation as the backend says.
    pub meta: PacketMeta,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// A packet's first slot.
    First,
    /// Extra info; the flag says if data follows after it.
    Extra(bool),
    /// More data.
    Data,
}

/// The rings and their buffers. `M` is a ring's memory, `B` that of all buffers: [`BUFFER_PAGES`] pages, the first half for tx.
#[derive(Debug)]
pub struct NetQueue<M, B> {
    tx: FrontRing<M>,
    rx: FrontRing<M>,
    buffers: B,
    first_gref: u32,
    /// Bytes that the backend leaves free at the start of each page.
    headroom: usize,
    free_tx: Vec<u16>,
    tx_busy: [bool; SLOTS],
    /// Extra-info slots sent and not answered.
    extras: u32,
    expect: Expect,
    /// The packet that is being put together: its first `filled` bytes.
    assembling: Vec<u8>,
    filled: usize,
    meta: PacketMeta,
    slots: usize,
    /// A slot of the packet failed: drop it when it is complete.
    damaged: bool,
    broken: Option<QueueError>,
    dropped: u64,
}

/// The tx ring's layout.
pub fn tx_layout() -> RingLayout {
    RingLayout::new(1, TX_ENTRY_SIZE, size_of::<NetifTxResponse>())
}

/// The rx ring's layout.
pub fn rx_layout() -> RingLayout {
    RingLayout::new(1, RX_ENTRY_SIZE, size_of::<NetifRxResponse>())
}

impl<M: RingMem, B: RingMem> NetQueue<M, B> {
    /// Data of every slot begins behind so many bytes: what the backend was asked for.
    #[must_use]
    pub fn with_headroom(self, headroom: usize) -> Self {
        NetQueue { headroom, ..self }
    }

    /// New rings in this memory, all rx buffers posted (published by the first [`NetQueue::push`]). Buffer page i has the grant
    /// reference `first_gref + i`.
    ///
    /// # Panics
    /// If the memory is too small.
    pub fn new(tx: M, rx: M, buffers: B, first_gref: u32) -> Self {
        assert!(buffers.size() >= BUFFER_PAGES * PAGE_SIZE);
        let mut queue = NetQueue {
            tx: FrontRing::init(tx, tx_layout()),
            rx: FrontRing::init(rx, rx_layout()),
            buffers,
            first_gref,
            headroom: 0,
            free_tx: (0..SLOTS as u16).rev().collect(),
            tx_busy: [false; SLOTS],
            extras: 0,
            expect: Expect::First,
            assembling: vec![0; MAX_RX_PACKET],
            filled: 0,
            meta: PacketMeta::default(),
            slots: 0,
            damaged: false,
            broken: None,
            dropped: 0,
        };
        (0..SLOTS).for_each(|_| queue.post());
        queue
    }

    /// Posts the rx buffer of the ring's next slot. Slot and buffer always go together: responses come in their requests' slots.
    fn post(&mut self) {
        let id = (self.rx.req_prod_pvt() as usize % SLOTS) as u16;
        let gref = self.first_gref + (SLOTS + usize::from(id)) as u32;
        let mut request = [0; RX_ENTRY_SIZE];
        request[..2].copy_from_slice(&id.to_le_bytes());
        request[4..].copy_from_slice(&gref.to_le_bytes());
        self.rx.put(&request);
    }

    /// The first error, if there was one.
    pub fn broken(&self) -> Option<&QueueError> {
        self.broken.as_ref()
    }

    /// Packets dropped because the backend could not fill a slot.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// True if a packet of `len` bytes can be sent now.
    pub fn can_send(&self, len: usize, meta: PacketMeta) -> bool {
        let data = len.div_ceil(PAGE_SIZE).max(1);
        let slots = data + usize::from(meta.gso().is_some());
        self.broken.is_none() && self.tx.free() as usize >= slots && self.free_tx.len() >= data
    }

    /// Puts a packet into the ring; the backend sees it after [`NetQueue::push`]. False if there is no room, or it is longer than
    /// [`MAX_TX_PACKET`].
    pub fn send(&mut self, packet: &[u8], meta: PacketMeta) -> bool {
        if packet.len() > MAX_TX_PACKET || !self.can_send(packet.len(), meta) {
            return false;
        }
        let pieces = packet.len().div_ceil(PAGE_SIZE).max(1);
        for (i, piece) in packet.chunks(PAGE_SIZE).enumerate() {
            let Some(id) = self.free_tx.pop() else { return false };
            self.tx_busy[usize::from(id)] = true;
            self.buffers.copy_in(usize::from(id) * PAGE_SIZE, piece);
            let mut flags = if i + 1 < pieces { NETTXF_MORE_DATA } else { 0 };
            let mut size = piece.len();
            if i == 0 {
                size = packet.len();
                if meta.csum_blank {
                    flags |= NETTXF_CSUM_BLANK | NETTXF_DATA_VALIDATED;
                }
                if meta.gso().is_some() {
                    flags |= NETTXF_EXTRA_INFO;
                }
            }
            let gref = self.first_gref + u32::from(id);
            let request = NetifTxRequest { gref, offset: 0, flags, id, size: size as u16 };
            self.tx.put(&TxSlot::from(request).0);
            if i == 0
                && let Some((gso_type, size)) = meta.gso()
            {
                let gso = Extra::Gso { size, gso_type, features: 0 };
                self.tx.put(&TxSlot::from(NetifExtraInfo::new(gso, false)).0);
                self.extras += 1;
            }
        }
        true
    }

    /// Asks the backend to let packets to an Ethernet group through its filter, or not any more. False if there is no room.
    pub fn send_multicast(&mut self, add: bool, group: [u8; 6]) -> bool {
        if self.broken.is_some() || self.tx.free() < 2 {
            return false;
        }
        let Some(id) = self.free_tx.pop() else { return false };
        self.tx_busy[usize::from(id)] = true;
        let gref = self.first_gref + u32::from(id);
        let request = NetifTxRequest { gref, offset: 0, flags: NETTXF_EXTRA_INFO, id, size: 0 };
        self.tx.put(&TxSlot::from(request).0);
        let extra = if add { Extra::McastAdd(group) } else { Extra::McastDel(group) };
        self.tx.put(&TxSlot::from(NetifExtraInfo::new(extra, false)).0);
        self.extras += 1;
        true
    }

    /// Publishes what was sent and posted: whether the backend wants an event for (tx, rx).
    pub fn push(&mut self) -> (bool, bool) {
        if self.broken.is_some() {
            return (false, false);
        }
        (self.tx.push(), self.rx.push())
    }

    fn break_on<T>(&mut self, result: Result<T, QueueError>) -> Result<T, QueueError> {
        result.inspect_err(|e| {
            tracing::error!(error = %e, "the network backend breaks the protocol; the device is given up");
            self.broken.get_or_insert_with(|| e.clone());
        })
    }

    fn check(&self) -> Result<(), QueueError> {
        self.broken.clone().map_or(Ok(()), Err)
    }

    /// Takes the backend's answers to sent packets; gives how many there were.
    ///
    /// # Errors
    /// [`QueueError`], then for ever.
    pub fn reap(&mut self) -> Result<usize, QueueError> {
        self.check()?;
        let result = self.try_reap();
        self.break_on(result)
    }

    fn try_reap(&mut self) -> Result<usize, QueueError> {
        let waiting = self.tx.unconsumed()? as usize;
        for _ in 0..waiting {
            let mut response = [0; size_of::<NetifTxResponse>()];
            self.tx.take(&mut response);
            let id = u16::from_le_bytes([response[0], response[1]]);
            if i16::from_le_bytes([response[2], response[3]]) == NETIF_RSP_NULL {
                self.extras = self.extras.checked_sub(1).ok_or(QueueError::NullResponse)?;
                continue;
            }
            match self.tx_busy.get_mut(usize::from(id)) {
                Some(busy) if *busy => *busy = false,
                _ => return Err(QueueError::UnknownId(id)),
            }
            self.free_tx.push(id);
        }
        Ok(waiting)
    }

    /// Takes the next whole packet.
    ///
    /// # Errors
    /// [`QueueError`], then for ever.
    pub fn receive(&mut self) -> Result<Option<Packet>, QueueError> {
        let packet = self.receive_bytes()?;
        Ok(packet.map(|(bytes, meta)| Packet { bytes: bytes.to_vec(), meta }))
    }

    /// The same for who looks at the packet at once: it is overwritten by the next one.
    ///
    /// # Errors
    /// [`QueueError`], then for ever.
    pub fn receive_bytes(&mut self) -> Result<Option<(&[u8], PacketMeta)>, QueueError> {
        self.check()?;
        let result = self.try_receive();
        let packet = self.break_on(result)?;
        Ok(packet.map(|(len, meta)| (&self.assembling[..len], meta)))
    }

    fn try_receive(&mut self) -> Result<Option<(usize, PacketMeta)>, QueueError> {
        for _ in 0..self.rx.unconsumed()? {
            let mut slot = RxSlot::default();
            let index = self.rx.take(&mut slot.0);
            let complete = self.slot(index as usize % SLOTS, slot)?;
            // The slot's bytes were copied out: its buffer can be filled again.
            self.post();
            if complete {
                let packet = (std::mem::take(&mut self.filled), std::mem::take(&mut self.meta));
                self.slots = 0;
                if std::mem::take(&mut self.damaged) {
                    self.dropped += 1;
                    continue;
                }
                return Ok(Some(packet));
            }
        }
        Ok(None)
    }

    /// Deals with one response; true if it was the packet's last.
    fn slot(&mut self, index: usize, slot: RxSlot) -> Result<bool, QueueError> {
        self.slots += 1;
        if self.slots > MAX_DATA_SLOTS + 4 {
            return Err(QueueError::Endless);
        }
        if let Expect::Extra(more_data) = self.expect {
            let info = slot.extra_info();
            match info.extra() {
                Some(Extra::Gso { size, gso_type: XEN_NETIF_GSO_TYPE_TCPV4, .. }) => {
                    self.meta.gso_tcpv4 = Some(size);
                }
                Some(Extra::Gso { size, gso_type: XEN_NETIF_GSO_TYPE_TCPV6, .. }) => {
                    self.meta.gso_tcpv6 = Some(size);
                }
                Some(Extra::Hash { hash_type, value, .. }) => {
                    self.meta.hash = Some((hash_type, value));
                }
                Some(_) => {}
                None => return Err(QueueError::BadExtra),
            }
            if !info.more() {
                self.expect = if more_data { Expect::Data } else { Expect::First };
            }
            return Ok(self.expect == Expect::First);
        }
        let NetifRxResponse { id, offset, flags, status } = slot.response();
        if usize::from(id) != index {
            return Err(QueueError::OtherBuffer(id));
        }
        let more_data = flags & NETRXF_MORE_DATA != 0;
        if self.expect == Expect::First {
            self.meta.csum_blank = flags & NETRXF_CSUM_BLANK != 0;
        }
        match usize::try_from(status) {
            // The backend could not fill the slot.
            Err(_) => self.damaged = true,
            Ok(len) => {
                // The length counts the headroom (as Linux's netback has it).
                let (offset, skipped) = (usize::from(offset), self.headroom);
                if offset + len > PAGE_SIZE || len < skipped {
                    return Err(QueueError::OutOfPage { offset: offset as u16, len: status });
                }
                let (offset, len) = (offset + skipped, len - skipped);
                let at = self.filled;
                let Some(into) = self.assembling.get_mut(at..at + len) else {
                    return Err(QueueError::Endless);
                };
                let page = (SLOTS + index) * PAGE_SIZE;
                self.buffers.copy_out(page + offset, into);
                self.filled += len;
            }
        }
        self.expect = match self.expect {
            Expect::First if flags & NETRXF_EXTRA_INFO != 0 => Expect::Extra(more_data),
            _ if more_data => Expect::Data,
            _ => Expect::First,
        };
        Ok(self.expect == Expect::First)
    }

    /// To be asked before sleeping: true if there are responses after all, else the next one of either ring raises an event.
    ///
    /// # Errors
    /// [`QueueError`], then for ever.
    pub fn final_check(&mut self) -> Result<bool, QueueError> {
        self.check()?;
        let result = self.tx.final_check().and_then(|tx| Ok(tx | self.rx.final_check()?));
        self.break_on(result.map_err(QueueError::from))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use domain_kit::ring::{BackRing, HeapMem};
    use proptest::prelude::*;

    type Mem = Arc<HeapMem>;

    fn queue() -> (NetQueue<Mem, Mem>, Mem, Mem, Mem) {
        let [tx, rx] = [(); 2].map(|()| Arc::new(HeapMem::new(PAGE_SIZE)));
        let buffers = Arc::new(HeapMem::new(BUFFER_PAGES * PAGE_SIZE));
        (NetQueue::new(tx.clone(), rx.clone(), buffers.clone(), 100), tx, rx, buffers)
    }

    fn respond(back: &mut BackRing<Mem>, response: NetifRxResponse) {
        let mut request = [0; 8];
        back.take(&mut request);
        back.put(&RxSlot::from(response).0);
    }

    #[test]
    fn a_packet_over_several_slots() {
        let (mut queue, _tx, rx, buffers) = queue();
        queue.push();
        let mut back = BackRing::attach(rx, rx_layout(), 0, 0);
        assert_eq!(back.unconsumed(), Ok(256));
        buffers.copy_in(SLOTS * PAGE_SIZE, &[1; 4096]);
        buffers.copy_in((SLOTS + 2) * PAGE_SIZE + 4, &[2; 10]);
        let flags = NETRXF_MORE_DATA | NETRXF_EXTRA_INFO | NETRXF_CSUM_BLANK;
        respond(&mut back, NetifRxResponse { id: 0, offset: 0, flags, status: 4096 });
        let mut request = [0; 8];
        back.take(&mut request);
        let gso = Extra::Gso { size: 1448, gso_type: XEN_NETIF_GSO_TYPE_TCPV4, features: 0 };
        back.put(&RxSlot::from(NetifExtraInfo::new(gso, false)).0);
        back.push();
        assert_eq!(queue.receive(), Ok(None), "not complete");
        respond(&mut back, NetifRxResponse { id: 2, offset: 4, flags: 0, status: 10 });
        back.push();
        let packet = queue.receive().unwrap().unwrap();
        assert_eq!(packet.bytes.len(), 4106);
        assert_eq!((packet.bytes[4095], packet.bytes[4096]), (1, 2));
        assert_eq!(
            packet.meta,
            PacketMeta { csum_blank: true, gso_tcpv4: Some(1448), ..PacketMeta::default() }
        );
        queue.push();
        assert_eq!(back.unconsumed(), Ok(256), "all buffers are posted again");
    }

    #[test]
    fn ids_that_are_not_in_flight() {
        for (id, status) in [(7, NETIF_RSP_OKAY), (300, NETIF_RSP_OKAY), (0, NETIF_RSP_NULL)] {
            let (mut queue, tx, ..) = queue();
            assert!(queue.send(&[0; 60], PacketMeta::default()));
            queue.push();
            let mut back = BackRing::attach(tx, tx_layout(), 0, 0);
            back.take(&mut [0; 12]);
            let mut response = [0; 4];
            response[..2].copy_from_slice(&u16::to_le_bytes(id));
            response[2..].copy_from_slice(&i16::to_le_bytes(status));
            back.put(&response);
            back.push();
            let error = queue.reap().unwrap_err();
            assert_eq!(queue.reap(), Err(error), "for ever");
            assert!(!queue.send(&[0; 60], PacketMeta::default()));
        }
    }

    #[test]
    fn data_beyond_the_page() {
        let (mut queue, _tx, rx, _) = queue();
        queue.push();
        let mut back = BackRing::attach(rx, rx_layout(), 0, 0);
        respond(&mut back, NetifRxResponse { id: 0, offset: 4000, flags: 0, status: 97 });
        back.push();
        assert_eq!(queue.receive(), Err(QueueError::OutOfPage { offset: 4000, len: 97 }));
    }

    proptest! {
        /// A backend that answers with anything: no panic, no packet beyond the limits.
        #[test]
        fn any_responses(rx in proptest::collection::vec(any::<[u8; 8]>(), 0..256),
                         tx in proptest::collection::vec(any::<[u8; 4]>(), 0..64), honest: bool) {
            let (mut queue, tx_mem, rx_mem, _) = queue();
            for _ in 0..64 {
                queue.send(&[0; 60], PacketMeta { gso_tcpv4: Some(1), csum_blank: true, ..PacketMeta::default() });
            }
            queue.push();
            let mut back = BackRing::attach(rx_mem, rx_layout(), 0, 0);
            for (i, mut response) in rx.into_iter().enumerate() {
                if honest {
                    // Ids and lengths that fit, so that chains get long.
                    response[..2].copy_from_slice(&(i as u16).to_le_bytes());
                    response[2..4].fill(0);
                    response[7] = 3;
                }
                back.take(&mut [0; 8]);
                back.put(&response);
            }
            back.push();
            while let Ok(Some(packet)) = queue.receive() {
                prop_assert!(packet.bytes.len() <= MAX_RX_PACKET);
            }
            let mut back = BackRing::attach(tx_mem, tx_layout(), 0, 0);
            for response in tx {
                back.take(&mut [0; 12]);
                back.put(&response);
            }
            back.push();
            let _ = queue.reap();
            let _ = queue.final_check();
        }
    }
}

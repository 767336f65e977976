//! `io/netif.h`: the network device protocol: a tx ring, an rx ring and an optional control ring.
//!
//! A packet is a run of slots: the first request (in tx its `size` is the whole packet's), extra-info slots if
//! `extra_info` is set, then further slots while `more_data` is set. Layouts are the same for 32-bit frontends.

use zerocopy::{FromBytes, IntoBytes};

consts! { "io/netif.h";
    u32 {
        /// Slots of one packet that every backend must take.
        XEN_NETIF_NR_SLOTS_MIN = 18;
        /// Greatest packet in bytes.
        XEN_NETIF_MAX_TX_SIZE = 0xffff;
        XEN_NETIF_CTRL_HASH_TYPE_IPV4 = 1 << 0;
        XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP = 1 << 1;
        XEN_NETIF_CTRL_HASH_TYPE_IPV6 = 1 << 2;
        XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP = 1 << 3;
        XEN_NETIF_CTRL_HASH_ALGORITHM_NONE = 0;
        XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ = 1;
        XEN_NETIF_CTRL_STATUS_SUCCESS = 0;
        XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED = 1;
        XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER = 2;
        XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW = 3;
    }
    u16 {
        XEN_NETIF_CTRL_TYPE_INVALID = 0;
        XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS = 1;
        XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS = 2;
        XEN_NETIF_CTRL_TYPE_SET_HASH_KEY = 3;
        XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE = 4;
        XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE = 5;
        XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING = 6;
        XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM = 7;
        XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE = 8;
        XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING = 9;
        XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING = 10;
        /// `XenNetifGref::flags`: the mapping is read-only.
        XEN_NETIF_CTRLF_GREF_READONLY(XEN_NETIF_CTRLF_GREF_readonly) = 1 << 0;
        /// The checksum field holds only the pseudo-header's sum.
        NETTXF_CSUM_BLANK(NETTXF_csum_blank) = 1 << 0;
        /// The data was validated (implied by a blank checksum).
        NETTXF_DATA_VALIDATED(NETTXF_data_validated) = 1 << 1;
        NETTXF_MORE_DATA(NETTXF_more_data) = 1 << 2;
        NETTXF_EXTRA_INFO(NETTXF_extra_info) = 1 << 3;
        NETRXF_DATA_VALIDATED(NETRXF_data_validated) = 1 << 0;
        /// The checksum field holds only the pseudo-header's sum.
        NETRXF_CSUM_BLANK(NETRXF_csum_blank) = 1 << 1;
        NETRXF_MORE_DATA(NETRXF_more_data) = 1 << 2;
        NETRXF_EXTRA_INFO(NETRXF_extra_info) = 1 << 3;
        NETRXF_GSO_PREFIX(NETRXF_gso_prefix) = 1 << 4;
    }
    u8 {
        XEN_NETIF_EXTRA_TYPE_NONE = 0;
        XEN_NETIF_EXTRA_TYPE_GSO = 1;
        XEN_NETIF_EXTRA_TYPE_MCAST_ADD = 2;
        XEN_NETIF_EXTRA_TYPE_MCAST_DEL = 3;
        XEN_NETIF_EXTRA_TYPE_HASH = 4;
        /// One more than the highest type.
        XEN_NETIF_EXTRA_TYPE_MAX = 5;
        /// Another extra-info slot follows.
        XEN_NETIF_EXTRA_FLAG_MORE = 1 << 0;
        XEN_NETIF_GSO_TYPE_NONE = 0;
        XEN_NETIF_GSO_TYPE_TCPV4 = 1;
        XEN_NETIF_GSO_TYPE_TCPV6 = 2;
    }
    i16 {
        NETIF_RSP_OKAY = 0;
        NETIF_RSP_ERROR = -1;
        NETIF_RSP_DROPPED = -2;
        /// Response to an extra-info slot in the tx ring.
        NETIF_RSP_NULL = 1;
    }
}

/// Linux's addition to `XEN_NETIF_EXTRA_TYPE_*` (include/xen/interface/io/netif.h there): rx data begins behind a headroom.
pub const XEN_NETIF_EXTRA_TYPE_XDP: u8 = 5;

/// Names of the nodes that netfront and netback exchange (`xen/io/netif.h`).
pub mod node {
    /// Frontend: grant reference of the tx ring.
    pub const TX_RING_REF: &str = "tx-ring-ref";
    /// Frontend: grant reference of the rx ring.
    pub const RX_RING_REF: &str = "rx-ring-ref";
    /// Frontend: the port of both rings.
    pub const EVENT_CHANNEL: &str = "event-channel";
    /// Backend: separate ports work.
    pub const FEATURE_SPLIT_EVENT_CHANNELS: &str = "feature-split-event-channels";
    /// Frontend: the tx ring's port.
    pub const EVENT_CHANNEL_TX: &str = "event-channel-tx";
    /// Frontend: the rx ring's port.
    pub const EVENT_CHANNEL_RX: &str = "event-channel-rx";
    /// Frontend: the backend copies to its buffers (all modern ones).
    pub const REQUEST_RX_COPY: &str = "request-rx-copy";
    /// Backend: it copies.
    pub const FEATURE_RX_COPY: &str = "feature-rx-copy";
    /// Frontend: it wants an event when there are rx responses.
    pub const FEATURE_RX_NOTIFY: &str = "feature-rx-notify";
    /// Both: scatter-gather, more than one slot a packet.
    pub const FEATURE_SG: &str = "feature-sg";
    /// Both: TCPv4 segmentation offload.
    pub const FEATURE_GSO_TCPV4: &str = "feature-gso-tcpv4";
    /// Both: TCPv6 segmentation offload.
    pub const FEATURE_GSO_TCPV6: &str = "feature-gso-tcpv6";
    /// Both: "1" turns IPv4 checksum offload off.
    pub const FEATURE_NO_CSUM_OFFLOAD: &str = "feature-no-csum-offload";
    /// Both: "1" turns IPv6 checksum offload on.
    pub const FEATURE_IPV6_CSUM_OFFLOAD: &str = "feature-ipv6-csum-offload";
    /// Backend: rx data can begin behind a headroom, for XDP programs of the frontend (Linux).
    pub const FEATURE_XDP_HEADROOM: &str = "feature-xdp-headroom";
    /// Frontend: bytes of headroom that it wants (Linux: 0 or 256).
    pub const XDP_HEADROOM: &str = "xdp-headroom";
    /// Backend: a multicast filter can be asked for while connected.
    pub const FEATURE_DYNAMIC_MULTICAST_CONTROL: &str = "feature-dynamic-multicast-control";
    /// Frontend: "1" turns its multicast filter on.
    pub const REQUEST_MULTICAST_CONTROL: &str = "request-multicast-control";
    /// Frontend: grant reference of the control ring.
    pub const CTRL_RING_REF: &str = "ctrl-ring-ref";
    /// Frontend: the control ring's port.
    pub const EVENT_CHANNEL_CTRL: &str = "event-channel-ctrl";
    /// Backend: multicast filters work.
    pub const FEATURE_MULTICAST_CONTROL: &str = "feature-multicast-control";
    /// Backend: the control ring works.
    pub const FEATURE_CTRL_RING: &str = "feature-ctrl-ring";
    /// Backend: most queues.
    pub const MULTI_QUEUE_MAX_QUEUES: &str = "multi-queue-max-queues";
    /// Frontend: number of queues.
    pub const MULTI_QUEUE_NUM_QUEUES: &str = "multi-queue-num-queues";
    /// Both: the MAC address, as aa:bb:cc:dd:ee:ff.
    pub const MAC: &str = "mac";
    /// Both: the device's number.
    pub const HANDLE: &str = "handle";
}

/// Bytes of a slot of the tx ring.
pub const TX_ENTRY_SIZE: usize = size_of::<NetifTxRequest>();
/// Bytes of a slot of the rx ring.
pub const RX_ENTRY_SIZE: usize = size_of::<NetifRxRequest>();
/// Bytes of a slot of the control ring.
pub const CTRL_ENTRY_SIZE: usize = size_of::<XenNetifCtrlRequest>();

abi! { "io/netif.h";
    /// A buffer to send.
    pub struct NetifTxRequest("struct netif_tx_request") [12] {
        gref: u32 = 0,
        /// In bytes within the page.
        offset: u16 = 4,
        /// `NETTXF_*`.
        flags: u16 = 6,
        /// Echoed in the response.
        id: u16 = 8,
        /// In bytes: in a packet's first slot of the whole packet, else of this slot.
        size: u16 = 10,
    }
    /// Ends a tx request.
    pub struct NetifTxResponse("struct netif_tx_response") [4] {
        id: u16 = 0,
        /// `NETIF_RSP_*`.
        status: i16 = 2,
    }
    /// A buffer to receive into.
    pub struct NetifRxRequest("struct netif_rx_request") [8] {
        id: u16 = 0,
        _pad("pad"): u16 = 2,
        gref: u32 = 4,
    }
    /// A filled buffer.
    pub struct NetifRxResponse("struct netif_rx_response") [8] {
        id: u16 = 0,
        /// In bytes within the page.
        offset: u16 = 2,
        /// `NETRXF_*`.
        flags: u16 = 4,
        /// Bytes in this slot, or negative `NETIF_RSP_*`.
        status: i16 = 6,
    }
    /// A slot that says more about a packet; see [`Extra`] for its meaning.
    pub struct NetifExtraInfo("struct netif_extra_info") [8] {
        /// `XEN_NETIF_EXTRA_TYPE_*`.
        r#type("type"): u8 = 0,
        /// `XEN_NETIF_EXTRA_FLAG_MORE`.
        flags: u8 = 1,
        /// By type.
        u: [u8; 6] = 2,
    }
    /// A request on the control ring.
    pub struct XenNetifCtrlRequest("struct xen_netif_ctrl_request") [16] {
        id: u16 = 0,
        /// `XEN_NETIF_CTRL_TYPE_*`.
        r#type("type"): u16 = 2,
        data: [u32; 3] = 4,
    }
    /// A response on the control ring.
    pub struct XenNetifCtrlResponse("struct xen_netif_ctrl_response") [12] {
        id: u16 = 0,
        r#type("type"): u16 = 2,
        /// `XEN_NETIF_CTRL_STATUS_*`.
        status: u32 = 4,
        data: u32 = 8,
    }
    /// An entry of a page that maps or unmaps grants by the control ring.
    pub struct XenNetifGref("struct xen_netif_gref") [8] {
        gref("ref"): u32 = 0,
        flags: u16 = 4,
        /// Out.
        status: u16 = 6,
    }
}

/// The meaning of a [`NetifExtraInfo`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// The packet is to be segmented.
    Gso {
        /// Bytes of payload in each segment.
        size: u16,
        /// `XEN_NETIF_GSO_TYPE_*`.
        gso_type: u8,
        /// Zero.
        features: u16,
    },
    /// Adds a multicast address to the filter.
    McastAdd([u8; 6]),
    /// Removes a multicast address from the filter.
    McastDel([u8; 6]),
    /// Data of every slot of the packet begins behind so many bytes (Linux).
    Xdp {
        /// Bytes.
        headroom: u16,
    },
    /// The packet's hash.
    Hash {
        /// A bit number of `XEN_NETIF_CTRL_HASH_TYPE_*`.
        hash_type: u8,
        /// `XEN_NETIF_CTRL_HASH_ALGORITHM_*`.
        algorithm: u8,
        /// Little endian.
        value: u32,
    },
}

impl NetifExtraInfo {
    /// The slot for `extra`; `more` if another extra-info slot follows.
    pub fn new(extra: Extra, more: bool) -> Self {
        let (r#type, u) = match extra {
            Extra::Gso { size, gso_type, features } => {
                let ([s0, s1], [f0, f1]) = (size.to_le_bytes(), features.to_le_bytes());
                (XEN_NETIF_EXTRA_TYPE_GSO, [s0, s1, gso_type, 0, f0, f1])
            }
            Extra::McastAdd(addr) => (XEN_NETIF_EXTRA_TYPE_MCAST_ADD, addr),
            Extra::McastDel(addr) => (XEN_NETIF_EXTRA_TYPE_MCAST_DEL, addr),
            Extra::Xdp { headroom } => {
                let [h0, h1] = headroom.to_le_bytes();
                (XEN_NETIF_EXTRA_TYPE_XDP, [h0, h1, 0, 0, 0, 0])
            }
            Extra::Hash { hash_type, algorithm, value } => {
                let [v0, v1, v2, v3] = value.to_le_bytes();
                (XEN_NETIF_EXTRA_TYPE_HASH, [hash_type, algorithm, v0, v1, v2, v3])
            }
        };
        Self { r#type, flags: if more { XEN_NETIF_EXTRA_FLAG_MORE } else { 0 }, u }
    }

    /// Whether another extra-info slot follows.
    pub const fn more(&self) -> bool {
        self.flags & XEN_NETIF_EXTRA_FLAG_MORE != 0
    }

    /// The meaning, or `None` for a type that the header doesn't define.
    pub const fn extra(&self) -> Option<Extra> {
        let u = self.u;
        match self.r#type {
            XEN_NETIF_EXTRA_TYPE_GSO => Some(Extra::Gso {
                size: u16::from_le_bytes([u[0], u[1]]),
                gso_type: u[2],
                features: u16::from_le_bytes([u[4], u[5]]),
            }),
            XEN_NETIF_EXTRA_TYPE_MCAST_ADD => Some(Extra::McastAdd(u)),
            XEN_NETIF_EXTRA_TYPE_MCAST_DEL => Some(Extra::McastDel(u)),
            XEN_NETIF_EXTRA_TYPE_XDP => Some(Extra::Xdp { headroom: u16::from_le_bytes([u[0], u[1]]) }),
            XEN_NETIF_EXTRA_TYPE_HASH => Some(Extra::Hash {
                hash_type: u[0],
                algorithm: u[1],
                value: u32::from_le_bytes([u[2], u[3], u[4], u[5]]),
            }),
            _ => None,
        }
    }
}

/// A private copy of a tx slot, which is a request or, after one that says so, extra info.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxSlot(pub [u8; TX_ENTRY_SIZE]);

impl TxSlot {
    /// The slot read as a request.
    pub fn request(&self) -> NetifTxRequest {
        zerocopy::transmute!(self.0)
    }

    /// The slot read as extra info.
    pub fn extra_info(&self) -> NetifExtraInfo {
        NetifExtraInfo::read_from_prefix(&self.0).map(|(extra, _)| extra).unwrap_or_default()
    }
}

impl From<NetifTxRequest> for TxSlot {
    fn from(request: NetifTxRequest) -> Self {
        Self(zerocopy::transmute!(request))
    }
}

impl From<NetifExtraInfo> for TxSlot {
    fn from(extra: NetifExtraInfo) -> Self {
        let mut slot = Self::default();
        slot.0[..size_of::<NetifExtraInfo>()].copy_from_slice(extra.as_bytes());
        slot
    }
}

/// A private copy of an rx slot of the backend's side, which is a response or, after one that says so, extra info.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RxSlot(pub [u8; RX_ENTRY_SIZE]);

impl RxSlot {
    /// The slot read as a response.
    pub fn response(&self) -> NetifRxResponse {
        zerocopy::transmute!(self.0)
    }

    /// The slot read as extra info.
    pub fn extra_info(&self) -> NetifExtraInfo {
        zerocopy::transmute!(self.0)
    }
}

impl From<NetifRxResponse> for RxSlot {
    fn from(response: NetifRxResponse) -> Self {
        Self(zerocopy::transmute!(response))
    }
}

impl From<NetifExtraInfo> for RxSlot {
    fn from(extra: NetifExtraInfo) -> Self {
        Self(zerocopy::transmute!(extra))
    }
}

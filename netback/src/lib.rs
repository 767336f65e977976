//! netback: the network backend, one process domain for each NIC.
//!
//! ```text
//!  frontend ──tx ring──► queue::tx ──► switch ──► queue::rx ──rx ring──► another frontend
//!                                        │ ▲
//!                                        ▼ │
//!                                 TAP ──► bridge or routes ──► uplink
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`slots`] | netif's wire format: slots to packets and back, every check |
//! | [`headers`], [`offload`], [`segment`], [`hash`] | packets' headers; checksums and segmentation against Linux's virtio_net_hdr; queues by hash |
//! | [`queue`] | the rings with their journals, and nothing else |
//! | [`switch`] | forwarding, filters, what the domain answers itself |
//! | [`spool`] | packets in memory that outlives the incarnation |
//! | [`worker`], [`uplink`] | the threads: one for each queue, one for the uplink |
//! | [`connection`] | what a connected vif holds, and how a new incarnation takes it over |
//! | [`backend`], [`nodes`] | the driver behind `domain_kit::xenbus`; the nodes of a vif |
//! | [`control`], [`capture`] | gRPC for dom0; copies of packets for `bh capture` |
//! | [`names`], [`qubes`] | threads beside: DNS names in rules; rules at Qubes' paths |
//! | [`vhost`] | virtqueues of QEMU guests in the place of Xen's rings |
//! | [`fault`] | `--fault`, for tests of poison packets |
//! | [`tap`], [`netlink`], [`nft`], [`forward`] | the kernel's side, inside this domain's own network namespace |

pub mod backend;
pub mod capture;
pub mod connection;
pub mod control;
pub mod fault;
pub mod forward;
pub mod hash;
pub mod headers;
pub mod names;
pub mod netlink;
pub mod nft;
pub mod nodes;
pub mod offload;
pub mod qubes;
pub mod queue;
pub mod segment;
pub mod slots;
pub mod spool;
pub mod stats;
pub mod switch;
mod sys;
pub mod tap;
pub mod uplink;
pub mod vhost;
pub mod worker;

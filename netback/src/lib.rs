//! netback: the network backend, one process domain for each NIC.
//!
//! ```text
//!  frontend ──tx ring──► queue::tx ──► TAP ──► bridge or routes ──► uplink
//!           ◄─rx ring─── queue::rx ◄── TAP ◄──
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`slots`] | netif's wire format: slots to packets and back, every check |
//! | [`offload`] | checksums and segmentation against Linux's virtio_net_hdr |
//! | [`queue`] | the rings with their journals, and nothing else |
//! | [`worker`] | the thread that runs a vif's queues |
//! | [`connection`] | what a connected vif holds, and how a new incarnation takes it over |
//! | [`backend`], [`nodes`] | the driver behind `domain_kit::xenbus`; the nodes of a vif |
//! | [`fault`] | `--fault`, for tests of poison packets |
//! | [`tap`], [`netlink`], [`forward`] | the kernel's side, inside this domain's own network namespace |

pub mod backend;
pub mod connection;
pub mod fault;
pub mod forward;
pub mod netlink;
pub mod nodes;
pub mod offload;
pub mod queue;
pub mod slots;
pub mod stats;
mod sys;
pub mod tap;
pub mod worker;

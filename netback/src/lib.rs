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
//! | [`tap`], [`netlink`], [`forward`] | the kernel's side, inside this domain's own network namespace |

pub mod forward;
pub mod netlink;
pub mod offload;
pub mod queue;
pub mod slots;
pub mod stats;
mod sys;
pub mod tap;

//! What the machine can do without us: the same work on bare kernel primitives.

pub mod bridge;
pub mod echo;
pub mod eventfd;
pub mod helper;
pub mod memory;
pub mod sink;
pub mod storage_daemon;
pub mod store_echo;
pub mod store_rings;
pub mod uring;
pub mod veth;

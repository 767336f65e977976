//! The disk: a raw file or a block device, fenced against its dead owners.

pub mod attachment;
pub mod chain;
pub mod commit;
pub mod layer;
pub mod luks;
pub mod nbd;
pub mod pool;
pub mod qcow2;
pub mod source;
pub mod uring;

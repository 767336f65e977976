//! The disk: a raw file or a block device, fenced against its dead owners.

pub mod attachment;
pub mod source;
pub mod uring;
pub mod layer;
pub mod qcow2;

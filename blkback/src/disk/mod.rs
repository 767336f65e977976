//! The disk: a raw file or a block device, fenced against its dead owners.

pub mod source;
pub mod uring;

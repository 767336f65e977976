//! gRPC schemas of Bulkhead's control plane and the code generated from them.
//!
//! The schemas in `proto/bulkhead/*.proto` are the documentation: each call says whether it is idempotent
//! and what its errors mean. Data never travels by gRPC.
#![allow(missing_docs, reason = "generated code; the schemas carry the documentation")]

/// Channels over Unix sockets.
#[cfg(feature = "client")]
pub mod unix;

/// hv-core's control API, for dom0 only.
pub mod hvcore {
    tonic::include_proto!("bulkhead.hvcore.v1");
}
/// What every service domain answers.
pub mod service {
    tonic::include_proto!("bulkhead.service.v1");
}
/// What blkback answers beside that.
pub mod blkback {
    tonic::include_proto!("bulkhead.blkback.v1");
}
/// What qemu-bridge answers beside that.
pub mod qemu {
    tonic::include_proto!("bulkhead.qemu.v1");
}
/// xenstored's view for the toolstack.
pub mod store {
    tonic::include_proto!("bulkhead.store.v1");
}
/// dom0-supervisor's API.
pub mod toolstack {
    tonic::include_proto!("bulkhead.toolstack.v1");

    /// Bytes of one message of captured packets at most: netback sends a mebibyte and what is left of its last packet.
    pub const MAX_CAPTURED: usize = 4 << 20;
}
/// The encoded descriptors of all schemas, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bulkhead.bin"));

//! The backend's end of vhost-user: virtqueues of a QEMU guest (or another VMM's) in the place of Xen's rings.
//!
//! | module | what |
//! |---|---|
//! | [`memory`] | the guest's memory, as the frontend's table describes it |
//! | [`queue`] | a split virtqueue (virtio 1.2, 2.7) from the device's end |
//! | [`inflight`] | which requests are under way, in memory that outlives the process (vhost-user's INFLIGHT_SHMFD) |
//! | [`log`] | which pages were written here, for a VMM that moves the guest |
//! | [`mod@line`] | the line to the frontend: taken up where a predecessor left it, dialled again whenever the frontend hung up |
//! | [`conversation`] | each message answered and taken once, whenever this process is killed; its model test is beside it |
//! | [`record`] | what was said so far, as far as a next incarnation has to know it |
//! | [`wire`] | the socket and the descriptors, kept in hv-core's fd store |
//! | [`session`] | messages in, rings started and stopped |
//!
//! The frontend listens, the backend dials in, once: the connection outlives the backend, and a frontend never hears that the backend was
//! killed. It waits some milliseconds longer for an answer, that is all. Frontends that could not reconnect need not. All of the guest's memory is mapped, there are no grants: that is what `whole-memory` in a domain file allows.
//!
//! What the guest and its VMM say is an allegation: indices, descriptors and addresses are checked on private copies, memory must
//! be sealed against shrinking, and an event descriptor is looked at before it is written, because the other end may have made it one
//! that blocks. The message layer is the `vhost` crate's. Virtqueues are our own: all memory shared with others goes
//! through [`crate::mem::SharedMem`], which copies between two mappings at once, and has no second kind of mapping beside it.

pub mod conversation;
#[cfg(test)]
mod conversation_model;
#[cfg(test)]
mod fake;
pub mod inflight;
pub mod line;
pub mod log;
pub mod memory;
pub mod queue;
pub mod record;
pub mod session;
pub mod wire;

/// VIRTIO_RING_F_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_RING_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VHOST_F_LOG_ALL.
pub const F_LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;
/// Most descriptors of a queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;

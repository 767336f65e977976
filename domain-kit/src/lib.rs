//! What every domain's process links.
//!
//! | module | what |
//! |---|---|
//! | [`domain`] | joining: who am I, how did my predecessor die, logging, the panic rule |
//! | [`hypercall`] | the typed client of the hypercall socket (fd 3) |
//! | [`mem`] | memory shared with another domain, touched only by atomics and copies |
//! | [`evtchn`] | event-channel ports |
//! | [`grants`] | regions, grant maps, grant copies |
//! | [`fdstore`] | memory that outlives an incarnation |
//! | [`kept`] | a small document in such memory |
//! | [`ring`] | Xen's shared rings, both ends |
//! | [`journal`] | the ring journal: rings that survive SIGKILL |
//! | [`poll`] | how long to look for work before sleeping |
//! | [`model`] | for model tests: code that is killed at any of its steps |
//! | [`xenbus`] | how the two ends of a device find each other and agree on their states |
//! | [`control`] | gRPC health, statistics and drain on fd 4 |
//! | [`xs`] | the xenstore client |
//! | [`guest`] | what a guest without a kernel does with its nodes |
//! | [`saved`] | the file of a saved guest |
//! | `vhost` (a feature) | the backend's end of vhost-user |
//!
//! `unsafe` lives in [`mem`] (mapped memory) and [`os`] (inherited descriptors) alone.

pub mod control;
pub mod domain;
pub mod evtchn;
pub mod fdstore;
pub mod grants;
pub mod guest;
pub mod hypercall;
pub mod journal;
pub mod kept;
pub mod mem;
pub mod model;
pub mod os;
pub mod poll;
pub mod ring;
pub mod saved;
#[cfg(feature = "vhost")]
pub mod vhost;
pub mod xenbus;
pub mod xs;

pub use domain::Domain;
pub use hypercall::{HvError, Hypercall};

/// A short name of an approved resource for what is called `name` in the configuration: `BASE-` and 16 digits (FNV-1a). Toolstack and
/// service make it of the same name, so that a command line and resources that are changed one after the other are never mistaken
/// for each other.
pub fn resource_of(base: &str, name: &str) -> String {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{base}-{hash:016x}")
}

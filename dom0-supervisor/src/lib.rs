//! The toolstack: dom0 as a domain that can be killed at any point of any operation.
//!
//! ```text
//!   bh ──gRPC──► api ──► manager ──► ops (do/undo steps) ──► hv    (hv-core, fd 5)
//!                          ▲  │                         └──► store (xenstore, own ring)
//!            reconcile ────┘  └──► state (private record on disk)
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`config`] | host file and domain files |
//! | [`state`] | the private record: desired state and operations under way |
//! | [`specs`], [`specs_qemu`] | from configuration to hv-core's domain specifications |
//! | [`xs_layout`] | from the record to xenstore's nodes |
//! | [`ops`] | operations of several steps that survive a kill |
//! | [`reconcile`] | desired against actual; `services` the same for services |
//! | [`view`] | what is shown |
//! | [`hv`], [`store`] | what dom0 needs of the others; [`hv_grpc`] and [`store::RingStore`] are the real ones |
//! | [`api`] | gRPC for `bh` |
//! | [`console`] | the console domain (`console-backend`) |

pub mod api;
pub mod config;
pub mod console;
pub mod daemon;
pub mod events;
pub mod hv;
pub mod hv_grpc;
pub mod manager;
pub mod ops;
pub mod reconcile;
pub(crate) mod services;
pub mod specs;
pub mod specs_qemu;
pub mod state;
pub mod store;
#[cfg(test)]
mod testing;
pub mod view;
pub mod xs_layout;

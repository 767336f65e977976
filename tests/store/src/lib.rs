//! xenstored as the service domain that it is, under hv-core, with clients on sockets and rings that live on while it is killed.
//!
//! ```text
//!  actors (one thread) ──sockets──────────────► xenstored ◄── killed again and again
//!        │                                        ▲ rings
//!        └──control sockets──► relay domains ─────┘
//! ```
//!
//! Every actor has a subtree of its own and is the only one that writes there, so what each of its requests must be answered with, and
//! which events everybody's watches on that subtree must bring, in which order, is known when the request is sent ([`model`]). Beside
//! it all increment one counter in transactions, where what is known is that no number is missing and none is there twice.
//! A connection that ends, a reply that is missing, doubled or another, an event that is missing, doubled or out of its watch's order,
//! are failures.
//!
//! Not asserted: how events of different watches, or events and replies, interleave on a connection (`xenstored/tests/model.rs` does
//! that, byte by byte), and the order in which DIRECTORY lists children.

pub mod actor;
pub mod ledger;
pub mod model;
pub mod run;
pub mod world;

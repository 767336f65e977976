//! The block backend: one process domain owns one disk and serves it to its guests by blkif rings.
//!
//! | module | what |
//! |---|---|
//! | [`request`] | from a ring slot's bytes to a checked request |
//! | [`engine`] | one ring's data path, every step journalled |
//! | [`disk`] | the attachment to storage, and what is behind it: opened afresh, fenced, driven by io_uring |
//! | [`arena`] | which part of a ring's buffers a request has |
//! | [`pages`] | the guest's pages by grants |
//! | [`device`] | a connected device: ring, journal, thread |
//! | [`control`] | gRPC about the disk |
//! | [`driver`] | the xenbus driver, statistics, drain |
//! | [`limit`] | requests and bytes per second |
//! | [`stats`] | counters |
//! | [`vhost`] | virtqueues of QEMU guests in the place of Xen's rings |
//! | [`fault`] | `--fault`, for tests of poison requests |

pub mod arena;
pub mod control;
pub mod device;
pub mod disk;
pub mod driver;
pub mod engine;
pub mod fault;
pub mod limit;
pub mod pages;
pub mod request;
pub mod stats;
pub mod vhost;

//! `cargo xtask bench`: what Bulkhead reaches, beside what the machine can do, measured in the same run turn by turn.
//!
//! - [`stats`], [`rounds`]: medians, percentiles, and rounds in which the contestants take turns
//! - [`report`]: the lines of the table and of the JSON report
//! - [`svg`]: the same as a drawing
//! - [`peers`]: the machine's limits: bare eventfds, sockets, io_uring, veth
//! - [`disk`]: one load for every way to a disk
//! - [`cases`]: one module for each name on the command line
//! - [`guest`]: what runs inside a process domain (`bench-guest`)
//! - [`wire`]: how the driver talks to it: lines of JSON over the domain's descriptor 4

pub mod cases;
pub mod disk;
pub mod dom0;
pub mod endpoint;
pub mod guest;
pub mod peers;
pub mod report;
pub mod rounds;
pub mod stats;
pub mod svg;
pub mod wire;

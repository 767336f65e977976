//! Verified disk and network load shared by guests, the demo and the tests.
//!
//! - [`disk`]: what each block must hold, and who may say so ([`disk::Tracker`])
//! - [`load`]: threads that write, read back, verify and flush a [`load::BlockDevice`]
//! - [`stream`]: a byte stream over TCP, both ways, every byte compared
//! - [`ping`]: ICMP echo at a fixed rate
//! - [`report`]: lines for the outside; [`work`]: the running loads of a guest, their progress lines and their end
//! - [`stall`]: the longest pause that the load saw, requests still waiting included
//!
//! Everything counts in shared atomics and carries on after an error, so that a reporter can print
//! totals at any time.

pub mod disk;
pub mod load;
pub mod pattern;
pub mod ping;
pub mod report;
pub mod stall;
pub mod stream;
pub mod work;

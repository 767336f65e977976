//! blkfront and netfront in safe Rust for process guests, tests and benches.
//!
//! Frontends never trust their backend: every index, id, length and offset that it writes is checked, and shared
//! bytes are copied once before they are judged.

pub mod blkfront;
mod connect;
pub mod console;
pub mod netfront;

pub use connect::ConnectError;

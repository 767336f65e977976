//! The block backend: one process domain owns one disk and serves it to its guests by blkif rings.
//!
//! | module | what |
//! |---|---|
//! | [`request`] | from a ring slot's bytes to a checked request |
//! | [`engine`] | one ring's data path, every step journalled |
//! | [`stats`] | counters |

pub mod engine;
pub mod request;
pub mod stats;

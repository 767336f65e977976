//! blkfront and netfront in safe Rust for process guests, tests and benches

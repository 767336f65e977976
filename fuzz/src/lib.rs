//! What libFuzzer's targets run: the very bodies of the stable fuzz tests (`tests/fuzz.rs` of xenstored and blkback), with their corpus
//! (`tests/corpus/<target>` there). `cargo xtask fuzz` builds and runs them.

#[path = "../../xenstored/tests/fuzz/targets.rs"]
pub mod targets;

#[path = "../../blkback/tests/fuzz/targets.rs"]
pub mod block;

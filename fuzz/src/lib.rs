//! What libFuzzer's targets run: the very bodies of the stable fuzz tests (`xenstored/tests/fuzz.rs`), with their corpus
//! (`xenstored/tests/corpus/<target>`). `cargo xtask fuzz` builds and runs them.

#[path = "../../xenstored/tests/fuzz/targets.rs"]
pub mod targets;

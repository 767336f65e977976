//! Whole-system tests with the real binaries, and the harness that they share with the demo, the benches and the soak runs.
//!
//! - [`outside`]: a network namespace that plays the outside world (and in which hv-core is started, so that no interface of the
//!   host is touched)
//! - [`system`]: hv-core with everything under it in a directory of its own, driven through `bh` as a user would
//! - [`progress`]: what a guest says of its load on its console
//! - [`kills`]: who is killed when, and what pause the guest saw
//! - [`load_run`]: a guest under load while everything is killed
//! - [`outcome`]: what that found, judged
//! - [`inspect`], [`fds`]: what a process has and can reach, as the host's root sees it
//! - [`probe`]: a domain that obeys orders

pub mod fds;
pub mod inspect;
pub mod kills;
pub mod load_run;
pub mod outcome;
pub mod outside;
pub mod probe;
pub mod progress;
pub mod system;

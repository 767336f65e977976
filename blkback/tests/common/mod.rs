//! What the engine's tests share: guest pages without grants, and a rig of real engines that can be killed.
#![allow(dead_code, reason = "each test program uses a part")]

mod pages;
pub mod rig;
pub mod world;

pub use pages::PlainPages;

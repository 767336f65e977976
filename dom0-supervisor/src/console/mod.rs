//! The console domain: one small process for the consoles of all guests.
//!
//! ```text
//!   guest ──ring──► pump ──► history (memfd in the fd store) ──► attached clients
//!         ◄──ring── input ◄────────────────────────────────────
//! ```
//! It learns of guests from hv-core (VIRQ_DOM_EXC) alone. History and progress lie in shared memory that outlives the process:
//! a byte counts as taken when the total says so, and the ring's index follows from the total, so a kill loses and doubles
//! nothing ([`ring`] has the argument and the test).

mod backend;
pub mod ring;
mod serve;
mod table;

pub use backend::run;

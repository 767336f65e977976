//! The Xen public ABI as Rust types: what a guest, a frontend or a backend puts in registers, in shared
//! pages and on the xenstore wire. `no_std`, no unsafe code, x86_64 layouts unless a name says `32`.
//!
//! One module stands for one header of Xen's `xen/include/public`. A struct derives zerocopy's traits, so it
//! is *copied* out of guest memory, judged, and copied back; nothing here borrows shared memory. Sizes and
//! offsets are asserted at compile time, and `tests/c_layout.rs` compares them and all constants with the C
//! headers where Debian's `libxen-dev` is installed.
//!
//! Constants carry Xen's names in upper case (`EVTCHNOP_bind_virq` is [`event_channel::EVTCHNOP_BIND_VIRQ`]),
//! structs in camel case (`struct evtchn_bind_virq` is [`event_channel::EvtchnBindVirq`]).
#![no_std]
#![forbid(unsafe_code)]

#[macro_use]
mod macros;

pub mod console;
pub mod cpuid;
pub mod elfnote;
pub mod errno;
pub mod event_channel;
pub mod features;
pub mod grant_table;
pub mod hvm;
pub mod io;
pub mod memory;
pub mod physdev;
pub mod sched;
pub mod start_info;
pub mod vcpu;
pub mod version;
pub mod xen;
pub mod xenbus;
pub mod xs_wire;

pub use xen::{Domid, EvtchnPort, GrantRef, PAGE_SHIFT, PAGE_SIZE};

/// How C lays out the struct that a type mirrors; the table that `tests/c_layout.rs` checks.
pub trait CLayout {
    /// The type's name in C, such as `struct vcpu_info`; empty if the headers name no such type.
    const C_NAME: &'static str;
    /// The header that defines it, below `xen/`.
    const HEADER: &'static str;
    /// Each field: its C name (`_` first: padding that C does not name), offset and size in bytes.
    const FIELDS: &'static [(&'static str, usize, usize)];
}

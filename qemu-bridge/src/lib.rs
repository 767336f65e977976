//! qemu-bridge: one QEMU guest's domain.
//!
//! QEMU itself is the process of another domain, which hv-core starts in a sandbox of its own. This process stands for the guest, as hv-vcpu
//! does for a PVH guest: it has the guest's domid, xenstore ring and console ring, is the frontend of its disks and NICs, and says
//! how the guest ended. It can be killed at any time; QEMU and the guest go on.
//!
//! ```text
//!              xenstore, console ring, Shutdown            vhost-user sockets
//!   dom0 ◄──────────────────────► qemu-bridge ──────────┐  (QEMU listens, backends dial in)
//!                                     │ QMP, serial     ▼        ▲
//!                                     └──────────────► QEMU ◄────┴──── blkback, netback
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`qmp`] | the monitor's protocol: deadlines, bounds, garbage |
//! | [`machine`] | the guest as QEMU has it: states, ends |
//! | [`devices`] | xenbus frontends whose data path is vhost-user: plugged and unplugged as xenstore says |
//! | [`save`] | the guest into a file, and on from one |
//! | [`usb`] | USB devices and disks that QEMU serves itself, plugged and unplugged as xenstore says |
//! | [`resize`] | memory and processors, the same way |
//! | [`serial`] | the guest's serial line on the domain's console |
//! | [`display`] | VNC sessions and screenshots |
//! | [`rfb`] | VNC's protocol, as far as a picture needs it |
//! | [`control`] | gRPC: pause, resume, reset, save, screenshot, VNC |

pub mod control;
pub mod devices;
pub mod display;
pub mod machine;
pub mod qmp;
pub mod resize;
pub mod rfb;
pub mod save;
pub mod serial;
pub mod usb;

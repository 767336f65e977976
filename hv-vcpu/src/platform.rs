//! What the hypercall handlers need from KVM, as a trait, so that they can be tested without it.

use crate::errno::Errno;
use std::os::fd::BorrowedFd;

/// A per-vCPU attribute of KVM's Xen support (Documentation/virt/kvm/api.rst 4.130).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuAttr {
    /// Guest-physical address of `struct vcpu_info`.
    VcpuInfo(u64),
    /// The same by address in this process.
    VcpuInfoHva(u64),
    /// Guest-physical address of a secondary `struct vcpu_time_info`; all ones for none.
    TimeInfo(u64),
    /// Guest-physical address of `struct vcpu_runstate_info`; all ones for none.
    Runstate(u64),
    /// Xen's id of the vCPU.
    VcpuId(u32),
    /// Port of `VIRQ_TIMER` (0: none) and when it fires (system time in ns, 0: not).
    Timer {
        /// The port.
        port: u32,
        /// System time in nanoseconds.
        expires_ns: u64,
    },
    /// The vector of upcalls on this vCPU, delivered through its local APIC.
    UpcallVector(u8),
}

/// Where a vCPU's time went, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Runstate {
    /// `RUNSTATE_*`.
    pub state: u32,
    /// System time when the state was entered.
    pub entry_time: u64,
    /// Time by `RUNSTATE_*`.
    pub time: [u64; 4],
}

/// KVM, as the hypercall handlers see it. `caller` is the vCPU whose thread makes the call.
pub trait Platform: Send + Sync {
    /// What the guest sends on `port` is written to `tx` by the kernel.
    fn route_out(&self, port: u32, tx: BorrowedFd<'_>) -> Result<(), Errno>;
    /// What the guest sends on `port` is delivered on the same port to `vcpu` by the kernel.
    fn route_ipi(&self, port: u32, vcpu: u32) -> Result<(), Errno>;
    /// Undoes `route_out` or `route_ipi`.
    fn unroute_out(&self, port: u32);
    /// A write to `rx` raises `port` on `vcpu`.
    fn route_in(&self, port: u32, vcpu: u32, rx: BorrowedFd<'_>) -> Result<(), Errno>;
    /// Changes the vCPU of a port that was routed by `route_in`.
    fn move_in(&self, port: u32, vcpu: u32) -> Result<(), Errno>;
    /// Undoes `route_in`.
    fn unroute_in(&self, port: u32, rx: BorrowedFd<'_>);
    /// Raises `port` on `vcpu` now.
    fn raise(&self, port: u32, vcpu: u32) -> Result<(), Errno>;
    /// Makes `vcpu` look at its `evtchn_upcall_pending` when that was set by us.
    fn kick_upcall(&self, vcpu: u32);
    /// Sets the vector of upcalls for all vCPUs; 0 for none.
    fn set_callback_vector(&self, vector: u8) -> Result<(), Errno>;
    /// Whether runstate areas carry the flag of an update in progress.
    fn set_runstate_update_flag(&self, on: bool) -> Result<(), Errno>;
    /// Sets an attribute of `vcpu`.
    fn set_vcpu_attr(&self, caller: u32, vcpu: u32, attr: VcpuAttr) -> Result<(), Errno>;
    /// Reads the runstate of `vcpu`.
    fn runstate(&self, caller: u32, vcpu: u32) -> Result<Runstate, Errno>;
    /// Whether `vcpu` has run guest code.
    fn is_up(&self, vcpu: u32) -> bool;
    /// Shows the page at address `hva` of this process at guest frame `gfn`, which is not RAM.
    fn add_page(&self, gfn: u64, hva: u64) -> Result<(), Errno>;
    /// Undoes `add_page`.
    fn remove_page(&self, gfn: u64);
    /// The guest says that shared_info is at `gfn` (only needed where KVM can't take it by address).
    fn shared_info_at(&self, gfn: u64) -> Result<(), Errno>;
}

/// The vCPU that makes a hypercall.
pub trait GuestCpu {
    /// Its number.
    fn id(&self) -> u32;
    /// The guest-physical address behind a linear one, by the vCPU's page tables; `None` if not mapped.
    fn translate(&self, linear: u64) -> Option<u64>;
}

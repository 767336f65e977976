//! The ioctls of KVM's Xen support and others that `kvm-ioctls` lacks, as safe functions. One of the modules that
//! hold `unsafe`. Numbers: include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h of Linux.
#![expect(unsafe_code, reason = "makes ioctls and reads unions that the kernel filled")]

use crate::hypercall::Call;
use crate::platform::{Runstate, VcpuAttr};
use kvm_bindings::*;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

/// `kvm_irq_routing_xen_evtchn::priority` of the 2-level ABI.
const PRIO_2LEVEL: u32 = u32::MAX;
/// `EVTCHNSTAT_interdomain`, `EVTCHNSTAT_ipi`.
const INTERDOMAIN: u32 = xen_abi::event_channel::EVTCHNSTAT_INTERDOMAIN;
const IPI: u32 = xen_abi::event_channel::EVTCHNSTAT_IPI;

mod raw {
    use kvm_bindings::*;
    const KVMIO: u8 = 0xae;
    nix::ioctl_write_ptr!(xen_hvm_config, KVMIO, 0x7a, kvm_xen_hvm_config);
    nix::ioctl_write_ptr!(xen_hvm_set_attr, KVMIO, 0xc9, kvm_xen_hvm_attr);
    nix::ioctl_readwrite!(xen_vcpu_get_attr, KVMIO, 0xca, kvm_xen_vcpu_attr);
    nix::ioctl_write_ptr!(xen_vcpu_set_attr, KVMIO, 0xcb, kvm_xen_vcpu_attr);
    nix::ioctl_write_ptr!(xen_evtchn_send, KVMIO, 0xd0, kvm_irq_routing_xen_evtchn);
    nix::ioctl_write_ptr!(irqfd, KVMIO, 0x76, kvm_irqfd);
    nix::ioctl_write_ptr!(set_user_memory_region, KVMIO, 0x46, kvm_userspace_memory_region);
    nix::ioctl_write_ptr!(set_gsi_routing, KVMIO, 0x6a, kvm_irq_routing);
}

/// A handle of /dev/kvm that was opened by another.
pub fn kvm_from_fd(fd: OwnedFd) -> Kvm {
    // SAFETY: the fd is owned and handed over; that it is /dev/kvm is checked by its first ioctls, which fail else.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// Another descriptor of the same vCPU, for ioctls by the thread that owns the `VcpuFd`.
pub fn vcpu_handle(vcpu: &VcpuFd) -> std::io::Result<OwnedFd> {
    // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
    unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }.try_clone_to_owned()
}

/// `KVM_XEN_HVM_CONFIG`.
pub fn xen_hvm_config(vm: &VmFd, flags: u32, msr: u32) -> Result<(), Errno> {
    let config = kvm_xen_hvm_config { flags, msr, ..Default::default() };
    // SAFETY: the kernel reads one struct of this type.
    unsafe { raw::xen_hvm_config(vm.as_raw_fd(), &config) }.map(drop)
}

fn set_attr(vm: &VmFd, kind: u32, fill: impl FnOnce(&mut kvm_xen_hvm_attr)) -> Result<(), Errno> {
    let mut attr = kvm_xen_hvm_attr { type_: kind as u16, ..Default::default() };
    fill(&mut attr);
    // SAFETY: the kernel reads one struct of this type, all of whose bytes were initialised.
    unsafe { raw::xen_hvm_set_attr(vm.as_raw_fd(), &attr) }.map(drop)
}

/// `KVM_XEN_ATTR_TYPE_LONG_MODE`: 64-bit layout of shared_info.
pub fn set_long_mode(vm: &VmFd) -> Result<(), Errno> {
    set_attr(vm, KVM_XEN_ATTR_TYPE_LONG_MODE, |a| a.u.long_mode = 1)
}

/// `KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA`.
pub fn set_shared_info_hva(vm: &VmFd, hva: u64) -> Result<(), Errno> {
    set_attr(vm, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, |a| a.u.shared_info.hva = hva)
}

/// `KVM_XEN_ATTR_TYPE_SHARED_INFO`.
pub fn set_shared_info_gfn(vm: &VmFd, gfn: u64) -> Result<(), Errno> {
    set_attr(vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, |a| a.u.shared_info.gfn = gfn)
}

/// `KVM_XEN_ATTR_TYPE_UPCALL_VECTOR`; 0 for none.
pub fn set_upcall_vector(vm: &VmFd, vector: u8) -> Result<(), Errno> {
    set_attr(vm, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, |a| a.u.vector = vector)
}

/// `KVM_XEN_ATTR_TYPE_XEN_VERSION`.
pub fn set_xen_version(vm: &VmFd, version: u32) -> Result<(), Errno> {
    set_attr(vm, KVM_XEN_ATTR_TYPE_XEN_VERSION, |a| a.u.xen_version = version)
}

/// `KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG`.
pub fn set_runstate_update_flag(vm: &VmFd, on: bool) -> Result<(), Errno> {
    set_attr(vm, KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG, |a| a.u.runstate_update_flag = on.into())
}

fn evtchn(
    vm: &VmFd,
    port: u32,
    kind: u32,
    flags: u32,
    deliver: kvm_xen_hvm_attr__bindgen_ty_1__bindgen_ty_2__bindgen_ty_1,
) -> Result<(), Errno> {
    set_attr(vm, KVM_XEN_ATTR_TYPE_EVTCHN, |a| {
        a.u.evtchn =
            kvm_xen_hvm_attr__bindgen_ty_1__bindgen_ty_2 { send_port: port, type_: kind, flags, deliver };
    })
}

/// What the guest sends on `port` is written to `fd`.
pub fn evtchn_to_eventfd(vm: &VmFd, port: u32, fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut deliver = kvm_xen_hvm_attr__bindgen_ty_1__bindgen_ty_2__bindgen_ty_1 { padding: [0; 4] };
    deliver.eventfd = kvm_xen_hvm_attr__bindgen_ty_1__bindgen_ty_2__bindgen_ty_1__bindgen_ty_2 {
        port: 0,
        fd: fd.as_raw_fd(),
    };
    evtchn(vm, port, INTERDOMAIN, 0, deliver)
}

/// What the guest sends on `port` is delivered on the same port to `vcpu`.
pub fn evtchn_to_vcpu(vm: &VmFd, port: u32, vcpu: u32) -> Result<(), Errno> {
    let mut deliver = kvm_xen_hvm_attr__bindgen_ty_1__bindgen_ty_2__bindgen_ty_1 { padding: [0; 4] };
    deliver.port = kvm_xen_hvm_attr__bindgen_ty_1__bindgen_ty_2__bindgen_ty_1__bindgen_ty_1 {
        port,
        vcpu,
        priority: PRIO_2LEVEL,
    };
    evtchn(vm, port, IPI, 0, deliver)
}

/// The kernel forgets `port`.
pub fn evtchn_deassign(vm: &VmFd, port: u32) -> Result<(), Errno> {
    let deliver = kvm_xen_hvm_attr__bindgen_ty_1__bindgen_ty_2__bindgen_ty_1 { padding: [0; 4] };
    evtchn(vm, port, 0, KVM_XEN_EVTCHN_DEASSIGN, deliver)
}

/// `KVM_XEN_HVM_EVTCHN_SEND`: raises `port` on `vcpu`.
pub fn evtchn_send(vm: &VmFd, port: u32, vcpu: u32) -> Result<(), Errno> {
    let event = kvm_irq_routing_xen_evtchn { port, vcpu, priority: PRIO_2LEVEL };
    // SAFETY: the kernel reads one struct of this type.
    unsafe { raw::xen_evtchn_send(vm.as_raw_fd(), &event) }.map(drop)
}

/// `KVM_IRQFD`: writes to `fd` raise `gsi`, or no longer.
pub fn irqfd(vm: &VmFd, fd: BorrowedFd<'_>, gsi: u32, assign: bool) -> Result<(), Errno> {
    let flags = if assign { 0 } else { KVM_IRQFD_FLAG_DEASSIGN };
    let arg = kvm_irqfd { fd: fd.as_raw_fd() as u32, gsi, flags, ..Default::default() };
    // SAFETY: the kernel reads one struct of this type.
    unsafe { raw::irqfd(vm.as_raw_fd(), &arg) }.map(drop)
}

/// `KVM_SET_GSI_ROUTING`: each (GSI, vCPU) raises the port of the GSI's number.
pub fn set_evtchn_routes(vm: &VmFd, routes: impl ExactSizeIterator<Item = (u32, u32)>) -> Result<(), Errno> {
    let entries: Vec<kvm_irq_routing_entry> = routes
        .map(|(port, vcpu)| {
            let mut entry =
                kvm_irq_routing_entry { gsi: port, type_: KVM_IRQ_ROUTING_XEN_EVTCHN, ..Default::default() };
            entry.u.xen_evtchn = kvm_irq_routing_xen_evtchn { port, vcpu, priority: PRIO_2LEVEL };
            entry
        })
        .collect();
    let table = KvmIrqRouting::from_entries(&entries).map_err(|_| Errno::ENOSPC)?;
    // SAFETY: the kernel reads the header and as many entries as it names, which the wrapper keeps together.
    unsafe { raw::set_gsi_routing(vm.as_raw_fd(), table.as_fam_struct_ptr()) }.map(drop)
}

/// `KVM_SET_USER_MEMORY_REGION`: shows `len` bytes at `hva` of this process at `gpa`; 0 bytes removes the slot.
/// The memory has to stay mapped for the VM's life, which [`crate::mem`]'s leaked mappings do.
pub fn set_memory_slot(vm: &VmFd, slot: u32, gpa: u64, hva: u64, len: u64) -> Result<(), Errno> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: len,
        userspace_addr: hva,
    };
    // SAFETY: the kernel reads one struct of this type. What the guest can reach by it are pages of guest RAM and
    // of SharedPages alone, to which this process never holds references.
    unsafe { raw::set_user_memory_region(vm.as_raw_fd(), &region) }.map(drop)
}

/// Sets a vCPU attribute. Call it from the vCPU's own thread, or before that runs.
pub fn set_vcpu_attr(vcpu: impl AsFd, attr: VcpuAttr) -> Result<(), Errno> {
    let mut arg = kvm_xen_vcpu_attr::default();
    let kind = match attr {
        VcpuAttr::VcpuInfo(gpa) => {
            arg.u.gpa = gpa;
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO
        }
        VcpuAttr::VcpuInfoHva(hva) => {
            arg.u.hva = hva;
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA
        }
        VcpuAttr::TimeInfo(gpa) => {
            arg.u.gpa = gpa;
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO
        }
        VcpuAttr::Runstate(gpa) => {
            arg.u.gpa = gpa;
            KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR
        }
        VcpuAttr::VcpuId(id) => {
            arg.u.vcpu_id = id;
            KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID
        }
        VcpuAttr::Timer { port, expires_ns } => {
            arg.u.timer =
                kvm_xen_vcpu_attr__bindgen_ty_1__bindgen_ty_2 { port, priority: PRIO_2LEVEL, expires_ns };
            KVM_XEN_VCPU_ATTR_TYPE_TIMER
        }
        VcpuAttr::UpcallVector(vector) => {
            arg.u.vector = vector;
            KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR
        }
    };
    arg.type_ = kind as u16;
    // SAFETY: the kernel reads one struct of this type.
    unsafe { raw::xen_vcpu_set_attr(vcpu.as_fd().as_raw_fd(), &arg) }.map(drop)
}

/// Reads a vCPU's runstate. Call it from the vCPU's own thread.
pub fn runstate(vcpu: impl AsFd) -> Result<Runstate, Errno> {
    let mut arg =
        kvm_xen_vcpu_attr { type_: KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA as u16, ..Default::default() };
    // SAFETY: the kernel reads and writes one struct of this type.
    unsafe { raw::xen_vcpu_get_attr(vcpu.as_fd().as_raw_fd(), &mut arg) }?;
    // SAFETY: every bit pattern is a value of this member.
    let run = unsafe { arg.u.runstate };
    Ok(Runstate {
        state: run.state as u32,
        entry_time: run.state_entry_time,
        time: [run.time_running, run.time_runnable, run.time_blocked, run.time_offline],
    })
}

/// A vCPU's singleshot timer: (port, system time in ns at which it fires; 0: none is set). Call it from the vCPU's own
/// thread.
pub fn timer(vcpu: impl AsFd) -> Result<(u32, u64), Errno> {
    let mut arg = kvm_xen_vcpu_attr { type_: KVM_XEN_VCPU_ATTR_TYPE_TIMER as u16, ..Default::default() };
    // SAFETY: the kernel reads and writes one struct of this type.
    unsafe { raw::xen_vcpu_get_attr(vcpu.as_fd().as_raw_fd(), &mut arg) }?;
    // SAFETY: every bit pattern is a value of this member.
    let timer = unsafe { arg.u.timer };
    Ok((timer.port, timer.expires_ns))
}

/// The hypercall of a vCPU that left with `KVM_EXIT_XEN`; `None` if it is something else.
pub fn hypercall_of(vcpu: &mut VcpuFd) -> Option<Call> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_XEN {
        return None;
    }
    // SAFETY: the exit reason says that the kernel filled this member; it holds integers only.
    let xen = unsafe { run.__bindgen_anon_1.xen };
    if xen.type_ != KVM_EXIT_XEN_HCALL {
        return None;
    }
    // SAFETY: as above, by its type.
    let hcall = unsafe { xen.u.hcall };
    Some(Call { nr: hcall.input, args: hcall.params, cpl: hcall.cpl, long_mode: hcall.longmode != 0 })
}

/// What KVM says of an internal error (`KVM_INTERNAL_ERROR_*` and data); `None` if the exit is something else.
pub fn internal_error_of(vcpu: &mut VcpuFd) -> Option<String> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: the exit reason says that the kernel filled this member; it holds integers only.
    let error = unsafe { run.__bindgen_anon_1.internal };
    let data = error.data.get(..error.ndata as usize).unwrap_or(&error.data);
    Some(format!(" (suberror {}, data {data:x?})", error.suberror))
}

/// Sets what the guest gets from the hypercall; the kernel puts it into rax on the next run.
pub fn set_hypercall_result(vcpu: &mut VcpuFd, result: i64) {
    vcpu.get_kvm_run().__bindgen_anon_1.xen.u.hcall.result = result as u64;
}

/// The byte that makes `KVM_RUN` return at once, for other threads to set.
pub fn immediate_exit_flag(vcpu: &mut VcpuFd) -> *const AtomicU8 {
    (&raw mut vcpu.get_kvm_run().immediate_exit).cast::<AtomicU8>()
}

/// Makes a vCPU's thread leave `KVM_RUN`.
pub struct Kicker {
    flag: *const AtomicU8,
    /// The thread's id; 0 before it runs.
    thread: AtomicI32,
}

// SAFETY: the flag is an atomic byte in a mapping that lives as long as the process (see `new`).
unsafe impl Send for Kicker {}
// SAFETY: as above.
unsafe impl Sync for Kicker {}

impl Kicker {
    /// A kicker for `vcpu`, whose mapping has to live as long as the process: it is leaked, never dropped.
    pub fn new(vcpu: &'static mut VcpuFd) -> (Self, &'static mut VcpuFd) {
        let flag = immediate_exit_flag(vcpu);
        (Self { flag, thread: AtomicI32::new(0) }, vcpu)
    }

    /// Notes the calling thread as the vCPU's.
    pub fn attach(&self) {
        // SAFETY: no preconditions.
        let tid = unsafe { libc::syscall(libc::SYS_gettid) };
        self.thread.store(tid as i32, Ordering::SeqCst);
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the vCPU's mapping is never unmapped (see `new`), and the byte is only used as an atomic by us; the
        // kernel reads it.
        unsafe { &*self.flag }
    }

    /// Makes the thread leave `KVM_RUN`, or not enter it.
    pub fn kick(&self) {
        self.flag().store(1, Ordering::SeqCst);
        let tid = self.thread.load(Ordering::SeqCst);
        if tid != 0 {
            // SAFETY: sends a signal with a handler that does nothing to a thread of this process.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR1) };
        }
    }

    /// Called by the vCPU's thread when it has left `KVM_RUN`, before it looks for what it was kicked for.
    pub fn clear(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }
}

extern "C" fn on_kick(_: libc::c_int) {}

/// Installs the handler of the signal by which vCPUs are kicked.
pub fn install_kick_handler() -> Result<(), Errno> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let action = SigAction::new(SigHandler::Handler(on_kick), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is async-signal-safe.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.map(drop)
}

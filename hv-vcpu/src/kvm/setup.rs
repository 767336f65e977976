//! Makes the VM: checks, memory slots, Xen configuration, vCPUs at the PVH entry point.

use super::ioctl::{self, Kicker};
use super::platform::{KvmPlatform, VcpuLink};
use super::{KvmError, call, own_call};
use crate::layout::XEN_HYPERCALL_MSR;
use crate::mem::{GuestMemory, SharedPages};
use crate::platform::VcpuAttr;
use crate::{cpuid, layout};
use kvm_bindings::*;
use kvm_ioctls::{Kvm, VcpuFd};

/// Where KVM keeps the task state of real mode on Intel: three pages in the hole below 4 GiB.
const TSS_ADDR: usize = 0xfffb_d000;
/// Where KVM keeps an identity map for real mode on Intel.
const IDENTITY_MAP_ADDR: u64 = 0xfffb_c000;
/// `IA32_MTRR_DEF_TYPE`: MTRRs on, all memory write-back.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// A VM that is ready to run.
pub struct Vm {
    /// For hypercalls.
    pub platform: KvmPlatform,
    /// The vCPUs by number. They are leaked: the process ends with its guest.
    pub vcpus: Vec<&'static mut VcpuFd>,
}

/// Checks the CPU before /dev/kvm is opened: the device can be there and be a slow emulation.
pub fn check_hardware() -> Result<(), KvmError> {
    if domain_kit::os::cpu_can_virtualize() { Ok(()) } else { Err(KvmError::NoHardware) }
}

/// Checks KVM's Xen support; returns its flags.
pub fn check_xen(kvm: &Kvm) -> Result<u32, KvmError> {
    let flags = kvm.check_extension_raw(KVM_CAP_XEN_HVM.into());
    if flags <= 0 {
        return Err(KvmError::NoXen);
    }
    let flags = flags as u32;
    for (flag, name) in [
        (KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, "KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL"),
        (KVM_XEN_HVM_CONFIG_SHARED_INFO, "KVM_XEN_HVM_CONFIG_SHARED_INFO"),
        (KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL, "KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL"),
        (KVM_XEN_HVM_CONFIG_EVTCHN_SEND, "KVM_XEN_HVM_CONFIG_EVTCHN_SEND"),
    ] {
        if flags & flag == 0 {
            return Err(KvmError::OldXen(name));
        }
    }
    Ok(flags)
}

/// Makes the VM with its memory and `vcpus` vCPUs.
pub fn create(
    kvm: &Kvm,
    mem: &'static GuestMemory,
    shared_info: &'static SharedPages,
    vcpus: u32,
    domid: u16,
) -> Result<Vm, KvmError> {
    let xen = check_xen(kvm)?;
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    vm.set_tss_address(TSS_ADDR).map_err(call("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDR).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
    for (slot, piece) in mem.pieces().enumerate() {
        ioctl::set_memory_slot(&vm, slot as u32, piece.gpa, piece.hva, piece.len)
            .map_err(own_call("guest RAM (KVM_SET_USER_MEMORY_REGION)"))?;
    }

    let flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND;
    ioctl::xen_hvm_config(&vm, flags, XEN_HYPERCALL_MSR).map_err(own_call("KVM_XEN_HVM_CONFIG"))?;
    ioctl::set_long_mode(&vm).map_err(own_call("KVM_XEN_ATTR_TYPE_LONG_MODE"))?;
    ioctl::set_xen_version(&vm, cpuid::XEN_MAJOR << 16 | cpuid::XEN_MINOR)
        .map_err(own_call("KVM_XEN_ATTR_TYPE_XEN_VERSION"))?;

    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    let mut fds = Vec::new();
    for id in 0..vcpus {
        let vcpu = vm.create_vcpu(id.into()).map_err(call("KVM_CREATE_VCPU"))?;
        let entries = cpuid::guest(supported.as_slice(), id, vcpus, domid);
        let entries = CpuId::from_entries(&entries).map_err(|_| KvmError::Call {
            what: "a CPUID table of this size",
            errno: nix::errno::Errno::E2BIG,
        })?;
        vcpu.set_cpuid2(&entries).map_err(call("KVM_SET_CPUID2"))?;
        let msr = kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data: MTRR_ON_WRITE_BACK, ..Default::default() };
        if let Ok(msrs) = Msrs::from_entries(&[msr]) {
            vcpu.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))?;
        }
        fds.push(vcpu);
    }

    // By address where KVM can: then no event is lost before the guest asks for the page.
    let by_hva = xen & KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA != 0;
    let hva = shared_info.hva(0).unwrap_or(0);
    if by_hva {
        ioctl::set_shared_info_hva(&vm, hva).map_err(own_call("KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA"))?;
    }
    let mut links = Vec::new();
    let mut out = Vec::new();
    for (id, vcpu) in fds.into_iter().enumerate() {
        let fd = ioctl::vcpu_handle(&vcpu).map_err(KvmError::Thread)?;
        ioctl::set_vcpu_attr(&fd, VcpuAttr::VcpuId(id as u32))
            .map_err(own_call("KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID"))?;
        if by_hva {
            let info = hva + id as u64 * size_of::<xen_abi::xen::VcpuInfo>() as u64;
            ioctl::set_vcpu_attr(&fd, VcpuAttr::VcpuInfoHva(info))
                .map_err(own_call("KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA"))?;
        }
        let (kicker, vcpu) = Kicker::new(Box::leak(Box::new(vcpu)));
        links.push(VcpuLink::new(fd, kicker));
        out.push(vcpu);
    }
    Ok(Vm { platform: KvmPlatform::new(vm, links, by_hva), vcpus: out })
}

/// Puts the boot vCPU at the PVH entry point (xen/include/public/arch-x86/hvm/start_info.h): flat 32-bit protected
/// mode without paging, `ebx` points to the start info.
pub fn pvh_entry(vcpu: &VcpuFd, entry: u32, start_info: u64) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let flat = |selector: u16, kind: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(8, 0xb);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss, &mut sregs.fs, &mut sregs.gs] {
        *segment = flat(0x10, 3);
    }
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 = 0x11;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rbx: start_info, rip: entry.into(), rflags: 2, ..Default::default() };
    debug_assert!(start_info < layout::KERNEL_LOW);
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))
}

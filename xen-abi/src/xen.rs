//! `xen.h`, `arch-x86/xen.h`, `arch-x86/xen-x86_64.h`: domids, hypercall numbers, VIRQs, shared info.

/// Names a domain, 0 to 0x7fef; 0 is dom0. `domid_t` of `xen/xen.h`.
pub type Domid = u16;
/// An event channel port of one domain; 0 is never valid. `evtchn_port_t` of `xen/event_channel.h`.
pub type EvtchnPort = u32;
/// A grant reference of one domain. `grant_ref_t` of `xen/grant_table.h`.
pub type GrantRef = u32;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page on x86, the unit of grants and of frame numbers.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// Event channels of the 2-level ABI on x86_64, port 0 included. `EVTCHN_2L_NR_CHANNELS` of `xen/event_channel.h`.
pub const EVTCHN_2L_NR_CHANNELS: u32 = 4096;

consts! { "xen.h";
    u16 {
        /// The first domid that names no domain of its own.
        DOMID_FIRST_RESERVED = 0x7ff0;
        /// The caller itself.
        DOMID_SELF = 0x7ff0;
        /// I/O memory.
        DOMID_IO = 0x7ff1;
        /// The hypervisor's own memory.
        DOMID_XEN = 0x7ff2;
        /// Copy-on-write pages.
        DOMID_COW = 0x7ff3;
        /// Never names a domain.
        DOMID_INVALID = 0x7ff4;
        /// The idle domain.
        DOMID_IDLE = 0x7fff;
    }
    u64 {
        HYPERVISOR_SET_TRAP_TABLE(__HYPERVISOR_set_trap_table) = 0;
        HYPERVISOR_MMU_UPDATE(__HYPERVISOR_mmu_update) = 1;
        HYPERVISOR_PLATFORM_OP(__HYPERVISOR_platform_op) = 7;
        HYPERVISOR_MEMORY_OP(__HYPERVISOR_memory_op) = 12;
        HYPERVISOR_MULTICALL(__HYPERVISOR_multicall) = 13;
        HYPERVISOR_SET_TIMER_OP(__HYPERVISOR_set_timer_op) = 15;
        HYPERVISOR_XEN_VERSION(__HYPERVISOR_xen_version) = 17;
        HYPERVISOR_CONSOLE_IO(__HYPERVISOR_console_io) = 18;
        HYPERVISOR_GRANT_TABLE_OP(__HYPERVISOR_grant_table_op) = 20;
        HYPERVISOR_VM_ASSIST(__HYPERVISOR_vm_assist) = 21;
        HYPERVISOR_IRET(__HYPERVISOR_iret) = 23;
        HYPERVISOR_VCPU_OP(__HYPERVISOR_vcpu_op) = 24;
        HYPERVISOR_MMUEXT_OP(__HYPERVISOR_mmuext_op) = 26;
        HYPERVISOR_XSM_OP(__HYPERVISOR_xsm_op) = 27;
        HYPERVISOR_NMI_OP(__HYPERVISOR_nmi_op) = 28;
        HYPERVISOR_SCHED_OP(__HYPERVISOR_sched_op) = 29;
        HYPERVISOR_CALLBACK_OP(__HYPERVISOR_callback_op) = 30;
        HYPERVISOR_EVENT_CHANNEL_OP(__HYPERVISOR_event_channel_op) = 32;
        HYPERVISOR_PHYSDEV_OP(__HYPERVISOR_physdev_op) = 33;
        HYPERVISOR_HVM_OP(__HYPERVISOR_hvm_op) = 34;
        HYPERVISOR_SYSCTL(__HYPERVISOR_sysctl) = 35;
        HYPERVISOR_DOMCTL(__HYPERVISOR_domctl) = 36;
        HYPERVISOR_KEXEC_OP(__HYPERVISOR_kexec_op) = 37;
        HYPERVISOR_TMEM_OP(__HYPERVISOR_tmem_op) = 38;
        HYPERVISOR_ARGO_OP(__HYPERVISOR_argo_op) = 39;
        HYPERVISOR_XENPMU_OP(__HYPERVISOR_xenpmu_op) = 40;
        HYPERVISOR_DM_OP(__HYPERVISOR_dm_op) = 41;
        HYPERVISOR_HYPFS_OP(__HYPERVISOR_hypfs_op) = 42;
    }
    u32 {
        /// Per vCPU: its timer fired.
        VIRQ_TIMER = 0;
        /// Per vCPU: dump debug state.
        VIRQ_DEBUG = 1;
        /// Global, dom0: bytes from the emergency console.
        VIRQ_CONSOLE = 2;
        /// Global: a domain changed its state; bound by xenstored.
        VIRQ_DOM_EXC = 3;
        /// Global: trace buffer.
        VIRQ_TBUF = 4;
        /// Global: a domain stopped for its debugger.
        VIRQ_DEBUGGER = 6;
        /// Per vCPU: profiling.
        VIRQ_XENOPROF = 7;
        /// Global: the console ring has bytes.
        VIRQ_CON_RING = 8;
        /// Global: a physical CPU changed its state.
        VIRQ_PCPU_STATE = 9;
        /// Global: memory event.
        VIRQ_MEM_EVENT = 10;
        /// Global: argo.
        VIRQ_ARGO = 11;
        /// Global: memory is low.
        VIRQ_ENOMEM = 12;
        /// Per vCPU: PMU.
        VIRQ_XENPMU = 13;
        /// The first of eight for the architecture.
        VIRQ_ARCH_0 = 16;
        /// How many VIRQ numbers there are.
        NR_VIRQS = 24;
        /// vm_assist command: enable.
        VMASST_CMD_ENABLE(VMASST_CMD_enable) = 0;
        /// vm_assist command: disable.
        VMASST_CMD_DISABLE(VMASST_CMD_disable) = 1;
        /// vm_assist type: bit 63 of `state_entry_time` marks an update in progress.
        VMASST_TYPE_RUNSTATE_UPDATE_FLAG(VMASST_TYPE_runstate_update_flag) = 5;
        /// vCPUs that have their `vcpu_info` in the shared info page.
        XEN_LEGACY_MAX_VCPUS = 32;
    }
    u8 {
        /// `VcpuTimeInfo::flags`: the TSC is stable across vCPUs.
        XEN_PVCLOCK_TSC_STABLE_BIT = 1 << 0;
        /// `VcpuTimeInfo::flags`: the guest was stopped by the host.
        XEN_PVCLOCK_GUEST_STOPPED = 1 << 1;
    }
}

abi! { "xen.h";
    /// The pvclock page of one vCPU.
    pub struct VcpuTimeInfo("struct vcpu_time_info") [32] {
        /// Odd while an update is in progress.
        version: u32 = 0,
        _pad0: u32 = 4,
        /// TSC at the last update.
        tsc_timestamp: u64 = 8,
        /// Nanoseconds since boot at the last update.
        system_time: u64 = 16,
        /// Fixed-point factor, after the shift: ns = (ticks << shift) * mul >> 32.
        tsc_to_system_mul: u32 = 24,
        /// Left shift of the ticks, right if negative.
        tsc_shift: i8 = 28,
        /// `XEN_PVCLOCK_*` bits.
        flags: u8 = 29,
        _pad1: [u8; 2] = 30,
    }
    /// The x86 part of `VcpuInfo`.
    pub struct ArchVcpuInfo("struct arch_vcpu_info") [16] {
        /// PV guests: the fault address.
        cr2: u64 = 0,
        _pad: u64 = 8,
    }
    /// What a vCPU shares with the hypervisor.
    pub struct VcpuInfo("struct vcpu_info") [64] {
        /// Non-zero: an upcall is due.
        evtchn_upcall_pending: u8 = 0,
        /// Non-zero: upcalls are masked (PV guests).
        evtchn_upcall_mask: u8 = 1,
        _pad0: [u8; 6] = 2,
        /// Which words of `SharedInfo::evtchn_pending` have bits set.
        evtchn_pending_sel: u64 = 8,
        arch: ArchVcpuInfo = 16,
        time: VcpuTimeInfo = 32,
    }
    /// The x86 part of `SharedInfo` (`arch-x86/xen.h`).
    pub struct ArchSharedInfo("struct arch_shared_info") [48] {
        max_pfn: u64 = 0,
        pfn_to_mfn_frame_list_list: u64 = 8,
        nmi_reason: u64 = 16,
        p2m_cr3: u64 = 24,
        p2m_vaddr: u64 = 32,
        p2m_generation: u64 = 40,
    }
    /// The shared info page; the rest of the page is zero.
    pub struct SharedInfo("struct shared_info") [3136] {
        vcpu_info: [VcpuInfo; XEN_LEGACY_MAX_VCPUS as usize] = 0,
        /// One bit for each port of the 2-level ABI.
        evtchn_pending: [u64; 64] = 2048,
        /// One bit for each port: set, no upcall.
        evtchn_mask: [u64; 64] = 2560,
        /// Odd while the wall clock is being updated.
        wc_version: u32 = 3072,
        /// Wall clock at boot of the domain: seconds since the epoch, low half.
        wc_sec: u32 = 3076,
        /// Wall clock at boot of the domain: nanoseconds.
        wc_nsec: u32 = 3080,
        /// Wall clock at boot of the domain: seconds, high half.
        wc_sec_hi: u32 = 3084,
        arch: ArchSharedInfo = 3088,
    }
    /// One call of a multicall.
    pub struct MulticallEntry("struct multicall_entry") [64] {
        op: u64 = 0,
        result: u64 = 8,
        args: [u64; 6] = 16,
    }
}

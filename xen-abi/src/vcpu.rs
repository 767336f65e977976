//! `vcpu.h`: the operations of `__HYPERVISOR_vcpu_op`.

consts! { "vcpu.h";
    u32 {
        VCPUOP_INITIALISE(VCPUOP_initialise) = 0;
        VCPUOP_UP(VCPUOP_up) = 1;
        VCPUOP_DOWN(VCPUOP_down) = 2;
        /// Returns 1 if the vCPU is up.
        VCPUOP_IS_UP(VCPUOP_is_up) = 3;
        /// Fills [`VcpuRunstateInfo`].
        VCPUOP_GET_RUNSTATE_INFO(VCPUOP_get_runstate_info) = 4;
        VCPUOP_REGISTER_RUNSTATE_MEMORY_AREA(VCPUOP_register_runstate_memory_area) = 5;
        VCPUOP_SET_PERIODIC_TIMER(VCPUOP_set_periodic_timer) = 6;
        VCPUOP_STOP_PERIODIC_TIMER(VCPUOP_stop_periodic_timer) = 7;
        VCPUOP_SET_SINGLESHOT_TIMER(VCPUOP_set_singleshot_timer) = 8;
        VCPUOP_STOP_SINGLESHOT_TIMER(VCPUOP_stop_singleshot_timer) = 9;
        VCPUOP_REGISTER_VCPU_INFO(VCPUOP_register_vcpu_info) = 10;
        VCPUOP_SEND_NMI(VCPUOP_send_nmi) = 11;
        VCPUOP_GET_PHYSID(VCPUOP_get_physid) = 12;
        VCPUOP_REGISTER_VCPU_TIME_MEMORY_AREA(VCPUOP_register_vcpu_time_memory_area) = 13;
        /// `VcpuSetSingleshotTimer::flags`: fail with `ETIME` if the time is past.
        VCPU_SSHOTTMR_FUTURE(VCPU_SSHOTTMR_future) = 1;
        RUNSTATE_RUNNING(RUNSTATE_running) = 0;
        RUNSTATE_RUNNABLE(RUNSTATE_runnable) = 1;
        RUNSTATE_BLOCKED(RUNSTATE_blocked) = 2;
        RUNSTATE_OFFLINE(RUNSTATE_offline) = 3;
    }
    u64 {
        /// Bit of `state_entry_time` that is set during an update.
        XEN_RUNSTATE_UPDATE = 1 << 63;
    }
}

abi! { "vcpu.h";
    /// Where a vCPU's time went, x86_64 layout.
    pub struct VcpuRunstateInfo("struct vcpu_runstate_info") [48] {
        /// `RUNSTATE_*`.
        state: u32 = 0,
        _pad: u32 = 4,
        /// System time in nanoseconds.
        state_entry_time: u64 = 8,
        /// Nanoseconds by `RUNSTATE_*`.
        time: [u64; 4] = 16,
    }
    /// Argument of `VCPUOP_register_runstate_memory_area`.
    pub struct VcpuRegisterRunstateMemoryArea("struct vcpu_register_runstate_memory_area") [8] {
        /// Guest virtual address of a [`VcpuRunstateInfo`].
        addr: u64 = 0,
    }
    /// Argument of `VCPUOP_register_vcpu_time_memory_area`.
    pub struct VcpuRegisterTimeMemoryArea("struct vcpu_register_time_memory_area") [8] {
        /// Guest virtual address of a [`crate::xen::VcpuTimeInfo`].
        addr: u64 = 0,
    }
    /// Argument of `VCPUOP_set_periodic_timer`.
    pub struct VcpuSetPeriodicTimer("struct vcpu_set_periodic_timer") [8] {
        period_ns: u64 = 0,
    }
    /// Argument of `VCPUOP_set_singleshot_timer`.
    pub struct VcpuSetSingleshotTimer("struct vcpu_set_singleshot_timer") [16] {
        /// System time in nanoseconds.
        timeout_abs_ns: u64 = 0,
        flags: u32 = 8,
        _pad: u32 = 12,
    }
    /// Argument of `VCPUOP_register_vcpu_info`, which can be done once.
    pub struct VcpuRegisterVcpuInfo("struct vcpu_register_vcpu_info") [16] {
        /// The guest's frame number.
        mfn: u64 = 0,
        /// In bytes; the 64 bytes may not cross the page.
        offset: u32 = 8,
        _rsvd("rsvd"): u32 = 12,
    }
    /// Answer to `VCPUOP_get_physid`.
    pub struct VcpuGetPhysid("struct vcpu_get_physid") [8] {
        /// APIC id in the low half, ACPI id in the high one.
        phys_id: u64 = 0,
    }
}

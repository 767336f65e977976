//! `hvm/hvm_op.h` and `hvm/params.h`: the operations of `__HYPERVISOR_hvm_op` and the HVM parameters.

consts! { "hvm/hvm_op.h" as HVMOP_C_CONSTS;
    u32 {
        HVMOP_SET_PARAM(HVMOP_set_param) = 0;
        HVMOP_GET_PARAM(HVMOP_get_param) = 1;
        HVMOP_FLUSH_TLBS(HVMOP_flush_tlbs) = 5;
        HVMOP_PAGETABLE_DYING(HVMOP_pagetable_dying) = 9;
        HVMOP_GET_TIME(HVMOP_get_time) = 10;
        HVMOP_XENTRACE(HVMOP_xentrace) = 11;
        HVMOP_GET_MEM_TYPE(HVMOP_get_mem_type) = 15;
        HVMOP_SET_EVTCHN_UPCALL_VECTOR(HVMOP_set_evtchn_upcall_vector) = 23;
        HVMOP_GUEST_REQUEST_VM_EVENT(HVMOP_guest_request_vm_event) = 24;
        HVMOP_ALTP2M(HVMOP_altp2m) = 25;
    }
}

consts! { "hvm/params.h";
    u32 {
        /// How upcalls are delivered, see [`CallbackVia`].
        HVM_PARAM_CALLBACK_IRQ = 0;
        /// Frame of the xenstore ring.
        HVM_PARAM_STORE_PFN = 1;
        /// The guest's port of the xenstore ring.
        HVM_PARAM_STORE_EVTCHN = 2;
        HVM_PARAM_PAE_ENABLED = 4;
        HVM_PARAM_IOREQ_PFN = 5;
        HVM_PARAM_BUFIOREQ_PFN = 6;
        HVM_PARAM_VIRIDIAN = 9;
        HVM_PARAM_TIMER_MODE = 10;
        HVM_PARAM_HPET_ENABLED = 11;
        HVM_PARAM_IDENT_PT = 12;
        HVM_PARAM_DM_DOMAIN = 13;
        HVM_PARAM_ACPI_S_STATE = 14;
        HVM_PARAM_VM86_TSS = 15;
        HVM_PARAM_VPT_ALIGN = 16;
        /// Frame of the console ring.
        HVM_PARAM_CONSOLE_PFN = 17;
        /// The guest's port of the console ring.
        HVM_PARAM_CONSOLE_EVTCHN = 18;
        HVM_PARAM_ACPI_IOPORTS_LOCATION = 19;
        HVM_PARAM_NESTEDHVM = 24;
        HVM_PARAM_PAGING_RING_PFN = 27;
        HVM_PARAM_MONITOR_RING_PFN = 28;
        HVM_PARAM_SHARING_RING_PFN = 29;
        HVM_PARAM_TRIPLE_FAULT_REASON = 31;
        HVM_PARAM_IOREQ_SERVER_PFN = 32;
        HVM_PARAM_NR_IOREQ_SERVER_PAGES = 33;
        HVM_PARAM_VM_GENERATION_ID_ADDR = 34;
        HVM_PARAM_ALTP2M = 35;
        HVM_PARAM_X87_FIP_WIDTH = 36;
        HVM_PARAM_VM86_TSS_SIZED = 37;
        HVM_PARAM_MCA_CAP = 38;
        /// `val[55:0]` is a GSI.
        HVM_PARAM_CALLBACK_TYPE_GSI = 0;
        /// `val` names a PCI INTx line.
        HVM_PARAM_CALLBACK_TYPE_PCI_INTX = 1;
        /// `val[7:0]` is an interrupt vector, for all vCPUs.
        HVM_PARAM_CALLBACK_TYPE_VECTOR = 2;
    }
}

/// One more than the highest parameter index of Xen 4.17. `HVM_NR_PARAMS` of `xen/hvm/params.h`.
pub const HVM_NR_PARAMS: u32 = 39;

abi! { "hvm/hvm_op.h";
    /// Argument of `HVMOP_set_param` and `HVMOP_get_param`.
    pub struct XenHvmParam("struct xen_hvm_param") [16] {
        domid: u16 = 0,
        _pad("pad"): u16 = 2,
        /// `HVM_PARAM_*`.
        index: u32 = 4,
        value: u64 = 8,
    }
    /// Argument of `HVMOP_set_evtchn_upcall_vector`: the vector of one vCPU.
    pub struct XenHvmEvtchnUpcallVector("struct xen_hvm_evtchn_upcall_vector") [8] {
        vcpu: u32 = 0,
        /// 16 to 255.
        vector: u8 = 4,
        _pad: [u8; 3] = 5,
    }
    /// Answer to `HVMOP_get_time`.
    pub struct XenHvmGetTime("struct xen_hvm_get_time") [8] {
        /// Nanoseconds since boot.
        now: u64 = 0,
    }
    /// Argument of `HVMOP_get_mem_type`.
    pub struct XenHvmGetMemType("struct xen_hvm_get_mem_type") [16] {
        domid: u16 = 0,
        /// Out.
        mem_type: u16 = 2,
        _pad("pad"): [u16; 2] = 4,
        pfn: u64 = 8,
    }
    /// Argument of `HVMOP_pagetable_dying`.
    pub struct XenHvmPagetableDying("struct xen_hvm_pagetable_dying") [16] {
        domid: u16 = 0,
        _pad("pad"): [u16; 3] = 2,
        gpa: u64 = 8,
    }
}

/// The value of [`HVM_PARAM_CALLBACK_IRQ`], its type in bits 63 to 56. Source: `xen/hvm/params.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallbackVia {
    /// No upcalls (the value is 0).
    None,
    /// A level-triggered GSI.
    Gsi(u64),
    /// A PCI INTx line.
    PciIntx {
        /// PCI segment.
        domain: u16,
        /// PCI bus; the header gives it 16 bits.
        bus: u16,
        /// Device and function.
        devfn: u8,
        /// 0 to 3 for INTA to INTD.
        intx: u8,
    },
    /// An interrupt vector of every vCPU.
    Vector(u8),
}

impl CallbackVia {
    /// The meaning of a guest's value; `None` for a type that x86 doesn't define.
    pub const fn from_raw(value: u64) -> Option<Self> {
        if value == 0 {
            return Some(Self::None);
        }
        match (value >> 56) as u32 {
            HVM_PARAM_CALLBACK_TYPE_GSI => Some(Self::Gsi(value & 0x00ff_ffff_ffff_ffff)),
            HVM_PARAM_CALLBACK_TYPE_PCI_INTX => Some(Self::PciIntx {
                domain: (value >> 32) as u16,
                bus: (value >> 16) as u16,
                devfn: (value >> 8) as u8,
                intx: value as u8 & 3,
            }),
            HVM_PARAM_CALLBACK_TYPE_VECTOR => Some(Self::Vector(value as u8)),
            _ => None,
        }
    }

    /// The value to set. A GSI is cut to 56 bits.
    pub const fn raw(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Gsi(gsi) => gsi & 0x00ff_ffff_ffff_ffff,
            Self::PciIntx { domain, bus, devfn, intx } => {
                (HVM_PARAM_CALLBACK_TYPE_PCI_INTX as u64) << 56
                    | (domain as u64) << 32
                    | (bus as u64) << 16
                    | (devfn as u64) << 8
                    | (intx & 3) as u64
            }
            Self::Vector(vector) => (HVM_PARAM_CALLBACK_TYPE_VECTOR as u64) << 56 | vector as u64,
        }
    }
}

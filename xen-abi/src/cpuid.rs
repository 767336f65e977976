//! `arch-x86/cpuid.h`: Xen's CPUID leaves, relative to [`XEN_CPUID_FIRST_LEAF`].

consts! { "arch-x86/cpuid.h";
    u32 {
        /// The base when no other hypervisor's leaves come first; a multiple of 0x100 up to 0x40000100 otherwise.
        XEN_CPUID_FIRST_LEAF = 0x4000_0000;
        /// Leaf base + 0: "XenV".
        XEN_CPUID_SIGNATURE_EBX = 0x566e_6558;
        /// Leaf base + 0: "MMXe".
        XEN_CPUID_SIGNATURE_ECX = 0x6558_4d4d;
        /// Leaf base + 0: "nVMM".
        XEN_CPUID_SIGNATURE_EDX = 0x4d4d_566e;
        /// Leaf base + 2, ecx.
        XEN_CPUID_FEAT1_MMU_PT_UPDATE_PRESERVE_AD = 1 << 0;
        /// Leaf base + 4, eax: APIC register accesses are virtualized by hardware.
        XEN_HVM_CPUID_APIC_ACCESS_VIRT = 1 << 0;
        /// Leaf base + 4, eax: x2APIC accesses are virtualized by hardware.
        XEN_HVM_CPUID_X2APIC_VIRT = 1 << 1;
        /// Leaf base + 4, eax: foreign mappings are good for DMA.
        XEN_HVM_CPUID_IOMMU_MAPPINGS = 1 << 2;
        /// Leaf base + 4, eax: ebx has the vCPU's id.
        XEN_HVM_CPUID_VCPU_ID_PRESENT = 1 << 3;
        /// Leaf base + 4, eax: ecx has the domid.
        XEN_HVM_CPUID_DOMID_PRESENT = 1 << 4;
        /// Leaf base + 4, eax: 15-bit destination ids in MSIs.
        XEN_HVM_CPUID_EXT_DEST_ID = 1 << 5;
        /// Leaf base + 4, eax: per-vCPU upcall vectors work with bound pirqs.
        XEN_HVM_CPUID_UPCALL_VECTOR = 1 << 6;
        /// The last leaf, relative to the base.
        XEN_CPUID_MAX_NUM_LEAVES = 5;
    }
}

/// Leaf offset: the signature; eax is the last leaf.
pub const XEN_CPUID_LEAF_SIGNATURE: u32 = 0;
/// Leaf offset: eax is `major << 16 | minor`.
pub const XEN_CPUID_LEAF_VERSION: u32 = 1;
/// Leaf offset: eax hypercall pages, ebx the MSR that takes a page's address, ecx and edx features.
pub const XEN_CPUID_LEAF_HYPERCALL: u32 = 2;
/// Leaf offset, sub-leaves 0 to 2: eax [`XEN_CPUID_TSC_EMULATED`] and the like, ebx mode, ecx guest kHz, edx incarnation.
pub const XEN_CPUID_LEAF_TIME: u32 = 3;
/// Leaf offset: HVM features in eax, vCPU id in ebx, domid in ecx.
pub const XEN_CPUID_LEAF_HVM: u32 = 4;
/// Leaf offset: PV parameters, unused by PVH guests.
pub const XEN_CPUID_LEAF_PV: u32 = 5;
/// Time leaf, eax: the TSC is emulated.
pub const XEN_CPUID_TSC_EMULATED: u32 = 1 << 0;
/// Time leaf, eax: the host's TSC is known to be reliable.
pub const XEN_CPUID_TSC_HOST_RELIABLE: u32 = 1 << 1;
/// Time leaf, eax: RDTSCP exists.
pub const XEN_CPUID_TSC_RDTSCP: u32 = 1 << 2;

/// `[eax, ebx, ecx, edx]` of the signature leaf for a range that starts at `base`.
pub const fn signature(base: u32) -> [u32; 4] {
    let last = base + XEN_CPUID_MAX_NUM_LEAVES;
    [last, XEN_CPUID_SIGNATURE_EBX, XEN_CPUID_SIGNATURE_ECX, XEN_CPUID_SIGNATURE_EDX]
}

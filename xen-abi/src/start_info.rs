//! `arch-x86/hvm/start_info.h`: what a PVH kernel finds at `ebx`. The structs lie below 4 GiB.

consts! { "arch-x86/hvm/start_info.h";
    u32 {
        /// First word of [`HvmStartInfo`].
        XEN_HVM_START_MAGIC_VALUE = 0x336e_c578;
        XEN_HVM_MEMMAP_TYPE_RAM = 1;
        XEN_HVM_MEMMAP_TYPE_RESERVED = 2;
        XEN_HVM_MEMMAP_TYPE_ACPI = 3;
        XEN_HVM_MEMMAP_TYPE_NVS = 4;
        XEN_HVM_MEMMAP_TYPE_UNUSABLE = 5;
        XEN_HVM_MEMMAP_TYPE_DISABLED = 6;
        XEN_HVM_MEMMAP_TYPE_PMEM = 7;
    }
}

/// `HvmStartInfo::flags`: this is the initial domain. `SIF_INITDOMAIN` of `xen/xen.h`.
pub const SIF_INITDOMAIN: u32 = 1 << 1;
/// `HvmStartInfo::version` that has the memory map.
pub const HVM_START_INFO_VERSION: u32 = 1;

abi! { "arch-x86/hvm/start_info.h";
    /// The PVH boot block. All addresses are guest physical.
    pub struct HvmStartInfo("struct hvm_start_info") [56] {
        /// [`XEN_HVM_START_MAGIC_VALUE`].
        magic: u32 = 0,
        /// [`HVM_START_INFO_VERSION`].
        version: u32 = 4,
        /// `SIF_*` bits.
        flags: u32 = 8,
        nr_modules: u32 = 12,
        /// Of an array of [`HvmModlistEntry`].
        modlist_paddr: u64 = 16,
        /// Of the NUL-terminated command line.
        cmdline_paddr: u64 = 24,
        /// Of the ACPI RSDP; 0 if there is none.
        rsdp_paddr: u64 = 32,
        /// Of an array of [`HvmMemmapTableEntry`].
        memmap_paddr: u64 = 40,
        memmap_entries: u32 = 48,
        /// Zero.
        reserved: u32 = 52,
    }
    /// A module, such as the initrd.
    pub struct HvmModlistEntry("struct hvm_modlist_entry") [32] {
        paddr: u64 = 0,
        /// In bytes.
        size: u64 = 8,
        /// Of a NUL-terminated command line; 0 if there is none.
        cmdline_paddr: u64 = 16,
        /// Zero.
        reserved: u64 = 24,
    }
    /// A range of the memory map.
    pub struct HvmMemmapTableEntry("struct hvm_memmap_table_entry") [24] {
        addr: u64 = 0,
        /// In bytes.
        size: u64 = 8,
        /// `XEN_HVM_MEMMAP_TYPE_*`.
        r#type("type"): u32 = 16,
        /// Zero.
        reserved: u32 = 20,
    }
}

//! `features.h`: bit numbers of the feature map that `XENVER_get_features` returns.

/// How many 32-bit submaps there are. `XENFEAT_NR_SUBMAPS` of `xen/features.h`.
pub const XENFEAT_NR_SUBMAPS: u32 = 1;

consts! { "features.h";
    u32 {
        XENFEAT_WRITABLE_PAGE_TABLES(XENFEAT_writable_page_tables) = 0;
        XENFEAT_WRITABLE_DESCRIPTOR_TABLES(XENFEAT_writable_descriptor_tables) = 1;
        XENFEAT_AUTO_TRANSLATED_PHYSMAP(XENFEAT_auto_translated_physmap) = 2;
        XENFEAT_SUPERVISOR_MODE_KERNEL(XENFEAT_supervisor_mode_kernel) = 3;
        XENFEAT_PAE_PGDIR_ABOVE_4GB(XENFEAT_pae_pgdir_above_4gb) = 4;
        XENFEAT_MMU_PT_UPDATE_PRESERVE_AD(XENFEAT_mmu_pt_update_preserve_ad) = 5;
        XENFEAT_HIGHMEM_ASSIST(XENFEAT_highmem_assist) = 6;
        XENFEAT_GNTTAB_MAP_AVAIL_BITS(XENFEAT_gnttab_map_avail_bits) = 7;
        /// `HVM_PARAM_CALLBACK_IRQ` takes a vector.
        XENFEAT_HVM_CALLBACK_VECTOR(XENFEAT_hvm_callback_vector) = 8;
        /// pvclock may be used by HVM guests.
        XENFEAT_HVM_SAFE_PVCLOCK(XENFEAT_hvm_safe_pvclock) = 9;
        /// pirqs of emulated or passed-through devices may be event channels.
        XENFEAT_HVM_PIRQS(XENFEAT_hvm_pirqs) = 10;
        /// The domain is dom0.
        XENFEAT_DOM0(XENFEAT_dom0) = 11;
        XENFEAT_MEMORY_OP_VNODE_SUPPORTED(XENFEAT_memory_op_vnode_supported) = 13;
        XENFEAT_ARM_SMCCC_SUPPORTED(XENFEAT_ARM_SMCCC_supported) = 14;
        /// The RSDP of a PVH guest may lie anywhere.
        XENFEAT_LINUX_RSDP_UNRESTRICTED(XENFEAT_linux_rsdp_unrestricted) = 15;
        XENFEAT_NOT_DIRECT_MAPPED(XENFEAT_not_direct_mapped) = 16;
        XENFEAT_DIRECT_MAPPED(XENFEAT_direct_mapped) = 17;
    }
}

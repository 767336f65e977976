//! `memory.h`: the operations of `__HYPERVISOR_memory_op` that a PVH guest uses.

use zerocopy::little_endian::U64;

consts! { "memory.h";
    u32 {
        XENMEM_INCREASE_RESERVATION(XENMEM_increase_reservation) = 0;
        XENMEM_DECREASE_RESERVATION(XENMEM_decrease_reservation) = 1;
        /// Returns the highest machine page; no argument.
        XENMEM_MAXIMUM_RAM_PAGE(XENMEM_maximum_ram_page) = 2;
        /// Returns pages; takes [`XenMemoryDomain`].
        XENMEM_CURRENT_RESERVATION(XENMEM_current_reservation) = 3;
        /// Returns pages; takes [`XenMemoryDomain`].
        XENMEM_MAXIMUM_RESERVATION(XENMEM_maximum_reservation) = 4;
        XENMEM_MACHPHYS_MFN_LIST(XENMEM_machphys_mfn_list) = 5;
        XENMEM_POPULATE_PHYSMAP(XENMEM_populate_physmap) = 6;
        XENMEM_ADD_TO_PHYSMAP(XENMEM_add_to_physmap) = 7;
        /// Fills [`XenMemoryMap`].
        XENMEM_MEMORY_MAP(XENMEM_memory_map) = 9;
        XENMEM_MACHINE_MEMORY_MAP(XENMEM_machine_memory_map) = 10;
        XENMEM_EXCHANGE(XENMEM_exchange) = 11;
        XENMEM_MACHPHYS_MAPPING(XENMEM_machphys_mapping) = 12;
        XENMEM_SET_MEMORY_MAP(XENMEM_set_memory_map) = 13;
        /// Returns the highest frame number; takes [`XenMemoryDomain`].
        XENMEM_MAXIMUM_GPFN(XENMEM_maximum_gpfn) = 14;
        XENMEM_REMOVE_FROM_PHYSMAP(XENMEM_remove_from_physmap) = 15;
        XENMEM_SET_POD_TARGET(XENMEM_set_pod_target) = 16;
        XENMEM_GET_POD_TARGET(XENMEM_get_pod_target) = 17;
        XENMEM_ADD_TO_PHYSMAP_BATCH(XENMEM_add_to_physmap_batch) = 23;
        XENMEM_CLAIM_PAGES(XENMEM_claim_pages) = 24;
        XENMEM_RESERVED_DEVICE_MEMORY_MAP(XENMEM_reserved_device_memory_map) = 27;
        XENMEM_ACQUIRE_RESOURCE(XENMEM_acquire_resource) = 28;
        XENMAPSPACE_SHARED_INFO(XENMAPSPACE_shared_info) = 0;
        XENMAPSPACE_GRANT_TABLE(XENMAPSPACE_grant_table) = 1;
        XENMAPSPACE_GMFN(XENMAPSPACE_gmfn) = 2;
        XENMAPSPACE_GMFN_RANGE(XENMAPSPACE_gmfn_range) = 3;
        XENMAPSPACE_GMFN_FOREIGN(XENMAPSPACE_gmfn_foreign) = 4;
        XENMAPSPACE_DEV_MMIO(XENMAPSPACE_dev_mmio) = 5;
        /// Bit of `XenAddToPhysmap::idx`: a status frame of a version 2 table.
        XENMAPIDX_GRANT_TABLE_STATUS(XENMAPIDX_grant_table_status) = 0x8000_0000;
        XENMEMF_POPULATE_ON_DEMAND(XENMEMF_populate_on_demand) = 1 << 16;
        XENMEMF_EXACT_NODE_REQUEST(XENMEMF_exact_node_request) = 1 << 17;
        XENMEMF_VNODE(XENMEMF_vnode) = 1 << 18;
    }
}

/// The low 12 bits of a memory_op's command; the rest is a continuation's start (`MEMOP_CMD_MASK` inside Xen).
pub const MEMOP_CMD_BITS: u32 = 12;

abi! { "memory.h";
    /// Argument of increase and decrease reservation and of populate_physmap, which return the extents done.
    pub struct XenMemoryReservation("struct xen_memory_reservation") [32] {
        /// Guest pointer to `nr_extents` 64-bit frame numbers.
        extent_start: u64 = 0,
        nr_extents: u64 = 8,
        /// log2 of an extent's pages.
        extent_order: u32 = 16,
        /// `XENMEMF_*`.
        mem_flags: u32 = 20,
        domid: u16 = 24,
        _pad: [u8; 6] = 26,
    }
    /// Argument of calls that ask about one domain.
    pub struct XenMemoryDomain("struct xen_memory_domain") [2] {
        domid: u16 = 0,
    }
    /// Puts one page at `gpfn`.
    pub struct XenAddToPhysmap("struct xen_add_to_physmap") [24] {
        domid: u16 = 0,
        /// Pages, for `XENMAPSPACE_gmfn_range`.
        size: u16 = 2,
        /// `XENMAPSPACE_*`.
        space: u32 = 4,
        idx: u64 = 8,
        gpfn: u64 = 16,
    }
    /// Puts `size` pages at the frames of `gpfns`.
    pub struct XenAddToPhysmapBatch("struct xen_add_to_physmap_batch") [32] {
        domid: u16 = 0,
        /// `XENMAPSPACE_*`.
        space: u16 = 2,
        size: u16 = 4,
        foreign_domid("u.foreign_domid"): u16 = 6,
        /// Guest pointer to 64-bit indices.
        idxs: u64 = 8,
        /// Guest pointer to 64-bit frame numbers.
        gpfns: u64 = 16,
        /// Guest pointer to 32-bit errors, one an entry, out.
        errs: u64 = 24,
    }
    /// Takes a page away.
    pub struct XenRemoveFromPhysmap("struct xen_remove_from_physmap") [16] {
        domid: u16 = 0,
        _pad: [u8; 6] = 2,
        gpfn: u64 = 8,
    }
    /// Asks for the e820 map.
    pub struct XenMemoryMap("struct xen_memory_map") [16] {
        /// In: room for entries. Out: entries written.
        nr_entries: u32 = 0,
        _pad: u32 = 4,
        /// Guest pointer to [`E820Entry`]s.
        buffer: u64 = 8,
    }
    /// An entry of the e820 map, in the BIOS's format: 20 bytes without padding.
    pub struct E820Entry [20] {
        addr: U64 = 0,
        /// In bytes.
        size: U64 = 8,
        /// 1 RAM, 2 reserved, 3 ACPI, 4 NVS.
        r#type("type"): zerocopy::little_endian::U32 = 16,
    }
    /// Answer to `XENMEM_get_pod_target`.
    pub struct XenPodTarget("struct xen_pod_target") [40] {
        target_pages: u64 = 0,
        /// Out.
        tot_pages: u64 = 8,
        /// Out.
        pod_cache_pages: u64 = 16,
        /// Out.
        pod_entries: u64 = 24,
        domid: u16 = 32,
        _pad: [u8; 6] = 34,
    }
    /// Answer to `XENMEM_machphys_mapping`.
    pub struct XenMachphysMapping("struct xen_machphys_mapping") [24] {
        v_start: u64 = 0,
        v_end: u64 = 8,
        max_mfn: u64 = 16,
    }
}

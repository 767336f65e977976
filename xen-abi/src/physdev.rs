//! `physdev.h`: the operations of `__HYPERVISOR_physdev_op`. A PVH guest without passed-through devices needs
//! only their numbers, to be refused well.

consts! { "physdev.h";
    u32 {
        PHYSDEVOP_IRQ_STATUS_QUERY(PHYSDEVOP_irq_status_query) = 5;
        PHYSDEVOP_SET_IOPL(PHYSDEVOP_set_iopl) = 6;
        PHYSDEVOP_SET_IOBITMAP(PHYSDEVOP_set_iobitmap) = 7;
        PHYSDEVOP_APIC_READ(PHYSDEVOP_apic_read) = 8;
        PHYSDEVOP_APIC_WRITE(PHYSDEVOP_apic_write) = 9;
        PHYSDEVOP_ALLOC_IRQ_VECTOR(PHYSDEVOP_alloc_irq_vector) = 10;
        PHYSDEVOP_EOI(PHYSDEVOP_eoi) = 12;
        PHYSDEVOP_MAP_PIRQ(PHYSDEVOP_map_pirq) = 13;
        PHYSDEVOP_UNMAP_PIRQ(PHYSDEVOP_unmap_pirq) = 14;
        PHYSDEVOP_PIRQ_EOI_GMFN_V1(PHYSDEVOP_pirq_eoi_gmfn_v1) = 17;
        PHYSDEVOP_SETUP_GSI(PHYSDEVOP_setup_gsi) = 21;
        PHYSDEVOP_GET_FREE_PIRQ(PHYSDEVOP_get_free_pirq) = 23;
        PHYSDEVOP_PCI_MMCFG_RESERVED(PHYSDEVOP_pci_mmcfg_reserved) = 24;
        PHYSDEVOP_PCI_DEVICE_ADD(PHYSDEVOP_pci_device_add) = 25;
        PHYSDEVOP_PCI_DEVICE_REMOVE(PHYSDEVOP_pci_device_remove) = 26;
        PHYSDEVOP_PIRQ_EOI_GMFN_V2(PHYSDEVOP_pirq_eoi_gmfn_v2) = 28;
        PHYSDEVOP_DBGP_OP(PHYSDEVOP_dbgp_op) = 29;
        MAP_PIRQ_TYPE_MSI = 0;
        MAP_PIRQ_TYPE_GSI = 1;
        /// `PhysdevIrqStatusQuery::flags`: the guest has to say EOI.
        XENIRQSTAT_NEEDS_EOI(XENIRQSTAT_needs_eoi) = 1 << 0;
        /// `PhysdevIrqStatusQuery::flags`: shared with other guests.
        XENIRQSTAT_SHARED(XENIRQSTAT_shared) = 1 << 1;
    }
}

abi! { "physdev.h";
    /// Ends an interrupt.
    pub struct PhysdevEoi("struct physdev_eoi") [4] {
        irq: u32 = 0,
    }
    /// Asks how an interrupt has to be handled.
    pub struct PhysdevIrqStatusQuery("struct physdev_irq_status_query") [8] {
        irq: u32 = 0,
        /// Out: `XENIRQSTAT_*`.
        flags: u32 = 4,
    }
    /// Maps a GSI or an MSI to a pirq.
    pub struct PhysdevMapPirq("struct physdev_map_pirq") [40] {
        domid: u16 = 0,
        _pad0: u16 = 2,
        /// `MAP_PIRQ_TYPE_*`.
        r#type("type"): i32 = 4,
        index: i32 = 8,
        /// In or out.
        pirq: i32 = 12,
        bus: i32 = 16,
        devfn: i32 = 20,
        entry_nr: i32 = 24,
        _pad1: u32 = 28,
        table_base: u64 = 32,
    }
    /// Undoes `PhysdevMapPirq`.
    pub struct PhysdevUnmapPirq("struct physdev_unmap_pirq") [8] {
        domid: u16 = 0,
        _pad: u16 = 2,
        pirq: i32 = 4,
    }
    /// Asks for an unused pirq.
    pub struct PhysdevGetFreePirq("struct physdev_get_free_pirq") [8] {
        /// `MAP_PIRQ_TYPE_*`.
        r#type("type"): i32 = 0,
        /// Out.
        pirq: u32 = 4,
    }
}

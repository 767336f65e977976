//! `grant_table.h`: grant entries (version 1) and the operations of `__HYPERVISOR_grant_table_op`.

use crate::{Domid, PAGE_SIZE};

/// Entries of [`GrantEntryV1`] in one grant frame.
pub const GRANT_ENTRIES_PER_FRAME: u32 = (PAGE_SIZE / size_of::<GrantEntryV1>()) as u32;

consts! { "grant_table.h";
    u32 {
        GNTTABOP_MAP_GRANT_REF(GNTTABOP_map_grant_ref) = 0;
        GNTTABOP_UNMAP_GRANT_REF(GNTTABOP_unmap_grant_ref) = 1;
        GNTTABOP_SETUP_TABLE(GNTTABOP_setup_table) = 2;
        GNTTABOP_DUMP_TABLE(GNTTABOP_dump_table) = 3;
        GNTTABOP_TRANSFER(GNTTABOP_transfer) = 4;
        GNTTABOP_COPY(GNTTABOP_copy) = 5;
        GNTTABOP_QUERY_SIZE(GNTTABOP_query_size) = 6;
        GNTTABOP_UNMAP_AND_REPLACE(GNTTABOP_unmap_and_replace) = 7;
        GNTTABOP_SET_VERSION(GNTTABOP_set_version) = 8;
        GNTTABOP_GET_STATUS_FRAMES(GNTTABOP_get_status_frames) = 9;
        GNTTABOP_GET_VERSION(GNTTABOP_get_version) = 10;
        GNTTABOP_SWAP_GRANT_REF(GNTTABOP_swap_grant_ref) = 11;
        GNTTABOP_CACHE_FLUSH(GNTTABOP_cache_flush) = 12;
        /// The toolstack fills the first entries of a table.
        GNTTAB_NR_RESERVED_ENTRIES = 8;
        /// Entry of the console ring's page.
        GNTTAB_RESERVED_CONSOLE = 0;
        /// Entry of the xenstore ring's page.
        GNTTAB_RESERVED_XENSTORE = 1;
        /// Map flag: for devices (IOMMU).
        GNTMAP_DEVICE_MAP(GNTMAP_device_map) = 1 << 0;
        /// Map flag: for the CPU.
        GNTMAP_HOST_MAP(GNTMAP_host_map) = 1 << 1;
        GNTMAP_READONLY(GNTMAP_readonly) = 1 << 2;
        GNTMAP_APPLICATION_MAP(GNTMAP_application_map) = 1 << 3;
        GNTMAP_CONTAINS_PTE(GNTMAP_contains_pte) = 1 << 4;
    }
    u16 {
        /// Entry type: unused.
        GTF_INVALID(GTF_invalid) = 0;
        /// Entry type: `domid` may map or copy `frame`.
        GTF_PERMIT_ACCESS(GTF_permit_access) = 1;
        GTF_ACCEPT_TRANSFER(GTF_accept_transfer) = 2;
        /// Entry type of version 2.
        GTF_TRANSITIVE(GTF_transitive) = 3;
        GTF_TYPE_MASK(GTF_type_mask) = 3;
        /// Set by the granter: no writes.
        GTF_READONLY(GTF_readonly) = 1 << 2;
        /// Set by the hypervisor while the grant is mapped or read.
        GTF_READING(GTF_reading) = 1 << 3;
        /// Set by the hypervisor while the grant is mapped writable or written.
        GTF_WRITING(GTF_writing) = 1 << 4;
        GTF_PWT = 1 << 5;
        GTF_PCD = 1 << 6;
        GTF_PAT = 1 << 7;
        /// Version 2 only.
        GTF_SUB_PAGE(GTF_sub_page) = 1 << 8;
        /// Copy flag: the source is a grant, not a frame of the caller.
        GNTCOPY_SOURCE_GREF(GNTCOPY_source_gref) = 1 << 0;
        /// Copy flag: the destination is a grant, not a frame of the caller.
        GNTCOPY_DEST_GREF(GNTCOPY_dest_gref) = 1 << 1;
    }
    i16 {
        GNTST_OKAY(GNTST_okay) = 0;
        GNTST_GENERAL_ERROR(GNTST_general_error) = -1;
        GNTST_BAD_DOMAIN(GNTST_bad_domain) = -2;
        GNTST_BAD_GNTREF(GNTST_bad_gntref) = -3;
        GNTST_BAD_HANDLE(GNTST_bad_handle) = -4;
        GNTST_BAD_VIRT_ADDR(GNTST_bad_virt_addr) = -5;
        GNTST_BAD_DEV_ADDR(GNTST_bad_dev_addr) = -6;
        GNTST_NO_DEVICE_SPACE(GNTST_no_device_space) = -7;
        GNTST_PERMISSION_DENIED(GNTST_permission_denied) = -8;
        GNTST_BAD_PAGE(GNTST_bad_page) = -9;
        /// The copy crosses a page.
        GNTST_BAD_COPY_ARG(GNTST_bad_copy_arg) = -10;
        GNTST_ADDRESS_TOO_BIG(GNTST_address_too_big) = -11;
        GNTST_EAGAIN(GNTST_eagain) = -12;
        GNTST_NO_SPACE(GNTST_no_space) = -13;
    }
}

abi! { "grant_table.h";
    /// An entry of a version 1 grant table.
    pub struct GrantEntryV1("struct grant_entry_v1") [8] {
        /// `GTF_*`.
        flags: u16 = 0,
        /// The grantee.
        domid: u16 = 2,
        /// The granter's frame number.
        frame: u32 = 4,
    }
    /// Maps a grant.
    pub struct GnttabMapGrantRef("struct gnttab_map_grant_ref") [32] {
        host_addr: u64 = 0,
        /// `GNTMAP_*`.
        flags: u32 = 8,
        gref("ref"): u32 = 12,
        /// The granter.
        dom: u16 = 16,
        /// Out: `GNTST_*`.
        status: i16 = 18,
        /// Out.
        handle: u32 = 20,
        /// Out.
        dev_bus_addr: u64 = 24,
    }
    /// Unmaps a grant.
    pub struct GnttabUnmapGrantRef("struct gnttab_unmap_grant_ref") [24] {
        host_addr: u64 = 0,
        dev_bus_addr: u64 = 8,
        handle: u32 = 16,
        /// Out: `GNTST_*`.
        status: i16 = 20,
        _pad: u16 = 22,
    }
    /// Grows the table to `nr_frames`.
    pub struct GnttabSetupTable("struct gnttab_setup_table") [24] {
        dom: u16 = 0,
        _pad0: u16 = 2,
        nr_frames: u32 = 4,
        /// Out: `GNTST_*`.
        status: i16 = 8,
        _pad1: [u8; 6] = 10,
        /// Guest pointer to room for `nr_frames` 64-bit frame numbers.
        frame_list: u64 = 16,
    }
    /// One side of a copy.
    pub struct GnttabCopyPtr("struct gnttab_copy_ptr") [16] {
        /// The grant reference in the low 32 bits, or the caller's frame number.
        gref_or_gmfn("u"): u64 = 0,
        domid: u16 = 8,
        /// In bytes within the page.
        offset: u16 = 10,
        _pad: u32 = 12,
    }
    /// Copies within one page on each side.
    pub struct GnttabCopy("struct gnttab_copy") [40] {
        source: GnttabCopyPtr = 0,
        dest: GnttabCopyPtr = 16,
        /// In bytes.
        len: u16 = 32,
        /// `GNTCOPY_*`.
        flags: u16 = 34,
        /// Out: `GNTST_*`.
        status: i16 = 36,
        _pad: u16 = 38,
    }
    /// Asks for the table's present and greatest size.
    pub struct GnttabQuerySize("struct gnttab_query_size") [16] {
        dom: u16 = 0,
        _pad0: u16 = 2,
        /// Out.
        nr_frames: u32 = 4,
        /// Out.
        max_nr_frames: u32 = 8,
        /// Out: `GNTST_*`.
        status: i16 = 12,
        _pad1: u16 = 14,
    }
    /// Chooses the version of the entries.
    pub struct GnttabSetVersion("struct gnttab_set_version") [4] {
        /// In: 1 or 2. Out: the version in use.
        version: u32 = 0,
    }
    /// Asks for the version of the entries.
    pub struct GnttabGetVersion("struct gnttab_get_version") [8] {
        dom: u16 = 0,
        _pad("pad"): u16 = 2,
        /// Out.
        version: u32 = 4,
    }
}

impl GrantEntryV1 {
    /// `flags` and `domid` as the one 32-bit word that is read and exchanged atomically.
    pub const fn header_word(&self) -> u32 {
        self.flags as u32 | (self.domid as u32) << 16
    }

    /// The entry from its header word (see [`Self::header_word`]) and frame.
    pub const fn from_words(header: u32, frame: u32) -> Self {
        Self { flags: header as u16, domid: (header >> 16) as Domid, frame }
    }
}

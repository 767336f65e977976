//! `version.h`: the commands and answers of `__HYPERVISOR_xen_version`.

/// Bytes of the answer to [`XENVER_EXTRAVERSION`], NUL included.
pub const XEN_EXTRAVERSION_LEN: usize = 16;
/// Bytes of the answer to [`XENVER_CAPABILITIES`], NUL included.
pub const XEN_CAPABILITIES_INFO_LEN: usize = 1024;
/// Bytes of the answer to [`XENVER_CHANGESET`], NUL included.
pub const XEN_CHANGESET_INFO_LEN: usize = 64;
/// Bytes of the answer to [`XENVER_COMMANDLINE`], NUL included.
pub const XEN_COMMANDLINE_LEN: usize = 1024;

consts! { "version.h";
    u32 {
        /// Returns `major << 16 | minor`; no argument.
        XENVER_VERSION(XENVER_version) = 0;
        /// Fills `[u8; XEN_EXTRAVERSION_LEN]`.
        XENVER_EXTRAVERSION(XENVER_extraversion) = 1;
        /// Fills [`XenCompileInfo`].
        XENVER_COMPILE_INFO(XENVER_compile_info) = 2;
        /// Fills `[u8; XEN_CAPABILITIES_INFO_LEN]`.
        XENVER_CAPABILITIES(XENVER_capabilities) = 3;
        /// Fills `[u8; XEN_CHANGESET_INFO_LEN]`.
        XENVER_CHANGESET(XENVER_changeset) = 4;
        /// Fills [`XenPlatformParameters`].
        XENVER_PLATFORM_PARAMETERS(XENVER_platform_parameters) = 5;
        /// Fills [`XenFeatureInfo`] by its `submap_idx`.
        XENVER_GET_FEATURES(XENVER_get_features) = 6;
        /// Returns the page size; no argument.
        XENVER_PAGESIZE(XENVER_pagesize) = 7;
        /// Fills `[u8; 16]`: the domain's uuid.
        XENVER_GUEST_HANDLE(XENVER_guest_handle) = 8;
        /// Fills `[u8; XEN_COMMANDLINE_LEN]`.
        XENVER_COMMANDLINE(XENVER_commandline) = 9;
        /// Fills [`XenBuildId`] and the id behind it; a null argument asks for its size.
        XENVER_BUILD_ID(XENVER_build_id) = 10;
    }
}

abi! { "version.h";
    /// NUL-terminated strings about the hypervisor's build.
    pub struct XenCompileInfo("struct xen_compile_info") [144] {
        compiler: [u8; 64] = 0,
        compile_by: [u8; 16] = 64,
        compile_domain: [u8; 32] = 80,
        compile_date: [u8; 32] = 112,
    }
    /// Answer to `XENVER_platform_parameters`.
    pub struct XenPlatformParameters("struct xen_platform_parameters") [8] {
        /// The hypervisor's virtual start address.
        virt_start: u64 = 0,
    }
    /// Argument and answer of `XENVER_get_features`.
    pub struct XenFeatureInfo("struct xen_feature_info") [8] {
        /// In: which 32 features; only 0 has any.
        submap_idx: u32 = 0,
        /// Out: bit n is feature `submap_idx * 32 + n`, see [`crate::features`].
        submap: u32 = 4,
    }
    /// Head of the answer to `XENVER_build_id`; `len` bytes follow.
    pub struct XenBuildId("struct xen_build_id") [4] {
        /// In: room for bytes. Out: bytes used.
        len: u32 = 0,
    }
}

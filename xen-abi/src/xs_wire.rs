//! `io/xs_wire.h`: xenstore's wire format and the ring page of a domain.

use crate::errno;

wire_enum! { "io/xs_wire.h";
    /// `XsdSockmsg::type`.
    pub enum XsMsgType: u32 {
        Control(XS_CONTROL) = 0,
        Directory(XS_DIRECTORY) = 1,
        Read(XS_READ) = 2,
        GetPerms(XS_GET_PERMS) = 3,
        Watch(XS_WATCH) = 4,
        Unwatch(XS_UNWATCH) = 5,
        TransactionStart(XS_TRANSACTION_START) = 6,
        TransactionEnd(XS_TRANSACTION_END) = 7,
        Introduce(XS_INTRODUCE) = 8,
        Release(XS_RELEASE) = 9,
        GetDomainPath(XS_GET_DOMAIN_PATH) = 10,
        Write(XS_WRITE) = 11,
        Mkdir(XS_MKDIR) = 12,
        Rm(XS_RM) = 13,
        SetPerms(XS_SET_PERMS) = 14,
        /// Only from the server, with `req_id` and `tx_id` 0.
        WatchEvent(XS_WATCH_EVENT) = 15,
        /// Only from the server: an error's name.
        Error(XS_ERROR) = 16,
        IsDomainIntroduced(XS_IS_DOMAIN_INTRODUCED) = 17,
        Resume(XS_RESUME) = 18,
        SetTarget(XS_SET_TARGET) = 19,
        /// 20 was XS_RESTRICT and is no longer in use.
        ResetWatches(XS_RESET_WATCHES) = 21,
        DirectoryPart(XS_DIRECTORY_PART) = 22,
        GetFeature(XS_GET_FEATURE) = 23,
        SetFeature(XS_SET_FEATURE) = 24,
        GetQuota(XS_GET_QUOTA) = 25,
        SetQuota(XS_SET_QUOTA) = 26,
    }
}

abi! { "io/xs_wire.h";
    /// The header of every message; `len` bytes follow.
    pub struct XsdSockmsg("struct xsd_sockmsg") [16] {
        /// [`XsMsgType`] by number.
        r#type("type"): u32 = 0,
        /// Chosen by the client, echoed in the reply.
        req_id: u32 = 4,
        /// Transaction; 0 for none.
        tx_id: u32 = 8,
        /// Bytes that follow, at most [`XENSTORE_PAYLOAD_MAX`].
        len: u32 = 12,
    }
    /// The xenstore ring page. All indices run freely; see the `*_OFFSET` constants for access as atomics.
    pub struct XenstoreDomainInterface("struct xenstore_domain_interface") [2076] {
        /// Requests to xenstored.
        req: [u8; XENSTORE_RING_SIZE as usize] = 0,
        /// Replies and watch events.
        rsp: [u8; XENSTORE_RING_SIZE as usize] = 1024,
        req_cons: u32 = 2048,
        req_prod: u32 = 2052,
        rsp_cons: u32 = 2056,
        rsp_prod: u32 = 2060,
        /// `XENSTORE_SERVER_FEATURE_*`, set by xenstored's side at creation.
        server_features: u32 = 2064,
        /// `XENSTORE_CONNECTED` or `XENSTORE_RECONNECT`.
        connection: u32 = 2068,
        /// `XENSTORE_ERROR_*`.
        error: u32 = 2072,
    }
}

consts! { "io/xs_wire.h";
    u32 {
        /// Bytes of each of the two rings; a power of two.
        XENSTORE_RING_SIZE = 1024;
        /// Most bytes behind a header; more ends the connection.
        XENSTORE_PAYLOAD_MAX = 4096;
        /// Most bytes of an absolute path, without the NUL.
        XENSTORE_ABS_PATH_MAX = 3072;
        /// Most bytes of a relative path, without the NUL.
        XENSTORE_REL_PATH_MAX = 2048;
        /// A client may ask for a fresh connection with `XENSTORE_RECONNECT`.
        XENSTORE_SERVER_FEATURE_RECONNECTION = 1;
        /// The `error` field is in use.
        XENSTORE_SERVER_FEATURE_ERROR = 2;
        XENSTORE_CONNECTED = 0;
        /// Set by the client; the server empties the ring and sets `XENSTORE_CONNECTED`.
        XENSTORE_RECONNECT = 1;
        XENSTORE_ERROR_NONE = 0;
        /// Communication problem.
        XENSTORE_ERROR_COMM = 1;
        /// Invalid ring index.
        XENSTORE_ERROR_RINGIDX = 2;
        /// Protocol violation, such as a payload that is too long.
        XENSTORE_ERROR_PROTO = 3;
        /// Index of the path in a watch event.
        XS_WATCH_PATH = 0;
        /// Index of the token in a watch event.
        XS_WATCH_TOKEN = 1;
    }
}

/// The special watch that fires when a domain is introduced.
pub const WATCH_INTRODUCE_DOMAIN: &str = "@introduceDomain";
/// The special watch that fires when a domain is released or shuts down.
pub const WATCH_RELEASE_DOMAIN: &str = "@releaseDomain";

/// Byte offset of the request ring.
pub const XENSTORE_REQ_OFFSET: usize = core::mem::offset_of!(XenstoreDomainInterface, req);
/// Byte offset of the response ring.
pub const XENSTORE_RSP_OFFSET: usize = core::mem::offset_of!(XenstoreDomainInterface, rsp);
/// Byte offset of `req_cons`, written by xenstored.
pub const XENSTORE_REQ_CONS_OFFSET: usize = core::mem::offset_of!(XenstoreDomainInterface, req_cons);
/// Byte offset of `req_prod`, written by the client.
pub const XENSTORE_REQ_PROD_OFFSET: usize = core::mem::offset_of!(XenstoreDomainInterface, req_prod);
/// Byte offset of `rsp_cons`, written by the client.
pub const XENSTORE_RSP_CONS_OFFSET: usize = core::mem::offset_of!(XenstoreDomainInterface, rsp_cons);
/// Byte offset of `rsp_prod`, written by xenstored.
pub const XENSTORE_RSP_PROD_OFFSET: usize = core::mem::offset_of!(XenstoreDomainInterface, rsp_prod);
/// Byte offset of `server_features`.
pub const XENSTORE_FEATURES_OFFSET: usize = core::mem::offset_of!(XenstoreDomainInterface, server_features);
/// Byte offset of `connection`.
pub const XENSTORE_CONNECTION_OFFSET: usize = core::mem::offset_of!(XenstoreDomainInterface, connection);
/// Byte offset of `error`.
pub const XENSTORE_ERROR_OFFSET: usize = core::mem::offset_of!(XenstoreDomainInterface, error);

/// The errors that may travel in `XS_ERROR`, by number and name, in the header's order.
pub const XSD_ERRORS: [(i32, &str); 16] = [
    (errno::EINVAL, "EINVAL"),
    (errno::EACCES, "EACCES"),
    (errno::EEXIST, "EEXIST"),
    (errno::EISDIR, "EISDIR"),
    (errno::ENOENT, "ENOENT"),
    (errno::ENOMEM, "ENOMEM"),
    (errno::ENOSPC, "ENOSPC"),
    (errno::EIO, "EIO"),
    (errno::ENOTEMPTY, "ENOTEMPTY"),
    (errno::ENOSYS, "ENOSYS"),
    (errno::EROFS, "EROFS"),
    (errno::EBUSY, "EBUSY"),
    (errno::EAGAIN, "EAGAIN"),
    (errno::EISCONN, "EISCONN"),
    (errno::E2BIG, "E2BIG"),
    (errno::EPERM, "EPERM"),
];

/// The wire name of an error; one that the wire doesn't know is sent as `EINVAL`.
pub fn error_name(errno: i32) -> &'static str {
    XSD_ERRORS.iter().find(|(number, _)| *number == errno).map_or("EINVAL", |(_, name)| name)
}

/// The number of a wire name, or `None` if the server sent something else.
pub fn error_number(name: &str) -> Option<i32> {
    XSD_ERRORS.iter().find(|(_, known)| *known == name).map(|(number, _)| *number)
}

//! Framing of the xenstore protocol (`struct xsd_sockmsg`, io/xs_wire.h), as a client needs it.

use super::XsError;

/// Size of `struct xsd_sockmsg` in bytes.
pub(crate) const HEADER: usize = 16;
/// Largest payload in either direction (XENSTORE_PAYLOAD_MAX).
pub const PAYLOAD_MAX: usize = 4096;
/// Size of each half of a ring page in bytes (XENSTORE_RING_SIZE).
pub(crate) const RING_SIZE: u32 = 1024;

/// Byte offsets in `struct xenstore_domain_interface` (docs/misc/xenstore-ring.txt).
pub(crate) mod ring_off {
    pub(crate) const REQ: usize = 0;
    pub(crate) const RSP: usize = 1024;
    pub(crate) const REQ_CONS: usize = 2048;
    pub(crate) const REQ_PROD: usize = 2052;
    pub(crate) const RSP_CONS: usize = 2056;
    pub(crate) const RSP_PROD: usize = 2060;
    pub(crate) const FEATURES: usize = 2064;
    pub(crate) const CONNECTION: usize = 2068;
    pub(crate) const ERROR: usize = 2072;
}

/// XENSTORE_SERVER_FEATURE_RECONNECTION.
pub(crate) const FEATURE_RECONNECTION: u32 = 1;
/// XENSTORE_SERVER_FEATURE_ERROR.
pub(crate) const FEATURE_ERROR: u32 = 2;
/// XENSTORE_CONNECTED.
pub(crate) const CONNECTED: u32 = 0;
/// XENSTORE_RECONNECT.
pub(crate) const RECONNECT: u32 = 1;

/// Message types a client sends or gets (`enum xsd_sockmsg_type`, io/xs_wire.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum Op {
    Control = 0,
    Directory = 1,
    Read = 2,
    GetPerms = 3,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    Introduce = 8,
    Release = 9,
    GetDomainPath = 10,
    Write = 11,
    Mkdir = 12,
    Rm = 13,
    SetPerms = 14,
    WatchEvent = 15,
    Error = 16,
    IsDomainIntroduced = 17,
    Resume = 18,
    SetTarget = 19,
    ResetWatches = 21,
    DirectoryPart = 22,
    GetFeature = 23,
    SetFeature = 24,
    GetQuota = 25,
    SetQuota = 26,
}

/// A decoded header: host byte order, unchecked beyond its length field.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) kind: u32,
    pub(crate) req_id: u32,
    pub(crate) len: usize,
}

/// Decodes the header at the start of `bytes`; `None` while it is incomplete.
///
/// # Errors
/// A payload length over [`PAYLOAD_MAX`] is a protocol violation.
pub(crate) fn decode(bytes: &[u8]) -> Result<Option<Header>, XsError> {
    let Some(head) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let word = |i: usize| u32::from_ne_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
    let len = word(12) as usize;
    if len > PAYLOAD_MAX {
        return Err(XsError::Protocol("reply longer than XENSTORE_PAYLOAD_MAX"));
    }
    Ok(Some(Header { kind: word(0), req_id: word(4), len }))
}

/// Encodes one request whose payload is the concatenation of `parts`.
///
/// # Errors
/// [`XsError::TooLong`] when the payload exceeds [`PAYLOAD_MAX`]: the server would drop the connection.
pub(crate) fn encode(op: Op, req_id: u32, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
    let len: usize = parts.iter().map(|p| p.len()).sum();
    if len > PAYLOAD_MAX {
        return Err(XsError::TooLong(len));
    }
    let mut out = Vec::with_capacity(HEADER + len);
    for word in [op as u32, req_id, tx_id, len as u32] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    for part in parts {
        out.extend_from_slice(part);
    }
    Ok(out)
}

//! The xenstore wire format (io/xs_wire.h) as the server sees it: everything from a client is checked here.
#![forbid(unsafe_code)]

use xen_abi::xs_wire::{XENSTORE_PAYLOAD_MAX, XsMsgType, XsdSockmsg};

/// Bytes of a message header.
pub const HEADER: usize = size_of::<XsdSockmsg>();
/// Most bytes behind a header.
pub const PAYLOAD_MAX: usize = XENSTORE_PAYLOAD_MAX as usize;

/// Errors that a request can be answered with (the names of io/xs_wire.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, clippy::upper_case_acronyms)]
pub enum Errno {
    #[error("EINVAL")]
    EINVAL,
    #[error("EACCES")]
    EACCES,
    #[error("EEXIST")]
    EEXIST,
    #[error("ENOENT")]
    ENOENT,
    #[error("ENOSPC")]
    ENOSPC,
    #[error("ENOSYS")]
    ENOSYS,
    #[error("EBUSY")]
    EBUSY,
    #[error("EAGAIN")]
    EAGAIN,
    #[error("E2BIG")]
    E2BIG,
    #[error("EPERM")]
    EPERM,
    #[error("ENOMEM")]
    ENOMEM,
}

impl Errno {
    /// The name on the wire, with its nul.
    pub fn payload(self) -> &'static [u8] {
        match self {
            Self::EINVAL => b"EINVAL\0",
            Self::EACCES => b"EACCES\0",
            Self::EEXIST => b"EEXIST\0",
            Self::ENOENT => b"ENOENT\0",
            Self::ENOSPC => b"ENOSPC\0",
            Self::ENOSYS => b"ENOSYS\0",
            Self::EBUSY => b"EBUSY\0",
            Self::EAGAIN => b"EAGAIN\0",
            Self::E2BIG => b"E2BIG\0",
            Self::EPERM => b"EPERM\0",
            Self::ENOMEM => b"ENOMEM\0",
        }
    }
}

/// A message header, copied out once. `len` is checked by [`Header::decode`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Message type as sent; may be none of [`XsMsgType`].
    pub kind: u32,
    /// Echoed in the reply.
    pub req_id: u32,
    /// Transaction, 0 for none.
    pub tx_id: u32,
    /// Payload bytes, at most [`PAYLOAD_MAX`].
    pub len: usize,
}

/// The payload length is over the limit: the connection is to be killed (docs/misc/xenstore.txt).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong(pub u32);

impl Header {
    /// Decodes a header.
    ///
    /// # Errors
    /// [`TooLong`] when the payload would exceed [`PAYLOAD_MAX`].
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, TooLong> {
        let word = |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let len = word(12);
        if len > XENSTORE_PAYLOAD_MAX {
            return Err(TooLong(len));
        }
        Ok(Self { kind: word(0), req_id: word(4), tx_id: word(8), len: len as usize })
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        for (i, word) in [self.kind, self.req_id, self.tx_id, self.len as u32].into_iter().enumerate() {
            out[4 * i..4 * i + 4].copy_from_slice(&word.to_ne_bytes());
        }
        out
    }

    /// The request's type, or `None` if there is no such request.
    pub fn op(&self) -> Option<XsMsgType> {
        XsMsgType::from_raw(self.kind).filter(|op| !matches!(op, XsMsgType::WatchEvent | XsMsgType::Error))
    }
}

/// Iterates over the nul-terminated strings of a payload. Bytes after the last nul are not a string.
pub fn strings(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        let end = rest.iter().position(|b| *b == 0)?;
        let (head, tail) = rest.split_at(end);
        rest = &tail[1..];
        Some(head)
    })
}

/// The payload's only string: exactly one nul, at the end.
///
/// # Errors
/// EINVAL otherwise.
pub fn one_string(payload: &[u8]) -> Result<&[u8], Errno> {
    match payload.split_last() {
        Some((0, text)) if !text.contains(&0) => Ok(text),
        _ => Err(Errno::EINVAL),
    }
}

/// Parses a decimal number that fills `text`.
///
/// # Errors
/// EINVAL when it is empty, not all digits or out of range.
pub fn decimal<T: std::str::FromStr>(text: &[u8]) -> Result<T, Errno> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Err(Errno::EINVAL);
    }
    std::str::from_utf8(text).ok().and_then(|s| s.parse().ok()).ok_or(Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_leftovers() {
        assert_eq!(strings(b"a\0\0b\0rest").collect::<Vec<_>>(), [&b"a"[..], b"", b"b"]);
        assert_eq!(strings(b"").count(), 0);
        assert_eq!(one_string(b"x\0"), Ok(&b"x"[..]));
        for bad in [&b""[..], b"x", b"x\0y\0", b"x\0\0"] {
            assert_eq!(one_string(bad), Err(Errno::EINVAL));
        }
        assert_eq!(one_string(b"\0"), Ok(&b""[..]));
        assert_eq!(decimal::<u16>(b"65535"), Ok(65535));
        for bad in [&b""[..], b"65536", b"-1", b"+1", b" 1", b"1x"] {
            assert_eq!(decimal::<u16>(bad), Err(Errno::EINVAL));
        }
    }

    #[test]
    fn header_length_is_checked() {
        let head = Header { kind: 2, req_id: 7, tx_id: 0, len: PAYLOAD_MAX };
        assert_eq!(Header::decode(&head.encode()), Ok(head));
        let long = Header { len: PAYLOAD_MAX + 1, ..head };
        assert_eq!(Header::decode(&long.encode()), Err(TooLong(4097)));
    }
}

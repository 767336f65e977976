//! What can go wrong in a call to the store.

use std::time::Duration;

/// An error name that the server answered with (`xsd_errors`, io/xs_wire.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, clippy::upper_case_acronyms)]
pub enum XsErrno {
    EINVAL,
    EACCES,
    EEXIST,
    EISDIR,
    ENOENT,
    ENOMEM,
    ENOSPC,
    EIO,
    ENOTEMPTY,
    ENOSYS,
    EROFS,
    EBUSY,
    EAGAIN,
    EISCONN,
    E2BIG,
    EPERM,
    /// A name that io/xs_wire.h does not list.
    Unknown,
}

impl XsErrno {
    /// Reads the payload of an ERROR reply, with or without its trailing nul.
    pub(crate) fn from_payload(payload: &[u8]) -> Self {
        let name = payload.split(|b| *b == 0).next().unwrap_or_default();
        match name {
            b"EINVAL" => Self::EINVAL,
            b"EACCES" => Self::EACCES,
            b"EEXIST" => Self::EEXIST,
            b"EISDIR" => Self::EISDIR,
            b"ENOENT" => Self::ENOENT,
            b"ENOMEM" => Self::ENOMEM,
            b"ENOSPC" => Self::ENOSPC,
            b"EIO" => Self::EIO,
            b"ENOTEMPTY" => Self::ENOTEMPTY,
            b"ENOSYS" => Self::ENOSYS,
            b"EROFS" => Self::EROFS,
            b"EBUSY" => Self::EBUSY,
            b"EAGAIN" => Self::EAGAIN,
            b"EISCONN" => Self::EISCONN,
            b"E2BIG" => Self::E2BIG,
            b"EPERM" => Self::EPERM,
            _ => Self::Unknown,
        }
    }
}

/// The outcome of a failed call.
#[derive(Debug, thiserror::Error)]
pub enum XsError {
    /// The server answered with an error.
    #[error("xenstore answered {0:?}")]
    Errno(XsErrno),
    /// No answer within the deadline. The request may still take effect.
    #[error("xenstore did not answer within {0:?}")]
    Timeout(Duration),
    /// The connection went away before the answer came. The request may have taken effect.
    #[error("connection to xenstore lost")]
    Disconnected,
    /// The server broke the protocol; the connection is reset.
    #[error("xenstore broke the protocol: {0}")]
    Protocol(&'static str),
    /// The server put the ring in its error state (docs/misc/xenstore-ring.txt), with this code.
    #[error("xenstore stopped the ring, error indicator {0}")]
    RingError(u32),
    /// The request's payload is longer than the protocol allows (bytes).
    #[error("request of {0} bytes is longer than xenstore takes")]
    TooLong(usize),
    /// A path, token or permission holds a nul byte.
    #[error("a nul byte inside a string")]
    Nul,
    /// The client was shut down.
    #[error("this xenstore client is closed")]
    Closed,
    /// Input or output on the socket or the event fds failed.
    #[error("xenstore transport: {0}")]
    Io(#[from] std::io::Error),
}

impl XsError {
    /// Whether the server answered with `errno`.
    pub fn is(&self, errno: XsErrno) -> bool {
        matches!(self, Self::Errno(e) if *e == errno)
    }

    /// Whether the node does not exist.
    pub fn is_not_found(&self) -> bool {
        self.is(XsErrno::ENOENT)
    }
}

impl From<nix::errno::Errno> for XsError {
    fn from(e: nix::errno::Errno) -> Self {
        Self::Io(e.into())
    }
}

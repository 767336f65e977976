//! Xen's error numbers as a type (xen/include/public/errno.h).

/// An error of a hypercall; positive, as in the header. The guest gets it negated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Xen error {0}")]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident)*) => {
        #[allow(missing_docs, reason = "the names are those of the header")]
        impl Errno { $(pub const $name: Self = Self(xen_abi::errno::$name);)* }
    };
}

errnos! {
    EPERM ENOENT ESRCH EIO ENXIO E2BIG EAGAIN ENOMEM EFAULT EBUSY EEXIST EINVAL ENOSPC ENOSYS EOPNOTSUPP ENODEV ENODATA ETIME
}

impl Errno {
    /// What goes into the guest's register.
    pub fn to_guest(self) -> i64 {
        -i64::from(self.0)
    }
}

impl From<nix::errno::Errno> for Errno {
    /// Linux's and Xen's numbers are the same on x86.
    fn from(e: nix::errno::Errno) -> Self {
        Self(e as i32)
    }
}

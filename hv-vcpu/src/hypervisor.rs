//! What a PVH domain asks of hv-core, as a trait: `domain` speaks it over the hypercall socket, `lone` answers by
//! itself.

use crate::errno::Errno;
use std::os::fd::OwnedFd;

/// A port towards another domain, with its two eventfds.
#[derive(Debug)]
pub struct PortFds {
    /// The port's number in this domain.
    pub port: u32,
    /// Becomes readable when the peer notifies.
    pub rx: OwnedFd,
    /// Write 1 to notify the peer.
    pub tx: OwnedFd,
}

/// A port's state as hv-core knows it (`EVTCHNSTAT_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortStatus {
    /// Free.
    Closed,
    /// Waits for `remote` to bind.
    Unbound {
        /// The domain that may bind.
        remote: u16,
    },
    /// Bound to a peer's port.
    Interdomain {
        /// The peer.
        remote: u16,
        /// The peer's port.
        remote_port: u32,
    },
    /// A VIRQ or IPI of this domain.
    Local,
}

/// Why a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownReason {
    /// The guest turned itself off.
    Poweroff,
    /// The guest wants to start again.
    Reboot,
    /// The guest wants to be saved.
    Suspend,
    /// The guest crashed, or did what a machine can't survive.
    Crash,
    /// The guest's watchdog ran out.
    Watchdog,
}

impl ShutdownReason {
    /// From `SHUTDOWN_*` of xen/include/public/sched.h. A soft reset is a crash here: there is no one to do it.
    pub fn from_raw(reason: u32) -> Self {
        use xen_abi::sched::*;
        match reason {
            SHUTDOWN_POWEROFF => Self::Poweroff,
            SHUTDOWN_REBOOT => Self::Reboot,
            SHUTDOWN_SUSPEND => Self::Suspend,
            SHUTDOWN_WATCHDOG => Self::Watchdog,
            _ => Self::Crash,
        }
    }

    /// The number in the header.
    pub fn raw(self) -> u32 {
        use xen_abi::sched::*;
        match self {
            Self::Poweroff => SHUTDOWN_POWEROFF,
            Self::Reboot => SHUTDOWN_REBOOT,
            Self::Suspend => SHUTDOWN_SUSPEND,
            Self::Crash => SHUTDOWN_CRASH,
            Self::Watchdog => SHUTDOWN_WATCHDOG,
        }
    }

    /// The exit status of hv-vcpu: 0 for power off, else 10 plus the number in the header. 1 is an error of the
    /// runner, 2 a wrong command line.
    pub fn exit_code(self) -> i32 {
        if self == Self::Poweroff { 0 } else { 10 + self.raw() as i32 }
    }
}

/// hv-core, as this domain sees it. Port numbers come from here alone, so they are unique in the domain.
pub trait Hypervisor: Send + Sync {
    /// This domain's id.
    fn domid(&self) -> u16;
    /// Makes a port that `remote` may bind. The eventfds exist at once.
    fn alloc_unbound(&self, remote: u16) -> Result<PortFds, Errno>;
    /// Binds to `remote_port` of `remote`.
    fn bind_interdomain(&self, remote: u16, remote_port: u32) -> Result<PortFds, Errno>;
    /// Takes a port number for a VIRQ (`Some`) or an IPI of this domain's vCPU `vcpu`.
    fn alloc_local(&self, virq: Option<u32>, vcpu: u32) -> Result<u32, Errno>;
    /// Closes a port.
    fn close(&self, port: u32) -> Result<(), Errno>;
    /// A port's state.
    fn status(&self, port: u32) -> Result<PortStatus, Errno>;
    /// Bytes that the guest prints by `console_io` or port 0xe9.
    fn emergency_console(&self, bytes: &[u8]);
}

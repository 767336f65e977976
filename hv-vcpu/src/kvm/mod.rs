//! KVM: checking that it can run a Xen guest, making the VM, and the calls of [`Platform`](crate::platform::Platform).

pub mod ioctl;
pub mod look;
mod platform;
mod setup;
pub mod vcpu;

pub use platform::KvmPlatform;
pub use setup::{Vm, check_hardware, check_xen, create, pvh_entry};

/// Why there can be no guest on this machine. Each text names what is missing and the ways out.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no KVM device.
    #[error(
        "/dev/kvm can't be opened ({0}): load kvm_intel or kvm_amd and allow access, or use the lab \
         (`cargo xtask lab`)"
    )]
    NoDevice(std::io::Error),
    /// The CPU has neither VMX nor SVM.
    #[error(
        "no hardware virtualization (the CPU shows neither vmx nor svm): enable it in the firmware or the outer \
         hypervisor, use the lab (`cargo xtask lab`), or run the guest by qemu-bridge"
    )]
    NoHardware,
    /// KVM is built without Xen support.
    #[error(
        "KVM has no Xen support (KVM_CAP_XEN_HVM; the kernel needs CONFIG_KVM_XEN=y, as in Debian 13): boot such a \
         kernel, use the lab (`cargo xtask lab`), or run the guest by qemu-bridge"
    )]
    NoXen,
    /// KVM's Xen support is too old.
    #[error(
        "KVM's Xen support lacks {0}: boot Linux 5.19 or newer (Debian 13 has 6.12), use the lab \
         (`cargo xtask lab`), or run the guest by qemu-bridge"
    )]
    OldXen(&'static str),
    /// KVM refused a call.
    #[error("KVM refuses {what}: {errno}; see the kernel's log")]
    Call {
        /// Which call.
        what: &'static str,
        /// Its error.
        errno: nix::errno::Errno,
    },
    /// A vCPU's thread could not be started.
    #[error("a vCPU's thread can't be started: {0}; raise the limit of processes")]
    Thread(std::io::Error),
}

/// Turns the errors of `kvm-ioctls` into ours.
pub(crate) fn call(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |e| KvmError::Call { what, errno: nix::errno::Errno::from_raw(e.errno()) }
}

/// The same for calls made by this crate.
pub(crate) fn own_call(what: &'static str) -> impl FnOnce(nix::errno::Errno) -> KvmError {
    move |errno| KvmError::Call { what, errno }
}

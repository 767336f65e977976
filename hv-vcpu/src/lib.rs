//! The parts of `hv-vcpu`, which runs one unmodified PVH guest on KVM with Xen's guest ABI.
//!
//! | module | what |
//! |---|---|
//! | [`kernel`] | ELF and bzImage kernels into guest RAM |
//! | [`layout`], [`boot`], [`acpi`], [`cpuid`] | what the guest finds when it starts |
//! | [`mem`] | guest-physical memory (holds `unsafe`) |
//! | [`hypercall`] | the hypercalls, over [`platform`] and [`hypervisor`] |
//! | [`kvm`] | [`platform`] by KVM, the vCPUs' threads (`kvm::ioctl` holds `unsafe`) |
//! | [`domain`], [`lone`] | [`hypervisor`] by the hypercall socket, and without hv-core |
//! | [`run`] | from a configuration to a guest's end |

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod domain;
pub mod errno;
pub mod hypercall;
pub mod hypervisor;
pub mod kernel;
pub mod kvm;
pub mod layout;
pub mod lone;
pub mod mem;
pub mod platform;
pub mod run;
pub mod state;

//! From a configuration to a running guest to its end.

use crate::boot;
use crate::hypercall::Guest;
use crate::hypervisor::Hypervisor;
use crate::kernel::{self, KernelError};
use crate::kvm::vcpu::{self, End};
use crate::kvm::{self, KvmError, KvmPlatform};
use crate::layout::{self, Layout};
use crate::mem::{self, GuestMemory, MemError, PAGE_SIZE, SharedPages};
use crate::state::State;
use kvm_ioctls::{Kvm, VcpuFd};
use std::fs::File;
use std::sync::{Mutex, mpsc};
use xen_abi::grant_table::{GNTTAB_RESERVED_CONSOLE, GNTTAB_RESERVED_XENSTORE, GTF_PERMIT_ACCESS};
use xen_abi::hvm::*;
use zerocopy::IntoBytes;

/// The most vCPUs of a guest.
pub const MAX_VCPUS: u32 = 8;

/// Why a guest could not be started.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// About KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// About the kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// About memory.
    #[error(transparent)]
    Memory(#[from] MemError),
    /// The initrd can't be read.
    #[error("initrd can't be read: {0}; check the path and its permissions")]
    Initrd(std::io::Error),
    /// The initrd does not fit.
    #[error("initrd of {0} bytes does not fit beside the kernel in {1} MiB; raise `memory`")]
    InitrdTooLarge(u64, u64),
    /// The command line is too long.
    #[error("command line has {0} bytes, a kernel takes {max}; shorten it", max = layout::CMDLINE_MAX - 1)]
    Cmdline(usize),
    /// The command line has a NUL byte.
    #[error("command line has a NUL byte; remove it")]
    CmdlineNul,
    /// A number of vCPUs that can't be.
    #[error("{0} vCPUs are not possible; give 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    /// An amount of memory that can't be.
    #[error(
        "{0} bytes of memory are not possible; give a multiple of 4 KiB from {min} MiB to {max} MiB",
        min = layout::MIN_MEMORY >> 20,
        max = layout::MAX_MEMORY >> 20
    )]
    MemorySize(u64),
    /// A ring could not be set up.
    #[error("the guest's {0} ring can't be set up: {1}")]
    Ring(&'static str, crate::errno::Errno),
    /// A thread could not be started.
    #[error("a thread can't be started: {0}; raise the limit of processes")]
    Thread(#[from] std::io::Error),
}

/// What guest to run.
pub struct Config {
    /// The kernel image.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
    /// How many vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// The domain's uuid.
    pub uuid: [u8; 16],
}

impl Config {
    /// Checks the numbers.
    pub fn check(&self) -> Result<(), RunError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(RunError::Vcpus(self.vcpus));
        }
        let range = layout::MIN_MEMORY..=layout::MAX_MEMORY;
        if !range.contains(&self.memory) || !self.memory.is_multiple_of(PAGE_SIZE) {
            return Err(RunError::MemorySize(self.memory));
        }
        if self.cmdline.len() as u64 >= layout::CMDLINE_MAX {
            return Err(RunError::Cmdline(self.cmdline.len()));
        }
        if self.cmdline.contains('\0') {
            return Err(RunError::CmdlineNul);
        }
        Ok(())
    }
}

/// A guest whose vCPUs have not started yet.
pub struct Prepared {
    /// The guest.
    pub guest: &'static Guest,
    platform: &'static KvmPlatform,
    vcpus: Vec<&'static mut VcpuFd>,
}

/// Which of the guest's two rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// The xenstore ring.
    Store,
    /// The console ring.
    Console,
}

/// Makes the guest's VM, without anything in its memory yet. Memory, tables and the guest itself are leaked: the
/// process ends with its guest.
pub fn prepare(
    kvm: &Kvm,
    config: &Config,
    mem: &'static GuestMemory,
    grants: &'static SharedPages,
    hv: &'static dyn Hypervisor,
) -> Result<Prepared, RunError> {
    config.check()?;
    let shared_info: &'static SharedPages = Box::leak(Box::new(SharedPages::new("shared-info", 1)?));
    let vm = kvm::create(kvm, mem, shared_info, config.vcpus, hv.domid())?;
    let platform: &'static KvmPlatform = Box::leak(Box::new(vm.platform));
    let guest = Box::leak(Box::new(Guest {
        mem,
        shared_info,
        grants,
        layout: Layout::new(config.memory),
        vcpus: config.vcpus,
        uuid: config.uuid,
        platform,
        hv,
        state: Mutex::new(State::new(config.vcpus)),
    }));
    tracing::debug!(vcpus = config.vcpus, "VM made");
    Ok(Prepared { guest, platform, vcpus: vm.vcpus })
}

impl Prepared {
    /// Grants a ring's page to `peer`, allocates its port, and tells the guest. Returns (grant reference, port).
    pub fn add_ring(&self, ring: Ring, peer: u16) -> Result<(u32, u32), RunError> {
        let layout = &self.guest.layout;
        let (name, gref, gfn, pfn_param, port_param) = match ring {
            Ring::Store => (
                "xenstore",
                GNTTAB_RESERVED_XENSTORE,
                layout.store_gfn(),
                HVM_PARAM_STORE_PFN,
                HVM_PARAM_STORE_EVTCHN,
            ),
            Ring::Console => (
                "console",
                GNTTAB_RESERVED_CONSOLE,
                layout.console_gfn(),
                HVM_PARAM_CONSOLE_PFN,
                HVM_PARAM_CONSOLE_EVTCHN,
            ),
        };
        let entry =
            xen_abi::grant_table::GrantEntryV1 { flags: GTF_PERMIT_ACCESS, domid: peer, frame: gfn as u32 };
        let at = u64::from(gref) * size_of_val(&entry) as u64;
        self.guest
            .grants
            .write(at, entry.as_bytes())
            .ok_or(RunError::Ring(name, crate::errno::Errno::ENOSPC))?;
        let port = self
            .guest
            .hv
            .alloc_unbound(peer)
            .and_then(|fds| self.guest.add_remote(fds))
            .map_err(|e| RunError::Ring(name, e))?;
        self.guest.set_param(pfn_param, gfn);
        self.guest.set_param(port_param, port.into());
        Ok((gref, port))
    }

    /// Loads the kernel and what it finds beside it, and puts the boot vCPU at the kernel's entry.
    pub fn load(&self, config: &Config) -> Result<(), RunError> {
        let (mem, layout) = (self.guest.mem, &self.guest.layout);
        let loaded = {
            let image = kernel::read_image(&config.kernel)?;
            kernel::load(&image, mem, layout::KERNEL_LOW, layout.usable_low_end())?
        };
        tracing::debug!(entry = loaded.entry, start = loaded.start, end = loaded.end, "kernel loaded");
        let initrd = match &config.initrd {
            None => None,
            Some(file) => {
                let len = file.metadata().map_err(RunError::Initrd)?.len();
                let at = layout
                    .initrd_gpa(len, loaded.end)
                    .ok_or(RunError::InitrdTooLarge(len, config.memory >> 20))?;
                mem.load_file(at, file, len).map_err(|e| match e {
                    MemError::Read(e) => RunError::Initrd(e),
                    e => RunError::Memory(e),
                })?;
                (len > 0).then_some((at, len))
            }
        };
        // What unpacking needed is given back before the guest starts.
        mem::trim_heap();
        let start_info = boot::write_start_info(mem, layout, &config.cmdline, initrd, config.vcpus as u8)?;
        if let Some(boot_vcpu) = self.vcpus.first() {
            kvm::pvh_entry(boot_vcpu, loaded.entry, start_info)?;
        }
        Ok(())
    }

    /// Runs the guest to its end.
    pub fn run(self) -> Result<End, RunError> {
        kvm::ioctl::install_kick_handler()
            .map_err(|errno| KvmError::Call { what: "a signal handler", errno })?;
        let (guest, platform) = (self.guest, self.platform);
        kvm::look::serve_signal(guest, platform)?;
        let (sender, ends) = mpsc::channel();
        for (id, vcpu) in self.vcpus.into_iter().enumerate() {
            let sender = sender.clone();
            std::thread::Builder::new().name(format!("vcpu{id}")).stack_size(256 << 10).spawn(move || {
                if let Some(end) = vcpu::run(id as u32, vcpu, guest, platform) {
                    platform.stop();
                    let _ = sender.send(end);
                }
            })?;
        }
        drop(sender);
        ends.recv().map_err(|_| std::io::Error::other("every vCPU's thread ended without a reason").into())
    }
}

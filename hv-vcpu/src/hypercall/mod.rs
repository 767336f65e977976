//! The hypercalls of a PVH guest. Numbers, pointers and structs in a call are allegations of the guest; every
//! handler copies its argument once, judges the copy, and answers with an error number of Xen's.

mod evtchn;
mod grant;
mod hvm;
mod memory;
mod sched;
mod vcpu;
mod version;

use crate::errno::Errno;
use crate::hypervisor::{Hypervisor, ShutdownReason};
use crate::layout::Layout;
use crate::mem::{GuestMemory, PAGE_SIZE, SharedPages};
use crate::platform::{GuestCpu, Platform};
use crate::state::State;
use std::sync::{Mutex, MutexGuard};
use xen_abi::xen::*;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Result of a handler: what goes to the guest's register, or an error number.
pub(crate) type Answer = Result<i64, Errno>;

/// The most entries of an array argument that one call looks at. Calls that may stop early return how far they
/// got; the others refuse.
const MAX_BATCH: u64 = 1 << 16;

/// One hypercall as KVM reports it.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// The hypercall number.
    pub nr: u64,
    /// Its arguments.
    pub args: [u64; 6],
    /// The privilege level of the caller.
    pub cpl: u32,
    /// Whether the vCPU was in 64-bit mode.
    pub long_mode: bool,
}

/// What becomes of the vCPU after a hypercall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on with this in rax.
    Return(i64),
    /// The guest ends.
    Shutdown(ShutdownReason),
}

/// One guest: its memory, its state, and the ways to KVM and to hv-core.
pub struct Guest {
    /// Guest RAM.
    pub mem: &'static GuestMemory,
    /// The shared info page.
    pub shared_info: &'static SharedPages,
    /// The grant table, all frames that there can be.
    pub grants: &'static SharedPages,
    /// The memory map.
    pub layout: Layout,
    /// How many vCPUs there are.
    pub vcpus: u32,
    /// The domain's uuid.
    pub uuid: [u8; 16],
    /// KVM.
    pub platform: &'static dyn Platform,
    /// hv-core.
    pub hv: &'static dyn Hypervisor,
    /// Everything else.
    pub state: Mutex<State>,
}

impl Guest {
    /// The state; a thread that died with it locked left it consistent enough to end the guest.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes the hypercall `call` of `cpu`.
    pub fn hypercall(&self, cpu: &dyn GuestCpu, call: &Call) -> Outcome {
        if call.cpl != 0 {
            return Outcome::Return(Errno::EPERM.to_guest());
        }
        if !call.long_mode {
            // Structs have another layout there; no 32-bit guest is supported.
            return Outcome::Return(Errno::ENOSYS.to_guest());
        }
        if call.nr == HYPERVISOR_SCHED_OP {
            return match self.sched_op(cpu, call.args[0], call.args[1]) {
                Ok(outcome) => outcome,
                Err(e) => self.answer(cpu, call, Err(e)),
            };
        }
        let answer = match call.nr {
            HYPERVISOR_MULTICALL => self.multicall(cpu, call.args[0], call.args[1]),
            _ => self.dispatch(cpu, call.nr, &call.args),
        };
        self.answer(cpu, call, answer)
    }

    fn answer(&self, cpu: &dyn GuestCpu, call: &Call, answer: Answer) -> Outcome {
        if let Err(e) = answer {
            tracing::debug!(
                vcpu = cpu.id(),
                nr = call.nr,
                op = call.args[0],
                error = xen_abi::errno::name(e.0).unwrap_or("?"),
                "hypercall refused"
            );
        }
        Outcome::Return(answer.unwrap_or_else(Errno::to_guest))
    }

    fn dispatch(&self, cpu: &dyn GuestCpu, nr: u64, args: &[u64; 6]) -> Answer {
        match nr {
            HYPERVISOR_XEN_VERSION => self.xen_version(cpu, args[0], args[1]),
            HYPERVISOR_MEMORY_OP => self.memory_op(cpu, args[0], args[1]),
            HYPERVISOR_EVENT_CHANNEL_OP => self.event_channel_op(cpu, args[0], args[1]),
            HYPERVISOR_HVM_OP => self.hvm_op(cpu, args[0], args[1]),
            HYPERVISOR_GRANT_TABLE_OP => self.grant_table_op(cpu, args[0], args[1], args[2]),
            HYPERVISOR_VCPU_OP => self.vcpu_op(cpu, args[0], args[1], args[2]),
            HYPERVISOR_SET_TIMER_OP => self.set_timer(cpu, cpu.id(), args[0]),
            HYPERVISOR_VM_ASSIST => self.vm_assist(args[0], args[1]),
            HYPERVISOR_CONSOLE_IO => self.console_io(cpu, args[0], args[1], args[2]),
            HYPERVISOR_PHYSDEV_OP => physdev_op(args[0]),
            // The toolstack's and dom0's own: never a guest's.
            HYPERVISOR_PLATFORM_OP
            | HYPERVISOR_SYSCTL
            | HYPERVISOR_DOMCTL
            | HYPERVISOR_KEXEC_OP
            | HYPERVISOR_DM_OP
            | HYPERVISOR_HYPFS_OP => Err(Errno::EPERM),
            _ => Err(Errno::ENOSYS),
        }
    }

    /// xen/include/public/xen.h, `multicall_entry`: each call's result goes to its entry. Calls that don't return,
    /// and multicalls within, are refused.
    fn multicall(&self, cpu: &dyn GuestCpu, list: u64, count: u64) -> Answer {
        let count = count as u32 as u64;
        if count > MAX_BATCH {
            return Err(Errno::E2BIG);
        }
        for i in 0..count {
            let at = list.wrapping_add(i * size_of::<MulticallEntry>() as u64);
            let entry: MulticallEntry = self.fetch(cpu, at)?;
            let result = match entry.op {
                HYPERVISOR_MULTICALL => Err(Errno::EINVAL),
                nr => self.dispatch(cpu, nr, &entry.args),
            };
            let result = result.unwrap_or_else(Errno::to_guest);
            self.copy_out(cpu, at + 8, &result.to_le_bytes())?;
        }
        Ok(0)
    }

    /// xen/include/public/xen.h, `vm_assist`.
    fn vm_assist(&self, cmd: u64, kind: u64) -> Answer {
        let on = match cmd as u32 {
            VMASST_CMD_ENABLE => true,
            VMASST_CMD_DISABLE => false,
            _ => return Err(Errno::ENOSYS),
        };
        if kind as u32 != VMASST_TYPE_RUNSTATE_UPDATE_FLAG {
            return Err(Errno::EINVAL);
        }
        self.platform.set_runstate_update_flag(on)?;
        Ok(0)
    }

    /// xen/include/public/xen.h, `console_io`: what the guest writes goes to the log; there is nothing to read.
    fn console_io(&self, cpu: &dyn GuestCpu, cmd: u64, count: u64, buffer: u64) -> Answer {
        match cmd as u32 {
            xen_abi::console::CONSOLEIO_WRITE => {
                let count = count as u32 as u64;
                if count > MAX_BATCH {
                    return Err(Errno::E2BIG);
                }
                let mut chunk = [0u8; 256];
                let mut done = 0;
                while done < count {
                    let n = (count - done).min(chunk.len() as u64) as usize;
                    self.copy_in(cpu, buffer.wrapping_add(done), &mut chunk[..n])?;
                    self.hv.emergency_console(&chunk[..n]);
                    done += n as u64;
                }
                Ok(0)
            }
            xen_abi::console::CONSOLEIO_READ => Ok(0),
            _ => Err(Errno::ENOSYS),
        }
    }

    /// Copies `buf.len()` bytes from the guest's linear address `from`, page by page.
    pub(crate) fn copy_in(&self, cpu: &dyn GuestCpu, from: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let mut at = from;
        let mut rest = buf;
        while !rest.is_empty() {
            let (gpa, n) = piece(cpu, at, rest.len())?;
            let (now, later) = rest.split_at_mut(n);
            self.mem.read(gpa, now).map_err(|_| Errno::EFAULT)?;
            rest = later;
            at = at.checked_add(n as u64).ok_or(Errno::EFAULT)?;
        }
        Ok(())
    }

    /// Copies `buf` to the guest's linear address `to`, page by page.
    pub(crate) fn copy_out(&self, cpu: &dyn GuestCpu, to: u64, buf: &[u8]) -> Result<(), Errno> {
        let mut at = to;
        let mut rest = buf;
        while !rest.is_empty() {
            let (gpa, n) = piece(cpu, at, rest.len())?;
            let (now, later) = rest.split_at(n);
            self.mem.write(gpa, now).map_err(|_| Errno::EFAULT)?;
            rest = later;
            at = at.checked_add(n as u64).ok_or(Errno::EFAULT)?;
        }
        Ok(())
    }

    /// Copies a struct in.
    pub(crate) fn fetch<T: FromBytes + FromZeros + IntoBytes>(
        &self,
        cpu: &dyn GuestCpu,
        from: u64,
    ) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.copy_in(cpu, from, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Copies a struct out.
    pub(crate) fn put<T: IntoBytes + Immutable + KnownLayout>(
        &self,
        cpu: &dyn GuestCpu,
        to: u64,
        value: &T,
    ) -> Result<(), Errno> {
        self.copy_out(cpu, to, value.as_bytes())
    }

    /// `Ok` if `domid` names this domain: a guest may do nothing to another one.
    pub(crate) fn check_self(&self, domid: u16) -> Result<(), Errno> {
        if domid == DOMID_SELF || domid == self.hv.domid() { Ok(()) } else { Err(Errno::EPERM) }
    }

    /// `Ok` if there is a vCPU of this number.
    pub(crate) fn check_vcpu(&self, vcpu: u64) -> Result<u32, Errno> {
        if vcpu < u64::from(self.vcpus) { Ok(vcpu as u32) } else { Err(Errno::ENOENT) }
    }
}

/// The guest-physical address of the linear address `at`, and how many of `len` bytes lie in its page.
fn piece(cpu: &dyn GuestCpu, at: u64, len: usize) -> Result<(u64, usize), Errno> {
    // The guest has no five-level paging (see `cpuid`): bits 63 to 47 are equal in a canonical address.
    let top = (at as i64) >> 47;
    if top != 0 && top != -1 {
        return Err(Errno::EFAULT);
    }
    let room = PAGE_SIZE - at % PAGE_SIZE;
    let gpa = cpu.translate(at).ok_or(Errno::EFAULT)?;
    Ok((gpa, (len as u64).min(room) as usize))
}

/// xen/include/public/physdev.h. A PVH guest without devices of its own has no physical interrupts.
fn physdev_op(cmd: u64) -> Answer {
    use xen_abi::physdev::*;
    match cmd as u32 {
        PHYSDEVOP_EOI | PHYSDEVOP_IRQ_STATUS_QUERY => Err(Errno::EINVAL),
        PHYSDEVOP_MAP_PIRQ | PHYSDEVOP_UNMAP_PIRQ | PHYSDEVOP_GET_FREE_PIRQ => Err(Errno::EOPNOTSUPP),
        PHYSDEVOP_APIC_READ
        | PHYSDEVOP_APIC_WRITE
        | PHYSDEVOP_SETUP_GSI
        | PHYSDEVOP_PCI_DEVICE_ADD
        | PHYSDEVOP_PCI_DEVICE_REMOVE
        | PHYSDEVOP_PCI_MMCFG_RESERVED
        | PHYSDEVOP_DBGP_OP => Err(Errno::EPERM),
        _ => Err(Errno::ENOSYS),
    }
}

#[cfg(test)]
mod tests;

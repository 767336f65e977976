//! `vcpu_op` and `set_timer_op` (xen/include/public/vcpu.h). Secondary vCPUs start by INIT and SIPI through the
//! in-kernel local APIC, as PVH Linux and FreeBSD do, so the PV ways to start one are refused.

use super::{Answer, Guest};
use crate::errno::Errno;
use crate::mem::PAGE_SIZE;
use crate::platform::{GuestCpu, VcpuAttr};
use crate::state::PortKind;
use std::sync::atomic::Ordering;
use xen_abi::vcpu::*;
use xen_abi::xen::*;

/// Bytes of a vCPU's `vcpu_info`.
const VCPU_INFO_SIZE: u64 = size_of::<VcpuInfo>() as u64;
/// "No area": takes a registration back.
const NO_GPA: u64 = u64::MAX;

impl Guest {
    pub(super) fn vcpu_op(&self, cpu: &dyn GuestCpu, cmd: u64, vcpu: u64, arg: u64) -> Answer {
        let vcpu = self.check_vcpu(vcpu as u32 as u64)?;
        match cmd as u32 {
            VCPUOP_REGISTER_VCPU_INFO => {
                let op: VcpuRegisterVcpuInfo = self.fetch(cpu, arg)?;
                self.register_vcpu_info(cpu, vcpu, op.mfn, op.offset.into())?;
            }
            VCPUOP_IS_UP => return Ok(i64::from(self.platform.is_up(vcpu))),
            VCPUOP_REGISTER_RUNSTATE_MEMORY_AREA => {
                let op: VcpuRegisterRunstateMemoryArea = self.fetch(cpu, arg)?;
                let gpa = self.area(cpu, op.addr, size_of::<VcpuRunstateInfo>() as u64)?;
                self.platform.set_vcpu_attr(cpu.id(), vcpu, VcpuAttr::Runstate(gpa.unwrap_or(NO_GPA)))?;
                self.state().vcpus[vcpu as usize].runstate = gpa;
            }
            VCPUOP_REGISTER_VCPU_TIME_MEMORY_AREA => {
                let op: VcpuRegisterTimeMemoryArea = self.fetch(cpu, arg)?;
                let gpa = self.area(cpu, op.addr, size_of::<VcpuTimeInfo>() as u64)?;
                self.platform.set_vcpu_attr(cpu.id(), vcpu, VcpuAttr::TimeInfo(gpa.unwrap_or(NO_GPA)))?;
                self.state().vcpus[vcpu as usize].time_info = gpa;
            }
            VCPUOP_GET_RUNSTATE_INFO => {
                let run = self.platform.runstate(cpu.id(), vcpu)?;
                let info = VcpuRunstateInfo {
                    state: run.state,
                    _pad: 0,
                    state_entry_time: run.entry_time,
                    time: run.time,
                };
                self.put(cpu, arg, &info)?;
            }
            VCPUOP_SET_SINGLESHOT_TIMER => {
                let op: VcpuSetSingleshotTimer = self.fetch(cpu, arg)?;
                self.own(cpu, vcpu)?;
                return self.set_timer(cpu, vcpu, op.timeout_abs_ns);
            }
            VCPUOP_STOP_SINGLESHOT_TIMER => {
                self.own(cpu, vcpu)?;
                return self.set_timer(cpu, vcpu, 0);
            }
            // No periodic timer ever runs; new Linux stops it all the same.
            VCPUOP_STOP_PERIODIC_TIMER => {}
            VCPUOP_SET_PERIODIC_TIMER | VCPUOP_INITIALISE | VCPUOP_UP | VCPUOP_DOWN | VCPUOP_SEND_NMI => {
                return Err(Errno::EOPNOTSUPP);
            }
            VCPUOP_GET_PHYSID => return Err(Errno::EINVAL),
            _ => return Err(Errno::ENOSYS),
        }
        Ok(0)
    }

    /// Timers may be set for the calling vCPU only.
    fn own(&self, cpu: &dyn GuestCpu, vcpu: u32) -> Result<(), Errno> {
        if cpu.id() == vcpu { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// Sets the singleshot timer of `vcpu` (system time in ns; 0 stops it). The kernel does that by itself once
    /// VIRQ_TIMER is bound; what is set before is kept until then.
    pub(super) fn set_timer(&self, cpu: &dyn GuestCpu, vcpu: u32, expires_ns: u64) -> Answer {
        let port = {
            let mut state = self.state();
            let port = state.ports.iter().find_map(|(&number, p)| {
                (p.kind == PortKind::Virq(VIRQ_TIMER) && p.vcpu == vcpu).then_some(number)
            });
            if port.is_none() {
                state.vcpus[vcpu as usize].timer_ns = expires_ns;
            }
            port
        };
        if let Some(port) = port {
            self.platform.set_vcpu_attr(cpu.id(), vcpu, VcpuAttr::Timer { port, expires_ns })?;
        }
        Ok(0)
    }

    /// The guest-physical address of an area of `len` bytes at a linear address; `None` for a null pointer. It has
    /// to be contiguous in guest-physical memory, as the kernel takes it by that address.
    fn area(&self, cpu: &dyn GuestCpu, addr: u64, len: u64) -> Result<Option<u64>, Errno> {
        if addr == 0 {
            return Ok(None);
        }
        let (first, room) = super::piece(cpu, addr, len as usize)?;
        if (room as u64) < len {
            let next = addr.checked_add(room as u64).ok_or(Errno::EFAULT)?;
            let (second, _) = super::piece(cpu, next, 1)?;
            if second != first + room as u64 {
                return Err(Errno::EINVAL);
            }
        }
        let mut probe = [0];
        self.mem.read(first, &mut probe).map_err(|_| Errno::EFAULT)?;
        self.mem.read(first + len - 1, &mut probe).map_err(|_| Errno::EFAULT)?;
        Ok(Some(first))
    }

    /// Moves a vCPU's `vcpu_info` out of shared_info. An event may have been noted in the old place at any moment,
    /// so all of the new one is marked pending, and the guest looks at every port once.
    fn register_vcpu_info(&self, cpu: &dyn GuestCpu, vcpu: u32, mfn: u64, offset: u64) -> Result<(), Errno> {
        if offset > PAGE_SIZE - VCPU_INFO_SIZE || !offset.is_multiple_of(8) {
            return Err(Errno::ENXIO);
        }
        let gpa = mfn.checked_mul(PAGE_SIZE).and_then(|p| p.checked_add(offset)).ok_or(Errno::EINVAL)?;
        let (Some(upcall), Some(selector)) = (self.mem.u8_at(gpa), self.mem.u64_at(gpa + 8)) else {
            return Err(Errno::EINVAL);
        };
        {
            let mut state = self.state();
            let slot = &mut state.vcpus[vcpu as usize].vcpu_info;
            if slot.is_some() {
                return Err(Errno::EINVAL);
            }
            *slot = Some(gpa);
        }
        let mut old = [0u8; VCPU_INFO_SIZE as usize];
        let copied = self.shared_info.read(u64::from(vcpu) * VCPU_INFO_SIZE, &mut old);
        let moved = copied
            .ok_or(Errno::EINVAL)
            .and_then(|()| self.mem.write(gpa, &old).map_err(|_| Errno::EINVAL))
            .and_then(|()| self.platform.set_vcpu_attr(cpu.id(), vcpu, VcpuAttr::VcpuInfo(gpa)));
        if let Err(e) = moved {
            self.state().vcpus[vcpu as usize].vcpu_info = None;
            return Err(e);
        }
        selector.store(u64::MAX, Ordering::SeqCst);
        upcall.store(1, Ordering::SeqCst);
        self.platform.kick_upcall(vcpu);
        Ok(())
    }
}

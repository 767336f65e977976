//! `hvm_op` (xen/include/public/hvm/hvm_op.h, hvm/params.h).

use super::{Answer, Guest};
use crate::errno::Errno;
use crate::platform::{GuestCpu, VcpuAttr};
use xen_abi::hvm::*;

/// Vectors below are the CPU's own.
const FIRST_VECTOR: u8 = 16;

impl Guest {
    pub(super) fn hvm_op(&self, cpu: &dyn GuestCpu, cmd: u64, arg: u64) -> Answer {
        match cmd as u32 {
            HVMOP_SET_PARAM => {
                let op: XenHvmParam = self.fetch(cpu, arg)?;
                self.check_self(op.domid)?;
                match op.index {
                    HVM_PARAM_CALLBACK_IRQ => self.set_callback(op.value)?,
                    HVM_NR_PARAMS.. => return Err(Errno::EINVAL),
                    // The rest is the toolstack's.
                    _ => return Err(Errno::EPERM),
                }
            }
            HVMOP_GET_PARAM => {
                let mut op: XenHvmParam = self.fetch(cpu, arg)?;
                self.check_self(op.domid)?;
                match op.index {
                    HVM_PARAM_CALLBACK_IRQ
                    | HVM_PARAM_STORE_PFN
                    | HVM_PARAM_STORE_EVTCHN
                    | HVM_PARAM_CONSOLE_PFN
                    | HVM_PARAM_CONSOLE_EVTCHN
                    | HVM_PARAM_VM86_TSS
                    | HVM_PARAM_VM86_TSS_SIZED
                    | HVM_PARAM_ALTP2M => op.value = self.param(op.index),
                    HVM_NR_PARAMS.. => return Err(Errno::EINVAL),
                    _ => return Err(Errno::EPERM),
                }
                self.put(cpu, arg, &op)?;
            }
            HVMOP_SET_EVTCHN_UPCALL_VECTOR => {
                let op: XenHvmEvtchnUpcallVector = self.fetch(cpu, arg)?;
                let vcpu = self.check_vcpu(op.vcpu.into())?;
                if op.vector < FIRST_VECTOR {
                    return Err(Errno::EINVAL);
                }
                self.platform.set_vcpu_attr(cpu.id(), vcpu, VcpuAttr::UpcallVector(op.vector))?;
                self.state().vcpus[vcpu as usize].upcall_vector = Some(op.vector);
                self.platform.kick_upcall(vcpu);
            }
            _ => return Err(Errno::ENOSYS),
        }
        Ok(0)
    }

    /// The value of a parameter.
    pub fn param(&self, index: u32) -> u64 {
        self.state().params.get(index as usize).copied().unwrap_or(0)
    }

    /// Sets a parameter, for the guest to find.
    pub fn set_param(&self, index: u32, value: u64) {
        if let Some(slot) = self.state().params.get_mut(index as usize) {
            *slot = value;
        }
    }

    fn set_callback(&self, value: u64) -> Result<(), Errno> {
        let vector = match CallbackVia::from_raw(value) {
            Some(CallbackVia::None) => 0,
            Some(CallbackVia::Vector(vector)) if vector >= FIRST_VECTOR => vector,
            // There is no PCI bus and no I/O APIC that the guest knows of.
            _ => return Err(Errno::EINVAL),
        };
        self.platform.set_callback_vector(vector)?;
        self.set_param(HVM_PARAM_CALLBACK_IRQ, value);
        Ok(())
    }
}

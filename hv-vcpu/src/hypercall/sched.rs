//! `sched_op` (xen/include/public/sched.h). Yield, block and poll mostly stay in the kernel.

use super::{Guest, Outcome};
use crate::errno::Errno;
use crate::hypervisor::ShutdownReason;
use crate::platform::GuestCpu;
use xen_abi::sched::*;

/// The most ports that one poll may name, as in Xen.
const MAX_POLL: u32 = 128;

impl Guest {
    pub(super) fn sched_op(&self, cpu: &dyn GuestCpu, cmd: u64, arg: u64) -> Result<Outcome, Errno> {
        match cmd as u32 {
            SCHEDOP_YIELD | SCHEDOP_BLOCK => std::thread::yield_now(),
            SCHEDOP_SHUTDOWN => {
                let op: SchedShutdown = self.fetch(cpu, arg)?;
                let reason = self.state().shutdown_code.unwrap_or(op.reason);
                if reason == SHUTDOWN_SUSPEND {
                    // Nothing can save a guest yet; the guest takes this for "suspend was cancelled".
                    return Err(Errno::EOPNOTSUPP);
                }
                return Ok(Outcome::Shutdown(ShutdownReason::from_raw(reason)));
            }
            SCHEDOP_SHUTDOWN_CODE => {
                let op: SchedShutdown = self.fetch(cpu, arg)?;
                self.state().shutdown_code = Some(op.reason);
            }
            SCHEDOP_POLL => {
                let op: SchedPoll = self.fetch(cpu, arg)?;
                if op.nr_ports > MAX_POLL {
                    return Err(Errno::EINVAL);
                }
                for i in 0..u64::from(op.nr_ports) {
                    let port: u32 = self.fetch(cpu, op.ports.wrapping_add(i * 4))?;
                    if self.is_pending(port).ok_or(Errno::EINVAL)? {
                        return Ok(Outcome::Return(0));
                    }
                }
                // The kernel does the waiting; a poll that comes here ends early, which the ABI allows.
                std::thread::yield_now();
            }
            SCHEDOP_REMOTE_SHUTDOWN | SCHEDOP_PIN_OVERRIDE => return Err(Errno::EPERM),
            _ => return Err(Errno::ENOSYS),
        }
        Ok(Outcome::Return(0))
    }
}

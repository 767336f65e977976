//! `event_channel_op` (xen/include/public/event_channel.h), 2-level ABI.
//!
//! Port numbers come from hv-core. Events themselves don't pass through here: a port towards another domain is an
//! eventfd that KVM writes when the guest sends, and one whose writes KVM turns into an upcall; IPIs stay in the
//! kernel. What is here sets that up, and sends by hand what the kernel hands back (calls inside a multicall, and
//! ports that it does not know).

use super::{Answer, Guest};
use crate::errno::Errno;
use crate::hypervisor::{PortFds, PortStatus};
use crate::platform::GuestCpu;
use crate::state::{Port, PortKind, State};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use xen_abi::event_channel::*;
use xen_abi::xen::*;

/// Offset of `evtchn_pending` in shared_info.
const PENDING: u64 = std::mem::offset_of!(SharedInfo, evtchn_pending) as u64;
/// Offset of `evtchn_mask` in shared_info.
const MASK: u64 = std::mem::offset_of!(SharedInfo, evtchn_mask) as u64;

/// Whether a VIRQ belongs to a vCPU (else to the domain).
fn is_per_vcpu(virq: u32) -> bool {
    matches!(virq, VIRQ_TIMER | VIRQ_DEBUG | VIRQ_XENOPROF | VIRQ_XENPMU)
}

impl Guest {
    pub(super) fn event_channel_op(&self, cpu: &dyn GuestCpu, cmd: u64, arg: u64) -> Answer {
        match cmd as u32 {
            EVTCHNOP_ALLOC_UNBOUND => {
                let mut op: EvtchnAllocUnbound = self.fetch(cpu, arg)?;
                self.check_self(op.dom)?;
                let remote = self.domid_of(op.remote_dom);
                op.port = self.add_remote(self.hv.alloc_unbound(remote)?)?;
                self.put(cpu, arg, &op)?;
            }
            EVTCHNOP_BIND_INTERDOMAIN => {
                let mut op: EvtchnBindInterdomain = self.fetch(cpu, arg)?;
                let remote = self.domid_of(op.remote_dom);
                op.local_port = self.add_remote(self.hv.bind_interdomain(remote, op.remote_port)?)?;
                // As in Xen: the new end looks once, for what was sent before it was there.
                self.platform.raise(op.local_port, 0)?;
                self.put(cpu, arg, &op)?;
            }
            EVTCHNOP_BIND_VIRQ => {
                let mut op: EvtchnBindVirq = self.fetch(cpu, arg)?;
                op.port = self.bind_virq(cpu, op.virq, op.vcpu)?;
                self.put(cpu, arg, &op)?;
            }
            EVTCHNOP_BIND_IPI => {
                let mut op: EvtchnBindIpi = self.fetch(cpu, arg)?;
                let vcpu = self.check_vcpu(op.vcpu.into())?;
                op.port = self.add_local(None, Port { kind: PortKind::Ipi, vcpu })?;
                if let Err(e) = self.platform.route_ipi(op.port, vcpu) {
                    self.close(cpu, op.port)?;
                    return Err(e);
                }
                self.put(cpu, arg, &op)?;
            }
            EVTCHNOP_BIND_PIRQ => return Err(Errno::EINVAL),
            EVTCHNOP_CLOSE => {
                let op: EvtchnClose = self.fetch(cpu, arg)?;
                self.close(cpu, op.port)?;
            }
            EVTCHNOP_SEND => {
                let op: EvtchnSend = self.fetch(cpu, arg)?;
                self.send(op.port)?;
            }
            EVTCHNOP_STATUS => {
                let mut op: EvtchnStatus = self.fetch(cpu, arg)?;
                self.check_self(op.dom)?;
                self.status(&mut op)?;
                self.put(cpu, arg, &op)?;
            }
            EVTCHNOP_BIND_VCPU => {
                let op: EvtchnBindVcpu = self.fetch(cpu, arg)?;
                self.bind_vcpu(op.port, op.vcpu)?;
            }
            EVTCHNOP_UNMASK => {
                let op: EvtchnUnmask = self.fetch(cpu, arg)?;
                self.unmask(op.port)?;
            }
            EVTCHNOP_RESET => {
                let op: EvtchnReset = self.fetch(cpu, arg)?;
                self.check_self(op.dom)?;
                let ports: Vec<u32> = self.state().ports.keys().copied().collect();
                for port in ports {
                    // Another vCPU may have closed it meanwhile.
                    let _ = self.close(cpu, port);
                }
            }
            // The kernel does the 2-level ABI only; a guest then stays with that.
            EVTCHNOP_INIT_CONTROL | EVTCHNOP_EXPAND_ARRAY | EVTCHNOP_SET_PRIORITY => {
                return Err(Errno::ENOSYS);
            }
            _ => return Err(Errno::ENOSYS),
        }
        Ok(0)
    }

    fn domid_of(&self, domid: u16) -> u16 {
        if domid == DOMID_SELF { self.hv.domid() } else { domid }
    }

    /// Takes in a port towards another domain: from now on the kernel carries its events.
    pub fn add_remote(&self, fds: PortFds) -> Result<u32, Errno> {
        let port = fds.port;
        if port == 0 || port >= EVTCHN_2L_NR_CHANNELS {
            let _ = self.hv.close(port);
            return Err(Errno::ENOSPC);
        }
        // hv-core answers a second bind with the port that is there; in Xen the remote one is then no longer free.
        if self.state().ports.contains_key(&port) {
            return Err(Errno::EINVAL);
        }
        let routed = self.platform.route_out(port, fds.tx.as_fd()).and_then(|()| {
            self.platform.route_in(port, 0, fds.rx.as_fd()).inspect_err(|_| self.platform.unroute_out(port))
        });
        if let Err(e) = routed {
            let _ = self.hv.close(port);
            return Err(e);
        }
        let mut state = self.state();
        state.ports.insert(port, Port { kind: PortKind::Remote, vcpu: 0 });
        state.fds.insert(port, fds);
        Ok(port)
    }

    fn add_local(&self, virq: Option<u32>, port: Port) -> Result<u32, Errno> {
        let number = self.hv.alloc_local(virq, port.vcpu)?;
        if number == 0 || number >= EVTCHN_2L_NR_CHANNELS {
            let _ = self.hv.close(number);
            return Err(Errno::ENOSPC);
        }
        self.state().ports.insert(number, port);
        Ok(number)
    }

    fn bind_virq(&self, cpu: &dyn GuestCpu, virq: u32, vcpu: u32) -> Result<u32, Errno> {
        if virq >= NR_VIRQS || (!is_per_vcpu(virq) && vcpu != 0) {
            return Err(Errno::EINVAL);
        }
        let vcpu = self.check_vcpu(vcpu.into())?;
        let wanted = Port { kind: PortKind::Virq(virq), vcpu };
        let taken = |state: &State| {
            state.ports.values().any(|p| p.kind == wanted.kind && (p.vcpu == vcpu || !is_per_vcpu(virq)))
        };
        if taken(&self.state()) {
            return Err(Errno::EEXIST);
        }
        let port = self.add_local(Some(virq), wanted)?;
        if virq == VIRQ_TIMER {
            let expires_ns = std::mem::take(&mut self.state().vcpus[vcpu as usize].timer_ns);
            let attr = crate::platform::VcpuAttr::Timer { port, expires_ns };
            if let Err(e) = self.platform.set_vcpu_attr(cpu.id(), vcpu, attr) {
                self.close(cpu, port)?;
                return Err(e);
            }
        }
        Ok(port)
    }

    fn close(&self, cpu: &dyn GuestCpu, port: u32) -> Result<(), Errno> {
        let (entry, fds) = {
            let mut state = self.state();
            let entry = state.ports.remove(&port).ok_or(Errno::EINVAL)?;
            (entry, state.fds.remove(&port))
        };
        match (entry.kind, &fds) {
            (PortKind::Remote, Some(fds)) => {
                self.platform.unroute_out(port);
                self.platform.unroute_in(port, fds.rx.as_fd());
            }
            (PortKind::Remote, None) => {}
            (PortKind::Ipi, _) => self.platform.unroute_out(port),
            (PortKind::Virq(VIRQ_TIMER), _) => {
                let attr = crate::platform::VcpuAttr::Timer { port: 0, expires_ns: 0 };
                self.platform.set_vcpu_attr(cpu.id(), entry.vcpu, attr)?;
            }
            (PortKind::Virq(_), _) => {}
        }
        // An event left over must not reach the port's next user.
        if let Some((word, bit)) = self.port_bit(PENDING, port) {
            word.fetch_and(!bit, Ordering::SeqCst);
        }
        self.hv.close(port)
    }

    fn send(&self, port: u32) -> Result<(), Errno> {
        let state = self.state();
        match state.ports.get(&port) {
            Some(Port { kind: PortKind::Ipi, vcpu }) => self.platform.raise(port, *vcpu),
            Some(Port { kind: PortKind::Remote, .. }) => {
                let fds = state.fds.get(&port).ok_or(Errno::EINVAL)?;
                // Sent to nobody if the port is still unbound: the eventfd keeps it, which Xen allows.
                match nix::unistd::write(&fds.tx, &1u64.to_ne_bytes()) {
                    Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
                    Err(e) => Err(e.into()),
                }
            }
            _ => Err(Errno::EINVAL),
        }
    }

    fn status(&self, op: &mut EvtchnStatus) -> Result<(), Errno> {
        if op.port == 0 || op.port >= EVTCHN_2L_NR_CHANNELS {
            return Err(Errno::EINVAL);
        }
        let entry = self.state().ports.get(&op.port).copied();
        (op.status, op.dom_or_irq, op.remote_port) = match entry.map(|p| p.kind) {
            None => (EVTCHNSTAT_CLOSED, 0, 0),
            Some(PortKind::Virq(virq)) => (EVTCHNSTAT_VIRQ, virq, 0),
            Some(PortKind::Ipi) => (EVTCHNSTAT_IPI, 0, 0),
            Some(PortKind::Remote) => match self.hv.status(op.port)? {
                PortStatus::Unbound { remote } => (EVTCHNSTAT_UNBOUND, remote.into(), 0),
                PortStatus::Interdomain { remote, remote_port } => {
                    (EVTCHNSTAT_INTERDOMAIN, remote.into(), remote_port)
                }
                PortStatus::Closed | PortStatus::Local => (EVTCHNSTAT_CLOSED, 0, 0),
            },
        };
        op.vcpu = entry.map_or(0, |p| p.vcpu);
        Ok(())
    }

    fn bind_vcpu(&self, port: u32, vcpu: u32) -> Result<(), Errno> {
        let vcpu = self.check_vcpu(vcpu.into())?;
        let mut state = self.state();
        let entry = state.ports.get_mut(&port).ok_or(Errno::EINVAL)?;
        match entry.kind {
            PortKind::Remote => self.platform.move_in(port, vcpu)?,
            PortKind::Virq(virq) if !is_per_vcpu(virq) => {}
            _ => return Err(Errno::EINVAL),
        }
        entry.vcpu = vcpu;
        Ok(())
    }

    /// Clears the mask; an event that is pending is taken back and raised again, so that its upcall happens.
    fn unmask(&self, port: u32) -> Result<(), Errno> {
        let vcpu = self.state().ports.get(&port).ok_or(Errno::EINVAL)?.vcpu;
        let (mask, bit) = self.port_bit(MASK, port).ok_or(Errno::EINVAL)?;
        let (pending, _) = self.port_bit(PENDING, port).ok_or(Errno::EINVAL)?;
        if mask.fetch_and(!bit, Ordering::SeqCst) & bit == 0 {
            return Ok(());
        }
        if pending.fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
            self.platform.raise(port, vcpu)?;
        }
        Ok(())
    }

    /// Whether a port is pending.
    pub(super) fn is_pending(&self, port: u32) -> Option<bool> {
        let (word, bit) = self.port_bit(PENDING, port)?;
        Some(word.load(Ordering::SeqCst) & bit != 0)
    }

    /// The word of one of shared_info's two bitmaps, and the bit in it, for `port`.
    fn port_bit(&self, bitmap: u64, port: u32) -> Option<(&AtomicU64, u64)> {
        if port >= EVTCHN_2L_NR_CHANNELS {
            return None;
        }
        let word = self.shared_info.u64_at(bitmap + u64::from(port / 64) * 8)?;
        Some((word, 1 << (port % 64)))
    }
}

//! hv-core by the hypercall socket: `hv-vcpu --domain`.

use crate::errno::Errno;
use crate::hypervisor::{Hypervisor, PortFds, PortStatus};
use domain_kit::evtchn::Port;
use domain_kit::{Domain, HvError, Hypercall};
use hv_abi::port_state;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The most bytes of one line of the guest's emergency console.
const LINE_MAX: usize = 256;
/// The most lines of it in [`LINE_WINDOW`]: the log is not the guest's to fill.
const LINES_MAX: usize = 200;
/// See [`LINES_MAX`].
const LINE_WINDOW: Duration = Duration::from_secs(10);

/// hv-core, as this domain sees it.
pub struct HvCore {
    domain: Arc<Domain>,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    line: Vec<u8>,
    times: VecDeque<Instant>,
    dropped: u64,
}

impl HvCore {
    /// Wraps a domain that has joined.
    pub fn new(domain: Arc<Domain>) -> Self {
        Self { domain, log: Mutex::default() }
    }

    /// The hypercalls.
    pub fn hypercall(&self) -> &Hypercall {
        &self.domain.hv
    }
}

/// What the guest gets to see of a refused hypercall.
fn errno(e: HvError) -> Errno {
    match e.errno() {
        Some(errno) => errno.into(),
        None => {
            tracing::error!("{e}");
            Errno::EIO
        }
    }
}

fn fds(port: Port) -> Result<PortFds, Errno> {
    let clone = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|_| Errno::ENOSPC);
    let tx = port.tx().ok_or(Errno::EINVAL)?;
    Ok(PortFds { port: port.port, rx: clone(port.rx())?, tx: clone(tx)? })
}

impl Hypervisor for HvCore {
    fn domid(&self) -> u16 {
        self.domain.domid()
    }

    fn alloc_unbound(&self, remote: u16) -> Result<PortFds, Errno> {
        fds(self.domain.hv.port_alloc_unbound(remote).map_err(errno)?)
    }

    fn bind_interdomain(&self, remote: u16, remote_port: u32) -> Result<PortFds, Errno> {
        fds(self.domain.hv.port_bind_interdomain(remote, remote_port).map_err(errno)?)
    }

    fn alloc_local(&self, virq: Option<u32>, vcpu: u32) -> Result<u32, Errno> {
        match virq {
            Some(virq) => self.domain.hv.port_bind_virq(virq, vcpu).map(|p| p.port),
            None => self.domain.hv.port_bind_ipi(vcpu),
        }
        .map_err(errno)
    }

    fn close(&self, port: u32) -> Result<(), Errno> {
        self.domain.hv.port_close(port).map_err(errno)
    }

    fn status(&self, port: u32) -> Result<PortStatus, Errno> {
        let list = self.domain.hv.port_list().map_err(errno)?;
        let Some(info) = list.iter().find(|i| i.port == port) else { return Ok(PortStatus::Closed) };
        Ok(match info.state {
            port_state::UNBOUND => PortStatus::Unbound { remote: info.remote_domid },
            port_state::INTERDOMAIN => {
                PortStatus::Interdomain { remote: info.remote_domid, remote_port: info.remote_port }
            }
            port_state::VIRQ | port_state::IPI => PortStatus::Local,
            _ => PortStatus::Closed,
        })
    }

    fn emergency_console(&self, bytes: &[u8]) {
        let mut log = self.log.lock().unwrap_or_else(|e| e.into_inner());
        for &byte in bytes {
            if byte == b'\n' || log.line.len() >= LINE_MAX {
                log.flush(self.domain.domid());
            }
            if byte != b'\n' && byte != b'\r' {
                log.line.push(byte);
            }
        }
    }
}

impl Log {
    /// Logs the line, unless the guest has used up its share.
    fn flush(&mut self, domid: u16) {
        let now = Instant::now();
        while self.times.front().is_some_and(|&t| now.duration_since(t) > LINE_WINDOW) {
            self.times.pop_front();
        }
        if self.times.len() < LINES_MAX {
            if self.dropped > 0 {
                tracing::warn!(domid, lines = self.dropped, "the guest printed too much");
                self.dropped = 0;
            }
            // Escaped: a guest may not send control sequences to a terminal that shows the log.
            tracing::info!(domid, "guest: {}", self.line.escape_ascii());
            self.times.push_back(now);
        } else {
            self.dropped += 1;
        }
        self.line.clear();
    }
}

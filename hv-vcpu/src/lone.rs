//! hv-core's part without hv-core, for bringing up kernels: `hv-vcpu --lone`. There is no other domain, so ports
//! lead nowhere but the console's, whose ring is drained to stdout by a thread of this process.

use crate::errno::Errno;
use crate::hypervisor::{Hypervisor, PortFds, PortStatus};
use crate::mem::{GuestMemory, PAGE_SIZE};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};
use xen_abi::console::*;

/// The domid of a lone guest.
const DOMID: u16 = 1;
/// The most ports.
const MAX_PORTS: u32 = 1024;

struct Entry {
    status: PortStatus,
    /// The far end's (rx, tx), which nobody uses but the console.
    far: Option<(OwnedFd, OwnedFd)>,
}

/// A hypervisor with one domain.
#[derive(Default)]
pub struct Lone {
    ports: Mutex<BTreeMap<u32, Entry>>,
}

impl Lone {
    fn ports(&self) -> MutexGuard<'_, BTreeMap<u32, Entry>> {
        self.ports.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn add(&self, entry: Entry) -> Result<u32, Errno> {
        let mut ports = self.ports();
        let port = (1..MAX_PORTS).find(|p| !ports.contains_key(p)).ok_or(Errno::ENOSPC)?;
        ports.insert(port, entry);
        Ok(port)
    }

    /// Prints what the guest writes to its console ring at guest frame `gfn`, with the far end of `port`.
    pub fn drain_console(&self, mem: &'static GuestMemory, gfn: u64, port: u32) -> std::io::Result<()> {
        let Some((rx, tx)) = self.ports().get_mut(&port).and_then(|e| e.far.take()) else {
            return Err(std::io::Error::other("the console has no port"));
        };
        std::thread::Builder::new().name("console".into()).spawn(move || {
            let mut count = [0; 8];
            // The eventfds block, so this sleeps until the guest prints.
            while nix::unistd::read(&rx, &mut count).is_ok() {
                if drain(mem, gfn * PAGE_SIZE).is_none() {
                    eprintln!("hv-vcpu: the guest's console ring is broken, nothing more is read from it");
                    return;
                }
                let _ = nix::unistd::write(&tx, &1u64.to_ne_bytes());
            }
        })?;
        Ok(())
    }
}

/// Takes what the ring holds; `None` if its indices make no sense.
pub fn drain(mem: &GuestMemory, ring: u64) -> Option<()> {
    let prod = mem.u32_at(ring + XENCONS_OUT_PROD_OFFSET as u64)?;
    let cons = mem.u32_at(ring + XENCONS_OUT_CONS_OFFSET as u64)?;
    let mut at = cons.load(Ordering::SeqCst);
    let end = prod.load(Ordering::SeqCst);
    if end.wrapping_sub(at) as usize > XENCONS_OUT_SIZE {
        return None;
    }
    let mut text = Vec::new();
    while at != end {
        let offset = at as usize & (XENCONS_OUT_SIZE - 1);
        let mut byte = [0];
        mem.read(ring + (XENCONS_OUT_OFFSET + offset) as u64, &mut byte).ok()?;
        text.push(byte[0]);
        at = at.wrapping_add(1);
    }
    cons.store(at, Ordering::SeqCst);
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(&text);
    let _ = out.flush();
    Some(())
}

impl Hypervisor for Lone {
    fn domid(&self) -> u16 {
        DOMID
    }

    fn alloc_unbound(&self, remote: u16) -> Result<PortFds, Errno> {
        let new = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map(OwnedFd::from);
        let (near, far) = (new()?, new()?);
        let clone = |fd: &OwnedFd| fd.try_clone().map_err(|_| Errno::ENOSPC);
        let ends = Some((clone(&near)?, clone(&far)?));
        let port = self.add(Entry { status: PortStatus::Unbound { remote }, far: ends })?;
        Ok(PortFds { port, rx: far, tx: near })
    }

    fn bind_interdomain(&self, _remote: u16, _remote_port: u32) -> Result<PortFds, Errno> {
        Err(Errno::ESRCH)
    }

    fn alloc_local(&self, _virq: Option<u32>, _vcpu: u32) -> Result<u32, Errno> {
        self.add(Entry { status: PortStatus::Local, far: None })
    }

    fn close(&self, port: u32) -> Result<(), Errno> {
        self.ports().remove(&port).map(drop).ok_or(Errno::EINVAL)
    }

    fn status(&self, port: u32) -> Result<PortStatus, Errno> {
        Ok(self.ports().get(&port).map_or(PortStatus::Closed, |e| e.status))
    }

    fn emergency_console(&self, bytes: &[u8]) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(bytes);
        let _ = out.flush();
    }
}

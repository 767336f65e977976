//! The consoles that there are.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use domain_kit::evtchn::Port;
use domain_kit::grants::{GrantError, MappedGrants};
use domain_kit::mem::Page;
use domain_kit::{Hypercall, fdstore};
use hv_abi::{DomInfo, dom_state};
use tokio::sync::watch;

use super::ring::{KEPT_LEN, Kept};

/// Output of one guest, bytes a second; what a guest prints beyond it waits in its ring.
const RATE: u64 = 2 << 20;

/// One guest's console.
#[derive(Debug)]
pub struct Console {
    /// The guest.
    pub domid: u16,
    /// Its creation.
    pub instance: u64,
    kept: Kept,
    /// Wakes the pump; the port's own.
    rx: OwnedFd,
    ring: Mutex<Option<Ring>>,
    total: watch::Sender<u64>,
}

#[derive(Debug)]
struct Ring {
    page: Page,
    grants: MappedGrants,
    port: Port,
    /// Bytes that may be taken now, and when that was reckoned.
    allowance: (u64, Instant),
}

impl Console {
    fn ring(&self) -> MutexGuard<'_, Option<Ring>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the guest printed. False if it printed so much that it has to wait.
    pub fn pump(&self) -> bool {
        let mut guard = self.ring();
        let Some(ring) = guard.as_mut() else { return true };
        let now = Instant::now();
        let since = now.duration_since(ring.allowance.1).as_micros() as u64;
        ring.allowance = ((ring.allowance.0 + since.saturating_mul(RATE) / 1_000_000).min(RATE), now);
        if ring.allowance.0 < KEPT_RING {
            return false;
        }
        ring.port.clear();
        let taken = self.kept.pump(&ring.page);
        if taken > 0 {
            ring.allowance.0 -= taken as u64;
            ring.port.notify();
            drop(guard);
            self.total.send_replace(self.kept.total());
        }
        true
    }

    /// Gives the guest input; bytes that had room. `None`: the console is gone.
    pub fn input(&self, data: &[u8]) -> Option<usize> {
        let guard = self.ring();
        let ring = guard.as_ref()?;
        let taken = self.kept.input(&ring.page, data);
        if taken > 0 {
            ring.port.notify();
        }
        Some(taken)
    }

    /// Output from `offset` on, see [`Kept::read`].
    pub fn read(&self, offset: u64, most: usize) -> (u64, Vec<u8>) {
        // Under the lock of the pump, which overwrites old output.
        let _still = self.ring();
        self.kept.read(offset, most)
    }

    /// Bytes of output since the guest's start.
    pub fn total(&self) -> u64 {
        self.kept.total()
    }

    /// Tells of new output.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.total.subscribe()
    }

    /// The guest is gone.
    pub fn ended(&self) -> bool {
        self.ring().is_none()
    }
}

/// A pump takes this at most.
const KEPT_RING: u64 = xen_abi::console::XENCONS_OUT_SIZE as u64;

/// All consoles, by domid.
#[derive(Debug, Default)]
pub struct Table {
    consoles: Mutex<HashMap<u16, Arc<Console>>>,
}

fn kept_name(instance: u64) -> String {
    format!("console-{instance}")
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, HashMap<u16, Arc<Console>>> {
        self.consoles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Console>> {
        self.lock().values().cloned().collect()
    }

    /// The console of a domain; instance 0 = whichever has the domid now.
    pub fn find(&self, domid: u16, instance: u64) -> Option<Arc<Console>> {
        let found = self.lock().get(&domid).cloned()?;
        (instance == 0 || found.instance == instance).then_some(found)
    }

    /// Makes the table what hv-core's list says: new consoles are attached, gone ones let go. A console that can't be attached is
    /// logged and tried again at the next call.
    pub fn update(&self, hv: &Hypercall, domains: &[DomInfo]) {
        let wanted: HashMap<u64, &DomInfo> = domains
            .iter()
            .filter(|d| d.console_port != 0 && d.state != dom_state::DYING)
            .map(|d| (d.instance, d))
            .collect();
        let gone: Vec<Arc<Console>> = {
            let mut consoles = self.lock();
            let gone: Vec<u16> = consoles
                .iter()
                .filter(|(_, c)| !wanted.contains_key(&c.instance))
                .map(|(id, _)| *id)
                .collect();
            gone.iter().filter_map(|id| consoles.remove(id)).collect()
        };
        for console in gone {
            let_go(hv, &console);
        }
        for info in wanted.values() {
            if self.find(info.domid, info.instance).is_some() {
                continue;
            }
            match attach(hv, info) {
                Ok(console) => {
                    tracing::info!(guest = info.domid, "console attached");
                    let console = Arc::new(console);
                    self.lock().insert(info.domid, console);
                }
                Err(e) => tracing::warn!(guest = info.domid, error = %e, "console can't be attached (now)"),
            }
        }
    }
}

fn attach(hv: &Hypercall, info: &DomInfo) -> Result<Console, GrantError> {
    let earlier = hv.grant_list()?.into_iter().find(|g| g.tag == info.instance && g.domid == info.domid);
    let grants = match earlier {
        Some(map) => MappedGrants::claim(hv, map.handle)?,
        None => MappedGrants::map(hv, info.domid, &[info.console_gref], info.instance)?,
    };
    let page = Page { mem: grants.mem.clone(), base: grants.offset(0) };
    let attached =
        hv.port_bind_interdomain(info.domid, info.console_port).map_err(GrantError::from).and_then(|port| {
            let (mem, _) = fdstore::kept_memory(hv, &kept_name(info.instance), KEPT_LEN)?;
            let rx = port.rx().try_clone_to_owned()?;
            Ok((port, mem, rx))
        });
    let (port, mem, rx) = match attached {
        Ok(attached) => attached,
        Err(e) => {
            drop(page);
            grants.unmap(hv)?;
            return Err(e);
        }
    };
    let kept = Kept::attach(mem, &page, info.console_gref, info.console_port);
    // What is in the ring already, and what the indices say now.
    port.notify();
    let total = watch::Sender::new(kept.total());
    let ring = Ring { page, grants, port, allowance: (RATE, Instant::now()) };
    Ok(Console { domid: info.domid, instance: info.instance, kept, rx, ring: Mutex::new(Some(ring)), total })
}

fn let_go(hv: &Hypercall, console: &Console) {
    // What it printed last is worth keeping for those who are attached.
    console.pump();
    let Some(Ring { page, grants, port, .. }) = console.ring().take() else { return };
    drop(page);
    // The domain may be gone altogether, and these with it.
    for result in [grants.unmap(hv), hv.port_close(port.port), hv.fd_delete(&kept_name(console.instance))] {
        if let Err(e) = result {
            tracing::debug!(guest = console.domid, error = %e, "letting go of a console");
        }
    }
    console.total.send_modify(|_| ());
    tracing::info!(guest = console.domid, "console let go");
}

impl AsFd for Console {
    /// Readable when the guest has printed or read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.rx.as_fd()
    }
}

/// Lets go of maps and memory of guests that went away while no console domain ran.
pub fn sweep(hv: &Hypercall, domains: &[DomInfo]) {
    let lives = |instance: u64| domains.iter().any(|d| d.instance == instance && d.state != dom_state::DYING);
    match hv.grant_list() {
        Ok(maps) => {
            for map in maps.into_iter().filter(|m| m.mine == 0 && !lives(m.tag)) {
                let done = MappedGrants::claim(hv, map.handle).and_then(|grants| Ok(grants.unmap(hv)?));
                if let Err(e) = done {
                    tracing::debug!(guest = map.domid, error = %e, "an earlier map");
                }
            }
        }
        Err(e) => tracing::warn!(error = %e, "list of maps"),
    }
    let Ok(stored) = hv.fd_list() else { return };
    for entry in stored {
        let name = entry.name.as_str().unwrap_or_default().to_owned();
        let instance = name.strip_prefix("console-").and_then(|n| n.parse().ok());
        if instance.is_some_and(|instance: u64| !lives(instance))
            && let Err(e) = hv.fd_delete(&name)
        {
            tracing::warn!(error = %e, name, "deleting kept memory");
        }
    }
}

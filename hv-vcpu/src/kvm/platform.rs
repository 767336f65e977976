//! [`Platform`] by KVM. A vCPU's ioctls wait while its thread is in `KVM_RUN`, so one vCPU changes another by a
//! request that the other's own thread carries out after a kick.

use super::ioctl::{self, Kicker};
use crate::errno::Errno;
use crate::platform::{Platform, Runstate, VcpuAttr};
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How often a waiting vCPU looks for requests to itself.
const WAIT_STEP: Duration = Duration::from_millis(2);
/// KVM's memory slots for single pages start here; below is RAM.
const FIRST_PAGE_SLOT: u32 = 8;

#[derive(Clone, Copy)]
enum Request {
    Set(VcpuAttr),
    Runstate,
}

#[derive(Default)]
struct Mailbox {
    /// Requests by their number.
    todo: Vec<(u64, Request)>,
    /// Answers by the same number.
    done: BTreeMap<u64, Result<Runstate, Errno>>,
    next: u64,
}

/// What other threads may touch of a vCPU.
pub struct VcpuLink {
    /// For ioctls by the vCPU's own thread.
    pub fd: OwnedFd,
    /// Gets it out of `KVM_RUN`.
    pub kicker: Kicker,
    mailbox: Mutex<Mailbox>,
    answered: Condvar,
    up: AtomicBool,
    vector: AtomicU8,
    look: AtomicBool,
}

impl VcpuLink {
    /// A link to the vCPU with this descriptor.
    pub fn new(fd: OwnedFd, kicker: Kicker) -> Self {
        Self {
            fd,
            kicker,
            mailbox: Mutex::default(),
            answered: Condvar::new(),
            up: AtomicBool::new(false),
            vector: AtomicU8::new(0),
            look: AtomicBool::new(false),
        }
    }
}

struct Routes {
    /// vCPU by port; the GSI has the port's number.
    ports: BTreeMap<u32, u32>,
    /// Slot by guest frame, of pages outside of RAM.
    pages: BTreeMap<u64, u32>,
}

/// KVM for one guest.
pub struct KvmPlatform {
    vm: VmFd,
    vcpus: Vec<VcpuLink>,
    routes: Mutex<Routes>,
    /// KVM takes shared_info by address, so that it is there before the guest asks for it.
    shared_info_by_hva: bool,
    stopping: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl KvmPlatform {
    /// Takes a VM that is set up.
    pub fn new(vm: VmFd, vcpus: Vec<VcpuLink>, shared_info_by_hva: bool) -> Self {
        let routes = Routes { ports: BTreeMap::new(), pages: BTreeMap::new() };
        Self { vm, vcpus, routes: Mutex::new(routes), shared_info_by_hva, stopping: AtomicBool::new(false) }
    }

    /// The link to a vCPU. Numbers come from our own threads.
    pub fn link(&self, vcpu: u32) -> &VcpuLink {
        &self.vcpus[vcpu as usize]
    }

    /// Whether the guest has ended.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Makes all vCPU threads end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.vcpus.iter().for_each(|v| v.kicker.kick());
    }

    /// Called by a vCPU's thread: `vcpu` has run guest code.
    pub fn mark_up(&self, vcpu: u32) {
        self.link(vcpu).up.store(true, Ordering::Relaxed);
    }

    /// Has every vCPU's thread log its state.
    pub fn look_at_all(&self) {
        for vcpu in &self.vcpus {
            vcpu.look.store(true, Ordering::SeqCst);
            vcpu.kicker.kick();
        }
    }

    /// Called by a vCPU's thread: whether it shall log its state, once.
    pub fn take_look(&self, vcpu: u32) -> bool {
        self.link(vcpu).look.swap(false, Ordering::SeqCst)
    }

    /// Called by a vCPU's thread: does what others asked of it.
    pub fn serve_requests(&self, vcpu: u32) {
        let link = self.link(vcpu);
        let mut mailbox = lock(&link.mailbox);
        if mailbox.todo.is_empty() {
            return;
        }
        for (number, request) in std::mem::take(&mut mailbox.todo) {
            let answer = perform(&link.fd, request);
            mailbox.done.insert(number, answer);
        }
        link.answered.notify_all();
    }

    fn request(&self, caller: u32, vcpu: u32, request: Request) -> Result<Runstate, Errno> {
        let link = self.vcpus.get(vcpu as usize).ok_or(Errno::ENOENT)?;
        if caller == vcpu {
            return perform(&link.fd, request);
        }
        let mut mailbox = lock(&link.mailbox);
        let number = mailbox.next;
        mailbox.next += 1;
        mailbox.todo.push((number, request));
        link.kicker.kick();
        loop {
            if let Some(answer) = mailbox.done.remove(&number) {
                return answer;
            }
            if self.stopping() {
                return Err(Errno::EIO);
            }
            mailbox = match link.answered.wait_timeout(mailbox, WAIT_STEP) {
                Ok((guard, _)) => guard,
                Err(e) => e.into_inner().0,
            };
            if mailbox.done.contains_key(&number) {
                continue;
            }
            // The other may be waiting for us in the same way.
            drop(mailbox);
            self.serve_requests(caller);
            mailbox = lock(&link.mailbox);
        }
    }

    fn set_routes(&self, routes: &Routes) -> Result<(), Errno> {
        let list = routes.ports.iter().map(|(&port, &vcpu)| (port, vcpu));
        Ok(ioctl::set_evtchn_routes(&self.vm, list)?)
    }
}

fn perform(fd: &OwnedFd, request: Request) -> Result<Runstate, Errno> {
    match request {
        Request::Set(attr) => {
            ioctl::set_vcpu_attr(fd, attr).map(|()| Runstate::default()).map_err(Errno::from)
        }
        Request::Runstate => ioctl::runstate(fd).map_err(Errno::from),
    }
}

impl Platform for KvmPlatform {
    fn route_out(&self, port: u32, tx: BorrowedFd<'_>) -> Result<(), Errno> {
        Ok(ioctl::evtchn_to_eventfd(&self.vm, port, tx)?)
    }

    fn route_ipi(&self, port: u32, vcpu: u32) -> Result<(), Errno> {
        Ok(ioctl::evtchn_to_vcpu(&self.vm, port, vcpu)?)
    }

    fn unroute_out(&self, port: u32) {
        if let Err(e) = ioctl::evtchn_deassign(&self.vm, port) {
            tracing::warn!(port, "KVM keeps an event channel: {e}");
        }
    }

    fn route_in(&self, port: u32, vcpu: u32, rx: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut routes = lock(&self.routes);
        routes.ports.insert(port, vcpu);
        let done = self
            .set_routes(&routes)
            .and_then(|()| ioctl::irqfd(&self.vm, rx, port, true).map_err(Errno::from));
        if done.is_err() {
            routes.ports.remove(&port);
        }
        done
    }

    fn move_in(&self, port: u32, vcpu: u32) -> Result<(), Errno> {
        let mut routes = lock(&self.routes);
        if routes.ports.insert(port, vcpu) == Some(vcpu) {
            return Ok(());
        }
        self.set_routes(&routes)
    }

    fn unroute_in(&self, port: u32, rx: BorrowedFd<'_>) {
        let mut routes = lock(&self.routes);
        if let Err(e) = ioctl::irqfd(&self.vm, rx, port, false) {
            tracing::warn!(port, "KVM keeps an irqfd ({}): {e}", rx.as_raw_fd());
        }
        routes.ports.remove(&port);
        if let Err(e) = self.set_routes(&routes) {
            tracing::warn!(port, "KVM keeps an interrupt route: {e}");
        }
    }

    fn raise(&self, port: u32, vcpu: u32) -> Result<(), Errno> {
        match ioctl::evtchn_send(&self.vm, port, vcpu) {
            // Pending, but the guest has masked it: that is for the guest to see when it unmasks.
            Err(nix::errno::Errno::ENOTCONN) => Ok(()),
            other => Ok(other?),
        }
    }

    fn kick_upcall(&self, vcpu: u32) {
        let Some(link) = self.vcpus.get(vcpu as usize) else { return };
        let vector = link.vector.load(Ordering::SeqCst);
        if vector != 0 {
            // Delivered through the local APIC; KVM looks at the pending flag only for the domain's vector.
            let msi = kvm_bindings::kvm_msi {
                address_lo: 0xfee0_0000 | vcpu << 12,
                data: vector.into(),
                ..Default::default()
            };
            if let Err(e) = self.vm.signal_msi(msi) {
                tracing::warn!(vcpu, "an upcall is lost: {e}");
            }
        }
        link.kicker.kick();
    }

    fn set_callback_vector(&self, vector: u8) -> Result<(), Errno> {
        ioctl::set_upcall_vector(&self.vm, vector)?;
        self.vcpus.iter().for_each(|v| v.kicker.kick());
        Ok(())
    }

    fn set_runstate_update_flag(&self, on: bool) -> Result<(), Errno> {
        Ok(ioctl::set_runstate_update_flag(&self.vm, on)?)
    }

    fn set_vcpu_attr(&self, caller: u32, vcpu: u32, attr: VcpuAttr) -> Result<(), Errno> {
        self.request(caller, vcpu, Request::Set(attr))?;
        if let VcpuAttr::UpcallVector(vector) = attr {
            self.link(vcpu).vector.store(vector, Ordering::SeqCst);
        }
        Ok(())
    }

    fn runstate(&self, caller: u32, vcpu: u32) -> Result<Runstate, Errno> {
        self.request(caller, vcpu, Request::Runstate)
    }

    fn is_up(&self, vcpu: u32) -> bool {
        self.vcpus.get(vcpu as usize).is_some_and(|v| v.up.load(Ordering::Relaxed))
    }

    fn add_page(&self, gfn: u64, hva: u64) -> Result<(), Errno> {
        let mut routes = lock(&self.routes);
        let used = &routes.pages;
        let slot = (FIRST_PAGE_SLOT..).find(|slot| !used.values().any(|s| s == slot)).ok_or(Errno::ENOSPC)?;
        ioctl::set_memory_slot(&self.vm, slot, gfn << 12, hva, 4096)?;
        routes.pages.insert(gfn, slot);
        Ok(())
    }

    fn remove_page(&self, gfn: u64) {
        let mut routes = lock(&self.routes);
        if let Some(slot) = routes.pages.remove(&gfn)
            && let Err(e) = ioctl::set_memory_slot(&self.vm, slot, gfn << 12, 0, 0)
        {
            tracing::warn!(gfn, "KVM keeps a memory slot: {e}");
        }
    }

    fn shared_info_at(&self, gfn: u64) -> Result<(), Errno> {
        if self.shared_info_by_hva {
            return Ok(());
        }
        Ok(ioctl::set_shared_info_gfn(&self.vm, gfn)?)
    }
}

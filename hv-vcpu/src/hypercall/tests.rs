use super::*;
use crate::hypervisor::{PortFds, PortStatus};
use crate::layout::MIN_MEMORY;
use crate::platform::{Runstate, VcpuAttr};
use crate::state::PortKind;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use xen_abi::errno;
use xen_abi::event_channel::*;
use xen_abi::grant_table::*;
use xen_abi::hvm::*;
use xen_abi::memory::*;
use xen_abi::sched::*;
use xen_abi::vcpu::*;
use xen_abi::version::*;

/// Where arguments are put: linear address = physical address, but only below [`MAPPED`].
const ARG: u64 = 0x10_0000;
/// Linear addresses from here on are not mapped.
const MAPPED: u64 = 0x20_0000;
const DOMID: u16 = 7;
const VCPUS: u32 = 2;

/// Notes what was asked of KVM.
#[derive(Default)]
struct FakeKvm {
    log: Mutex<Vec<String>>,
}

impl FakeKvm {
    fn note(&self, what: String) -> Result<(), Errno> {
        self.log.lock().unwrap().push(what);
        Ok(())
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Platform for FakeKvm {
    fn route_out(&self, port: u32, _: BorrowedFd<'_>) -> Result<(), Errno> {
        self.note(format!("out {port}"))
    }
    fn route_ipi(&self, port: u32, vcpu: u32) -> Result<(), Errno> {
        self.note(format!("ipi {port} {vcpu}"))
    }
    fn unroute_out(&self, port: u32) {
        self.note(format!("unout {port}")).unwrap();
    }
    fn route_in(&self, port: u32, vcpu: u32, _: BorrowedFd<'_>) -> Result<(), Errno> {
        self.note(format!("in {port} {vcpu}"))
    }
    fn move_in(&self, port: u32, vcpu: u32) -> Result<(), Errno> {
        self.note(format!("move {port} {vcpu}"))
    }
    fn unroute_in(&self, port: u32, _: BorrowedFd<'_>) {
        self.note(format!("unin {port}")).unwrap();
    }
    fn raise(&self, port: u32, vcpu: u32) -> Result<(), Errno> {
        self.note(format!("raise {port} {vcpu}"))
    }
    fn kick_upcall(&self, vcpu: u32) {
        self.note(format!("kick {vcpu}")).unwrap();
    }
    fn set_callback_vector(&self, vector: u8) -> Result<(), Errno> {
        self.note(format!("vector {vector}"))
    }
    fn set_runstate_update_flag(&self, on: bool) -> Result<(), Errno> {
        self.note(format!("flag {on}"))
    }
    fn set_vcpu_attr(&self, _: u32, vcpu: u32, attr: VcpuAttr) -> Result<(), Errno> {
        self.note(format!("{vcpu} {attr:?}"))
    }
    fn runstate(&self, _: u32, _: u32) -> Result<Runstate, Errno> {
        Ok(Runstate { state: 1, entry_time: 2, time: [3, 4, 5, 6] })
    }
    fn is_up(&self, vcpu: u32) -> bool {
        vcpu == 0
    }
    fn add_page(&self, gfn: u64, _: u64) -> Result<(), Errno> {
        self.note(format!("page {gfn:#x}"))
    }
    fn remove_page(&self, gfn: u64) {
        self.note(format!("unpage {gfn:#x}")).unwrap();
    }
    fn shared_info_at(&self, _: u64) -> Result<(), Errno> {
        Ok(())
    }
}

/// Ports without anybody behind them.
#[derive(Default)]
struct FakeCore {
    ports: Mutex<BTreeSet<u32>>,
    printed: Mutex<Vec<u8>>,
}

impl FakeCore {
    fn add(&self) -> Result<u32, Errno> {
        let mut ports = self.ports.lock().unwrap();
        let port = (1..100).find(|p| !ports.contains(p)).ok_or(Errno::ENOSPC)?;
        ports.insert(port);
        Ok(port)
    }
}

fn eventfd() -> OwnedFd {
    nix::sys::eventfd::EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_NONBLOCK).unwrap().into()
}

impl Hypervisor for FakeCore {
    fn domid(&self) -> u16 {
        DOMID
    }
    fn alloc_unbound(&self, remote: u16) -> Result<PortFds, Errno> {
        if remote == DOMID_INVALID {
            return Err(Errno::ESRCH);
        }
        Ok(PortFds { port: self.add()?, rx: eventfd(), tx: eventfd() })
    }
    fn bind_interdomain(&self, remote: u16, _: u32) -> Result<PortFds, Errno> {
        self.alloc_unbound(remote)
    }
    fn alloc_local(&self, _: Option<u32>, _: u32) -> Result<u32, Errno> {
        self.add()
    }
    fn close(&self, port: u32) -> Result<(), Errno> {
        if self.ports.lock().unwrap().remove(&port) { Ok(()) } else { Err(Errno::ENOENT) }
    }
    fn status(&self, _: u32) -> Result<PortStatus, Errno> {
        Ok(PortStatus::Unbound { remote: 3 })
    }
    fn emergency_console(&self, bytes: &[u8]) {
        self.printed.lock().unwrap().extend_from_slice(bytes);
    }
}

struct FakeCpu(u32);

impl GuestCpu for FakeCpu {
    fn id(&self) -> u32 {
        self.0
    }
    fn translate(&self, linear: u64) -> Option<u64> {
        (linear < MAPPED).then_some(linear)
    }
}

struct Test {
    guest: Guest,
    kvm: &'static FakeKvm,
    core: &'static FakeCore,
}

fn test() -> Test {
    let layout = Layout::new(MIN_MEMORY);
    let kvm: &'static FakeKvm = Box::leak(Box::default());
    let core: &'static FakeCore = Box::leak(Box::default());
    let guest = Guest {
        mem: Box::leak(Box::new(GuestMemory::anonymous(&layout.ram()).unwrap())),
        shared_info: Box::leak(Box::new(SharedPages::new("shared", 1).unwrap())),
        grants: Box::leak(Box::new(SharedPages::new("grants", 4).unwrap())),
        layout,
        vcpus: VCPUS,
        uuid: [9; 16],
        platform: kvm,
        hv: core,
        state: Mutex::new(State::new(VCPUS)),
    };
    Test { guest, kvm, core }
}

impl Test {
    fn call(&self, nr: u64, args: [u64; 3]) -> i64 {
        let call = Call { nr, args: [args[0], args[1], args[2], 0, 0, 0], cpl: 0, long_mode: true };
        match self.guest.hypercall(&FakeCpu(0), &call) {
            Outcome::Return(value) => value,
            Outcome::Shutdown(reason) => panic!("unexpected end: {reason:?}"),
        }
    }

    /// Makes a call whose argument is a struct, and gives the struct back as the guest finds it.
    fn with<T>(&self, nr: u64, op: u32, arg: &T) -> (i64, T)
    where
        T: FromBytes + IntoBytes + Immutable + KnownLayout,
    {
        self.guest.mem.write(ARG, arg.as_bytes()).unwrap();
        let answer = self.call(nr, [op.into(), ARG, 1]);
        (answer, self.guest.fetch(&FakeCpu(0), ARG).unwrap())
    }

    fn evtchn<T>(&self, op: u32, arg: &T) -> (i64, T)
    where
        T: FromBytes + IntoBytes + Immutable + KnownLayout,
    {
        self.with(HYPERVISOR_EVENT_CHANNEL_OP, op, arg)
    }

    fn place(&self, space: u32, idx: u64, gpfn: u64) -> i64 {
        let op = XenAddToPhysmap { domid: DOMID_SELF, size: 0, space, idx, gpfn };
        self.with(HYPERVISOR_MEMORY_OP, XENMEM_ADD_TO_PHYSMAP, &op).0
    }
}

fn neg(e: i32) -> i64 {
    -i64::from(e)
}

#[test]
fn ring_3_and_32_bit_callers_get_nothing() {
    let t = test();
    for nr in 0..64 {
        for (cpl, long_mode, want) in [
            (3, true, errno::EPERM),
            (1, true, errno::EPERM),
            (3, false, errno::EPERM),
            (0, false, errno::ENOSYS),
        ] {
            let call = Call { nr, args: [2, ARG, 0, 0, 0, 0], cpl, long_mode };
            assert_eq!(t.guest.hypercall(&FakeCpu(0), &call), Outcome::Return(neg(want)));
        }
    }
    assert!(t.kvm.take().is_empty());
}

#[test]
fn version_and_features() {
    let t = test();
    assert_eq!(t.call(HYPERVISOR_XEN_VERSION, [XENVER_VERSION.into(), 0, 0]), 4 << 16 | 17);
    assert_eq!(t.call(HYPERVISOR_XEN_VERSION, [XENVER_PAGESIZE.into(), 0, 0]), 4096);
    let (answer, info) =
        t.with(HYPERVISOR_XEN_VERSION, XENVER_GET_FEATURES, &XenFeatureInfo { submap_idx: 0, submap: 0 });
    assert_eq!(answer, 0);
    assert_ne!(info.submap & 1 << xen_abi::features::XENFEAT_HVM_CALLBACK_VECTOR, 0);
    let (answer, _) =
        t.with(HYPERVISOR_XEN_VERSION, XENVER_GET_FEATURES, &XenFeatureInfo { submap_idx: 1, submap: 0 });
    assert_eq!(answer, neg(errno::EINVAL));
    assert_eq!(t.call(HYPERVISOR_XEN_VERSION, [XENVER_GUEST_HANDLE.into(), ARG, 0]), 0);
    let mut uuid = [0; 16];
    t.guest.mem.read(ARG, &mut uuid).unwrap();
    assert_eq!(uuid, [9; 16]);
}

#[test]
fn pointers_are_checked_page_by_page() {
    let t = test();
    let write =
        |at: u64, n: u64| t.call(HYPERVISOR_CONSOLE_IO, [xen_abi::console::CONSOLEIO_WRITE.into(), n, at]);
    assert_eq!(write(MAPPED - 8, 8), 0);
    for (at, n) in
        [(MAPPED - 8, 9), (MAPPED, 1), (u64::MAX, 2), (u64::MAX - 3, 8), (1 << 47, 1), (1 << 63, 1)]
    {
        assert_eq!(write(at, n), neg(errno::EFAULT), "{at:#x}+{n}");
    }
    assert_eq!(write(ARG, 0xffff_ffff), neg(errno::E2BIG));
    t.guest.mem.write(ARG, b"hello").unwrap();
    t.core.printed.lock().unwrap().clear();
    assert_eq!(write(ARG, 5), 0);
    assert_eq!(*t.core.printed.lock().unwrap(), b"hello");
}

#[test]
fn ports_live_and_die() {
    let t = test();
    let (answer, op) =
        t.evtchn(EVTCHNOP_ALLOC_UNBOUND, &EvtchnAllocUnbound { dom: DOMID_SELF, remote_dom: 3, port: 0 });
    assert_eq!((answer, op.port), (0, 1));
    assert_eq!(t.kvm.take(), ["out 1", "in 1 0"]);
    let (answer, _) =
        t.evtchn(EVTCHNOP_ALLOC_UNBOUND, &EvtchnAllocUnbound { dom: 3, remote_dom: 3, port: 0 });
    assert_eq!(answer, neg(errno::EPERM));

    let (answer, op) = t.evtchn(EVTCHNOP_BIND_IPI, &EvtchnBindIpi { vcpu: 1, port: 0 });
    assert_eq!((answer, op.port), (0, 2));
    let (answer, _) = t.evtchn(EVTCHNOP_BIND_IPI, &EvtchnBindIpi { vcpu: VCPUS, port: 0 });
    assert_eq!(answer, neg(errno::ENOENT));

    let virq = |virq, vcpu| t.evtchn(EVTCHNOP_BIND_VIRQ, &EvtchnBindVirq { virq, vcpu, port: 0 });
    assert_eq!(virq(VIRQ_TIMER, 1).1.port, 3);
    assert_eq!(virq(VIRQ_TIMER, 1).0, neg(errno::EEXIST));
    assert_eq!(virq(VIRQ_TIMER, 0).1.port, 4);
    assert_eq!(virq(VIRQ_CONSOLE, 1).0, neg(errno::EINVAL));
    assert_eq!(virq(NR_VIRQS, 0).0, neg(errno::EINVAL));
    assert_eq!(virq(VIRQ_DEBUG, 9).0, neg(errno::ENOENT));
    assert_eq!(
        t.kvm.take(),
        ["ipi 2 1", "1 Timer { port: 3, expires_ns: 0 }", "0 Timer { port: 4, expires_ns: 0 }"]
    );

    let vcpu = |port, vcpu| t.evtchn(EVTCHNOP_BIND_VCPU, &EvtchnBindVcpu { port, vcpu }).0;
    assert_eq!(vcpu(1, 1), 0);
    assert_eq!(vcpu(2, 0), neg(errno::EINVAL));
    assert_eq!(vcpu(3, 0), neg(errno::EINVAL));
    assert_eq!(vcpu(99, 0), neg(errno::EINVAL));
    assert_eq!(vcpu(1, 2), neg(errno::ENOENT));

    let status =
        |port| t.evtchn(EVTCHNOP_STATUS, &EvtchnStatus { dom: DOMID_SELF, port, ..Default::default() });
    let (_, op) = status(1);
    assert_eq!((op.status, op.vcpu, op.dom_or_irq), (EVTCHNSTAT_UNBOUND, 1, 3));
    assert_eq!(status(3).1.status, EVTCHNSTAT_VIRQ);
    assert_eq!(status(50).1.status, EVTCHNSTAT_CLOSED);
    for port in [0, EVTCHN_2L_NR_CHANNELS, u32::MAX] {
        assert_eq!(status(port).0, neg(errno::EINVAL));
        assert_eq!(t.evtchn(EVTCHNOP_SEND, &EvtchnSend { port }).0, neg(errno::EINVAL));
        assert_eq!(t.evtchn(EVTCHNOP_UNMASK, &EvtchnUnmask { port }).0, neg(errno::EINVAL));
        assert_eq!(t.evtchn(EVTCHNOP_CLOSE, &EvtchnClose { port }).0, neg(errno::EINVAL));
    }

    // The slow path of send: into the eventfd, or to the vCPU.
    t.kvm.take();
    assert_eq!(t.evtchn(EVTCHNOP_SEND, &EvtchnSend { port: 1 }).0, 0);
    assert_eq!(nix::unistd::read(&t.guest.state().fds[&1].tx, &mut [0; 8]), Ok(8));
    assert_eq!(t.evtchn(EVTCHNOP_SEND, &EvtchnSend { port: 2 }).0, 0);
    assert_eq!(t.evtchn(EVTCHNOP_SEND, &EvtchnSend { port: 3 }).0, neg(errno::EINVAL));
    assert_eq!(t.kvm.take(), ["raise 2 1"]);

    // Unmask raises again what is pending.
    let pending = t.guest.shared_info.u64_at(2048).unwrap();
    let mask = t.guest.shared_info.u64_at(2560).unwrap();
    pending.store(1 << 1, Ordering::SeqCst);
    mask.store(1 << 1 | 1 << 2, Ordering::SeqCst);
    assert_eq!(t.evtchn(EVTCHNOP_UNMASK, &EvtchnUnmask { port: 1 }).0, 0);
    assert_eq!(t.evtchn(EVTCHNOP_UNMASK, &EvtchnUnmask { port: 2 }).0, 0);
    assert_eq!(t.kvm.take(), ["raise 1 1"]);
    assert_eq!(mask.load(Ordering::SeqCst), 0);

    // A closed port takes its pending bit with it; reset closes the rest.
    pending.store(1 << 1, Ordering::SeqCst);
    assert_eq!(t.evtchn(EVTCHNOP_CLOSE, &EvtchnClose { port: 1 }).0, 0);
    assert_eq!(pending.load(Ordering::SeqCst), 0);
    assert_eq!(t.kvm.take(), ["unout 1", "unin 1"]);
    assert_eq!(t.evtchn(EVTCHNOP_CLOSE, &EvtchnClose { port: 1 }).0, neg(errno::EINVAL));
    assert_eq!(t.evtchn(EVTCHNOP_RESET, &EvtchnReset { dom: 3 }).0, neg(errno::EPERM));
    assert_eq!(t.evtchn(EVTCHNOP_RESET, &EvtchnReset { dom: DOMID_SELF }).0, 0);
    assert!(t.guest.state().ports.is_empty() && t.core.ports.lock().unwrap().is_empty());
    let (answer, _) = t.evtchn(EVTCHNOP_INIT_CONTROL, &EvtchnInitControl::default());
    assert_eq!(answer, neg(errno::ENOSYS));
}

/// Running out of ports changes nothing else (XSA-496).
#[test]
fn xsa_496_exhausted_ports_leave_the_rest() {
    let t = test();
    let mut made = 0;
    while t.evtchn(EVTCHNOP_BIND_IPI, &EvtchnBindIpi { vcpu: 0, port: 0 }).0 == 0 {
        made += 1;
    }
    assert_eq!(made, 99);
    let bind = || t.evtchn(EVTCHNOP_BIND_VIRQ, &EvtchnBindVirq { virq: VIRQ_TIMER, vcpu: 0, port: 0 });
    assert_eq!(bind().0, neg(errno::ENOSPC));
    assert_eq!(t.evtchn(EVTCHNOP_CLOSE, &EvtchnClose { port: 5 }).0, 0);
    assert_eq!((bind().0, bind().0), (0, neg(errno::EEXIST)));
    assert_eq!(t.guest.state().ports[&5].kind, PortKind::Virq(VIRQ_TIMER));
}

#[test]
fn xens_pages_move_in_and_out_of_ram() {
    let t = test();
    let mem = t.guest.mem;
    t.guest.shared_info.write(0, b"xen").unwrap();
    mem.write(0x5000, b"ram").unwrap();
    let at = |gpa| {
        let mut b = [0; 3];
        mem.read(gpa, &mut b).map(|()| b).ok()
    };
    assert_eq!(t.place(XENMAPSPACE_SHARED_INFO, 0, 5), 0);
    assert_eq!(at(0x5000), Some(*b"xen"));
    assert_eq!(t.place(XENMAPSPACE_SHARED_INFO, 0, 6), 0);
    assert_eq!((at(0x5000), at(0x6000)), (Some(*b"ram"), Some(*b"xen")));
    // Another page at the same frame takes its place.
    t.guest.grants.write(4096, b"gnt").unwrap();
    assert_eq!(t.place(XENMAPSPACE_GRANT_TABLE, 1, 6), 0);
    assert_eq!(at(0x6000), Some(*b"gnt"));
    // Outside of RAM.
    assert_eq!(t.place(XENMAPSPACE_GRANT_TABLE, 1, 0x10_0000), 0);
    assert_eq!((at(0x6000), at(0x1_0000_0000)), (Some([0; 3]), Some(*b"gnt")));
    assert_eq!(t.kvm.take(), ["page 0x100000"]);
    let remove = |gpfn| {
        let op = XenRemoveFromPhysmap { domid: DOMID_SELF, _pad: [0; 6], gpfn };
        t.with(HYPERVISOR_MEMORY_OP, XENMEM_REMOVE_FROM_PHYSMAP, &op).0
    };
    assert_eq!(remove(0x10_0000), 0);
    assert_eq!(at(0x1_0000_0000), None);
    assert_eq!(remove(0x10_0000), neg(errno::EINVAL));

    for (space, idx, gpfn, want) in [
        (XENMAPSPACE_SHARED_INFO, 1, 5, errno::EINVAL),
        (XENMAPSPACE_GRANT_TABLE, 4, 5, errno::EINVAL),
        (XENMAPSPACE_GRANT_TABLE, XENMAPIDX_GRANT_TABLE_STATUS.into(), 5, errno::EINVAL),
        (XENMAPSPACE_GRANT_TABLE, u64::MAX, 5, errno::EINVAL),
        (XENMAPSPACE_SHARED_INFO, 0, 0xfee00, errno::EINVAL),
        (XENMAPSPACE_SHARED_INFO, 0, u64::MAX, errno::EINVAL),
        (XENMAPSPACE_SHARED_INFO, 0, 1 << 40, errno::EINVAL),
        (XENMAPSPACE_GMFN_FOREIGN, 0, 5, errno::ENOSYS),
    ] {
        assert_eq!(t.place(space, idx, gpfn), neg(want));
    }
}

#[test]
fn balloon_counts_pages() {
    let t = test();
    let pages = (MIN_MEMORY / 4096) as i64;
    let current =
        || t.with(HYPERVISOR_MEMORY_OP, XENMEM_CURRENT_RESERVATION, &XenMemoryDomain { domid: DOMID_SELF }).0;
    let list = ARG + 0x1000;
    let reserve = |cmd, gfns: &[u64], order, n| {
        t.guest.mem.write(list, gfns.as_bytes()).unwrap();
        let op = XenMemoryReservation {
            extent_start: list,
            nr_extents: n,
            extent_order: order,
            domid: DOMID_SELF,
            ..Default::default()
        };
        t.with(HYPERVISOR_MEMORY_OP, cmd, &op).0
    };
    t.guest.mem.write(0x50_0000, b"x").unwrap();
    assert_eq!(reserve(XENMEM_DECREASE_RESERVATION, &[0x500, 0x501], 0, 2), 2);
    let mut byte = [1];
    t.guest.mem.read(0x50_0000, &mut byte).unwrap();
    assert_eq!((byte, current()), ([0], pages - 2));
    assert_eq!(reserve(XENMEM_POPULATE_PHYSMAP, &[0x500], 0, 1), 1);
    assert_eq!(current(), pages - 1);
    assert_eq!(reserve(XENMEM_DECREASE_RESERVATION, &[0x600], 9, 1), 1);
    assert_eq!(current(), pages - 1 - 512);
    // The second extent is not RAM; the list runs out of mapped memory; the numbers are absurd.
    assert_eq!(reserve(XENMEM_POPULATE_PHYSMAP, &[0x500, 0x100_0000], 0, 2), 1);
    assert_eq!(reserve(XENMEM_POPULATE_PHYSMAP, &[u64::MAX], 9, 1), 0);
    assert_eq!(reserve(XENMEM_POPULATE_PHYSMAP, &[0x500], 10, 1), neg(errno::EPERM));
    assert!(reserve(XENMEM_POPULATE_PHYSMAP, &[0x500], 0, u64::MAX) > 0);
    let ballooned = t.guest.state().ballooned_pages as i64;
    assert_eq!(ballooned, pages - current());
}

#[test]
fn memory_map_is_told() {
    let t = test();
    let op = XenMemoryMap { nr_entries: 16, _pad: 0, buffer: ARG + 64 };
    let (answer, op) = t.with(HYPERVISOR_MEMORY_OP, XENMEM_MEMORY_MAP, &op);
    assert_eq!((answer, op.nr_entries as usize), (0, t.guest.layout.memmap().len()));
    let entry: E820Entry = t.guest.fetch(&FakeCpu(0), ARG + 64).unwrap();
    assert_eq!((entry.addr.get(), entry.r#type.get()), (0, 1));
}

#[test]
fn hvm_params_belong_to_the_toolstack() {
    let t = test();
    let param = |op, index, value| {
        t.with(HYPERVISOR_HVM_OP, op, &XenHvmParam { domid: DOMID_SELF, _pad: 0, index, value })
    };
    t.guest.set_param(HVM_PARAM_STORE_EVTCHN, 5);
    assert_eq!(param(HVMOP_GET_PARAM, HVM_PARAM_STORE_EVTCHN, 0).1.value, 5);
    assert_eq!(param(HVMOP_SET_PARAM, HVM_PARAM_STORE_EVTCHN, 6).0, neg(errno::EPERM));
    assert_eq!(param(HVMOP_SET_PARAM, HVM_PARAM_CALLBACK_IRQ, 2 << 56 | 0xf3).0, 0);
    assert_eq!(t.kvm.take(), ["vector 243"]);
    for bad in [2 << 56 | 3, 1 << 56, 3 << 56, u64::MAX, 9] {
        assert_eq!(param(HVMOP_SET_PARAM, HVM_PARAM_CALLBACK_IRQ, bad).0, neg(errno::EINVAL));
    }
    for index in [HVM_NR_PARAMS, u32::MAX] {
        assert_eq!(param(HVMOP_GET_PARAM, index, 0).0, neg(errno::EINVAL));
        assert_eq!(param(HVMOP_SET_PARAM, index, 0).0, neg(errno::EINVAL));
    }
}

#[test]
fn grant_table_is_version_1() {
    let t = test();
    let (_, op) = t.with(
        HYPERVISOR_GRANT_TABLE_OP,
        GNTTABOP_QUERY_SIZE,
        &GnttabQuerySize { dom: DOMID_SELF, ..Default::default() },
    );
    assert_eq!((op.status, op.nr_frames, op.max_nr_frames), (GNTST_OKAY, 1, 4));
    let version =
        |v| t.with(HYPERVISOR_GRANT_TABLE_OP, GNTTABOP_SET_VERSION, &GnttabSetVersion { version: v }).0;
    assert_eq!((version(1), version(2), version(3)), (0, neg(errno::ENOSYS), neg(errno::EINVAL)));
    assert_eq!(t.place(XENMAPSPACE_GRANT_TABLE, 0, 0x300), 0);
    let setup = |nr_frames| {
        let op = GnttabSetupTable { dom: DOMID_SELF, nr_frames, frame_list: ARG + 256, ..Default::default() };
        t.with(HYPERVISOR_GRANT_TABLE_OP, GNTTABOP_SETUP_TABLE, &op).1.status
    };
    assert_eq!(setup(2), GNTST_OKAY);
    let gfn: u64 = t.guest.fetch(&FakeCpu(0), ARG + 256).unwrap();
    assert_eq!(gfn, 0x300);
    assert_eq!(setup(5), GNTST_GENERAL_ERROR);
    assert_eq!(setup(u32::MAX), GNTST_GENERAL_ERROR);
}

/// Every slot of a refused batch gets its own status (XSA-318), and it is negative (XSA-316).
#[test]
fn xsa_316_318_every_slot_is_refused() {
    let t = test();
    let size = size_of::<GnttabMapGrantRef>() as u64;
    t.guest.mem.write(ARG, &[0; 4096]).unwrap();
    assert_eq!(t.call(HYPERVISOR_GRANT_TABLE_OP, [GNTTABOP_MAP_GRANT_REF.into(), ARG, 100]), 0);
    for i in 0..100 {
        let op: GnttabMapGrantRef = t.guest.fetch(&FakeCpu(0), ARG + i * size).unwrap();
        assert!(op.status < 0);
    }
    let op: GnttabMapGrantRef = t.guest.fetch(&FakeCpu(0), ARG + 100 * size).unwrap();
    assert_eq!(op.status, 0, "nothing beyond the batch is written");
}

#[test]
fn vcpu_info_moves_with_what_is_pending() {
    let t = test();
    t.guest.shared_info.write(64, &[7; 64]).unwrap();
    let register = |vcpu: u64, mfn, offset| {
        let op = VcpuRegisterVcpuInfo { mfn, offset, _rsvd: 0 };
        t.guest.mem.write(ARG, op.as_bytes()).unwrap();
        t.call(HYPERVISOR_VCPU_OP, [VCPUOP_REGISTER_VCPU_INFO.into(), vcpu, ARG])
    };
    assert_eq!(register(1, 0x200, 4096 - 63), neg(errno::ENXIO));
    assert_eq!(register(1, 0x200, 4), neg(errno::ENXIO));
    assert_eq!(register(1, u64::MAX, 0), neg(errno::EINVAL));
    assert_eq!(register(1, 0x100_0000, 0), neg(errno::EINVAL));
    assert_eq!(register(VCPUS.into(), 0x200, 0), neg(errno::ENOENT));
    assert_eq!(register(1, 0x200, 128), 0);
    assert_eq!(t.kvm.take(), ["1 VcpuInfo(2097280)", "kick 1"]);
    let info: VcpuInfo = {
        let mut b = [0; 64];
        t.guest.mem.read(0x20_0080, &mut b).unwrap();
        VcpuInfo::read_from_bytes(&b).unwrap()
    };
    assert_eq!(
        (info.evtchn_upcall_pending, info.evtchn_pending_sel, info.arch.cr2),
        (1, u64::MAX, 0x0707_0707_0707_0707)
    );
    assert_eq!(register(1, 0x201, 0), neg(errno::EINVAL), "once only");
}

#[test]
fn timers_set_early_start_with_the_virq() {
    let t = test();
    let op = VcpuSetSingleshotTimer { timeout_abs_ns: 1234, flags: 0, _pad: 0 };
    t.guest.mem.write(ARG, op.as_bytes()).unwrap();
    let set = |vcpu| t.call(HYPERVISOR_VCPU_OP, [VCPUOP_SET_SINGLESHOT_TIMER.into(), vcpu, ARG]);
    assert_eq!((set(0), set(1)), (0, neg(errno::EINVAL)));
    t.evtchn(EVTCHNOP_BIND_VIRQ, &EvtchnBindVirq { virq: VIRQ_TIMER, vcpu: 0, port: 0 });
    assert_eq!(t.kvm.take(), ["0 Timer { port: 1, expires_ns: 1234 }"]);
    assert_eq!(t.call(HYPERVISOR_SET_TIMER_OP, [99, 0, 0]), 0);
    assert_eq!(t.kvm.take(), ["0 Timer { port: 1, expires_ns: 99 }"]);
    t.evtchn(EVTCHNOP_CLOSE, &EvtchnClose { port: 1 });
    assert_eq!(t.kvm.take(), ["0 Timer { port: 0, expires_ns: 0 }"]);
}

#[test]
fn shutdown_has_a_reason() {
    let t = test();
    let end = |op: u32, reason: u32| {
        t.guest.mem.write(ARG, &reason.to_le_bytes()).unwrap();
        let args = [op.into(), ARG, 0, 0, 0, 0];
        t.guest.hypercall(&FakeCpu(0), &Call { nr: HYPERVISOR_SCHED_OP, args, cpl: 0, long_mode: true })
    };
    assert_eq!(end(SCHEDOP_SHUTDOWN, SHUTDOWN_SUSPEND), Outcome::Return(neg(errno::EOPNOTSUPP)));
    assert_eq!(end(SCHEDOP_SHUTDOWN, SHUTDOWN_REBOOT), Outcome::Shutdown(ShutdownReason::Reboot));
    assert_eq!(end(SCHEDOP_SHUTDOWN, 77), Outcome::Shutdown(ShutdownReason::Crash));
    assert_eq!(end(SCHEDOP_SHUTDOWN_CODE, SHUTDOWN_CRASH), Outcome::Return(0));
    assert_eq!(end(SCHEDOP_SHUTDOWN, SHUTDOWN_POWEROFF), Outcome::Shutdown(ShutdownReason::Crash));
    assert_eq!(end(SCHEDOP_PIN_OVERRIDE, 0), Outcome::Return(neg(errno::EPERM)));
}

#[test]
fn multicall_gives_each_its_result() {
    let t = test();
    let entry = |op, args| MulticallEntry { op, result: 1, args };
    let calls = [
        entry(HYPERVISOR_XEN_VERSION, [XENVER_VERSION.into(), 0, 0, 0, 0, 0]),
        entry(HYPERVISOR_MULTICALL, [ARG, 2, 0, 0, 0, 0]),
        entry(HYPERVISOR_SCHED_OP, [SCHEDOP_SHUTDOWN.into(), ARG, 0, 0, 0, 0]),
        entry(999, [0; 6]),
    ];
    t.guest.mem.write(ARG, calls.as_bytes()).unwrap();
    assert_eq!(t.call(HYPERVISOR_MULTICALL, [ARG, 4, 0]), 0);
    let result = |i: u64| {
        let e: MulticallEntry = t.guest.fetch(&FakeCpu(0), ARG + i * 64).unwrap();
        e.result as i64
    };
    assert_eq!(result(0), 4 << 16 | 17);
    assert_eq!(
        (result(1), result(2), result(3)),
        (neg(errno::EINVAL), neg(errno::ENOSYS), neg(errno::ENOSYS))
    );
    assert_eq!(t.call(HYPERVISOR_MULTICALL, [MAPPED - 64, 2, 0]), neg(errno::EFAULT));
}

#[test]
fn state_can_be_serialised() {
    fn is_serialisable<T: serde::Serialize + serde::de::DeserializeOwned>() {}
    is_serialisable::<State>();
}

/// A number that is often one of those that matter.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..64, Just(ARG), Just(MAPPED - 4), Just(u64::MAX), Just(1 << 47), any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Whatever a guest passes, it gets an answer, and an error is one of Xen's.
    #[test]
    fn garbage_calls_get_an_answer(
        nr in 0u64..64,
        args in [number(), number(), number(), number(), number(), number()],
        bytes in proptest::collection::vec(prop_oneof![Just(0u8), Just(0xff), any::<u8>()], 64),
    ) {
        let t = test();
        t.guest.mem.write(ARG, &bytes).unwrap();
        let call = Call { nr, args, cpl: 0, long_mode: true };
        match t.guest.hypercall(&FakeCpu(0), &call) {
            Outcome::Return(value) => prop_assert!(value >= 0 || errno::name(value as i32).is_some(), "{value}"),
            Outcome::Shutdown(_) => prop_assert_eq!(nr, HYPERVISOR_SCHED_OP),
        }
    }
}

//! What SIGUSR2 logs of a guest, for a person who looks for the reason why it stands still: its event channels, and for
//! each vCPU its registers, local APIC, timer and the top of its stack (`docs/lab.md`, "A guest that hangs").

use super::{KvmPlatform, ioctl};
use crate::hypercall::Guest;
use kvm_ioctls::VcpuFd;
use nix::sys::signal::{SigSet, Signal};
use std::mem::offset_of;
use xen_abi::xen::{SharedInfo, VcpuInfo};

/// 8-byte words of the stack that are logged.
const STACK_WORDS: u64 = 64;

/// Blocks the signal in this thread and all that it starts. Call it before there are others.
pub fn block_signal() {
    // Without it the signal would end the process, which its sender did not mean; nothing else depends on it.
    let _ = SigSet::from_iter([Signal::SIGUSR2]).thread_block();
}

/// Waits for the signal in a thread of its own.
pub fn serve_signal(guest: &'static Guest, platform: &'static KvmPlatform) -> std::io::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGUSR2]);
    std::thread::Builder::new().name("look".into()).stack_size(128 << 10).spawn(move || {
        while signals.wait().is_ok() {
            channels(guest);
            platform.look_at_all();
        }
    })?;
    Ok(())
}

/// The words of a bitmap in shared_info that are not 0, as (index, word).
fn words(guest: &Guest, at: usize) -> Vec<(usize, u64)> {
    let word = |i: usize| {
        let mut bytes = [0; 8];
        guest.shared_info.read((at + i * 8) as u64, &mut bytes)?;
        Some(u64::from_le_bytes(bytes))
    };
    (0..64).filter_map(|i| word(i).filter(|w| *w != 0).map(|w| (i, w))).collect()
}

/// A vCPU's `vcpu_info`: (upcall pending, upcall mask, selector).
fn vcpu_info(guest: &Guest, vcpu: usize, registered: Option<u64>) -> (u8, u8, u64) {
    let mut bytes = [0; size_of::<VcpuInfo>()];
    match registered {
        Some(gpa) => drop(guest.mem.read(gpa, &mut bytes)),
        None => drop(guest.shared_info.read((vcpu * bytes.len()) as u64, &mut bytes)),
    }
    let mut selector = [0; 8];
    selector.copy_from_slice(&bytes[8..16]);
    (bytes[0], bytes[1], u64::from_le_bytes(selector))
}

fn channels(guest: &Guest) {
    let (ports, infos) = match guest.state.try_lock() {
        Ok(state) => {
            let infos =
                state.vcpus.iter().enumerate().map(|(i, v)| vcpu_info(guest, i, v.vcpu_info)).collect();
            (format!("{:?}", state.ports), infos)
        }
        Err(_) => ("locked".to_owned(), Vec::new()),
    };
    let unmasked: Vec<_> = words(guest, offset_of!(SharedInfo, evtchn_mask))
        .into_iter()
        .map(|(i, w)| (i, !w))
        .filter(|w| w.1 != 0)
        .collect();
    tracing::info!(
        domid = guest.hv.domid(),
        pending = format_args!("{:x?}", words(guest, offset_of!(SharedInfo, evtchn_pending))),
        unmasked = format_args!("{unmasked:x?}"),
        vcpu_info = format_args!("{infos:x?}"),
        ports,
        "event channels"
    );
}

/// Logs a vCPU. Call it from its own thread.
pub fn vcpu(id: u32, vcpu: &VcpuFd, guest: &Guest, platform: &KvmPlatform) {
    let (Ok(regs), Ok(events), Ok(mp), Ok(lapic)) =
        (vcpu.get_regs(), vcpu.get_vcpu_events(), vcpu.get_mp_state(), vcpu.get_lapic())
    else {
        tracing::warn!(vcpu = id, "KVM does not tell the vCPU's state");
        return;
    };
    // Registers of 32 bits, 16 bytes apart: eight each for in service (0x100) and requested (0x200).
    let byte = |at: usize| u32::from(lapic.regs.get(at).copied().unwrap_or(0) as u8);
    let register = |at: usize| (0..4).fold(0, |word, i| word | byte(at + i) << (8 * i));
    let bits = |at: usize| (0..8).map(|i| register(at + 16 * i)).collect::<Vec<_>>();
    let stack: Vec<u64> = (0..STACK_WORDS)
        .map_while(|slot| {
            let t = vcpu.translate_gva(regs.rsp.wrapping_add(slot * 8)).ok()?;
            let mut bytes = [0; 8];
            guest.mem.read(t.physical_address, &mut bytes).ok().filter(|()| t.valid != 0)?;
            Some(u64::from_le_bytes(bytes))
        })
        .filter(|word| *word >> 47 == 0x1_ffff)
        .collect();
    tracing::info!(
        domid = guest.hv.domid(),
        vcpu = id,
        rip = format_args!("{:#x}", regs.rip),
        rsp = format_args!("{:#x}", regs.rsp),
        rflags = format_args!("{:#x}", regs.rflags),
        mp_state = mp.mp_state,
        injected = events.interrupt.injected,
        vector = events.interrupt.nr,
        shadow = events.interrupt.shadow,
        in_service = format_args!("{:x?}", bits(0x100)),
        requested = format_args!("{:x?}", bits(0x200)),
        timer = ?ioctl::timer(&platform.link(id).fd).ok(),
        stack = format_args!("{stack:x?}"),
        "vCPU"
    );
}

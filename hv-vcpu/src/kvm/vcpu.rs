//! A vCPU's thread: runs the guest, and answers its exits.

use super::{KvmPlatform, ioctl, look};
use crate::acpi;
use crate::hypercall::{Guest, Outcome};
use crate::hypervisor::ShutdownReason;
use crate::platform::GuestCpu;
use kvm_ioctls::{VcpuExit, VcpuFd};

/// The keyboard controller's command port: an old way to reset.
const KEYBOARD_PORT: u16 = 0x64;
/// Its "pulse the reset line".
const KEYBOARD_RESET: u8 = 0xfe;
/// The timer chip's counter by which a PC calibrates its clock. There is none in a PVH domain.
const PIT_CHANNEL_2: u16 = 0x42;
/// The debug port that Linux prints to with `earlyprintk=xen`.
const DEBUG_PORT: u16 = 0xe9;

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// What hv-core is told.
    pub reason: ShutdownReason,
    /// What happened, if it was not the guest's wish.
    pub detail: Option<String>,
    /// The guest's registers are not its own (a known fault of nested emulation), so nothing can be said of it.
    pub emulator_fault: bool,
}

impl End {
    fn wish(reason: ShutdownReason) -> Self {
        Self { reason, detail: None, emulator_fault: false }
    }
}

struct Cpu<'a> {
    id: u32,
    fd: &'a VcpuFd,
}

impl GuestCpu for Cpu<'_> {
    fn id(&self) -> u32 {
        self.id
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        let t = self.fd.translate_gva(linear).ok()?;
        (t.valid != 0).then_some(t.physical_address)
    }
}

/// What an exit asks for, free of the borrow of the vCPU.
enum Step {
    Go,
    Xen,
    End(End),
    Fail(String, ShutdownReason),
}

/// Runs vCPU `id` until the guest ends. `None`: another vCPU ended it.
pub fn run(id: u32, vcpu: &mut VcpuFd, guest: &Guest, platform: &KvmPlatform) -> Option<End> {
    let kicker = &platform.link(id).kicker;
    kicker.attach();
    loop {
        platform.serve_requests(id);
        if platform.stopping() {
            return None;
        }
        let step = match vcpu.run() {
            Ok(exit) => {
                platform.mark_up(id);
                handle(exit, guest)
            }
            // Kicked, or a secondary vCPU that still waits for its INIT and SIPI.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                kicker.clear();
                if platform.take_look(id) {
                    look::vcpu(id, vcpu, guest, platform);
                }
                Step::Go
            }
            Err(e) => Step::Fail(format!("KVM_RUN failed: {e}"), ShutdownReason::Crash),
        };
        match step {
            Step::Go => {}
            Step::End(end) => return Some(end),
            Step::Fail(mut what, reason) => {
                if let Some(error) = ioctl::internal_error_of(vcpu) {
                    what.push_str(&error);
                }
                return Some(broken(id, vcpu, guest, what, reason));
            }
            Step::Xen => {
                let Some(call) = ioctl::hypercall_of(vcpu) else {
                    let what = format!("unknown exit {}", vcpu.get_kvm_run().exit_reason);
                    return Some(broken(id, vcpu, guest, what, ShutdownReason::Crash));
                };
                match guest.hypercall(&Cpu { id, fd: vcpu }, &call) {
                    Outcome::Return(value) => ioctl::set_hypercall_result(vcpu, value),
                    Outcome::Shutdown(reason) => return Some(End::wish(reason)),
                }
            }
        }
    }
}

fn handle(exit: VcpuExit<'_>, guest: &Guest) -> Step {
    match exit {
        VcpuExit::Unsupported(_) => Step::Xen,
        VcpuExit::IoOut(port, data) => match (port, data) {
            (acpi::SLEEP_PORT, &[acpi::SLEEP_S5, ..]) => Step::End(End::wish(ShutdownReason::Poweroff)),
            (acpi::RESET_PORT, &[value, ..]) if value & acpi::RESET_VALUE == acpi::RESET_VALUE => {
                Step::End(End::wish(ShutdownReason::Reboot))
            }
            (KEYBOARD_PORT, &[KEYBOARD_RESET, ..]) => Step::End(End::wish(ShutdownReason::Reboot)),
            (DEBUG_PORT, bytes) => {
                guest.hv.emergency_console(bytes);
                Step::Go
            }
            _ => Step::Go,
        },
        VcpuExit::IoIn(port, data) => {
            // Nobody there: a floating bus. The debug port answers with its own number, as Bochs does.
            let value = match port {
                DEBUG_PORT => DEBUG_PORT as u8,
                acpi::SLEEP_PORT | acpi::SLEEP_STATUS_PORT => 0,
                // Linux takes all ones from this counter for one that stands still at its start, and reads it
                // 100,000 times to see it move (4 s in the lab); with zeros it gives up at once.
                PIT_CHANNEL_2 => 0,
                _ => 0xff,
            };
            data.fill(value);
            Step::Go
        }
        VcpuExit::MmioRead(_, data) => {
            data.fill(0xff);
            Step::Go
        }
        VcpuExit::MmioWrite(..) | VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => Step::Go,
        VcpuExit::Shutdown => Step::Fail("triple fault".into(), ShutdownReason::Reboot),
        VcpuExit::FailEntry(reason, _) => {
            Step::Fail(format!("the CPU refuses the guest's state ({reason:#x})"), ShutdownReason::Crash)
        }
        VcpuExit::InternalError => {
            Step::Fail("KVM can't emulate an instruction".into(), ShutdownReason::Crash)
        }
        other => Step::Fail(format!("unexpected exit {other:?}"), ShutdownReason::Crash),
    }
}

/// The guest can't go on: collects what helps to see why.
fn broken(id: u32, vcpu: &VcpuFd, guest: &Guest, what: String, reason: ShutdownReason) -> End {
    let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return End { reason, detail: Some(what), emulator_fault: false };
    };
    let cr3_gfn = (sregs.cr3 & 0x000f_ffff_ffff_f000) >> 12;
    let emulator_fault = sregs.cr0 & (1 << 31) != 0 && !guest.mem.is_ram(cr3_gfn);
    let detail = format!(
        "vCPU {id}: {what}; rip={:#x} rsp={:#x} rflags={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}{}",
        regs.rip,
        regs.rsp,
        regs.rflags,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.efer,
        if emulator_fault {
            " (these registers are not the guest's: a fault of nested emulation)"
        } else {
            ""
        },
    );
    End { reason, detail: Some(detail), emulator_fault }
}

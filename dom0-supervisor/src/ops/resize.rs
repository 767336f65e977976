//! Memory and processors of a running QEMU guest. The wish is written where Xen's toolstack writes it; qemu-bridge follows. What the guest
//! does not follow is taken back.

use std::time::{Duration, Instant};

use super::create::no_guest;
use crate::config::GuestType;
use crate::manager::{Manager, OpError};
use crate::state::Guest;
use crate::xs_layout;

/// How long a guest may take: its driver moves what is in the memory that it gives back.
const PATIENCE: Duration = Duration::from_secs(15);
/// The guest's memory comes in blocks of its own size; half of one may be missing.
const BLOCK: u64 = 2 << 20;

impl Manager {
    fn resizable(&self, guest: &str) -> Result<(String, Guest), OpError> {
        let inner = self.inner();
        let (name, record) = inner.state.find(guest).ok_or_else(|| no_guest(guest))?;
        let at = format!("guest {name}");
        if record.config.guest_type != GuestType::Qemu {
            return Err(OpError::Failed(format!("{at}: only guests of type \"qemu\" can do that")));
        }
        self.may_change_devices(&inner.state, name, record).map_err(|e| e.at(&at))?;
        Ok((name.clone(), record.clone()))
    }

    /// Gives a running QEMU guest so much memory, MiB, between what its domain file calls `memory` and `maxmem`. It stays over reboots.
    ///
    /// # Errors
    /// One line each; the guest is asked to go back to what it had.
    pub fn set_memory(&self, guest: &str, mib: u64) -> Result<(), OpError> {
        let (name, record) = self.resizable(guest)?;
        let (least, most) = (record.config.memory.unwrap_or(0), record.config.maxmem());
        if !(least..=most).contains(&mib) {
            return Err(OpError::Invalid(format!(
                "guest {name}: memory must be {least} to {most} MiB, as memory and maxmem in its domain file say"
            )));
        }
        let mut changed = record.clone();
        changed.memory = Some(mib);
        let wanted = mib << 20;
        self.resize(
            &name,
            &record,
            &changed,
            |has| has.memory_bytes.abs_diff(wanted) < BLOCK,
            |has| format!("it has {} MiB now; does it have the virtio_mem driver?", has.memory_bytes >> 20),
        )
    }

    /// Gives a running QEMU guest so many processors, between what its domain file calls `vcpus` and `maxvcpus`. It stays over reboots.
    ///
    /// # Errors
    /// As [`Manager::set_memory`].
    pub fn set_vcpus(&self, guest: &str, count: u32) -> Result<(), OpError> {
        let (name, record) = self.resizable(guest)?;
        let (least, most) = (record.config.vcpus(), record.config.maxvcpus());
        if !(least..=most).contains(&count) {
            return Err(OpError::Invalid(format!(
                "guest {name}: processors must be {least} to {most}, as vcpus and maxvcpus in its domain file say"
            )));
        }
        let mut changed = record.clone();
        changed.vcpus = Some(count);
        self.resize(
            &name,
            &record,
            &changed,
            |has| has.vcpus == count,
            |has| format!("it has {} processors now", has.vcpus),
        )
    }

    /// Writes the wish, waits for it, and keeps it in the record only then: whatever happens before, a new start has what was before.
    fn resize(
        &self,
        name: &str,
        before: &Guest,
        after: &Guest,
        done: impl Fn(&proto::qemu::QemuSizes) -> bool,
        has: impl Fn(&proto::qemu::QemuSizes) -> String,
    ) -> Result<(), OpError> {
        let at = format!("guest {name}");
        let Some(domain) = before.domain else {
            return Err(OpError::Failed(format!("{at}: it does not run")));
        };
        let (_, bridge) = self.bridge(name)?;
        self.store.apply(&xs_layout::size_nodes(after, domain.domid))?;
        let began = Instant::now();
        let why = loop {
            match self.hv.qemu_sizes(&bridge.control_socket) {
                Ok(sizes) if done(&sizes) => {
                    let (memory, vcpus) = (after.memory, after.vcpus);
                    self.inner().change(|state| {
                        if let Some(guest) = state.guests.get_mut(name) {
                            guest.memory = memory;
                            guest.vcpus = vcpus;
                        }
                    })?;
                    let text = format!("{} MiB, {} processors", after.memory_mib(), after.vcpus_now());
                    self.events.tell("operation", name, domain.domid, text);
                    return Ok(());
                }
                Ok(sizes) if began.elapsed() > PATIENCE => break has(&sizes),
                Err(e) if began.elapsed() > PATIENCE => break e.to_string(),
                _ => std::thread::sleep(self.timing.poll),
            }
        };
        self.store.apply(&xs_layout::size_nodes(before, domain.domid))?;
        let patience = PATIENCE.as_secs();
        Err(OpError::Failed(format!(
            "{at}: it did not follow within {patience} s and is asked to go back: {why}"
        )))
    }
}

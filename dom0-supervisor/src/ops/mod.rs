//! Operations of several steps.
//!
//! ```text
//!             begin (saved)           last step (saved)
//!   request ───────────────► Do 0..n ───────────────────► done
//!                              │ a step fails for good (saved)
//!                              ▼
//!                            Undo 0..m ─────────────────► nothing left, failure noted
//! ```
//! After every step the state file says how far it is. dom0 can be killed anywhere: the next one finds the operation and goes on
//! where it was, so a step that was begun is carried out again. That is why each step first looks at what is there:
//! domains by their uuid, nodes by a marker that is written in the same transaction as the rest.

mod create;
mod disk;
mod in_use;
mod qemu;
mod resize;
pub(crate) use create::no_guest;
pub(crate) use steps_do::numbers;
pub(crate) use usb::resource as usb_resource;
mod steps_do;
mod steps_undo;
mod unmanaged;
mod usb;
mod vif;

#[cfg(test)]
mod bad_input_tests;
#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod kill_tests;
#[cfg(test)]
mod usb_tests;
#[cfg(test)]
mod vif_tests;

use std::time::Instant;

use crate::manager::{Manager, OpError};
use crate::state::{Guest, Phase, Saga, SagaKind, State};

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Find the backends, make the guest's own ones.
    Backends,
    /// Make the guest's domain, paused.
    Domain,
    /// Write its nodes and those of its devices.
    Nodes,
    /// Start its process.
    Start,
    /// Wait until backends took up the devices and the guest gave a sign of life.
    Ready,
    /// End the guest's domain.
    EndDomain,
    /// Have the backends let go.
    CloseDevices,
    /// Remove the nodes.
    RemoveNodes,
    /// End the guest's own backends.
    RemoveBackends,
    /// Wait until the domain is gone.
    Gone,
    /// Remove the record.
    Forget,
    /// One disk: make its backend.
    DiskBackend,
    /// Write its nodes.
    DiskNodes,
    /// Wait until its backend took it up.
    DiskReady,
    /// Have both ends let go.
    DiskUnplug,
    /// It stays after all.
    DiskReplug,
    /// Remove its nodes.
    DiskRemoveNodes,
    /// End its backend.
    DiskRemoveBackend,
    /// Remove it from the record.
    DiskForget,
    /// One vif: find its backend.
    VifBackend,
    /// Write its nodes.
    VifNodes,
    /// Wait until its backend took it up.
    VifReady,
    /// Have both ends let go.
    VifUnplug,
    /// It stays after all.
    VifReplug,
    /// Remove its nodes.
    VifRemoveNodes,
    /// It is another backend's.
    VifSwitch,
    /// Remove it from the record.
    VifForget,
    /// One USB device: approve its file and write its node.
    UsbNodes,
    /// Wait until QEMU has it.
    UsbReady,
    /// Remove its node and wait until QEMU let go.
    UsbUnplug,
    /// Remove it from the record.
    UsbForget,
    /// Let its backend open the new image, and have its next process do so.
    SnapshotPrepare,
    /// Make that process, and see that it has a disk.
    SnapshotSwitch,
    /// The image as it was.
    SnapshotBack,
    /// Have the backend's next process put the image into its backing file while it serves it.
    CommitPrepare,
    /// Wait until the backing file has everything.
    CommitWait,
    /// Have the backend's next process serve the backing file alone.
    CommitPivot,
}

const REMOVE: [Step; 6] =
    [Step::EndDomain, Step::CloseDevices, Step::RemoveNodes, Step::RemoveBackends, Step::Gone, Step::Forget];

/// The steps of an operation.
pub(crate) fn steps(saga: &Saga) -> &'static [Step] {
    match (saga.phase, saga.kind) {
        (Phase::Do, SagaKind::Create) => {
            &[Step::Backends, Step::Domain, Step::Nodes, Step::Start, Step::Ready]
        }
        (Phase::Do, SagaKind::Reboot) => &[
            Step::EndDomain,
            Step::CloseDevices,
            Step::RemoveNodes,
            Step::Gone,
            Step::Backends,
            Step::Domain,
            Step::Nodes,
            Step::Start,
            Step::Ready,
        ],
        (Phase::Do, SagaKind::AttachDisk) => &[Step::DiskBackend, Step::DiskNodes, Step::DiskReady],
        (Phase::Do, SagaKind::DetachDisk) | (Phase::Undo, SagaKind::AttachDisk) => {
            &[Step::DiskUnplug, Step::DiskRemoveNodes, Step::DiskRemoveBackend, Step::DiskForget]
        }
        (Phase::Undo, SagaKind::DetachDisk) => &[Step::DiskReplug],
        (Phase::Do, SagaKind::SnapshotDisk) => &[Step::SnapshotPrepare, Step::SnapshotSwitch],
        (Phase::Do, SagaKind::ChangeMedium) => &[Step::SnapshotPrepare, Step::SnapshotSwitch],
        (Phase::Do, SagaKind::CommitDisk) => &[
            Step::CommitPrepare,
            Step::SnapshotSwitch,
            Step::CommitWait,
            Step::CommitPivot,
            Step::SnapshotSwitch,
        ],
        (Phase::Undo, SagaKind::SnapshotDisk | SagaKind::CommitDisk | SagaKind::ChangeMedium) => {
            &[Step::SnapshotBack]
        }
        (Phase::Do, SagaKind::AttachVif) => &[Step::VifBackend, Step::VifNodes, Step::VifReady],
        (Phase::Do, SagaKind::DetachVif) | (Phase::Undo, SagaKind::AttachVif) => {
            &[Step::VifUnplug, Step::VifRemoveNodes, Step::VifForget]
        }
        (Phase::Undo, SagaKind::DetachVif) => &[Step::VifReplug],
        (Phase::Do, SagaKind::AttachUsb) => &[Step::UsbNodes, Step::UsbReady],
        (Phase::Do, SagaKind::DetachUsb) | (Phase::Undo, SagaKind::AttachUsb) => {
            &[Step::UsbUnplug, Step::UsbForget]
        }
        (Phase::Undo, SagaKind::DetachUsb) => &[Step::UsbNodes],
        // There and back are the same way.
        (_, SagaKind::MoveVif) => {
            &[Step::VifUnplug, Step::VifRemoveNodes, Step::VifSwitch, Step::VifNodes, Step::VifReady]
        }
        (Phase::Do, SagaKind::Destroy) | (Phase::Undo, _) => &REMOVE,
    }
}

/// What a step that is done changes in the record.
pub(crate) type Change = Box<dyn FnOnce(&mut State, &str)>;

/// A step that changes nothing.
pub(crate) fn nothing() -> Change {
    Box::new(|_, _| ())
}

/// A change of the guest's record, if it is still there.
pub(crate) fn of_guest(change: impl FnOnce(&mut Guest) + 'static) -> Change {
    Box::new(move |state, name| {
        if let Some(guest) = state.guests.get_mut(name) {
            change(guest);
        }
    })
}

impl Manager {
    /// Carries out an operation to its end, in this thread. Nobody else carries it out meanwhile: a second caller gets `Busy`.
    ///
    /// # Errors
    /// Why it failed; it was undone then, or (`Unavailable`, `Timeout`) will be taken up again by [`Manager::reconcile`].
    pub(crate) fn run(&self, id: u64) -> Result<(), OpError> {
        if !self.claim(id) {
            return Err(OpError::Busy("the operation is under way".into()));
        }
        self.run_claimed(id)
    }

    /// True if nobody carries it out; from then on the caller does, by [`Manager::run_claimed`].
    pub(crate) fn claim(&self, id: u64) -> bool {
        self.inner().active.insert(id)
    }

    /// As [`Manager::run`], after [`Manager::claim`].
    ///
    /// # Errors
    /// As [`Manager::run`].
    pub(crate) fn run_claimed(&self, id: u64) -> Result<(), OpError> {
        let result = self.run_steps(id);
        self.inner().active.remove(&id);
        result
    }

    fn run_steps(&self, id: u64) -> Result<(), OpError> {
        let mut began = Instant::now();
        let mut why = None;
        loop {
            let found = {
                let inner = self.inner();
                let saga = inner.state.sagas.get(&id).cloned();
                saga.map(|s| (inner.state.guests.get(&s.guest).cloned(), s))
            };
            let Some((guest, saga)) = found else {
                return why.map_or(Ok(()), |why| Err(OpError::Failed(why)));
            };
            let step = steps(&saga).get(saga.step).copied();
            let (Some(step), Some(guest)) = (step, guest) else {
                // Nothing left to do, or nothing left to do it for.
                self.inner().change(|state| state.sagas.remove(&id))?;
                continue;
            };
            tracing::debug!(saga = id, guest = saga.guest, ?step, phase = ?saga.phase, "step");
            if saga.phase == Phase::Undo {
                why = saga.why.clone().or(why);
            }
            match self.step(step, &guest, &saga) {
                Ok(change) => {
                    self.commit(id, &saga, change)?;
                    began = Instant::now();
                }
                Err(OpError::Killed) => return Err(OpError::Killed),
                Err(OpError::Unavailable(_)) if began.elapsed() < self.timing.passing => {
                    std::thread::sleep(self.timing.poll * 4);
                }
                // A device that the guest has let go of stays away.
                Err(e)
                    if matches!(
                        saga.kind,
                        SagaKind::DetachDisk | SagaKind::DetachVif | SagaKind::DetachUsb
                    ) && saga.step > 0 =>
                {
                    return Err(e);
                }
                Err(e) if saga.phase == Phase::Do && saga.kind != SagaKind::Destroy => {
                    self.turn_back(id, &saga, &e)?;
                    began = Instant::now();
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn step(&self, step: Step, guest: &Guest, saga: &Saga) -> Result<Change, OpError> {
        match step {
            Step::DiskBackend
            | Step::DiskNodes
            | Step::DiskReady
            | Step::DiskUnplug
            | Step::DiskReplug
            | Step::DiskRemoveNodes
            | Step::DiskRemoveBackend
            | Step::DiskForget
            | Step::SnapshotPrepare
            | Step::SnapshotSwitch
            | Step::SnapshotBack
            | Step::CommitPrepare
            | Step::CommitWait
            | Step::CommitPivot => self.disk_step(step, guest, saga),
            Step::VifBackend
            | Step::VifNodes
            | Step::VifReady
            | Step::VifUnplug
            | Step::VifReplug
            | Step::VifRemoveNodes
            | Step::VifSwitch
            | Step::VifForget => self.vif_step(step, guest, saga),
            Step::UsbNodes | Step::UsbReady | Step::UsbUnplug | Step::UsbForget => {
                self.usb_step(step, guest, saga)
            }
            Step::Backends => self.do_backends(guest),
            Step::Domain => self.do_domain(guest),
            Step::Nodes => self.do_nodes(guest),
            Step::Start => self.do_start(guest),
            Step::Ready => self.do_ready(guest),
            Step::EndDomain => self.undo_domain(guest),
            Step::CloseDevices => self.undo_devices(guest),
            Step::RemoveNodes => self.undo_nodes(guest),
            Step::RemoveBackends => self.undo_backends(guest),
            Step::Gone => self.await_gone(guest),
            Step::Forget => Ok(Box::new(|state, name| {
                state.guests.remove(name);
            })),
        }
    }

    /// Notes that a step is done, with the last one that the operation is.
    fn commit(&self, id: u64, at: &Saga, change: Change) -> Result<(), OpError> {
        let failed = self.inner().change(|state| {
            change(state, &at.guest);
            let saga = state.sagas.get_mut(&id)?;
            // Turned round meanwhile by a destroy: what the step did is noted, the way is another.
            if (saga.phase, saga.step) != (at.phase, at.step) {
                return None;
            }
            saga.step += 1;
            if saga.step < steps(saga).len() {
                return None;
            }
            let saga = state.sagas.remove(&id)?;
            let why = saga.why.filter(|_| saga.phase == Phase::Undo);
            if let Some(why) = &why {
                state.note_failure(&saga.guest, why.clone(), crate::events::unix_ms());
            }
            Some((saga.kind, saga.phase, why))
        })?;
        if let Some((kind, phase, why)) = failed {
            let text = match (kind, phase) {
                (_, Phase::Undo) => format!("undone: {}", why.unwrap_or_default()),
                (SagaKind::Create, _) => "created".into(),
                (SagaKind::Reboot, _) => "started again".into(),
                (SagaKind::Destroy, _) => "removed".into(),
                (SagaKind::AttachDisk, _) => "disk attached".into(),
                (SagaKind::DetachDisk, _) => "disk detached".into(),
                (SagaKind::SnapshotDisk, _) => "snapshot made".into(),
                (SagaKind::CommitDisk, _) => "image committed".into(),
                (SagaKind::ChangeMedium, _) => "medium changed".into(),
                (SagaKind::AttachVif, _) => "vif attached".into(),
                (SagaKind::DetachVif, _) => "vif detached".into(),
                (SagaKind::MoveVif, _) => "vif moved".into(),
                (SagaKind::AttachUsb, _) => "USB device attached".into(),
                (SagaKind::DetachUsb, _) => "USB device detached".into(),
            };
            let domid =
                self.inner().state.guests.get(&at.guest).and_then(|g| g.domain).map_or(0, |d| d.domid);
            self.events.tell("operation", &at.guest, domid, text);
        }
        Ok(())
    }

    fn turn_back(&self, id: u64, at: &Saga, why: &OpError) -> Result<(), OpError> {
        tracing::warn!(guest = at.guest, error = %why, "undoing");
        self.inner().change(|state| {
            if let Some(saga) = state.sagas.get_mut(&id)
                && saga.phase == Phase::Do
            {
                saga.phase = Phase::Undo;
                saga.step = 0;
                saga.why = Some(why.to_string());
            }
        })?;
        Ok(())
    }
}

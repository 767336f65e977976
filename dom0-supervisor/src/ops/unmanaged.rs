//! Guests that run without a record of dom0's: the state directory was lost. They can be ended like any other.

use std::time::Instant;

use proto::hvcore::{Domain, DomainState};

use crate::hv::{HvError, find_instance};
use crate::manager::{Manager, OpError};
use crate::services::private_of;
use crate::store::Change;
use crate::view::{is_guest, recorded};
use crate::xs_layout::home;

impl Manager {
    /// The guest of this name, domid or uuid that only hv-core knows.
    pub(crate) fn find_unmanaged(&self, text: &str) -> Result<Option<Domain>, OpError> {
        // The table first: whatever dom0 made is in the record before it is in the table.
        let domains = self.hv.list()?;
        let state = self.state();
        Ok(domains.into_iter().find(|d| {
            let named = d.name == text || d.domid.to_string() == text || d.uuid.eq_ignore_ascii_case(text);
            named && is_guest(d) && !recorded(&state, d)
        }))
    }

    /// Ends it and takes away what belongs to it. Can be carried out again; what a kill of dom0 leaves of it is a guest that is still
    /// unmanaged, or driver domains that nobody uses, which the reconciler removes.
    pub(super) fn destroy_unmanaged(&self, guest: &Domain) -> Result<(), OpError> {
        let running = super::numbers(guest)?;
        if guest.state() != DomainState::Dying {
            match self.hv.destroy(running.domid, running.instance) {
                Ok(()) | Err(HvError::NotFound) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let others = self.hv.list()?;
        let mut changes = Vec::new();
        for backend in others.iter().filter(|d| !is_guest(d)) {
            for kind in ["vbd", "vif"] {
                let path = format!("{}/backend/{kind}/{}", home(backend.domid as u16), running.domid);
                changes.push(Change::Remove { path });
            }
        }
        // Another domain has the number by now: what is below it is not ours to remove.
        if !others.iter().any(|d| d.domid == guest.domid && d.instance != guest.instance) {
            changes.push(Change::Remove { path: home(running.domid) });
            changes.push(Change::Remove { path: format!("/libxl/{}", running.domid) });
            changes.push(Change::Remove { path: format!("/vm/{}", guest.uuid) });
            self.store.apply(&changes)?;
        }
        for backend in others.iter().filter(|d| d.state() != DomainState::Dying && private_of(d, guest)) {
            let own = super::numbers(backend)?;
            match self.hv.destroy(own.domid, own.instance) {
                Ok(()) | Err(HvError::NotFound) => {}
                Err(e) => return Err(e.into()),
            }
            self.store.apply(&crate::xs_layout::remove_service_nodes(own.domid))?;
        }
        self.events.tell("operation", &guest.name, running.domid, "removed: it was unmanaged");
        let deadline = Instant::now() + self.timing.gone;
        while find_instance(&*self.hv, running.domid, running.instance)?.is_some() {
            if Instant::now() > deadline {
                return Err(OpError::Timeout(format!(
                    "domain {} is still dying; see bh list",
                    running.domid
                )));
            }
            std::thread::sleep(self.timing.poll);
        }
        Ok(())
    }
}

//! The one owner of desired state: everything that changes it goes through [`Manager`].

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::config::HostFile;
use crate::events::Events;
use crate::hv::{Hv, HvError};
use crate::state::{Persist, State, StateError};
use crate::store::{Store, StoreError};

/// How long the steps of operations wait. No wait is without an end.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long a step that fails for a passing reason is tried again.
    pub passing: Duration,
    /// How long backends have to take up a new guest's devices.
    pub ready: Duration,
    /// A guest that gives no sign of life but does not fail either counts as started after this.
    pub sign_of_life: Duration,
    /// How long a backend has to let go of a device.
    pub close: Duration,
    /// How long a domain has to be gone.
    pub gone: Duration,
    /// Between two looks.
    pub poll: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            passing: Duration::from_secs(30),
            ready: Duration::from_secs(20),
            sign_of_life: Duration::from_secs(3),
            close: Duration::from_secs(3),
            gone: Duration::from_secs(10),
            poll: Duration::from_millis(15),
        }
    }
}

/// Why an operation was refused or failed; the text is one line for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// The input is wrong.
    #[error("{0}")]
    Invalid(String),
    /// Something of that name, uuid, MAC or disk is there.
    #[error("{0}")]
    Exists(String),
    /// No such guest or service.
    #[error("{0}")]
    NotFound(String),
    /// Another operation is under way.
    #[error("{0}")]
    Busy(String),
    /// The host or the guest does not allow it, or it failed and was undone.
    #[error("{0}")]
    Failed(String),
    /// Not done in time; it goes on.
    #[error("{0}")]
    Timeout(String),
    /// hv-core, xenstore or the state directory does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// Tests: the process was "killed".
    #[error("killed")]
    Killed,
}

impl From<HvError> for OpError {
    fn from(e: HvError) -> Self {
        match e {
            HvError::NotFound => OpError::NotFound(e.to_string()),
            HvError::AlreadyExists(text) => OpError::Exists(text),
            HvError::Refused(text) => OpError::Failed(plain(&text)),
            HvError::Busy(_) => OpError::Unavailable(e.to_string()),
            HvError::Gone => OpError::Killed,
        }
    }
}

impl From<StoreError> for OpError {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::Unavailable(_) => OpError::Unavailable(e.to_string()),
            StoreError::Refused(_) => OpError::Failed(e.to_string()),
        }
    }
}

impl From<StateError> for OpError {
    fn from(e: StateError) -> Self {
        match e {
            StateError::Killed => OpError::Killed,
            e => OpError::Unavailable(e.to_string()),
        }
    }
}

impl OpError {
    /// The same with a beginning.
    pub fn at(self, place: &str) -> OpError {
        let say = |text: String| format!("{place}: {text}");
        match self {
            OpError::Invalid(t) => OpError::Invalid(say(t)),
            OpError::Exists(t) => OpError::Exists(say(t)),
            OpError::NotFound(t) => OpError::NotFound(say(t)),
            OpError::Busy(t) => OpError::Busy(say(t)),
            OpError::Failed(t) => OpError::Failed(say(t)),
            OpError::Timeout(t) => OpError::Timeout(say(t)),
            OpError::Unavailable(t) => OpError::Unavailable(say(t)),
            OpError::Killed => OpError::Killed,
        }
    }
}

pub(crate) struct Inner {
    pub state: State,
    persist: Box<dyn Persist>,
    /// Operations that a thread of this process carries out.
    pub active: HashSet<u64>,
}

impl Inner {
    /// Changes the state and keeps it. If it can't be kept, nothing is changed.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut State) -> T) -> Result<T, StateError> {
        let mut next = self.state.clone();
        let out = change(&mut next);
        if next != self.state {
            self.persist.save(&next)?;
            self.state = next;
        }
        Ok(out)
    }
}

/// What is known of services in this life of dom0.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Domains whose home in the store was made.
    pub homes: HashSet<(u16, u64)>,
    /// Why a service is not there.
    pub service_notes: HashMap<String, String>,
    /// When a service that can't be made is tried again, and how long is waited after that.
    pub service_retry: HashMap<String, (Instant, Duration)>,
    /// What the last event of a domain said about its end.
    pub ends: HashMap<(u16, u64), String>,
    /// Domains that told hv-core that they serve.
    pub served: HashSet<(u16, u64)>,
    /// The host's own nodes were made.
    pub dom0_nodes: bool,
    /// Guests for which somebody waits that an operation on a disk ends.
    pub stopping_disks: HashSet<String>,
}

/// See the module.
pub struct Manager {
    pub(crate) hv: Arc<dyn Hv>,
    pub(crate) store: Arc<dyn Store>,
    host: RwLock<Arc<HostFile>>,
    pub(crate) timing: Timing,
    /// The host's files can be looked at from here. In hv-core's sandbox they usually can't: then hv-core and the
    /// services say what is wrong with a file.
    pub(crate) sees_host: bool,
    /// What happened.
    pub events: Events,
    inner: Mutex<Inner>,
    known: Mutex<Known>,
    /// Held for a pass of the reconciler.
    pub(crate) pass: Mutex<()>,
}

impl Manager {
    /// Takes up the desired state that a predecessor kept. `sees_host`: the host's files can be looked at from here.
    pub fn new(
        hv: Arc<dyn Hv>,
        store: Arc<dyn Store>,
        host: HostFile,
        persist: Box<dyn Persist>,
        state: State,
        timing: Timing,
        sees_host: bool,
    ) -> Manager {
        let inner = Inner { state, persist, active: HashSet::new() };
        Manager {
            sees_host,
            hv,
            store,
            host: RwLock::new(Arc::new(host)),
            timing,
            events: Events::default(),
            inner: Mutex::new(inner),
            known: Mutex::default(),
            pass: Mutex::default(),
        }
    }

    pub(crate) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the desired state.
    pub fn state(&self) -> State {
        self.inner().state.clone()
    }

    /// Keeps the state as it is now.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self) -> Result<(), StateError> {
        let mut inner = self.inner();
        let state = inner.state.clone();
        inner.persist.save(&state)
    }

    /// Nothing is under way and every service's home is made.
    pub fn quiet(&self) -> bool {
        let known = self.known();
        let settled = known.dom0_nodes && known.service_notes.is_empty();
        drop(known);
        settled && self.inner().state.sagas.is_empty()
    }

    /// The host file as it was read last.
    pub fn host(&self) -> Arc<HostFile> {
        Arc::clone(&self.host.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes another host file; the next pass of the reconciler follows it. What only holds for a life of dom0 stays as it was.
    pub fn set_host(&self, host: HostFile) {
        let state_dir = self.host().state_dir.clone();
        *self.host.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(HostFile { state_dir, ..host });
        // What was refused may be right now.
        self.known().service_retry.clear();
    }

    /// Notes how a domain ended, for messages.
    pub fn note_end(&self, domid: u16, instance: u64, detail: &str) {
        let mut known = self.known();
        if known.ends.len() > 1024 {
            known.ends.clear();
        }
        known.ends.insert((domid, instance), one_line(detail));
    }

    /// Notes that a domain told that it serves.
    pub fn note_served(&self, domid: u16, instance: u64) {
        let mut known = self.known();
        if known.served.len() > 4096 {
            known.served.clear();
        }
        known.served.insert((domid, instance));
    }

    /// How a domain's process ended, in words.
    pub(crate) fn end_of(&self, domain: &proto::hvcore::Domain) -> String {
        let key = (domain.domid as u16, domain.instance);
        let detail = self.known().ends.get(&key).cloned().unwrap_or_default();
        let exit = one_line(&domain.last_exit);
        match (exit.is_empty(), detail.is_empty() || detail.contains(&exit) || exit.contains(&detail)) {
            (true, _) if detail.is_empty() => "no reason known".into(),
            (true, _) => detail,
            (false, true) if detail.len() > exit.len() => detail,
            (false, true) => exit,
            (false, false) => format!("{exit}: {detail}"),
        }
    }
}

/// hv-core names the field that is wrong; a person has named a file.
fn plain(text: &str) -> String {
    match text.strip_prefix("resources.path: ") {
        // A disk is named by whoever asked for it.
        Some(rest) => format!("{}; check the path", rest.strip_prefix("disk ").unwrap_or(rest)),
        None => text.to_owned(),
    }
}

/// Text of others, made one short line.
pub fn one_line(text: &str) -> String {
    let mut out: String =
        text.split_whitespace().collect::<Vec<_>>().join(" ").chars().filter(|c| !c.is_control()).collect();
    if let Some((at, _)) = out.char_indices().nth(300) {
        out.truncate(at);
        out.push('…');
    }
    out
}

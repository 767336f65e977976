//! A world in memory: hv-core's table, a store, backends that answer, a disk for the state, and a fuse that "kills" dom0 at a
//! chosen call. What a call changed before the fuse blew stays changed, as with SIGKILL.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use proto::blkback::Commit;
use proto::hvcore::{CreateDomainRequest, Domain, DomainState, VersionReply};

use crate::config::HostFile;
use crate::hv::{Hv, HvError};
use crate::manager::{Manager, Timing};
use crate::state::{Persist, State, StateError};
use crate::store::{Change, Store, StoreError};

/// What is left when dom0 is killed.
#[derive(Default)]
pub struct Inner {
    pub domains: Vec<Domain>,
    pub requests: BTreeMap<u64, CreateDomainRequest>,
    pub nodes: BTreeMap<String, (String, Vec<String>)>,
    pub disk: State,
    pub next: u64,
    /// Calls until the kill; `None` = never.
    pub fuse: Option<u64>,
    /// Kill before the call takes effect instead of after it.
    pub before: bool,
    pub dead: bool,
    /// Which life of dom0: calls of threads that a dead one left have no effect.
    pub life: u64,
    pub calls: u64,
    /// Name of a domain whose making is refused.
    pub refuse: Option<String>,
    /// Name of a domain whose process fails at once.
    pub fails: Option<String>,
    /// Backends that do not react.
    pub deaf_backends: bool,
    pub missing: Vec<String>,
    /// Services that were drained.
    pub drained: Vec<String>,
}

#[derive(Clone, Default)]
pub struct World(pub Arc<Mutex<Inner>>, u64);

pub const TIMING: Timing = Timing {
    passing: Duration::from_millis(20),
    ready: Duration::from_millis(25),
    sign_of_life: Duration::from_millis(1),
    close: Duration::from_millis(10),
    gone: Duration::from_millis(50),
    poll: Duration::from_millis(2),
};

impl World {
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// dom0 starts (again).
    pub fn boot(&self, host: &HostFile) -> Arc<Manager> {
        let (state, life) = {
            let mut inner = self.lock();
            inner.dead = false;
            inner.life += 1;
            (inner.disk.clone(), inner.life)
        };
        let world = || World(self.0.clone(), life);
        Arc::new(Manager::new(
            Arc::new(world()),
            Arc::new(world()),
            host.clone(),
            Box::new(world()),
            state,
            TIMING,
            true,
        ))
    }

    /// One call of dom0's: `effect` is what it does to the world.
    fn call<T>(&self, killed: impl Fn() -> T, effect: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        if inner.dead || inner.life != self.1 {
            return killed();
        }
        inner.calls += 1;
        let blown = match &mut inner.fuse {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        if blown {
            inner.fuse = None;
            inner.dead = true;
            if !inner.before {
                effect(&mut inner);
            }
            return killed();
        }
        effect(&mut inner)
    }

    pub fn domain(&self, name: &str) -> Option<Domain> {
        self.lock().domains.iter().find(|d| d.name == name).cloned()
    }

    pub fn set_state(&self, name: &str, state: DomainState, reason: u32) {
        let mut inner = self.lock();
        let domain = inner.domains.iter_mut().find(|d| d.name == name).unwrap();
        domain.set_state(state);
        domain.shutdown_reason = reason;
    }
}

impl Inner {
    /// Backends react to what stands in the store.
    fn backends(&mut self) {
        if self.deaf_backends {
            return;
        }
        let states: Vec<String> =
            self.nodes.keys().filter(|k| k.contains("/backend/") && k.ends_with("/state")).cloned().collect();
        for path in states {
            let value = &mut self.nodes.get_mut(&path).unwrap().0;
            match value.as_str() {
                "1" => *value = "2".into(),
                "5" => *value = "6".into(),
                _ => {}
            }
        }
        self.bridges();
    }

    /// What qemu-bridge says of USB devices. A file of this name cannot be opened.
    fn bridges(&mut self) {
        let wanted: Vec<(String, String)> = self
            .nodes
            .iter()
            .filter(|(path, node)| path.contains("/usb/") && !path.contains("/data/") && !node.0.is_empty())
            .map(|(path, node)| (path.replace("/usb/", "/data/usb/"), node.0.clone()))
            .collect();
        self.nodes.retain(|path, _| !path.contains("/data/usb/"));
        for (path, wanted) in wanted {
            let said = if wanted.contains("damaged") { "error: it is damaged" } else { "plugged" };
            self.nodes.insert(path, (said.into(), Vec::new()));
        }
    }
}

impl Hv for World {
    fn version(&self) -> Result<VersionReply, HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| Ok(VersionReply { missing: w.missing.clone(), ..Default::default() }),
        )
    }

    fn list(&self) -> Result<Vec<Domain>, HvError> {
        self.call(|| Err(HvError::Gone), |w| Ok(w.domains.clone()))
    }

    fn create(&self, request: CreateDomainRequest) -> Result<Domain, HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                if w.refuse.as_ref() == Some(&request.name) {
                    return Err(HvError::Refused(format!("program {}: no such file", request.program)));
                }
                if w.domains.iter().any(|d| d.uuid == request.uuid) {
                    return Err(HvError::AlreadyExists("uuid in use".into()));
                }
                w.next += 1;
                let state = if request.paused { DomainState::Created } else { DomainState::Running };
                let domain = Domain {
                    domid: w.next as u32,
                    instance: 100 + w.next,
                    uuid: request.uuid.clone(),
                    name: request.name.clone(),
                    state: state as i32,
                    generation: 1,
                    host_pid: 1000 + w.next as u32,
                    control_socket: request.name.clone(),
                    roles: request.roles.clone(),
                    ..Domain::default()
                };
                w.requests.insert(domain.instance, request);
                w.domains.push(domain.clone());
                Ok(domain)
            },
        )
    }

    fn update(&self, domid: u16, instance: u64, request: CreateDomainRequest) -> Result<(), HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                if !w.domains.iter().any(|d| (d.domid, d.instance) == (domid.into(), instance)) {
                    return Err(HvError::NotFound);
                }
                w.requests.insert(instance, request);
                Ok(())
            },
        )
    }

    fn drain(&self, control_socket: &str, _within: std::time::Duration) -> Result<(), HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                w.drained.push(control_socket.to_owned());
                Ok(())
            },
        )
    }

    fn destroy(&self, domid: u16, instance: u64) -> Result<(), HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                let before = w.domains.len();
                w.domains.retain(|d| (d.domid, d.instance) != (domid.into(), instance));
                if w.domains.len() == before { Err(HvError::NotFound) } else { Ok(()) }
            },
        )
    }

    fn approve(
        &self,
        _domid: u16,
        instance: u64,
        add: Vec<proto::hvcore::Resource>,
        remove: Vec<String>,
    ) -> Result<(), HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                let request = w.requests.get_mut(&instance).ok_or(HvError::NotFound)?;
                request
                    .resources
                    .retain(|r| !remove.contains(&r.name) && !add.iter().any(|a| a.name == r.name));
                request.resources.extend(add);
                Ok(())
            },
        )
    }

    fn settle_disk(&self, _control_socket: &str) -> Result<(), HvError> {
        self.call(|| Err(HvError::Gone), |_| Ok(()))
    }

    fn disk_bytes(&self, control_socket: &str, grow: u64) -> Result<u64, HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                let domain = w.domains.iter().find(|d| d.control_socket == control_socket);
                let request = domain.and_then(|d| w.requests.get(&d.instance)).ok_or(HvError::NotFound)?;
                // An image of this name cannot be opened.
                if request.args.iter().any(|arg| arg.contains("damaged")) {
                    return Err(HvError::Refused("this is no qcow2 image".into()));
                }
                Ok(grow.max(4096))
            },
        )
    }

    fn qemu(&self, control_socket: &str, pause: Option<bool>) -> Result<proto::qemu::QemuStatus, HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                let there = w.domains.iter().any(|d| d.control_socket == control_socket);
                let state = if pause == Some(true) { "paused" } else { "running" };
                let status = proto::qemu::QemuStatus { state: state.into(), ..Default::default() };
                if there { Ok(status) } else { Err(HvError::NotFound) }
            },
        )
    }

    fn qemu_reset(&self, control_socket: &str) -> Result<proto::qemu::QemuStatus, HvError> {
        self.qemu(control_socket, None)
    }

    fn qemu_save(&self, _: &str, _: &str, _: &str) -> Result<proto::qemu::QemuSaved, HvError> {
        Err(HvError::Refused("no state".into()))
    }

    fn qemu_sizes(&self, control_socket: &str) -> Result<proto::qemu::QemuSizes, HvError> {
        // A bridge follows what stands in the store, unless it is deaf.
        self.call(
            || Err(HvError::Gone),
            |w| {
                let domain = w.domains.iter().find(|d| d.control_socket == control_socket);
                let home = format!("/local/domain/{}", domain.ok_or(HvError::NotFound)?.domid);
                let kib = w.nodes.get(&format!("{home}/memory/target")).and_then(|n| n.0.parse::<u64>().ok());
                let cpus = w
                    .nodes
                    .iter()
                    .filter(|(path, node)| path.starts_with(&format!("{home}/cpu/")) && node.0 == "online");
                let vcpus = cpus.count() as u32;
                let deaf = w.deaf_backends;
                let memory_bytes = if deaf { 0 } else { kib.unwrap_or(0) << 10 };
                Ok(proto::qemu::QemuSizes { memory_bytes, vcpus: if deaf { 0 } else { vcpus } })
            },
        )
    }

    fn screenshot(&self, _control_socket: &str) -> Result<Vec<u8>, HvError> {
        Err(HvError::Refused("no display".into()))
    }

    fn disk_commit(&self, control_socket: &str) -> Result<Commit, HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                let domain = w.domains.iter().find(|d| d.control_socket == control_socket);
                let request = domain.and_then(|d| w.requests.get(&d.instance)).ok_or(HvError::NotFound)?;
                let commits = request.args.iter().any(|arg| arg == "--commit");
                // A backing file of this name has no room.
                let full = request.args.iter().any(|arg| arg.contains("full"));
                let failed = if full { "no space left".into() } else { String::new() };
                Ok(Commit { finished: commits && !full, failed, ..Commit::default() })
            },
        )
    }

    fn kill(&self, domid: u16, instance: u64, _signal: u32) -> Result<(), HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                let same = |d: &&mut Domain| (d.domid, d.instance) == (domid.into(), instance);
                let domain = w.domains.iter_mut().find(same).ok_or(HvError::NotFound)?;
                domain.generation += 1;
                domain.restarts += 1;
                Ok(())
            },
        )
    }

    fn start(&self, domid: u16, instance: u64) -> Result<Domain, HvError> {
        self.call(
            || Err(HvError::Gone),
            |w| {
                let same = |d: &&mut Domain| (d.domid, d.instance) == (domid.into(), instance);
                let domain = w.domains.iter_mut().find(same).ok_or(HvError::NotFound)?;
                if domain.state() == DomainState::Running {
                    return Err(HvError::Refused("it runs".into()));
                }
                domain.set_state(DomainState::Running);
                domain.generation += 1;
                if w.fails.as_ref() == Some(&domain.name) {
                    domain.set_state(DomainState::Failed);
                    domain.last_exit = "exit status 3: no hardware virtualization".into();
                }
                Ok(domain.clone())
            },
        )
    }

    fn has_store_ring(&self, _domid: u16) -> Result<bool, HvError> {
        Ok(true)
    }
}

impl Store for World {
    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        self.call(
            || Err(StoreError::Unavailable("killed".into())),
            |w| {
                if !w.domains.iter().any(|d| d.name == "xenstored") {
                    return Err(StoreError::Unavailable("no xenstore domain yet".into()));
                }
                for change in changes {
                    match change {
                        Change::Put { path, value, perms } => {
                            w.nodes.insert(path.clone(), (value.clone(), perms.clone()));
                        }
                        Change::Set { path, value } => {
                            if let Some(node) = w.nodes.get_mut(path) {
                                node.0 = value.clone();
                            }
                        }
                        Change::Remove { path } => {
                            let below = format!("{path}/");
                            w.nodes.retain(|k, _| k != path && !k.starts_with(&below));
                        }
                    }
                }
                w.backends();
                Ok(())
            },
        )
    }

    fn read(&self, path: &str) -> Result<Option<String>, StoreError> {
        self.call(
            || Err(StoreError::Unavailable("killed".into())),
            |w| Ok(w.nodes.get(path).map(|(value, _)| value.clone())),
        )
    }
}

impl Persist for World {
    fn save(&mut self, state: &State) -> Result<(), StateError> {
        self.call(
            || Err(StateError::Killed),
            |w| {
                w.disk = state.clone();
                Ok(())
            },
        )
    }
}

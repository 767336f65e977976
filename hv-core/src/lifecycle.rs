//! Domains' lives. One thread owns every transition:
//!
//! ```text
//!   CREATED ──started──► RUNNING ──process died, policy──► RESTARTING ──backoff over──► RUNNING
//!                          │  │                                  │ will not start
//!                          │  └──died, no restart or burst used──┴──► FAILED ──StartProcess──► RUNNING
//!                          └──Op::Shutdown──► SHUTDOWN ──StartProcess──► RUNNING
//!   any ──DestroyDomain──► DYING ──process gone, no page of it held──► (gone)
//! ```
//! A process is over when it has been reaped *and* every thread that served its calls has ended; only then does anything of
//! the next incarnation begin.

mod create;
mod death;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use hv_abi::dom_state;
use proto::hvcore::event::Kind;
use tokio::net::UnixStream;
use tokio::sync::{mpsc as async_mpsc, oneshot};

use crate::host::Cgroups;
use crate::log::Logs;
use crate::ports::Peer;
use crate::resources::Resource;
use crate::spawner::SpawnerHandle;
use crate::spec::Spec;
use crate::sys;
use crate::table::Hv;

/// How long holders of a destroyed PVH domain's pages may take to let go of them.
const DYING_DEADLINE: Duration = Duration::from_secs(5);
/// How often DYING domains are looked at.
const DYING_LOOK: Duration = Duration::from_millis(20);
/// How long maps of a predecessor wait to be claimed.
const CLAIM_DEADLINE: Duration = Duration::from_secs(30);
/// How long an orderly end may take.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Why a control call failed.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// A field is wrong.
    #[error("{0}")]
    Invalid(String),
    /// No such domain.
    #[error("no such domain")]
    NotFound,
    /// The uuid, domid or name is in use.
    #[error("{0}")]
    Exists(String),
    /// Out of memory or numbers.
    #[error("{0}")]
    Exhausted(String),
    /// Not in this state.
    #[error("{0}")]
    Precondition(String),
}

/// The answer to a command.
pub type Answer<T> = oneshot::Sender<Result<T, LifecycleError>>;

/// What the life-cycle thread is told.
#[derive(Debug)]
pub enum Cmd {
    /// A process ended.
    Reaped {
        /// Host process id.
        pid: i32,
        /// Wait status.
        status: i32,
        /// CLOCK_MONOTONIC nanoseconds.
        ns: u64,
    },
    /// The spawner is gone, and with it everything that could start.
    SpawnerGone,
    /// The last hypercall thread of an ended incarnation is done.
    Drained {
        /// The domain.
        peer: Peer,
        /// The incarnation.
        generation: u32,
    },
    /// Make a domain with this domid (0: any).
    Create(Box<Spec>, u16, Answer<Peer>),
    /// Take a domain down.
    Destroy(Peer, Answer<()>),
    /// Start the process of a CREATED (paused), FAILED or SHUTDOWN domain.
    Start(Peer, Answer<()>),
    /// Give a domain another specification from its next incarnation on.
    Update(Peer, Box<Spec>, Answer<()>),
    /// Approve (listeners made here) and withdraw resources.
    SetResources(Peer, Vec<(hv_abi::Name, Resource)>, Vec<hv_abi::Name>, Answer<()>),
    /// End everything.
    Stop,
}

/// How hv-core was started, as far as the life-cycle needs it.
#[derive(Debug)]
pub struct Config {
    /// The run directory.
    pub run_dir: PathBuf,
    /// dom0's specification.
    pub dom0: Spec,
    /// First host uid.
    pub uid_base: u32,
    /// The first of them that is not in use.
    pub first_uid: u32,
}

/// The life-cycle thread's own state.
pub struct Lifecycle {
    hv: Arc<Hv>,
    config: Config,
    commands: Receiver<Cmd>,
    spawner: SpawnerHandle,
    cgroups: Option<Cgroups>,
    logs: Logs,
    /// New control streams of dom0, to the gRPC server.
    control: async_mpsc::UnboundedSender<UnixStream>,
    control_runtime: tokio::runtime::Handle,
    next_instance: u64,
    next_domid: u16,
    next_uid: u32,
    /// When RESTARTING domains start.
    restarts: BTreeMap<(Instant, u16), Peer>,
    /// Who waits for a DestroyDomain.
    destroying: Vec<(Peer, Answer<()>)>,
    stopping: bool,
}

impl std::fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lifecycle").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Lifecycle {
    /// Ready to run.
    #[expect(clippy::too_many_arguments, reason = "each part is made once, in main")]
    pub fn new(
        hv: Arc<Hv>,
        config: Config,
        commands: Receiver<Cmd>,
        spawner: SpawnerHandle,
        cgroups: Option<Cgroups>,
        logs: Logs,
        control: async_mpsc::UnboundedSender<UnixStream>,
        control_runtime: tokio::runtime::Handle,
    ) -> Lifecycle {
        let next_uid = config.first_uid;
        // Unique over the lives of hv-core on this host as well, so that dom0's records never fit another domain.
        let next_instance = (crate::events::unix_ms() / 1000) << 20 | 1;
        Lifecycle {
            hv,
            config,
            commands,
            spawner,
            cgroups,
            logs,
            control,
            control_runtime,
            next_instance,
            next_domid: 1,
            next_uid,
            restarts: BTreeMap::new(),
            destroying: Vec::new(),
            stopping: false,
        }
    }

    /// Starts dom0 and serves until [`Cmd::Stop`].
    ///
    /// # Errors
    /// dom0 cannot be started, or the spawner died.
    pub fn run(mut self) -> Result<(), String> {
        let dom0 = self.config.dom0.clone();
        self.create(dom0, 0, true).map_err(|e| format!("dom0: {e}"))?;
        loop {
            let command = match self.next_deadline() {
                None => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => self.commands.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match command {
                Ok(Cmd::Stop) => return self.stop(),
                Ok(Cmd::SpawnerGone) => {
                    return Err("the spawner died; nothing can be started any more".into());
                }
                Ok(command) => self.handle(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err("nobody is left to serve".into()),
            }
            self.tick();
        }
    }

    fn handle(&mut self, command: Cmd) {
        match command {
            Cmd::Reaped { pid, status, ns } => self.reaped(pid, status, ns),
            Cmd::Drained { peer, generation } => self.drained(peer, generation),
            Cmd::Create(spec, domid, answer) => {
                let result = self.create(*spec, domid, false);
                let _may_have_left = answer.send(result);
            }
            Cmd::Destroy(peer, answer) => self.destroy(peer, answer),
            Cmd::Start(peer, answer) => {
                let result = self.start_again(peer);
                let _may_have_left = answer.send(result);
            }
            Cmd::Update(peer, spec, answer) => {
                let _may_have_left = answer.send(self.update(peer, *spec));
            }
            Cmd::SetResources(peer, add, remove, answer) => {
                let result = self.set_resources(peer, add, remove);
                let _may_have_left = answer.send(result);
            }
            // `run` takes these.
            Cmd::Stop | Cmd::SpawnerGone => {}
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let restart = self.restarts.keys().next().map(|(at, _)| *at);
        let table = self.hv.lock();
        let of_domain = |d: &crate::table::Domain| {
            let dying =
                (d.state == dom_state::DYING && d.process.is_none()).then(|| Instant::now() + DYING_LOOK);
            [dying, d.dying_deadline, d.claim_deadline].into_iter().flatten().min()
        };
        table.domains.values().filter_map(of_domain).chain(restart).min()
    }

    fn tick(&mut self) {
        let now = Instant::now();
        while let Some(first) = self.restarts.first_entry() {
            if first.key().0 > now {
                break;
            }
            let peer = first.remove();
            self.restart(peer);
        }
        self.drop_unclaimed(now);
        self.finish_dying(now);
    }

    /// Starts the process of a domain that stopped.
    fn start_again(&mut self, peer: Peer) -> Result<(), LifecycleError> {
        {
            let mut table = self.hv.lock();
            let d = table.get_mut(peer).ok_or(LifecycleError::NotFound)?;
            let stopped = matches!(d.state, dom_state::CREATED | dom_state::FAILED | dom_state::SHUTDOWN);
            if !stopped || d.process.is_some() {
                return Err(LifecycleError::Precondition("its process is running or about to".into()));
            }
            d.backoff.reset();
        }
        self.start_process(peer).map_err(LifecycleError::Precondition)?;
        self.hv.lock().kick_dom_exc();
        Ok(())
    }

    /// Another specification, from the next incarnation on.
    fn update(&mut self, peer: Peer, spec: Spec) -> Result<(), LifecycleError> {
        let (listeners, gone) = {
            let table = self.hv.lock();
            let d = table.get(peer).ok_or(LifecycleError::NotFound)?;
            if d.state == dom_state::DYING {
                return Err(LifecycleError::Precondition("it is being taken down".into()));
            }
            if let Some(field) = d.spec.fixed_field(&spec) {
                return Err(LifecycleError::Invalid(format!(
                    "{field}: stays for a domain's life; make another domain"
                )));
            }
            let approved = |(name, r): &&(hv_abi::Name, Resource)| {
                r.kind == hv_abi::resource_kind::LISTENER
                    || d.resources.get(&name.0).is_some_and(|a| (a.kind, &a.path) == (r.kind, &r.path))
            };
            if let Some((_, other)) = spec.resources.iter().find(|resource| !approved(resource)) {
                return Err(LifecycleError::Invalid(format!(
                    "resources: {} is not approved for this domain; approve it first, or make another domain",
                    other.path
                )));
            }
            let listeners: Vec<_> = spec
                .resources
                .iter()
                .filter(|(_, r)| r.kind == hv_abi::resource_kind::LISTENER)
                .cloned()
                .collect();
            let stays = |name: &[u8; hv_abi::NAME_LEN]| listeners.iter().any(|(n, _)| n.0 == *name);
            let old = d.resources.iter().filter(|(n, r)| r.listener.is_some() && !stays(n));
            let gone: Vec<_> = old.map(|(n, _)| hv_abi::Name(*n)).collect();
            (listeners, gone)
        };
        self.set_resources(peer, listeners, gone)?;
        if let Some(d) = self.hv.lock().get_mut(peer) {
            // Another path is another program, whatever the domain kept.
            d.program = d.program.take().filter(|_| d.spec.program == spec.program);
            d.spec = spec;
        }
        Ok(())
    }

    fn set_resources(
        &mut self,
        peer: Peer,
        add: Vec<(hv_abi::Name, Resource)>,
        remove: Vec<hv_abi::Name>,
    ) -> Result<(), LifecycleError> {
        let in_use: Vec<([u8; hv_abi::NAME_LEN], Resource)> = {
            let table = self.hv.lock();
            let d = table.get(peer).ok_or(LifecycleError::NotFound)?;
            d.resources.iter().map(|(n, r)| (*n, r.clone())).collect()
        };
        let mut made = Vec::new();
        for (name, mut resource) in add {
            let same = in_use.iter().find(|(n, r)| {
                *n == name.0 && (r.kind, &r.path, r.mode) == (resource.kind, &resource.path, resource.mode)
            });
            // Approving again what is approved keeps a listener and its queue.
            if let Some((_, old)) = same {
                made.push((name, old.clone()));
                continue;
            }
            create::listen_if_listener(&mut resource).map_err(LifecycleError::Invalid)?;
            made.push((name, resource));
        }
        let mut gone = Vec::new();
        {
            let mut table = self.hv.lock();
            let d = table.get_mut(peer).ok_or(LifecycleError::NotFound)?;
            for name in remove {
                gone.extend(d.resources.remove(&name.0));
            }
            for (name, resource) in made {
                let path = resource.path.clone();
                gone.extend(d.resources.insert(name.0, resource).filter(|old| old.path != path));
            }
        }
        death::unlink_listeners(&gone);
        Ok(())
    }

    /// Ends everything in order: processes, sockets, files.
    fn stop(mut self) -> Result<(), String> {
        self.stopping = true;
        self.restarts.clear();
        tracing::info!("stopping: ending all domains");
        let deadline = Instant::now() + STOP_DEADLINE;
        let all: Vec<Peer> = self.hv.lock().domains.values().map(|d| d.peer).collect();
        for peer in all {
            self.kill(peer);
        }
        while self.hv.lock().domains.values().any(|d| d.process.is_some()) {
            match self.commands.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Cmd::SpawnerGone) => return Err("the spawner died while domains were ending".into()),
                Ok(command @ (Cmd::Reaped { .. } | Cmd::Drained { .. })) => self.handle(command),
                // Whoever asks now is ending too.
                Ok(_) => {}
                Err(_) => return Err("some domains did not end".into()),
            }
        }
        let domains = std::mem::take(&mut self.hv.lock().domains);
        for domain in domains.into_values() {
            let resources: Vec<Resource> = domain.resources.values().cloned().collect();
            death::unlink_listeners(&resources);
            if let Some(kept) = &domain.kept {
                death::unlink(&kept.control_path);
            }
            if let Some(cgroups) = &self.cgroups {
                cgroups.remove(domain.peer.domid);
            }
        }
        Ok(())
    }

    /// SIGKILL to a domain's process, if it runs.
    fn kill(&self, peer: Peer) {
        let table = self.hv.lock();
        if let Some(process) = table.get(peer).and_then(|d| d.process.as_ref())
            && process.reaped.is_none()
        {
            let _may_be_dead = sys::pidfd_kill(&process.pidfd, libc::SIGKILL);
        }
    }

    fn event(&self, kind: Kind, peer: Peer, detail: &str) {
        let (id, name) = {
            let table = self.hv.lock();
            let Some(d) = table.get(peer) else { return };
            (d.event_id(), d.spec.name.clone())
        };
        self.hv.events.push(kind, id, &name, detail);
    }
}

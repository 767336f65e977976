//! The control API: gRPC for dom0 alone, over the stream that its process inherits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_abi::*;
use nix::errno::Errno;
use proto::hvcore::hv_core_server::{HvCore, HvCoreServer};
use proto::hvcore::*;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::lifecycle::{Cmd, LifecycleError};
use crate::ports::Peer;
use crate::program;
use crate::resources::{self, Opens};
use crate::spec::{self, Spec};
use crate::table::{self, Hv};

/// Longest that a call waits for the life-cycle thread; everything there has shorter deadlines of its own.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// How long the files of a domain to be made may take to open.
const FILES_DEADLINE: Duration = Duration::from_secs(5);
/// Most creations whose files are being looked at.
const MAX_LOOKS: u32 = 64;
/// Events sent ahead of a slow watcher.
const WATCH_AHEAD: usize = 64;

/// The API's state.
#[derive(Clone, Debug)]
pub struct Control {
    hv: Arc<Hv>,
    /// Looks at files of domains to be made.
    opens: Opens,
}

impl From<LifecycleError> for Status {
    fn from(e: LifecycleError) -> Status {
        let text = e.to_string();
        match e {
            LifecycleError::Invalid(_) => Status::invalid_argument(text),
            LifecycleError::NotFound => Status::not_found(text),
            LifecycleError::Exists(_) => Status::already_exists(text),
            LifecycleError::Exhausted(_) => Status::resource_exhausted(text),
            LifecycleError::Precondition(_) => Status::failed_precondition(text),
        }
    }
}

/// Serves every stream that comes in by `streams`: one for each incarnation of dom0.
pub async fn serve(hv: Arc<Hv>, mut streams: mpsc::UnboundedReceiver<UnixStream>) {
    let opens = Opens::new(MAX_LOOKS);
    while let Some(stream) = streams.recv().await {
        let service = HvCoreServer::new(Control { hv: hv.clone(), opens: opens.clone() });
        // tonic gives the connection a task of its own, which ends with the stream.
        let incoming = tokio_stream::once(Ok::<_, std::io::Error>(stream));
        let served = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
        if let Err(e) = served.await {
            tracing::warn!("control stream: {e}");
        }
    }
}

fn wire_state(state: u16) -> DomainState {
    match state {
        dom_state::RUNNING => DomainState::Running,
        dom_state::RESTARTING => DomainState::Restarting,
        dom_state::FAILED => DomainState::Failed,
        dom_state::SHUTDOWN => DomainState::Shutdown,
        dom_state::DYING => DomainState::Dying,
        _ => DomainState::Created,
    }
}

fn wire_roles(bits: u32) -> Vec<i32> {
    let all = [
        (ROLE_XENSTORE, Role::Xenstore),
        (ROLE_CONSOLE, Role::Console),
        (ROLE_BACKEND, Role::Backend),
        (ROLE_PVH, Role::Pvh),
        (ROLE_PROCESS_GUEST, Role::ProcessGuest),
    ];
    let mut roles: Vec<i32> =
        all.into_iter().filter(|(bit, _)| bits & bit != 0).map(|(_, role)| role.into()).collect();
    if roles.is_empty() {
        roles.push(Role::Service.into());
    }
    roles
}

fn wire_domain(d: &table::Domain) -> Domain {
    Domain {
        domid: d.peer.domid.into(),
        instance: d.peer.instance,
        uuid: d.spec.uuid.to_string(),
        name: d.spec.name.clone(),
        state: wire_state(d.state).into(),
        generation: d.generation,
        roles: wire_roles(d.spec.roles),
        host_pid: d.live_pid().unwrap_or(0) as u32,
        control_socket: d.kept.as_ref().map(|k| k.control_path.clone()).unwrap_or_default(),
        shutdown_reason: if d.state == dom_state::SHUTDOWN { d.shutdown_reason } else { 0 },
        restarts: d.restarts,
        last_exit: d.last_exit.clone(),
        ram_bytes: d.spec.ram_bytes,
        ports: d.ports.len() as u32,
        mapped_pages: d.maps.pages(),
        region_pages: d.regions.pages(),
        fd_store_entries: d.fds.len() as u32,
        created_unix_ms: d.created_unix_ms,
    }
}

impl Control {
    /// The domain that a reference names now.
    fn find(&self, reference: &DomainRef) -> Result<Peer, Status> {
        let table = self.hv.lock();
        let domid = u16::try_from(reference.domid).ok();
        domid
            .and_then(|domid| table.domains.get(&domid))
            .filter(|d| reference.instance == 0 || reference.instance == d.peer.instance)
            .map(|d| d.peer)
            .ok_or_else(|| Status::not_found(format!("no domain {}", reference.domid)))
    }

    /// The same for a reference that must be there.
    fn find_in(&self, reference: &Option<DomainRef>) -> Result<Peer, Status> {
        self.find(reference.as_ref().ok_or_else(|| Status::invalid_argument("domain: is missing"))?)
    }

    /// The same for calls that are not for dom0 itself.
    fn find_other(&self, reference: &DomainRef) -> Result<Peer, Status> {
        match self.find(reference)? {
            Peer { domid: 0, .. } => Err(Status::invalid_argument("domain: dom0 lives as long as hv-core")),
            peer => Ok(peer),
        }
    }

    fn describe(&self, peer: Peer) -> Result<Domain, Status> {
        let table = self.hv.lock();
        table.get(peer).map(wire_domain).ok_or_else(|| Status::not_found("it is gone already"))
    }

    /// What a person can set right is told here, before anything is made. Nothing is kept of the files: each incarnation opens
    /// them anew. Not in the life-cycle thread: an open can hang.
    async fn check_files(&self, spec: &Spec) -> Result<(), Status> {
        let opens = self.opens.clone();
        let (program, dynamic) = (spec.program.clone(), spec.may_be_dynamic());
        let files = spec.resources.iter().map(|(name, r)| (r.kind, *name, r.path.clone()));
        let files: Vec<_> = files
            .filter(|(kind, ..)| matches!(*kind, resource_kind::FILE_RO | resource_kind::FILE_RW))
            .collect();
        let checked = tokio::task::spawn_blocking(move || {
            let deadline = Instant::now() + FILES_DEADLINE;
            let all = move || -> Result<(), String> {
                program::open(&program, dynamic)?;
                for (kind, name, path) in files {
                    resources::open(kind, &path).map_err(|e| {
                        format!("resources.path: {} {path}: {}", name.as_str().unwrap_or("?"), e.desc())
                    })?;
                }
                Ok(())
            };
            opens.run(all, || Instant::now() > deadline)
        });
        match checked.await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(text))) => Err(Status::invalid_argument(text)),
            Ok(Err(Errno::EBUSY)) => {
                Err(Status::unavailable("too many files that do not open are waited for"))
            }
            Ok(Err(_)) => Err(Status::invalid_argument(format!(
                "program and resources do not open within {} s; is the server of their file system away?",
                FILES_DEADLINE.as_secs()
            ))),
            Err(e) => Err(Status::internal(e.to_string())),
        }
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, LifecycleError>>) -> Cmd,
    ) -> Result<T, Status> {
        let (answer, answered) = oneshot::channel();
        self.hv.cmd.send(command(answer)).map_err(|_| Status::unavailable("hv-core is stopping"))?;
        match tokio::time::timeout(ANSWER_DEADLINE, answered).await {
            Ok(Ok(result)) => Ok(result?),
            Ok(Err(_)) => Err(Status::unavailable("hv-core is stopping")),
            Err(_) => Err(Status::deadline_exceeded("the life-cycle thread takes too long")),
        }
    }
}

#[tonic::async_trait]
impl HvCore for Control {
    async fn version(&self, _: Request<VersionRequest>) -> Result<Response<VersionReply>, Status> {
        let used = self.hv.lock().ram_bytes();
        Ok(Response::new(VersionReply {
            version: env!("CARGO_PKG_VERSION").into(),
            missing: self.hv.missing.lock().unwrap_or_else(|e| e.into_inner()).clone(),
            memory_total_bytes: self.hv.memory_limit,
            memory_free_bytes: self.hv.memory_limit.saturating_sub(used),
            host_pid: std::process::id(),
        }))
    }

    async fn create_domain(&self, request: Request<CreateDomainRequest>) -> Result<Response<Domain>, Status> {
        let request = request.into_inner();
        let spec = Spec::parse(&request).map_err(Status::invalid_argument)?;
        let domid = request.domid as u16; // parse has checked its range
        self.check_files(&spec).await?;
        let peer = self.ask(|answer| Cmd::Create(Box::new(spec), domid, answer)).await?;
        Ok(Response::new(self.describe(peer)?))
    }

    async fn destroy_domain(&self, request: Request<DomainRef>) -> Result<Response<Empty>, Status> {
        let peer = self.find_other(request.get_ref())?;
        self.ask(|answer| Cmd::Destroy(peer, answer)).await?;
        Ok(Response::new(Empty {}))
    }

    async fn list_domains(&self, _: Request<Empty>) -> Result<Response<DomainList>, Status> {
        let domains = self.hv.lock().domains.values().map(wire_domain).collect();
        Ok(Response::new(DomainList { domains }))
    }

    async fn get_domain(&self, request: Request<DomainRef>) -> Result<Response<Domain>, Status> {
        let peer = self.find(request.get_ref())?;
        Ok(Response::new(self.describe(peer)?))
    }

    async fn kill_process(&self, request: Request<KillRequest>) -> Result<Response<Empty>, Status> {
        let request = request.into_inner();
        let peer = self.find_in(&request.domain)?;
        let signal = match request.signal {
            0 => libc::SIGKILL,
            n @ 1..=64 => n as i32,
            _ => return Err(Status::invalid_argument("signal: 1 to 64")),
        };
        let pidfd = {
            let table = self.hv.lock();
            let process = table.get(peer).and_then(|d| d.process.as_ref());
            process.filter(|p| p.reaped.is_none()).map(|p| p.pidfd.clone())
        };
        if let Some(pidfd) = pidfd {
            let _may_be_dead = crate::sys::pidfd_kill(pidfd, signal);
        }
        Ok(Response::new(Empty {}))
    }

    async fn start_process(&self, request: Request<DomainRef>) -> Result<Response<Domain>, Status> {
        let peer = self.find_other(request.get_ref())?;
        self.ask(|answer| Cmd::Start(peer, answer)).await?;
        Ok(Response::new(self.describe(peer)?))
    }

    async fn update_domain(&self, request: Request<UpdateDomainRequest>) -> Result<Response<Domain>, Status> {
        let UpdateDomainRequest { domain, spec } = request.into_inner();
        let reference = domain.ok_or_else(|| Status::invalid_argument("domain: is missing"))?;
        let peer = self.find_other(&reference)?;
        let spec = spec.ok_or_else(|| Status::invalid_argument("spec: is missing"))?;
        let spec = Spec::parse(&spec).map_err(Status::invalid_argument)?;
        self.check_files(&spec).await?;
        self.ask(|answer| Cmd::Update(peer, Box::new(spec), answer)).await?;
        Ok(Response::new(self.describe(peer)?))
    }

    async fn set_restart_policy(
        &self,
        request: Request<SetRestartPolicyRequest>,
    ) -> Result<Response<Empty>, Status> {
        let request = request.into_inner();
        let peer = self.find_in(&request.domain)?;
        let policy = request.policy.ok_or_else(|| Status::invalid_argument("policy: is missing"))?;
        let mut table = self.hv.lock();
        let domain = table.get_mut(peer).ok_or_else(|| Status::not_found("it is gone already"))?;
        domain.spec.restart = (&policy).into();
        Ok(Response::new(Empty {}))
    }

    async fn set_resources(&self, request: Request<SetResourcesRequest>) -> Result<Response<Empty>, Status> {
        let request = request.into_inner();
        let peer = self.find_in(&request.domain)?;
        let add = request.add.iter().map(spec::resource).collect::<Result<Vec<_>, _>>();
        let add = add.map_err(Status::invalid_argument)?;
        let remove = request.remove.iter().map(|n| Name::new(n)).collect::<Option<Vec<_>>>();
        let remove = remove.ok_or_else(|| Status::invalid_argument("remove: a name is malformed"))?;
        self.ask(|answer| Cmd::SetResources(peer, add, remove, answer)).await?;
        Ok(Response::new(Empty {}))
    }

    type WatchEventsStream = ReceiverStream<Result<Event, Status>>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let mut after = request.get_ref().after_seq;
        let (sender, stream) = mpsc::channel(WATCH_AHEAD);
        let hv = self.hv.clone();
        tokio::spawn(async move {
            let mut newest = hv.events.watch();
            loop {
                newest.borrow_and_update();
                loop {
                    let events = hv.events.after(after, WATCH_AHEAD);
                    if events.is_empty() {
                        break;
                    }
                    for event in events {
                        after = event.seq;
                        if sender.send(Ok(event)).await.is_err() {
                            return;
                        }
                    }
                }
                tokio::select! {
                    changed = newest.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

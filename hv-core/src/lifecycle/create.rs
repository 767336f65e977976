//! Making domains and starting their processes.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use hv_abi::*;
use proto::hvcore::event::Kind;

use super::{Lifecycle, LifecycleError};
use crate::domain::{Backoff, Incarnation};
use crate::fdstore::FdStore;
use crate::grants::Maps;
use crate::grants::copy::Buffers;
use crate::grants::pvh::Pvh;
use crate::grants::region::Regions;
use crate::ports::{Peer, PortTable};
use crate::resources::{self, Opens, Resource};
use crate::spawner::proto::{CgroupLimits, SpawnRequest};
use crate::spec::{DOMID_MAX, Spec};
use crate::sys::sock;
use crate::table::{Domain, Kept, Process};
use crate::{events, netdev, program, server};

/// Permission bits of a domain's control socket: only dom0's bind of its directory shows it to anyone.
const CONTROL_MODE: u32 = 0o600;

/// Most opens of resources of one domain that have not come back from the kernel.
const MAX_OPENS: u32 = 8;

/// Makes a listener's socket or a temporary file.
pub(super) fn listen_if_listener(resource: &mut Resource) -> Result<(), String> {
    if resource.kind == resource_kind::LISTENER {
        resource.listener = Some(Arc::new(resources::listen(&resource.path, resource.mode)?));
    }
    if resource.kind == resource_kind::FILE_TEMPORARY {
        resource.temporary = Some(Arc::new(resources::temporary(&resource.path)?));
    }
    Ok(())
}

impl Lifecycle {
    /// Makes a domain and starts its process; all or nothing.
    pub(super) fn create(&mut self, spec: Spec, domid: u16, is_dom0: bool) -> Result<Peer, LifecycleError> {
        let any = domid == 0 && !is_dom0;
        let domid = self.check_new(&spec, domid, is_dom0)?;
        program::open(&spec.program, spec.may_be_dynamic()).map_err(LifecycleError::Invalid)?;
        let peer = Peer { domid, instance: self.next_instance };
        self.next_instance += 1;
        let (name, paused) = (spec.name.clone(), spec.paused);
        let domain = self.build(peer, spec)?;
        self.hv.lock().domains.insert(domid, domain);
        self.event(Kind::Created, peer, "");
        let started = self.set_up(peer).and_then(|()| if paused { Ok(()) } else { self.start_process(peer) });
        if let Err(reason) = started {
            tracing::warn!(domid, name, "creation undone: {reason}");
            self.forget(peer);
            return Err(LifecycleError::Invalid(reason));
        }
        // Only now: the number of one that never lived is free for the next.
        if any {
            self.next_domid = if u32::from(domid) >= DOMID_MAX { 1 } else { domid + 1 };
        }
        self.hv.lock().kick_dom_exc();
        Ok(peer)
    }

    fn check_new(&self, spec: &Spec, domid: u16, is_dom0: bool) -> Result<u16, LifecycleError> {
        let table = self.hv.lock();
        if table.has_uuid(spec.uuid) {
            return Err(LifecycleError::Exists(format!("uuid {} is in use", spec.uuid)));
        }
        if let Some(other) = table.domains.values().find(|d| d.spec.name == spec.name) {
            return Err(LifecycleError::Exists(format!(
                "name {:?} is in use by domain {}",
                spec.name, other.peer.domid
            )));
        }
        let used = table.ram_bytes();
        if spec.ram_bytes > self.hv.memory_limit.saturating_sub(used) {
            return Err(LifecycleError::Exhausted(format!(
                "ram_bytes: {} MiB wanted, {} MiB of {} MiB left",
                spec.ram_bytes >> 20,
                self.hv.memory_limit.saturating_sub(used) >> 20,
                self.hv.memory_limit >> 20
            )));
        }
        if is_dom0 {
            return Ok(0);
        }
        if domid != 0 {
            return match table.domains.get(&domid) {
                Some(_) => Err(LifecycleError::Exists(format!("domid {domid} is in use"))),
                None => Ok(domid),
            };
        }
        // Round and round, so that a number comes back as late as possible.
        let mut from_here = (self.next_domid..=DOMID_MAX as u16).chain(1..self.next_domid);
        let free = from_here.find(|candidate| !table.domains.contains_key(candidate));
        free.ok_or_else(|| LifecycleError::Exhausted("no domid is free".into()))
    }

    fn build(&self, peer: Peer, spec: Spec) -> Result<Domain, LifecycleError> {
        let pvh = if spec.roles & ROLE_PVH != 0 {
            let made = Pvh::new(spec.ram_bytes, spec.grant_frames);
            let made = made.map_err(|e| LifecycleError::Exhausted(format!("ram_bytes: {e}")))?;
            Some(Arc::new(made))
        } else {
            None
        };
        Ok(Domain {
            peer,
            state: dom_state::CREATED,
            generation: 0,
            process: None,
            program: None,
            kept: None,
            prev_exit: ExitInfo::default(),
            prev_exit_ns: 0,
            last_exit: String::new(),
            shutdown_reason: 0,
            restarts: 0,
            created_unix_ms: events::unix_ms(),
            backoff: Backoff::default(),
            served: false,
            claim_deadline: None,
            dying_deadline: None,
            ports: PortTable::new(spec.limits.ports),
            regions: Regions::new(spec.limits.region_pages),
            maps: Maps::new(spec.limits.map_pages),
            buffers: Buffers::default(),
            fds: FdStore::new(spec.limits.fd_store),
            resources: BTreeMap::new(),
            opens: Opens::new(MAX_OPENS),
            store_ring: None,
            console_ring: None,
            pvh,
            spec,
        })
    }

    /// What is made once for a domain: namespaces, interfaces, sockets.
    fn set_up(&mut self, peer: Peer) -> Result<(), String> {
        let spec = self.hv.lock().get(peer).map(|d| d.spec.clone()).ok_or("it is gone")?;
        let uid = self.fresh_uid();
        let (userns, netns) = self.spawner.make_namespaces(uid)?;
        let control_path = self.config.run_dir.join(format!("ctl/{}.sock", peer.domid));
        let control_path = control_path.to_str().ok_or("the run directory's path is not UTF-8")?.to_owned();
        let control = resources::listen(&control_path, CONTROL_MODE)?;
        let log = self.logs.open(&spec.name)?;
        let kept = Kept {
            uid,
            userns: Arc::new(userns),
            netns: Arc::new(netns),
            control: Arc::new(control),
            control_path,
            log: Arc::new(log),
        };
        let netns = kept.netns.clone();
        if let Some(d) = self.hv.lock().get_mut(peer) {
            d.kept = Some(kept);
        }
        for dev in &spec.netdevs {
            netdev::move_to(dev, netns.as_fd()).map_err(|e| format!("netdevs: {dev}: {e}"))?;
        }
        for (name, mut resource) in spec.resources {
            listen_if_listener(&mut resource)?;
            if let Some(d) = self.hv.lock().get_mut(peer) {
                d.resources.insert(name.0, resource);
            }
        }
        Ok(())
    }

    /// A host uid that no domain has, as far from the last one as possible.
    fn fresh_uid(&mut self) -> u32 {
        const UIDS: u32 = 100_000_000;
        let table = self.hv.lock();
        loop {
            let uid = self.next_uid;
            let n = (uid - self.config.uid_base + 1) % UIDS;
            self.next_uid = self.config.uid_base + n;
            if !table.domains.values().any(|d| d.kept.as_ref().is_some_and(|k| k.uid == uid)) {
                return uid;
            }
        }
    }

    fn cgroup_of(&self, domid: u16, spec: &Spec) -> CgroupLimits {
        let Some(cgroups) = &self.cgroups else { return CgroupLimits::default() };
        // Guest RAM is charged to the runner, which touches it first, and is not to count.
        let memory_bytes =
            if spec.limits.memory_bytes == 0 { 0 } else { spec.limits.memory_bytes + spec.ram_bytes };
        CgroupLimits {
            dir: cgroups.dir_of(domid),
            memory_bytes,
            cpu_weight: spec.limits.cpu_weight,
            pids: spec.limits.pids,
        }
    }

    /// Starts the next incarnation's process.
    pub(super) fn start_process(&mut self, peer: Peer) -> Result<(), String> {
        let (spec, generation, fds, before) = {
            let table = self.hv.lock();
            let d = table.get(peer).ok_or("it is gone")?;
            let kept = d.kept.as_ref().ok_or("it was never set up")?;
            let fds = [&kept.control, &kept.log, &kept.userns, &kept.netns].map(Arc::clone);
            let killed = d.prev_exit.how == EXIT_SIGNAL && d.prev_exit.own_fault == 0;
            (d.spec.clone(), d.generation + 1, fds, d.program.clone().filter(|_| killed))
        };
        let [control, log, userns, netns] = fds;
        let program = match before {
            Some(program) => program,
            None => Arc::new(program::open(&spec.program, spec.may_be_dynamic())?),
        };
        let (ours, theirs) = sock::pair().map_err(|e| format!("socketpair: {e}"))?;
        let is_dom0 = spec.roles & ROLE_DOM0 != 0;
        let most_channels = spec.limits.channels;
        let stream = if is_dom0 { Some(self.new_control_stream()?) } else { None };
        let mut request = SpawnRequest {
            cgroup: self.cgroup_of(peer.domid, &spec),
            name: spec.name,
            args: spec.args,
            env: spec.env,
            binds: spec.binds,
            seccomp: spec.seccomp,
            capabilities: spec.capabilities,
            die_with_hypervisor: spec.die_with_hypervisor,
            control_stream: is_dom0,
        };
        if request.cgroup.pids == 0 {
            request.cgroup.pids = spec.limits.pids;
        }
        for text in request.args.iter().chain(&request.env) {
            CString::new(text.as_str()).map_err(|_| "an argument has a NUL")?;
        }
        let mut passed: Vec<BorrowedFd<'_>> = vec![
            program.as_fd(),
            theirs.as_fd(),
            control.as_fd(),
            log.as_fd(),
            userns.as_fd(),
            netns.as_fd(),
        ];
        passed.extend(stream.as_ref().map(AsFd::as_fd));
        let started = self.spawner.spawn(request, &passed)?;
        drop((theirs, stream));
        self.note_missing(&started.missing);

        let incarnation = Arc::new(Incarnation::new(peer, generation, most_channels));
        let restarted = {
            let mut table = self.hv.lock();
            table.by_pid.insert(started.pid, peer.domid);
            let d = table.get_mut(peer).ok_or("it is gone")?;
            d.generation = generation;
            d.program = d.keeps_program().then_some(program);
            d.state = dom_state::RUNNING;
            d.served = false;
            d.shutdown_reason = 0;
            d.process = Some(Process {
                pid: started.pid,
                pidfd: Arc::new(started.pidfd),
                incarnation: incarnation.clone(),
                reaped: None,
            });
            d.claim_deadline =
                (d.maps.pages() > 0).then(|| std::time::Instant::now() + super::CLAIM_DEADLINE);
            if generation > 1 {
                d.restarts += 1;
            }
            generation > 1
        };
        // Only now: a call of this incarnation finds its generation in the table.
        if let Err(e) = server::serve(&self.hv, &incarnation, ours) {
            tracing::error!(domid = peer.domid, "no thread for its hypercalls: {e}");
            self.kill(peer);
        }
        let kind = if restarted { Kind::Restarted } else { Kind::Started };
        self.event(kind, peer, &format!("pid {}", started.pid));
        Ok(())
    }

    /// A new connection for dom0 to the control API; gives dom0's end.
    fn new_control_stream(&self) -> Result<OwnedFd, String> {
        let (ours, theirs) =
            std::os::unix::net::UnixStream::pair().map_err(|e| format!("control stream: {e}"))?;
        ours.set_nonblocking(true).map_err(|e| format!("control stream: {e}"))?;
        let _in_runtime = self.control_runtime.enter();
        let ours = tokio::net::UnixStream::from_std(ours).map_err(|e| format!("control stream: {e}"))?;
        self.control.send(ours).map_err(|_| "the control API's thread is gone")?;
        Ok(theirs.into())
    }

    fn note_missing(&self, missing: &[String]) {
        let mut known = self.hv.missing.lock().unwrap_or_else(|e| e.into_inner());
        for what in missing {
            if known.len() < 64 && !known.contains(what) {
                tracing::warn!("{what}");
                known.push(what.clone());
            }
        }
    }
}

//! The domain table: everything hv-core knows, in one place, under one lock.
//!
//! Nothing slow happens under the lock: no copy of data, no close of a descriptor that a domain gave, no open of a file. What
//! is left is plain data and descriptors; a later keeper can write it down and a new hv-core read it.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use hv_abi::*;
use nix::errno::Errno;
use proto::hvcore::event::Kind;
use uuid::Uuid;

use crate::domain::{Backoff, Incarnation};
use crate::events::Events;
use crate::fdstore::{Entry, FdStore};
use crate::grants::copy::Buffers;
use crate::grants::pvh::Pvh;
use crate::grants::region::Regions;
use crate::grants::release::{Pending, Releaser};
use crate::grants::udmabuf::DmaBufs;
use crate::grants::{Map, Maps};
use crate::lifecycle::Cmd;
use crate::ports::{Closed, Peer, PortTable};
use crate::resources::{Opens, Resource};
use crate::spec::Spec;
use crate::sys;

/// A domain's process.
#[derive(Debug)]
pub struct Process {
    /// Host process id.
    pub pid: i32,
    /// For signals.
    pub pidfd: Arc<OwnedFd>,
    /// Its life, as the hypercall server sees it.
    pub incarnation: Arc<Incarnation>,
    /// It has been reaped with this wait status at this CLOCK_MONOTONIC time; its calls may still be running.
    pub reaped: Option<(i32, u64)>,
}

/// What is made once for a domid and kept until it goes.
#[derive(Debug)]
pub struct Kept {
    /// Host uid that is root inside.
    pub uid: u32,
    /// User namespace.
    pub userns: Arc<OwnedFd>,
    /// Network namespace, owned by the user namespace.
    pub netns: Arc<OwnedFd>,
    /// The listener that becomes fd 4.
    pub control: Arc<OwnedFd>,
    /// Where it listens.
    pub control_path: String,
    /// The process's stdout and stderr.
    pub log: Arc<OwnedFd>,
}

/// A domain.
#[derive(Debug)]
pub struct Domain {
    /// Who it is.
    pub peer: Peer,
    /// What dom0 asked for.
    pub spec: Spec,
    /// A [`dom_state`].
    pub state: u16,
    /// The current or last incarnation's number.
    pub generation: u32,
    /// The current incarnation's process.
    pub process: Option<Process>,
    /// The program of the last incarnation, where the next one after a kill is to run the very same ([`Domain::keeps_program`]).
    pub program: Option<Arc<OwnedFd>>,
    /// Kept across incarnations.
    pub kept: Option<Kept>,
    /// How the last incarnation ended.
    pub prev_exit: ExitInfo,
    /// When, CLOCK_MONOTONIC nanoseconds.
    pub prev_exit_ns: u64,
    /// The same in words.
    pub last_exit: String,
    /// Given with [`Op::Shutdown`].
    pub shutdown_reason: u32,
    /// Restarts so far.
    pub restarts: u32,
    /// When it was created, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Restart delays.
    pub backoff: Backoff,
    /// The incarnation called [`Op::Served`].
    pub served: bool,
    /// When maps of predecessors that nobody claimed are dropped.
    pub claim_deadline: Option<Instant>,
    /// DYING: when holders of its pages are no longer waited for.
    pub dying_deadline: Option<Instant>,
    /// Event channels.
    pub ports: PortTable,
    /// Pages it grants (process domains).
    pub regions: Regions,
    /// Pages it maps.
    pub maps: Maps,
    /// The incarnation's copy buffers.
    pub buffers: Buffers,
    /// The fd store.
    pub fds: FdStore,
    /// Approved resources.
    pub resources: BTreeMap<[u8; NAME_LEN], Resource>,
    /// Its opens of them that the kernel has not answered.
    pub opens: Opens,
    /// xenstore ring: gref, port.
    pub store_ring: Option<(u32, u32)>,
    /// Console ring: gref, port.
    pub console_ring: Option<(u32, u32)>,
    /// RAM and grant table (PVH domains).
    pub pvh: Option<Arc<Pvh>>,
}

impl Domain {
    /// True if it has one of these roles.
    pub fn has(&self, roles: u32) -> bool {
        self.spec.roles & roles != 0
    }

    /// Whether a program that was replaced on disk is taken up only when the old one ended by itself. xenstored runs its journal's
    /// last events again after a kill, which another version might do differently: versions change by its live update or SIGTERM.
    pub fn keeps_program(&self) -> bool {
        self.has(ROLE_XENSTORE)
    }

    /// As the ABI tells it; rings only if `rings`.
    pub fn info(&self, rings: bool) -> DomInfo {
        let (store, console) = if rings {
            (self.store_ring.unwrap_or_default(), self.console_ring.unwrap_or_default())
        } else {
            Default::default()
        };
        DomInfo {
            instance: self.peer.instance,
            uuid: *self.spec.uuid.as_bytes(),
            domid: self.peer.domid,
            state: self.state,
            generation: self.generation,
            roles: self.spec.roles,
            shutdown_reason: if self.state == dom_state::SHUTDOWN { self.shutdown_reason } else { 0 },
            store_gref: store.0,
            store_port: store.1,
            console_gref: console.0,
            console_port: console.1,
        }
    }

    /// (domid, instance, generation), as events have it.
    pub fn event_id(&self) -> (u16, u64, u32) {
        (self.peer.domid, self.peer.instance, self.generation)
    }

    /// The pid, if this incarnation's process has not been reaped.
    pub fn live_pid(&self) -> Option<i32> {
        self.process.as_ref().filter(|p| p.reaped.is_none()).map(|p| p.pid)
    }
}

/// All domains.
#[derive(Debug, Default)]
pub struct Table {
    /// By domid.
    pub domains: BTreeMap<u16, Domain>,
    /// Domids by live pid.
    pub by_pid: HashMap<i32, u16>,
}

impl Table {
    /// The domain, if it is still the same.
    pub fn get(&self, peer: Peer) -> Option<&Domain> {
        self.domains.get(&peer.domid).filter(|d| d.peer == peer)
    }

    /// The same for changing it.
    pub fn get_mut(&mut self, peer: Peer) -> Option<&mut Domain> {
        self.domains.get_mut(&peer.domid).filter(|d| d.peer == peer)
    }

    /// A domain that calls may name: there and not going.
    ///
    /// # Errors
    /// `ESRCH`.
    pub fn named(&self, domid: u16) -> Result<&Domain, Errno> {
        self.domains.get(&domid).filter(|d| d.state != dom_state::DYING).ok_or(Errno::ESRCH)
    }

    /// The domain with this role and the lowest domid, or [`DOMID_INVALID`].
    pub fn with_role(&self, role: u32) -> u16 {
        let mut all = self.domains.values().filter(|d| d.has(role) && d.state != dom_state::DYING);
        all.next().map_or(DOMID_INVALID, |d| d.peer.domid)
    }

    /// True if a domain has this UUID.
    pub fn has_uuid(&self, uuid: Uuid) -> bool {
        self.domains.values().any(|d| d.spec.uuid == uuid)
    }

    /// Guest RAM of all domains, bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.domains.values().map(|d| d.spec.ram_bytes).sum()
    }

    /// VIRQ_DOM_EXC to everyone who bound it.
    pub fn kick_dom_exc(&self) {
        for fd in self.domains.values().flat_map(|d| d.ports.virq_fds(VIRQ_DOM_EXC)) {
            sys::kick(fd);
        }
    }

    /// What a closed port of `owner`'s does to the other side.
    pub fn finish_close(&mut self, owner: Peer, port: u32, closed: Closed) {
        if let Some((remote, remote_port)) = closed.remote
            && let Some(domain) = self.get_mut(remote)
        {
            domain.ports.remote_closed(remote_port, owner, port);
        }
    }
}

/// Where a call comes from.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Whose hypercall socket it came by.
    pub incarnation: Arc<Incarnation>,
}

impl Caller {
    /// The domain.
    pub fn peer(&self) -> Peer {
        self.incarnation.peer
    }
}

/// hv-core's shared state.
#[derive(Debug)]
pub struct Hv {
    table: Mutex<Table>,
    /// Life-cycle events.
    pub events: Events,
    /// udmabuf and the proof of its absence.
    pub bufs: DmaBufs,
    /// Pins that wait.
    pub releaser: Releaser,
    /// To the life-cycle thread.
    pub cmd: Sender<Cmd>,
    /// What this host lacks, in words.
    pub missing: Mutex<Vec<String>>,
    /// Most guest RAM of all domains together, bytes.
    pub memory_limit: u64,
}

impl Hv {
    /// An empty system.
    pub fn new(releaser: Releaser, cmd: Sender<Cmd>, missing: Vec<String>, memory_limit: u64) -> Hv {
        Hv {
            table: Mutex::default(),
            events: Events::default(),
            bufs: DmaBufs::open(),
            releaser,
            cmd,
            missing: Mutex::new(missing),
            memory_limit,
        }
    }

    /// The table.
    pub fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The caller's own domain.
    ///
    /// # Errors
    /// `ESTALE`: that incarnation is over.
    pub fn own<'t>(table: &'t mut Table, caller: &Caller) -> Result<&'t mut Domain, Errno> {
        table
            .get_mut(caller.peer())
            .filter(|d| d.generation == caller.incarnation.generation && d.state != dom_state::DYING)
            .ok_or(Errno::ESTALE)
    }

    /// The pid of an incarnation that still runs.
    pub fn incarnation_pid(&self, peer: Peer, generation: u32) -> Option<i32> {
        let table = self.lock();
        table.get(peer).filter(|d| d.generation == generation).and_then(Domain::live_pid)
    }

    /// All sockets of a domain's fd store, taken out.
    pub fn take_stored_sockets(&self, peer: Peer) -> Vec<Entry> {
        self.lock().get_mut(peer).map(|d| d.fds.take_sockets()).unwrap_or_default()
    }

    /// Reports a violation, and kills the process if asked to.
    pub fn violation(&self, peer: Peer, detail: &str, kill: bool) {
        let (id, name, pidfd) = match self.lock().get(peer) {
            Some(d) => (
                d.event_id(),
                d.spec.name.clone(),
                d.process.as_ref().filter(|p| kill && p.reaped.is_none()).map(|p| p.pidfd.clone()),
            ),
            None => ((peer.domid, peer.instance, 0), String::new(), None),
        };
        self.events.push(Kind::Violation, id, &name, detail);
        if let Some(pidfd) = pidfd {
            let _may_be_dead = sys::pidfd_kill(pidfd, libc::SIGKILL);
        }
    }

    /// Lets go of maps that nobody uses any more; pins clear when that is proved.
    pub fn release_maps(&self, holder: Peer, maps: Vec<Map>) {
        for map in maps {
            let generation = map.generation;
            let pins = map.pins;
            drop(map.fd);
            if let Some(pins) = pins {
                self.releaser.release(Pending { pins, holder, generation });
            }
        }
    }
}

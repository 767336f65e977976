//! xenstored as a service domain: journal and sockets in hv-core's fd store, rings of all domains.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use domain_kit::control::{self, ServiceControl};
use domain_kit::evtchn::Port;
use domain_kit::grants::{GrantError, MappedGrants};
use domain_kit::mem::{Page, sealed_memfd};
use domain_kit::xs::SharedPage as _;
use domain_kit::{Domain, HvError};
use hv_abi::{
    DomInfo, ROLE_BACKEND, ROLE_CONSOLE, ROLE_DOM0, ROLE_XENSTORE, VIRQ_DOM_EXC, dom_state, fd_kind,
};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use proto::service::Counter;
use xen_abi::xs_wire::{XENSTORE_ERROR_OFFSET, XENSTORE_REQ_CONS_OFFSET, XENSTORE_RSP_PROD_OFFSET};
use xenstored::calls::Caller;
use xenstored::daemon::{Daemon, Stats};
use xenstored::domains::{Domains, Ring, Seen};
use xenstored::engine::{Engine, Options};
use xenstored::journal::log::Log;
use xenstored::journal::mem::Mem;
use xenstored::keeper::FdKeeper;
use xenstored::live::{Accepts, Handover, Plan, Started, Successor};
use xenstored::migrate::{Ends, RingEnd};
use xenstored::store::{Class, ConnId};

use crate::view::{self, View};

/// Name of the journal in the fd store.
const JOURNAL: &str = "journal";
/// Name of the stream that a predecessor left at a live update; its tag is the connection that asked for it.
const STREAM: &str = "stream";
/// Sockets are kept under this and the connection's number.
const CONN: &str = "conn-";
/// How long counters wait for the event loop.
const LOOK: Duration = Duration::from_millis(200);
/// Name of the listening socket among the domain's resources.
const SOCKET: &str = "socket";

/// Joins, takes up what the predecessor left, serves until SIGTERM.
pub fn run(salvage: bool, half_size: u64) -> anyhow::Result<()> {
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTERM);
    stop.thread_block().context("blocking signals")?;
    let stop =
        SignalFd::with_flags(&stop, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")?;
    let domain = Domain::join("xenstored")?;

    let virq = domain.hv.port_bind_virq(VIRQ_DOM_EXC, 0).context("VIRQ_DOM_EXC")?;
    let mut domains =
        HvDomains { domain: Arc::clone(&domain), virq, held: BTreeMap::new(), found: BTreeMap::new() };
    let options =
        Options { half_size, salvage, own_fault: domain.predecessor_crashed(), ..Options::default() };
    take_stream(&domain, &options, &mut domains).context("the predecessor's stream")?;
    let mem = journal_memory(&domain, half_size).context("the journal's memory")?;
    let (engine, opened) = Engine::open(Rc::new(mem), &options).context("the journal")?;
    if let Some(dropped) = &opened.dropped {
        tracing::error!(dropped, "the journal was damaged; the store is older than it was");
    }
    if let Some(conn) = opened.poisoned {
        tracing::error!(conn = conn.0, "a request that made xenstored crash three times cost its connection");
    }
    tracing::info!(
        fresh = opened.fresh,
        replayed = opened.replayed,
        nodes = engine.store.tree.len(),
        "journal taken up"
    );

    let listener = match domain.hv.resource_open(SOCKET) {
        Ok((_, fd)) => {
            let listener = UnixListener::from(fd);
            domain_kit::os::set_nonblocking(&listener)?;
            Some(listener)
        }
        Err(e) if e.is(Errno::ENOENT) => {
            tracing::info!("no socket approved: rings only");
            None
        }
        Err(e) => return Err(e).context("the listening socket"),
    };
    let keeper = Kept(Arc::clone(&domain));
    let mut daemon = Daemon::new(engine, listener, stop.as_fd(), keeper, domains)?;
    daemon.set_successor(Box::new(NextIncarnation(Arc::clone(&domain))));
    let numbers = Numbers { stats: daemon.stats(), caller: daemon.caller() };
    let view = View::service(daemon.caller(), daemon.door(), daemon.stats());
    let routes = tonic::service::Routes::new(view);
    let control = control::serve_with(&domain, Arc::new(numbers), routes).context("gRPC")?;
    control.set_serving(true);
    domain.hv.served().context("telling hv-core that we serve")?;
    daemon.run()?;
    if let Err(e) = daemon.engine().compact() {
        tracing::warn!(error = %e, "the journal keeps its events");
    }
    Ok(())
}

/// The journal's memfd, made at the domain's first start. A kill between making and storing loses nothing: it is empty.
fn journal_memory(domain: &Domain, half_size: u64) -> anyhow::Result<Mem> {
    let fd = match domain.hv.fd_get(JOURNAL) {
        Ok((_, fd)) => fd,
        Err(e) if e.is(Errno::ENOENT) => {
            let fd = sealed_memfd("xenstored-journal", Log::memory_len(half_size) as usize)?;
            domain.hv.fd_put(JOURNAL, fd_kind::MEMFD, 0, &fd)?;
            fd
        }
        Err(e) => return Err(e.into()),
    };
    map(fd)
}

fn map(fd: OwnedFd) -> anyhow::Result<Mem> {
    let len = usize::try_from(nix::sys::stat::fstat(&fd)?.st_size)?;
    Ok(Mem::map(fd.into(), len)?)
}

/// If the predecessor handed over a stream, makes the journal of it. A kill at any point in between means doing it again: nobody is
/// served before the stream is gone.
fn take_stream(domain: &Arc<Domain>, options: &Options, domains: &mut HvDomains) -> anyhow::Result<()> {
    let (info, stream) = match domain.hv.fd_get(STREAM) {
        Ok(found) => found,
        Err(e) if e.is(Errno::ENOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let mut bytes = Vec::new();
    let mut file = File::from(stream);
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    let fd = sealed_memfd("xenstored-journal", Log::memory_len(options.half_size) as usize)?;
    let mem = map(fd.try_clone()?)?;
    let kept = Kept(Arc::clone(domain)).all()?.into_iter().map(|(id, _)| id).collect();
    let seen = domains.list()?;
    let mut ends = Found { kept, seen, domains };
    match Engine::import(Rc::new(mem), options, &bytes, &mut ends) {
        Ok((engine, imported)) => {
            engine.mark_live(ConnId(info.tag));
            domain.hv.fd_put(JOURNAL, fd_kind::MEMFD, 0, &fd)?;
            let (nodes, connections) = (imported.nodes, imported.kept[0]);
            // At every level of logging: it happens only when an administrator asks for it.
            tracing::warn!(nodes, connections, left_out = imported.left_out[0], "stream taken over");
        }
        // The predecessor's journal is as it left it, if its layout is this one's.
        Err(e) => tracing::error!(error = %e, "the predecessor's stream is not used"),
    }
    domain.hv.fd_delete(STREAM)?;
    Ok(())
}

/// What of the connections in a stream is still there: sockets in the fd store, rings of living domains.
struct Found<'a> {
    kept: BTreeSet<ConnId>,
    seen: Vec<Seen>,
    domains: &'a mut HvDomains,
}

impl Ends for Found<'_> {
    fn socket(&mut self, number: u32, _fd: u32) -> bool {
        self.kept.contains(&ConnId(number.into()))
    }

    fn ring(&mut self, domid: u16) -> Option<RingEnd> {
        let seen = *self.seen.iter().find(|s| s.domid == domid && !s.dying)?;
        let (gref, port) = seen.ring?;
        match self.domains.map(&seen, gref) {
            Ok(mapped) => {
                let page = Page { mem: Arc::clone(&mapped.mem), base: mapped.offset(0) };
                let end = RingEnd {
                    instance: seen.instance,
                    gref,
                    port,
                    class: seen.class,
                    req_cons: page.load_u32(XENSTORE_REQ_CONS_OFFSET),
                    rsp_prod: page.load_u32(XENSTORE_RSP_PROD_OFFSET),
                    error: page.load_u32(XENSTORE_ERROR_OFFSET),
                };
                self.domains.found.insert(domid, mapped);
                Some(end)
            }
            Err(e) => {
                tracing::error!(domid, error = %e, "a domain's ring is lost, it has to connect again");
                None
            }
        }
    }
}

fn io_error(e: HvError) -> io::Error {
    e.errno().map_or_else(|| io::Error::other(e.to_string()), io::Error::from)
}

fn grant_error(e: GrantError) -> io::Error {
    match e {
        GrantError::Hypercall(e) => io_error(e),
        GrantError::Map(e) => e,
    }
}

/// Client sockets in hv-core's fd store.
struct Kept(Arc<Domain>);

impl FdKeeper for Kept {
    fn put(&mut self, id: ConnId, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.0.hv.fd_put(&format!("{CONN}{}", id.0), fd_kind::SOCKET, id.0, fd).map_err(io_error)
    }

    /// By hv-core, in one step: a kill can't come between the two, so the client never sees its connection closed.
    fn accept(&mut self, id: ConnId, _listener: &UnixListener) -> io::Result<OwnedFd> {
        self.0.hv.resource_accept(SOCKET, &format!("{CONN}{}", id.0), id.0).map_err(io_error)
    }

    fn remove(&mut self, id: ConnId) {
        match self.0.hv.fd_delete(&format!("{CONN}{}", id.0)) {
            Ok(()) => {}
            // Rings are not kept.
            Err(e) if e.is(Errno::ENOENT) => {}
            Err(e) => tracing::warn!(conn = id.0, error = %e, "a socket stays in the fd store"),
        }
    }

    fn all(&mut self) -> io::Result<Vec<(ConnId, OwnedFd)>> {
        let mut found = Vec::new();
        for info in self.0.hv.fd_list().map_err(io_error)? {
            let Some(name) = info.name.as_str() else { continue };
            let Some(id) = name.strip_prefix(CONN).and_then(|n| n.parse().ok()) else { continue };
            let (_, fd) = self.0.hv.fd_get(name).map_err(io_error)?;
            found.push((ConnId(id), fd));
        }
        Ok(found)
    }
}

/// Live update: hv-core starts the domain's program again, which dom0 may have replaced; all descriptors are in the fd store.
struct NextIncarnation(Arc<Domain>);

impl NextIncarnation {
    fn keep(&self, asking: ConnId, stream: &[u8]) -> anyhow::Result<()> {
        let fd = sealed_memfd("xenstored-stream", stream.len())?;
        File::from(fd.try_clone()?).write_all(stream)?;
        Ok(self.0.hv.fd_put(STREAM, fd_kind::MEMFD, asking.0, &fd)?)
    }
}

impl Successor for NextIncarnation {
    fn check(&self, _plan: &Plan) -> Result<Accepts, String> {
        // What the next program takes over can't be asked from in here.
        Ok(Accepts::Journal)
    }

    fn start(&mut self, handover: &Handover<'_>) -> Started {
        match handover.stream.map_or(Ok(()), |stream| self.keep(handover.asking, stream)) {
            Ok(()) => Started::Replaced,
            Err(e) => Started::Failed(format!("The stream can't be kept: {e:#}.")),
        }
    }
}

/// A ring that this process has mapped and bound.
struct Held {
    page: MappedGrants,
    port: u32,
}

/// Domains as hv-core tells them.
struct HvDomains {
    domain: Arc<Domain>,
    virq: Port,
    held: BTreeMap<u16, Held>,
    /// Pages that are mapped and not attached yet.
    found: BTreeMap<u16, MappedGrants>,
}

impl HvDomains {
    /// A domain's ring page; the same again after a restart.
    fn map(&self, seen: &Seen, gref: u32) -> io::Result<MappedGrants> {
        let hv = &self.domain.hv;
        let tag = map_tag(seen.instance, gref);
        let mut ours = None;
        for map in hv.grant_list().map_err(io_error)?.iter().filter(|m| m.domid == seen.domid) {
            if map.tag == tag {
                ours = Some(map.handle);
            } else if map.mine == 0 {
                // A predecessor's map of a ring that is no more.
                let _ = hv.grant_unmap(map.handle);
            }
        }
        let page = match ours {
            Some(handle) => MappedGrants::claim(hv, handle),
            None => MappedGrants::map(hv, seen.domid, &[gref], tag),
        };
        page.map_err(grant_error)
    }
}

/// Marks a grant map as the ring of one creation of a domain.
fn map_tag(instance: u64, gref: u32) -> u64 {
    instance << 32 | u64::from(gref)
}

fn seen(info: &DomInfo) -> Seen {
    let service = ROLE_BACKEND | ROLE_CONSOLE | ROLE_XENSTORE;
    Seen {
        domid: info.domid,
        instance: info.instance,
        ring: (info.store_port != 0).then_some((info.store_gref, info.store_port)),
        class: match info.roles {
            roles if roles & ROLE_DOM0 != 0 => Class::Dom0,
            roles if roles & service != 0 => Class::Service,
            _ => Class::Guest,
        },
        shutdown: info.state == dom_state::SHUTDOWN,
        dying: info.state == dom_state::DYING,
    }
}

impl Domains for HvDomains {
    fn changed_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.virq.rx())
    }

    fn clear(&mut self) {
        self.virq.clear();
    }

    fn list(&mut self) -> io::Result<Vec<Seen>> {
        Ok(self.domain.hv.dom_list().map_err(io_error)?.iter().map(seen).collect())
    }

    fn attach(&mut self, seen: &Seen) -> io::Result<Ring> {
        let (gref, port) = seen.ring.ok_or(io::ErrorKind::InvalidInput)?;
        let page = match self.found.remove(&seen.domid) {
            Some(page) => page,
            None => self.map(seen, gref)?,
        };
        let hv = &self.domain.hv;
        let ring_page = Page { mem: Arc::clone(&page.mem), base: page.offset(0) };
        let port = match hv.port_bind_interdomain(seen.domid, port) {
            Ok(port) => port,
            Err(e) => {
                drop(ring_page);
                page.unmap(hv).map_err(io_error)?;
                return Err(io_error(e));
            }
        };
        self.held.insert(seen.domid, Held { page, port: port.port });
        Ok(Ring { page: Arc::new(ring_page), port })
    }

    fn detach(&mut self, domid: u16) {
        let Some(held) = self.held.remove(&domid) else { return };
        let hv = &self.domain.hv;
        if let Err(e) = hv.port_close(held.port)
            && !e.is(Errno::ENOENT)
        {
            tracing::warn!(domid, error = %e, "a store port stays bound");
        }
        if let Err(e) = held.page.unmap(hv) {
            tracing::warn!(domid, error = %e, "a store ring stays mapped");
        }
    }
}

struct Numbers {
    stats: Arc<Stats>,
    caller: Caller,
}

impl ServiceControl for Numbers {
    fn statistics(&self) -> Vec<Counter> {
        let s = &self.stats;
        let counter = |name: &str, value: &std::sync::atomic::AtomicU64, unit: &str| Counter {
            name: name.into(),
            value: value.load(Ordering::Relaxed),
            subject: String::new(),
            unit: unit.into(),
        };
        let mut out = vec![
            counter("requests", &s.requests, ""),
            counter("nodes", &s.nodes, ""),
            counter("watches", &s.watches, ""),
            counter("connections", &s.connections, ""),
            counter("domains", &s.domains, ""),
            counter("journal", &s.journal_bytes, "bytes"),
            counter("refused by quota", &s.refused, ""),
        ];
        // A loop that is busy costs these, not the others.
        let refusals = self.caller.call(LOOK, |engine| view::refusals(&engine.store)).unwrap_or_default();
        out.extend(refusals.into_iter().map(|(domid, quota, refused)| Counter {
            name: "quota_refused".into(),
            value: refused,
            subject: format!("domain-{domid} {quota}"),
            unit: "requests".into(),
        }));
        out
    }

    /// Every request is carried out and recorded in one step, so there is never anything in flight.
    fn drain(&self, _deadline: Duration, _resume: bool) -> bool {
        true
    }
}

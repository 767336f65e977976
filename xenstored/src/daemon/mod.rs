//! The event loop: one thread, one epoll, every client served in turn.
#![forbid(unsafe_code)]

mod domains;
mod sockets;
mod update;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::calls::{Caller, Calls};
use crate::domains::{Domains, Ring};
use crate::door::{self, Clients, Door};
use crate::engine::{Engine, Processed};
use crate::journal::log::Full;
use crate::keeper::FdKeeper;
use crate::live::{NoSuccessor, Session, Successor};
use crate::store::{ConnId, ConnMap};
use crate::transport::ring::{self, BadIndex};
use crate::transport::{Pulled, Pushed, stream};
use crate::turns::Turns;

/// Requests of one client before the next client's turn.
const BUDGET: usize = 32;
/// Commits in a row that fail before others wait for a client (XSA-206).
const CONFLICTS: u32 = 3;
/// How long the others wait at most, and then the client does not get another turn like that for as long.
const PRIORITY: Duration = Duration::from_millis(10);
/// How long to wait before a full journal is tried again.
const STALL: Duration = Duration::from_millis(100);

/// How long after a failure a domain's ring is asked for again.
const RESCAN: Duration = Duration::from_millis(200);

const LISTENER: u64 = 0;
const DOMAINS: u64 = 1;
const STOP: u64 = 2;
const CALLS: u64 = 3;
const CLIENTS: u64 = 4;
const CONNS: u64 = 16;

/// XENSTORE_ERROR_RINGIDX.
const ERROR_RINGIDX: u32 = 2;
/// XENSTORE_ERROR_PROTO.
const ERROR_PROTO: u32 = 3;

/// The daemon can't go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Input or output.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// No room in the journal for something that can't wait.
    #[error(transparent)]
    Full(#[from] Full),
}

impl From<Errno> for DaemonError {
    fn from(e: Errno) -> Self {
        Self::Io(e.into())
    }
}

/// Numbers for the outside, set by the event loop.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct Stats {
    pub requests: AtomicU64,
    pub nodes: AtomicU64,
    pub watches: AtomicU64,
    pub connections: AtomicU64,
    pub domains: AtomicU64,
    pub journal_bytes: AtomicU64,
    /// Requests refused by quotas since the process started.
    pub refused: AtomicU64,
}

enum Link {
    Socket {
        fd: OwnedFd,
        interest: EpollFlags,
        /// The client closed its end: what it sent is still carried out.
        ended: bool,
        blocked: bool,
        gated: bool,
    },
    Ring(Ring),
}

/// The daemon.
pub struct Daemon<K, D> {
    engine: Engine,
    epoll: Epoll,
    listener: Option<UnixListener>,
    links: ConnMap<Link>,
    /// Whose turn comes, each once; `queued` holds the same.
    runnable: VecDeque<ConnId>,
    queued: ConnMap<()>,
    turns: Turns,
    keeper: K,
    domains: D,
    priority: Option<(ConnId, Instant)>,
    rest_until: Instant,
    stalled: bool,
    /// A domain's ring could not be had: asked for again then.
    rescan_at: Option<Instant>,
    /// CONTROL live-update.
    live: Session,
    successor: Box<dyn Successor>,
    replaced: bool,
    calls: Calls,
    stats: Arc<Stats>,
    door: Door,
    clients: Clients,
}

impl<K: FdKeeper, D: Domains> Daemon<K, D> {
    /// Takes up all connections that the journal knows.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn new(
        engine: Engine,
        listener: Option<UnixListener>,
        stop: BorrowedFd<'_>,
        keeper: K,
        domains: D,
    ) -> Result<Self, DaemonError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        if let Some(listener) = &listener {
            epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        }
        if let Some(fd) = domains.changed_fd() {
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, DOMAINS))?;
        }
        let calls = Calls::new()?;
        epoll.add(calls.wake(), EpollEvent::new(EpollFlags::EPOLLIN, CALLS))?;
        let (door, clients) = door::door()?;
        epoll.add(clients.fd(), EpollEvent::new(EpollFlags::EPOLLIN, CLIENTS))?;
        let mut daemon = Self {
            engine,
            epoll,
            listener,
            links: ConnMap::default(),
            runnable: VecDeque::new(),
            queued: ConnMap::default(),
            turns: Turns::default(),
            keeper,
            domains,
            priority: None,
            rest_until: Instant::now(),
            stalled: false,
            rescan_at: None,
            live: Session::default(),
            successor: Box::new(NoSuccessor),
            replaced: false,
            calls,
            stats: Arc::default(),
            door,
            clients,
        };
        daemon.take_up_sockets()?;
        daemon.scan_domains()?;
        Ok(daemon)
    }

    /// The numbers that the loop keeps up to date.
    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.stats)
    }

    /// For clients of the process's own.
    pub fn door(&self) -> Door {
        self.door.clone()
    }

    fn wake(&mut self, id: ConnId) {
        if self.queued.insert(id, ()).is_none() {
            self.runnable.push_back(id);
        }
    }

    /// How other threads reach the store: gRPC, for example.
    pub fn caller(&self) -> Caller {
        self.calls.caller()
    }

    /// Sets how CONTROL live-update starts another binary; without, it is refused.
    pub fn set_successor(&mut self, successor: Box<dyn Successor>) {
        self.successor = successor;
    }

    /// Serves until `stop` is readable.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn run(&mut self) -> Result<(), DaemonError> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            self.update_stats();
            let n = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(n) => n,
                Err(Errno::EINTR) => 0,
                Err(e) => return Err(e.into()),
            };
            for event in &events[..n] {
                match event.data() {
                    LISTENER => self.accept()?,
                    DOMAINS => {
                        self.domains.clear();
                        self.scan_domains()?;
                    }
                    CALLS => {
                        self.calls.run(&mut self.engine);
                        self.flush_touched()?;
                    }
                    STOP => return Ok(()),
                    CLIENTS => {
                        for fd in self.clients.take() {
                            self.admit(fd)?;
                        }
                    }
                    token => self.ready(ConnId(token - CONNS), event.events())?,
                }
            }
            self.serve()?;
            if self.replaced {
                return Ok(());
            }
            if self.rescan_at.is_some_and(|at| Instant::now() >= at) {
                self.scan_domains()?;
            }
        }
    }

    /// The engine, for a clean end.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    fn update_stats(&self) {
        let store = &self.engine.store;
        let set = |to: &AtomicU64, value: u64| to.store(value, Ordering::Relaxed);
        set(&self.stats.requests, store.requests);
        set(&self.stats.nodes, store.tree.len() as u64);
        set(&self.stats.watches, store.watches.len() as u64);
        set(&self.stats.connections, self.links.len() as u64);
        set(&self.stats.domains, store.domain_count() as u64);
        set(&self.stats.journal_bytes, self.engine.log_len());
        set(&self.stats.refused, store.refusals);
    }

    fn timeout(&self) -> EpollTimeout {
        if self.stalled {
            return EpollTimeout::from(STALL.as_millis() as u16);
        }
        let busy = match &self.priority {
            Some(_) => self.runnable.iter().any(|id| !self.has_to_wait(*id)),
            None => !self.runnable.is_empty(),
        };
        if busy {
            return EpollTimeout::ZERO;
        }
        let waiting = self.priority.filter(|_| !self.runnable.is_empty()).map(|(_, until)| until);
        let first = [waiting, self.turns.deadline(), self.rescan_at].into_iter().flatten().min();
        first.map_or(EpollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
            EpollTimeout::from(left.min(1000) as u16)
        })
    }

    fn ready(&mut self, id: ConnId, events: EpollFlags) -> Result<(), DaemonError> {
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        match link {
            Link::Socket { fd, ended, .. } => {
                let can_read = EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
                if events.intersects(can_read) && !*ended {
                    match stream::pull(&self.engine, id, &stream::Socket(fd.as_fd())) {
                        Pulled::End => *ended = true,
                        Pulled::Data | Pulled::Nothing => {}
                    }
                }
                if events.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                    self.flush(id)?;
                }
            }
            Link::Ring(ring) => {
                ring.port.clear();
                self.flush(id)?;
            }
        }
        self.wake(id);
        Ok(())
    }

    fn has_to_wait(&self, id: ConnId) -> bool {
        let Some((holder, until)) = self.priority else { return false };
        if id == holder || Instant::now() >= until {
            return false;
        }
        let privileged = |id| self.engine.store.conn(id).is_none_or(|c| c.privileged());
        // Nobody unprivileged makes a privileged client wait.
        !privileged(id) || privileged(holder)
    }

    fn serve(&mut self) -> Result<(), DaemonError> {
        self.stalled = false;
        if let Some(next) = self.turns.expired() {
            self.wake(next);
        }
        for _ in 0..self.runnable.len() {
            let Some(id) = self.runnable.pop_front() else { break };
            if self.has_to_wait(id) {
                self.runnable.push_back(id);
                continue;
            }
            self.queued.remove(&id);
            self.turn(id)?;
            if self.replaced {
                return Ok(());
            }
            self.flush_touched()?;
            self.drop_closed();
        }
        Ok(())
    }

    /// One client's turn.
    fn turn(&mut self, id: ConnId) -> Result<(), DaemonError> {
        let mut again = false;
        match self.links.get(&id) {
            None => return Ok(()),
            Some(Link::Ring(ring)) => {
                let page = Arc::clone(&ring.page);
                if ring::wants_reset(&*page) {
                    if let Err(e) = ring::reset(&mut self.engine, id, &*page) {
                        return self.later(id, e);
                    }
                    ring.port.notify();
                }
                match ring::pull(&self.engine, id, &*page) {
                    Ok(Pulled::Data) => {
                        ring.port.notify();
                        again = true;
                    }
                    Ok(Pulled::Nothing | Pulled::End) => {}
                    Err(BadIndex) => return self.cut_off(id, ERROR_RINGIDX),
                }
            }
            Some(Link::Socket { .. }) => {}
        }
        let now = Instant::now();
        let privileged = self.engine.store.conn(id).is_some_and(|c| c.privileged());
        let turns = &mut self.turns;
        let outcome = self.engine.process_while(id, BUDGET, |head| turns.may_run(id, privileged, head, now));
        self.note_conflicts(id, now);
        match outcome {
            // Woken when its turn comes.
            Processed::Held => {}
            Processed::Live => return self.live_update(id),
            Processed::More => again = true,
            Processed::Idle => {
                if matches!(self.links.get(&id), Some(Link::Socket { ended: true, .. })) {
                    return self.close(id);
                }
            }
            Processed::Gated => {
                self.engine.store.note_gated(id);
                if let Some(Link::Socket { gated, .. }) = self.links.get_mut(&id) {
                    *gated = true;
                }
            }
            Processed::Violation(len) => {
                tracing::warn!(conn = id.0, len, "a request longer than XENSTORE_PAYLOAD_MAX");
                return self.cut_off(id, ERROR_PROTO);
            }
            Processed::Stalled => {
                self.stalled = true;
                again = true;
            }
            Processed::Gone => return Ok(()),
        }
        if again {
            self.wake(id);
        }
        self.update_interest(id)
    }

    /// A client whose commits keep failing gets a moment in which the others do not interfere.
    fn note_conflicts(&mut self, id: ConnId, now: Instant) {
        let (conflicts, open) =
            self.engine.store.conn(id).map_or((0, false), |c| (c.conflicts, !c.txs.is_empty()));
        if let Some(next) = self.turns.after(id, conflicts, open, now) {
            self.wake(next);
        }
        match self.priority {
            Some((holder, until)) if now >= until || (holder == id && conflicts == 0) => {
                self.priority = None;
                self.rest_until = now + PRIORITY;
            }
            None if conflicts >= CONFLICTS && now >= self.rest_until => {
                self.priority = Some((id, now + PRIORITY));
            }
            _ => {}
        }
    }

    fn update_interest(&mut self, id: ConnId) -> Result<(), DaemonError> {
        if let Some(Link::Socket { fd, interest, ended, blocked, gated }) = self.links.get_mut(&id) {
            let mut want = EpollFlags::empty();
            // While the client has to read first, its input stays where it is.
            want.set(EpollFlags::EPOLLIN, !*ended && !*gated);
            want.set(EpollFlags::EPOLLOUT, *blocked);
            if want != *interest {
                self.epoll.modify(&*fd, &mut EpollEvent::new(want, CONNS + id.0))?;
                *interest = want;
            }
        }
        Ok(())
    }

    fn flush_touched(&mut self) -> Result<(), DaemonError> {
        for id in self.engine.store.take_touched() {
            self.flush(id)?;
        }
        Ok(())
    }

    /// Hands a client what waits for it.
    fn flush(&mut self, id: ConnId) -> Result<(), DaemonError> {
        match self.links.get_mut(&id) {
            None => Ok(()),
            Some(Link::Socket { fd, blocked, gated, .. }) => {
                let pushed = stream::push(&mut self.engine, id, &stream::Socket(fd.as_fd()));
                let outcome = match pushed {
                    Ok(outcome) => outcome,
                    Err(e) => {
                        tracing::error!(error = %e, conn = id.0, "the journal is full, output waits");
                        Pushed::Blocked
                    }
                };
                *blocked = outcome == Pushed::Blocked;
                if outcome == Pushed::End {
                    stream::discard(&mut self.engine, id);
                }
                // Judged again at its next turn.
                *gated = false;
                self.wake_if_waiting(id);
                self.update_interest(id)
            }
            Some(Link::Ring(ring)) => {
                let page = Arc::clone(&ring.page);
                let pushed = match ring::push(&mut self.engine, id, &*page) {
                    Ok(pushed) => pushed,
                    Err(e) => {
                        tracing::error!(error = %e, conn = id.0, "the journal is full, output waits");
                        ring.port.notify();
                        return Ok(());
                    }
                };
                match pushed {
                    Ok((_, moved)) => {
                        if moved {
                            ring.port.notify();
                        }
                        self.wake_if_waiting(id);
                        Ok(())
                    }
                    Err(BadIndex) => self.cut_off(id, ERROR_RINGIDX),
                }
            }
        }
    }

    fn wake_if_waiting(&mut self, id: ConnId) {
        if self.engine.has_request(id) {
            self.wake(id);
        }
    }

    fn cut_off(&mut self, id: ConnId, error: u32) -> Result<(), DaemonError> {
        let domid = self.engine.store.conn(id).and_then(|c| c.domid);
        tracing::warn!(conn = id.0, ?domid, error, "connection cut off");
        if let Err(e) = self.engine.cut_off(id, error) {
            return self.later(id, e);
        }
        if let Some(Link::Ring(ring)) = self.links.get(&id) {
            ring::publish(&self.engine, id, &*ring.page);
            ring.port.notify();
        }
        self.flush_touched()?;
        self.drop_closed();
        Ok(())
    }

    fn close(&mut self, id: ConnId) -> Result<(), DaemonError> {
        if let Err(e) = self.engine.close(id) {
            return self.later(id, e);
        }
        self.drop_closed();
        Ok(())
    }

    /// Nothing goes on for this client until there is room in the journal.
    fn later(&mut self, id: ConnId, e: Full) -> Result<(), DaemonError> {
        tracing::error!(error = %e, conn = id.0, "the journal is full, a connection's end waits");
        self.stalled = true;
        self.wake(id);
        Ok(())
    }

    /// Lets go of what belonged to connections that are no more.
    fn drop_closed(&mut self) {
        for id in self.engine.store.take_closed() {
            match self.links.remove(&id) {
                Some(Link::Socket { fd, .. }) => {
                    // A kept dup would keep the registration alive.
                    let _ = self.epoll.delete(&fd);
                    drop(fd);
                }
                Some(Link::Ring(ring)) => {
                    let _ = self.epoll.delete(ring.port.rx());
                }
                None => {}
            }
            self.keeper.remove(id);
            self.live.forget(id);
            if let Some(next) = self.turns.forget(id, Instant::now()) {
                self.wake(next);
            }
        }
    }
}

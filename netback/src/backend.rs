//! The main thread: watches the store, moves vifs through their states, starts and ends workers.
//!
//! It never touches a packet. While xenstored is away nothing changes here and packets flow on.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use domain_kit::Domain;
use domain_kit::control::{ControlHandle, ServiceControl};
use domain_kit::xs::{WatchSet, XsClient, XsError, XsOps};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use proto::service::Counter;

use crate::connection::{self, ConnectError, Connection, VifId};
use crate::device::{Device, NodeError, Step, step};
use crate::forward::{Wiring, WiringError};
use crate::netlink::Netlink;
use crate::stats::Stats;
use crate::tap::Tap;
use crate::worker::{Work, Worker};

/// After a failure of the store or of the wiring, when to try again.
const RETRY: Duration = Duration::from_millis(200);

/// A vif that is known.
#[derive(Debug, Default)]
struct Vif {
    running: Option<(Worker, Connection)>,
    tap: Option<Arc<Tap>>,
    stats: Arc<Stats>,
    /// The frontend's state node that is watched.
    watched: Option<String>,
    /// Given up until the frontend connects anew.
    broken: bool,
}

/// What other threads see.
#[derive(Debug)]
pub struct Shared {
    vifs: Mutex<BTreeMap<VifId, Vif>>,
    draining: Mutex<bool>,
    failed: Mutex<Vec<(VifId, String)>>,
    wake: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Nothing known yet.
    ///
    /// # Errors
    /// eventfd(2)'s.
    pub fn new() -> std::io::Result<Arc<Shared>> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Shared {
            vifs: Mutex::default(),
            draining: Mutex::default(),
            failed: Mutex::default(),
            wake,
        }))
    }

    fn start(self: &Arc<Self>, id: VifId, work: Work) -> std::io::Result<Worker> {
        let shared = self.clone();
        let draining = *lock(&self.draining);
        Worker::start(&id.to_string(), work, draining, move |error| {
            tracing::error!(%id, %error, "the vif is given up");
            lock(&shared.failed).push((id, error.to_string()));
            let _full_is_as_good = shared.wake.write(1);
        })
    }
}

impl ServiceControl for Shared {
    fn statistics(&self) -> Vec<Counter> {
        let vifs = lock(&self.vifs);
        let mut counters = Vec::new();
        for (id, vif) in vifs.iter() {
            for (name, value, unit) in vif.stats.all() {
                counters.push(Counter {
                    name: name.into(),
                    value,
                    subject: id.to_string(),
                    unit: unit.into(),
                });
            }
        }
        let connected = vifs.values().filter(|v| v.running.is_some()).count() as u64;
        counters.push(Counter { name: "vifs_connected".into(), value: connected, ..Counter::default() });
        counters
    }

    fn drain(&self, deadline: Duration, resume: bool) -> bool {
        let end = Instant::now() + deadline;
        *lock(&self.draining) = !resume;
        let vifs = lock(&self.vifs);
        let workers = || vifs.values().filter_map(|v| v.running.as_ref());
        workers().for_each(|(worker, _)| worker.drain(!resume));
        resume
            || workers().all(|(worker, _)| worker.wait_drained(end.saturating_duration_since(Instant::now())))
    }
}

/// Takes over what a predecessor had connected, before anything else: packets flow again from here on.
pub fn take_over(domain: &Domain, shared: &Arc<Shared>) -> Result<(), domain_kit::HvError> {
    let (connected, others) = connection::known(&domain.hv)?;
    let own_fault = domain.predecessor_crashed();
    for id in connected {
        let mut vif = Vif::default();
        match connection::reattach(&domain.hv, id, own_fault, vif.stats.clone()) {
            Ok(Some((connection, work))) => {
                vif.tap = Some(work.world.tap.clone());
                match shared.start(id, work) {
                    Ok(worker) => vif.running = Some((worker, connection)),
                    Err(error) => tracing::error!(%id, %error, "no thread for a vif"),
                }
            }
            Ok(None) => tracing::info!(%id, "the predecessor had not finished connecting"),
            Err(error) => {
                tracing::error!(%id, %error, "a vif cannot be taken over");
                lock(&shared.failed).push((id, error.to_string()));
                vif.broken = true;
            }
        }
        lock(&shared.vifs).insert(id, vif);
    }
    for id in others {
        lock(&shared.vifs).insert(id, Vif::default());
    }
    Ok(())
}

/// The main thread's state.
pub struct Backend {
    domain: Arc<Domain>,
    shared: Arc<Shared>,
    xs: XsClient,
    watches: WatchSet,
    home: String,
    wiring: Wiring,
    netlink: Netlink,
    wired: bool,
    again: BTreeSet<VifId>,
    scan: bool,
}

/// Why a vif did not make its step.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Store(#[from] XsError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Nodes(NodeError),
    #[error(transparent)]
    Wiring(#[from] WiringError),
    #[error("no thread: {0}")]
    Thread(std::io::Error),
}

impl From<NodeError> for StepError {
    fn from(e: NodeError) -> Self {
        match e {
            NodeError::Store(e) => StepError::Store(e),
            e => StepError::Nodes(e),
        }
    }
}

impl Backend {
    /// Ready to [`Backend::run`].
    ///
    /// # Errors
    /// No netlink socket, no watches.
    pub fn new(
        domain: Arc<Domain>,
        shared: Arc<Shared>,
        xs: XsClient,
        wiring: Wiring,
    ) -> anyhow::Result<Backend> {
        let watches = xs.watch_set()?;
        let home = format!("/local/domain/{}", domain.domid());
        let netlink = Netlink::open()?;
        Ok(Backend {
            domain,
            shared,
            xs,
            watches,
            home,
            wiring,
            netlink,
            wired: false,
            again: BTreeSet::new(),
            scan: true,
        })
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// The watch on the backend's directory cannot be set.
    pub fn run(&mut self, control: &ControlHandle) -> anyhow::Result<()> {
        loop {
            match self.watches.watch(&format!("{}/backend/vif", self.home), "back") {
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(%error, "no watch on the backend's directory yet");
                    std::thread::sleep(RETRY);
                }
            }
        }
        let mut healthy = false;
        loop {
            self.wire();
            let mut todo = std::mem::take(&mut self.again);
            while let Some(event) = self.watches.try_next() {
                match self.vif_of(&event.path, &event.token) {
                    Some(id) => drop(todo.insert(id)),
                    None => self.scan = true,
                }
            }
            if self.scan {
                match self.all() {
                    Ok(all) => {
                        todo.extend(all);
                        self.scan = false;
                    }
                    Err(error) => tracing::warn!(%error, "the store cannot be read; trying again"),
                }
            }
            let failed = std::mem::take(&mut *lock(&self.shared.failed));
            for (id, why) in failed {
                self.give_up(id, &why);
                todo.insert(id);
            }
            for id in todo {
                if let Err(error) = self.sync(id) {
                    self.deal_with(id, error);
                }
            }
            if self.wired != healthy {
                healthy = self.wired;
                control.set_serving(healthy);
                if healthy && let Err(error) = self.domain.hv.served() {
                    tracing::warn!(%error, "hv-core did not take note that we serve");
                }
            }
            self.sleep();
        }
    }

    fn sleep(&self) {
        let retry = self.scan || !self.wired || !self.again.is_empty();
        let timeout = if retry { PollTimeout::from(RETRY.as_millis() as u16) } else { PollTimeout::NONE };
        let mut fds = [
            PollFd::new(self.watches.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "poll");
                std::thread::sleep(RETRY);
            }
        }
        let _nothing_there_is_fine = self.shared.wake.read();
    }

    /// Sets the namespace up once.
    fn wire(&mut self) {
        if self.wired {
            return;
        }
        match self.wiring.prepare(&mut self.netlink) {
            Ok(()) => self.wired = true,
            Err(error) => tracing::error!(%error, "no network yet; trying again"),
        }
    }

    /// Which vif an event is about.
    fn vif_of(&self, path: &str, token: &str) -> Option<VifId> {
        let rest = match token {
            "back" => path.strip_prefix(&format!("{}/backend/vif/", self.home))?,
            token => token,
        };
        let mut parts = rest.split('/');
        Some(VifId { frontend: parts.next()?.parse().ok()?, handle: parts.next()?.parse().ok()? })
    }

    /// All vifs there are, in the store or here.
    fn all(&self) -> Result<BTreeSet<VifId>, XsError> {
        let mut all: BTreeSet<VifId> = lock(&self.shared.vifs).keys().copied().collect();
        let list = |path: &str| match self.xs.directory(path) {
            Err(e) if e.is_not_found() => Ok(Vec::new()),
            other => other,
        };
        let root = format!("{}/backend/vif", self.home);
        for frontend in list(&root)? {
            for handle in list(&format!("{root}/{frontend}"))? {
                if let (Ok(frontend), Ok(handle)) = (frontend.parse(), handle.parse()) {
                    all.insert(VifId { frontend, handle });
                }
            }
        }
        Ok(all)
    }

    /// Looks at a vif and does what follows.
    fn sync(&mut self, id: VifId) -> Result<(), StepError> {
        let Some(device) = Device::find(&self.xs, &self.home, id)? else {
            self.remove(id);
            return Ok(());
        };
        self.watch_front(id, &device)?;
        let (back, front, online) = device.states(&self.xs)?;
        let connected = lock(&self.shared.vifs).get(&id).is_some_and(|v| v.running.is_some());
        match step(back, front, online, connected) {
            Step::Stay => {}
            Step::Offer => {
                self.disconnect(id);
                lock(&self.shared.vifs).entry(id).or_default().broken = false;
                self.prepare_tap(&device)?;
                device.offer(&self.xs)?;
                tracing::info!(%id, "offered");
            }
            Step::Connect => {
                if lock(&self.shared.vifs).get(&id).is_some_and(|v| v.broken) {
                    return Ok(());
                }
                let tap = self.prepare_tap(&device)?;
                if !connected {
                    self.connect(&device, tap)?;
                }
                device.write(&self.xs, &[("state", "4")])?;
                tracing::info!(%id, "connected");
            }
            Step::Close(to) => {
                self.disconnect(id);
                device.write(&self.xs, &[("state", &to.to_string())])?;
                tracing::info!(%id, state = to, "closed");
            }
        }
        Ok(())
    }

    fn deal_with(&mut self, id: VifId, error: StepError) {
        match error {
            StepError::Store(error) => {
                tracing::warn!(%id, %error, "the store failed; trying again");
                self.again.insert(id);
            }
            StepError::Wiring(error) => {
                tracing::error!(%id, %error, "no network; trying again");
                self.wired = false;
                self.again.insert(id);
            }
            StepError::Connect(ConnectError::System { what, source }) => {
                tracing::error!(%id, what, error = %source, "trying again");
                self.again.insert(id);
            }
            error => self.give_up(id, &error.to_string()),
        }
    }

    /// Ends a vif that cannot work; the frontend may connect anew.
    fn give_up(&mut self, id: VifId, why: &str) {
        tracing::error!(%id, why, "the vif is closed");
        self.disconnect(id);
        lock(&self.shared.vifs).entry(id).or_default().broken = true;
        let told = match Device::find(&self.xs, &self.home, id) {
            Ok(Some(device)) => device.fail(&self.xs, &self.home, why),
            Ok(None) => Ok(()),
            Err(e) => Err(e),
        };
        if let Err(error) = told {
            tracing::warn!(%id, %error, "the store does not know it yet; trying again");
            lock(&self.shared.failed).push((id, why.into()));
            let _full_is_as_good = self.shared.wake.write(1);
            std::thread::sleep(RETRY);
        }
    }

    fn watch_front(&self, id: VifId, device: &Device) -> Result<(), XsError> {
        let path = format!("{}/state", device.front);
        let token = format!("{}/{}", id.frontend, id.handle);
        let watched = lock(&self.shared.vifs).entry(id).or_default().watched.clone();
        if watched.as_ref() == Some(&path) {
            return Ok(());
        }
        self.watches.watch(&path, &token)?;
        if let Some(old) = watched {
            self.watches.unwatch(&old, &token)?;
        }
        lock(&self.shared.vifs).entry(id).or_default().watched = Some(path);
        Ok(())
    }

    fn prepare_tap(&mut self, device: &Device) -> Result<Arc<Tap>, StepError> {
        let id = device.id;
        let known = lock(&self.shared.vifs).entry(id).or_default().tap.clone();
        let tap = match known {
            Some(tap) => tap,
            None => connection::tap(&self.domain.hv, id)?,
        };
        lock(&self.shared.vifs).entry(id).or_default().tap = Some(tap.clone());
        let (mtu, ip) = device.network(&self.xs)?;
        self.wiring.attach(&mut self.netlink, tap.name(), mtu, ip)?;
        Ok(tap)
    }

    fn connect(&mut self, device: &Device, tap: Arc<Tap>) -> Result<(), StepError> {
        let id = device.id;
        let params = device.params(&self.xs)?;
        let stats = lock(&self.shared.vifs).entry(id).or_default().stats.clone();
        let (connection, work) = connection::connect(&self.domain.hv, id, &params, tap, stats)?;
        let worker = self.shared.start(id, work).map_err(StepError::Thread)?;
        lock(&self.shared.vifs).entry(id).or_default().running = Some((worker, connection));
        Ok(())
    }

    fn disconnect(&mut self, id: VifId) {
        let running = lock(&self.shared.vifs).get_mut(&id).and_then(|v| v.running.take());
        if let Some((worker, connection)) = running {
            worker.stop();
            connection.close(&self.domain.hv, id);
        }
    }

    /// The toolstack removed it.
    fn remove(&mut self, id: VifId) {
        self.disconnect(id);
        let Some(vif) = lock(&self.shared.vifs).remove(&id) else { return };
        if let Some(path) = vif.watched {
            let token = format!("{}/{}", id.frontend, id.handle);
            if let Err(error) = self.watches.unwatch(&path, &token) {
                tracing::debug!(%id, %error, "unwatch");
            }
        }
        drop(vif.tap);
        connection::forget(&self.domain.hv, id, true);
        let error = format!("{}/error/backend/vif/{}", self.home, id.frontend);
        match self.xs.rm(&error) {
            Ok(()) => {}
            Err(e) if e.is_not_found() => {}
            Err(error) => tracing::debug!(%id, %error, "error node stays"),
        }
        tracing::info!(%id, "removed");
    }
}

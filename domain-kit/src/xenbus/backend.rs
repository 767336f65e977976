//! A backend's devices.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use xen_abi::xenbus::XenbusState;

use super::decide::{Action, decide};
use super::nodes::{DeviceKey, DeviceNode, home, state};
use crate::xs::{XsClient, XsError, XsOps};

/// Why a driver could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not yet: asked again after [`BackendHandle::wake`] and every second. The text goes to the device's error node.
    #[error("{0}")]
    NotReady(String),
    /// Never with this connection: the device is closed. The text goes to the device's error node.
    #[error("{0}")]
    Failed(String),
    /// The store failed; asked again soon.
    #[error(transparent)]
    Store(#[from] XsError),
}

/// Nodes to publish: (name, value).
pub type Properties = Vec<(&'static str, String)>;

/// What a kind of backend does for its devices. All calls come from the one thread in [`Backend::run`].
pub trait BackendDriver {
    /// A device that is served.
    type Device;

    /// The directory under `backend/` and `device/`: "vbd", "vif".
    const KIND: &'static str;

    /// Serves again, before the store is even connected, what a previous incarnation served, as far as kept memory tells.
    fn resume(&mut self) -> Vec<(DeviceKey, Self::Device)> {
        Vec::new()
    }

    /// Devices of which something is kept, served or not. Those of them that the store does not have any more are forgotten: they
    /// were removed while no incarnation lived.
    fn kept(&mut self) -> Vec<DeviceKey> {
        Vec::new()
    }

    /// Features to publish, as (node, value).
    ///
    /// # Errors
    /// [`DeviceError`].
    fn offer(&mut self, node: &DeviceNode) -> Result<Properties, DeviceError>;

    /// Connects to the frontend's rings. `reattach`: the state nodes say that it is connected, and an earlier incarnation
    /// served it. Gives the properties to publish with Connected (not written if `reattach`).
    ///
    /// # Errors
    /// [`DeviceError`].
    fn connect(
        &mut self,
        node: &DeviceNode,
        reattach: bool,
    ) -> Result<(Self::Device, Properties), DeviceError>;

    /// Called after Connected is written: the frontend may be served now. (`resume` and re-attach serve at once.)
    fn connected(&mut self, _node: &DeviceNode, _device: &mut Self::Device) {}

    /// Called for a device that is served and connected at both ends (or changes something while it is), each time its nodes or anything else may have changed.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn live(&mut self, _node: &DeviceNode, _device: &mut Self::Device) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Stops serving: everything mapped is unmapped, nothing kept for a next incarnation.
    fn disconnect(&mut self, key: DeviceKey, device: Self::Device);

    /// Forgets what is kept of a device that is not served.
    fn forget(&mut self, _key: DeviceKey) {}

    /// Something woke the bus.
    fn woken(&mut self) {}
}

#[derive(Debug)]
struct Shared {
    wake: EventFd,
    failed: Mutex<BTreeMap<DeviceKey, String>>,
    stop: std::sync::atomic::AtomicBool,
}

/// Speaks to a running [`Backend`] from other threads.
#[derive(Clone, Debug)]
pub struct BackendHandle(Arc<Shared>);

impl BackendHandle {
    /// Looks at all devices again: something that was not ready may be now.
    pub fn wake(&self) {
        let _full_is_awake_too = self.0.wake.write(1);
    }

    /// A served device failed: it is closed, with this text in its error node.
    pub fn failed(&self, key: DeviceKey, why: String) {
        self.0.failed.lock().unwrap_or_else(PoisonError::into_inner).insert(key, why);
        self.wake();
    }

    /// Ends [`Backend::run`]; devices stay as they are.
    pub fn stop(&self) {
        self.0.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.wake();
    }
}

/// All devices of one kind that this domain serves.
pub struct Backend<D: BackendDriver> {
    driver: D,
    domid: u16,
    devices: BTreeMap<DeviceKey, D::Device>,
    errors: BTreeMap<DeviceKey, String>,
    watched: BTreeSet<DeviceKey>,
    shared: Arc<Shared>,
}

/// A device is looked at no more often than this, however often its nodes change (XSA-349).
const LEAST_INTERVAL: Duration = Duration::from_millis(2);
const RETRY: Duration = Duration::from_millis(100);
const RETRY_NOT_READY: Duration = Duration::from_secs(1);

impl<D: BackendDriver> Backend<D> {
    /// Takes up what a previous incarnation served. The store is not needed yet.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(driver: impl FnOnce(BackendHandle) -> D, domid: u16) -> std::io::Result<Self> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { wake, failed: Mutex::default(), stop: false.into() });
        let mut driver = driver(BackendHandle(shared.clone()));
        let devices = driver.resume().into_iter().collect();
        Ok(Backend { driver, domid, devices, errors: BTreeMap::new(), watched: BTreeSet::new(), shared })
    }

    /// For other threads.
    pub fn handle(&self) -> BackendHandle {
        BackendHandle(self.shared.clone())
    }

    /// The driver.
    pub fn driver(&mut self) -> &mut D {
        &mut self.driver
    }

    fn root(&self) -> String {
        format!("{}/backend/{}", home(self.domid), D::KIND)
    }

    /// Runs all devices until [`BackendHandle::stop`]. Pauses of the store are waited for.
    ///
    /// # Errors
    /// When watches cannot be made at all.
    pub fn run(&mut self, xs: &XsClient) -> Result<(), XsError> {
        let watches = xs.watch_set()?;
        let root = self.root();
        while let Err(e) = watches.watch(&root, "backend") {
            if matches!(e, XsError::Closed | XsError::Nul | XsError::TooLong(_)) {
                return Err(e);
            }
            tracing::warn!(error = %e, "the store does not take the watch yet");
            std::thread::sleep(RETRY);
        }
        // Everything is looked at once: watches fire when set, and so does the first timeout.
        let mut all_at = Some(Instant::now());
        let mut due: BTreeSet<DeviceKey> = BTreeSet::new();
        let mut kept: BTreeSet<DeviceKey> = self.driver.kept().into_iter().collect();
        loop {
            if self.shared.stop.load(std::sync::atomic::Ordering::Relaxed) {
                return Ok(());
            }
            let now = Instant::now();
            if all_at.is_some_and(|at| at <= now) {
                all_at = None;
                match self.list(xs) {
                    Ok(listed) => due.extend(listed),
                    Err(error) => {
                        tracing::debug!(%error, "listing devices");
                        all_at = Some(now + RETRY);
                    }
                }
                // Those that are gone from the list, too: one that was only offered is in `watched` alone.
                due.extend(self.devices.keys().chain(&self.watched).chain(&kept));
            }
            for key in std::mem::take(&mut due) {
                let again = match self.look(xs, &watches, key) {
                    Ok(()) => {
                        kept.remove(&key);
                        continue;
                    }
                    Err(DeviceError::NotReady(why)) => {
                        self.say_error(xs, key, &why);
                        RETRY_NOT_READY
                    }
                    Err(DeviceError::Failed(why)) => {
                        self.fail(xs, key, &why);
                        continue;
                    }
                    Err(DeviceError::Store(error)) => {
                        tracing::debug!(device = %key, %error, "the store failed");
                        RETRY
                    }
                };
                let at = Instant::now() + again;
                all_at = Some(all_at.map_or(at, |was| was.min(at)));
            }
            self.sleep(&watches, all_at);
            // One look at each device for all events that queued up.
            while let Some(event) = watches.try_next() {
                match self.key_of(&event.path, &event.token) {
                    Some(key) => {
                        due.insert(key);
                    }
                    None => all_at = Some(Instant::now()),
                }
            }
            if self.shared.wake.read().is_ok() {
                self.driver.woken();
                all_at = Some(Instant::now());
                let failed =
                    std::mem::take(&mut *self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner));
                for (key, why) in failed {
                    self.fail(xs, key, &why);
                }
            }
        }
    }

    fn sleep(&self, watches: &crate::xs::WatchSet, until: Option<Instant>) {
        std::thread::sleep(
            LEAST_INTERVAL
                .min(until.map_or(LEAST_INTERVAL, |at| at.saturating_duration_since(Instant::now()))),
        );
        let timeout = until.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now());
            PollTimeout::try_from(left.as_millis() + u128::from(!left.is_zero())).unwrap_or(PollTimeout::MAX)
        });
        let wake: BorrowedFd<'_> = self.shared.wake.as_fd();
        let _eintr_is_a_wake_up_too = poll(
            &mut [PollFd::new(watches.as_fd(), PollFlags::POLLIN), PollFd::new(wake, PollFlags::POLLIN)],
            timeout,
        );
    }

    /// The device that an event is about; `None`: look at all.
    fn key_of(&self, path: &str, token: &str) -> Option<DeviceKey> {
        if let Some((frontend, id)) = token.split_once('-') {
            return Some(DeviceKey { frontend: frontend.parse().ok()?, id: id.parse().ok()? });
        }
        let below = path.strip_prefix(&self.root())?;
        let mut parts = below.split('/').filter(|p| !p.is_empty());
        Some(DeviceKey { frontend: parts.next()?.parse().ok()?, id: parts.next()?.parse().ok()? })
    }

    fn list(&self, xs: &XsClient) -> Result<Vec<DeviceKey>, XsError> {
        let root = self.root();
        let names = |path: &str| match xs.directory(path) {
            Err(e) if e.is_not_found() => Ok(Vec::new()),
            other => other,
        };
        let mut keys = Vec::new();
        for frontend in names(&root)? {
            let Ok(domid) = frontend.parse() else { continue };
            for id in names(&format!("{root}/{frontend}"))? {
                if let Ok(id) = id.parse() {
                    keys.push(DeviceKey { frontend: domid, id });
                }
            }
        }
        Ok(keys)
    }

    /// Brings one device to where its nodes want it.
    fn look(
        &mut self,
        xs: &XsClient,
        watches: &crate::xs::WatchSet,
        key: DeviceKey,
    ) -> Result<(), DeviceError> {
        let back = format!("{}/{}/{}", self.root(), key.frontend, key.id);
        let front = format!("{}/device/{}/{}", home(key.frontend), D::KIND, key.id);
        // Each round is one action; the table has no cycle.
        for _ in 0..6 {
            let known = xs.read_opt(&format!("{back}/frontend"))?;
            let Some(said) = known else {
                self.gone(watches, key, &front);
                return Ok(());
            };
            // The toolstack's own layout; anything else would have us watch and read elsewhere.
            if said != front {
                return Err(DeviceError::NotReady(format!("frontend node is not {front}")));
            }
            if self.watched.insert(key)
                && let Err(e) = watches.watch(&format!("{front}/state"), &key.to_string())
                && !e.is(crate::xs::XsErrno::EEXIST)
            {
                self.watched.remove(&key);
                return Err(e.into());
            }
            let node = DeviceNode { key, back: back.clone(), front: front.clone(), xs: xs.clone() };
            let back_state = state(xs, &back)?;
            let front_state = state(xs, &front)?;
            let online = xs.read_opt(&format!("{back}/online"))?.is_none_or(|text| text.trim() != "0");
            let live = self.devices.contains_key(&key);
            let action = decide(back_state, front_state, live, online);
            if action != Action::Wait {
                tracing::info!(device = %key, front = ?front_state, back = ?back_state, ?action, "{}", D::KIND);
            }
            match action {
                Action::Wait => {
                    if back_state == XenbusState::Connected
                        && front_state == XenbusState::Connected
                        && let Some(device) = self.devices.get_mut(&key)
                    {
                        self.driver.live(&node, device)?;
                    }
                    return Ok(());
                }
                Action::Refresh(to) => {
                    if let Some(device) = self.devices.get_mut(&key) {
                        self.driver.live(&node, device)?;
                    }
                    publish(&node, &[], to)?;
                }
                Action::Offer => self.offer(&node)?,
                Action::Connect => {
                    let (mut device, properties) = self.driver.connect(&node, false)?;
                    if let Err(e) = publish(&node, &properties, XenbusState::Connected) {
                        self.driver.disconnect(key, device);
                        return Err(e.into());
                    }
                    self.driver.connected(&node, &mut device);
                    self.devices.insert(key, device);
                    self.clear_error(xs, key);
                }
                Action::Reattach => {
                    let (device, _) = self.driver.connect(&node, true)?;
                    self.devices.insert(key, device);
                    self.clear_error(xs, key);
                }
                Action::Disconnect(to) => {
                    self.close(key);
                    if to == XenbusState::InitWait {
                        self.offer(&node)?;
                    } else {
                        publish(&node, &[], to)?;
                    }
                }
                Action::Say(to) => publish(&node, &[], to)?,
            }
        }
        Ok(())
    }

    fn offer(&mut self, node: &DeviceNode) -> Result<(), DeviceError> {
        let features = self.driver.offer(node)?;
        publish(node, &features, XenbusState::InitWait)?;
        self.clear_error(&node.xs, node.key);
        Ok(())
    }

    fn close(&mut self, key: DeviceKey) {
        match self.devices.remove(&key) {
            Some(device) => self.driver.disconnect(key, device),
            None => self.driver.forget(key),
        }
    }

    fn gone(&mut self, watches: &crate::xs::WatchSet, key: DeviceKey, front: &str) {
        if self.watched.remove(&key) {
            let _was_there = watches.unwatch(&format!("{front}/state"), &key.to_string());
        }
        if self.devices.contains_key(&key) {
            tracing::info!(device = %key, "{}: removed", D::KIND);
        }
        self.close(key);
        self.errors.remove(&key);
    }

    fn error_path(&self, key: DeviceKey) -> String {
        format!("{}/error/backend/{}/{}/{}/error", home(self.domid), D::KIND, key.frontend, key.id)
    }

    /// The text in the device's error node (once for each text).
    fn say_error(&mut self, xs: &XsClient, key: DeviceKey, why: &str) {
        if self.errors.get(&key).is_some_and(|said| said == why) {
            return;
        }
        tracing::error!(device = %key, "{}: {why}", D::KIND);
        match xs.write(&self.error_path(key), why) {
            Ok(()) => {
                self.errors.insert(key, why.to_owned());
            }
            Err(error) => tracing::warn!(device = %key, %error, "the error node cannot be written"),
        }
    }

    fn clear_error(&mut self, xs: &XsClient, key: DeviceKey) {
        self.errors.remove(&key);
        // A predecessor may have written it.
        let _absent_is_fine = xs.rm(&self.error_path(key));
    }

    fn fail(&mut self, xs: &XsClient, key: DeviceKey, why: &str) {
        self.say_error(xs, key, why);
        self.close(key);
        let path = format!("{}/{}/{}/state", self.root(), key.frontend, key.id);
        if let Err(error) = xs.write(&path, XenbusState::Closed.as_str()) {
            tracing::warn!(device = %key, %error, "the state cannot be written");
        }
    }
}

/// Nodes and the state that tells of them, in one transaction.
///
/// Without an answer it is not known whether it took effect; it is the same the second time, so it is tried until there is one.
fn publish(node: &DeviceNode, nodes: &[(&str, String)], to: XenbusState) -> Result<(), XsError> {
    let mut tries = 0;
    loop {
        let said = node.xs.transaction(|tx| {
            for (name, value) in nodes {
                tx.write(&format!("{}/{name}", node.back), value)?;
            }
            tx.write(&format!("{}/state", node.back), to.as_str())
        });
        match said {
            Err(XsError::Timeout(_) | XsError::Disconnected) if tries < 20 => tries += 1,
            other => return other,
        }
        std::thread::sleep(RETRY);
    }
}

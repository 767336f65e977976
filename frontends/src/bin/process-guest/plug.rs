//! A network device that the toolstack may unplug and plug in again, at another backend perhaps.

use std::time::{Duration, Instant};

use domain_kit::Hypercall;
use domain_kit::xenbus::{Frontend, XenbusState};
use domain_kit::xs::{WatchSet, XsClient, XsError, XsOps};
use frontends::ConnectError;
use frontends::netfront::{NetFront, Options};

/// How long the backend may take to let go.
const CLOSE: Duration = Duration::from_secs(5);
/// How long the device may be away.
const AWAY: Duration = Duration::from_secs(30);

/// Follows one device.
pub struct Plug {
    hv: Hypercall,
    xs: XsClient,
    domid: u16,
    id: u32,
    /// Its Ethernet address, by which it is found again: a moved device has another number.
    mac: Option<String>,
    options: Options,
    /// The device and its backend's state, as connected last.
    now: Option<(Frontend, WatchSet)>,
}

impl Plug {
    pub fn new(hv: Hypercall, xs: XsClient, domid: u16, id: u32, options: Options) -> Plug {
        Plug { hv, xs, domid, id, mac: None, options, now: None }
    }

    /// Connects the device as it is now.
    pub fn connect(&mut self, timeout: Duration) -> Result<NetFront, ConnectError> {
        let front = NetFront::connect_with(&self.hv, &self.xs, self.domid, self.id, self.options, timeout)?;
        let device = Frontend::open(&self.xs, self.domid, "vif", self.id)?;
        self.mac = self.xs.read_opt(&format!("{}/mac", device.path))?;
        let watches = self.xs.watch_set()?;
        watches.watch(&format!("{}/state", device.backend), "state")?;
        self.now = Some((device, watches));
        Ok(front)
    }

    /// True if the backend wants the device closed; it is then.
    pub fn closed(&mut self) -> bool {
        let Some((device, watches)) = &self.now else { return false };
        if watches.try_next().is_none() {
            return false;
        }
        let over = match device.backend_state() {
            Ok(XenbusState::Closing | XenbusState::Closed) => true,
            Err(e) => e.is_not_found(),
            Ok(_) => false,
        };
        if over {
            // Gone already, perhaps.
            let _told: Result<(), XsError> = device.close(CLOSE);
            self.now = None;
        }
        over
    }

    /// Connects the device again as soon as it is there again.
    pub fn again(&mut self) -> Result<NetFront, ConnectError> {
        let deadline = Instant::now() + AWAY;
        loop {
            let found = Frontend::list(&self.xs, self.domid, "vif").unwrap_or_default();
            if let Some(id) = found.into_iter().find(|&id| self.is_fresh(id).unwrap_or(false)) {
                self.id = id;
                return self.connect(AWAY);
            }
            if Instant::now() > deadline {
                return self.connect(AWAY);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// True if it is the device, and nobody has connected it yet.
    fn is_fresh(&self, id: u32) -> Result<bool, XsError> {
        let device = Frontend::open(&self.xs, self.domid, "vif", id)?;
        let states = (device.own_state()?, device.backend_state()?);
        let fresh =
            matches!(states, (XenbusState::Initialising, XenbusState::Initialising | XenbusState::InitWait));
        Ok(fresh && self.xs.read_opt(&format!("{}/mac", device.path))? == self.mac)
    }
}

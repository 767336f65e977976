//! domain-kit's xenbus backend against the real store: states, an own restart, watch storms.

mod common;

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::Daemon;
use domain_kit::xenbus::{
    Backend, BackendDriver, BackendHandle, DeviceError, DeviceKey, DeviceNode, Properties, XenbusState,
};
use domain_kit::xs::{XsClient, XsOps};

/// Notes what it is asked to do.
struct Driver {
    calls: Arc<Mutex<Vec<String>>>,
    ready: Arc<Mutex<bool>>,
}

impl Driver {
    fn note(&self, what: &str, key: DeviceKey) {
        self.calls.lock().unwrap().push(format!("{what} {key}"));
    }
}

impl BackendDriver for Driver {
    type Device = ();
    const KIND: &'static str = "vbd";

    fn offer(&mut self, node: &DeviceNode) -> Result<Properties, DeviceError> {
        if !*self.ready.lock().unwrap() {
            return Err(DeviceError::NotReady("the disk is away".into()));
        }
        self.note("offer", node.key);
        Ok(vec![("feature-x", "1".into())])
    }

    fn connect(&mut self, node: &DeviceNode, reattach: bool) -> Result<((), Properties), DeviceError> {
        self.note(if reattach { "reattach" } else { "connect" }, node.key);
        Ok(((), vec![("sectors", "8".into())]))
    }

    fn disconnect(&mut self, key: DeviceKey, (): ()) {
        self.note("disconnect", key);
    }
}

struct Running {
    handle: BackendHandle,
    thread: JoinHandle<()>,
    calls: Arc<Mutex<Vec<String>>>,
    ready: Arc<Mutex<bool>>,
}

impl Running {
    fn start(daemon: &Daemon, ready: bool) -> Self {
        let xs = client(daemon);
        let calls = Arc::new(Mutex::new(Vec::new()));
        let ready = Arc::new(Mutex::new(ready));
        let driver = Driver { calls: calls.clone(), ready: ready.clone() };
        let mut backend = Backend::new(|_| driver, 0).unwrap();
        let handle = backend.handle();
        let thread = std::thread::spawn(move || backend.run(&xs).unwrap());
        Running { handle, thread, calls, ready }
    }

    fn stop(self) -> Vec<String> {
        self.handle.stop();
        self.thread.join().unwrap();
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

fn client(daemon: &Daemon) -> XsClient {
    XsClient::connect_socket(daemon.socket(), Duration::from_secs(5)).unwrap()
}

fn back(id: u32) -> String {
    format!("/local/domain/0/backend/vbd/5/{id}")
}

fn front(id: u32) -> String {
    format!("/local/domain/5/device/vbd/{id}")
}

fn add(xs: &XsClient, id: u32) {
    xs.transaction(|tx| {
        tx.write(&format!("{}/frontend", back(id)), front(id))?;
        tx.write(&format!("{}/online", back(id)), "1")?;
        tx.write(&format!("{}/state", back(id)), "1")?;
        tx.write(&format!("{}/state", front(id)), "1")
    })
    .unwrap();
}

fn say(xs: &XsClient, id: u32, state: XenbusState) {
    xs.write(&format!("{}/state", front(id)), state.as_str()).unwrap();
}

fn wait(xs: &XsClient, path: &str, want: Option<&str>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let found = xs.read_opt(path).unwrap();
        if found.as_deref() == want {
            return;
        }
        assert!(Instant::now() < deadline, "{path} is {found:?}, not {want:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wait_state(xs: &XsClient, id: u32, state: XenbusState) {
    wait(xs, &format!("{}/state", back(id)), Some(state.as_str()));
}

/// A client, and a backend that has offered device 1.
fn offered(daemon: &Daemon) -> (XsClient, Running) {
    let xs = client(daemon);
    let backend = Running::start(daemon, true);
    add(&xs, 1);
    wait_state(&xs, 1, XenbusState::InitWait);
    (xs, backend)
}

#[test]
fn a_device_comes_goes_and_comes_back() {
    use XenbusState::*;
    let daemon = Daemon::start();
    let (xs, backend) = offered(&daemon);
    wait(&xs, &format!("{}/feature-x", back(1)), Some("1"));
    say(&xs, 1, Initialised);
    wait_state(&xs, 1, Connected);
    wait(&xs, &format!("{}/sectors", back(1)), Some("8"));
    say(&xs, 1, Connected);
    say(&xs, 1, Closing);
    wait_state(&xs, 1, Closing);
    say(&xs, 1, Closed);
    wait_state(&xs, 1, Closed);
    say(&xs, 1, Initialising);
    wait_state(&xs, 1, InitWait);
    say(&xs, 1, Initialised);
    wait_state(&xs, 1, Connected);
    xs.rm(&back(1)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while backend.calls.lock().unwrap().len() < 6 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    let calls = backend.stop();
    assert_eq!(
        calls,
        ["offer 5-1", "connect 5-1", "disconnect 5-1", "offer 5-1", "connect 5-1", "disconnect 5-1"]
    );
}

/// A backend that dies is not seen in the state nodes, and attaches again by them.
#[test]
fn an_own_restart_touches_no_state() {
    use XenbusState::*;
    let daemon = Daemon::start();
    let (xs, backend) = offered(&daemon);
    say(&xs, 1, Initialised);
    wait_state(&xs, 1, Connected);
    say(&xs, 1, Connected);
    backend.stop();
    let watches = xs.watch_set().unwrap();
    watches.watch(&back(1), "any change").unwrap();
    assert!(watches.next_timeout(Duration::from_secs(5)).is_some(), "fires once when set");
    let backend = Running::start(&daemon, true);
    let deadline = Instant::now() + Duration::from_secs(10);
    while backend.calls.lock().unwrap().is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(watches.next_timeout(Duration::from_millis(100)).is_none(), "no node is written");
    assert_eq!(backend.stop(), ["reattach 5-1"]);
}

#[test]
fn what_is_not_ready_says_so_and_is_tried_again() {
    let daemon = Daemon::start();
    let xs = client(&daemon);
    let backend = Running::start(&daemon, false);
    add(&xs, 1);
    let error = "/local/domain/0/error/backend/vbd/5/1/error";
    wait(&xs, error, Some("the disk is away"));
    wait_state(&xs, 1, XenbusState::Initialising);
    *backend.ready.lock().unwrap() = true;
    backend.handle.wake();
    wait_state(&xs, 1, XenbusState::InitWait);
    wait(&xs, error, None);
    backend.stop();
}

#[test]
fn a_failed_device_is_closed_and_can_begin_again() {
    use XenbusState::*;
    let daemon = Daemon::start();
    let (xs, backend) = offered(&daemon);
    say(&xs, 1, Connected);
    wait_state(&xs, 1, Connected);
    backend.handle.failed(DeviceKey { frontend: 5, id: 1 }, "the ring is broken".into());
    wait_state(&xs, 1, Closed);
    wait(&xs, "/local/domain/0/error/backend/vbd/5/1/error", Some("the ring is broken"));
    say(&xs, 1, Initialising);
    wait_state(&xs, 1, InitWait);
    assert_eq!(backend.stop(), ["offer 5-1", "connect 5-1", "disconnect 5-1", "offer 5-1"]);
}

/// XSA-349: a frontend that writes its state without end costs its backend a look every few milliseconds, and others nothing.
#[test]
fn xsa_349_watch_storm() {
    use XenbusState::*;
    let daemon = Daemon::start();
    let (xs, backend) = offered(&daemon);
    say(&xs, 1, Connected);
    wait_state(&xs, 1, Connected);
    let writes: u32 = std::env::var("BH_STORM").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000);
    std::thread::scope(|scope| {
        let storm = client(&daemon);
        let writer = scope.spawn(move || (0..writes).for_each(|_| say(&storm, 1, Connected)));
        let began = Instant::now();
        add(&xs, 2);
        wait_state(&xs, 2, InitWait);
        say(&xs, 2, Initialised);
        wait_state(&xs, 2, Connected);
        println!("another device connected within {:?} of the storm", began.elapsed());
        writer.join().unwrap();
    });
    say(&xs, 1, Closing);
    wait_state(&xs, 1, Closing);
    assert_eq!(backend.stop(), ["offer 5-1", "connect 5-1", "offer 5-2", "connect 5-2", "disconnect 5-1"]);
}

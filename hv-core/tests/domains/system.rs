//! A running hv-core with a dom0 of the tests'.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use domain_kit::Hypercall;
use proto::hvcore::hv_core_client::HvCoreClient;
use proto::hvcore::*;
use tonic::transport::{Channel, Endpoint};

use crate::agent::{recv_fd, send_fds};

/// How long anything may take here.
pub const SOON: Duration = Duration::from_secs(20);

/// Waits until `done`, or panics.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not in {SOON:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A running system.
pub struct System {
    /// hv-core.
    pub hv_core: Child,
    /// The run directory, removed in the end.
    pub dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    client: HvCoreClient<Channel>,
}

/// This very program.
fn program() -> PathBuf {
    std::env::current_exe().expect("own path")
}

/// The command that starts hv-core in a run directory.
pub fn hv_core_command(run_dir: &Path) -> Command {
    // Another copy, for runs in the lab while this one may be built anew.
    let binary = std::env::var("BH_HV_CORE").unwrap_or_else(|_| env!("CARGO_BIN_EXE_hv-core").into());
    let mut command = Command::new(binary);
    command.arg("--run-dir").arg(run_dir).arg("--dom0").arg(program());
    command.args(["--dom0-arg", "agent", "--dom0-arg", "dom0", "--log", "stderr", "--memory-limit", "4096"]);
    command
}

/// hv-core makes it for dom0's control listener.
const DOM0_SOCKET: &str = "dom0.sock";

fn client(runtime: &tokio::runtime::Runtime, run_dir: &Path) -> HvCoreClient<Channel> {
    let _in_runtime = runtime.enter();
    let endpoint = Endpoint::from_static("http://hv-core").timeout(SOON);
    HvCoreClient::new(proto::unix::at_with(run_dir.join(DOM0_SOCKET), endpoint))
}

impl System {
    /// Starts one.
    pub fn start() -> System {
        let dir = tempfile::tempdir().expect("a directory");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let client = client(&runtime, dir.path());
        let hv_core = hv_core_command(dir.path()).spawn().expect("hv-core");
        // Ends hv-core, should what follows fail.
        let system = System { hv_core, dir, runtime, client };
        until("dom0's socket", || system.dir.path().join(DOM0_SOCKET).exists());
        system
    }

    /// To the next incarnation of dom0.
    pub fn reconnect(&mut self) {
        self.client = client(&self.runtime, self.dir.path());
    }

    /// A path in the run directory.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    /// A call of dom0's.
    pub fn call<T, F: Future<Output = Result<tonic::Response<T>, tonic::Status>>>(
        &mut self,
        call: impl FnOnce(HvCoreClient<Channel>) -> F,
    ) -> Result<T, tonic::Status> {
        let client = self.client.clone();
        self.runtime.block_on(call(client)).map(tonic::Response::into_inner)
    }

    /// A request for a domain of the agent with these roles.
    pub fn request(name: &str, roles: &[Role]) -> CreateDomainRequest {
        CreateDomainRequest {
            name: name.into(),
            roles: roles.iter().map(|r| (*r).into()).collect(),
            program: program().to_str().expect("UTF-8").into(),
            args: vec!["agent".into()],
            restart: Some(RestartPolicy { restart: true, ..Default::default() }),
            ..Default::default()
        }
    }

    /// Creates.
    pub fn create(&mut self, request: CreateDomainRequest) -> Dom {
        let made = self.call(|mut c| async move { c.create_domain(request).await }).expect("create");
        Dom { id: made.domid as u16, instance: made.instance, control: made.control_socket }
    }

    /// Creates a backend.
    pub fn backend(&mut self, name: &str) -> Dom {
        self.create(Self::request(name, &[Role::Backend]))
    }

    /// Creates a process guest.
    pub fn guest(&mut self, name: &str) -> Dom {
        self.create(Self::request(name, &[Role::ProcessGuest]))
    }

    /// What dom0 sees of a domain.
    pub fn get(&mut self, dom: &Dom) -> Option<Domain> {
        let reference = DomainRef { domid: dom.id.into(), instance: dom.instance };
        self.call(|mut c| async move { c.get_domain(reference).await }).ok()
    }

    /// Destroys.
    pub fn destroy(&mut self, dom: &Dom) {
        let reference = DomainRef { domid: dom.id.into(), instance: dom.instance };
        self.call(|mut c| async move { c.destroy_domain(reference).await }).expect("destroy");
    }

    /// Kills the process, and waits for the next incarnation.
    pub fn kill(&mut self, dom: &Dom) {
        let before = self.get(dom).expect("there").generation;
        let reference = DomainRef { domid: dom.id.into(), instance: dom.instance };
        let request = KillRequest { domain: Some(reference), signal: 0 };
        self.call(|mut c| async move { c.kill_process(request).await }).expect("kill");
        self.wait_generation(dom, before + 1);
    }

    /// Waits for an incarnation.
    pub fn wait_generation(&mut self, dom: &Dom, generation: u32) {
        let running = i32::from(DomainState::Running);
        until("the next incarnation", || {
            self.get(dom).is_some_and(|d| d.generation >= generation && d.state == running)
        });
    }

    /// Events so far.
    pub fn events(&mut self) -> Vec<Event> {
        let request = WatchEventsRequest { after_seq: 0 };
        let client = self.client.clone();
        self.runtime.block_on(async move {
            let mut client = client;
            let mut stream = client.watch_events(request).await.expect("events").into_inner();
            let mut events = Vec::new();
            while let Ok(Ok(Some(event))) =
                tokio::time::timeout(Duration::from_millis(100), stream.message()).await
            {
                events.push(event);
            }
            events
        })
    }

    /// True once such an event was seen.
    pub fn wait_event(&mut self, what: &str, fits: impl Fn(&Event) -> bool) {
        until(what, || self.events().iter().any(&fits));
    }

    /// Ends hv-core by SIGTERM.
    pub fn stop(&mut self) -> std::process::ExitStatus {
        let pid = nix::unistd::Pid::from_raw(self.hv_core.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("SIGTERM");
        self.hv_core.wait().expect("hv-core's end")
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if let Ok(None) = self.hv_core.try_wait() {
            self.stop();
        }
    }
}

/// A domain of the agent.
pub struct Dom {
    /// Its domid.
    pub id: u16,
    /// Serial number of its creation.
    pub instance: u64,
    control: String,
}

impl Dom {
    /// A connection to the agent.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.control).expect("the control socket");
        stream.set_read_timeout(Some(SOON)).expect("timeout");
        stream
    }

    /// The current incarnation's hypercall socket.
    pub fn socket(&self) -> OwnedFd {
        let stream = self.connect();
        send_fds(&stream, b"f", &[]);
        recv_fd(&stream, &mut [0; 8]).1.expect("the hypercall socket")
    }

    /// The current incarnation's hypercalls.
    pub fn hv(&self) -> Hypercall {
        Hypercall::new(self.socket())
    }

    /// An order with a descriptor; gives one byte back, or `None` if the process ended over it.
    pub fn order(&self, order: u8, fds: &[&OwnedFd]) -> Option<u8> {
        let mut stream = self.connect();
        send_fds(&stream, &[order], fds);
        let mut byte = [0];
        stream.read_exact(&mut byte).ok().map(|()| byte[0])
    }

    /// What the agent sees.
    pub fn look(&self) -> String {
        let mut stream = self.connect();
        stream.write_all(b"l").expect("order");
        let mut len = [0; 4];
        stream.read_exact(&mut len).expect("length");
        let mut text = vec![0; u32::from_le_bytes(len) as usize];
        stream.read_exact(&mut text).expect("text");
        String::from_utf8(text).expect("UTF-8")
    }
}

//! The daemon: joins, adopts what runs, serves.

use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use domain_kit::control::ServiceControl;
use domain_kit::{Domain, control};
use nix::errno::Errno;
use proto::hvcore::event::Kind;
use proto::service::Counter;
use proto::store::store_server::StoreServer;
use proto::toolstack::Event;
use proto::toolstack::toolstack_server::ToolstackServer;
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::api::{Api, StoreRelay};
use crate::config::HostFile;
use crate::hv_grpc::GrpcHv;
use crate::manager::{Manager, OpError, Timing};
use crate::state::{State, StateFile};
use crate::store::RingStore;

/// Between two passes of the reconciler when nothing happens.
const PASS: Duration = Duration::from_secs(2);
/// Between two passes while something is missing or under way.
const QUICK_PASS: Duration = Duration::from_millis(50);
/// Entry of the fd store that tells whether a dom0 of this life of hv-core ran before.
const MARK: &str = "dom0-host-run";

struct Control(Arc<Manager>);

impl ServiceControl for Control {
    fn statistics(&self) -> Vec<Counter> {
        let state = self.0.state();
        let counter = |name: &str, value: usize| Counter {
            name: name.into(),
            value: value as u64,
            ..Counter::default()
        };
        vec![
            counter("guests", state.guests.len()),
            counter("operations", state.sagas.len()),
            counter("failures", state.failures.len()),
        ]
    }

    fn drain(&self, deadline: Duration, _resume: bool) -> bool {
        let end = std::time::Instant::now() + deadline;
        loop {
            if self.0.state().sagas.is_empty() {
                return true;
            }
            if std::time::Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Runs dom0 with this host file until hv-core is gone.
///
/// # Errors
/// What keeps dom0 from running at all, with what to do.
pub fn run(host_file: &Path) -> anyhow::Result<()> {
    let me = Domain::join("dom0-supervisor")?;
    let source = host_file.display().to_string();
    let host = read_host(host_file)?;
    let fd5 = domain_kit::os::control_stream().context("descriptor 5, the stream to hv-core")?;
    let (file, mut state, damage) = StateFile::open(&host.state_dir)?;
    let first_run = first_of_hv_core(&me)?;
    if first_run {
        // What the record says of running domains is about an earlier hv-core.
        state = State { failures: state.failures, ..State::default() };
    }
    let sees_host = host.bin_dir.join("xenstored").exists();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(128)
        .enable_all()
        .build()?;
    let guard = runtime.enter();
    let hv = Arc::new(GrpcHv::new(fd5, Arc::clone(&me))?);
    let store = Arc::new(RingStore::new(Arc::clone(&me)));
    let manager = Arc::new(Manager::new(
        Arc::clone(&hv) as Arc<dyn crate::hv::Hv>,
        store,
        host,
        Box::new(file),
        state,
        Timing::default(),
        sees_host,
    ));
    if let Some(damage) = damage {
        manager.events.tell("warning", "dom0-supervisor", 0, damage.to_string());
    }
    if !sees_host {
        tracing::info!("the host's files are not visible here: hv-core and the services check them");
    }
    let health = control::serve(&me, Arc::new(Control(Arc::clone(&manager))))?;
    let wake = Arc::new(Notify::new());
    let reconciler = {
        let (manager, wake, me) = (Arc::clone(&manager), Arc::clone(&wake), Arc::clone(&me));
        let handle = runtime.handle().clone();
        std::thread::Builder::new()
            .name("reconcile".into())
            .spawn(move || reconcile_loop(&manager, &wake, &handle, &me, first_run))?
    };
    let listener = toolstack_listener(&me)?;
    let served = runtime.block_on(async {
        tokio::spawn(watch_events(hv, Arc::clone(&manager), wake));
        let incoming = UnixListenerStream::new(UnixListener::from_std(listener)?);
        health.set_serving(true);
        let store = StoreServer::new(StoreRelay::new(Arc::clone(&manager)));
        let api = ToolstackServer::new(Api::new(manager, source));
        let server = Server::builder().add_service(api).add_service(store).serve_with_incoming(incoming);
        let ended = tokio::task::spawn_blocking(move || reconciler.join());
        tokio::select! {
            served = server => served.map_err(anyhow::Error::from),
            _ = ended => Err(anyhow::anyhow!("hv-core is gone")),
        }
    });
    drop(guard);
    // Threads that still wait for a peer must not keep the process.
    runtime.shutdown_background();
    served
}

/// Reads the host file.
///
/// # Errors
/// One line that says what to do.
pub(crate) fn read_host(path: &Path) -> anyhow::Result<HostFile> {
    let source = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("host file {source}: write one (see docs/host-file.md) or give --config"))?;
    let mut host = HostFile::parse(&text, &source)?;
    if host.bin_dir.as_os_str().is_empty() {
        host.bin_dir = own_dir()?;
    }
    Ok(host)
}

fn own_dir() -> anyhow::Result<PathBuf> {
    let exe =
        std::env::current_exe().context("bin_dir: where is this program? give bin_dir in the host file")?;
    Ok(exe.parent().unwrap_or(Path::new("/")).to_owned())
}

fn toolstack_listener(me: &Domain) -> anyhow::Result<StdListener> {
    let (_, fd) = me.hv.resource_open("toolstack").context("the socket for bh (resource \"toolstack\")")?;
    let listener = StdListener::from(fd);
    domain_kit::os::set_nonblocking(&listener)?;
    Ok(listener)
}

/// True for the first dom0 of a life of hv-core: the fd store lives as long as hv-core does.
fn first_of_hv_core(me: &Domain) -> anyhow::Result<bool> {
    match me.hv.fd_get(MARK) {
        Ok(_) => Ok(false),
        // The mark is set once the state is wiped and services are made: see `reconcile_loop`.
        Err(e) if e.is(Errno::ENOENT) => Ok(true),
        Err(e) => Err(e).context("the fd store"),
    }
}

fn reconcile_loop(
    manager: &Arc<Manager>,
    wake: &Notify,
    runtime: &tokio::runtime::Handle,
    me: &Domain,
    mut starting: bool,
) {
    let _inside = runtime.enter();
    if starting {
        // Killed before the mark is set: the next one wipes again, and nothing but services was made.
        if let Err(e) = manager.save() {
            tracing::error!(error = %e, "the state could not be kept");
        }
    }
    let mut told_served = false;
    let mut pause = QUICK_PASS;
    loop {
        match manager.reconcile() {
            Ok(()) => {}
            Err(OpError::Killed) => return tracing::error!("the connection to hv-core is gone"),
            Err(e) => tracing::warn!(error = %e, "reconciling"),
        }
        let made = manager.services_made();
        if made && !told_served {
            told_served = true;
            if let Err(e) = me.hv.served() {
                tracing::warn!(error = %e, "telling hv-core that dom0 serves");
            }
        }
        if starting && made {
            let marked = domain_kit::mem::sealed_memfd(MARK, 4096)
                .map_err(|e| e.to_string())
                .and_then(|fd| me.hv.fd_put(MARK, hv_abi::fd_kind::MEMFD, 0, &fd).map_err(|e| e.to_string()));
            match marked {
                Ok(()) => {
                    starting = false;
                    manager.autostart();
                }
                Err(error) => tracing::error!(error, "marking this life of hv-core"),
            }
        }
        // Something that stays missing is looked for less and less often.
        pause = if made && manager.quiet() { PASS } else { (pause * 2).min(PASS) };
        // Either way the next pass looks at everything.
        if runtime.block_on(async { tokio::time::timeout(pause, wake.notified()).await }).is_ok() {
            pause = QUICK_PASS;
        }
    }
}

/// Takes up hv-core's events: they wake the reconciler, are told on, and say how domains ended.
async fn watch_events(hv: Arc<GrpcHv>, manager: Arc<Manager>, wake: Arc<Notify>) {
    let mut after = 0;
    loop {
        match hv.watch(after).await {
            Ok(mut stream) => {
                while let Ok(Some(event)) = stream.message().await {
                    after = event.seq;
                    if matches!(event.kind(), Kind::ProcessDied | Kind::Failed | Kind::Shutdown)
                        && !event.detail.is_empty()
                    {
                        manager.note_end(event.domid as u16, event.instance, &event.detail);
                    }
                    let routine = matches!(event.kind(), Kind::Served);
                    if routine {
                        manager.note_served(event.domid as u16, event.instance);
                    }
                    manager.events.add(translate(event));
                    if !routine {
                        wake.notify_one();
                    }
                }
            }
            Err(e) => tracing::warn!(error = %e, "hv-core's events"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn translate(event: proto::hvcore::Event) -> Event {
    let kind = match event.kind() {
        Kind::Unspecified => "unknown",
        Kind::Created => "created",
        Kind::Started => "started",
        Kind::ProcessDied => "process died",
        Kind::Restarted => "restarted",
        Kind::Failed => "failed",
        Kind::Shutdown => "shutdown",
        Kind::Destroyed => "destroyed",
        Kind::Violation => "violation",
        Kind::Served => "served",
    };
    Event {
        unix_ms: event.unix_ms,
        kind: kind.into(),
        domid: event.domid,
        generation: event.generation,
        name: event.name,
        detail: crate::manager::one_line(&event.detail),
        lost: event.lost,
        ..Event::default()
    }
}

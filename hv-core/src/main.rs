//! hv-core, the thin hypervisor: the domain table, event channels, grants, the fd store, sandboxes, life-cycle and restart.
//!
//! It knows nothing of KVM, disks, packets, xenstore paths, kernel images or policy. dom0 tells it by gRPC over an inherited
//! stream what domains there are ([`control`]); every domain's process talks to it by its own hypercall socket ([`server`]);
//! one thread owns every transition in a domain's life ([`lifecycle`]); one single-threaded process starts and reaps all
//! others ([`spawner`]).

mod control;
mod domain;
mod events;
mod fdstore;
mod grants;
mod host;
mod lifecycle;
mod log;
mod netdev;
mod ports;
mod program;
mod resources;
mod server;
mod spawner;
mod spec;
mod sys;
mod table;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal};
use proto::hvcore::RestartPolicy;
use spawner::proto::{BindSpec, SeccompProfile};
use tracing_subscriber::EnvFilter;

/// First host uid of domains.
const UID_BASE: u32 = 1_100_000_000;
/// Size of the uid range.
const UID_RANGE: u32 = 100_000_000;
/// Memory that stays with the host if no limit is given, bytes.
const HOST_RESERVE: u64 = 512 << 20;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogTo {
    /// RUN/log/NAME.log, at most 2 MiB a domain.
    Files,
    /// hv-core's own stderr.
    Stderr,
}

/// The thin hypervisor. Starts dom0, which then says what other domains there are.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Sockets and logs; made if absent. Best on a tmpfs.
    #[arg(long, default_value = "/run/bulkhead")]
    run_dir: PathBuf,
    /// dom0's program, statically linked.
    #[arg(long)]
    dom0: PathBuf,
    /// An argument for dom0's program; may be given many times.
    #[arg(long = "dom0-arg", value_name = "ARG", allow_hyphen_values = true)]
    dom0_args: Vec<String>,
    /// A path of the host that dom0 sees, as SRC:DST or SRC:DST:ro; may be given many times.
    #[arg(long = "dom0-bind", value_name = "SRC:DST[:ro]", value_parser = parse_bind)]
    dom0_binds: Vec<BindSpec>,
    /// Most RAM of all guests together, MiB. Default: the host's memory less 512 MiB.
    #[arg(long, value_name = "MIB")]
    memory_limit: Option<u64>,
    /// Where domains' output goes.
    #[arg(long, value_enum, default_value = "files")]
    log: LogTo,
}

fn parse_bind(text: &str) -> Result<BindSpec, String> {
    let mut parts = text.split(':');
    let (source, target) = match (parts.next(), parts.next()) {
        (Some(source), Some(target)) if source.starts_with('/') => (source, target),
        _ => return Err("must be SRC:DST or SRC:DST:ro with absolute paths".into()),
    };
    let read_only = match (parts.next(), parts.next()) {
        (None, _) => false,
        (Some("ro"), None) => true,
        _ => return Err("after DST only :ro may follow".into()),
    };
    if !spawner::sandbox::is_plain_absolute(target) {
        return Err(format!("{target:?} is not a plain absolute path"));
    }
    Ok(BindSpec { source: source.into(), target: target.into(), read_only, executable: false })
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("hv-core: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn dom0_spec(args: &Args, run_dir: &Path) -> Result<spec::Spec, String> {
    let text = |p: &Path| p.to_str().map(str::to_owned).ok_or(format!("{} is not UTF-8", p.display()));
    let ctl = text(&run_dir.join("ctl"))?;
    let mut binds = vec![BindSpec { source: ctl.clone(), target: ctl, read_only: true, executable: false }];
    binds.extend(args.dom0_binds.iter().cloned());
    let env = ["RUST_LOG", "RUST_BACKTRACE"];
    let env = env.iter().filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?))).collect();
    let request = proto::hvcore::CreateDomainRequest {
        name: "dom0".into(),
        uuid: uuid::Uuid::nil().to_string(),
        program: text(&std::path::absolute(&args.dom0).map_err(|e| e.to_string())?)?,
        args: args.dom0_args.clone(),
        env,
        restart: Some(RestartPolicy {
            restart: true,
            backoff_ms: 5,
            backoff_max_ms: 1000,
            ..Default::default()
        }),
        resources: vec![proto::hvcore::Resource {
            name: "toolstack".into(),
            kind: proto::hvcore::resource::Kind::Listener.into(),
            path: text(&run_dir.join("dom0.sock"))?,
            mode: 0o600,
        }],
        binds: binds
            .into_iter()
            .map(|b| proto::hvcore::Bind {
                source: b.source,
                target: b.target,
                read_only: b.read_only,
                executable: false,
            })
            .collect(),
        // A second hv-core starts a dom0 of its own: two would fight over one state.
        die_with_hypervisor: true,
        limits: Some(proto::hvcore::Limits { pids: 128, ..Default::default() }),
        ..Default::default()
    };
    let mut spec = spec::Spec::parse(&request)?;
    spec.roles = hv_abi::ROLE_DOM0;
    spec.seccomp = SeccompProfile::Toolstack;
    Ok(spec)
}

/// hv-core holds the descriptors of all domains (ports, regions, maps, fd stores): as many as the kernel lets a process have.
fn raise_file_limit() -> anyhow::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|t| t.trim().parse().ok());
    let most: u64 = most.unwrap_or(hard).max(hard);
    if setrlimit(Resource::RLIMIT_NOFILE, most, most).is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}

/// Makes the run directory; the lock says that it is ours until we end.
fn prepare_run_dir(dir: &Path) -> anyhow::Result<Flock<OwnedFd>> {
    for sub in ["", "ctl", "log"] {
        let dir = dir.join(sub);
        std::fs::create_dir_all(&dir).with_context(|| format!("run directory {}", dir.display()))?;
    }
    let lock = std::fs::File::create(dir.join("lock")).context("run directory")?;
    let lock = Flock::lock(OwnedFd::from(lock), FlockArg::LockExclusiveNonblock);
    let lock = lock.map_err(|_| anyhow::anyhow!("another hv-core runs in {}", dir.display()))?;
    for entry in std::fs::read_dir(dir.join("ctl"))? {
        std::fs::remove_file(entry?.path()).context("a socket of an earlier hv-core")?;
    }
    Ok(lock)
}

fn run(args: Args) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("must run as root: it makes namespaces, cgroups and users for domains");
    }
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    if !args.dom0.is_file() {
        bail!("--dom0 {}: no such program", args.dom0.display());
    }
    raise_file_limit()?;
    let run_dir = std::path::absolute(&args.run_dir)?;
    let _lock = prepare_run_dir(&run_dir)?;
    let dom0 = dom0_spec(&args, &run_dir).map_err(anyhow::Error::msg)?;

    // Before any thread, so that every thread inherits it: signals come to the one that waits for them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let spawner = spawner::start().context("starting the spawner")?;

    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_target(false)
        .init();

    let (cmd, commands) = mpsc::channel();
    let (releaser, pending) = grants::release::Releaser::new();
    let (cgroups, cgroup_missing) = match host::Cgroups::prepare() {
        Ok(cgroups) => (Some(cgroups), None),
        Err(e) => (None, Some(format!("cgroup v2 limits: {e}; only rlimits bound domains"))),
    };
    let mut missing: Vec<String> = cgroup_missing.into_iter().chain(host::landlock_missing()).collect();
    let limit = args.memory_limit.map(|m| m << 20);
    let limit = limit.unwrap_or_else(|| host::memory_total().saturating_sub(HOST_RESERVE));
    let hv = Arc::new(table::Hv::new(releaser, cmd.clone(), Vec::new(), limit));
    if !hv.bufs.available() {
        missing.push("udmabuf: no /dev/udmabuf; pages of PVH domains can be copied, not mapped".into());
    }
    if !hv.bufs.listed() {
        missing.push(
            "dma_buf/bufinfo in debugfs: the end of a map is judged by the holder's descriptors and mappings"
                .into(),
        );
    }
    for what in &missing {
        tracing::warn!("this host lacks {what}");
    }
    *hv.missing.lock().unwrap_or_else(|e| e.into_inner()) = missing;

    let (cmd_reaped, cmd_gone, cmd_stop) = (cmd.clone(), cmd.clone(), cmd);
    let spawner = spawner::SpawnerHandle::new(
        spawner,
        move |pid, status, ns| {
            let _ends_with_hv_core = cmd_reaped.send(lifecycle::Cmd::Reaped { pid, status, ns });
        },
        move || {
            let _ends_with_hv_core = cmd_gone.send(lifecycle::Cmd::SpawnerGone);
        },
    )?;
    let weak = Arc::downgrade(&hv);
    std::thread::Builder::new()
        .name("releaser".into())
        .spawn(move || grants::release::run(&weak, &pending))?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.wait().is_ok() {
            let _ends_with_hv_core = cmd_stop.send(lifecycle::Cmd::Stop);
        }
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let runtime_handle = runtime.handle().clone();
    let (streams, new_streams) = tokio::sync::mpsc::unbounded_channel();
    let hv_of_control = hv.clone();
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || runtime.block_on(control::serve(hv_of_control, new_streams)))?;
    let logs = match args.log {
        LogTo::Stderr => log::Logs::Stderr,
        LogTo::Files => log::Logs::files(run_dir.join("log"))?,
    };
    let first_uid = host::first_free_uid(UID_BASE, UID_RANGE);
    let config = lifecycle::Config { run_dir, dom0, uid_base: UID_BASE, first_uid };
    tracing::info!(run_dir = %config.run_dir.display(), "hv-core {} starts dom0", env!("CARGO_PKG_VERSION"));
    lifecycle::Lifecycle::new(hv, config, commands, spawner, cgroups, logs, streams, runtime_handle)
        .run()
        .map_err(anyhow::Error::msg)?;
    tracing::info!("all domains have ended");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binds_are_parsed() {
        let bind = parse_bind("/a:/b:ro").unwrap();
        assert_eq!((bind.source.as_str(), bind.target.as_str(), bind.read_only), ("/a", "/b", true));
        assert!(!parse_bind("/a:/b").unwrap().read_only);
        for bad in ["/a", "a:/b", "/a:b", "/a:/b:rw", "/a:/b:ro:x", "/a:/../b"] {
            assert!(parse_bind(bad).is_err(), "{bad}");
        }
    }
}

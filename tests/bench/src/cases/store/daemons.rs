//! The contestants: our xenstored alone, Debian's C xenstored and oxenstored without a Xen, and a bare echo.
//!
//! Xen's daemons want more than a socket: /run/xenstored, a log directory, an event channel device, a grant device, libxenctrl's
//! handle, domain 0's ring page and port in /proc/xen. The files are given to them in a mount namespace of their own ([`launch`]),
//! the devices by `tests/noxen`, a library loaded before theirs.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use domain_kit::xs::Op;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit};

use super::super::Settings;
use super::conn::Conn;

/// Debian's programs, unpacked by xtask.
#[derive(Clone, Debug)]
pub struct Peers {
    /// The tree of the unpacked packages.
    pub root: PathBuf,
    /// `tests/noxen` as a shared library.
    pub preload: PathBuf,
}

/// A contestant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Who {
    /// Ours, standalone, journal on.
    Ours,
    /// Debian's C xenstored.
    C,
    /// Debian's oxenstored.
    Ocaml,
    /// Fixed replies over a Unix socket: what the kernel alone takes.
    Echo,
}

impl Who {
    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Who::Ours => "xenstored",
            Who::C => "C",
            Who::Ocaml => "oxenstored",
            Who::Echo => "echo",
        }
    }
}

/// How long a daemon may take until it serves.
const UP: Duration = Duration::from_secs(30);

/// A running contestant; ended when dropped.
#[derive(Debug)]
pub struct Daemon {
    /// Which.
    pub who: Who,
    /// Where it listens.
    pub socket: PathBuf,
    dir: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    /// Starts one in a directory of its own and waits until it answers.
    ///
    /// # Errors
    /// It does not start, with what it said.
    pub fn start(who: Who, settings: &Settings) -> Result<Daemon> {
        // In memory, as the journal of the service domain is: what is compared is not a disk.
        let base = Path::new("/dev/shm");
        let mut builder = tempfile::Builder::new();
        builder.prefix("bh-bench-store-");
        let dir = if base.is_dir() { builder.tempdir_in(base)? } else { builder.tempdir()? };
        let socket = dir.path().join("socket");
        let child = spawn(who, settings, dir.path(), &socket)?;
        let mut daemon = Daemon { who, socket, dir, child };
        daemon.wait()?;
        Ok(daemon)
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn wait(&mut self) -> Result<()> {
        let deadline = Instant::now() + UP;
        loop {
            if Conn::connect(&self.socket).is_ok_and(|mut c| c.call(Op::Read, 0, &[b"/\0"]).is_ok()) {
                return Ok(());
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let mut said = String::new();
                File::open(self.dir.path().join("log")).and_then(|mut f| f.read_to_string(&mut said)).ok();
                bail!("{} does not serve ({ended:?}): {}", self.who.name(), said.trim());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// SIGKILL and the next process; gives the time from the kill until a new connection is answered.
    ///
    /// # Errors
    /// It does not come back.
    pub fn kill_and_restart(&mut self, settings: &Settings) -> Result<Duration> {
        let start = Instant::now();
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(self.who, settings, self.dir.path(), &self.socket)?;
        self.wait()?;
        Ok(start.elapsed())
    }

    /// Time that its threads have run.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu(&self) -> Result<Duration> {
        let mut ns = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
            ns += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).context("schedstat")?;
        }
        Ok(Duration::from_nanos(ns))
    }

    /// Resident memory, mapped files and shared memory included, bytes.
    ///
    /// # Errors
    /// It is gone.
    pub fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    }

    /// The program to take over at a live update: the same again.
    pub fn program(&self, settings: &Settings) -> Result<PathBuf> {
        program(self.who, settings)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn program(who: Who, settings: &Settings) -> Result<PathBuf> {
    let theirs = |name: &str| {
        let peers = settings.peers.as_ref().context("Debian's daemons are not here")?;
        Ok(peers.root.join("usr/lib/xen-4.17/bin").join(name))
    };
    match who {
        Who::Ours => Ok(settings.bin_dir.join("xenstored")),
        Who::C => theirs("xenstored"),
        Who::Ocaml => theirs("oxenstored"),
        Who::Echo => bail!("the echo is no program"),
    }
}

fn spawn(who: Who, settings: &Settings, dir: &Path, socket: &Path) -> Result<Child> {
    let log = File::create(dir.join("log"))?;
    let mut command = match who {
        Who::Ours => {
            let mut command = Command::new(program(who, settings)?);
            command.args(["--standalone", "--journal-mib", "1024"]);
            command.arg("--socket").arg(socket).arg("--state").arg(dir.join("state"));
            command.stdin(Stdio::null()).stdout(log.try_clone()?);
            command
        }
        Who::C | Who::Ocaml => {
            let peers = settings.peers.as_ref().context("Debian's daemons are not here")?;
            let mut command = Command::new("/proc/self/exe");
            command.arg("launch").arg(if who == Who::C { "c" } else { "ocaml" });
            command.arg("--root").arg(&peers.root).arg("--preload").arg(&peers.preload);
            command.arg("--dir").arg(dir).stdin(Stdio::null()).stdout(log.try_clone()?);
            command
        }
        Who::Echo => {
            let _ = std::fs::remove_file(socket);
            let listener = UnixListener::bind(socket)?;
            let mut command = Command::new("/proc/self/exe");
            command.args(["peer", "store-echo"]).stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
            command.stdout(Stdio::null());
            command
        }
    };
    command.env("RUST_LOG", "warn").stderr(log);
    command.spawn().with_context(|| format!("starting {}", who.name()))
}

/// Becomes one of Debian's daemons, in a mount namespace with what it wants to find.
///
/// # Errors
/// Those of the mounts and of exec.
pub fn launch(who: Who, root: &Path, preload: &Path, dir: &Path) -> Result<()> {
    let none = None::<&str>;
    let tmpfs = |at: &str, below: &[&str]| -> Result<()> {
        mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), none)
            .with_context(|| format!("tmpfs on {at}"))?;
        below.iter().try_for_each(|sub| std::fs::create_dir_all(Path::new(at).join(sub)))?;
        Ok(())
    };
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace: root is needed")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // oxenstored raises its limit to this, which without CAP_SYS_RESOURCE must not be above the hard limit.
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE)?;
    std::fs::write(dir.join("nr_open"), files.to_string())?;
    mount(Some(&dir.join("nr_open")), "/proc/sys/fs/nr_open", none, MsFlags::MS_BIND, none)
        .context("nr_open")?;
    tmpfs("/run", &["xenstored", "xen"])?;
    mount(Some(dir), "/run/xenstored", none, MsFlags::MS_BIND, none).context("/run/xenstored")?;
    tmpfs("/var/log", &["xen"])?;
    let page = [0; 4096];
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(root.join("usr/lib/xen-4.17/bin").join(match who {
        Who::C => "xenstored",
        Who::Ocaml => "oxenstored",
        Who::Ours | Who::Echo => bail!("{} needs no launch", who.name()),
    }));
    match who {
        Who::C => {
            // Domain 0's port and ring page have fixed names, in a directory that /proc does not have.
            tmpfs("/proc", &["xen"])?;
            std::fs::write("/proc/xen/xsd_port", "1")?;
            std::fs::write("/proc/xen/xsd_kva", page)?;
            // Quotas beyond what the bench needs; those for domains are left alone, there are none.
            command.args(["--no-fork", "--watch-nb", "1000000", "--entry-nb", "10000000"]);
            command.args(["--transaction", "100000", "--entry-size", "65536"]);
        }
        _ => {
            std::fs::write(dir.join("xsd_port"), "1")?;
            std::fs::write(dir.join("xsd_kva"), page)?;
            let config = std::fs::read_to_string(root.join("etc/xen/oxenstored.conf"))?;
            let config =
                config.lines().filter(|l| !l.starts_with("quota-max") && !l.starts_with("quota-trans"));
            let config: String = config.flat_map(|l| [l, "\n"]).collect();
            let config = config.replace("/proc/xen", &dir.display().to_string());
            let quotas = "quota-maxentity = 10000000\nquota-maxsize = 65536\nquota-maxwatch = 1000000\n\
                          quota-transaction = 100000\nquota-maxrequests = 100000\nquota-maxoutstanding = 1000000\n\
                          quota-maxwatchevents = 1000000\n";
            std::fs::write(dir.join("conf"), config + quotas)?;
            command.arg("--no-fork").arg("--config-file").arg(dir.join("conf"));
        }
    }
    command.env("LD_LIBRARY_PATH", libraries).env("LD_PRELOAD", preload);
    Err(command.exec()).context("exec")
}

//! hv-core with everything under it, in a directory of its own, driven through `bh` as a user would.

use std::collections::BTreeMap;
use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::outside::{self, Outside};
use crate::progress::Progress;

/// Name of the NIC's backend in the host file.
pub const NETBACK: &str = "netback-up0";

/// What a system is started with.
const PROGRAMS: &[&str] =
    &["hv-core", "dom0-supervisor", "bh", "xenstored", "console-backend", "blkback", "netback"];

/// What a system under test is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// Folder of the built programs.
    pub bin_dir: PathBuf,
    /// `bridged` or `routed`.
    pub net_mode: &'static str,
    /// Keep the directory (logs) at the end.
    pub keep: bool,
    /// More text for the host file.
    pub host_file_more: String,
    /// There is [`outside::SECOND_UPLINK`], too.
    pub two_uplinks: bool,
    /// Networks of the outside's with an uplink each, besides: see [`Outside::add_network`].
    pub networks: u8,
}

impl Config {
    /// The programs of this build: those beside the running one, or in the folder that `BH_BIN_DIR` names.
    ///
    /// # Errors
    /// If the running program's folder is unknown.
    pub fn of_this_build() -> Result<Config> {
        let exe = std::env::current_exe().context("where is this program")?;
        let dir = exe.parent().context("the program is in no folder")?;
        // Test programs lie in deps/ below the others.
        let dir = if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir };
        Ok(Config {
            bin_dir: dir.into(),
            net_mode: "bridged",
            keep: std::env::var_os("BH_KEEP").is_some(),
            host_file_more: String::new(),
            two_uplinks: false,
            networks: 0,
        })
    }
}

/// A service or runner as `bh services --json` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRow {
    /// Its name.
    pub name: String,
    /// Which life of its process.
    pub generation: u64,
    /// Host process id, 0 if it has none now.
    pub pid: i32,
    /// `running`, `restarting`, …
    pub state: String,
}

/// What the bridge of a QEMU guest is called among what can be killed.
pub fn bridge_name(guest: &str) -> String {
    format!("qemu-bridge ({guest})")
}

/// A running system.
#[derive(Debug)]
pub struct System {
    /// The outside world it is connected to.
    pub outside: Outside,
    config: Config,
    dir: Option<tempfile::TempDir>,
    hv_core: Child,
}

impl System {
    /// Starts hv-core and waits until every service of the host file runs.
    ///
    /// # Errors
    /// In words, with the last lines of the log.
    pub fn start(mut config: Config) -> Result<System> {
        for program in
            ["hv-core", "dom0-supervisor", "bh", "xenstored", "console-backend", "blkback", "netback"]
        {
            let path = config.bin_dir.join(program);
            ensure!(path.exists(), "{} is not built", path.display());
        }
        let outside = Outside::new()?;
        if config.two_uplinks {
            outside.add_uplink()?;
        }
        for n in 1..=config.networks {
            outside.add_network(n)?;
        }
        let dir =
            tempfile::Builder::new().prefix("bulkhead-").tempdir().context("a directory for the system")?;
        let root = dir.path();
        for sub in ["etc", "state", "run"] {
            fs::create_dir(root.join(sub))?;
        }
        if std::env::var_os("BH_LAB").is_some() {
            // The lab's view of the working tree is far slower than a disk, and a restart reads the program anew.
            let bin = root.join("bin");
            fs::create_dir(&bin)?;
            for program in PROGRAMS.iter().chain(&["hv-vcpu", "process-guest"]) {
                fs::copy(config.bin_dir.join(program), bin.join(program))
                    .with_context(|| format!("copying {program}"))?;
            }
            config.bin_dir = bin;
        }
        fs::write(root.join("etc/host.toml"), host_file(&config, root))?;
        let log = fs::File::create(root.join("log"))?;
        let mut command = Command::new(config.bin_dir.join("hv-core"));
        command
            .arg("--run-dir")
            .arg(root.join("run"))
            .arg("--dom0")
            .arg(config.bin_dir.join("dom0-supervisor"))
            .arg("--dom0-bind")
            .arg(format!("{}:/etc/bulkhead:ro", root.join("etc").display()))
            .arg("--dom0-bind")
            .arg(format!("{}:/var/lib/bulkhead", root.join("state").display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let hv_core = outside.run(move || command.spawn())?.context("starting hv-core")?;
        let mut system = System { outside, config, dir: Some(dir), hv_core };
        system.wait_services(Duration::from_secs(60)).map_err(|e| {
            let log = system.log_tail(30);
            anyhow!("{e:#}\n{log}")
        })?;
        Ok(system)
    }

    /// The directory everything is in.
    pub fn dir(&self) -> &Path {
        self.dir.as_ref().map_or(Path::new("/nonexistent"), |d| d.path())
    }

    /// The folder of the programs it was started from.
    pub fn bin_dir(&self) -> &Path {
        &self.config.bin_dir
    }

    /// Path of dom0's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir().join("run/dom0.sock")
    }

    /// A `bh` command with these arguments.
    pub fn bh_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.config.bin_dir.join("bh"));
        command.arg("--socket").arg(self.socket()).args(args).stdin(Stdio::null());
        command
    }

    /// Runs `bh`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn bh(&self, args: &[&str]) -> Result<Output> {
        self.bh_command(args).output().context("running bh")
    }

    /// Runs `bh`, which must succeed, and gives what it prints.
    ///
    /// # Errors
    /// With what it said.
    pub fn bh_ok(&self, args: &[&str]) -> Result<String> {
        let out = self.bh(args)?;
        ensure!(
            out.status.success(),
            "bh {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&out.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&out.stdout).into())
    }

    /// Runs `bh … --json` and parses it.
    ///
    /// # Errors
    /// As [`System::bh_ok`], or if it is not JSON.
    pub fn bh_json(&self, args: &[&str]) -> Result<Value> {
        let mut all = args.to_vec();
        all.push("--json");
        serde_json::from_str(&self.bh_ok(&all)?)
            .with_context(|| format!("bh {} does not print JSON", all.join(" ")))
    }

    /// The services now, by name.
    ///
    /// # Errors
    /// If dom0 does not answer.
    pub fn services(&self) -> Result<BTreeMap<String, ServiceRow>> {
        let json = self.bh_json(&["services", "--brief"])?;
        let rows = json["services"].as_array().or(json.as_array()).context("bh services --json: no list")?;
        let mut services = BTreeMap::new();
        for row in rows {
            let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
            let service = ServiceRow {
                name: text("name"),
                generation: row["generation"].as_u64().unwrap_or(0),
                pid: row["host_pid"].as_i64().and_then(|p| i32::try_from(p).ok()).unwrap_or(0),
                state: text("state"),
            };
            services.insert(service.name.clone(), service);
        }
        Ok(services)
    }

    /// The services, and the bridges of QEMU guests, as `qemu-bridge (GUEST)`.
    ///
    /// # Errors
    /// dom0 does not answer.
    pub fn killable(&self) -> Result<BTreeMap<String, ServiceRow>> {
        let mut all = self.services()?;
        let json = self.bh_json(&["list"])?;
        let guests = json["guests"].as_array().or(json.as_array()).context("bh list --json: no list")?;
        for guest in guests.iter().filter(|g| g["type"].as_str().is_some_and(|t| t.starts_with("qemu"))) {
            let row = ServiceRow {
                name: bridge_name(guest["name"].as_str().unwrap_or_default()),
                generation: guest["generation"].as_u64().unwrap_or(0),
                pid: guest["host_pid"].as_i64().and_then(|p| i32::try_from(p).ok()).unwrap_or(0),
                state: guest["state"].as_str().unwrap_or_default().to_owned(),
            };
            all.insert(row.name.clone(), row);
        }
        Ok(all)
    }

    /// Waits until dom0 answers and all services run.
    ///
    /// # Errors
    /// Which did not come up, after `timeout`.
    pub fn wait_services(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.hv_core.try_wait()? {
                bail!("hv-core ended: {status}");
            }
            let why = match self.services() {
                Ok(services) if services.len() >= 4 && services.values().all(|s| s.state == "running") => {
                    return Ok(());
                }
                Ok(services) => services
                    .values()
                    .map(|s| format!("{} is {}", s.name, s.state))
                    .collect::<Vec<_>>()
                    .join(", "),
                Err(e) => format!("{e:#}"),
            };
            ensure!(Instant::now() < deadline, "not up after {} s: {why}", timeout.as_secs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Creates a guest from a domain file's text.
    ///
    /// # Errors
    /// What `bh create` says.
    pub fn create(&self, domain_file: &str) -> Result<()> {
        let path = self.dir().join("guest.toml");
        fs::write(&path, domain_file)?;
        self.bh_ok(&["create", &path.display().to_string()]).map(drop)
    }

    /// Follows a guest's console through `bh console`, started again whenever it ends, until the returned value is dropped.
    pub fn console(&self, guest: &str) -> (Progress, Console) {
        let progress = Progress::default();
        let console = Console(Arc::default());
        let (writer, state) = (progress.clone(), console.0.clone());
        let errors = self.dir().join("console.err");
        let mut command = self.bh_command(&["console", guest]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        std::thread::spawn(move || {
            loop {
                let stderr = fs::File::options().create(true).append(true).open(&errors);
                let child = command.stderr(stderr.map_or_else(|_| Stdio::null(), Stdio::from)).spawn();
                let Ok(mut child) = child else { break };
                let out = child.stdout.take();
                {
                    let mut state = state.lock().unwrap_or_else(|e| e.into_inner());
                    state.child = Some(child);
                    if state.over {
                        break;
                    }
                }
                if let Some(out) = out {
                    writer.read(BufReader::new(out));
                }
                std::thread::sleep(Duration::from_millis(100));
                if state.lock().unwrap_or_else(|e| e.into_inner()).reap() {
                    break;
                }
            }
            state.lock().unwrap_or_else(|e| e.into_inner()).reap();
        });
        (progress, console)
    }

    /// Kills these services with SIGKILL in one moment; gives what they were.
    ///
    /// # Errors
    /// If one is unknown or has no process.
    pub fn kill(&self, names: &[String]) -> Result<Vec<ServiceRow>> {
        let services = self.killable()?;
        let victims: Vec<ServiceRow> = names
            .iter()
            .map(|name| services.get(name).cloned().with_context(|| format!("no service {name}")))
            .collect::<Result<_>>()?;
        for victim in &victims {
            ensure!(victim.pid > 1, "{} has no process ({})", victim.name, victim.state);
        }
        for victim in &victims {
            kill(Pid::from_raw(victim.pid), Signal::SIGKILL)
                .with_context(|| format!("killing {}", victim.name))?;
        }
        Ok(victims)
    }

    /// Waits until each of these runs as a later incarnation.
    ///
    /// # Errors
    /// Which did not, after `timeout`.
    pub fn wait_restarted(&self, victims: &[ServiceRow], timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let services = self.killable();
            let back = |v: &ServiceRow| {
                services
                    .as_ref()
                    .ok()
                    .and_then(|s| s.get(&v.name))
                    .is_some_and(|s| s.generation > v.generation && s.state == "running")
            };
            match victims.iter().find(|v| !back(v)) {
                None => return Ok(()),
                Some(v) if Instant::now() >= deadline => {
                    bail!(
                        "{} did not come back within {} s\n{}",
                        v.name,
                        timeout.as_secs(),
                        self.log_tail(30)
                    )
                }
                Some(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// hv-core's process id.
    pub fn hv_core_pid(&self) -> u32 {
        self.hv_core.id()
    }

    /// The last lines of the system's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let mut all = fs::read_to_string(self.dir().join("log")).unwrap_or_default();
        all.push_str(&fs::read_to_string(self.dir().join("console.err")).unwrap_or_default());
        // Services log to files of their own below the run directory.
        for entry in fs::read_dir(self.dir().join("run/log")).into_iter().flatten().flatten() {
            let text =
                fs::read(entry.path()).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(lines).collect();
            all.push_str(&format!("--- {}\n", entry.file_name().display()));
            for line in tail.into_iter().rev() {
                all.push_str(line);
                all.push('\n');
            }
        }
        all
    }
}

impl Drop for System {
    fn drop(&mut self) {
        // An orderly end first, so that no domain is left; then the hard way.
        let pid = Pid::from_raw(self.hv_core.id().cast_signed());
        let running = |child: &mut Child| matches!(child.try_wait(), Ok(None));
        for (signal, wait) in [(Signal::SIGTERM, 10), (Signal::SIGKILL, 5)] {
            if !running(&mut self.hv_core) {
                break;
            }
            if kill(pid, signal).is_err() {
                // It ended between the two calls.
                break;
            }
            let deadline = Instant::now() + Duration::from_secs(wait);
            while running(&mut self.hv_core) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        if self.config.keep
            && let Some(dir) = self.dir.take()
        {
            eprintln!("kept: {}", dir.keep().display());
        }
    }
}

/// A followed console; let go when dropped.
#[derive(Debug)]
pub struct Console(Arc<Mutex<ConsoleState>>);

#[derive(Debug, Default)]
struct ConsoleState {
    child: Option<Child>,
    over: bool,
}

impl ConsoleState {
    /// Ends `bh` if it still runs; true if the console was let go.
    fn reap(&mut self) -> bool {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself: then both calls say so.
            drop(child.kill());
            drop(child.wait());
        }
        self.over
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let mut state = self.0.lock().unwrap_or_else(|e| e.into_inner());
        state.over = true;
        state.reap();
    }
}

fn host_file(config: &Config, root: &Path) -> String {
    format!(
        r#"bin_dir = "{bin}"
state_dir = "/var/lib/bulkhead"

# A run kills far more often than an operator's policy would stand.
[restart]
backoff_ms = 0
backoff_max_ms = 100
burst = 0

[xenstored]
socket = "{root}/run/xenstored.sock"

[[netback]]
name = "{NETBACK}"
uplink = "{uplink}"
mode = "{mode}"
{more}
"#,
        bin = config.bin_dir.display(),
        root = root.display(),
        uplink = outside::UPLINK,
        mode = config.net_mode,
        more = config.host_file_more,
    )
}

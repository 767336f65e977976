//! hv-core with xenstored and some relay domains under it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// xenstored's domid.
pub const XENSTORED: u16 = 1;
/// domid of the first relay domain.
pub const FIRST_GUEST: u16 = 10;
/// How long anything may take to come up.
const UP: Duration = Duration::from_secs(30);

/// The running system.
#[derive(Debug)]
pub struct World {
    hv_core: Child,
    dir: tempfile::TempDir,
}

impl World {
    /// Starts it from the programs in `bin_dir`, with so many relay domains.
    ///
    /// # Errors
    /// A program that is not built.
    pub fn start(bin_dir: &Path, guests: u16) -> Result<World> {
        let program = |name: &str| -> Result<PathBuf> {
            let path = bin_dir.join(name);
            ensure!(path.exists(), "{} is not built (cargo build --workspace)", path.display());
            Ok(path)
        };
        let dir = tempfile::Builder::new().prefix("bh-store-").tempdir()?;
        let log = std::fs::File::create(dir.path().join("log"))?;
        let mut command = Command::new(program("hv-core")?);
        command.arg("--run-dir").arg(dir.path().join("run")).arg("--dom0").arg(program("store-soak-dom0")?);
        let socket = dir.path().join("socket");
        for arg in [program("xenstored")?, program("store-soak-relay")?, socket, guests.to_string().into()] {
            command.arg(format!("--dom0-arg={}", arg.display()));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let hv_core = command.spawn().context("starting hv-core")?;
        Ok(World { hv_core, dir })
    }

    fn connect(&self, path: &Path) -> Result<UnixStream> {
        let deadline = Instant::now() + UP;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(stream),
                Err(e) if Instant::now() > deadline => {
                    bail!("{}: {e}\n{}", path.display(), self.log_tail());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// A connection to xenstored's socket.
    ///
    /// # Errors
    /// None can be had.
    pub fn socket(&self) -> Result<UnixStream> {
        self.connect(&self.socket_path())
    }

    /// Where xenstored listens.
    pub fn socket_path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn control(&self, domid: u16) -> Result<UnixStream> {
        self.connect(&self.dir.path().join(format!("run/ctl/{domid}.sock")))
    }

    /// The bytes of a relay domain's ring.
    ///
    /// # Errors
    /// It is not there.
    pub fn ring(&self, guest: u16) -> Result<UnixStream> {
        self.control(FIRST_GUEST + guest)
    }

    /// Who can tell which process xenstored is.
    ///
    /// # Errors
    /// dom0 is not there.
    pub fn oracle(&self) -> Result<Oracle> {
        let stream = self.control(0)?;
        stream.set_read_timeout(Some(UP))?;
        Ok(Oracle(stream))
    }

    /// The ends of hv-core's and of xenstored's log.
    pub fn log_tail(&self) -> String {
        let mut out = String::new();
        for (name, lines) in [("log", 12), ("run/log/xenstored.log", 12)] {
            let log = std::fs::read(self.dir.path().join(name)).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let tail: Vec<&str> = log.lines().rev().take(lines).collect();
            out += &format!("{name}:\n{}\n", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        out
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.hv_core.id().cast_signed());
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            // It may have ended by itself.
            let _ = kill(pid, signal);
            for _ in 0..200 {
                if !matches!(self.hv_core.try_wait(), Ok(None)) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Knows xenstored's process.
#[derive(Debug)]
pub struct Oracle(UnixStream);

impl Oracle {
    /// Host process id (0 between two) and incarnation.
    ///
    /// # Errors
    /// dom0 does not answer.
    pub fn xenstored(&mut self) -> Result<(i32, u32)> {
        self.0.write_all(b"?")?;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            ensure!(self.0.read(&mut byte)? == 1, "dom0 went away");
            line.push(byte[0]);
        }
        let text = String::from_utf8(line)?;
        let (pid, generation) = text.trim().split_once(' ').context("dom0's answer")?;
        Ok((pid.parse()?, generation.parse()?))
    }
}

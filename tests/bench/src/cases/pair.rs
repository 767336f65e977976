//! hv-core with two process domains under it and no service: what evtchn and grant-copy benches need.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wire::Remote;

/// domid of the domain that grants pages.
pub const GRANTER: u16 = 1;
/// domid of the domain that copies from them.
pub const TAKER: u16 = 2;

/// The running pair.
#[derive(Debug)]
pub struct Pair {
    hv_core: Child,
    dir: tempfile::TempDir,
    /// The domain that grants pages.
    pub granter: Remote,
    /// The domain that copies from them.
    pub taker: Remote,
}

impl Pair {
    /// Starts it.
    ///
    /// # Errors
    /// In words, with the last lines of the log.
    pub fn start(bin_dir: &std::path::Path) -> Result<Pair> {
        let dir = tempfile::Builder::new().prefix("bh-bench-").tempdir()?;
        let log = std::fs::File::create(dir.path().join("log"))?;
        let mut hv_core = Command::new(bin_dir.join("hv-core"))
            .arg("--run-dir")
            .arg(dir.path().join("run"))
            .arg("--dom0")
            .arg(bin_dir.join("bench-dom0"))
            .arg(format!("--dom0-arg={}", bin_dir.join("bench-guest").display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting hv-core")?;
        let connect = |domid: u16| {
            let path = control_socket(dir.path(), domid);
            Remote::connect(&path, Duration::from_secs(20))
        };
        match (connect(GRANTER), connect(TAKER)) {
            (Ok(granter), Ok(taker)) => Ok(Pair { hv_core, dir, granter, taker }),
            (Err(error), _) | (_, Err(error)) => {
                stop(&mut hv_core);
                let log = std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(15).collect();
                let tail: Vec<&str> = tail.into_iter().rev().collect();
                Err(error).with_context(|| format!("hv-core with two domains: {}", tail.join("\n")))
            }
        }
    }

    /// Host process ids of the granter and the taker.
    ///
    /// # Errors
    /// If dom0 does not tell.
    pub fn pids(&self) -> Result<(i32, i32)> {
        let mut dom0 = Remote::connect(&control_socket(self.dir.path(), 0), Duration::from_secs(20))?;
        let pids = dom0.call(&serde_json::json!({"cmd": "pids"}))?;
        let of = |domid: u16| {
            let pid = pids[domid.to_string()].as_i64().and_then(|p| i32::try_from(p).ok());
            pid.with_context(|| format!("no process of domain {domid}: {pids}"))
        };
        Ok((of(GRANTER)?, of(TAKER)?))
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        stop(&mut self.hv_core);
    }
}

/// Where a domain's descriptor 4 listens.
pub fn control_socket(dir: &std::path::Path, domid: u16) -> PathBuf {
    dir.join(format!("run/ctl/{domid}.sock"))
}

/// Ends hv-core in order, then the hard way.
fn stop(hv_core: &mut Child) {
    let pid = Pid::from_raw(hv_core.id().cast_signed());
    for (signal, tries) in [(Signal::SIGTERM, 100), (Signal::SIGKILL, 100)] {
        for _ in 0..tries {
            match hv_core.try_wait() {
                Ok(None) => {}
                _ => return,
            }
            // It may end between the two calls.
            let _ = kill(pid, signal);
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

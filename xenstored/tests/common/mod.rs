//! The real daemon for system tests.
#![allow(dead_code)]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A standalone daemon in a directory of its own.
pub struct Daemon {
    pub dir: tempfile::TempDir,
    child: Option<Child>,
    args: Vec<String>,
}

impl Daemon {
    pub fn start() -> Self {
        Self::with_args(&[])
    }

    pub fn with_args(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let mut daemon = Self { dir, child: None, args: args.iter().map(|a| (*a).to_owned()).collect() };
        daemon.spawn();
        daemon.wait();
        daemon
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn pid(&self) -> i32 {
        self.child.as_ref().expect("running").id() as i32
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xenstored"));
        command.arg("--standalone").arg("--socket").arg(self.socket()).arg("--state").arg(self.state());
        command.args(&self.args).env("RUST_LOG", "warn").stdin(Stdio::null());
        command
    }

    pub fn spawn(&mut self) {
        self.child = Some(self.command().spawn().expect("xenstored starts"));
    }

    pub fn wait(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(self.socket()).is_err() {
            if let Some(status) = self.child.as_mut().expect("spawned").try_wait().expect("wait") {
                panic!("xenstored ended: {status}");
            }
            assert!(Instant::now() < deadline, "xenstored does not serve");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// SIGKILL, and reaped.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }

    pub fn restart(&mut self) {
        self.kill();
        self.spawn();
        self.wait();
    }

    /// Resident memory in KiB.
    pub fn rss_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
        let line = status.lines().find(|l| l.starts_with("RssAnon:")).expect("RssAnon");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("number")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether a program is installed.
pub fn installed(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|paths| std::env::split_paths(&paths).any(|p| Path::new(&p).join(program).exists()))
}

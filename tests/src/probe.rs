//! The host's side of `tests/probe`, a domain that obeys orders.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

/// A probe as the host reaches it.
#[derive(Clone, Debug)]
pub struct Probe {
    control: PathBuf,
}

impl Probe {
    /// That of a domain whose program is the probe. `run_dir` is hv-core's.
    pub fn new(run_dir: &Path, domid: u16) -> Probe {
        Probe { control: run_dir.join(format!("ctl/{domid}.sock")) }
    }

    fn send(&self, order: &str) -> Result<UnixStream> {
        let mut stream =
            UnixStream::connect(&self.control).with_context(|| format!("{}", self.control.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(format!("{order}\n").as_bytes())?;
        Ok(stream)
    }

    /// Gives an order; what it answered, or nothing if its process ended over it.
    ///
    /// # Errors
    /// If it cannot be reached.
    pub fn order(&self, order: &str) -> Result<String> {
        let mut answer = String::new();
        match self.send(order)?.read_to_string(&mut answer) {
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(String::new()),
            read => read.map(|_| answer).with_context(|| format!("order {order:?}")),
        }
    }

    /// Its hypercall socket.
    ///
    /// # Errors
    /// If it does not hand it out.
    pub fn hypercall(&self) -> Result<OwnedFd> {
        crate::fds::receive(&self.send("fd")?).context("the probe's hypercall socket")
    }
}

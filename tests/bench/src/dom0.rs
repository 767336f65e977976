//! A client of dom0-supervisor that connects afresh for every call, as `bh` does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use proto::toolstack::PingRequest;
use proto::toolstack::toolstack_client::ToolstackClient;

/// Where dom0 listens.
#[derive(Debug)]
pub struct Dom0 {
    runtime: tokio::runtime::Runtime,
    socket: PathBuf,
}

/// Longer than any restart.
const TIMEOUT: Duration = Duration::from_secs(10);

impl Dom0 {
    /// A client of the dom0 that listens on `socket`.
    ///
    /// # Errors
    /// No event loop can be made.
    pub fn new(socket: &Path) -> Result<Dom0> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Dom0 { runtime, socket: socket.into() })
    }

    /// One call that does nothing.
    ///
    /// # Errors
    /// dom0 is not there, or died meanwhile.
    pub fn ping(&self) -> Result<()> {
        self.runtime.block_on(async {
            let mut client = ToolstackClient::new(proto::unix::at(&self.socket));
            let answer = tokio::time::timeout(TIMEOUT, client.ping(PingRequest {})).await;
            answer.context("dom0 does not answer")?.context("dom0")?;
            Ok(())
        })
    }
}

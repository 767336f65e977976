//! The loop: new guests, their output.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context;
use domain_kit::control::ServiceControl;
use domain_kit::{Domain, control};
use hv_abi::VIRQ_DOM_EXC;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proto::service::Counter;
use proto::toolstack::console_backend_server::ConsoleBackendServer;
use tokio::sync::Notify;
use tonic::service::Routes;

use super::serve::Server;
use super::table::{self, Table};

/// hv-core tells of changes; this is for what could not be attached when it did.
const LOOK_MS: u16 = 1000;
/// While a guest that prints too much has to wait.
const THROTTLED_MS: u16 = 5;

struct Stats {
    table: Arc<Table>,
    pumps: AtomicU64,
}

impl ServiceControl for Stats {
    fn statistics(&self) -> Vec<Counter> {
        let counter = |name: &str, value, subject: String, unit: &str| Counter {
            name: name.into(),
            value,
            subject,
            unit: unit.into(),
        };
        let consoles = self.table.all();
        let mut out = vec![
            counter("consoles", consoles.len() as u64, String::new(), ""),
            counter("pumps", self.pumps.load(Relaxed), String::new(), ""),
        ];
        out.extend(
            consoles.iter().map(|c| counter("output", c.total(), format!("console-{}", c.domid), "bytes")),
        );
        out
    }

    fn drain(&self, _deadline: Duration, _resume: bool) -> bool {
        // Every pump is finished when it returns; there is nothing in flight.
        true
    }
}

/// Runs the console domain until its process is ended.
///
/// # Errors
/// What keeps it from running at all.
pub fn run() -> anyhow::Result<()> {
    let domain = Domain::join("console-backend")?;
    let hv = &domain.hv;
    let virq = hv.port_bind_virq(VIRQ_DOM_EXC, 0).context("VIRQ_DOM_EXC")?;
    let table = Arc::new(Table::default());
    let stats = Arc::new(Stats { table: Arc::clone(&table), pumps: AtomicU64::new(0) });
    let changed = Arc::new(Notify::new());
    let server = ConsoleBackendServer::new(Server::new(Arc::clone(&table), Arc::clone(&changed)));
    let domains = hv.dom_list()?;
    table::sweep(hv, &domains);
    table.update(hv, &domains);
    let health = control::serve_with(&domain, stats.clone(), Routes::new(server))?;
    health.set_serving(true);
    hv.served()?;
    loop {
        let mut throttled = false;
        let consoles = table.all();
        let mut fds = vec![PollFd::new(virq.rx(), PollFlags::POLLIN)];
        for console in &consoles {
            if console.pump() {
                fds.push(PollFd::new(console.as_fd(), PollFlags::POLLIN));
            } else {
                throttled = true;
            }
        }
        stats.pumps.fetch_add(consoles.len() as u64, Relaxed);
        let timeout = if throttled { THROTTLED_MS } else { LOOK_MS };
        let woken = match poll(&mut fds, PollTimeout::from(timeout)) {
            Ok(woken) => woken,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        };
        drop(fds);
        if virq.clear() || (woken == 0 && !throttled) {
            table.update(hv, &hv.dom_list()?);
            changed.notify_waiters();
        }
    }
}

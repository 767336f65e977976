//! The process guest: verified disk and network load over the rings of a real guest, without a kernel of its own.
//! It reports on its PV console in the form of the Linux guest's agent, and ends when the toolstack asks it to through
//! `control/shutdown`.

mod disk;
mod net;
mod options;
mod plug;
mod report;
mod work;

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use domain_kit::guest::{wait_until_made, watch_shutdown};
use domain_kit::xenbus::connect_store;
use domain_kit::{Domain, control};
use proto::service::Counter;
use workload::report::{Json, Report};
use workload::work::End;

use crate::options::Options;
use crate::report::Reporter;

/// How long the store may take to appear, and then our nodes in it.
const STORE: Duration = Duration::from_secs(60);
/// SHUTDOWN_* reasons (sched.h).
const POWEROFF: u32 = 0;
const REBOOT: u32 = 1;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let domain = Domain::join("process-guest")?;
    let reporter = Arc::new(Reporter::open(&domain));
    reporter.line(
        &Json::new("boot")
            .text("kernel", concat!("process-guest ", env!("CARGO_PKG_VERSION")))
            .text("hypervisor", "bulkhead")
            .text("boot_id", &format!("{:x}-{}", domain.hello.instance, domain.hello.generation))
            .count("uptime_ms", domain.started.elapsed().as_millis() as u64)
            .count("cpus", std::thread::available_parallelism().map_or(1, usize::from) as u64),
    );
    let health = control::serve(&domain, Arc::new(Nothing)).context("gRPC")?;
    let end = match run(&options, &domain, &reporter, &health) {
        Ok(end) => end,
        Err(error) => {
            reporter.error("guest", &format!("{error:#}"));
            return Err(error);
        }
    };
    domain.hv.shutdown(if end == End::Reboot { REBOOT } else { POWEROFF })?;
    Ok(())
}

fn run(
    options: &Options,
    domain: &Arc<Domain>,
    reporter: &Arc<Reporter>,
    health: &control::ControlHandle,
) -> anyhow::Result<End> {
    let xs = connect_store(domain, STORE).context("xenstore")?;
    xs.set_timeout(Duration::from_secs(30));
    wait_until_made(&xs, domain.domid(), STORE).context("the toolstack does not make this domain's nodes")?;
    let (ends, end) = mpsc::channel();
    watch_shutdown(&xs, move |reboot| ends.send(if reboot { End::Reboot } else { End::PowerOff }).is_ok())?;
    let work = work::start(options, domain, &xs, reporter);
    domain.hv.served()?;
    health.set_serving(true);
    let limit = options.seconds.map(Duration::from_secs);
    let why = work.watch(Duration::from_millis(options.interval_ms), limit, &**reporter, &end);
    health.set_serving(false);
    let clean = work.stop(&**reporter);
    reporter.line(&Json::new("end").text("why", why.name()).flag("clean", clean));
    Ok(why)
}

/// A guest has no counters of its own; its load reports on the console.
struct Nothing;

impl control::ServiceControl for Nothing {
    fn statistics(&self) -> Vec<Counter> {
        Vec::new()
    }
    fn drain(&self, _deadline: Duration, _resume: bool) -> bool {
        true
    }
}

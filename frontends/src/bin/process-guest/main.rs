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
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use domain_kit::xenbus::connect_store;
use domain_kit::xs::{XsClient, XsOps};
use domain_kit::{Domain, control};
use proto::service::Counter;
use workload::report::{Json, Report};
use workload::work::End;

use crate::options::Options;
use crate::report::Reporter;

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
    let xs = connect_store(domain, Duration::from_secs(60)).context("xenstore")?;
    xs.set_timeout(Duration::from_secs(30));
    wait_until_made(&xs, domain.domid())?;
    let (ends, end) = mpsc::channel();
    watch_shutdown(&xs, ends)?;
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

/// The toolstack learns the domid by making the domain, so this process can be ahead of its own nodes. They come all at once.
fn wait_until_made(xs: &XsClient, domid: u16) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match xs.read(&format!("/local/domain/{domid}/vm")) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).context("the toolstack does not make this domain's nodes");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Turns the toolstack's wishes into an end, as guests do: read, acknowledge by an empty value, act.
fn watch_shutdown(xs: &XsClient, ends: mpsc::Sender<End>) -> anyhow::Result<()> {
    const NODE: &str = "control/shutdown";
    let watches = xs.watch_set()?;
    watches.watch(NODE, "shutdown")?;
    let xs = xs.clone();
    std::thread::Builder::new().name("shutdown".into()).spawn(move || {
        loop {
            watches.next_timeout(Duration::from_secs(3600));
            let end = match xs.read_opt(NODE).ok().flatten().as_deref() {
                Some("poweroff" | "halt") => End::PowerOff,
                Some("reboot") => End::Reboot,
                _ => continue,
            };
            if let Err(error) = xs.write(NODE, "") {
                tracing::warn!(%error, "the request to end could not be acknowledged");
            }
            if ends.send(end).is_err() {
                return;
            }
        }
    })?;
    Ok(())
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

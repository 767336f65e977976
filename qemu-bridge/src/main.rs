//! qemu-bridge: one QEMU guest's domain. hv-core starts it; see the crate's README.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use domain_kit::xenbus::connect_store;
use domain_kit::xs::{XsClient, XsOps};
use domain_kit::{Domain, control};
use qemu_bridge::control::{Counters, routes};
use qemu_bridge::devices::Devices;
use qemu_bridge::machine::{self, End, Machine};
use qemu_bridge::serial;

/// One QEMU guest's domain. Started by hv-core.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {}

/// How long the store may take to appear.
const STORE: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    let Args {} = Args::parse();
    let domain = Domain::join("qemu-bridge")?;
    let (machine, events) = match Machine::open(&domain.hv) {
        Ok(opened) => opened,
        // Without a monitor there is nothing to wait for: whoever made the two domains sees this one's end.
        Err(why) => {
            tracing::error!(%why, "QEMU cannot be reached");
            domain.hv.shutdown(End::Crash(String::new()).reason())?;
            anyhow::bail!("QEMU cannot be reached: {why}; see the log of its own domain");
        }
    };
    tracing::info!(version = machine.version(), accel = machine.accel(), state = machine.state(), "QEMU");
    let health = control::serve_with(&domain, Arc::new(Counters(machine.clone())), routes(machine.clone()))
        .context("gRPC on descriptor 4")?;
    let line = serial::open(&domain.hv, machine.qmp()).context("the guest's serial line")?;
    {
        let domain = domain.clone();
        std::thread::Builder::new().name("serial".into()).spawn(move || {
            if let Err(error) = serial::relay(&domain, &line) {
                tracing::error!(%error, "the console");
            }
        })?;
    }
    domain.hv.served()?;
    health.set_serving(true);
    let (failed, failure) = mpsc::channel();
    {
        let (domain, machine) = (domain.clone(), machine.clone());
        std::thread::Builder::new().name("devices".into()).spawn(move || {
            if let Err(error) = devices(&domain, &machine) {
                let _ended_meanwhile = failed.send(format!("{error:#}"));
                machine.qmp().close();
            }
        })?;
    }
    let mut end = machine.follow(&events, |silent| health.set_serving(!silent));
    // If the conversation was ended by the devices' thread, it knows why.
    if let (End::Crash(why), Ok(better)) = (&mut end, failure.try_recv()) {
        *why = better;
    }
    if let End::Crash(why) = &end {
        // The last line: what the toolstack shows.
        tracing::error!("{why}");
    }
    machine::end(&domain, &machine, &end)
}

/// Everything for which the store is needed.
fn devices(domain: &Arc<Domain>, machine: &Arc<Machine>) -> anyhow::Result<()> {
    let xs = loop {
        match connect_store(domain, STORE) {
            Ok(xs) => break xs,
            // A guest that runs goes on without it.
            Err(error) if machine.state() != "prelaunch" => tracing::warn!(%error, "no store yet"),
            Err(error) => return Err(error).context("xenstore"),
        }
    };
    xs.set_timeout(Duration::from_secs(30));
    wait_until_made(&xs, domain.domid())?;
    watch_shutdown(&xs, machine.clone())?;
    Devices::new(domain.clone(), machine.clone(), xs)?.run()
}

/// The toolstack learns the domid by making the domain, so this process can be ahead of its own nodes. They come all at once.
fn wait_until_made(xs: &XsClient, domid: u16) -> anyhow::Result<()> {
    let deadline = Instant::now() + STORE;
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

/// Turns the toolstack's wishes into presses of the power button: read, acknowledge by an empty value, act.
fn watch_shutdown(xs: &XsClient, machine: Arc<Machine>) -> anyhow::Result<()> {
    const NODE: &str = "control/shutdown";
    let watches = xs.watch_set()?;
    watches.watch(NODE, "shutdown")?;
    let xs = xs.clone();
    std::thread::Builder::new().name("shutdown".into()).spawn(move || {
        loop {
            watches.next_timeout(Duration::from_secs(3600));
            let reboot = match xs.read_opt(NODE).ok().flatten().as_deref() {
                Some("poweroff" | "halt") => false,
                Some("reboot") => true,
                _ => continue,
            };
            if let Err(error) = xs.write(NODE, "") {
                tracing::warn!(%error, "the request to end could not be acknowledged");
            }
            if let Err(error) = machine.power_button(reboot) {
                tracing::error!(%error, "the power button");
            }
        }
    })?;
    Ok(())
}

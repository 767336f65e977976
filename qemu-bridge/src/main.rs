//! qemu-bridge: one QEMU guest's domain. hv-core starts it; see the crate's README.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use domain_kit::guest::{wait_until_made, watch_shutdown};
use domain_kit::xenbus::connect_store;
use domain_kit::{Domain, control};
use qemu_bridge::control::{Counters, routes};
use qemu_bridge::devices::Devices;
use qemu_bridge::machine::{self, End, Machine, Nvram};
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
    let health = control::serve_with(
        &domain,
        Arc::new(Counters(machine.clone())),
        routes(domain.clone(), machine.clone()),
    )
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
    let nvram = Nvram::open(&domain.hv).context("the guest's nvram")?;
    let mut end = machine.follow(&events, |silent| health.set_serving(!silent), || nvram.broken());
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
    wait_until_made(&xs, domain.domid(), STORE).context("the toolstack does not make this domain's nodes")?;
    let button = machine.clone();
    watch_shutdown(&xs, move |reboot| {
        if let Err(error) = button.power_button(reboot) {
            tracing::error!(%error, "the power button");
        }
        true
    })?;
    Devices::new(domain.clone(), machine.clone(), xs)?.run()
}

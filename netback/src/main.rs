//! Network backend: one process domain per NIC. Started by hv-core as dom0 says; see the README.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use domain_kit::{Domain, control, xenbus};
use netback::backend::{NetDriver, Vifs};
use netback::connection::MAX_QUEUES;
use netback::forward::{Ipv4Prefix, Mode, Wiring};

/// Network backend of a Bulkhead driver domain. Runs as a process domain; not to be started by hand.
#[derive(Debug, Parser)]
#[command(name = "netback", version)]
struct Args {
    /// Interface towards the outside, moved into this domain's network namespace.
    #[arg(long)]
    uplink: Option<String>,
    /// How guests reach it.
    #[arg(long, value_enum, default_value = "bridged")]
    mode: Mode,
    /// Routed: the gateway's address as guests see it, A.B.C.D/N.
    #[arg(long)]
    gateway: Option<Ipv4Prefix>,
    /// Routed: an address for the uplink itself, A.B.C.D/N.
    #[arg(long)]
    uplink_address: Option<Ipv4Prefix>,
    /// Routed: the router behind the uplink; without it everything is taken to be on link.
    #[arg(long)]
    uplink_gateway: Option<Ipv4Addr>,
    /// For tests of poison packets only: panic at each packet of a guest that is this long, bytes from the Ethernet header on.
    #[arg(long)]
    fault: Option<usize>,
    /// Queues that a vif may have at most, 1 to 16; by default as many as there are processors.
    #[arg(long)]
    queues: Option<usize>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(len) = args.fault {
        netback::fault::set_len(len);
    }
    let domain = Domain::join("netback")?;
    let vifs = Arc::new(Vifs::default());
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let queues = args.queues.unwrap_or(processors).clamp(1, MAX_QUEUES);
    let wiring = Wiring {
        mode: args.mode,
        uplink: args.uplink,
        gateway: args.gateway,
        uplink_address: args.uplink_address,
        uplink_gateway: args.uplink_gateway,
    };
    // Packets flow again from here on, whatever the rest takes.
    let mut backend = xenbus::Backend::new(
        |bus| NetDriver::new(domain.clone(), vifs.clone(), wiring, queues, bus),
        domain.domid(),
    )?;
    let health = control::serve(&domain, vifs).context("gRPC")?;
    match backend.driver().wire() {
        Ok(_) => health.set_serving(true),
        // Every device asks again.
        Err(error) => tracing::error!(%error, "no network"),
    }
    let xs = loop {
        match xenbus::connect_store(&domain, Duration::from_secs(10)) {
            Ok(xs) => break xs,
            Err(error) => tracing::warn!(%error, "no xenstore yet"),
        }
    };
    domain.hv.served()?;
    backend.run(&xs)?;
    Ok(())
}

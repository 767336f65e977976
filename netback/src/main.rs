//! Network backend: one process domain per NIC. Started by hv-core as dom0 says; see the README.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use domain_kit::mem::Page;
use domain_kit::xs::{RingTransport, XsClient};
use domain_kit::{Domain, control};
use netback::backend::{Backend, Shared, take_over};
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
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let domain = Domain::join("netback")?;
    let shared = Shared::new()?;
    take_over(&domain, &shared).context("taking over the predecessor's vifs")?;
    let health = control::serve(&domain, shared.clone()).context("gRPC")?;
    let xs = store(&domain);
    let wiring = Wiring {
        mode: args.mode,
        uplink: args.uplink,
        gateway: args.gateway,
        uplink_address: args.uplink_address,
        uplink_gateway: args.uplink_gateway,
    };
    Backend::new(domain, shared, xs, wiring)?.run(&health)
}

/// Connects to xenstored however long it takes: packets flow meanwhile.
fn store(domain: &Arc<Domain>) -> XsClient {
    loop {
        match connect(domain) {
            Ok(xs) => return xs,
            Err(error) => tracing::warn!(error = format!("{error:#}"), "no xenstore yet"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn connect(domain: &Domain) -> anyhow::Result<XsClient> {
    let (region, port) = domain.store_ring()?.context("there is no xenstore domain")?;
    let rx = port.rx().try_clone_to_owned()?;
    let tx = port.tx().context("the store's port cannot send")?.try_clone_to_owned()?;
    let ring = RingTransport::new(Arc::new(Page::new(region.mem, 0)), rx, tx)?;
    Ok(XsClient::connect(ring, Duration::from_secs(5))?)
}

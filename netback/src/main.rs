//! Network backend: one process domain per NIC. Started by hv-core as dom0 says; see the README.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use domain_kit::{Domain, control, xenbus};
use netback::backend::{NetDriver, Vifs};
use netback::connection::MAX_QUEUES;
use netback::forward::{Ipv4Prefix, Ipv6Prefix, Mode, Wiring};
use netback::names::Resolver;
use netback::qubes;
use netback::worker::Worker;

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
    /// Routed: the gateway's IPv6 address and the guests' network, as fd00:0:0:1::1/64. Without it guests have no IPv6.
    #[arg(long)]
    gateway6: Option<Ipv6Prefix>,
    /// Routed: an IPv6 address for the uplink itself; without it the uplink takes what routers there advertise.
    #[arg(long)]
    uplink_address6: Option<Ipv6Prefix>,
    /// Routed: the IPv6 router behind the uplink.
    #[arg(long)]
    uplink_gateway6: Option<Ipv6Addr>,
    /// A DNS server: guests are told by DHCP, and it is asked for names in firewall rules. May be given several times.
    #[arg(long)]
    dns: Vec<IpAddr>,
    /// Routed: no DHCP.
    #[arg(long)]
    no_dhcp: bool,
    /// Routed: no IPv6 router advertisements.
    #[arg(long)]
    no_ra: bool,
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
        gateway6: args.gateway6,
        uplink_address6: args.uplink_address6,
        uplink_gateway6: args.uplink_gateway6,
        dns: args.dns,
        dhcp: !args.no_dhcp,
        ra: !args.no_ra,
    };
    let servers = wiring.dns.clone();
    // Packets flow again from here on, whatever the rest takes.
    let mut backend = xenbus::Backend::new(
        |bus| NetDriver::new(domain.clone(), vifs.clone(), wiring, queues, bus),
        domain.domid(),
    )?;
    let routes = netback::control::routes(vifs.clone());
    let health = control::serve_with(&domain, vifs, routes).context("gRPC")?;
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
    let switch = backend.driver().switch()?;
    let mut resolver = Resolver::new(&servers);
    let asked = switch.clone();
    let _until_the_end = Worker::start("names", false, move |control| resolver.run(control, &asked))?;
    let store = xs.clone();
    std::thread::Builder::new().name("qubes".into()).spawn(move || qubes::run(&store, &switch))?;
    backend.run(&xs)?;
    Ok(())
}

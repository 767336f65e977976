//! The loads of this guest.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Context;
use domain_kit::Domain;
use domain_kit::xenbus::Frontend;
use domain_kit::xs::XsClient;
use frontends::netfront;
use workload::load::{Load, LoadConfig};
use workload::report::{Json, Report};
use workload::work::Work;

use crate::disk;
use crate::net::{NetLoad, NetStats};
use crate::options::{self, Options};
use crate::plug::Plug;
use crate::report::Reporter;

/// How long a backend may take to come up.
const CONNECT: Duration = Duration::from_secs(60);
/// How long what is still under way may take at the end.
const LINGER: Duration = Duration::from_secs(8);

/// Connects the devices and starts what the options ask for. Devices that do not come up are only reported.
pub fn start(options: &Options, domain: &Domain, xs: &XsClient, reporter: &Arc<Reporter>) -> Work {
    let mut work = Work::default();
    if options.wants(options::Work::Disk) {
        match start_disk(options, domain, xs, &**reporter) {
            Ok(load) => work.disk = Some(load),
            Err(e) => reporter.error("disk", &format!("{e:#}")),
        }
    }
    if options.wants(options::Work::Tcp) || options.wants(options::Work::Ping) {
        match start_net(options, domain, xs, reporter, &work.stop) {
            Ok((stats, thread)) => {
                (work.tcp, work.ping) = (stats.tcp, stats.ping);
                work.threads.push(thread);
            }
            Err(e) => reporter.error("net", &format!("{e:#}")),
        }
    }
    work
}

fn start_disk(
    options: &Options,
    domain: &Domain,
    xs: &XsClient,
    reporter: &dyn Report,
) -> anyhow::Result<Load> {
    let ids = Frontend::list(xs, domain.domid(), "vbd")?;
    let id = *ids.first().context("this guest has no disk")?;
    let device = disk::connect(domain, xs, id, CONNECT)?;
    let config = LoadConfig {
        seed: options.seed,
        threads: options.threads.clamp(1, 64),
        span: options.span_mib << 20,
        max_blocks: options.max_blocks.clamp(1, 256),
        pause: Duration::from_micros(options.disk_pause_us),
        ..LoadConfig::default()
    };
    reporter.line(&Json::new("disk").text("device", &format!("vbd {id}")).count("bytes", device.size()));
    Ok(Load::start(device, &config)?)
}

fn start_net(
    options: &Options,
    domain: &Domain,
    xs: &XsClient,
    reporter: &Arc<Reporter>,
    stop: &Arc<AtomicBool>,
) -> anyhow::Result<(NetStats, JoinHandle<()>)> {
    let ids = Frontend::list(xs, domain.domid(), "vif")?;
    let id = *ids.first().context("this guest has no NIC")?;
    let network = options.ip.context("the NIC needs --ip A.B.C.D/N")?;
    let wanted = netfront::Options { queues: options.queues, ..netfront::Options::default() };
    let mut plug = Plug::new(domain.hv.new_channel()?, xs.clone(), domain.domid(), id, wanted);
    let front = plug.connect(CONNECT)?;
    let (load, stats) = NetLoad::new(front, plug, network, options, &**reporter);
    let (stop, reporter) = (stop.clone(), reporter.clone());
    let thread =
        thread::Builder::new().name("net".into()).spawn(move || load.run(&stop, LINGER, &*reporter))?;
    Ok((stats, thread))
}

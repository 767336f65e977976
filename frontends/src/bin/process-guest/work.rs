//! The loads of this guest and their progress lines.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context;
use domain_kit::Domain;
use domain_kit::xenbus::Frontend;
use domain_kit::xs::XsClient;
use frontends::netfront::{self, NetFront};
use serde_json::{Value, json};
use workload::load::{Load, LoadConfig, LoadStats};

use crate::disk;
use crate::net::{NetLoad, NetStats};
use crate::options::{self, Options};
use crate::report::{Reporter, millis};

/// How long a backend may take to come up.
const CONNECT: Duration = Duration::from_secs(60);
/// How long what is still under way may take at the end.
const LINGER: Duration = Duration::from_secs(8);

/// Why the guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Asked to.
    PowerOff,
    /// Asked to start again.
    Reboot,
    /// The time is over.
    Time,
}

impl End {
    /// For the report.
    pub fn name(self) -> &'static str {
        match self {
            End::PowerOff => "poweroff",
            End::Reboot => "reboot",
            End::Time => "time",
        }
    }
}

/// The running loads. Those that were not asked for, or could not start, are absent.
pub struct Work {
    stop: Arc<AtomicBool>,
    disk: Option<Load>,
    net: Option<(NetStats, JoinHandle<()>)>,
}

impl Work {
    /// Connects the devices and starts what the options ask for.
    ///
    /// # Errors
    /// The store cannot be read; devices that do not come up are only reported.
    pub fn start(
        options: &Options,
        domain: &Domain,
        xs: &XsClient,
        reporter: &Arc<Reporter>,
    ) -> anyhow::Result<Work> {
        let mut work = Work { stop: Arc::default(), disk: None, net: None };
        if options.wants(options::Work::Disk) {
            match start_disk(options, domain, xs, reporter) {
                Ok(load) => work.disk = Some(load),
                Err(e) => reporter.error("disk", &format!("{e:#}")),
            }
        }
        if options.wants(options::Work::Tcp) || options.wants(options::Work::Ping) {
            match start_net(options, domain, xs, reporter, &work.stop) {
                Ok(net) => work.net = Some(net),
                Err(e) => reporter.error("net", &format!("{e:#}")),
            }
        }
        Ok(work)
    }

    /// Reports progress until someone asks for an end or the time is over.
    pub fn watch(&self, options: &Options, reporter: &Reporter, end: &Receiver<End>) -> End {
        let start = Instant::now();
        let limit = options.seconds.map(Duration::from_secs);
        let interval = Duration::from_millis(options.interval_ms.max(10));
        let idle = self.disk.is_none() && self.net.is_none();
        reporter.line("ready", json!({"idle": idle}));
        loop {
            match end.recv_timeout(interval) {
                Ok(end) => return end,
                Err(RecvTimeoutError::Timeout) => {}
                // Cannot be: the watcher lives as long as we do. Then only time ends us.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(interval),
            }
            if limit.is_some_and(|l| start.elapsed() >= l) {
                return End::Time;
            }
            if !idle {
                reporter.line("progress", self.progress());
            }
        }
    }

    /// Ends the loads and reports the totals; true if all ended in time and nothing was wrong.
    pub fn stop(mut self, reporter: &Reporter) -> bool {
        self.stop.store(true, Relaxed);
        let mut clean = true;
        if let Some(load) = self.disk.take() {
            let stats = load.stats.clone();
            if !load.stop(Duration::from_secs(20)) {
                clean = false;
                reporter.error("disk", &"a request was still waiting 20 s after the end");
            }
            clean &= get(&stats.errors) + get(&stats.corrupt) == 0;
            reporter.line("disk_end", json!({"disk": disk_json(&stats)}));
        }
        if let Some((stats, thread)) = &self.net {
            let limit = Instant::now() + LINGER + Duration::from_secs(1);
            while !thread.is_finished() && Instant::now() < limit {
                thread::sleep(Duration::from_millis(10));
            }
            clean &= thread.is_finished();
            if let Some(tcp) = &stats.tcp {
                clean &= get(&tcp.resets) + get(&tcp.corrupt) == 0;
            }
        }
        reporter.line("total", self.progress());
        clean
    }

    fn progress(&self) -> Value {
        let mut json = json!({});
        if let Some(load) = &self.disk {
            json["disk"] = disk_json(&load.stats);
        }
        let Some((net, _)) = &self.net else { return json };
        if let Some(tcp) = &net.tcp {
            json["tcp"] = json!({
                "connects": get(&tcp.connects),
                "tx_bytes": get(&tcp.tx_bytes),
                "rx_bytes": get(&tcp.rx_bytes),
                "resets": get(&tcp.resets),
                "closed": get(&tcp.closed),
                "corrupt": get(&tcp.corrupt),
                "max_gap_ms": millis(tcp.rx_gap.take()),
                "longest_gap_ms": millis(tcp.rx_gap.longest()),
                "problem": tcp.first_problem(),
            });
        }
        if let Some(ping) = &net.ping {
            json["ping"] = json!({
                "sent": get(&ping.sent),
                "received": get(&ping.received),
                "lost": get(&ping.lost),
                "max_rtt_ms": millis(ping.take_max_rtt()),
            });
        }
        json
    }
}

fn start_disk(
    options: &Options,
    domain: &Domain,
    xs: &XsClient,
    reporter: &Reporter,
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
    reporter.line("disk", json!({"device": format!("vbd {id}"), "bytes": device.size()}));
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
    let front = NetFront::connect_with(&domain.hv, xs, domain.domid(), id, wanted, CONNECT)?;
    let (load, stats) = NetLoad::new(front, network, options, reporter);
    let (stop, reporter) = (stop.clone(), reporter.clone());
    let thread =
        thread::Builder::new().name("net".into()).spawn(move || load.run(&stop, LINGER, &reporter))?;
    Ok((stats, thread))
}

fn disk_json(stats: &LoadStats) -> Value {
    json!({
        "read_bytes": get(&stats.read_bytes),
        "written_bytes": get(&stats.written_bytes),
        "verified_bytes": get(&stats.verified_bytes),
        "requests": get(&stats.requests),
        "flushes": get(&stats.flushes),
        "errors": get(&stats.errors),
        "corrupt": get(&stats.corrupt),
        "max_read_ms": millis(stats.reads.take()),
        "max_write_ms": millis(stats.writes.take()),
        "longest_read_ms": millis(stats.reads.longest()),
        "longest_write_ms": millis(stats.writes.longest()),
        "problem": stats.first_problem(),
    })
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Relaxed)
}

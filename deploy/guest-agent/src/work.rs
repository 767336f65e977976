//! The loads of this guest.

use crate::options::Options;
use crate::system;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use workload::load::{Load, LoadConfig, OsDevice};
use workload::ping::{self, PingStats};
use workload::report::{Json, Report};
use workload::stream::{self, StreamConfig, StreamStats};
use workload::work::Work;

/// Starts what the options ask for, and reports what could not be started.
pub fn start(options: &Options, reporter: &dyn Report) -> Work {
    for word in &options.unknown {
        reporter.error("command line", &format!("{word}: unknown or malformed"));
    }
    let mut work = Work::default();
    if options.disk_load {
        match start_disk(options, reporter) {
            Ok(load) => work.disk = Some(load),
            Err(e) => reporter.error("disk", &e),
        }
    }
    if options.tcp_load {
        match options.peer {
            Some(peer) => {
                let stats = Arc::new(StreamStats::default());
                let config = StreamConfig { rate: options.rate, stop: Arc::clone(&work.stop) };
                let (shared, seed) = (Arc::clone(&stats), options.seed);
                work.threads.push(thread::spawn(move || stream::client(peer, seed, &config, &shared)));
                work.tcp = Some(stats);
            }
            None => reporter.error("tcp", &"bh.work=tcp needs bh.peer=IP:PORT"),
        }
    }
    if options.ping_load {
        match options.ping {
            Some(peer) => {
                let stats = Arc::new(PingStats::default());
                let (shared, stop) = (Arc::clone(&stats), Arc::clone(&work.stop));
                let interval = Duration::from_millis(options.ping_ms.max(1));
                work.threads.push(thread::spawn(move || {
                    if let Err(e) = ping::run(peer, interval, &stop, &shared) {
                        // Shows as sent 0, which the reader takes for a failure.
                        eprintln!("ping: {e}");
                    }
                }));
                work.ping = Some(stats);
            }
            None => reporter.error("ping", &"bh.work=ping needs bh.ping=IP"),
        }
    }
    work
}

fn start_disk(options: &Options, reporter: &dyn Report) -> std::io::Result<Load> {
    let path = format!("/dev/{}", options.disk);
    system::wait_for(&path, Duration::from_secs(60))?;
    let device = OsDevice::open(Path::new(&path))?;
    let config = LoadConfig {
        seed: options.seed,
        threads: options.threads.clamp(1, 64),
        span: options.span_mib << 20,
        max_blocks: options.max_blocks.clamp(1, 256),
        pause: Duration::from_micros(options.disk_pause_us),
        ..LoadConfig::default()
    };
    let size = workload::load::BlockDevice::size(&device);
    reporter.line(&Json::new("disk").text("device", &options.disk).count("bytes", size));
    Load::start(Arc::new(device), &config)
}

//! The loads of this guest and their progress lines.

use crate::options::Options;
use crate::report::{Json, Reporter};
use crate::system::{self, End};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use workload::load::{Load, LoadConfig, OsDevice};
use workload::ping::{self, PingStats};
use workload::stream::{self, StreamConfig, StreamStats};

/// The running loads. Those that were not asked for, or could not start, are absent.
pub struct Work {
    stop: Arc<AtomicBool>,
    disk: Option<Load>,
    tcp: Option<(Arc<StreamStats>, JoinHandle<()>)>,
    ping: Option<(Arc<PingStats>, JoinHandle<()>)>,
}

impl Work {
    /// Starts what the options ask for, and reports what could not be started.
    pub fn start(options: &Options, reporter: &Reporter) -> Self {
        for word in &options.unknown {
            reporter.error("command line", &format!("{word}: unknown or malformed"));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let mut work = Self { stop: Arc::clone(&stop), disk: None, tcp: None, ping: None };
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
                    let config = StreamConfig { rate: options.rate, stop: Arc::clone(&stop) };
                    let (shared, seed) = (Arc::clone(&stats), options.seed);
                    let thread = thread::spawn(move || stream::client(peer, seed, &config, &shared));
                    work.tcp = Some((stats, thread));
                }
                None => reporter.error("tcp", &"bh.work=tcp needs bh.peer=IP:PORT"),
            }
        }
        if options.ping_load {
            match options.ping {
                Some(peer) => {
                    let stats = Arc::new(PingStats::default());
                    let shared = Arc::clone(&stats);
                    let interval = Duration::from_millis(options.ping_ms.max(1));
                    let thread = thread::spawn(move || {
                        if let Err(e) = ping::run(peer, interval, &stop, &shared) {
                            // Shows as sent 0, which the reader takes for a failure.
                            eprintln!("ping: {e}");
                        }
                    });
                    work.ping = Some((stats, thread));
                }
                None => reporter.error("ping", &"bh.work=ping needs bh.ping=IP"),
            }
        }
        work
    }

    /// Reports progress until someone asks for an end or the time is over.
    pub fn watch(
        &self,
        options: &Options,
        reporter: &Reporter,
        end: &Receiver<End>,
        limit: Option<Duration>,
    ) -> End {
        let start = Instant::now();
        let interval = Duration::from_millis(options.interval_ms.max(10));
        let idle = self.disk.is_none() && self.tcp.is_none() && self.ping.is_none();
        reporter.line(&Json::new("ready").flag("idle", idle));
        loop {
            match end.recv_timeout(interval) {
                Ok(end) => return end,
                Err(RecvTimeoutError::Timeout) => {}
                // Cannot be: the sender lives as long as we do. Then only time ends us.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(interval),
            }
            if limit.is_some_and(|l| start.elapsed() >= l) {
                return End::Time;
            }
            if !idle {
                reporter.line(&self.progress("progress"));
            }
        }
    }

    /// Ends the loads and reports the totals; true if all ended in time and nothing was wrong.
    pub fn stop(mut self, reporter: &Reporter) -> bool {
        self.stop.store(true, Relaxed);
        let mut clean = true;
        let disk = self.disk.take();
        if let Some(load) = disk {
            let stats = Arc::clone(&load.stats);
            if !load.stop(Duration::from_secs(20)) {
                clean = false;
                reporter.error("disk", &"a request was still waiting 20 s after the end");
            }
            clean &= get(&stats.errors) + get(&stats.corrupt) == 0;
            reporter.line(&Json::new("disk_end").object("disk", &disk_json(&stats)));
        }
        let limit = Instant::now() + Duration::from_secs(8);
        let threads = [self.tcp.as_ref().map(|t| &t.1), self.ping.as_ref().map(|t| &t.1)];
        while threads.iter().flatten().any(|t| !t.is_finished()) && Instant::now() < limit {
            thread::sleep(Duration::from_millis(10));
        }
        clean &= threads.iter().flatten().all(|t| t.is_finished());
        if let Some((stats, _)) = &self.tcp {
            clean &= get(&stats.resets) + get(&stats.corrupt) == 0;
        }
        reporter.line(&self.progress("total"));
        clean
    }

    fn progress(&self, event: &str) -> Json {
        let mut json = Json::new(event);
        if let Some(load) = &self.disk {
            json = json.object("disk", &disk_json(&load.stats));
        }
        if let Some((stats, _)) = &self.tcp {
            let part = Json::part()
                .count("connects", get(&stats.connects))
                .count("tx_bytes", get(&stats.tx_bytes))
                .count("rx_bytes", get(&stats.rx_bytes))
                .count("resets", get(&stats.resets))
                .count("closed", get(&stats.closed))
                .count("corrupt", get(&stats.corrupt))
                .millis("max_gap_ms", stats.rx_gap.take())
                .millis("longest_gap_ms", stats.rx_gap.longest())
                .maybe("problem", stats.first_problem().as_deref());
            json = json.object("tcp", &part);
        }
        if let Some((stats, _)) = &self.ping {
            let part = Json::part()
                .count("sent", get(&stats.sent))
                .count("received", get(&stats.received))
                .count("lost", get(&stats.lost))
                .millis("max_rtt_ms", stats.take_max_rtt());
            json = json.object("ping", &part);
        }
        json
    }
}

fn start_disk(options: &Options, reporter: &Reporter) -> std::io::Result<Load> {
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

fn disk_json(stats: &workload::load::LoadStats) -> Json {
    Json::part()
        .count("read_bytes", get(&stats.read_bytes))
        .count("written_bytes", get(&stats.written_bytes))
        .count("verified_bytes", get(&stats.verified_bytes))
        .count("requests", get(&stats.requests))
        .count("flushes", get(&stats.flushes))
        .count("errors", get(&stats.errors))
        .count("corrupt", get(&stats.corrupt))
        .millis("max_read_ms", stats.reads.take())
        .millis("max_write_ms", stats.writes.take())
        .millis("longest_read_ms", stats.reads.longest())
        .millis("longest_write_ms", stats.writes.longest())
        .maybe("problem", stats.first_problem().as_deref())
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Relaxed)
}

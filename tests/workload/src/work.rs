//! A guest's running loads: progress lines while they run, totals and a verdict at their end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::load::{Load, LoadStats};
use crate::ping::PingStats;
use crate::report::{Json, Report};
use crate::stream::StreamStats;

/// How long requests to the disk may take at the end.
const DISK_END: Duration = Duration::from_secs(20);
/// How long the network's loads may take at the end.
const NET_END: Duration = Duration::from_secs(9);

/// Why a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The time is over.
    Time,
    /// Someone asked for power off.
    PowerOff,
    /// Someone asked for a reboot.
    Reboot,
}

impl End {
    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::PowerOff => "poweroff",
            Self::Reboot => "reboot",
        }
    }
}

/// The running loads. Those that were not asked for, or could not start, are absent.
#[derive(Debug, Default)]
pub struct Work {
    /// True: the network's loads are to end.
    pub stop: Arc<AtomicBool>,
    /// The disk's load.
    pub disk: Option<Load>,
    /// Numbers of the TCP stream.
    pub tcp: Option<Arc<StreamStats>>,
    /// Numbers of the pings.
    pub ping: Option<Arc<PingStats>>,
    /// What runs `tcp` and `ping`.
    pub threads: Vec<JoinHandle<()>>,
}

impl Work {
    /// Reports progress until someone asks for an end or the time is over.
    pub fn watch(
        &self,
        interval: Duration,
        limit: Option<Duration>,
        reporter: &dyn Report,
        end: &Receiver<End>,
    ) -> End {
        let start = Instant::now();
        let interval = interval.max(Duration::from_millis(10));
        let idle = self.disk.is_none() && self.threads.is_empty();
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
    pub fn stop(mut self, reporter: &dyn Report) -> bool {
        self.stop.store(true, Relaxed);
        let mut clean = true;
        if let Some(load) = self.disk.take() {
            let stats = Arc::clone(&load.stats);
            if !load.stop(DISK_END) {
                clean = false;
                reporter.error("disk", &"a request was still waiting 20 s after the end");
            }
            clean &= get(&stats.errors) + get(&stats.corrupt) == 0;
            reporter.line(&Json::new("disk_end").object("disk", &disk(&stats)));
        }
        let limit = Instant::now() + NET_END;
        while self.threads.iter().any(|t| !t.is_finished()) && Instant::now() < limit {
            thread::sleep(Duration::from_millis(10));
        }
        clean &= self.threads.iter().all(JoinHandle::is_finished);
        if let Some(stats) = &self.tcp {
            clean &= get(&stats.resets) + get(&stats.corrupt) == 0;
        }
        reporter.line(&self.progress("total"));
        clean
    }

    fn progress(&self, event: &str) -> Json {
        let mut json = Json::new(event);
        if let Some(load) = &self.disk {
            json = json.object("disk", &disk(&load.stats));
        }
        if let Some(stats) = &self.tcp {
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
        if let Some(stats) = &self.ping {
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

fn disk(stats: &LoadStats) -> Json {
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

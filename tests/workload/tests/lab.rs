//! The load and the pings against the real kernel of the lab.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;
use workload::load::{Load, LoadConfig, OsDevice};
use workload::ping::{self, PingStats};

#[test]
#[ignore = "lab: direct I/O on tmpfs needs Linux 6.6"]
fn lab_direct_io() {
    let path = Path::new("/tmp/workload-direct-io");
    File::create(path).and_then(|f| f.set_len(16 << 20)).expect("file");
    let device = OsDevice::open(path).expect("open");
    let load = Load::start(Arc::new(device), &LoadConfig::default()).expect("start");
    let stats = Arc::clone(&load.stats);
    thread::sleep(Duration::from_millis(500));
    assert!(load.stop(Duration::from_secs(20)));
    assert_eq!(stats.first_problem(), None);
    assert!(stats.verified_bytes.load(Relaxed) > 1 << 20);
    fs::remove_file(path).expect("remove");
}

#[test]
#[ignore = "lab: opens ICMP sockets to every group"]
fn lab_ping_loopback() {
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").expect("sysctl");
    let (stop, stats) = (AtomicBool::new(false), PingStats::default());
    thread::scope(|s| {
        s.spawn(|| {
            ping::run(Ipv4Addr::LOCALHOST, Duration::from_millis(20), &stop, &stats).expect("ping");
        });
        thread::sleep(Duration::from_millis(500));
        stop.store(true, Relaxed);
    });
    let sent = stats.sent.load(Relaxed);
    assert!(sent > 5);
    assert_eq!(stats.received.load(Relaxed), sent);
    assert_eq!(stats.lost.load(Relaxed), 0);
}

//! First process of a Linux guest: brings the guest up, runs the verified load that the kernel
//! command line asks for, reports on the console, and powers off or reboots on request.
//!
//! Reports are lines `BH: {json}`; all else on the console is the kernel's or a shell's.
//!
//! | on the command line | meaning |
//! |---|---|
//! | `bh.ip=A.B.C.D/N` `bh.gw=A.B.C.D` `bh.nic=eth0` | static address of the NIC, given again when the NIC is unplugged and plugged in |
//! | `bh.work=disk,tcp,ping` | which loads run (none: the guest is idle) |
//! | `bh.disk=xvda` `bh.span=MIB` `bh.threads=N` `bh.max_blocks=N` `bh.disk_pause_us=N` | the disk load |
//! | `bh.peer=IP:PORT` `bh.rate=BYTES_PER_S` | the TCP load |
//! | `bh.ping=IP` `bh.ping_ms=N` | the ping load (default: the peer, 100 ms) |
//! | `bh.run=SCRIPT` | a line for busybox's shell, spaces and the like as `%20`; what it says comes as `run` lines, its end as `run_end`. May be there several times: one after the other |
//! | `bh.fs=xvda,xvdb` | an ext4 is made, stressed and checked on each disk, and changes of its size are told; one that is not there yet is waited for. Needs an image with tools |
//! | `bh.blkfront=max_ring_page_order=2,…` | parameters of the module xen_blkfront |
//! | `bh.seed=N` | seed of contents and choices |
//! | `bh.seconds=N` | ends the load and powers off after so long |
//! | `bh.interval_ms=N` | time between progress lines (default 250) |
//! | `bh.shell` | a shell on the console |
//!
//! Called as `poweroff`, `reboot` or `halt` (the kernel does so when the toolstack asks for it
//! through xenstore) it signals process 1.

mod fs;
mod options;
mod report;
mod run;
mod stuck;
mod system;
mod work;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use options::Options;
use report::Reporter;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use workload::report::{Json, Report};
use workload::work::End;

fn main() -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    match Path::new(&name).file_name().and_then(|n| n.to_str()) {
        Some("poweroff") => signal_init(Signal::SIGUSR2),
        Some("halt") => signal_init(Signal::SIGUSR1),
        Some("reboot") => signal_init(Signal::SIGTERM),
        _ if std::process::id() != 1 => {
            eprintln!("guest-agent: runs as process 1 of a guest");
            ExitCode::FAILURE
        }
        _ => init(),
    }
}

/// The signals that busybox's init listens to, so that its tools work as well.
fn signal_init(signal: Signal) -> ExitCode {
    match kill(Pid::from_raw(1), signal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("guest-agent: cannot signal process 1: {e}");
            ExitCode::FAILURE
        }
    }
}

fn init() -> ExitCode {
    // Before any thread starts, so that all of them inherit the mask.
    let signals = SigSet::from_iter([
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGCHLD,
    ]);
    signals.thread_block().ok();
    let mounted = system::mounts();
    // For as long as the guest runs.
    let reporter: &'static Reporter = Box::leak(Box::new(Reporter::open()));
    boot_line(reporter);
    if let Err(e) = mounted {
        reporter.error("mount", &e);
    }
    let options = Options::read();
    let (ends, end) = mpsc::channel();
    thread::spawn(move || watch_signals(&signals, &ends));

    system::load_modules(&options.blkfront, reporter);
    if options.shell {
        thread::spawn(system::shell);
    }
    if let Some(ip) = options.ip.clone() {
        let (nic, gateway) = (options.nic.clone(), options.gateway.clone());
        if let Err(e) = system::network(&nic, &ip, gateway.as_deref()) {
            reporter.error("net", &e);
        }
        thread::spawn(move || system::keep_network(&nic, &ip, gateway.as_deref(), reporter));
    }
    for disk in options.fs.clone() {
        thread::spawn(move || fs::tell(&disk, reporter));
    }
    let scripts = options.run.clone();
    thread::spawn(move || run::all(&scripts, reporter));
    let work = work::start(&options, reporter);
    let limit = options.seconds.map(Duration::from_secs);
    let why = work.watch(Duration::from_millis(options.interval_ms), limit, reporter, &end);
    let clean = work.stop(reporter);
    reporter.line(&Json::new("end").text("why", why.name()).flag("clean", clean));
    system::finish(why)
}

/// Tells of the kernel, of what it runs on and of this boot, in one line and first of all.
fn boot_line(reporter: &dyn Report) {
    let read =
        |path: &str| std::fs::read_to_string(path).map_or_else(|_| String::new(), |s| s.trim().to_owned());
    let uptime = read("/proc/uptime");
    let seconds: f64 = uptime.split(' ').next().and_then(|s| s.parse().ok()).unwrap_or(0.0);
    reporter.line(
        &Json::new("boot")
            .text("kernel", &read("/proc/sys/kernel/osrelease"))
            .text("hypervisor", &read("/sys/hypervisor/type"))
            .text("boot_id", &read("/proc/sys/kernel/random/boot_id"))
            .number("uptime_ms", seconds * 1000.0)
            .number("cpus", system::cpus() as f64),
    );
}

/// Reaps orphans, as process 1 must, and turns the other signals into an end.
fn watch_signals(signals: &SigSet, ends: &mpsc::Sender<End>) {
    loop {
        let end = match signals.wait() {
            Ok(Signal::SIGUSR1 | Signal::SIGUSR2) => End::PowerOff,
            Ok(Signal::SIGTERM | Signal::SIGINT) => End::Reboot,
            _ => {
                system::reap();
                continue;
            }
        };
        if ends.send(end).is_err() {
            return;
        }
    }
}

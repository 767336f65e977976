//! One run: a system, a guest under load, and the kills. The demo, the kill tests and the soak runs are all this.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use workload::stream::{self, StreamConfig, StreamStats};

use crate::kills::{self, Kill, Pauses, Rng};
use crate::outcome::{Outcome, Totals, totals};
use crate::outside::{ADDRESS, PREFIX};
use crate::progress::{Progress, Seen};
use crate::system::{Config, NETBACK, System, bridge_name};

const GUEST: &str = "demo";
const GUEST_IP: &str = "10.77.0.2";
/// The port of the outside's end of TCP streams.
pub const PEER_PORT: u16 = 7007;
const DISK_MIB: u64 = 128;
/// A component that is not back by then has failed.
const RESTART_LIMIT: Duration = Duration::from_secs(20);

/// The guest under load.
#[derive(Clone, Debug)]
pub enum Guest {
    /// `process-guest`.
    Process,
    /// A Linux guest as a PVH domain.
    Linux {
        /// For people.
        name: String,
        /// A bzImage or ELF kernel.
        kernel: PathBuf,
        /// An initramfs with the guest agent.
        initrd: PathBuf,
        /// 1 to 8.
        vcpus: u32,
    },
    /// The same Linux guest as a machine that QEMU emulates in software.
    Qemu {
        /// For people.
        name: String,
        /// A bzImage.
        kernel: PathBuf,
        /// An initramfs with the guest agent.
        initrd: PathBuf,
        /// 1 to 8.
        vcpus: u32,
    },
}

/// A run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The guest.
    pub guest: Guest,
    /// Kills over all components.
    pub kills: usize,
    /// Time over which they are spread; zero: each as soon as the one before is over.
    pub duration: Duration,
    /// Of all choices.
    pub seed: u64,
}

/// Who is told what happens.
pub trait Observer {
    /// A stage begins or is done.
    fn stage(&self, text: &str);
    /// Between kills.
    fn waiting(&self, text: &str, totals: Totals);
    /// After a kill.
    fn kill(&self, number: usize, of: usize, victims: &str, pause: Duration, totals: Totals);
}

/// Nobody looks.
#[derive(Clone, Copy, Debug)]
pub struct Quiet;

impl Observer for Quiet {
    fn stage(&self, _: &str) {}
    fn waiting(&self, _: &str, _: Totals) {}
    fn kill(&self, _: usize, _: usize, _: &str, _: Duration, _: Totals) {}
}

/// Runs it.
///
/// # Errors
/// If the system or the guest does not come up. What goes wrong later is in the [`Outcome`].
pub fn run(run: &Run, config: Config, screen: &dyn Observer) -> Result<Outcome> {
    screen
        .stage("starting hv-core, which starts dom0-supervisor, xenstored, netback and the console backend");
    let system = System::start(config)?;
    let bin_dir = system.bin_dir().to_path_buf();
    let peer = Peer::start(&system)?;

    let disk = system.dir().join("demo.img");
    std::fs::File::create(&disk)?.set_len(DISK_MIB << 20)?;
    let what = match &run.guest {
        Guest::Process => "a process guest",
        Guest::Linux { name, .. } | Guest::Qemu { name, .. } => name,
    };
    screen.stage(&format!("creating the guest: {what}, {DISK_MIB} MiB disk by blkback, NIC by netback"));
    let created = Instant::now();
    system.create(&domain_file(run, &bin_dir, &disk))?;
    let (progress, _console) = system.console(GUEST);
    let booted = progress.wait(Duration::from_secs(90), |seen| seen.boots > 0);
    let boot_ms = created.elapsed().as_millis() as u64;
    if !booted || !progress.wait(Duration::from_secs(60), under_load) {
        let seen = progress.lock();
        let text: Vec<&str> = seen.text.iter().map(String::as_str).collect();
        bail!(
            "the guest is {}\n--- its console\n{}\n--- its last word\n{}\n{}",
            if booted { "up but not under load" } else { "not up after 90 s" },
            text.join("\n"),
            seen.lines.last().map(|l| l.1.to_string()).unwrap_or_default(),
            system.log_tail(25)
        );
    }
    let boot =
        progress.lock().lines.iter().find(|l| l.1["ev"] == "boot").map(|l| l.1.clone()).unwrap_or_default();
    let word = |key: &str| boot[key].as_str().unwrap_or_default().to_owned();
    let mut outcome = Outcome {
        hardware: !in_lab() && matches!(run.guest, Guest::Linux { .. }),
        lab: in_lab(),
        kernel: word("kernel"),
        hypervisor: word("hypervisor"),
        boot_ms,
        ..Outcome::default()
    };
    screen.stage(&format!(
        "guest up after {:.1} s: {} on {}",
        boot_ms as f64 / 1000.0,
        outcome.kernel,
        outcome.hypervisor
    ));
    if let Err(e) = kill_all(run, &system, &progress, screen, &mut outcome) {
        outcome.failures.push(format!("{e:#}"));
    }
    // A last look, when nothing has been killed for a while.
    std::thread::sleep(Duration::from_secs(1));
    let seen = progress.lock();
    outcome.totals = seen.last.clone();
    outcome.restarts = seen.boots.saturating_sub(1);
    outcome.longest_stall_ms = seen.lines.iter().map(|l| stall_ms(&l.1)).fold(0.0, f64::max);
    for (_, line) in seen.lines.iter().filter(|l| l.1["ev"] == "error") {
        outcome.failures.push(format!("the guest says: {} {}", line["part"], line["what"]));
    }
    drop(seen);
    outcome.peer_resets = peer.stats.resets.load(Ordering::Relaxed);
    outcome.peer_corrupt = peer.stats.corrupt.load(Ordering::Relaxed);
    peer.stop();
    if !outcome.problems().is_empty() {
        outcome.evidence = system.log_tail(40);
    }
    Ok(outcome)
}

fn in_lab() -> bool {
    std::env::var_os("BH_LAB").is_some()
}

/// The outside's end of the TCP stream, at [`PEER_PORT`] of [`ADDRESS`].
#[derive(Debug)]
pub struct Peer {
    /// What it saw.
    pub stats: Arc<StreamStats>,
    stop: Arc<AtomicBool>,
}

impl Peer {
    /// Listens.
    ///
    /// # Errors
    /// bind(2)'s.
    pub fn start(system: &System) -> Result<Peer> {
        let stats = Arc::new(StreamStats::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, config) = (stats.clone(), StreamConfig { rate: 1 << 20, stop: stop.clone() });
        system.outside.run(move || -> Result<()> {
            let listener = TcpListener::bind((ADDRESS, PEER_PORT)).context("listening outside")?;
            std::thread::spawn(move || {
                if let Err(e) = stream::serve(&listener, &config, &shared) {
                    eprintln!("outside: {e}");
                }
            });
            Ok(())
        })??;
        Ok(Peer { stats, stop })
    }

    /// Takes no more connections.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn domain_file(run: &Run, bin_dir: &Path, disk: &Path) -> String {
    let devices = format!(
        "\n[[disk]]\nvdev = \"xvda\"\npath = \"{}\"\n\n[[vif]]\nbackend = \"{NETBACK}\"\nmac = \"00:16:3e:77:00:02\"\n",
        disk.display()
    );
    let network = format!("{GUEST_IP}/{PREFIX}");
    match &run.guest {
        Guest::Linux { kernel, initrd, vcpus, .. } => format!(
            "name = \"{GUEST}\"\ntype = \"pvh\"\nkernel = \"{}\"\nramdisk = \"{}\"\nmemory = 256\nvcpus = {vcpus}\n\
             cmdline = \"console=hvc0 quiet panic=1 bh.ip={network} bh.gw={ADDRESS} bh.peer={ADDRESS}:{PEER_PORT} \
             bh.work=disk,tcp,ping bh.seed={} bh.disk_pause_us=2000\"\n{devices}",
            kernel.display(),
            initrd.display(),
            run.seed,
        ),
        Guest::Qemu { kernel, initrd, vcpus, .. } => format!(
            "name = \"{GUEST}\"\ntype = \"qemu\"\naccel = \"tcg\"\nwhole_memory = true\nkernel = \"{}\"\nramdisk = \"{}\"\n\
             memory = 256\nvcpus = {vcpus}\n\
             cmdline = \"console=ttyS0 quiet panic=1 mitigations=off bh.disk=vda bh.ip={network} bh.gw={ADDRESS} bh.peer={ADDRESS}:{PEER_PORT} \
             bh.work=disk,tcp,ping bh.seed={} bh.disk_pause_us=2000\"\n{devices}",
            kernel.display(),
            initrd.display(),
            run.seed,
        ),
        Guest::Process => format!(
            "name = \"{GUEST}\"\ntype = \"process\"\nprogram = \"{}\"\n\
             args = [\"--ip\", \"{network}\", \"--gateway\", \"{ADDRESS}\", \"--peer\", \"{ADDRESS}:{PEER_PORT}\", \"--seed\", \"{}\"]\n\
             {devices}",
            bin_dir.join("process-guest").display(),
            run.seed,
        ),
    }
}

fn under_load(seen: &Seen) -> bool {
    let t = totals(&seen.last);
    t.verified > 0 && t.tcp > 0 && t.pings > 0
}

fn disk_stall_ms(line: &Value) -> f64 {
    let ms = |key: &str| line["disk"][key].as_f64().unwrap_or(0.0);
    ms("max_read_ms").max(ms("max_write_ms"))
}

fn net_stall_ms(line: &Value) -> f64 {
    let ms = |part: &str, key: &str| line[part][key].as_f64().unwrap_or(0.0);
    ms("tcp", "max_gap_ms").max(ms("ping", "max_rtt_ms"))
}

fn stall_ms(line: &Value) -> f64 {
    disk_stall_ms(line).max(net_stall_ms(line))
}

fn kill_all(
    run: &Run,
    system: &System,
    progress: &Progress,
    screen: &dyn Observer,
    outcome: &mut Outcome,
) -> Result<()> {
    let services = system.services()?;
    let blkback = services.keys().find(|n| n.starts_with("blkback")).context("no blkback service")?.clone();
    let mut components = vec!["dom0-supervisor".to_owned(), "xenstored".into(), NETBACK.into(), blkback];
    if matches!(run.guest, Guest::Qemu { .. }) {
        components.push(bridge_name(GUEST));
    }
    let mut rng = Rng::new(run.seed);
    let plan = kills::plan(&components, run.kills, &mut rng);
    let mut pauses = Pauses::default();
    let start = Instant::now();
    let slot = run.duration / (run.kills.max(1) as u32);
    let result = (|| {
        for (i, kill) in plan.iter().enumerate() {
            // A random moment of this kill's slot; at once if the one before took longer.
            let at = slot * i as u32 + rng.between(Duration::ZERO, slot.mul_f64(0.7));
            while let Some(left) = at.checked_sub(start.elapsed()).filter(|l| !l.is_zero()) {
                screen.waiting(&format!("{i}/{} kills", plan.len()), totals(&progress.lock().last));
                std::thread::sleep(left.min(Duration::from_millis(100)));
            }
            let pause = one_kill(kill, system, progress)?;
            pauses.add(&kill.row, pause);
            outcome.netback_kills += kill.victims.iter().filter(|v| *v == NETBACK).count() as u64;
            screen.kill(i + 1, plan.len(), &kill.victims.join(" + "), pause, totals(&progress.lock().last));
        }
        if plan.is_empty() {
            std::thread::sleep(run.duration);
        }
        Ok(())
    })();
    let rows = components.iter().map(String::as_str).chain([kills::SEVERAL]);
    outcome.rows = rows.map(|row| (row.to_owned(), pauses.summary(row))).collect();
    result
}

/// Kills, waits until all is back and the guest has gone on, and gives the longest pause that the guest saw since.
fn one_kill(kill: &Kill, system: &System, progress: &Progress) -> Result<Duration> {
    let (from, before) = {
        let seen = progress.lock();
        (seen.lines.len(), totals(&seen.last))
    };
    let victims = system.kill(&kill.victims)?;
    system.wait_restarted(&victims, RESTART_LIMIT)?;
    let after = totals(&progress.lock().last);
    // The guest is past the pause when disk and TCP have moved since everything was back, and one line more: the pause that a
    // request saw is told when it ends.
    let moved = |seen: &Seen| {
        let now = totals(&seen.last);
        now.verified > before.verified.max(after.verified)
            && now.tcp > before.tcp.max(after.tcp)
            && now.pings > before.pings
    };
    if !progress.wait(RESTART_LIMIT, moved) {
        bail!(
            "the guest stood still for {} s after the kill of {}",
            RESTART_LIMIT.as_secs(),
            kill.victims.join(" and ")
        );
    }
    let lines = progress.lock().lines.len();
    progress.wait(Duration::from_secs(2), |seen| seen.lines.len() > lines);
    let seen = progress.lock();
    let stalls = seen.lines[from..].iter().map(|(_, line)| match kill.row.as_str() {
        row if row.starts_with("blkback") => disk_stall_ms(line),
        row if row == NETBACK => net_stall_ms(line),
        _ => stall_ms(line),
    });
    Ok(Duration::from_secs_f64(stalls.fold(0.0, f64::max) / 1000.0))
}

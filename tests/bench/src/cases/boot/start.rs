//! From the command that creates a guest to its userspace, beside QEMU's microvm with KVM for the same kernel and RAM disk.

use std::cell::RefCell;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::system::{Config, System};

use super::Image;
use super::memory::resident_kib;
use super::terminal::Terminal;
use super::timeline::{Runner, Timeline, time_of_day};
use crate::cases::Settings;
use crate::cases::world::listed;
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;

/// Boots counted, after one that warms up: an emulated boot takes ten seconds and more.
const ROUNDS: usize = 3;
/// RAM of the guests, MiB.
pub(crate) const MEMORY: u32 = 256;
/// What the guest's first process prints first.
pub(crate) const USERSPACE: &str = "BH: {\"ev\":\"boot\"";
/// Longest boot.
pub(crate) const BOOT: Duration = Duration::from_secs(120);
/// The goal for hv-vcpu, MiB.
const RESIDENT: f64 = 5.0;

/// The lines.
pub fn lines(settings: &Settings, image: &Image) -> Result<Vec<Line>> {
    let config = Config { bin_dir: settings.bin_dir.clone(), ..Config::of_this_build()? };
    let system = System::start(config)?;
    let resident = RefCell::new(Series::default());
    let (ours_times, microvm_times) = (RefCell::new(Timeline::default()), RefCell::new(Timeline::default()));
    let mut microvm_failed = None;
    let series = take_turns(
        ROUNDS,
        &mut [
            Contestant::new("a PVH domain", || ours(&system, image, &resident, &ours_times)),
            Contestant::new("QEMU microvm", || {
                Ok(microvm(image, &microvm_times).unwrap_or_else(|error| {
                    microvm_failed = Some(format!("QEMU microvm: {error:#}"));
                    f64::NAN
                }))
            }),
        ],
    )
    .inspect_err(|_| crate::cases::show_log(&system))?;
    let [ours, limit]: [Series; 2] = series.try_into().ok().context("as many series as contestants")?;
    let boot = Line::beside(
        "create to userspace, PVH Debian",
        "s",
        &ours,
        ("QEMU microvm", &limit),
        Goal::RatioAtMost(1.0),
    );
    let known = "both without disk and NIC, `bh create` and console included; elsewhere under the same kind of emulation: Xen \
                 4.17 14 s (29.9 s with devices), QEMU 10's Xen emulation 7 to 8 s";
    let boot = boot.note(microvm_failed.unwrap_or_else(|| known.into()));
    let resident = resident.into_inner();
    let memory = Line {
        samples: resident.len(),
        ..Line::under("resident memory of an idle hv-vcpu", "MiB", resident.median(), RESIDENT)
    };
    let mut lines = vec![boot];
    lines.extend(ours_times.into_inner().lines(&microvm_times.into_inner()));
    lines.push(memory.note("guest RAM left out; pages of the program file counted in full"));
    Ok(lines)
}

/// Command line words for a guest that does nothing.
fn cmdline(console: &str) -> String {
    format!("console={console} quiet panic=-1 bh.work=none")
}

fn ours(
    system: &System,
    image: &Image,
    resident: &RefCell<Series>,
    times: &RefCell<Timeline>,
) -> Result<f64> {
    let domain_file = image.domain_file("boot", "pvh", &cmdline("hvc0"), MEMORY, "");
    let began = time_of_day();
    let start = Instant::now();
    system.create(&domain_file)?;
    let mut console = console(system, "boot", USERSPACE)?;
    let seconds = start.elapsed().as_secs_f64();
    let log = std::fs::read_to_string(system.dir().join("run/log/boot.log")).context("the runner's log")?;
    let runner = Runner::from_log(&log).context("the runner's log does not tell of its start")?;
    times.borrow_mut().push(seconds, uptime(&mut console)?, Some((began, runner)));
    // Idle means settled: the agent has loaded its modules and waits.
    std::thread::sleep(Duration::from_secs(2));
    let guest = listed(system, "boot")?;
    let pid = guest["host_pid"].as_i64().and_then(|p| i32::try_from(p).ok()).unwrap_or(0);
    ensure!(pid > 0, "the guest has no process");
    resident.borrow_mut().push(resident_kib(pid)? as f64 / 1024.0);
    drop(console);
    system.bh_ok(&["destroy", "boot"])?;
    Ok(seconds)
}

/// A guest's console, `mark` having been seen on it. It is not there yet when a guest has just been made.
pub(crate) fn console(system: &System, guest: &str, mark: &str) -> Result<Terminal> {
    let deadline = Instant::now() + BOOT;
    loop {
        let mut terminal = Terminal::start(system.bh_command(&["console", guest]))?;
        match terminal.expect(mark, deadline.saturating_duration_since(Instant::now())) {
            Ok(_) => return Ok(terminal),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Seconds that the guest's kernel had run when its first process began: the next number of the line that was just begun.
fn uptime(console: &mut Terminal) -> Result<f64> {
    let rest = console.expect("\"cpus\"", BOOT)?;
    let ms =
        rest.split_once("\"uptime_ms\":").and_then(|(_, rest)| rest.split(',').next()?.parse::<f64>().ok());
    Ok(ms.with_context(|| format!("no uptime in {rest}"))? / 1000.0)
}

/// A QEMU microvm without anything but a serial console.
pub(crate) fn microvm_command(image: &Image, words: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,accel=kvm,x-option-roms=off,isa-serial=on,rtc=on"])
        .args(["-cpu", "host", "-m", &format!("{MEMORY}M"), "-smp", "1"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-append", &format!("{} {words}", cmdline("ttyS0"))]);
    command
}

fn microvm(image: &Image, times: &RefCell<Timeline>) -> Result<f64> {
    let start = Instant::now();
    let mut console = Terminal::start(microvm_command(image, ""))?;
    console.expect(USERSPACE, BOOT)?;
    let seconds = start.elapsed().as_secs_f64();
    times.borrow_mut().push(seconds, uptime(&mut console)?, None);
    Ok(seconds)
}

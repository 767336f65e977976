//! The Debian guest's disk in the lab: ours beside QEMU's virtio-blk and beside QEMU's emulated Xen block backend, with the same
//! kernel, RAM disk and load (io_uring in the guest).

use std::cell::RefCell;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_tests::system::{Config, System};
use serde_json::Value;

use super::speed::Workload;
use crate::cases::boot::start::{BOOT, MEMORY, USERSPACE, console, microvm_command};
use crate::cases::boot::terminal::Terminal;
use crate::cases::boot::{Image, hardware, in_lab};
use crate::cases::{Settings, or_missing, show_log};
use crate::disk::{Pattern, Sample};
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;

/// Rounds counted.
const ROUNDS: usize = 3;
/// Bytes of each disk.
const DISK: u64 = 64 << 20;
/// Length of a turn, milliseconds of the guest's clock.
const TURN_MS: u64 = 2000;
/// Longest turn.
const TURN: Duration = Duration::from_secs(60);
/// Version of Xen that QEMU plays: 4.17.
const XEN_VERSION: &str = "0x40011";

const NAMES: &[(&str, &str, &str)] = &[("block in the lab", "IOPS", ">= 1.00 x both peers")];

/// The lines; where there is no hardware virtualization, from inside the lab, with Debian 13's QEMU.
pub fn lines(settings: &Settings) -> Result<Vec<Line>> {
    let image = settings.image.as_ref().context("needs a guest image (leave out --no-lab)")?;
    if hardware(&settings.bin_dir) {
        return Ok(here(settings, image));
    }
    in_lab(settings, image, &["block", "--only", "lab"], &["--root", "debian13", "--memory", "3072"])
}

/// Measures on this machine.
pub fn here(settings: &Settings, image: &Image) -> Vec<Line> {
    or_missing(NAMES, measured(settings, image))
}

struct Guest {
    terminal: RefCell<Terminal>,
    device: &'static str,
}

fn measured(settings: &Settings, image: &Image) -> Result<Vec<Line>> {
    let dir = tempfile::Builder::new().prefix("bh-bench-").tempdir()?;
    let disk = |name: &str| -> Result<std::path::PathBuf> {
        let path = dir.path().join(name);
        let file = File::create(&path)?;
        // Written in full, so that no request meets a hole.
        std::io::copy(&mut std::io::Read::take(std::io::repeat(0xa5), DISK), &mut &file)?;
        Ok(path)
    };
    let config = Config { bin_dir: settings.bin_dir.clone(), ..Config::of_this_build()? };
    let system = System::start(config)?;
    let ours = pvh(&system, image, &disk("ours")?).inspect_err(|_| show_log(&system))?;
    eprintln!("bench: our guest is up");
    let virtio = virtio(image, &disk("virtio")?);
    eprintln!("bench: virtio: {}", said(&virtio));
    let xen = xen(image, &disk("xen")?);
    eprintln!("bench: QEMU's Xen: {}", said(&xen));
    let mut lines = Vec::new();
    for workload in super::speed::IN_LAB {
        let result = contest(&workload, &ours, &[("virtio-blk", &virtio), ("QEMU's xen-disk", &xen)]);
        lines.extend(or_missing(&[(workload.name, "IOPS", "")], result));
        eprintln!("bench: lab, {}: measured", workload.name);
    }
    Ok(lines)
}

fn said(guest: &Result<Guest>) -> String {
    guest.as_ref().map_or_else(|e| format!("{e:#}"), |_| "up".into())
}

fn contest(workload: &Workload, ours: &Guest, peers: &[(&'static str, &Result<Guest>)]) -> Result<Vec<Line>> {
    let pattern = Pattern { ms: TURN_MS, span: DISK, ..workload.pattern() };
    let guests: Vec<(&'static str, std::result::Result<&Guest, String>)> =
        std::iter::once(("ours", Ok(ours)))
            .chain(peers.iter().map(|(n, g)| (*n, g.as_ref().map_err(|e| format!("{e:#}")))))
            .collect();
    let samples: Vec<RefCell<Vec<Sample>>> = guests.iter().map(|_| RefCell::default()).collect();
    let mut contestants: Vec<Contestant<'_>> = guests
        .iter()
        .zip(&samples)
        .map(|((name, guest), samples)| {
            Contestant::new(name, || {
                let Ok(guest) = guest else { return Ok(f64::NAN) };
                let sample = guest.turn(&pattern)?;
                samples.borrow_mut().push(sample);
                Ok(sample.iops)
            })
        })
        .collect();
    take_turns(ROUNDS, &mut contestants)?;
    drop(contestants);
    // The first was to warm up.
    let of = |i: usize, f: &dyn Fn(&Sample) -> f64| -> Series {
        Series::new(samples[i].borrow().iter().skip(1).map(f).collect())
    };
    let (unit, scale) = workload.unit();
    let mut lines = Vec::new();
    for (i, (peer, guest)) in guests.iter().enumerate().skip(1) {
        let name = format!("lab {}: throughput beside {peer}", workload.name);
        lines.push(match guest {
            Ok(_) => {
                let speed = |s: &Sample| s.iops * scale;
                Line::beside(&name, unit, &of(0, &speed), (*peer, &of(i, &speed)), Goal::RatioAtLeast(1.0))
            }
            Err(why) => Line::missing(&name, unit, &format!(">= 1.00 x {peer}"), why),
        });
    }
    for (what, f) in
        [("p50", (|s: &Sample| s.p50) as fn(&Sample) -> f64), ("p99", |s| s.p99), ("p99.9", |s| s.p999)]
    {
        let ours = of(0, &f);
        let mut line = Line {
            name: format!("lab {}: {what}", workload.name),
            unit: "us".into(),
            ours: Some(ours.median()),
            samples: ours.len(),
            ..Line::default()
        };
        for (i, (peer, _)) in guests.iter().enumerate().skip(1) {
            line = line.peer(peer, &of(i, &f));
        }
        lines.push(line);
    }
    Ok(lines)
}

fn pvh(system: &System, image: &Image, disk: &Path) -> Result<Guest> {
    system.create(&format!(
        r#"name = "disk"
type = "pvh"
kernel = "{}"
ramdisk = "{}"
cmdline = "console=hvc0 quiet panic=-1 bh.work=none bh.shell"
memory = {MEMORY}

[[disk]]
vdev = "xvda"
path = "{}"
"#,
        image.kernel.display(),
        image.initrd.display(),
        disk.display(),
    ))?;
    Guest { terminal: RefCell::new(console(system, "disk", USERSPACE)?), device: "/dev/xvda" }.up()
}

fn virtio(image: &Image, disk: &Path) -> Result<Guest> {
    let mut command = microvm_command(image, "bh.shell");
    command
        .args(["-drive", &format!("id=d,if=none,format=raw,cache=none,file={}", disk.display())])
        .args(["-device", "virtio-blk-device,drive=d"]);
    Guest::of(command, "/dev/vda")
}

/// A PC, for there is no Xen emulation on the microvm.
fn xen(image: &Image, disk: &Path) -> Result<Guest> {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", &format!("kvm,xen-version={XEN_VERSION},kernel-irqchip=split"), "-M", "q35"])
        .args(["-cpu", "host", "-m", &format!("{MEMORY}M"), "-smp", "1", "-nodefaults", "-no-user-config"])
        .args(["-no-reboot", "-display", "none", "-serial", "stdio", "-kernel"])
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-append", "console=ttyS0 quiet panic=-1 bh.work=none bh.shell"])
        .args(["-drive", &format!("id=d,if=none,format=raw,cache=none,file={}", disk.display())])
        .args(["-device", "xen-disk,drive=d,vdev=xvda"]);
    Guest::of(command, "/dev/xvda")
}

impl Guest {
    fn of(command: Command, device: &'static str) -> Result<Guest> {
        let mut terminal = Terminal::start(command)?;
        terminal.expect(USERSPACE, BOOT)?;
        Guest { terminal: RefCell::new(terminal), device }.up()
    }

    fn up(self) -> Result<Guest> {
        let mut terminal = self.terminal.borrow_mut();
        terminal.type_line("")?;
        terminal.expect("guest#", BOOT)?;
        terminal.run("busybox stty -echo", TURN)?;
        terminal.run(&format!("while ! [ -b {} ]; do sleep 0.1; done", self.device), TURN)?;
        drop(terminal);
        Ok(self)
    }

    fn turn(&self, pattern: &Pattern) -> Result<Sample> {
        let command = format!("/bench-disk {} '{}'", self.device, serde_json::to_string(pattern)?);
        let said = self.terminal.borrow_mut().run(&format!("{command} 2>&1"), TURN)?;
        let json = said.lines().find_map(|line| {
            let (from, to) = (line.find("{\"iops\"")?, line.rfind('}')?);
            serde_json::from_str::<Value>(line.get(from..=to)?).ok()
        });
        let json = json.with_context(|| format!("bench-disk said: {said}"))?;
        Ok(serde_json::from_value(json)?)
    }
}

//! The Debian guest's disk in the lab: ours beside QEMU's virtio-blk and beside QEMU's emulated Xen block backend, with the same
//! kernel, RAM disk and load (Debian's fio in the guest).

use std::cell::RefCell;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::system::{Config, System};
use serde_json::Value;

use super::speed::{IN_LAB, Workload};
use crate::cases::boot::start::{BOOT, USERSPACE, console};
use crate::cases::boot::terminal::Terminal;
use crate::cases::boot::{Image, hardware, in_lab, xvda};
use crate::cases::{Settings, or_missing, show_log};
use crate::disk::Sample;
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;

/// Most rounds counted: each takes a minute or so.
const MOST_ROUNDS: usize = 5;
/// Bytes of each disk.
const DISK: u64 = 64 << 20;
/// RAM of the guests, MiB: fio's image is large.
const MEMORY: u32 = 384;
/// Length of each of fio's jobs, milliseconds of the guest's clock.
const JOB_MS: u64 = 1000;
/// Longest turn.
const TURN: Duration = Duration::from_secs(60);
/// Version of Xen that QEMU plays: 4.17.
const XEN_VERSION: &str = "0x40011";
/// QEMU's accelerator otherwise.
pub(crate) const VIRTIO_ACCEL: &str = "kvm";

const NAMES: &[(&str, &str, &str)] = &[("block in the lab", "IOPS", ">= 1.00 x both peers")];

/// The lines; where there is no hardware virtualization, from inside the lab, with Debian 13's QEMU.
pub fn lines(settings: &Settings) -> Result<Vec<Line>> {
    let image = settings.image.as_ref().context("needs a guest image (leave out --no-lab)")?;
    let fio = image.fio.clone().context("needs a guest image with fio")?;
    let image = &Image { initrd: fio, ..image.clone() };
    if hardware(&settings.bin_dir) {
        return Ok(here(settings, image));
    }
    let rounds = settings.rounds.to_string();
    let only = settings.only.as_deref().filter(|only| only.starts_with("lab-")).unwrap_or("lab");
    let words = ["block", "--only", only, "--rounds", &rounds];
    in_lab(settings, image, &words, &["--root", "debian13", "--memory", "3072"])
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
    contest(settings, &ours, &[("virtio-blk", &virtio), ("QEMU's xen-disk", &xen)])
}

fn said(guest: &Result<Guest>) -> String {
    guest.as_ref().map_or_else(|e| format!("{e:#}"), |_| "up".into())
}

/// Each job by itself, the guests in turns: what disturbs the machine for longer than a turn is in all three.
fn contest(settings: &Settings, ours: &Guest, peers: &[(&'static str, &Result<Guest>)]) -> Result<Vec<Line>> {
    let guests: Vec<(&'static str, std::result::Result<&Guest, String>)> =
        std::iter::once(("ours", Ok(ours)))
            .chain(peers.iter().map(|(n, g)| (*n, g.as_ref().map_err(|e| format!("{e:#}")))))
            .collect();
    let mut lines = Vec::new();
    // The same work in L1 before each turn, milliseconds.
    let paces = RefCell::new(Series::default());
    let part = settings.only.as_deref().and_then(|only| only.strip_prefix("lab-"));
    for workload in IN_LAB.iter().filter(|w| part.is_none_or(|part| w.group().contains(part))) {
        let before = paces.borrow().len();
        let turns: Vec<RefCell<Vec<Sample>>> = guests.iter().map(|_| RefCell::default()).collect();
        let mut contestants: Vec<Contestant<'_>> = guests
            .iter()
            .zip(&turns)
            .map(|((name, guest), turns)| {
                let paces = &paces;
                Contestant::new(name, move || {
                    let Ok(guest) = guest else { return Ok(f64::NAN) };
                    paces.borrow_mut().push(pace());
                    let sample = guest.turn(workload).with_context(|| format!("fio on {name}"))?;
                    turns.borrow_mut().push(sample);
                    Ok(sample.iops)
                })
            })
            .collect();
        take_turns(settings.rounds.min(MOST_ROUNDS), &mut contestants)?;
        drop(contestants);
        let turns: Vec<Vec<Sample>> = turns.into_iter().map(RefCell::into_inner).collect();
        let (unit, scale) = workload.unit();
        for ((name, _), turns) in guests.iter().zip(&turns) {
            let all: Vec<String> = turns.iter().map(|s| format!("{:.0}", s.iops * scale)).collect();
            let p50: Vec<String> = turns.iter().map(|s| format!("{:.1}", s.p50 / 1000.0)).collect();
            let p99: Vec<String> = turns.iter().map(|s| format!("{:.0}", s.p99 / 1000.0)).collect();
            let (all, p50, p99) = (all.join(" "), p50.join(" "), p99.join(" "));
            eprintln!("bench: lab, {}: {name}: {all} {unit}; p50 {p50} ms, p99 {p99} ms", workload.name);
        }
        let pace: Vec<String> =
            paces.borrow().values()[before..].iter().map(|ms| format!("{ms:.1}")).collect();
        eprintln!("bench: lab, a fixed loop before each turn: {} ms", pace.join(" "));
        // The first turn was to warm up.
        let of = |i: usize, f: &dyn Fn(&Sample) -> f64| -> Series {
            Series::new(turns[i].iter().skip(1).map(f).collect())
        };
        for (i, (peer, guest)) in guests.iter().enumerate().skip(1) {
            let name = format!("lab {}: throughput beside {peer}", workload.name);
            lines.push(match guest {
                Ok(_) => {
                    let speed = |s: &Sample| s.iops * scale;
                    Line::beside(
                        &name,
                        unit,
                        &of(0, &speed),
                        (*peer, &of(i, &speed)),
                        Goal::RatioAtLeast(1.0),
                    )
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
            for (i, (peer, guest)) in guests.iter().enumerate().skip(1) {
                if guest.is_ok() {
                    line = line.peer(peer, &of(i, &f));
                }
            }
            lines.push(line);
        }
    }
    let paces = paces.into_inner();
    let (p10, p90) = (paces.percentile(0.1), paces.percentile(0.9));
    let note = format!("a fixed loop took {:.1} ms between turns ({p10:.1} to {p90:.1})", paces.median());
    eprintln!("bench: lab: {note}");
    lines.iter_mut().filter(|line| line.note.is_empty()).for_each(|line| line.note.clone_from(&note));
    Ok(lines)
}

/// How long a fixed number of instructions takes, milliseconds: whether others are on the machine.
fn pace() -> f64 {
    let start = Instant::now();
    let mut word = 1u64;
    for _ in 0..1_000_000 {
        word = std::hint::black_box(word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(7));
    }
    std::hint::black_box(word);
    start.elapsed().as_secs_f64() * 1000.0
}

fn pvh(system: &System, image: &Image, disk: &Path) -> Result<Guest> {
    let cmdline = "console=hvc0 quiet panic=-1 bh.work=none bh.shell";
    system.create(&image.domain_file("disk", "pvh", cmdline, MEMORY, &xvda(disk)))?;
    Guest { terminal: RefCell::new(console(system, "disk", USERSPACE)?), device: "/dev/xvda" }.up()
}

/// On a PC as the Xen emulation's: QEMU 10's microvm said nothing at all in two minutes of the lab.
fn virtio(image: &Image, disk: &Path) -> Result<Guest> {
    Guest::of(with_disk(image, disk, VIRTIO_ACCEL, "virtio-blk-pci,drive=d"), "/dev/vda")
}

/// A PC, for there is no Xen emulation on the microvm.
fn xen(image: &Image, disk: &Path) -> Result<Guest> {
    Guest::of(with_disk(image, disk, &xen_accel(), "xen-disk,drive=d,vdev=xvda"), "/dev/xvda")
}

/// QEMU's accelerator when it plays Xen.
pub(crate) fn xen_accel() -> String {
    format!("kvm,xen-version={XEN_VERSION},kernel-irqchip=split")
}

fn with_disk(image: &Image, disk: &Path, accel: &str, device: &str) -> Command {
    let mut command = pc(image, accel, MEMORY, "console=ttyS0 quiet panic=-1 bh.work=none bh.shell");
    command
        .args(["-drive", &format!("id=d,if=none,format=raw,cache=none,file={}", disk.display())])
        .args(["-device", device]);
    command
}

/// A PC of QEMU's with a serial console alone; `memory` in MiB.
pub(crate) fn pc(image: &Image, accel: &str, memory: u32, words: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", accel, "-M", "q35"])
        .args(["-cpu", "host", "-m", &format!("{memory}M"), "-smp", "1", "-nodefaults", "-no-user-config"])
        .args(["-no-reboot", "-display", "none", "-serial", "stdio", "-kernel"])
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-append", words]);
    command
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

    /// Has fio run a job.
    fn turn(&self, workload: &Workload) -> Result<Sample> {
        let command = format!("{} {} 2>&1", fio(self.device, JOB_MS, DISK), workload.fio());
        let said = self.terminal.borrow_mut().run(&command, TURN)?;
        let samples = samples(&said).with_context(|| format!("fio said: {said}"))?;
        samples.first().copied().context("fio ran no job")
    }
}

/// fio's command, but for the jobs. Its latencies begin with the call that submits: on one processor the backend can have answered before
/// that call returns, and what comes after it (fio's own choice) would be next to nothing.
pub(crate) fn fio(device: &str, job_ms: u64, disk: u64) -> String {
    format!(
        "/usr/bin/fio --output-format=json --filename={device} --direct=1 --ioengine=io_uring --time_based \
         --runtime={job_ms}ms --size={disk} --unified_rw_reporting=mixed --lat_percentiles=1 --clat_percentiles=0 \
         --percentile_list=50:99:99.9 --eta=never --randrepeat=0"
    )
}

/// Each job of its report.
pub(crate) fn samples(said: &str) -> Result<Vec<Sample>> {
    let (from, to) = (said.find('{'), said.rfind('}'));
    let json = from.zip(to).and_then(|(from, to)| said.get(from..=to)).context("no report")?;
    let report: Value = serde_json::from_str(json)?;
    let jobs = report["jobs"].as_array().context("no jobs")?;
    let jobs = jobs.iter().map(|job| {
        ensure!(job["error"] == 0, "job {} failed", job["jobname"]);
        let all = &job["mixed"];
        let number = |value: &Value| value.as_f64().context("not a number");
        let latency =
            |percent: &str| -> Result<f64> { Ok(number(&all["lat_ns"]["percentile"][percent])? / 1000.0) };
        Ok(Sample {
            iops: number(&all["iops"])?,
            p50: latency("50.000000")?,
            p99: latency("99.000000")?,
            p999: latency("99.900000")?,
            requests: all["total_ios"].as_u64().unwrap_or(0),
            cpu: 0.0,
        })
    });
    jobs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fios_report_is_read() {
        let job = "{\"jobname\": \"a\", \"error\": 0, \"mixed\": {\"iops\": 12.5, \"total_ios\": 25, \"lat_ns\":\
                   {\"percentile\": {\"50.000000\": 1000, \"99.000000\": 2000, \"99.900000\": 3500}}}}";
        let said = format!("fio: a note\r\n{{\"jobs\": [\r\n{job}, {job}]}}\r\nguest#");
        let samples = samples(&said).unwrap();
        assert_eq!(samples.len(), 2);
        let (a, want) = (&samples[1], [12.5, 1.0, 2.0, 3.5]);
        assert_eq!(([a.iops, a.p50, a.p99, a.p999], a.requests), (want, 25));
        assert!(super::samples(&said.replace("\"error\": 0", "\"error\": 5")).is_err());
        assert!(super::samples("Killed").is_err());
    }
}

//! Requests through blkfront, ring, journal and blkback, beside io_uring on the same file and beside QEMU's storage daemon.

use std::cell::{Cell, RefCell};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::libc;
use serde_json::json;

use crate::cases::Settings;
use crate::cases::world::{DISK, World};
use crate::disk::{self, Pattern, Places, Sample, Target};
use crate::peers::storage_daemon::{Daemon, Driver, PROGRAM};
use crate::peers::uring;
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;

/// Length of one turn, milliseconds.
const TURN_MS: u64 = 250;
/// How long those who look for responses do so at most, microseconds.
const LOOK_US: u64 = 100;
/// The goal at queue depth 32.
const OF_IO_URING: f64 = 0.95;
/// The goal at queue depth 1: microseconds more than io_uring.
const MORE: f64 = 8.0;

/// A line of the table.
pub struct Workload {
    pub name: &'static str,
    writes: u32,
    bytes: usize,
    depth: u32,
    look_us: u64,
}

const fn small(name: &'static str, writes: u32, depth: u32, look_us: u64) -> Workload {
    Workload { name, writes, bytes: 4096, depth, look_us }
}

const fn large(name: &'static str, writes: u32) -> Workload {
    Workload { name, writes, bytes: 1 << 20, depth: 4, look_us: 0 }
}

pub const DEPTH_1: [Workload; 4] = [
    small("read 4 KiB, depth 1", 0, 1, 0),
    small("read 4 KiB, depth 1, looking", 0, 1, LOOK_US),
    small("write 4 KiB, depth 1", 100, 1, 0),
    small("write 4 KiB, depth 1, looking", 100, 1, LOOK_US),
];
pub const DEPTH_32: [Workload; 4] = [
    small("read 4 KiB, depth 32", 0, 32, 0),
    small("read 4 KiB, depth 32, looking", 0, 32, LOOK_US),
    small("write 4 KiB, depth 32", 100, 32, 0),
    small("write 4 KiB, depth 32, looking", 100, 32, LOOK_US),
];
pub const SEQUENTIAL: [Workload; 2] =
    [large("read 1 MiB in order, depth 4", 0), large("write 1 MiB in order, depth 4", 100)];
pub const MIXED: [Workload; 2] =
    [small("4 KiB, 70 % reads, depth 1", 30, 1, 0), small("4 KiB, 70 % reads, depth 32", 30, 32, 0)];

/// What is measured in a Linux guest.
pub const IN_LAB: [Workload; 7] = [
    small("read 4 KiB, depth 1", 0, 1, 0),
    small("write 4 KiB, depth 1", 100, 1, 0),
    small("read 4 KiB, depth 32", 0, 32, 0),
    small("write 4 KiB, depth 32", 100, 32, 0),
    large("read 1 MiB in order, depth 4", 0),
    large("write 1 MiB in order, depth 4", 100),
    small("4 KiB, 70 % reads, depth 32", 30, 32, 0),
];

impl Workload {
    pub fn pattern(&self) -> Pattern {
        Pattern {
            writes: self.writes,
            sequential: self.bytes > 4096,
            bytes: self.bytes,
            depth: self.depth,
            span: DISK,
            ms: TURN_MS,
            look_us: self.look_us,
        }
    }

    /// It as a job of fio's, behind those before.
    pub fn fio(&self) -> String {
        let kind = match (self.bytes > 4096, self.writes) {
            (true, 0) => "read",
            (true, _) => "write",
            (false, 0) => "randread",
            (false, 100) => "randwrite",
            (false, _) => "randrw",
        };
        let (bytes, depth, reads) = (self.bytes, self.depth, 100 - self.writes);
        format!("--name=job --stonewall --rw={kind} --rwmixread={reads} --bs={bytes} --iodepth={depth}")
    }

    /// The group that it belongs to.
    pub fn group(&self) -> &'static str {
        match (self.bytes > 4096, self.writes, self.depth) {
            (true, ..) => "sequential",
            (_, 1..100, _) => "mixed",
            (_, _, 1) => "depth-1",
            _ => "depth-32",
        }
    }

    /// Unit of its throughput, and how much of it a request is.
    pub fn unit(&self) -> (&'static str, f64) {
        if self.bytes > 4096 { ("MiB/s", self.bytes as f64 / f64::from(1 << 20)) } else { ("IOPS", 1.0) }
    }
}

type Turn<'a> = Box<dyn FnMut(&Pattern) -> Result<Sample> + 'a>;

/// One way to the disk: which processes are on it, and how to run a turn.
struct Way<'a> {
    name: &'static str,
    pids: Vec<i32>,
    turn: Turn<'a>,
}

impl<'a> Way<'a> {
    fn here(
        name: &'static str,
        pid: Option<i32>,
        target: &'a mut dyn Target,
        places: &'a mut Places,
    ) -> Self {
        let pids = pid.into_iter().chain([std::process::id().cast_signed()]).collect();
        Way { name, pids, turn: Box::new(|pattern| disk::run(&mut *target, pattern, places)) }
    }

    fn measure(&mut self, pattern: &Pattern) -> Result<Sample> {
        let before = cpu_time(&self.pids)?;
        let mut sample = (self.turn)(pattern)?;
        let used = cpu_time(&self.pids)?.saturating_sub(before);
        sample.cpu = used.as_secs_f64() * 1e6 / sample.requests as f64;
        Ok(sample)
    }
}

/// Processor time of all threads that these processes have.
fn cpu_time(pids: &[i32]) -> Result<Duration> {
    let mut all = 0;
    for pid in pids {
        let tasks =
            std::fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))?;
        for task in tasks.flatten() {
            // A thread may end meanwhile; "RUN-NS WAIT-NS SLICES".
            let Ok(text) = std::fs::read_to_string(task.path().join("schedstat")) else { continue };
            all += text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(Duration::from_nanos(all))
}

/// The lines of some workloads.
pub fn lines(settings: &Settings, world: &mut World, workloads: &[Workload]) -> Result<Vec<Line>> {
    // The disk is connected at first use.
    world.guest.call(&json!({"cmd": "block", "pattern": Pattern { ms: 1, ..workloads[0].pattern() }}))?;
    let (backend, direct) = super::backend(world)?;
    let guest_pid = world.guest_pid()?;
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&world.disk)?;
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(dir.path(), &world.disk, direct);
    if let Err(error) = &daemon {
        eprintln!("bench: {PROGRAM}: {error:#}");
    }
    let guest = RefCell::new(&mut world.guest);
    let mut lines = Vec::new();
    for workload in workloads {
        let pattern = workload.pattern();
        let look = Duration::from_micros(workload.look_us);
        let mut bare = uring::Disk::new(&file, workload.depth, workload.bytes)?;
        bare.set_look(look);
        let mut driver = daemon
            .as_ref()
            .ok()
            .map(|daemon| Driver::connect(daemon, workload.depth, workload.bytes))
            .transpose()?;
        let (mut places, mut daemon_places) = (Places::default(), Places::default());
        let mut ways = vec![
            Way {
                name: "blkback",
                pids: vec![backend, guest_pid],
                turn: Box::new(|pattern| {
                    let answer = guest.borrow_mut().call(&json!({"cmd": "block", "pattern": pattern}))?;
                    Ok(serde_json::from_value(answer)?)
                }),
            },
            Way::here("io_uring", None, &mut bare, &mut places),
        ];
        if let (Some(driver), Ok(daemon)) = (&mut driver, &daemon) {
            driver.set_look(look);
            ways.push(Way::here("qemu-storage-daemon", Some(daemon.pid()), driver, &mut daemon_places));
        }
        let results = rounds(settings.rounds, ways, &pattern)?;
        lines.extend(judged(workload, &results)?);
        eprintln!("bench: {}", told(workload, &results));
    }
    Ok(lines)
}

type Results = Vec<(&'static str, Vec<Sample>)>;

fn rounds(rounds: usize, ways: Vec<Way<'_>>, pattern: &Pattern) -> Result<Results> {
    let samples: Vec<RefCell<Vec<Sample>>> = ways.iter().map(|_| RefCell::default()).collect();
    let names: Vec<&'static str> = ways.iter().map(|way| way.name).collect();
    let mut contestants: Vec<Contestant<'_>> = ways
        .into_iter()
        .zip(&samples)
        .map(|(mut way, samples)| {
            let warm = Cell::new(false);
            Contestant::new(way.name, move || {
                let sample = way.measure(pattern)?;
                if warm.replace(true) {
                    samples.borrow_mut().push(sample);
                }
                Ok(sample.iops)
            })
        })
        .collect();
    take_turns(rounds, &mut contestants)?;
    drop(contestants);
    Ok(names.into_iter().zip(samples.into_iter().map(RefCell::into_inner)).collect())
}

fn series(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> Series {
    Series::new(samples.iter().map(of).collect())
}

/// What was measured as lines, with their goals.
fn judged(workload: &Workload, results: &Results) -> Result<Vec<Line>> {
    let way = |name: &str| results.iter().find(|(n, _)| *n == name).map(|(_, samples)| samples);
    let (ours, limit) = way("blkback").zip(way("io_uring")).context("ours and the limit")?;
    let daemon = way("qemu-storage-daemon");
    let name = workload.name;
    let line = |what: &str, unit: &str, of: &dyn Fn(&Sample) -> f64, goal: Goal| {
        let line = Line::beside(
            &format!("block {name}: {what}"),
            unit,
            &series(ours, of),
            ("io_uring", &series(limit, of)),
            goal,
        );
        match daemon {
            Some(daemon) => line.peer("qemu-storage-daemon", &series(daemon, of)),
            None => line,
        }
    };
    let (unit, scale) = workload.unit();
    let speed = |s: &Sample| s.iops * scale;
    let deep = workload.depth == 32 && workload.writes != 30;
    let lone = workload.depth == 1 && workload.writes != 30;
    let mut lines = vec![
        line("throughput", unit, &speed, if deep { Goal::RatioAtLeast(OF_IO_URING) } else { Goal::None }),
        line("p50", "us", &|s| s.p50, if lone { Goal::MoreAtMost(MORE) } else { Goal::None }),
        line("p99", "us", &|s| s.p99, Goal::None),
        line("p99.9", "us", &|s| s.p999, Goal::None),
        line("CPU", "us/request", &|s| s.cpu, Goal::None),
    ];
    let beside = format!("block {name}: beside QEMU");
    lines.push(match daemon {
        Some(daemon) => Line::beside(
            &beside,
            unit,
            &series(ours, speed),
            ("qemu-storage-daemon", &series(daemon, speed)),
            Goal::RatioAtLeast(1.0),
        ),
        None => Line::missing(&beside, unit, ">= 1.00 x qemu-storage-daemon", "it does not run here"),
    });
    Ok(lines)
}

/// One line for whoever waits.
fn told(workload: &Workload, results: &Results) -> String {
    let parts: Vec<String> = results
        .iter()
        .map(|(name, samples)| {
            let median = |of: &dyn Fn(&Sample) -> f64| series(samples, of).median();
            format!(
                "{name} {:.0}/s p50 {:.1} p99 {:.0} p99.9 {:.0} us, CPU {:.1} us",
                median(&|s| s.iops),
                median(&|s| s.p50),
                median(&|s| s.p99),
                median(&|s| s.p999),
                median(&|s| s.cpu)
            )
        })
        .collect();
    format!("{}: {}", workload.name, parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_of_their_depth() {
        let sample = |iops: f64, p50: f64| Sample { iops, p50, cpu: 1.0, ..Sample::default() };
        let results: Results = vec![
            ("blkback", vec![sample(96.0, 50.0); 3]),
            ("io_uring", vec![sample(100.0, 43.0); 3]),
            ("qemu-storage-daemon", vec![sample(97.0, 60.0); 3]),
        ];
        let met = |workload: &Workload| -> Vec<Option<bool>> {
            judged(workload, &results).unwrap().iter().map(|l| l.met).collect()
        };
        assert_eq!(met(&DEPTH_32[0]), [Some(true), None, None, None, None, Some(false)]);
        assert_eq!(met(&DEPTH_1[0]), [None, Some(true), None, None, None, Some(false)]);
        let mib = judged(&SEQUENTIAL[0], &results).unwrap();
        assert_eq!((mib[0].unit.as_str(), mib[0].ours), ("MiB/s", Some(96.0)));
        let alone: Results = results[..2].to_vec();
        assert_eq!(judged(&MIXED[1], &alone).unwrap()[5].met, None, "not measured is not missed");
    }

    #[test]
    fn processor_time_goes_up() {
        let me = [std::process::id().cast_signed()];
        let before = cpu_time(&me).unwrap();
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(30) {
            std::hint::black_box(0);
        }
        assert!(cpu_time(&me).unwrap() > before);
    }
}

//! A hundred guests on one blkback: what they get together beside what one gets alone, and what an idle disk costs.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_tests::system::{Config, System};
use serde_json::{Value, json};

use crate::cases::pair::control_socket;
use crate::cases::{Settings, show_log, world};
use crate::disk::{Pattern, Sample};
use crate::report::{Goal, Line};
use crate::stats::Series;
use crate::wire::Remote;

/// Guests.
const GUESTS: usize = 100;
/// Name of the blkback, and the disk's bytes.
const BACKEND: &str = "shared";
const DISK: u64 = 64 << 20;
/// Rounds; each has a turn of the one and a turn of all.
const ROUNDS: usize = 7;
/// A ring that had requests gives its buffers back after so long, and some more.
const IDLE: Duration = Duration::from_secs(4);
/// The goals: of one guest's throughput, and KiB for each idle disk.
const OF_ONE: f64 = 0.9;
const IDLE_KIB: f64 = 256.0;
/// How long a guest may take to be there.
const UP: Duration = Duration::from_secs(30);

/// The lines.
pub fn lines(settings: &Settings) -> Result<Vec<Line>> {
    let dir = tempfile::Builder::new().prefix("bh-bench-").tempdir()?;
    let disk = dir.path().join("shared.img");
    let mut file = File::create(&disk)?;
    let chunk = vec![0x5a; 1 << 20];
    (0..DISK >> 20).try_for_each(|_| file.write_all(&chunk))?;
    file.sync_all()?;
    let more = format!(
        "[[blkback]]\nname = \"{BACKEND}\"\ndisk = \"{}\"\n\
         limits = {{ pids = 512, channels = 256, buffers = 256, buffer_memory = 2048, fd_store = 1024 }}\n",
        disk.display()
    );
    let config =
        Config { bin_dir: settings.bin_dir.clone(), host_file_more: more, ..Config::of_this_build()? };
    let system = System::start(config)?;
    measured(settings, &system).inspect_err(|_| show_log(&system))
}

fn measured(settings: &Settings, system: &System) -> Result<Vec<Line>> {
    let pid = system.services()?.get(BACKEND).context("no shared blkback")?.pid;
    let program = settings.bin_dir.join("bench-guest");
    let mut guests = vec![guest(system, &program, 0)?];
    // Connected, used once, and idle again: what one disk has in common with the next is in this.
    turn(&mut guests, &pattern(1))?;
    std::thread::sleep(IDLE);
    let one = memory_kib(pid)?;
    for number in 1..GUESTS {
        guests.push(guest(system, &program, number)?);
    }
    turn(&mut guests, &pattern(1))?;
    std::thread::sleep(IDLE);
    let idle = (memory_kib(pid)? - one) / (GUESTS - 1) as f64;
    let (mut alone, mut together) = (Series::default(), Series::default());
    let mut least = f64::INFINITY;
    for round in 0..=ROUNDS {
        let single = turn(&mut guests[..1], &pattern(32))?;
        let all = turn(&mut guests, &pattern(1))?;
        if round > 0 {
            alone.push(single.iter().map(|s| s.iops).sum());
            together.push(all.iter().map(|s| s.iops).sum());
            least = all.iter().map(|s| s.iops).fold(least, f64::min);
        }
    }
    let name = format!("block: {GUESTS} guests on one blkback, 4 KiB reads");
    let line = Line::beside(&name, "IOPS", &together, ("one guest", &alone), Goal::RatioAtLeast(OF_ONE));
    let note =
        format!("each at depth 1, the one at depth 32; the slowest guest of all rounds had {least:.0}");
    let memory = Line::under("block: memory of an idle disk in blkback", "KiB", idle, IDLE_KIB);
    Ok(vec![
        line.note(note),
        memory.note(format!("Pss, growth from 1 to {GUESTS} disks; {one:.0} KiB with one")),
    ])
}

fn pattern(depth: u32) -> Pattern {
    Pattern { writes: 0, sequential: false, bytes: 4096, depth, span: DISK, ms: 500, look_us: 0 }
}

fn guest(system: &System, program: &Path, number: usize) -> Result<Remote> {
    let name = format!("many{number}");
    system.create(&format!(
        "name = \"{name}\"\ntype = \"process\"\nprogram = \"{}\"\n\
         [[disk]]\nvdev = \"xvda\"\nbackend = \"{BACKEND}\"\nmode = \"w!\"\n",
        program.display()
    ))?;
    let domid = world::listed(system, &name)?["domid"].as_u64().context("no domid")?;
    Remote::connect(&control_socket(system.dir(), u16::try_from(domid)?), UP)
}

/// All at the same time.
fn turn(guests: &mut [Remote], pattern: &Pattern) -> Result<Vec<Sample>> {
    let command = json!({"cmd": "block", "pattern": pattern});
    let answers: Vec<Result<Value>> = std::thread::scope(|scope| {
        let threads: Vec<_> = guests.iter_mut().map(|guest| scope.spawn(|| guest.call(&command))).collect();
        let panicked = || Err(anyhow::anyhow!("panicked"));
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| panicked())).collect()
    });
    answers.into_iter().map(|answer| Ok(serde_json::from_value(answer?)?)).collect()
}

/// Memory of a process, shared pages by its share.
fn memory_kib(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).context(path)?;
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:")).context("no Pss")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

//! Random 4 KiB reads and writes through blkfront, ring, journal and blkback, beside io_uring on the same file.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::libc;
use serde_json::json;

use super::world::{DISK, World};
use super::{Settings, or_missing};
use crate::peers::uring::Disk;
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;

/// Length of one turn.
const TURN: Duration = Duration::from_millis(300);
/// The goal at queue depth 32.
const GOAL: f64 = 0.8;

const NAMES: &[(&str, &str, &str)] = &[
    ("block read 4 KiB, qd 1", "IOPS", ""),
    ("block read 4 KiB, qd 32", "IOPS", ">= 0.80 x io_uring"),
    ("block write 4 KiB, qd 1", "IOPS", ""),
    ("block write 4 KiB, qd 32", "IOPS", ">= 0.80 x io_uring"),
];

/// All lines of the case.
pub fn run(settings: &Settings, world: &mut Result<World>) -> Vec<Line> {
    or_missing(NAMES, super::borrowed(world).and_then(|world| lines(settings, world)))
}

fn lines(settings: &Settings, world: &mut World) -> Result<Vec<Line>> {
    let direct = backend_is_direct(world)?;
    let open = |path: &Path, direct: bool| {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
    };
    // A file of its own: direct I/O on a file with dirty pages in the cache has to write them back first.
    let other_path = world.disk.with_extension("other");
    std::fs::copy(&world.disk, &other_path).with_context(|| other_path.display().to_string())?;
    let (file, other_file) = (open(&world.disk, direct)?, open(&other_path, !direct)?);
    other_file.sync_all()?;
    let guest = RefCell::new(&mut world.guest);
    let mut lines = Vec::new();
    for write in [false, true] {
        for depth in [1, 32] {
            let name = format!("block {} 4 KiB, qd {depth}", if write { "write" } else { "read" });
            let command = json!({
                "cmd": "block", "write": write, "depth": depth, "ms": TURN.as_millis() as u64,
            });
            let (mut limit, mut other) =
                (Disk::new(&file, DISK, depth)?, Disk::new(&other_file, DISK, depth)?);
            let series = take_turns(
                settings.rounds,
                &mut [
                    Contestant::new("blkback", || guest.borrow_mut().number(&command, "iops")),
                    Contestant::new("io_uring", || limit.run(write, TURN)),
                    Contestant::new("io_uring, other mode", || other.run(write, TURN)),
                ],
            )?;
            let [ours, limit, other]: [Series; 3] =
                series.try_into().ok().context("as many series as contestants")?;
            let goal = if depth == 32 { Goal::RatioAtLeast(GOAL) } else { Goal::None };
            let (mode, other_mode) = match direct {
                true => ("both with O_DIRECT", "io_uring through the page cache"),
                false => ("both through the page cache", "io_uring with O_DIRECT"),
            };
            let line = Line::beside(&name, "IOPS", &ours, ("io_uring", &limit), goal);
            lines.push(line.peer(other_mode, &other).note(mode));
        }
    }
    Ok(lines)
}

/// Whether the process that serves the disk has it open with O_DIRECT: the limit must do the same.
fn backend_is_direct(world: &World) -> Result<bool> {
    for service in world.system.services()?.values().filter(|s| s.pid > 0) {
        if let Some(direct) = opened_direct(service.pid, &world.disk)? {
            return Ok(direct);
        }
    }
    anyhow::bail!("no service has {} open", world.disk.display())
}

fn opened_direct(pid: i32, path: &Path) -> Result<Option<bool>> {
    let wanted = std::fs::metadata(path)?;
    let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Ok(None) };
    for fd in fds.flatten() {
        // Sockets and the like have no path to follow.
        let Ok(meta) = std::fs::metadata(fd.path()) else { continue };
        if (meta.dev(), meta.ino()) != (wanted.dev(), wanted.ino()) {
            continue;
        }
        let info = format!("/proc/{pid}/fdinfo/{}", fd.file_name().display());
        let info = std::fs::read_to_string(&info).with_context(|| info.clone())?;
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).context("fdinfo has no flags")?;
        let flags = i32::from_str_radix(flags.trim(), 8)?;
        return Ok(Some(flags & libc::O_DIRECT != 0));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_file_is_open_is_seen() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let pid = std::process::id().cast_signed();
        assert_eq!(opened_direct(pid, file.path()).unwrap(), Some(false));
        assert_eq!(opened_direct(pid, Path::new("/proc/cpuinfo")).unwrap(), None);
    }
}

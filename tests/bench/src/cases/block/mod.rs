//! The guest's disk: speed, what a kill of blkback costs, and many guests at one disk.

pub mod lab;
mod many;
mod pause;
pub(crate) mod speed;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::libc;

use super::world::World;
use super::{Settings, or_missing};
use crate::report::Line;

/// A group of lines, for `--only`.
enum Group {
    /// Of the system's one guest.
    Guest(fn(&Settings, &mut World) -> Result<Vec<Line>>),
    /// Of a system of its own.
    Alone(fn(&Settings) -> Result<Vec<Line>>),
}

const GROUPS: [(&str, Group); 7] = [
    ("depth-1", Group::Guest(|s, w| speed::lines(s, w, &speed::DEPTH_1))),
    ("depth-32", Group::Guest(|s, w| speed::lines(s, w, &speed::DEPTH_32))),
    ("sequential", Group::Guest(|s, w| speed::lines(s, w, &speed::SEQUENTIAL))),
    ("mixed", Group::Guest(|s, w| speed::lines(s, w, &speed::MIXED))),
    ("pause", Group::Guest(|_, w| pause::lines(w))),
    ("many", Group::Alone(many::lines)),
    ("lab", Group::Alone(lab::lines)),
];

/// All lines of the case. `world` starts the system with its guest, if a group needs it.
pub fn run<'a>(settings: &Settings, world: impl FnOnce() -> &'a mut Result<World>) -> Vec<Line> {
    // Of the lab's, a part can be named: lab-sequential.
    let wanted = |name: &str| {
        settings.only.as_ref().is_none_or(|only| {
            name.contains(only.as_str()) || only.split_once('-').is_some_and(|(group, _)| group == name)
        })
    };
    let (mut start, mut world_is) = (Some(world), None);
    let mut lines = Vec::new();
    for (name, group) in GROUPS.iter().filter(|(name, _)| wanted(name)) {
        let result = match group {
            Group::Alone(measure) => measure(settings),
            Group::Guest(measure) => {
                if let Some(start) = start.take() {
                    world_is = Some(start());
                }
                match &mut world_is {
                    Some(world) => super::borrowed(world).and_then(|world| measure(settings, world)),
                    None => Err(anyhow::anyhow!("no system")),
                }
            }
        };
        lines.extend(or_missing(&[(&format!("block, {name}"), "", "")], result));
        eprintln!("bench: block, {name}: measured");
    }
    lines
}

/// The process that serves the guest's disk, and whether it has it open with O_DIRECT.
fn backend(world: &World) -> Result<(i32, bool)> {
    for service in world.system.services()?.values().filter(|s| s.pid > 0) {
        if let Some(direct) = opened_direct(service.pid, &world.disk)? {
            return Ok((service.pid, direct));
        }
    }
    bail!("no service has {} open", world.disk.display())
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

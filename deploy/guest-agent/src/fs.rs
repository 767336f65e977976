//! The file system load: an ext4 is made on a disk, mounted, stressed, unmounted, mounted again, compared, and checked.
//!
//! Every file's content follows from its number and version, so that each read can be judged. Reads come from the disk: the page
//! cache is dropped before them.

use crate::stuck::Step;
use crate::system;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use workload::report::{Json, Report};

/// How long a disk may take to be plugged in, and to change its size.
const PATIENCE: Duration = Duration::from_secs(600);

/// Threads that write at the same time, each in a directory of its own.
const THREADS: u64 = 4;
/// Files of a thread.
const FILES: u64 = 8;
/// Times that each file is written.
const ROUNDS: u64 = 2;
/// Most bytes of a file.
const MOST: u64 = 96 << 10;

/// What was done on one disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Files written, renamed or removed.
    pub files: u64,
    /// Bytes read back and compared.
    pub verified: u64,
}

/// One file's content: its length and bytes follow from where it is and how often it was written.
struct Content(u64);

impl Content {
    fn of(thread: u64, file: u64, round: u64) -> Self {
        Self(((thread + 1) << 40 | (file + 1) << 20 | (round + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn len(&self) -> u64 {
        1 + self.0 % MOST
    }

    fn bytes(&self) -> Vec<u8> {
        let mut state = self.0;
        let mut bytes = vec![0; self.len().next_multiple_of(8) as usize];
        for word in bytes.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        bytes.truncate(self.len() as usize);
        bytes
    }
}

fn file_at(dir: &Path, thread: u64, file: u64) -> PathBuf {
    dir.join(format!("t{thread}")).join(format!("f{file}"))
}

/// The version that a file has at the end of a round; `None`: it was removed.
fn version(file: u64, round: u64) -> Option<u64> {
    (!(file + round).is_multiple_of(5)).then_some(round)
}

fn write_all(dir: &Path, thread: u64, round: u64) -> io::Result<u64> {
    let mut done = 0;
    fs::create_dir_all(dir.join(format!("t{thread}")))?;
    for file in 0..FILES {
        let path = file_at(dir, thread, file);
        done += 1;
        let Some(round) = version(file, round) else {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => continue,
            }
        };
        // Beside its place and renamed over it, as editors and package managers do.
        let part = path.with_extension("part");
        let mut out = File::create(&part)?;
        for piece in Content::of(thread, file, round).bytes().chunks(20_000) {
            out.write_all(piece)?;
        }
        if file.is_multiple_of(3) {
            out.sync_all()?;
        }
        fs::rename(&part, &path)?;
    }
    Ok(done)
}

/// Compares everything; the bytes that were read.
fn verify(dir: &Path, round: u64) -> io::Result<u64> {
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let mut read = 0;
    for thread in 0..THREADS {
        for file in 0..FILES {
            let path = file_at(dir, thread, file);
            let mut bytes = Vec::new();
            let there = match File::open(&path) {
                Ok(mut open) => open.read_to_end(&mut bytes).map(|_| true)?,
                Err(e) if e.kind() == io::ErrorKind::NotFound => false,
                Err(e) => return Err(e),
            };
            let want = version(file, round).map(|round| Content::of(thread, file, round).bytes());
            if there != want.is_some() || want.is_some_and(|want| want != bytes) {
                return Err(io::Error::other(format!("{}: not what was written", path.display())));
            }
            read += bytes.len() as u64;
        }
    }
    Ok(read)
}

/// What the kernel's blkfront made of the disk, of `/sys/block`.
fn facts(disk: &str, line: Json) -> Json {
    let dir = format!("/sys/block/{disk}");
    let read = |name: &str| {
        fs::read_to_string(format!("{dir}/{name}"))
            .map_or_else(|e| e.to_string(), |text| text.trim().to_owned())
    };
    let names = ["size", "ro", "queue/write_cache", "queue/logical_block_size", "queue/physical_block_size"];
    let more =
        ["queue/discard_granularity", "queue/discard_max_bytes", "queue/max_segments", "queue/nr_requests"];
    let queues = fs::read_dir(format!("{dir}/mq")).map_or(0, Iterator::count);
    let line = line.count("queues", queues as u64);
    names
        .iter()
        .chain(&more)
        .fold(line, |line, name| line.text(name.rsplit('/').next().unwrap_or(name), &read(name)))
}

/// [`run`], and what came of it; then tells of each other size that the disk gets, until it is unplugged.
pub fn tell(disk: &str, reporter: &'static dyn Report) {
    let line = Json::new("fs").text("disk", disk);
    let line = match run(disk, PATIENCE, reporter) {
        Ok(done) => line.flag("ok", true).count("files", done.files).count("verified", done.verified),
        Err(e) => line.flag("ok", false).text("why", &e.to_string()),
    };
    reporter.line(&facts(disk, line));
    let path = format!("/sys/block/{disk}/size");
    let Ok(mut was) = fs::read_to_string(&path) else { return };
    loop {
        thread::sleep(Duration::from_millis(200));
        match fs::read_to_string(&path) {
            Ok(now) if now == was => {}
            Ok(now) => {
                reporter.line(&facts(disk, Json::new("size").text("disk", disk)));
                was = now;
            }
            Err(_) => return reporter.line(&Json::new("unplugged").text("disk", disk)),
        }
    }
}

/// All of it on `/dev/DISK`, which may be plugged in later: it is waited for so long.
///
/// # Errors
/// The first thing that went wrong, with the step.
pub fn run(disk: &str, patience: Duration, reporter: &'static dyn Report) -> io::Result<Done> {
    let device = format!("/dev/{disk}");
    let step = |name: &str| Step::begin(disk, name, reporter);
    {
        let _step = step("wait");
        system::wait_for(&device, patience)?;
    }
    let dir = PathBuf::from(format!("/mnt/{disk}"));
    let shown = dir.display().to_string();
    fs::create_dir_all(&dir)?;
    let busybox = |args: &[&str]| {
        let _step = step(args[0]);
        system::command("/bin/busybox", args)
    };
    let tool = |name: &str, args: &[&str]| {
        let _step = step(name);
        system::command(&format!("/usr/sbin/{name}"), args)
    };
    tool("mke2fs", &["-q", "-F", "-t", "ext4", &device])?;
    let mut done = Done::default();
    busybox(&["mount", "-t", "ext4", &device, &shown])?;
    for round in 0..ROUNDS {
        let at = dir.as_path();
        let writing = step("write");
        done.files += thread::scope(|scope| {
            let threads: Vec<_> =
                (0..THREADS).map(|t| scope.spawn(move || write_all(at, t, round))).collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))))
                .sum::<io::Result<u64>>()
        })?;
        drop(writing);
        let _step = step("verify");
        nix::unistd::sync();
        done.verified += verify(&dir, round)?;
    }
    busybox(&["umount", &shown])?;
    busybox(&["mount", "-t", "ext4", &device, &shown])?;
    done.verified += verify(&dir, ROUNDS - 1)?;
    // What is free goes back to the disk: discards, where it takes them.
    if fs::read_to_string(format!("/sys/block/{disk}/queue/discard_max_bytes"))
        .is_ok_and(|max| max.trim() != "0")
    {
        busybox(&["fstrim", &shown])?;
    }
    busybox(&["umount", &shown])?;
    tool("e2fsck", &["-f", "-n", &device])?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_differ_and_are_what_they_were() {
        let (a, b) = (Content::of(0, 1, 2), Content::of(0, 2, 1));
        assert_eq!(a.bytes(), Content::of(0, 1, 2).bytes());
        assert_ne!(a.bytes(), b.bytes());
        assert_eq!(a.bytes().len() as u64, a.len());
    }

    #[test]
    fn what_is_written_is_found_and_what_is_not_is_told() {
        let dir = std::env::temp_dir().join(format!("guest-agent-fs-{}", std::process::id()));
        for round in 0..2 {
            for thread in 0..THREADS {
                write_all(&dir, thread, round).unwrap();
            }
        }
        // Dropping caches takes root; what is compared is the same.
        if fs::write("/proc/sys/vm/drop_caches", "0").is_ok() {
            assert!(verify(&dir, 1).unwrap() > 0);
            assert!(verify(&dir, 0).is_err());
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}

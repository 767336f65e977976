//! What a running process has and can reach, as the host's root sees it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// A process of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process(pub i32);

/// A mapping of a process.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// As `rw-s`.
    pub mode: String,
    /// What is mapped, empty for anonymous memory.
    pub what: String,
}

/// What a search found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// For each text searched for, the places it was found at.
    pub places: Vec<Vec<String>>,
    /// What could not be read by the host, and must be looked at in another way.
    pub unread: Vec<Mapping>,
    /// Bytes looked at.
    pub bytes: u64,
}

const CHUNK: usize = 1 << 20;

impl Process {
    fn path(self, entry: &str) -> PathBuf {
        format!("/proc/{}/{entry}", self.0).into()
    }

    /// A line of its status file, as `CapEff`.
    pub fn status(self, key: &str) -> Option<String> {
        let status = fs::read_to_string(self.path("status")).ok()?;
        status.lines().find_map(|l| Some(l.strip_prefix(key)?.strip_prefix(':')?.trim().to_owned()))
    }

    /// Identity of one of its namespaces: "net", "mnt", …
    ///
    /// # Errors
    /// If the process is gone.
    pub fn namespace(self, kind: &str) -> Result<String> {
        let link = fs::read_link(self.path(&format!("ns/{kind}")))?;
        Ok(link.to_string_lossy().into_owned())
    }

    /// Names of the network interfaces that it sees.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn interfaces(self) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.path("net/dev"))?;
        let mut names: Vec<String> =
            text.lines().skip(2).filter_map(|l| Some(l.split_once(':')?.0.trim().to_owned())).collect();
        names.sort();
        Ok(names)
    }

    /// Names in its root directory.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn root(self) -> Result<Vec<String>> {
        let entries = fs::read_dir(self.path("root/")).context("its root directory")?;
        let mut names: Vec<String> =
            entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        Ok(names)
    }

    /// Its descriptors and what they are.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn fds(self) -> Result<Vec<(i32, String)>> {
        let mut fds = Vec::new();
        for entry in fs::read_dir(self.path("fd"))?.flatten() {
            let Ok(number) = entry.file_name().to_string_lossy().parse() else { continue };
            // It may have been closed meanwhile.
            let Ok(what) = fs::read_link(entry.path()) else { continue };
            fds.push((number, what.to_string_lossy().into_owned()));
        }
        fds.sort();
        Ok(fds)
    }

    /// Its mappings.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn maps(self) -> Result<Vec<Mapping>> {
        let text = fs::read_to_string(self.path("maps"))?;
        let parse = |line: &str| {
            let mut words = line.splitn(6, ' ');
            let (start, end) = words.next()?.split_once('-')?;
            let hex = |text| u64::from_str_radix(text, 16).ok();
            Some(Mapping {
                start: hex(start)?,
                end: hex(end)?,
                mode: words.next()?.into(),
                what: words.nth(3).unwrap_or_default().trim().into(),
            })
        };
        Ok(text.lines().filter_map(parse).collect())
    }

    /// Searches all its memory for `texts`.
    ///
    /// # Errors
    /// If its memory cannot be read at all.
    pub fn search_memory(self, texts: &[&[u8]]) -> Result<Found> {
        let memory = File::open(self.path("mem")).context("its memory")?;
        let mut found = Found { places: vec![Vec::new(); texts.len()], ..Found::default() };
        for map in self.maps()? {
            if !map.mode.starts_with('r') || map.what.starts_with("[vvar") || map.what == "[vsyscall]" {
                continue;
            }
            let at = format!("memory {} {}", map.mode, map.what);
            let len = map.end - map.start;
            let read = |buffer: &mut [u8], offset| memory.read_at(buffer, map.start + offset);
            if search(&at, len, read, texts, &mut found).is_err() {
                found.unread.push(map);
            }
        }
        Ok(found)
    }

    /// Searches the contents of all its descriptors that have any (memfds, files).
    ///
    /// # Errors
    /// If the process is gone.
    pub fn search_files(self, texts: &[&[u8]], found: &mut Found) -> Result<()> {
        for (number, what) in self.fds()? {
            let Ok(file) = File::open(self.path(&format!("fd/{number}"))) else { continue };
            let Ok(meta) = file.metadata() else { continue };
            if meta.is_file() {
                search_file(&format!("fd {number} {what}"), &file, texts, found)?;
            }
        }
        Ok(())
    }
}

/// Searches a file or memfd.
///
/// # Errors
/// If it cannot be read.
pub fn search_file(at: &str, file: &File, texts: &[&[u8]], found: &mut Found) -> Result<()> {
    found.places.resize(texts.len(), Vec::new());
    let len = file.metadata()?.len();
    search(at, len, |buffer, offset| file.read_at(buffer, offset), texts, found)
        .with_context(|| format!("reading {at}"))
}

/// Searches bytes in memory.
pub fn search_bytes(at: &str, bytes: &[u8], texts: &[&[u8]], found: &mut Found) {
    found.places.resize(texts.len(), Vec::new());
    found.bytes += bytes.len() as u64;
    for (text, places) in texts.iter().zip(&mut found.places) {
        let first = text.first().copied().unwrap_or(0);
        let mut from = 0;
        while let Some(i) = bytes[from..].iter().position(|b| *b == first) {
            if bytes[from + i..].starts_with(text) {
                places.push(format!("{at} + {:#x}", from + i));
            }
            from += i + 1;
        }
    }
}

fn search(
    at: &str,
    len: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
    texts: &[&[u8]],
    found: &mut Found,
) -> io::Result<()> {
    // Chunks overlap, so that nothing is missed where two meet.
    let overlap = texts.iter().map(|t| t.len()).max().unwrap_or(1) as u64;
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    while offset < len {
        let want = (len - offset).min(CHUNK as u64) as usize;
        let got = read(&mut buffer[..want], offset)?;
        if got == 0 {
            break;
        }
        search_bytes(&format!("{at} @ {offset:#x}"), &buffer[..got], texts, found);
        if offset + got as u64 >= len {
            break;
        }
        offset += (got as u64).saturating_sub(overlap).max(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_finds_what_is_there_and_nothing_else() {
        // In two parts, so that the texts themselves are not in memory as such.
        let whole = |a: &str, b: &str| format!("{a}{b}").into_bytes();
        let there = whole("in-this-", "process-7c1e");
        let mut page = vec![0; 3 << 20];
        page[CHUNK - 5..CHUNK - 5 + there.len()].copy_from_slice(&there);
        let absent: Vec<u8> = there.iter().map(|b| b ^ 1).collect();
        let mut found = Found::default();
        search_bytes("page", &page, &[&there, &absent], &mut found);
        let me = Process(std::process::id().cast_signed());
        let mut in_memory = me.search_memory(&[&there]).unwrap();
        assert_eq!((found.places[0].len(), found.places[1].len()), (1, 0));
        assert!(in_memory.places[0].iter().any(|p| p.starts_with("memory rw")), "{in_memory:?}");
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&page, 0).unwrap();
        search_file("file", &file, &[&there], &mut in_memory).unwrap();
        assert!(in_memory.places[0].iter().any(|p| p.starts_with("file @")), "{in_memory:?}");
        assert!(me.status("Uid").is_some() && !me.fds().unwrap().is_empty());
        assert!(me.interfaces().unwrap().contains(&"lo".into()));
    }
}

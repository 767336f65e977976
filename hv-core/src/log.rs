//! Domains' output: each has a pipe whose end one thread writes to `RUN/log/NAME.log`, of bounded size: when a file is full it
//! becomes `NAME.log.1` and a new one begins. A domain cannot fill the disk, and loses its log not even when it dies.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Size at which a file is put aside, bytes; a domain has at most twice that.
const FILE_MAX: u64 = 1 << 20;
/// Bytes kept of what a domain wrote last.
const TAIL_MAX: usize = 2 << 10;

type Tails = Arc<Mutex<HashMap<PathBuf, Vec<u8>>>>;

/// Where domains' output goes.
#[derive(Debug)]
pub enum Logs {
    /// To hv-core's own stderr.
    Stderr,
    /// To files in this directory.
    Files {
        /// The directory.
        dir: PathBuf,
        /// New pipes, to the thread.
        add: Sender<(io::PipeReader, PathBuf)>,
        /// Wakes the thread.
        wake: OwnedFd,
        /// What each wrote last.
        tails: Tails,
    },
}

impl Logs {
    /// Files in `dir`, written by a thread of its own.
    ///
    /// # Errors
    /// As eventfd(2) and thread creation.
    pub fn files(dir: PathBuf) -> io::Result<Logs> {
        let (add, added) = channel();
        let wake = crate::sys::eventfd()?;
        let tails = Tails::default();
        let waker = wake.try_clone()?;
        std::thread::Builder::new().name("log".into()).stack_size(128 << 10).spawn({
            let tails = tails.clone();
            move || run(&added, &waker, &tails)
        })?;
        Ok(Logs::Files { dir, add, wake, tails })
    }

    /// Why a domain's process ended, in its own words and one line: its last error (from `Error:` on), else its last line. It is the
    /// domain's text: for people only.
    pub fn last_words(&self, name: &str) -> Option<String> {
        let Logs::Files { dir, tails, .. } = self else { return None };
        let tails = tails.lock().unwrap_or_else(PoisonError::into_inner);
        last_words(&String::from_utf8_lossy(tails.get(&dir.join(format!("{name}.log")))?))
    }

    /// The descriptor that becomes a domain's stdout and stderr.
    ///
    /// # Errors
    /// In one line.
    pub fn open(&self, name: &str) -> Result<OwnedFd, String> {
        match self {
            Logs::Stderr => io::stderr().as_fd().try_clone_to_owned().map_err(|e| format!("stderr: {e}")),
            Logs::Files { dir, add, wake, .. } => {
                let (read, write) = io::pipe().map_err(|e| format!("log pipe: {e}"))?;
                add.send((read, dir.join(format!("{name}.log")))).map_err(|_| "the log thread is gone")?;
                crate::sys::kick(wake);
                Ok(write.into())
            }
        }
    }
}

struct Log {
    pipe: io::PipeReader,
    path: PathBuf,
    file: Option<(File, u64)>,
}

impl Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut current = match self.file.take() {
            Some(current) => current,
            None => {
                let file = File::options().create(true).append(true).open(&self.path)?;
                let len = file.metadata()?.len();
                (file, len)
            }
        };
        if current.1 + bytes.len() as u64 > FILE_MAX {
            fs::rename(&self.path, old(&self.path))?;
            current = (File::options().create(true).append(true).open(&self.path)?, 0);
        }
        current.0.write_all(bytes)?;
        current.1 += bytes.len() as u64;
        self.file = Some(current);
        Ok(())
    }
}

fn old(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

fn last_words(tail: &str) -> Option<String> {
    let from = tail.rfind("\nError: ").map(|at| at + 1).or_else(|| tail.starts_with("Error: ").then_some(0));
    let words = match from {
        Some(at) => tail[at + "Error: ".len()..].to_owned(),
        None => tail.lines().rev().find(|l| !l.trim().is_empty())?.to_owned(),
    };
    let words: Vec<&str> = words.split_whitespace().filter(|w| !w.chars().any(char::is_control)).collect();
    let words: String = words.join(" ").replace(" Caused by: ", ": ").chars().take(300).collect();
    (!words.is_empty()).then_some(words)
}

fn remember(tails: &Tails, path: &Path, bytes: &[u8]) {
    let mut tails = tails.lock().unwrap_or_else(PoisonError::into_inner);
    let tail = tails.entry(path.to_owned()).or_default();
    tail.extend_from_slice(bytes);
    let over = tail.len().saturating_sub(TAIL_MAX);
    tail.drain(..over);
}

fn run(added: &Receiver<(io::PipeReader, PathBuf)>, wake: &OwnedFd, tails: &Tails) {
    let mut logs: Vec<Log> = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let mut fds = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(logs.iter().map(|l| PollFd::new(l.pipe.as_fd(), PollFlags::POLLIN)));
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|f| f.any().unwrap_or(true)).collect();
        drop(fds);
        if ready[0] {
            let _cleared = nix::unistd::read(wake, &mut [0; 8]);
        }
        let mut index = 0;
        let mut ended = Vec::new();
        logs.retain_mut(|log| {
            index += 1;
            if !ready[index] {
                return true;
            }
            match log.pipe.read(&mut chunk) {
                Ok(0) | Err(_) => {
                    ended.push(std::mem::take(&mut log.path));
                    false
                }
                Ok(n) => {
                    remember(tails, &log.path, &chunk[..n]);
                    // A full disk costs log lines, and never holds up a domain.
                    if let Err(e) = log.write(&chunk[..n]) {
                        tracing::debug!("{}: {e}", log.path.display());
                    }
                    true
                }
            }
        });
        logs.extend(added.try_iter().map(|(pipe, path)| Log { pipe, path, file: None }));
        // The pipe ends with the domain. What it wrote last goes too, unless another has its name by now.
        for path in ended.into_iter().filter(|path| !logs.iter().any(|log| log.path == *path)) {
            tails.lock().unwrap_or_else(PoisonError::into_inner).remove(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_the_error() {
        let all = "starting\nError: no KVM\n\nCaused by:\n    no such file\n";
        assert_eq!(last_words(all).as_deref(), Some("no KVM: no such file"));
        assert_eq!(last_words("Error: x").as_deref(), Some("x"));
        assert_eq!(last_words("a\nb c\n\n").as_deref(), Some("b c"));
        assert_eq!(last_words("\n"), None);
    }

    #[test]
    fn last_words_go_with_the_domain_and_stay_for_its_namesake() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::files(dir.path().into()).unwrap();
        let until = |what: &str, done: &dyn Fn() -> bool| {
            let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while !done() {
                assert!(std::time::Instant::now() < end, "{what}");
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        };
        let mut first = File::from(logs.open("x").unwrap());
        first.write_all(b"first\n").unwrap();
        until("heard", &|| logs.last_words("x").as_deref() == Some("first"));
        let mut second = File::from(logs.open("x").unwrap());
        second.write_all(b"second\n").unwrap();
        until("heard", &|| logs.last_words("x").as_deref() == Some("second"));
        drop(first);
        // Whatever the thread does with the first one's end is done before it hears of this.
        let mut other = File::from(logs.open("y").unwrap());
        other.write_all(b"other\n").unwrap();
        until("heard", &|| logs.last_words("y").is_some());
        assert_eq!(logs.last_words("x").as_deref(), Some("second"));
        drop((second, other));
        until("nothing is kept", &|| logs.last_words("x").is_none() && logs.last_words("y").is_none());
    }

    #[test]
    fn a_talkative_domain_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::files(dir.path().into()).unwrap();
        let mut pipe = File::from(logs.open("x").unwrap());
        for _ in 0..300 {
            pipe.write_all(&[b'a'; 16 << 10]).unwrap();
        }
        pipe.write_all(b"the end").unwrap();
        let path = dir.path().join("x.log");
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !fs::read(&path).is_ok_and(|t| t.ends_with(b"the end")) {
            assert!(std::time::Instant::now() < until);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let size = |p: &Path| fs::metadata(p).map_or(0, |m| m.len());
        assert!(size(&path) <= FILE_MAX && size(&old(&path)) <= FILE_MAX);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}

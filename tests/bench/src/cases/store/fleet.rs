//! Many clients in one thread, each waiting for its reply before it goes on.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::conn::{EVENT, first};

/// What a client does.
pub trait Script {
    /// Appends the next request. `reply` is the type and payload of the answer to the one before; none at the beginning.
    ///
    /// # Errors
    /// An answer that must not be.
    fn next(&mut self, reply: Option<(u32, &[u8])>, out: &mut Vec<u8>) -> Result<()>;

    /// True between two units of work: a client stops only there.
    fn rests(&self) -> bool;
}

/// A client and its connection.
pub struct Member<S> {
    /// What it does, with what it counted.
    pub script: S,
    stream: UnixStream,
    unread: Vec<u8>,
    done: bool,
}

impl<S: Script> Member<S> {
    /// Connects.
    ///
    /// # Errors
    /// connect(2)'s.
    pub fn connect(path: &Path, script: S) -> Result<Member<S>> {
        let stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        stream.set_nonblocking(true)?;
        Ok(Member { script, stream, unread: Vec::new(), done: false })
    }
}

/// How long the daemon may be silent.
const SILENCE: u16 = 30_000;

/// Lets all run for `span`, then each to the end of its unit of work. Gives the time that this took.
///
/// # Errors
/// A script's, the daemon's silence or end.
pub fn drive<S: Script>(members: &mut [Member<S>], span: Duration) -> Result<Duration> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut out = Vec::new();
    for (n, member) in members.iter_mut().enumerate() {
        epoll.add(member.stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, n as u64))?;
        member.done = false;
    }
    let start = Instant::now();
    for member in members.iter_mut() {
        out.clear();
        member.script.next(None, &mut out)?;
        member.stream.write_all(&out)?;
    }
    let mut running = members.len();
    let mut events = [EpollEvent::empty(); 64];
    let mut buffer = [0; 8192];
    while running > 0 {
        let ready = epoll.wait(&mut events, EpollTimeout::from(SILENCE))?;
        ensure!(ready > 0, "xenstored has been silent for {SILENCE} ms");
        let over = start.elapsed() >= span;
        for event in &events[..ready] {
            let member = &mut members[event.data() as usize];
            match member.stream.read(&mut buffer) {
                Ok(0) => bail!("xenstored closed a connection"),
                Ok(n) => member.unread.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e).context("a client's socket"),
            }
            out.clear();
            let mut at = 0;
            while let Some((kind, payload, len)) = first(&member.unread[at..]) {
                at += len;
                if kind != EVENT {
                    let before = out.len();
                    member.script.next(Some((kind, payload)), &mut out)?;
                    if over && member.script.rests() {
                        // What the script would do next is not sent.
                        out.truncate(before);
                        member.done = true;
                        running -= 1;
                    }
                }
            }
            member.unread.drain(..at);
            if !member.done {
                member.stream.write_all(&out).context("a client's socket")?;
            }
        }
    }
    Ok(start.elapsed())
}

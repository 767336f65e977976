//! The spawner: a single-threaded process, forked from hv-core before it had a thread or a guest's memory. It makes
//! namespaces and starts sandboxed processes, is the parent of all of them, and tells hv-core at once when one ends.
//!
//! ```text
//!   hv-core ──socket pair──► spawner ──fork──► helper (joins the domain's namespaces, its cgroup; ends at once)
//!                               │                 └─clone(CLONE_PARENT, new pid/mount/ipc/uts)─┐
//!                               └──────────── parent of ──────────► the domain's process ◄─────┘
//! ```

pub mod proto;
pub mod sandbox;
pub mod seccomp;

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::sys::{self, sock};
use proto::{FromSpawner, MAX_SPAWNER_MESSAGE, SpawnRequest, ToSpawner};
use seccomp::Filters;

/// How long one namespace or process may take to be made.
const MAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Starts the spawner. Call before any thread exists.
///
/// # Errors
/// As fork(2) and socketpair(2).
pub fn start() -> io::Result<OwnedFd> {
    let (ours, theirs) = sock::pair()?;
    for end in [&ours, &theirs] {
        // Room for the largest request, whatever the host's default is.
        nix::sys::socket::setsockopt(end, nix::sys::socket::sockopt::SndBuf, &(4 * MAX_SPAWNER_MESSAGE))?;
    }
    if sys::fork_single_threaded()?.is_none() {
        drop(ours);
        let code = match Spawner::new(theirs).and_then(|mut s| s.run()) {
            Ok(()) => 0,
            Err(e) => {
                eprintln!("hv-core spawner: {e}");
                1
            }
        };
        sys::exit_now(code);
    }
    Ok(ours)
}

struct Spawner {
    socket: OwnedFd,
    children: SignalFd,
    filters: Filters,
    /// Processes of domains; other children are helpers whose end nobody needs to know.
    domains: HashSet<i32>,
}

impl Spawner {
    fn new(socket: OwnedFd) -> io::Result<Spawner> {
        // Signals of the terminal or the service manager are hv-core's business; the spawner ends with the socket.
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
            mask.add(signal);
        }
        mask.thread_block()?;
        let mut chld = SigSet::empty();
        chld.add(Signal::SIGCHLD);
        let children = SignalFd::with_flags(&chld, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let filters = Filters::compile().map_err(io::Error::other)?;
        Ok(Spawner { socket, children, filters, domains: HashSet::new() })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; MAX_SPAWNER_MESSAGE];
        loop {
            let mut fds = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            let request = fds[0].any().unwrap_or(true);
            while let Ok(Some(_)) = self.children.read_signal() {}
            self.reap()?;
            if request {
                let Some(message) = sock::recv(&self.socket, &mut buffer, 8)? else {
                    return Ok(());
                };
                let parsed = serde_json::from_slice::<ToSpawner>(&buffer[..message.len]);
                let answer = match parsed {
                    Ok(request) => self.serve(request, message.fds),
                    Err(e) => Err(format!("spawner request: {e}")),
                };
                let (reply, fds) =
                    answer.unwrap_or_else(|reason| (FromSpawner::Failed { reason }, Vec::new()));
                self.tell(&reply, &fds)?;
            }
        }
    }

    fn tell(&self, message: &FromSpawner, fds: &[OwnedFd]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        Ok(sock::send(&self.socket, &[&text], &fds)?)
    }

    fn reap(&mut self) -> io::Result<()> {
        loop {
            let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, (code & 0xff) << 8),
                Ok(WaitStatus::Signaled(pid, signal, core)) => {
                    (pid, signal as i32 | if core { 0x80 } else { 0 })
                }
                Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(nix::errno::Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
            };
            if self.domains.remove(&pid.as_raw()) {
                let ns = sys::monotonic_ns();
                self.tell(&FromSpawner::Reaped { pid: pid.as_raw(), status, ns }, &[])?;
            }
        }
    }

    fn serve(
        &mut self,
        request: ToSpawner,
        fds: Vec<OwnedFd>,
    ) -> Result<(FromSpawner, Vec<OwnedFd>), String> {
        match request {
            ToSpawner::MakeNamespaces { uid } => {
                let fds = make_namespaces(uid).map_err(|e| format!("making namespaces: {e}"))?;
                Ok((FromSpawner::Namespaces, fds))
            }
            ToSpawner::Spawn(request) => {
                let (pid, missing) = self.spawn(&request, fds)?;
                // Only we reap, so the number cannot have another owner yet.
                let pidfd = sys::pidfd_open(pid).map_err(|e| format!("pidfd_open: {e}"))?;
                Ok((FromSpawner::Spawned { pid, missing }, vec![pidfd]))
            }
        }
    }

    fn spawn(&mut self, request: &SpawnRequest, fds: Vec<OwnedFd>) -> Result<(i32, Vec<String>), String> {
        let mut prepared = sandbox::Prepared::new(request, fds, &self.filters)?;
        let (mut read, write) = io::pipe().map_err(|e| format!("pipe: {e}"))?;
        let helper = sys::fork_single_threaded().map_err(|e| format!("fork: {e}"))?;
        let Some(helper) = helper else {
            drop(read);
            prepared.run_helper(write);
        };
        drop(write);
        // The helper writes the domain's pid in 4 bytes; then either exec closes the pipe or an error's text follows.
        let mut said = Vec::new();
        let outcome = read_until_closed(&mut read, &mut said);
        let _reaped_here = waitpid(Pid::from_raw(helper), None);
        let pid = said.first_chunk::<4>().map(|b| i32::from_ne_bytes(*b)).filter(|pid| *pid > 0);
        let fail = |reason: String| {
            if let Some(pid) = pid {
                let pid = Pid::from_raw(pid);
                let _may_be_dead = nix::sys::signal::kill(pid, Signal::SIGKILL);
                let _reaped_here = waitpid(pid, None);
            }
            Err(reason)
        };
        if let Err(e) = outcome {
            return fail(format!("starting the process: {e}"));
        }
        match (pid, said.get(4..)) {
            (Some(pid), Some([])) => {
                self.domains.insert(pid);
                Ok((pid, prepared.missing))
            }
            (Some(_), Some(text)) => fail(String::from_utf8_lossy(text).into_owned()),
            _ => fail(String::from_utf8_lossy(said.get(4..).unwrap_or(b"the helper died")).into_owned()),
        }
    }
}

fn read_until_closed(pipe: &mut io::PipeReader, into: &mut Vec<u8>) -> io::Result<()> {
    let deadline = Instant::now() + MAKE_DEADLINE;
    let mut chunk = [0; 512];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        match pipe.read(&mut chunk)? {
            0 => return Ok(()),
            n => into.extend_from_slice(&chunk[..n]),
        }
        if into.len() > 4096 {
            return Err(io::Error::other("too much said"));
        }
    }
}

/// Makes a user namespace (0 is `uid` outside) and a network namespace in it with its loopback up.
fn make_namespaces(uid: u32) -> io::Result<Vec<OwnedFd>> {
    let (mut ready_read, mut ready_write) = io::pipe()?;
    let (mut go_read, go_write) = io::pipe()?;
    let Some(helper) = sys::fork_single_threaded()? else {
        drop((ready_read, go_write));
        let made = (|| -> io::Result<()> {
            use nix::sched::{CloneFlags, unshare};
            unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
            sys::loopback_up()
        })();
        let _parent_sees = match made {
            Ok(()) => ready_write.write_all(b"+"),
            Err(e) => ready_write.write_all(e.to_string().as_bytes()),
        };
        drop(ready_write);
        let _until_closed = go_read.read(&mut [0]);
        sys::exit_now(0);
    };
    drop((ready_write, go_read));
    let result = (|| {
        let mut said = Vec::new();
        read_until_closed(&mut ready_read, &mut said)?;
        if said != b"+" {
            return Err(io::Error::other(String::from_utf8_lossy(&said).into_owned()));
        }
        let open = |ns: &str| -> io::Result<OwnedFd> {
            Ok(std::fs::File::open(format!("/proc/{helper}/ns/{ns}"))?.into())
        };
        for map in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{helper}/{map}"), format!("0 {uid} 1\n"))?;
        }
        Ok(vec![open("user")?, open("net")?])
    })();
    drop(go_write);
    let _reaped_here = waitpid(Pid::from_raw(helper), None);
    result
}

/// hv-core's end of the spawner.
#[derive(Debug)]
pub struct SpawnerHandle {
    socket: std::sync::Arc<OwnedFd>,
    replies: mpsc::Receiver<(FromSpawner, Vec<OwnedFd>)>,
}

/// A started process.
#[derive(Debug)]
pub struct Started {
    /// Its host process id.
    pub pid: i32,
    /// Its pidfd.
    pub pidfd: OwnedFd,
    /// What its sandbox lacks.
    pub missing: Vec<String>,
}

impl SpawnerHandle {
    /// Serves `socket` with a reader thread; ends of processes go to `reaped(pid, status, ns)`, the spawner's own end to
    /// `gone`.
    ///
    /// # Errors
    /// As thread creation.
    pub fn new(
        socket: OwnedFd,
        reaped: impl Fn(i32, i32, u64) + Send + 'static,
        gone: impl FnOnce() + Send + 'static,
    ) -> io::Result<SpawnerHandle> {
        let socket = std::sync::Arc::new(socket);
        let (sender, replies) = mpsc::channel();
        let reader = socket.clone();
        std::thread::Builder::new().name("spawner-reader".into()).spawn(move || {
            let mut buffer = vec![0; MAX_SPAWNER_MESSAGE];
            while let Ok(Some(message)) = sock::recv(&reader, &mut buffer, 8) {
                match serde_json::from_slice(&buffer[..message.len]) {
                    Ok(FromSpawner::Reaped { pid, status, ns }) => reaped(pid, status, ns),
                    Ok(reply) => {
                        if sender.send((reply, message.fds)).is_err() {
                            return;
                        }
                    }
                    Err(e) => tracing::error!("spawner says something odd: {e}"),
                }
            }
            gone();
        })?;
        Ok(SpawnerHandle { socket, replies })
    }

    fn call(
        &self,
        request: &ToSpawner,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(FromSpawner, Vec<OwnedFd>), String> {
        let text = serde_json::to_vec(request).map_err(|e| e.to_string())?;
        if text.len() > MAX_SPAWNER_MESSAGE {
            return Err("arguments, environment and binds are too long".into());
        }
        sock::send(&self.socket, &[&text], fds).map_err(|e| format!("the spawner is gone: {e}"))?;
        // Everything in the spawner has a deadline of its own; this one is for a spawner that died.
        match self.replies.recv_timeout(2 * MAKE_DEADLINE + Duration::from_secs(5)) {
            Ok((FromSpawner::Failed { reason }, _)) => Err(reason),
            Ok(reply) => Ok(reply),
            Err(_) => Err("the spawner does not answer".into()),
        }
    }

    /// Makes a domain's user and network namespace.
    ///
    /// # Errors
    /// In one line.
    pub fn make_namespaces(&self, uid: u32) -> Result<(OwnedFd, OwnedFd), String> {
        let (_, fds) = self.call(&ToSpawner::MakeNamespaces { uid }, &[])?;
        let [user, net] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| "the spawner sent no namespaces")?;
        Ok((user, net))
    }

    /// Starts a process; see [`SpawnRequest`] for the descriptors.
    ///
    /// # Errors
    /// In one line.
    pub fn spawn(&self, request: SpawnRequest, fds: &[BorrowedFd<'_>]) -> Result<Started, String> {
        match self.call(&ToSpawner::Spawn(Box::new(request)), fds)? {
            (FromSpawner::Spawned { pid, missing }, fds) => {
                let [pidfd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| "the spawner sent no pidfd")?;
                Ok(Started { pid, pidfd, missing })
            }
            (other, _) => Err(format!("the spawner answered {other:?}")),
        }
    }
}

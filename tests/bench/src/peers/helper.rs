//! The other process of a two-process measurement: this program again, with its ends as standard input and output.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// What the helper process does; the hidden command `peer NAME` runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Answers each kick: blocking eventfds.
    EventfdPong,
    /// Answers each kick: non-blocking eventfds with poll(2).
    EventfdPollPong,
    /// Answers each message with one of the size asked for.
    Echo,
    /// Answers xenstore requests with fixed replies; standard input is the listener.
    StoreEcho,
    /// xenstored's loop over many rings, with one client.
    StoreRings,
}

/// A running helper; ended when dropped.
#[derive(Debug)]
pub struct Helper(Child);

impl Helper {
    /// Starts it with `input` and `output` as its ends.
    ///
    /// # Errors
    /// If this program cannot be started again.
    pub fn start(role: Role, input: OwnedFd, output: OwnedFd) -> Result<Helper> {
        let name = clap::ValueEnum::to_possible_value(&role).context("a role has a name")?;
        // Not by its path: a build may have replaced it meanwhile.
        let child = Command::new("/proc/self/exe")
            .args(["peer", name.get_name()])
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .spawn()
            .context("starting a helper process")?;
        Ok(Helper(child))
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended by itself when its ends closed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a role until its ends close.
///
/// # Errors
/// Those of its system calls.
pub fn run(role: Role) -> Result<()> {
    let (input, output) = (std::io::stdin(), std::io::stdout());
    let (input, output): (BorrowedFd<'_>, BorrowedFd<'_>) = (input.as_fd(), output.as_fd());
    match role {
        Role::EventfdPong => super::eventfd::pong(input, output, false),
        Role::EventfdPollPong => super::eventfd::pong(input, output, true),
        Role::Echo => super::echo::serve(input, output),
        Role::StoreEcho => super::store_echo::serve(input),
        Role::StoreRings => super::store_rings::serve(input, output),
    }
}

/// Puts all threads of a process on one processor, so that two sides of a ping-pong are as far apart in every contest.
///
/// # Errors
/// No such process or processor.
pub fn pin(pid: i32, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    let mut pinned = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))? {
        let Ok(tid) = task?.file_name().to_string_lossy().parse() else { continue };
        // A thread may end meanwhile.
        pinned += usize::from(sched_setaffinity(Pid::from_raw(tid), &set).is_ok());
    }
    if pinned == 0 {
        bail!("process {pid} cannot be put on processor {cpu}");
    }
    Ok(())
}

/// Lets all threads of a process run anywhere again.
///
/// # Errors
/// No such process.
pub fn unpin(pid: i32) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in 0..CpuSet::count() {
        set.set(cpu)?;
    }
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(tid) = task?.file_name().to_string_lossy().parse() else { continue };
        // A thread may end meanwhile.
        let _ = sched_setaffinity(Pid::from_raw(tid), &set);
    }
    Ok(())
}

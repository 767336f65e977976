//! Daemons that run side by side while lines are measured, and where they run.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use anyhow::{Result, anyhow};

use super::super::Settings;
use super::daemons::{Daemon, Who};
use crate::peers::helper::{pin, unpin};

/// Each started when it is first needed; idle ones cost nothing.
pub struct Arena<'a> {
    /// What the case was given.
    pub settings: &'a Settings,
    running: BTreeMap<Who, OnceCell<Result<Daemon>>>,
}

impl<'a> Arena<'a> {
    /// Nothing runs yet.
    pub fn new(settings: &'a Settings) -> Self {
        let running = [Who::Ours, Who::C, Who::Ocaml, Who::Echo].map(|who| (who, OnceCell::new()));
        Arena { settings, running: running.into() }
    }

    /// Rounds of each contest.
    pub fn rounds(&self) -> usize {
        self.settings.rounds
    }

    /// Ours and Debian's two; or ours alone.
    pub fn daemons(&self) -> Vec<Who> {
        if self.settings.ours_only { vec![Who::Ours] } else { vec![Who::Ours, Who::C, Who::Ocaml] }
    }

    /// The same with the echo.
    pub fn with_echo(&self) -> Vec<Who> {
        let mut all = self.daemons();
        all.push(Who::Echo);
        all
    }

    /// The running daemon.
    ///
    /// # Errors
    /// It does not start.
    pub fn daemon(&self, who: Who) -> Result<&Daemon> {
        let cell = self.running.get(&who).ok_or_else(|| anyhow!("no such contestant"))?;
        cell.get_or_init(|| Daemon::start(who, self.settings)).as_ref().map_err(|e| anyhow!("{e:#}"))
    }

    /// Starts one that is not the arena's.
    ///
    /// # Errors
    /// It does not start.
    pub fn fresh(&self, who: Who) -> Result<Daemon> {
        Daemon::start(who, self.settings)
    }

    fn pinned<T>(&self, ours: usize, theirs: usize, run: impl FnOnce() -> Result<T>) -> Result<T> {
        if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
            return run();
        }
        for who in self.with_echo() {
            // One that does not start is told in its line.
            if let Ok(daemon) = self.daemon(who) {
                pin(daemon.pid(), theirs)?;
            }
        }
        let me = std::process::id().cast_signed();
        pin(me, ours)?;
        let result = run();
        unpin(me)?;
        result
    }

    /// Client and daemons on one processor: what is compared is work, not how long an idle processor takes to wake up, which in a
    /// virtual machine is far longer.
    ///
    /// # Errors
    /// Those of `run`.
    pub fn on_one_processor<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<T> {
        self.pinned(0, 0, run)
    }

    /// Clients on one processor, daemons on another: what is compared is how much a daemon does in a second.
    ///
    /// # Errors
    /// Those of `run`.
    pub fn on_two_processors<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<T> {
        self.pinned(1, 0, run)
    }
}

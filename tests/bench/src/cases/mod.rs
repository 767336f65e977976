//! One module for each name on the command line.

pub mod block;
pub mod boot;
pub mod evtchn;
pub mod net;
pub mod packets;
pub mod pair;
pub mod qemu;
pub mod restart;
pub mod store;
pub mod world;

use std::path::PathBuf;

use anyhow::Result;

use crate::report::Line;

/// What every case is given.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of the built programs.
    pub bin_dir: PathBuf,
    /// The source tree.
    pub source: PathBuf,
    /// Rounds of each contest.
    pub rounds: usize,
    /// Debian's xenstored daemons, if they are here.
    pub peers: Option<store::daemons::Peers>,
    /// Measure ours alone (and the ceiling): quick, for a comparison with the last time.
    pub ours_only: bool,
    /// Only groups of lines whose names contain this.
    pub only: Option<String>,
    /// The Linux guest, if there is one.
    pub image: Option<boot::Image>,
}

/// The lines of a case, or one that says why there are none: a case that cannot run does not stop the others.
pub fn or_missing(names: &[(&str, &str, &str)], lines: Result<Vec<Line>>) -> Vec<Line> {
    lines.unwrap_or_else(|error| {
        let why = format!("not measured: {error:#}");
        names.iter().map(|(name, unit, goal)| Line::missing(name, unit, goal, &why)).collect()
    })
}

/// The system if it is up, else why it is not.
pub(crate) fn borrowed(world: &mut Result<world::World>) -> Result<&mut world::World> {
    world.as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))
}

/// The end of a system's log, on standard error: what went wrong is rarely in the error alone.
pub(crate) fn show_log(system: &bulkhead_tests::system::System) {
    let log = system.log_tail(8);
    let tail: Vec<&str> = log.lines().rev().take(40).collect();
    for line in tail.into_iter().rev() {
        eprintln!("bench: log: {line}");
    }
}

//! xenstored beside Debian's C xenstored and oxenstored, with a bare Unix-socket echo as the ceiling; then the service domain under hv-core.

pub mod arena;
pub mod conn;
pub mod daemons;
pub mod fleet;
pub mod hosted;
pub mod scale;
pub mod size;
pub mod speed;
pub mod transactions;
pub mod turns;
pub mod watching;

use anyhow::Result;

use self::arena::Arena;
use super::world::World;
use super::{Settings, or_missing};
use crate::report::Line;

type Measure = fn(&Arena<'_>) -> Result<Vec<Line>>;

/// Groups of lines: the name to ask for one, what it measures.
const GROUPS: &[(&str, Measure)] = &[
    ("one-client", speed::one_client),
    ("in-flight", speed::in_flight),
    ("many-clients", speed::many_clients),
    ("transactions", transactions::undisturbed),
    ("conflicts", transactions::conflicts),
    ("watches", watching::lines),
    ("size", size::size),
    ("restart", size::restart),
    ("live-update", size::live_update),
    ("scale", scale::lines),
];

/// All lines of the case, or those of the groups asked for. `world` is started for the last group alone.
pub fn run<'a>(settings: &Settings, world: impl FnOnce() -> &'a mut Result<World>) -> Vec<Line> {
    let wanted = |name: &str| settings.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    let arena = Arena::new(settings);
    let mut lines = Vec::new();
    for (name, measure) in GROUPS.iter().filter(|(name, _)| wanted(name)) {
        eprintln!("bench: store: {name}");
        lines.extend(or_missing(&[(&format!("store {name}"), "", "")], measure(&arena)));
    }
    if wanted("hosted") && !settings.ours_only {
        lines.extend(hosted::run(settings, world()));
    }
    lines
}

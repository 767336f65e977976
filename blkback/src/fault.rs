//! For tests of poison requests: `--fault SECTOR` makes the service panic when a write that covers that sector runs.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::engine::FaultHook;
use crate::request::{Kind, Prepared, SECTOR};

static AT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Sets the sector.
pub fn set_sector(sector: u64) {
    AT.store(sector, Relaxed);
}

/// The hook for an engine.
pub fn hook() -> FaultHook {
    Box::new(|request: &Prepared| {
        let first = request.offset / SECTOR;
        let sectors = request.len / SECTOR;
        let at = AT.load(Relaxed);
        if request.kind == Kind::Write && at.wrapping_sub(first) < sectors {
            panic!("--fault: a write to sector {at}");
        }
    })
}

//! The end of pins: they clear when the dma-buf behind a map is proved gone, and not before. A thread of its own looks after
//! those that nobody waits for: of processes that died, of domains that were destroyed, of holders that lied.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::PvhPins;
use crate::ports::Peer;
use crate::table::Hv;

/// How long a holder may take between saying that it unmapped and the dma-buf being gone.
pub const HONOUR_DEADLINE: Duration = Duration::from_secs(2);
/// How often the thread looks while something is pending.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Pins that wait for their dma-buf's end.
#[derive(Debug)]
pub struct Pending {
    /// The pins.
    pub pins: PvhPins,
    /// The only domain that was given the dma-buf.
    pub holder: Peer,
    /// The incarnation of it that may still have it.
    pub generation: u32,
}

impl PvhPins {
    /// Clears the pins. Only for a dma-buf that is proved gone or was never handed out.
    pub fn clear(self) {
        for &gref in &self.grefs {
            self.pvh.unpin(gref, true);
        }
    }
}

/// Where to leave pending pins.
#[derive(Clone, Debug)]
pub struct Releaser(Sender<Pending>);

impl Releaser {
    /// A releaser and the queue for its thread.
    pub fn new() -> (Releaser, Receiver<Pending>) {
        let (sender, receiver) = channel();
        (Releaser(sender), receiver)
    }

    /// Clears the pins as soon as that is safe.
    pub fn release(&self, pending: Pending) {
        let _ends_with_hv_core = self.0.send(pending);
    }
}

struct Waiting {
    pending: Pending,
    /// Since when the holder's incarnation has been gone.
    orphan_since: Option<Instant>,
    reported: bool,
}

/// The thread.
pub fn run(hv: &Weak<Hv>, queue: &Receiver<Pending>) {
    let mut waiting: Vec<Waiting> = Vec::new();
    loop {
        let next = if waiting.is_empty() {
            queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            queue.recv_timeout(LOOK_EVERY)
        };
        match next {
            Ok(pending) => waiting.push(Waiting { pending, orphan_since: None, reported: false }),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let Some(hv) = hv.upgrade() else { return };
        let all = std::mem::take(&mut waiting);
        waiting = all.into_iter().filter_map(|w| look(&hv, w)).collect();
    }
}

/// Clears, or gives back what still waits.
fn look(hv: &Arc<Hv>, mut w: Waiting) -> Option<Waiting> {
    let holder = w.pending.holder;
    let pid = hv.incarnation_pid(holder, w.pending.generation);
    if hv.bufs.gone(w.pending.pins.ino, pid) {
        w.pending.pins.clear();
        return None;
    }
    if pid.is_some() {
        return Some(w);
    }
    let since = *w.orphan_since.get_or_insert_with(Instant::now);
    if since.elapsed() > HONOUR_DEADLINE && !w.reported {
        w.reported = true;
        // The process is gone and the dma-buf is not: only a descriptor in flight in a stored socket can hold it.
        let sockets = hv.take_stored_sockets(holder);
        hv.violation(
            holder,
            &format!(
                "a dma-buf with granted pages outlives its holder; {} stored sockets closed",
                sockets.len()
            ),
            false,
        );
    }
    Some(w)
}

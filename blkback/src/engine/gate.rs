//! What orders the rings of one device among each other.
//!
//! A barrier, and a request that may have crashed a predecessor, run alone on the whole device: everything that another ring had
//! handed to the disk has completed before, and nothing of another ring's starts until it is done. blkif has no order between
//! requests that wait on two rings at the same time (nobody but the frontend could tell it), so each such request has a place
//! before or after the barrier, never across it.
//!
//! Each ring says in a word of its own whether it has anything under way; who wants to be alone says so in one word of the device.
//! Each writes its own word and then looks at the other's, so at least one of two sees the other. Who has to wait sleeps, and is woken
//! by whoever made it wait. A request that is not the first under way costs one load of a word that hardly ever changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed, Ordering::SeqCst};

/// Has a ring's thread look at its requests again.
pub type Wake = Box<dyn Fn() + Send + Sync>;

/// One line of the processor's cache each, so that rings do not disturb each other.
#[repr(align(128))]
struct Ring {
    /// Something is under way, or about to be.
    busy: AtomicBool,
    wake: Wake,
}

/// The rings of a device.
pub struct Gate {
    /// The ring that is, or wants to be, alone, + 1; 0 if none.
    alone: AtomicU32,
    rings: Box<[Ring]>,
}

impl Gate {
    /// For rings that are woken so.
    pub fn new(wakes: Vec<Wake>) -> Arc<Gate> {
        let rings = wakes.into_iter().map(|wake| Ring { busy: false.into(), wake });
        Arc::new(Gate { alone: 0.into(), rings: rings.collect() })
    }

    fn wake_alone(&self) {
        let alone = self.alone.load(SeqCst);
        if let Some(ring) = (alone as usize).checked_sub(1).and_then(|i| self.rings.get(i)) {
            (ring.wake)();
        }
    }

    fn open(&self, me: u32) {
        self.alone.store(0, SeqCst);
        for (_, ring) in (0..).zip(&self.rings).filter(|(i, _)| *i != me) {
            (ring.wake)();
        }
    }
}

/// A ring's part in its device's [`Gate`].
#[derive(Default)]
pub struct Seat {
    /// `None`: the only ring.
    gate: Option<Arc<Gate>>,
    number: u32,
    /// As `busy` says.
    inside: bool,
    /// `alone` is this ring's.
    claimed: bool,
}

impl Seat {
    /// Of ring `number`.
    pub fn new(gate: Arc<Gate>, number: u32) -> Seat {
        Seat { gate: Some(gate), number, inside: false, claimed: false }
    }

    /// A request may start beside others. If not, the ring is woken when it may; it has to [`Seat::leave`] once nothing of its own is
    /// under way, because who wants to be alone waits for that.
    pub fn enter(&mut self) -> bool {
        let Some(gate) = &self.gate else { return true };
        let Some(ring) = gate.rings.get(self.number as usize) else { return true };
        if self.inside {
            // Whoever wants to be alone waits for this ring; it starts nothing more until then.
            return gate.alone.load(Relaxed) == 0;
        }
        ring.busy.store(true, SeqCst);
        if std::mem::take(&mut self.claimed) {
            gate.open(self.number);
        } else if gate.alone.load(SeqCst) != 0 {
            ring.busy.store(false, SeqCst);
            gate.wake_alone();
            return false;
        }
        self.inside = true;
        true
    }

    /// A request may start, and nothing else is under way on the device. To be asked when nothing of this ring's is. If not, others
    /// start nothing more, and the ring is woken when it may.
    pub fn enter_alone(&mut self) -> bool {
        let Some(gate) = &self.gate else { return true };
        if !self.claimed {
            if std::mem::take(&mut self.inside) {
                gate.rings[self.number as usize].busy.store(false, SeqCst);
            }
            let claimed = gate.alone.compare_exchange(0, self.number + 1, SeqCst, SeqCst);
            if claimed.is_err() {
                // It may have waited for this ring.
                gate.wake_alone();
                return false;
            }
            self.claimed = true;
        }
        (0..).zip(&gate.rings).all(|(i, ring)| i == self.number || !ring.busy.load(SeqCst))
    }

    /// Nothing of this ring's is under way, and it does not wait to be alone.
    pub fn leave(&mut self) {
        let Some(gate) = &self.gate else { return };
        if std::mem::take(&mut self.claimed) {
            gate.open(self.number);
        }
        if std::mem::take(&mut self.inside) {
            gate.rings[self.number as usize].busy.store(false, SeqCst);
            gate.wake_alone();
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    /// Threads that run requests, now and then alone, and sleep until woken when they may not.
    #[test]
    fn alone_is_alone_and_nobody_sleeps_for_ever() {
        const RINGS: usize = 4;
        struct Thread {
            woken: AtomicBool,
            under_way: AtomicU64,
        }
        let threads: Arc<Vec<Thread>> =
            Arc::new((0..RINGS).map(|_| Thread { woken: true.into(), under_way: 0.into() }).collect());
        let alone = AtomicU64::new(0);
        let wake = |i: usize| -> Wake {
            let threads = threads.clone();
            Box::new(move || threads[i].woken.store(true, SeqCst))
        };
        let gate = Gate::new((0..RINGS).map(wake).collect());
        let (turns, lonely) = (20_000u64, AtomicU64::new(0));
        std::thread::scope(|scope| {
            for me in 0..RINGS {
                let (threads, alone, lonely) = (&threads, &alone, &lonely);
                let mut seat = Seat::new(gate.clone(), me as u32);
                scope.spawn(move || {
                    let mut random = me as u64 + 1;
                    for _ in 0..turns {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let wants_alone = random.is_multiple_of(5);
                        let began = Instant::now();
                        loop {
                            threads[me].woken.store(false, SeqCst);
                            let may = if wants_alone { seat.enter_alone() } else { seat.enter() };
                            if may {
                                break;
                            }
                            // As the engine at the end of a round: nothing is under way.
                            if !wants_alone {
                                seat.leave();
                            }
                            while !threads[me].woken.load(SeqCst) {
                                assert!(began.elapsed() < Duration::from_secs(60), "not woken");
                                std::thread::yield_now();
                            }
                        }
                        threads[me].under_way.store(1, SeqCst);
                        if wants_alone {
                            assert_eq!(alone.swap(1, SeqCst), 0, "two are alone");
                            let others: u64 = threads.iter().map(|t| t.under_way.load(SeqCst)).sum();
                            assert_eq!(others, 1, "not alone");
                            lonely.fetch_add(1, SeqCst);
                            alone.store(0, SeqCst);
                        } else {
                            assert_eq!(alone.load(SeqCst), 0, "beside one that is alone");
                        }
                        threads[me].under_way.store(0, SeqCst);
                        if random & 2 == 0 || wants_alone {
                            seat.leave();
                        }
                    }
                    seat.leave();
                });
            }
        });
        assert!(lonely.load(SeqCst) > turns / 2);
    }

    #[test]
    fn the_only_ring_never_waits() {
        let mut seat = Seat::default();
        assert!(seat.enter() && seat.enter_alone() && seat.enter());
        seat.leave();
    }
}

//! What orders the rings of one device among each other.
//!
//! A barrier, and a request that may have crashed a predecessor, run alone on the whole device: everything that another ring had
//! handed to the disk has completed before, and nothing of another ring's starts until it is done. blkif has no order between
//! requests that wait on two rings at the same time (nobody but the frontend could tell it), so each such request has a place
//! before or after the barrier, never across it.
//!
//! Each ring says in a word of its own whether it has anything under way; who wants to be alone says so in one word of the device.
//! Each writes its own word and then looks at the other's, so at least one of two sees the other. Who has to wait sleeps, and is woken
//! by whoever made it wait. A ring that was alone is so again only after each ring that it made wait had its turn: a stream of
//! barriers on one does not keep the others from the disk. A request that is not the first under way costs one load of a word that hardly ever changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed, Ordering::SeqCst};

/// Has a ring's thread look at its requests again.
pub type Wake = Box<dyn Fn() + Send + Sync>;

/// One line of the processor's cache each, so that rings do not disturb each other.
#[repr(align(128))]
struct Ring {
    /// Something is under way, or about to be.
    busy: AtomicBool,
    /// It was turned away, and not let in since.
    waits: AtomicBool,
    wake: Wake,
}

/// The rings of a device.
pub struct Gate {
    /// The ring that is, or wants to be, alone, + 1; 0 if none.
    alone: AtomicU32,
    /// The ring that was alone last, + 1.
    last: AtomicU32,
    rings: Box<[Ring]>,
}

impl Gate {
    /// For rings that are woken so.
    pub fn new(wakes: Vec<Wake>) -> Arc<Gate> {
        let rings = wakes.into_iter().map(|wake| Ring { busy: false.into(), waits: false.into(), wake });
        Arc::new(Gate { alone: 0.into(), last: 0.into(), rings: rings.collect() })
    }

    fn wake(&self, ring: &AtomicU32) {
        if let Some(ring) = (ring.load(SeqCst) as usize).checked_sub(1).and_then(|i| self.rings.get(i)) {
            (ring.wake)();
        }
    }

    fn wake_alone(&self) {
        self.wake(&self.alone);
    }

    /// Ring `me` was alone last, and another has waited for its turn since.
    fn owes(&self, me: u32) -> bool {
        self.last.load(SeqCst) == me + 1
            && (0..).zip(&self.rings).any(|(i, ring)| i != me && ring.waits.load(SeqCst))
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
    /// And a request of its was let in so.
    was_alone: bool,
    /// As `waits` says.
    waits: bool,
}

impl Seat {
    /// Of ring `number`.
    pub fn new(gate: Arc<Gate>, number: u32) -> Seat {
        Seat { gate: Some(gate), number, ..Seat::default() }
    }

    /// A request may start beside others. If not, the ring is woken when it may; it has to [`Seat::leave`] once nothing of its own is
    /// under way, because who wants to be alone waits for that.
    pub fn enter(&mut self) -> bool {
        let Some(gate) = &self.gate else { return true };
        let Some(ring) = gate.rings.get(self.number as usize) else { return true };
        if self.inside {
            // Whoever wants to be alone waits for this ring; it starts nothing more until then.
            let may = gate.alone.load(Relaxed) == 0;
            if may == self.waits {
                self.set_waits(!may);
            }
            return may;
        }
        ring.busy.store(true, SeqCst);
        if std::mem::take(&mut self.claimed) {
            gate.open(self.number);
        } else if gate.alone.load(SeqCst) != 0 {
            ring.busy.store(false, SeqCst);
            gate.wake_alone();
            self.set_waits(true);
            // It may have opened just before it could see that this ring waits; then the wake-up is under way.
            return false;
        }
        self.inside = true;
        self.set_waits(false);
        true
    }

    /// Who was alone last waits for those that wait.
    fn set_waits(&mut self, waits: bool) {
        if std::mem::replace(&mut self.waits, waits) == waits {
            return;
        }
        let Some(gate) = &self.gate else { return };
        gate.rings[self.number as usize].waits.store(waits, SeqCst);
        if !waits {
            gate.wake(&gate.last);
        }
    }

    /// A request may start, and nothing else is under way on the device. To be asked when nothing of this ring's is. If not, others
    /// start nothing more, and the ring is woken when it may.
    pub fn enter_alone(&mut self) -> bool {
        let Some(gate) = self.gate.clone() else { return true };
        if self.claimed && std::mem::take(&mut self.was_alone) && gate.owes(self.number) {
            self.claimed = false;
            gate.open(self.number);
        }
        if !self.claimed {
            if std::mem::take(&mut self.inside) {
                gate.rings[self.number as usize].busy.store(false, SeqCst);
            }
            let owes = gate.owes(self.number);
            if owes || gate.alone.compare_exchange(0, self.number + 1, SeqCst, SeqCst).is_err() {
                // It may have waited for this ring.
                gate.wake_alone();
                self.set_waits(true);
                return false;
            }
            self.claimed = true;
            gate.last.store(self.number + 1, SeqCst);
        }
        let others = || (0..).zip(&gate.rings).filter(|(i, _)| *i != self.number);
        self.was_alone = others().all(|(_, ring)| !ring.busy.load(SeqCst));
        if self.was_alone {
            self.set_waits(false);
        }
        self.was_alone
    }

    /// Nothing of this ring's is under way, and it does not wait to be alone.
    pub fn leave(&mut self) {
        let Some(gate) = &self.gate else { return };
        self.was_alone = false;
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
        self.set_waits(false);
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
    fn a_stream_of_barriers_lets_the_others_take_turns() {
        let woken: Arc<[AtomicU64; 3]> = Arc::default();
        let wake = |i: usize| -> Wake {
            let woken = woken.clone();
            Box::new(move || {
                woken[i].fetch_add(1, SeqCst);
            })
        };
        let gate = Gate::new((0..3).map(wake).collect());
        let [mut a, mut b, mut c] = [0, 1, 2].map(|i| Seat::new(gate.clone(), i));
        assert!(a.enter_alone());
        assert!(a.enter_alone(), "nobody waits: the next at once");
        assert!(!b.enter());
        b.leave();
        assert!(!a.enter_alone(), "b has waited");
        let before = woken[0].load(SeqCst);
        assert!(b.enter());
        assert!(woken[0].load(SeqCst) > before, "a is told that b had its turn");
        assert!(!a.enter_alone(), "b is busy");
        assert!(!b.enter(), "and starts nothing more");
        b.leave();
        assert!(a.enter_alone());
        // Among barriers too.
        assert!(!c.enter_alone());
        assert!(!a.enter_alone());
        assert!(c.enter_alone());
        assert!(!a.enter_alone() && !c.enter_alone(), "now a has waited");
        assert!(!b.enter() || !a.enter_alone());
        b.leave();
        assert!(a.enter_alone());
        // Who goes does not keep others waiting.
        assert!(!b.enter());
        drop(b);
        assert!(!a.enter_alone(), "c still waits");
        drop(c);
        assert!(a.enter_alone());
    }

    #[test]
    fn the_only_ring_never_waits() {
        let mut seat = Seat::default();
        assert!(seat.enter() && seat.enter_alone() && seat.enter());
        seat.leave();
    }
}

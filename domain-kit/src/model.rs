//! For model tests: code that is killed at any of its steps, under a scheduler that tries everything.
//!
//! A model runs the real code over memory ([`DyingMem`]) each of whose stores asks the incarnation's [`Life`] whether it still
//! happens. Every decision, kills included, is drawn from one [`Chooser`], which either walks through all combinations
//! or draws from a seed. A dead incarnation's code runs on to the end of its call without effect; then the model drops it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::ring::{HeapMem, RingMem};

/// Where decisions come from.
#[derive(Debug)]
pub enum Chooser {
    /// All combinations, one after the other.
    Exhaustive {
        /// (chosen, of how many), in order.
        path: Vec<(u32, u32)>,
        /// How many were drawn in this run.
        depth: usize,
    },
    /// Pseudo-random, from a seed (splitmix64).
    Random {
        /// The generator's state.
        state: u64,
        /// A kill happens at one of so many steps.
        kill_odds: u32,
    },
}

impl Chooser {
    /// All combinations. Call [`Chooser::advance`] after each run until it says false.
    pub fn exhaustive() -> Self {
        Chooser::Exhaustive { path: Vec::new(), depth: 0 }
    }

    /// Draws from a seed; a kill at one of `kill_odds` steps.
    pub fn random(seed: u64, kill_odds: u32) -> Self {
        Chooser::Random { state: seed, kill_odds }
    }

    /// One of `n` (at least 1): 0 to n - 1.
    pub fn choose(&mut self, n: u32) -> u32 {
        match self {
            _ if n <= 1 => 0,
            Chooser::Exhaustive { path, depth } => {
                if *depth == path.len() {
                    path.push((0, n));
                }
                let (chosen, of) = path[*depth];
                assert_eq!(of, n, "the model is not deterministic");
                *depth += 1;
                chosen
            }
            Chooser::Random { state, .. } => {
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = *state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                ((z ^ (z >> 31)) % u64::from(n)) as u32
            }
        }
    }

    fn kill(&mut self) -> bool {
        match self {
            Chooser::Exhaustive { .. } => self.choose(2) == 1,
            Chooser::Random { kill_odds, .. } => {
                let odds = *kill_odds;
                self.choose(odds) == 0
            }
        }
    }

    /// Moves on to the next combination; false when all were tried (always, if random).
    pub fn advance(&mut self) -> bool {
        let Chooser::Exhaustive { path, depth } = self else { return false };
        path.truncate(*depth);
        *depth = 0;
        while let Some((chosen, of)) = path.pop() {
            if chosen + 1 < of {
                path.push((chosen + 1, of));
                return true;
            }
        }
        false
    }
}

/// How an incarnation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// SIGKILL from outside.
    Killed,
    /// Its own fault: a panic or the like.
    OwnFault,
}

/// What all incarnations of one run share.
#[derive(Clone, Debug)]
pub struct Fate {
    /// The run's decisions.
    pub chooser: Rc<RefCell<Chooser>>,
    kills_left: Rc<Cell<u32>>,
    steps: Rc<Cell<u64>>,
}

impl Fate {
    /// A run with at most `kills` kills from outside.
    pub fn new(chooser: Rc<RefCell<Chooser>>, kills: u32) -> Self {
        Fate { chooser, kills_left: Rc::new(Cell::new(kills)), steps: Rc::new(Cell::new(0)) }
    }

    /// One of `n`.
    pub fn choose(&self, n: u32) -> u32 {
        self.chooser.borrow_mut().choose(n)
    }

    /// Kills that may still come.
    pub fn kills_left(&self) -> u32 {
        self.kills_left.get()
    }

    /// Steps taken by all incarnations.
    pub fn steps(&self) -> u64 {
        self.steps.get()
    }
}

/// One incarnation.
#[derive(Debug)]
pub struct Life {
    fate: Fate,
    death: Cell<Option<Death>>,
}

impl Life {
    /// A new incarnation.
    pub fn new(fate: &Fate) -> Rc<Self> {
        Rc::new(Life { fate: fate.clone(), death: Cell::new(None) })
    }

    /// To be asked before anything that others could see; false if it no longer happens.
    pub fn step(&self) -> bool {
        if self.death.get().is_some() {
            return false;
        }
        self.fate.steps.set(self.fate.steps.get() + 1);
        let left = self.fate.kills_left.get();
        if left > 0 && self.fate.chooser.borrow_mut().kill() {
            self.fate.kills_left.set(left - 1);
            self.death.set(Some(Death::Killed));
            return false;
        }
        true
    }

    /// The incarnation crashes here by its own fault (if it still lives).
    pub fn crash(&self) {
        if self.death.get().is_none() {
            self.death.set(Some(Death::OwnFault));
        }
    }

    /// How it ended, if it has.
    pub fn death(&self) -> Option<Death> {
        self.death.get()
    }
}

/// Memory whose stores happen only while their writer lives. Each store is a step; a copy is two, so it can be torn.
#[derive(Clone, Debug)]
pub struct DyingMem {
    mem: Rc<HeapMem>,
    life: Rc<Life>,
}

impl DyingMem {
    /// The view that an incarnation has of memory that outlives it.
    pub fn new(mem: &Rc<HeapMem>, life: &Rc<Life>) -> Self {
        DyingMem { mem: mem.clone(), life: life.clone() }
    }
}

impl RingMem for DyingMem {
    fn size(&self) -> usize {
        self.mem.size()
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.mem.load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        if self.life.step() {
            self.mem.store_u32(offset, value);
        }
    }
    fn load_u64(&self, offset: usize) -> u64 {
        self.mem.load_u64(offset)
    }
    fn store_u64(&self, offset: usize, value: u64) {
        if self.life.step() {
            self.mem.store_u64(offset, value);
        }
    }
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.mem.copy_out(offset, into);
    }
    fn copy_in(&self, offset: usize, from: &[u8]) {
        let (first, second) = from.split_at(from.len() / 2);
        if self.life.step() {
            self.mem.copy_in(offset, first);
        }
        if self.life.step() {
            self.mem.copy_in(offset + first.len(), second);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_once() {
        let mut chooser = Chooser::exhaustive();
        let mut seen = std::collections::BTreeSet::new();
        loop {
            let a = chooser.choose(3);
            let b = if a == 1 { chooser.choose(2) } else { 9 };
            assert!(seen.insert((a, b)));
            if !chooser.advance() {
                break;
            }
        }
        assert_eq!(seen.len(), 4);
    }

    #[test]
    fn a_killed_writer_leaves_a_prefix_of_its_stores() {
        let chooser = Rc::new(RefCell::new(Chooser::exhaustive()));
        let mut outcomes = std::collections::BTreeSet::new();
        loop {
            let fate = Fate::new(chooser.clone(), 1);
            let life = Life::new(&fate);
            let mem = Rc::new(HeapMem::new(16));
            let view = DyingMem::new(&mem, &life);
            (0..3).for_each(|i| view.store_u32(4 * i, 1));
            outcomes.insert((0..3).map(|i| mem.load_u32(4 * i)).collect::<Vec<_>>());
            if !chooser.borrow_mut().advance() {
                break;
            }
        }
        assert_eq!(outcomes.len(), 4);
    }
}

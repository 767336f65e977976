//! Which events each watch must bring, in order.

use std::collections::{BTreeMap, VecDeque};

use anyhow::{Context, Result, bail, ensure};

use super::model::{Change, below};

/// Which events one watch still has to bring from one subtree.
#[derive(Debug, Default)]
struct Expected {
    paths: VecDeque<String>,
    seen: u64,
}

/// A watch as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Watch {
    path: String,
    /// Bytes cut from the path of its events: it was set by a relative path.
    strip: usize,
    /// Its owner may not read what it watches: nothing but the first event may come (XSA-115).
    blind: bool,
}

/// All watches of all actors, and what they still have to bring.
#[derive(Debug, Default)]
pub struct Ledger {
    /// By actor and token.
    watches: BTreeMap<(usize, String), Watch>,
    /// By actor, token and the subtree that the event is of.
    expected: BTreeMap<(usize, String, String), Expected>,
    /// The roots of the subtrees.
    bases: Vec<String>,
}

impl Ledger {
    /// With these subtrees.
    pub fn new(bases: Vec<String>) -> Self {
        Ledger { bases, ..Ledger::default() }
    }

    fn base_of(&self, path: &str) -> Option<&String> {
        self.bases.iter().find(|b| path == *b || below(b, path))
    }

    fn expect(&mut self, actor: usize, token: &str, base: &str, path: &str) {
        let key = (actor, token.to_owned(), base.to_owned());
        self.expected.entry(key).or_default().paths.push_back(path.to_owned());
    }

    /// A watch is being set; it brings one event at once. False if it is there already. Nothing further comes to a `blind` one, whose
    /// owner may not read there.
    pub fn watch(&mut self, actor: usize, token: &str, path: &str, strip: usize, blind: bool) -> bool {
        let key = (actor, token.to_owned());
        if self.watches.contains_key(&key) {
            return false;
        }
        self.watches.insert(key, Watch { path: path.into(), strip, blind });
        let base = self.base_of(path).cloned().unwrap_or_default();
        self.expect(actor, token, &base, &path[strip..]);
        true
    }

    /// A watch is being removed. False if it is not there.
    pub fn unwatch(&mut self, actor: usize, token: &str) -> bool {
        self.watches.remove(&(actor, token.to_owned())).is_some()
    }

    /// How many watches an actor has.
    pub fn count(&self, actor: usize) -> usize {
        self.watches.keys().filter(|(a, _)| *a == actor).count()
    }

    /// The path that a token stands for.
    pub fn path(&self, actor: usize, token: &str) -> Option<&str> {
        self.watches.get(&(actor, token.to_owned())).map(|w| w.path.as_str())
    }

    /// A change in the subtree `base` is being made.
    pub fn change(&mut self, base: &str, change: &Change) {
        let mut told = Vec::new();
        for ((actor, token), watch) in self.watches.iter().filter(|(_, w)| !w.blind) {
            match change {
                Change::At(path) if watch.path == *path || below(&watch.path, path) || watch.path == "/" => {
                    told.push((*actor, token.clone(), path[watch.strip..].to_owned()));
                }
                Change::Below(_, gone) if gone.contains(&watch.path) => {
                    told.push((*actor, token.clone(), watch.path[watch.strip..].to_owned()));
                }
                _ => {}
            }
        }
        for (actor, token, path) in told {
            self.expect(actor, &token, base, &path);
        }
    }

    /// An event came.
    ///
    /// # Errors
    /// It is not the one that this watch had to bring.
    pub fn came(&mut self, actor: usize, home: &str, path: &str, token: &str) -> Result<()> {
        let whole = if path.starts_with('/') { path.to_owned() } else { format!("{home}/{path}") };
        let base = self.base_of(&whole).cloned().unwrap_or_default();
        let key = (actor, token.to_owned(), base);
        let expected =
            self.expected.get_mut(&key).with_context(|| format!("event {path} {token}: no such watch"))?;
        let seen = expected.seen;
        match expected.paths.pop_front() {
            Some(due) if due == path => expected.seen += 1,
            Some(due) => bail!("watch {token}, event {seen}: {path} came, {due} was due"),
            None => bail!("watch {token}, event {seen}: {path} came, nothing was due"),
        }
        Ok(())
    }

    /// Events that came so far.
    pub fn seen(&self) -> u64 {
        self.expected.values().map(|e| e.seen).sum()
    }

    /// Nothing is due any more.
    ///
    /// # Errors
    /// What did not come.
    pub fn settled(&mut self) -> Result<()> {
        for ((actor, token, _), expected) in &self.expected {
            ensure!(
                expected.paths.is_empty(),
                "actor {actor}, watch {token}: {} events did not come, first {:?} after {} that did",
                expected.paths.len(),
                expected.paths.front(),
                expected.seen
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_once_and_in_order() {
        let mut ledger = Ledger::new(vec!["/b".into()]);
        assert!(ledger.watch(0, "t", "/b/x", 0, false));
        assert!(!ledger.watch(0, "t", "/b/x", 0, false));
        ledger.came(0, "", "/b/x", "t").unwrap();
        for path in ["/b/x", "/b/x/y", "/b/z"] {
            ledger.change("/b", &Change::At(path.into()));
        }
        assert!(ledger.came(0, "", "/b/x/y", "t").is_err(), "out of order");
        let mut ledger = Ledger::new(vec!["/b".into()]);
        ledger.watch(0, "t", "/b/x", 0, false);
        assert!(ledger.settled().is_err(), "the first is due");
        ledger.came(0, "", "/b/x", "t").unwrap();
        ledger.settled().unwrap();
        assert!(ledger.came(0, "", "/b/x", "t").is_err(), "twice");
        ledger.change("/b", &Change::Below("/b".into(), vec!["/b/x".into()]));
        ledger.came(0, "", "/b/x", "t").unwrap();
    }
}

//! Rounds in which the daemons take turns, and the lines of the table that come of them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::daemons::Who;
use crate::report::{Goal, Line};
use crate::stats::Series;

/// What each contestant measured: several figures a turn.
#[derive(Debug, Default)]
pub struct Results {
    figures: BTreeMap<Who, Vec<Series>>,
    /// Who could not be measured, and why.
    failed: BTreeMap<Who, String>,
}

/// Runs `rounds` rounds after one that only warms up. A peer that fails is left out from then on, with the reason in the line.
///
/// # Errors
/// Ours failed.
pub fn take_turns(
    rounds: usize,
    whos: &[Who],
    mut measure: impl FnMut(Who) -> Result<Vec<f64>>,
) -> Result<Results> {
    let mut results = Results::default();
    for round in 0..=rounds {
        for &who in whos {
            if results.failed.contains_key(&who) {
                continue;
            }
            match measure(who) {
                Ok(_) if round == 0 && rounds > 1 => {}
                Ok(values) => {
                    let series =
                        results.figures.entry(who).or_insert_with(|| vec![Series::default(); values.len()]);
                    series.iter_mut().zip(values).for_each(|(s, v)| s.push(v));
                }
                Err(e) if who == Who::Ours => return Err(e),
                Err(e) => {
                    results.figures.remove(&who);
                    results.failed.insert(who, format!("{e:#}"));
                }
            }
        }
        if rounds == 1 {
            break;
        }
    }
    Ok(results)
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Times, sizes.
    Lower,
    /// Rates.
    Higher,
}

/// What ours is held against.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// At most so many times this contestant's figure.
    AtMost(f64, Who),
    /// At least so many times this contestant's figure.
    AtLeast(f64, Who),
    /// So many times better than the best of Debian's two.
    Best(f64),
    /// At least this figure, whatever others have.
    Floor(f64),
    /// Below this figure, whatever others have.
    Under(f64),
}

impl Results {
    /// Adds a peer that cannot take part, with the reason.
    pub fn without(&mut self, who: Who, why: &str) {
        self.failed.insert(who, why.into());
    }

    /// The series of one figure of one contestant; empty if it has none.
    pub fn series(&self, who: Who, figure: usize) -> Series {
        self.figures.get(&who).and_then(|f| f.get(figure)).cloned().unwrap_or_default()
    }

    /// A line of the table.
    pub fn line(&self, name: &str, unit: &str, figure: usize, better: Better, target: Target) -> Line {
        let ours = self.series(Who::Ours, figure);
        let best =
            [Who::C, Who::Ocaml].into_iter().filter(|w| self.figures.contains_key(w)).min_by(|a, b| {
                let order = self.series(*a, figure).median().total_cmp(&self.series(*b, figure).median());
                if better == Better::Lower { order } else { order.reverse() }
            });
        let (rival, goal, fixed) = match (target, better) {
            (Target::AtMost(x, who), _) => (Some(who), Goal::RatioAtMost(x), None),
            (Target::AtLeast(x, who), _) => (Some(who), Goal::RatioAtLeast(x), None),
            (Target::Best(x), Better::Lower) => (best, Goal::RatioAtMost(1.0 / x), None),
            (Target::Best(x), Better::Higher) => (best, Goal::RatioAtLeast(x), None),
            (Target::Floor(x), _) => {
                (best, Goal::None, Some((format!(">= {x} {unit}"), x, ours.median() >= x)))
            }
            (Target::Under(x), _) => {
                (best, Goal::None, Some((format!("< {x} {unit}"), x, ours.median() < x)))
            }
        };
        let rivals = rival.map(|w| self.series(w, figure)).unwrap_or_default();
        let mut line = Line::beside(name, unit, &ours, (rival.map_or("a peer", Who::name), &rivals), goal);
        if let Some((words, limit, met)) = fixed {
            (line.goal, line.met, line.limit) = (words, Some(met).filter(|_| !ours.is_empty()), Some(limit));
        }
        if ours.median() == 0.0 && better == Better::Lower && !rivals.is_empty() {
            // Nothing cannot be beaten, and has no ratio to what may be nothing too.
            line.met = Some(true);
        }
        for who in self.figures.keys().filter(|w| **w != Who::Ours) {
            line = line.peer(who.name(), &self.series(*who, figure));
        }
        let reasons: BTreeSet<String> =
            self.failed.iter().map(|(who, why)| format!("{} not measured: {why}", who.name())).collect();
        line.note(Vec::from_iter(reasons).join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        take_turns(2, &[Who::Ours, Who::C, Who::Ocaml], |who| {
            Ok(match who {
                Who::Ours => vec![10.0, 0.0],
                Who::C => vec![20.0, 3.0],
                _ => vec![30.0, 0.0],
            })
        })
        .unwrap()
    }

    #[test]
    fn the_best_peer_depends_on_what_is_better() {
        let lower = results().line("x", "us", 0, Better::Lower, Target::Best(1.5));
        assert_eq!((lower.ratio, lower.met), (Some(0.5), Some(true)));
        let higher = results().line("x", "op/s", 0, Better::Higher, Target::Best(1.5));
        assert_eq!((higher.ratio.map(|r| r < 0.34), higher.met), (Some(true), Some(false)));
        assert_eq!(results().line("x", "", 1, Better::Lower, Target::Best(1.5)).met, Some(true));
    }

    #[test]
    fn a_peer_that_fails_is_named_and_ours_is_an_error() {
        let fail = |bad: Who| {
            take_turns(2, &[Who::Ours, Who::C], |who| match who {
                w if w == bad => Err(anyhow::anyhow!("gone")),
                _ => Ok(vec![1.0]),
            })
        };
        let line = fail(Who::C).unwrap().line("x", "us", 0, Better::Lower, Target::Best(1.5));
        assert_eq!((line.met, line.note.as_str()), (None, "C not measured: gone"));
        assert!(fail(Who::Ours).is_err());
    }
}

//! Who is killed when, and what pause the guest saw.

use std::collections::BTreeMap;
use std::time::Duration;

/// Small repeatable random numbers (splitmix64); a run is repeated by its seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n` (n > 0).
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n
    }

    /// A time between two.
    pub fn between(&mut self, low: Duration, high: Duration) -> Duration {
        let span = high.saturating_sub(low).as_micros().max(1) as u64;
        low + Duration::from_micros(self.below(span))
    }
}

/// Name of the kills of several components at once.
pub const SEVERAL: &str = "several at once";

/// What one kill hits: names of services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kill {
    /// The row it counts in: a component's name or [`SEVERAL`].
    pub row: String,
    /// The services killed in the same moment.
    pub victims: Vec<String>,
}

/// A plan of `count` kills: every component equally often, a fifth of several at once, in random order.
pub fn plan(components: &[String], count: usize, rng: &mut Rng) -> Vec<Kill> {
    let mut kills: Vec<Kill> = (0..count)
        .map(|i| {
            let which = i % (components.len() + 1);
            match components.get(which) {
                Some(name) => Kill { row: name.clone(), victims: vec![name.clone()] },
                None => {
                    let mut victims = components.to_vec();
                    let keep = 2 + rng.below(components.len().saturating_sub(1).max(1) as u64) as usize;
                    while victims.len() > keep {
                        let out = rng.below(victims.len() as u64) as usize;
                        victims.remove(out);
                    }
                    Kill { row: SEVERAL.into(), victims }
                }
            }
        })
        .collect();
    for i in (1..kills.len()).rev() {
        kills.swap(i, rng.below(i as u64 + 1) as usize);
    }
    kills
}

/// Pauses by row, milliseconds.
#[derive(Clone, Debug, Default)]
pub struct Pauses(pub BTreeMap<String, Vec<f64>>);

/// Median, 99th percentile and longest of some pauses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// How many.
    pub count: usize,
    /// Median, ms.
    pub p50: f64,
    /// 99th percentile, ms.
    pub p99: f64,
    /// Longest, ms.
    pub max: f64,
}

impl Pauses {
    /// Notes the pause that a kill caused.
    pub fn add(&mut self, row: &str, pause: Duration) {
        self.0.entry(row.into()).or_default().push(pause.as_secs_f64() * 1000.0);
    }

    /// The figures of a row (nearest-rank percentiles).
    pub fn summary(&self, row: &str) -> Summary {
        let Some(pauses) = self.0.get(row).filter(|p| !p.is_empty()) else { return Summary::default() };
        let mut sorted = pauses.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = |p: f64| sorted[((p * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len()) - 1];
        Summary { count: sorted.len(), p50: rank(0.50), p99: rank(0.99), max: sorted[sorted.len() - 1] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_hits_everybody_and_is_repeatable() {
        let components: Vec<String> = ["a", "b", "c", "d"].map(String::from).to_vec();
        let kills = plan(&components, 50, &mut Rng::new(7));
        assert_eq!(kills, plan(&components, 50, &mut Rng::new(7)));
        assert_eq!(kills.len(), 50);
        for row in components.iter().map(String::as_str).chain([SEVERAL]) {
            assert_eq!(kills.iter().filter(|k| k.row == row).count(), 10, "{row}");
        }
        assert!(kills.iter().filter(|k| k.row == SEVERAL).all(|k| (2..=4).contains(&k.victims.len())));
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let mut pauses = Pauses::default();
        for ms in 1..=100 {
            pauses.add("x", Duration::from_millis(ms));
        }
        assert_eq!(pauses.summary("x"), Summary { count: 100, p50: 50.0, p99: 99.0, max: 100.0 });
        assert_eq!(pauses.summary("y").count, 0);
    }
}

//! What was measured: a table for people, JSON for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::stats::Series;

/// One measured thing.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Line {
    /// What, as "block read qd32".
    pub name: String,
    /// Unit of `ours`, `peers` and `limit`.
    pub unit: String,
    /// Ours, median; none if it could not be measured (`note` says why).
    pub ours: Option<f64>,
    /// Others' figures from the same run, medians.
    pub peers: BTreeMap<String, f64>,
    /// What the machine can do, from the same run, median; or the fixed limit of a goal that is a number.
    pub limit: Option<f64>,
    /// The goal in words; empty if there is none.
    pub goal: String,
    /// Whether it was reached; none without a goal or a measurement.
    pub met: Option<bool>,
    /// Median of ours over limit, round by round.
    pub ratio: Option<f64>,
    /// 10th and 90th percentile of that ratio: how much to trust it.
    pub ratio_spread: Option<(f64, f64)>,
    /// 99th percentile, where single operations were timed.
    pub p99: Option<f64>,
    /// Rounds, or operations timed.
    pub samples: usize,
    /// What else must be known to read the figure.
    pub note: String,
}

/// A goal as a number.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    /// No goal: only stated.
    None,
    /// Ours over limit is at most this.
    RatioAtMost(f64),
    /// Ours over limit is at least this.
    RatioAtLeast(f64),
    /// Ours is at most so much more than the limit, in the line's unit.
    MoreAtMost(f64),
}

impl Line {
    /// Ours beside a limit, both measured in turns.
    pub fn beside(name: &str, unit: &str, ours: &Series, limit: (&str, &Series), goal: Goal) -> Line {
        let ratios = ours.ratios(limit.1);
        let ratio = ratios.median();
        let (goal, met) = match goal {
            Goal::None => (String::new(), None),
            Goal::RatioAtMost(r) => (format!("<= {r:.2} x {}", limit.0), Some(ratio <= r)),
            Goal::RatioAtLeast(r) => (format!(">= {r:.2} x {}", limit.0), Some(ratio >= r)),
            Goal::MoreAtMost(d) => {
                (format!("<= {} + {d} {unit}", limit.0), Some(ours.differences(limit.1).median() <= d))
            }
        };
        Line {
            name: name.into(),
            unit: unit.into(),
            ours: finite(ours.median()),
            peers: BTreeMap::from_iter(finite(limit.1.median()).map(|m| (limit.0.to_owned(), m))),
            limit: finite(limit.1.median()),
            goal,
            met: met.filter(|_| ratio.is_finite()),
            ratio: finite(ratio),
            ratio_spread: finite(ratio).map(|_| (ratios.percentile(0.1), ratios.percentile(0.9))),
            samples: ours.len(),
            ..Line::default()
        }
    }

    /// A figure with a fixed limit: the goal is to stay under it.
    pub fn under(name: &str, unit: &str, ours: f64, limit: f64) -> Line {
        Line {
            name: name.into(),
            unit: unit.into(),
            ours: finite(ours),
            limit: Some(limit),
            goal: format!("< {limit} {unit}"),
            met: finite(ours).map(|o| o < limit),
            ratio: finite(ours / limit),
            samples: 1,
            ..Line::default()
        }
    }

    /// What could not be measured, and why.
    pub fn missing(name: &str, unit: &str, goal: &str, why: &str) -> Line {
        Line { name: name.into(), unit: unit.into(), goal: goal.into(), note: why.into(), ..Line::default() }
    }

    /// With another figure of the same run.
    #[must_use]
    pub fn peer(mut self, name: &str, series: &Series) -> Line {
        self.peers.extend(finite(series.median()).map(|m| (name.to_owned(), m)));
        self
    }

    /// With a remark.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Line {
        self.note = note.into();
        self
    }
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// The machine, so that a figure can be judged later.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// The processor's name.
    pub cpu: String,
    /// Processors online.
    pub cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// True inside a virtual machine.
    pub virtual_machine: bool,
    /// True inside the lab (an emulated machine).
    pub lab: bool,
}

impl Host {
    /// This machine.
    pub fn here() -> Host {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |key: &str| {
            cpuinfo.lines().find_map(|l| l.strip_prefix(key)?.trim_start().strip_prefix(':').map(str::trim))
        };
        let cpu = field("model name").unwrap_or("unknown").to_owned();
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Host {
            lab: std::env::var_os("BH_LAB").is_some() || cpu.contains("TCG") || cpu.contains("QEMU"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel.trim().into(),
            virtual_machine: field("flags").is_some_and(|f| f.split(' ').any(|f| f == "hypervisor")),
            cpu,
        }
    }
}

/// All of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where it ran.
    pub host: Host,
    /// What was measured.
    pub lines: Vec<Line>,
}

/// A figure with three or four significant digits.
pub(crate) fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Contestants that have a column of their own: those of several lines, where lines have several.
fn columns(lines: &[Line]) -> Vec<String> {
    if lines.iter().filter(|l| l.peers.len() > 1).count() < 3 {
        return Vec::new();
    }
    let mut names: Vec<String> = lines.iter().flat_map(|l| l.peers.keys().cloned()).collect();
    names.sort();
    names.dedup();
    names.retain(|name| lines.iter().filter(|l| l.peers.contains_key(name)).count() > 2);
    names
}

/// The table of some lines. Remarks follow it, numbered.
pub fn table(lines: &[Line]) -> String {
    let dash = || "-".to_owned();
    let columns = columns(lines);
    let figures = if columns.is_empty() { vec!["limit".to_owned()] } else { columns.clone() };
    let last = 2 + figures.len();
    let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    let mut rows =
        vec![[words(&["", "unit", "ours"]), figures, words(&["ratio (p10-p90)", "goal", ""])].concat()];
    let mut notes = String::new();
    let mut number = 0;
    for line in lines {
        let mut name = line.name.clone();
        let others = line.peers.iter().filter(|(n, v)| !columns.contains(n) && Some(**v) != line.limit);
        let others: Vec<String> = others.map(|(n, v)| format!("{n} {}", figure(*v))).collect();
        let p99 = line.p99.map(|p| format!("p99 {}", figure(p)));
        let remarks: Vec<String> =
            p99.into_iter().chain(others).chain(Some(line.note.clone()).filter(|n| !n.is_empty())).collect();
        if !remarks.is_empty() {
            number += 1;
            let _ = write!(name, " [{number}]");
            let _ = writeln!(notes, "  [{number}] {}", remarks.join("; ").replace('\n', " | "));
        }
        let ratio = match (line.ratio, line.ratio_spread) {
            (Some(r), Some((low, high))) => format!("{r:.2} ({low:.2}-{high:.2})"),
            (Some(r), None) => format!("{r:.2}"),
            _ => dash(),
        };
        let mut row = vec![name, line.unit.clone(), line.ours.map_or_else(dash, figure)];
        if columns.is_empty() {
            row.push(line.limit.map_or_else(dash, figure));
        }
        row.extend(columns.iter().map(|n| line.peers.get(n).map_or_else(dash, |v| figure(*v))));
        row.push(ratio);
        row.push(line.goal.clone());
        row.push(match line.met {
            Some(true) => "met".into(),
            Some(false) => "MISSED".into(),
            None => String::new(),
        });
        rows.push(row);
    }
    let widths: Vec<usize> =
        (0..rows[0].len()).map(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for row in &rows {
        let mut text = String::new();
        for (i, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Figures to the right, words to the left.
            match i {
                i if (2..=last).contains(&i) => drop(write!(text, "{cell:>width$}  ")),
                _ => drop(write!(text, "{cell:<width$}  ")),
            }
        }
        let _ = writeln!(out, "{}", text.trim_end());
    }
    out + &notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(v: &[f64]) -> Series {
        Series::new(v.to_vec())
    }

    #[test]
    fn goals_are_judged_by_the_median_of_ratios() {
        let ours = series(&[1.05, 1.08, 9.0]);
        let limit = series(&[1.0, 1.0, 1.0]);
        let line = Line::beside("x", "us", &ours, ("eventfd", &limit), Goal::RatioAtMost(1.1));
        assert_eq!(line.met, Some(true));
        assert_eq!(line.goal, "<= 1.10 x eventfd");
        let line = Line::beside("x", "IOPS", &limit, ("io_uring", &ours), Goal::RatioAtLeast(0.97));
        assert_eq!(line.met, Some(false));
    }

    #[test]
    fn what_was_not_measured_is_neither_met_nor_missed() {
        let none = Series::default();
        let line = Line::beside("x", "us", &none, ("eventfd", &none), Goal::RatioAtMost(1.1));
        assert_eq!((line.ours, line.limit, line.met), (None, None, None));
        assert_eq!(Line::missing("x", "us", "< 1 us", "no such thing").met, None);
        assert_eq!(Line::under("x", "ms", 49.9, 50.0).met, Some(true));
        assert_eq!(Line::under("x", "ms", 50.0, 50.0).met, Some(false));
    }

    #[test]
    fn the_table_numbers_its_remarks() {
        let line = Line::under("loc", "lines", 12.0, 10.0).note("counted so");
        let text = table(&[Line::under("a", "ms", 1.0, 2.0), line]);
        assert!(text.contains("loc [1]"), "{text}");
        assert!(text.contains("  [1] counted so"), "{text}");
        assert!(text.contains("MISSED"), "{text}");
    }

    #[test]
    fn contestants_of_many_lines_have_columns() {
        let peers =
            |n| Line { peers: [("a".to_owned(), n), ("b".into(), 2.0 * n)].into(), ..Line::default() };
        let lines = [peers(11.0), peers(12.0), peers(13.0), Line::under("c", "ms", 1.0, 2.0)];
        let text = table(&lines);
        assert!(
            text.lines().next().is_some_and(|head| head.contains("ours") && head.contains("  b  ")),
            "{text}"
        );
        assert!(text.contains("13.0") && text.contains("26.0") && !text.contains("[1]"), "{text}");
    }

    #[test]
    fn json_has_the_promised_fields() {
        let report = Report { host: Host::here(), lines: vec![Line::under("a", "ms", 1.0, 2.0)] };
        let json = serde_json::to_value(&report).unwrap();
        for key in ["name", "unit", "ours", "peers", "limit", "goal", "met"] {
            assert!(json["lines"][0].get(key).is_some(), "{key}");
        }
    }
}

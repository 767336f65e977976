//! The result of a run under kills: judged, as JSON, and in words.

use crate::kills::Summary;
use serde_json::{Value, json};

/// Totals as the guest tells them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Bytes read back and proved right.
    pub verified: u64,
    /// Bytes over TCP, both ways.
    pub tcp: u64,
    /// Echo requests answered.
    pub pings: u64,
    /// Echo requests lost.
    pub lost: u64,
}

/// The totals of a progress line.
pub fn totals(line: &Value) -> Totals {
    let count = |part: &str, key: &str| line[part][key].as_u64().unwrap_or(0);
    Totals {
        verified: count("disk", "verified_bytes"),
        tcp: count("tcp", "tx_bytes") + count("tcp", "rx_bytes"),
        pings: count("ping", "received"),
        lost: count("ping", "lost"),
    }
}

/// What a run found.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The machine has vmx or svm of its own.
    pub hardware: bool,
    /// The run was inside the lab.
    pub lab: bool,
    /// `uname -r` of the guest.
    pub kernel: String,
    /// What the guest calls its hypervisor.
    pub hypervisor: String,
    /// From `bh create` to the guest's first line, ms.
    pub boot_ms: u64,
    /// The guest's last totals.
    pub totals: Value,
    /// The host side of the TCP stream: resets and corruption seen there.
    pub peer_resets: u64,
    /// As above.
    pub peer_corrupt: u64,
    /// Boots beyond the first.
    pub restarts: u64,
    /// Pauses by row, in the order of the table.
    pub rows: Vec<(String, Summary)>,
    /// Longest stall of disk or TCP that the guest saw, ms.
    pub longest_stall_ms: f64,
    /// netback kills, alone and among several.
    pub netback_kills: u64,
    /// Something of the run itself went wrong.
    pub failures: Vec<String>,
    /// Last lines of the logs, if there are problems.
    pub evidence: String,
}

/// No stall may be longer.
const STALL_LIMIT_MS: f64 = 5000.0;

impl Outcome {
    fn count(&self, part: &str, key: &str) -> u64 {
        self.totals[part][key].as_u64().unwrap_or(0)
    }

    /// Bytes read back and proved right.
    pub fn verified(&self) -> u64 {
        self.count("disk", "verified_bytes")
    }

    /// Bytes over TCP, both ways, each compared.
    pub fn tcp_bytes(&self) -> u64 {
        self.count("tcp", "tx_bytes") + self.count("tcp", "rx_bytes")
    }

    fn tcp_resets(&self) -> u64 {
        self.count("tcp", "resets") + self.peer_resets + self.count("tcp", "connects").saturating_sub(1)
    }

    /// Everything that must not be, in words. Empty: the run passed.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.failures.clone();
        let mut must_be_zero = |what: &str, n: u64, detail: Option<&str>| {
            if n != 0 {
                problems.push(format!(
                    "{what}: {n}{}",
                    detail.map(|d| format!(" (first: {d})")).unwrap_or_default()
                ));
            }
        };
        let problem = |part: &str| self.totals[part]["problem"].as_str();
        must_be_zero("disk errors", self.count("disk", "errors"), problem("disk"));
        must_be_zero("wrong disk blocks", self.count("disk", "corrupt"), problem("disk"));
        must_be_zero("TCP resets", self.tcp_resets(), problem("tcp"));
        must_be_zero("wrong TCP bytes", self.count("tcp", "corrupt") + self.peer_corrupt, problem("tcp"));
        must_be_zero("guest restarts", self.restarts, None);
        if self.verified() == 0 {
            problems.push("no disk block was verified".into());
        }
        if self.tcp_bytes() == 0 {
            problems.push("no TCP byte was exchanged".into());
        }
        if self.count("ping", "received") == 0 {
            problems.push("no ping was answered".into());
        }
        let lost = self.count("ping", "lost");
        if lost > self.netback_kills {
            problems
                .push(format!("{lost} pings lost in {} netback kills: at most one each", self.netback_kills));
        }
        if self.longest_stall_ms > STALL_LIMIT_MS {
            problems.push(format!("a stall of {:.0} ms", self.longest_stall_ms));
        }
        problems
    }

    /// The report file's content.
    pub fn json(&self) -> Value {
        let kills: Vec<Value> = self
            .rows
            .iter()
            .map(|(name, s)| {
                json!({"component": name, "count": s.count,
                    "pause_ms": {"p50": round(s.p50), "p99": round(s.p99), "max": round(s.max)}})
            })
            .collect();
        json!({
            "host": {"hardware_virtualization": self.hardware, "lab": self.lab},
            "guest": {"kernel": self.kernel, "hypervisor": self.hypervisor, "boot_ms": self.boot_ms},
            "disk": {"bytes_verified": self.verified(),
                "errors": self.count("disk", "errors") + self.count("disk", "corrupt")},
            "net": {"pings_sent": self.count("ping", "sent"), "pings_lost": self.count("ping", "lost"),
                "tcp_bytes": self.tcp_bytes(), "tcp_resets": self.tcp_resets()},
            "kills": kills,
            "guest_restarts": self.restarts,
            "longest_stall_ms": round(self.longest_stall_ms),
            "problems": self.problems(),
        })
    }
}

fn round(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Outcome {
        Outcome {
            totals: json!({
                "disk": {"verified_bytes": 4096, "errors": 0, "corrupt": 0},
                "tcp": {"tx_bytes": 1, "rx_bytes": 1, "resets": 0, "connects": 1, "corrupt": 0},
                "ping": {"sent": 2, "received": 2, "lost": 0},
            }),
            ..Outcome::default()
        }
    }

    #[test]
    fn a_good_run_has_no_problems() {
        assert_eq!(good().problems(), Vec::<String>::new());
    }

    #[test]
    fn everything_that_must_not_be_is_a_problem() {
        let broken: [fn(&mut Outcome); 9] = [
            |o| o.totals["disk"]["errors"] = json!(1),
            |o| o.totals["disk"]["corrupt"] = json!(1),
            |o| o.totals["disk"]["verified_bytes"] = json!(0),
            |o| o.totals["tcp"]["connects"] = json!(2),
            |o| o.peer_corrupt = 1,
            |o| o.totals["ping"]["lost"] = json!(1),
            |o| o.restarts = 1,
            |o| o.longest_stall_ms = 5001.0,
            |o| o.failures.push("x".into()),
        ];
        for (i, breaks) in broken.iter().enumerate() {
            let mut outcome = good();
            breaks(&mut outcome);
            assert_eq!(outcome.problems().len(), 1, "case {i}: {:?}", outcome.problems());
        }
        let mut one_each = good();
        one_each.totals["ping"]["lost"] = json!(1);
        one_each.netback_kills = 1;
        assert!(one_each.problems().is_empty());
    }
}

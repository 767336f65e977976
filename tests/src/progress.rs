//! What a guest says of its load: lines `BH: {json}` on its console.

use std::io::BufRead;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What the guest has said so far.
#[derive(Debug, Default)]
pub struct Seen {
    /// The last line's totals.
    pub last: Value,
    /// When each line was read, with what it says. Kept whole: a run has some thousands at most.
    pub lines: Vec<(Instant, Value)>,
    /// How often the guest said it booted; more than once is a restart.
    pub boots: u64,
    /// Console text that is not progress, last lines first out; for failure reports.
    pub text: std::collections::VecDeque<String>,
}

/// What a guest's console told, and a way to wait for more.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    shared: Arc<(Mutex<Seen>, Condvar)>,
}

/// Lines of other console text kept.
const TEXT_LINES: usize = 200;

impl Progress {
    /// Takes a console's lines until it ends.
    pub(crate) fn read(&self, mut console: impl BufRead) {
        let mut line = Vec::new();
        loop {
            line.clear();
            match console.read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => self.line(&String::from_utf8_lossy(&line)),
            }
        }
    }

    fn line(&self, line: &str) {
        let mut seen = self.lock();
        // The kernel may have written in the middle of a line; the JSON starts after the last mark.
        let json =
            line.rfind("BH: ").and_then(|at| serde_json::from_str::<Value>(line[at + 4..].trim()).ok());
        match json {
            Some(value) => {
                // Lines come again when the console is attached again; those of another boot never do.
                let same = |a: &Value| a["mono_ms"] == value["mono_ms"] && a["t_ms"] == value["t_ms"];
                if seen.lines.iter().rev().any(|(_, line)| same(line)) {
                    return;
                }
                match value["ev"].as_str() {
                    Some("boot") => seen.boots += 1,
                    Some("progress" | "total") => seen.last = value.clone(),
                    _ => {}
                }
                seen.lines.push((Instant::now(), value));
            }
            None => {
                if seen.text.len() == TEXT_LINES {
                    seen.text.pop_front();
                }
                seen.text.push_back(line.trim_end().into());
            }
        }
        drop(seen);
        self.shared.1.notify_all();
    }

    /// What has been seen.
    pub fn lock(&self) -> MutexGuard<'_, Seen> {
        self.shared.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits until `enough` says so; false if `timeout` went by first.
    pub fn wait(&self, timeout: Duration, mut enough: impl FnMut(&Seen) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let mut seen = self.lock();
        loop {
            if enough(&seen) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            seen = self.shared.1.wait_timeout(seen, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

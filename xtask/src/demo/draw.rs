//! What the demo shows while it runs: a line for every kill, and on a terminal a line that moves.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use bulkhead_tests::load_run::Observer;
use bulkhead_tests::outcome::{Outcome, Totals, totals};

/// The screen.
pub struct Screen {
    start: Instant,
    live: bool,
    color: bool,
}

impl Screen {
    /// On standard output.
    pub fn new() -> Screen {
        let live = std::io::stdout().is_terminal();
        let color = live && std::env::var_os("NO_COLOR").is_none();
        Screen { start: Instant::now(), live, color }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }

    fn clear(&self) {
        if self.live {
            print!("\r\x1b[2K");
        }
    }

    fn clock(&self) -> String {
        format!("{:6.1} s", self.start.elapsed().as_secs_f64())
    }

    fn flush(&self) {
        // A closed pipe shows at the next println; nothing can be done about it here.
        drop(std::io::stdout().flush());
    }

    /// The last table and the totals.
    pub fn result(&self, outcome: &Outcome) {
        self.clear();
        println!();
        println!("  {:<24} {:>6} {:>12} {:>12} {:>12}", "killed", "kills", "pause p50", "p99", "max");
        println!("  {}", "─".repeat(70));
        for (name, s) in &outcome.rows {
            println!(
                "  {} {:>6} {:>9.0} ms {:>9.0} ms {:>9.0} ms",
                clip(name, 24),
                s.count,
                s.p50,
                s.p99,
                s.max
            );
        }
        let t = totals(&outcome.totals);
        let said = |part: &str, key: &str| outcome.totals[part][key].as_u64().unwrap_or(0);
        println!();
        println!(
            "  disk   {} verified, {} errors, {} wrong blocks",
            bytes(t.verified),
            said("disk", "errors"),
            said("disk", "corrupt")
        );
        println!(
            "  TCP    {} both ways, every byte compared, {} resets",
            bytes(t.tcp),
            said("tcp", "resets")
        );
        println!("  ping   {} answered, {} lost in {} netback kills", t.pings, t.lost, outcome.netback_kills);
        println!("  guest  {} restarts, longest stall {:.0} ms", outcome.restarts, outcome.longest_stall_ms);
        println!();
        let problems = outcome.problems();
        if problems.is_empty() {
            println!("  {}: nothing was lost", self.paint("1;32", "passed"));
        } else {
            println!("  {}", self.paint("1;31", "FAILED"));
        }
        for problem in problems {
            println!("  - {problem}");
        }
    }
}

impl Observer for Screen {
    fn stage(&self, text: &str) {
        self.clear();
        println!("{}  {text}", self.paint("2", &self.clock()));
        self.flush();
    }

    fn kill(&self, number: usize, of: usize, victims: &str, pause: Duration, totals: Totals) {
        self.clear();
        let ms = pause.as_secs_f64() * 1000.0;
        // One block for each doubling from 1 ms, so that 10 ms and 3 s both fit.
        let bar = "█".repeat((ms.max(1.0).log2().round() as usize).clamp(1, 14));
        let bar = self.paint(if ms < 1000.0 { "32" } else { "33" }, &format!("{bar:<14}"));
        println!(
            "{}  {number:>3}/{of}  kill -9 {:<42} pause {ms:>6.0} ms {bar} {}",
            self.paint("2", &self.clock()),
            self.paint("1", &clip(victims, 42)),
            line(totals)
        );
        self.flush();
    }

    /// The moving line; nothing where there is no terminal.
    fn waiting(&self, text: &str, totals: Totals) {
        if self.live {
            self.clear();
            print!("{}  {text}  {}", self.paint("2", &self.clock()), line(totals));
            self.flush();
        }
    }
}

fn clip(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return format!("{text:<width$}");
    }
    let cut: String = text.chars().take(width - 1).collect();
    format!("{cut}…")
}

/// Bytes in words.
pub fn bytes(n: u64) -> String {
    match n {
        0..0x10_0000 => format!("{} KiB", n >> 10),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", n as f64 / (1u64 << 20) as f64),
        _ => format!("{:.2} GiB", n as f64 / (1u64 << 30) as f64),
    }
}

fn line(t: Totals) -> String {
    format!(
        "disk {:>10} verified  tcp {:>10}  ping {}{}",
        bytes(t.verified),
        bytes(t.tcp),
        t.pings,
        if t.lost > 0 { format!(" ({} lost)", t.lost) } else { String::new() }
    )
}

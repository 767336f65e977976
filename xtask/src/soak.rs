//! `cargo xtask soak`: the kill runs with their full counts. Each is an ignored test named
//! `soak_…`; with `BH_SOAK=1` it takes the full count instead of CI's subset. Those named `soak_lab_…` run in the lab.

use crate::libtest::{self, Ignored};
use crate::{guest, lab_tests, setup, tools};
use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Options of `cargo xtask soak`.
#[derive(Args, Clone, Debug)]
pub struct SoakArgs {
    /// Which runs, by any part of their names (default: all).
    pub names: Vec<String>,
    /// Lists the runs instead.
    #[arg(long)]
    pub list: bool,
    /// Writes the results as JSON.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// Runs the soak tests one after the other; status 1 if one failed.
///
/// # Errors
/// When none matches or the tests do not build.
pub fn run(args: &SoakArgs) -> Result<i32> {
    setup::packages(setup::TESTS)?;
    let all = libtest::ignored("soak_")?;
    let wanted: Vec<&Ignored> = all
        .iter()
        .filter(|t| args.names.is_empty() || args.names.iter().any(|n| t.name.contains(n)))
        .collect();
    if args.list {
        wanted.iter().for_each(|t| println!("{} ({})", t.name, t.package));
        return Ok(0);
    }
    if wanted.is_empty() {
        let names: Vec<&str> = all.iter().map(|t| t.name.as_str()).collect();
        bail!("no such soak run; there are: {}", names.join(", "));
    }
    if wanted.iter().any(|t| t.name.contains("qemu")) {
        setup::packages(setup::QEMU)?;
        guest::image(guest::Guest::Debian13)?;
    }
    if wanted.iter().any(|t| is_lab(t)) {
        setup::packages(setup::LAB)?;
        tools::image(guest::Guest::Debian13)?;
    }
    let mut results = Vec::new();
    let mut failed = 0;
    for test in wanted {
        println!("soak: {}", test.name);
        let start = Instant::now();
        let passed = match one(test) {
            Ok(()) => true,
            Err(error) => {
                println!("soak: {}: {error:#}", test.name);
                false
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        failed += i32::from(!passed);
        let word = if passed { "passed" } else { "FAILED" };
        println!("soak: {}: {word} after {seconds:.0} s", test.name);
        results.push(json!({ "name": test.name, "passed": passed, "seconds": seconds }));
    }
    if let Some(path) = &args.report {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let text = serde_json::to_string_pretty(&json!({"unix_time": now, "runs": results}))?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(i32::from(failed != 0))
}

fn one(test: &Ignored) -> Result<()> {
    if is_lab(test) {
        return lab_tests::in_one_l1(std::slice::from_ref(test), true);
    }
    let status = Command::new(&test.exe)
        .args(["--ignored", "--exact", "--nocapture", &test.name])
        .env("BH_SOAK", "1")
        .current_dir(&test.dir)
        .status()
        .with_context(|| format!("cannot start {}", test.exe.display()))?;
    if !status.success() {
        bail!("{status}");
    }
    Ok(())
}

fn is_lab(test: &Ignored) -> bool {
    test.name.starts_with("soak_lab_")
}

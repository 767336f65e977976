//! `cargo xtask bench`: builds everything with optimization and runs `bench`, which measures (see docs/benchmarks.md).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::guest::{self, Guest};
use crate::{paths, run, setup};

/// Options of `cargo xtask bench`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// What to measure (default: all).
    #[arg(value_name = "CASE", value_parser = ["evtchn", "store", "block", "net", "restart", "boot"])]
    pub cases: Vec<String>,
    /// Writes the result as JSON too.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Rounds in which ours and the others take turns.
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Leaves out what needs the lab.
    #[arg(long)]
    pub no_lab: bool,
}

/// Builds, then measures.
///
/// # Errors
/// When something does not build or `bench` cannot be started.
pub fn run(args: &BenchArgs) -> Result<i32> {
    setup::packages(&[("iproute2", "/usr/sbin/ip")])?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run::loud(
        Command::new(cargo)
            .args(["build", "--release", "--workspace", "--bins", "--exclude", "xtask"])
            .current_dir(paths::root()),
    )?;
    let mut bench = Command::new(paths::target().join(paths::TARGET).join("release/bench"));
    bench.args(&args.cases).arg("--source").arg(paths::root());
    if let Some(report) = &args.report {
        bench.arg("--report").arg(report);
    }
    if let Some(rounds) = args.rounds {
        bench.arg("--rounds").arg(rounds.to_string());
    }
    let boots = args.cases.is_empty() || args.cases.iter().any(|c| c == "boot");
    if boots && !args.no_lab {
        let image = guest::image(Guest::Debian13)?;
        bench.arg("--kernel").arg(image.vmlinuz).arg("--initrd").arg(image.initrd);
        bench.arg("--xtask").arg(std::env::current_exe().context("where is xtask")?);
    }
    let status = bench.status().with_context(|| format!("cannot start {}", run::show(&bench)))?;
    Ok(status.code().unwrap_or(1))
}

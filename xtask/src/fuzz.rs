//! `cargo xtask fuzz`: libFuzzer on the targets of `fuzz/`, with coverage feedback and on stable Rust. The compiler's pass that counts
//! edges is LLVM's own, so no sanitizer's run time and no nightly is needed; memory errors are no matter where unsafe code is not.

use crate::{paths, run, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::path::Path;
use std::process::Command;

/// The targets.
const TARGETS: &[&str] = &["wire", "ring", "journal", "stream", "blkif-request", "blkif-device"];
/// What cargo-fuzz gives the compiler for `--sanitizer none`.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";
/// Longest input, bytes.
const LONGEST: u32 = 16 << 10;

/// Options of `cargo xtask fuzz`.
#[derive(Args, Clone, Debug)]
pub struct FuzzArgs {
    /// What to fuzz (default: all, one after the other).
    #[arg(value_name = "TARGET", value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    pub targets: Vec<String>,
    /// How long, each.
    #[arg(long, default_value_t = 60)]
    pub seconds: u32,
    /// Seed of the mutations (default: another one each time).
    #[arg(long, default_value_t = 0)]
    pub seed: u32,
}

/// Builds and runs them; status 1 if one found something.
///
/// # Errors
/// When they do not build.
pub fn run(args: &FuzzArgs) -> Result<i32> {
    setup::packages(&[("g++", "/usr/bin/g++")])?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = paths::target().join("fuzz");
    run::loud(
        Command::new(cargo)
            .args(["build", "--package", "fuzz", "--features", "libfuzzer", "--bins", "--profile", "fuzz"])
            .args(["--target", paths::TARGET, "--target-dir"])
            .arg(&built)
            // In place of the workspace's: these are the only programs that are not static.
            .env("RUSTFLAGS", FLAGS)
            .current_dir(paths::root()),
    )?;
    let all: Vec<String> = TARGETS.iter().map(|t| (*t).to_owned()).collect();
    let mut found = 0;
    for name in if args.targets.is_empty() { &all } else { &args.targets } {
        found += i32::from(!one(name, args, &built)?);
    }
    Ok(i32::from(found > 0))
}

/// Runs one target. False if it found something.
fn one(name: &str, args: &FuzzArgs, built: &Path) -> Result<bool> {
    let places = ["xenstored", "blkback"].map(|of| paths::root().join(of).join("tests/corpus").join(name));
    let Some(seeds) = places.iter().find(|dir| dir.is_dir()) else { bail!("{name}: no corpus") };
    // What it learns is kept, so that the next run begins there.
    let (corpus, failures) = (built.join("corpus").join(name), built.join("failures").join(name));
    for dir in [&corpus, &failures] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    println!("fuzz: {name}, {} s", args.seconds);
    let program = built.join(paths::TARGET).join("fuzz").join(format!("fuzz-{name}"));
    let status = Command::new(&program)
        .arg(&corpus)
        .arg(seeds)
        .arg(format!("-max_total_time={}", args.seconds))
        .arg(format!("-max_len={LONGEST}"))
        .arg(format!("-artifact_prefix={}/", failures.display()))
        .arg(format!("-seed={}", args.seed))
        .args(["-timeout=20", "-rss_limit_mb=4096", "-print_final_stats=1", "-verbosity=0"])
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    if !status.success() {
        println!(
            "fuzz: {name}: {status}; the input is in {}; copied to {} it is tried first ever after",
            failures.display(),
            seeds.display()
        );
    }
    Ok(status.success())
}

/// The run of `cargo xtask test`: long enough to see that the targets hold what they are given and learn.
///
/// # Errors
/// When one found something.
pub fn brief() -> Result<()> {
    let args = FuzzArgs { targets: Vec::new(), seconds: 7, seed: 1 };
    if run(&args)? != 0 {
        bail!("a fuzz target found something");
    }
    Ok(())
}

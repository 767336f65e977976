//! `cargo xtask test`: everything that must hold before a change lands, with a table at the end.

use crate::{fuzz, guest, lab_tests, libtest, licences, paths, run, setup};
use anyhow::{Result, bail};
use clap::Args;
use std::process::Command;
use std::time::{Duration, Instant};

/// Options of `cargo xtask test`.
#[derive(Args, Clone, Debug)]
pub struct TestArgs {
    /// Leaves out what runs in the lab.
    #[arg(long)]
    pub quick: bool,
    /// Runs only the steps whose names contain one of these.
    #[arg(long = "only", value_name = "TEXT")]
    pub only: Vec<String>,
    /// Ends at the first step that fails.
    #[arg(long)]
    pub fail_fast: bool,
}

type Check = Box<dyn Fn() -> Result<()>>;

/// Runs all steps; status 1 if one failed.
///
/// # Errors
/// When nothing is left to run.
pub fn run(args: &TestArgs) -> Result<i32> {
    let mut steps: Vec<(&str, Check)> = vec![
        ("set-up", Box::new(|| setup::packages(setup::TESTS).and_then(|()| setup::pyxs()))),
        ("format", Box::new(|| cargo(300, &["fmt", "--all", "--check"], &[]))),
        ("licences", Box::new(licences::check)),
        ("clippy", Box::new(clippy)),
        ("rustdoc", Box::new(rustdoc)),
        ("build", Box::new(|| cargo(1500, &["build", "--workspace"], &[]))),
        ("tests", Box::new(|| cargo(1800, &["test", "--workspace", "--no-fail-fast"], &[]))),
        ("QEMU guests", Box::new(qemu_guests)),
        ("fuzz", Box::new(fuzz::brief)),
    ];
    if !args.quick {
        for (name, test) in lab_tests::ALL {
            steps.push((name, Box::new(test)));
        }
    }
    if !args.only.is_empty() {
        steps.retain(|(name, _)| args.only.iter().any(|o| name.contains(o.as_str())));
    }
    if steps.is_empty() {
        bail!("no step has such a name");
    }
    let begin = Instant::now();
    let mut results: Vec<(&str, Option<bool>, Duration)> = Vec::new();
    let count = steps.len();
    let mut stop = false;
    for (n, (name, check)) in steps.into_iter().enumerate() {
        if stop {
            results.push((name, None, Duration::ZERO));
            continue;
        }
        println!("\n=== [{}/{count}] {name} ({} s so far)", n + 1, begin.elapsed().as_secs());
        let start = Instant::now();
        let result = check();
        if let Err(e) = &result {
            println!("--- {name} failed: {e:#}");
            // Nothing that follows can say more.
            stop = args.fail_fast || matches!(name, "set-up" | "build");
        }
        results.push((name, Some(result.is_ok()), start.elapsed()));
    }
    println!("\n{:<36} {:>8}  result", "step", "seconds");
    for (name, ok, took) in &results {
        let word = match ok {
            Some(true) => "ok",
            Some(false) => "FAILED",
            None => "not run",
        };
        println!("{name:<36} {:>8.1}  {word}", took.as_secs_f64());
    }
    let failed: Vec<&str> =
        results.iter().filter(|(_, ok, _)| *ok != Some(true)).map(|(name, ..)| *name).collect();
    let total = begin.elapsed().as_secs();
    if failed.is_empty() {
        println!("all {count} steps passed in {total} s");
        Ok(0)
    } else {
        println!("failed or not run: {} (after {total} s)", failed.join(", "));
        Ok(1)
    }
}

/// Every ignored test named `qemu_…`: they need a guest's image, and QEMU.
fn qemu_guests() -> Result<()> {
    setup::packages(setup::QEMU)?;
    setup::packages(setup::QEMU_TESTS)?;
    guest::image(guest::Guest::Debian12)?;
    guest::image(guest::Guest::Debian13)?;
    guest::image(guest::Guest::Debian13Full)?;
    let mut failed = Vec::new();
    for test in libtest::ignored("qemu_")? {
        // One after the other: each emulated processor takes one of the machine's.
        let ended = run::loud(
            Command::new("timeout")
                .args(["-k", "10", "300"])
                .arg(&test.exe)
                .args(["--ignored", "--exact", "--nocapture", &test.name])
                .current_dir(&test.dir),
        );
        if let Err(error) = ended {
            eprintln!("{error:#}");
            failed.push(test.name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn clippy() -> Result<()> {
    cargo(1500, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])
}

fn rustdoc() -> Result<()> {
    // Private items are documented for maintainers, so links to them are wanted.
    let env = [("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links")];
    cargo(900, &["doc", "--workspace", "--no-deps", "--document-private-items"], &env)
}

/// Runs cargo with our streams and a limit in seconds, after which it and all that it started end.
fn cargo(limit: u32, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run::loud(
        Command::new("timeout")
            .args(["-k", "10", &limit.to_string()])
            .arg(cargo)
            .args(args)
            .envs(env.iter().copied())
            .current_dir(paths::root()),
    )
}

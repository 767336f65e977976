//! `cargo xtask bench`: builds everything with optimization and runs `bench`, which measures (see docs/benchmarks.md).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::guest::Guest;
use crate::{debian, paths, run, setup, tools};

/// Options of `cargo xtask bench`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// What to measure (default: all).
    #[arg(value_name = "CASE", value_parser = ["evtchn", "store", "block", "net", "restart", "boot", "qemu"])]
    pub cases: Vec<String>,
    /// Writes the result as JSON too, and beside it a drawing (.svg).
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Rounds in which ours and the others take turns.
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Measures ours alone, without peers (case store).
    #[arg(long)]
    pub ours: bool,
    /// Only groups of lines whose names contain this (store: one-client, in-flight, …; block: depth-1, depth-32, sequential, mixed,
    /// pause, many, lab, and parts of that: lab-depth-1, lab-sequential, …; net: outside,
    /// segments, small, bulk, pause, lab; qemu: disk, nic, boot).
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
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
    let has = |case: &str| args.cases.is_empty() || args.cases.iter().any(|c| c == case);
    if (has("block") || has("qemu")) && !args.ours {
        // QEMU's storage daemon is measured beside blkback.
        setup::packages(&[("qemu-system-common", "/usr/bin/qemu-storage-daemon")])?;
    }
    if has("qemu") {
        setup::packages(&[("qemu-system-x86", "/usr/bin/qemu-system-x86_64")])?;
    }
    if has("net") || has("qemu") {
        setup::packages(&[("iperf3", "/usr/bin/iperf3")])?;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let store = args.cases.iter().all(|c| c == "store") && !args.cases.is_empty();
    let hosted = args.only.as_ref().is_none_or(|only| "hosted".contains(only.as_str()));
    // xenstored beside its peers needs no other part of the system. (Chosen from the workspace all the same: so libraries are built
    // once, and not again with fewer features.)
    let what: &[&str] = if store && (args.ours || !hosted) {
        &["--workspace", "--exclude", "xtask", "--bin", "bench", "--bin", "xenstored"]
    } else {
        &["--workspace", "--bins", "--exclude", "xtask"]
    };
    run::loud(Command::new(cargo).args(["build", "--release"]).args(what).current_dir(paths::root()))?;
    let mut bench = Command::new(paths::target().join(paths::TARGET).join("release/bench"));
    bench.args(&args.cases).arg("--source").arg(paths::root());
    if let Some(report) = &args.report {
        bench.arg("--report").arg(report);
    }
    if let Some(rounds) = args.rounds {
        bench.arg("--rounds").arg(rounds.to_string());
    }
    if args.ours {
        bench.arg("--ours");
    } else if has("store") {
        match store_peers() {
            Ok((root, noxen)) => drop(bench.arg("--peers").arg(root).arg("--noxen").arg(noxen)),
            Err(e) => eprintln!("bench: Debian's xenstored daemons are not here: {e:#}"),
        }
    }
    if let Some(only) = &args.only {
        bench.arg("--only").arg(only);
    }
    let lab = args.only.as_ref().is_none_or(|only| "lab".contains(only.as_str()) || only.starts_with("lab-"));
    // QEMU guests need no lab, only the image.
    if has("qemu") || ((has("boot") || ((has("block") || has("net")) && lab)) && !args.no_lab) {
        let image = tools::image(Guest::Debian13)?;
        bench.arg("--fio").arg(image.initrd.with_file_name("initrd-fio.img"));
        if has("net") {
            bench.arg("--tools").arg(debian::guest_tools()?);
        }
        bench.arg("--kernel").arg(image.vmlinuz).arg("--initrd").arg(image.initrd);
        bench.arg("--xtask").arg(std::env::current_exe().context("where is xtask")?);
    }
    let status = bench.status().with_context(|| format!("cannot start {}", run::show(&bench)))?;
    Ok(status.code().unwrap_or(1))
}

/// Debian's two xenstored daemons, unpacked, and the library that stands in for a Xen below them.
fn store_peers() -> Result<(PathBuf, PathBuf)> {
    let root = debian::xen_daemons()?;
    let library = paths::target().join("libnoxen.so");
    // By rustc itself: cargo's settings for this workspace make static programs, and a library that is loaded must not be that.
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    run::quiet(
        Command::new(rustc)
            .args(["--edition", "2024", "--crate-type", "cdylib", "--crate-name", "noxen", "-O"])
            .args(["-C", "panic=abort", "-o"])
            .arg(&library)
            .arg("tests/noxen/src/lib.rs")
            .current_dir(paths::root()),
    )?;
    Ok((root, library))
}

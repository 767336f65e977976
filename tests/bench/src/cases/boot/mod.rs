//! Booting a Debian guest, what it costs, and its I/O; and the size of the hypervisor.
//!
//! On a machine without hardware virtualization everything but the size is measured in the lab: this program starts itself there
//! and takes over the lines of its report.

mod io;
pub(crate) mod memory;
mod size;
pub(crate) mod start;
pub(crate) mod terminal;
mod timeline;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::system::NETBACK;
use serde_json::Value;

use super::{Settings, or_missing};
use crate::report::Line;

const NAMES: &[(&str, &str, &str)] = &[
    ("create to userspace, PVH Debian", "s", "<= 1.00 x QEMU microvm"),
    ("resident memory of an idle hv-vcpu", "MiB", "< 5 MiB"),
    ("Debian guest, 4 KiB reads", "MiB/s", ""),
    ("Debian guest, TCP to the outside", "MiB/s", ""),
];

/// Files of the guest and the way into the lab.
#[derive(Clone, Debug)]
pub struct Image {
    /// The Debian kernel.
    pub kernel: std::path::PathBuf,
    /// The initial RAM disk with the guest agent.
    pub initrd: std::path::PathBuf,
    /// The same with fio.
    pub fio: Option<std::path::PathBuf>,
    /// Debian 13's packages of the guest's tools, unpacked: iperf3 for where it is not installed.
    pub tools: Option<std::path::PathBuf>,
    /// The program that starts the lab.
    pub xtask: Option<std::path::PathBuf>,
}

impl Image {
    /// The domain file of a guest with it, RAM in MiB. `more`: what else is in it, and its devices at the end.
    pub fn domain_file(&self, name: &str, kind: &str, cmdline: &str, memory: u32, more: &str) -> String {
        let (kernel, initrd) = (self.kernel.display(), self.initrd.display());
        format!(
            "name = \"{name}\"\ntype = \"{kind}\"\nkernel = \"{kernel}\"\nramdisk = \"{initrd}\"\n\
             cmdline = \"{cmdline}\"\nmemory = {memory}\n{more}"
        )
    }
}

/// The disk xvda of a domain file.
pub fn xvda(file: &std::path::Path) -> String {
    format!("[[disk]]\nvdev = \"xvda\"\npath = \"{}\"\n", file.display())
}

/// A NIC at [`NETBACK`].
pub fn nic() -> String {
    format!("[[vif]]\nbackend = \"{NETBACK}\"\n")
}

/// All lines of the case.
pub fn run(settings: &Settings) -> Vec<Line> {
    let mut lines = size::run(settings);
    let Some(image) = &settings.image else {
        let why = "not measured: needs a guest image (leave out --no-lab)";
        lines.extend(NAMES.iter().map(|(name, unit, goal)| Line::missing(name, unit, goal, why)));
        return lines;
    };
    if hardware(&settings.bin_dir) {
        lines.extend(here(settings, image));
    } else {
        lines.extend(or_missing(NAMES, in_lab(settings, image, &["boot"], &[])));
    }
    lines
}

/// Measures on this machine.
pub fn here(settings: &Settings, image: &Image) -> Vec<Line> {
    let mut lines = or_missing(&NAMES[..2], start::lines(settings, image));
    lines.extend(or_missing(&NAMES[2..], io::lines(settings, image)));
    lines
}

/// Whether guests run here as they are.
pub(crate) fn hardware(bin_dir: &Path) -> bool {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    // A /dev/kvm without either flag is a slow emulation and of no use.
    flags.split(' ').any(|f| f == "vmx" || f == "svm")
        && Command::new(bin_dir.join("hv-vcpu")).arg("--probe").output().is_ok_and(|o| o.status.success())
}

/// Ticks of all processors that this machine's own host took away, and all ticks (/proc/stat).
fn stolen() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let ticks: Vec<u64> =
        text.lines().next()?.split_whitespace().skip(1).take(8).filter_map(|n| n.parse().ok()).collect();
    Some((*ticks.get(7)?, ticks.iter().sum()))
}

/// What `bench` with these words measures inside the lab, which is started with these options.
pub(crate) fn in_lab(
    settings: &Settings,
    image: &Image,
    words: &[&str],
    options: &[&str],
) -> Result<Vec<Line>> {
    let Some(xtask) = &image.xtask else {
        bail!("there is no hardware virtualization here and no lab was named")
    };
    println!("No hardware virtualization here: it is measured inside the lab (an emulated machine).");
    // Only the working tree and cargo's target directory are writable from inside.
    let report = settings.bin_dir.join(format!("bench-lab.{}.json", std::process::id()));
    let before = stolen();
    let status = Command::new(xtask)
        .args(["lab", "--timeout", "1500"])
        .args(options)
        .arg("--")
        .arg(settings.bin_dir.join("bench"))
        .args(words)
        .arg("--inside")
        .arg("--kernel")
        .arg(&image.kernel)
        .arg("--initrd")
        .arg(&image.initrd)
        .arg("--report")
        .arg(&report)
        .status()
        .with_context(|| format!("starting {} lab", xtask.display()))?;
    if let (Some((stolen_before, all_before)), Some((stolen, all))) = (before, stolen()) {
        let share = (stolen - stolen_before) as f64 / (all - all_before).max(1) as f64;
        eprintln!(
            "bench: meanwhile this machine's own host took {:.1} % of its processors away",
            share * 100.0
        );
    }
    let text = std::fs::read_to_string(&report);
    // Without a report there is nothing to remove.
    let _ = std::fs::remove_file(&report);
    ensure!(status.success() || text.is_ok(), "the lab ended with {status}");
    let json: Value = serde_json::from_str(&text.context("the lab left no report")?)?;
    let lines = serde_json::from_value(json["lines"].clone()).context("the lab's report")?;
    Ok(lines)
}

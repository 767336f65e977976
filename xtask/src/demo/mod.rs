//! `cargo xtask demo`: a guest works on its disk and its network while every part of the system is killed under it.

mod draw;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_tests::load_run::{self, Run};
use bulkhead_tests::system::Config;
use clap::{Args, ValueEnum};

use crate::guest::Guest;
use crate::{lab, paths, setup};

/// Which guest the demo runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DemoGuest {
    /// Debian 13's cloud kernel as a PVH domain.
    Debian13,
    /// Debian 12's cloud kernel as a PVH domain.
    Debian12,
    /// Debian 13's cloud kernel in a machine that QEMU emulates in software: no hardware virtualization is needed.
    Qemu,
    /// A process guest: the same rings, journals and store without a virtual machine.
    Process,
}

impl DemoGuest {
    fn title(self) -> &'static str {
        match self {
            Self::Debian13 => "Debian 13's kernel, unmodified, as a PVH domain",
            Self::Debian12 => "Debian 12's kernel, unmodified, as a PVH domain",
            Self::Qemu => "Debian 13's kernel, unmodified, in a machine that QEMU emulates",
            Self::Process => "a process guest",
        }
    }
}

/// Options of `cargo xtask demo`.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// The guest.
    #[arg(long, value_enum, default_value = "debian13")]
    pub guest: DemoGuest,
    /// Seconds over which the kills are spread (default: 150 for a PVH guest, else 60).
    #[arg(long)]
    pub duration: Option<u64>,
    /// Kills over all components (0: just the load).
    #[arg(long, default_value_t = 60)]
    pub kills: usize,
    /// Seed of all choices.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Writes the result as JSON too.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Virtual CPUs of a Linux guest, 1 to 8.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u32,
    /// Keep the system's directory with its logs.
    #[arg(long)]
    pub keep: bool,
    /// Set inside the lab: files of the guest.
    #[arg(long, hide = true)]
    pub lab_kernel: Option<PathBuf>,
    /// Set inside the lab: files of the guest.
    #[arg(long, hide = true)]
    pub lab_initrd: Option<PathBuf>,
}

impl DemoArgs {
    /// Seconds of load.
    fn seconds(&self) -> u64 {
        let native = matches!(self.guest, DemoGuest::Process | DemoGuest::Qemu);
        self.duration.unwrap_or(if native { 60 } else { 150 })
    }
}

/// Runs the demo here or in the lab.
///
/// # Errors
/// Set-up failures; what went wrong inside the run is its exit status 1.
pub fn run(args: &DemoArgs) -> Result<i32> {
    if args.lab_kernel.is_none() {
        setup::packages(&[("iproute2", "/usr/sbin/ip")])?;
        build()?;
    }
    let image = match (args.guest, &args.lab_kernel, &args.lab_initrd) {
        (DemoGuest::Process, ..) => None,
        (_, Some(kernel), Some(initrd)) => Some((kernel.clone(), initrd.clone())),
        (guest, ..) => {
            let guest = if guest == DemoGuest::Debian12 { Guest::Debian12 } else { Guest::Debian13 };
            let image = crate::guest::image(guest)?;
            Some((image.vmlinuz, image.initrd))
        }
    };
    let Some((kernel, initrd)) = image else { return here(args, load_run::Guest::Process) };
    if args.guest == DemoGuest::Qemu {
        setup::packages(setup::QEMU)?;
        let name = args.guest.title().into();
        return here(args, load_run::Guest::Qemu { name, kernel, initrd, vcpus: args.vcpus });
    }
    let linux = |kernel, initrd| load_run::Guest::Linux {
        name: args.guest.title().into(),
        kernel,
        initrd,
        vcpus: args.vcpus,
    };
    if args.lab_kernel.is_some() {
        return here(args, linux(kernel, initrd));
    }
    match hardware() {
        Ok(()) => here(args, linux(kernel, initrd)),
        Err(why) => {
            println!(
                "{why}: the same system runs inside the lab (an emulated machine with hardware virtualization)."
            );
            in_lab(args, kernel, initrd)
        }
    }
}

/// Runs it on this machine (which may be the lab's).
fn here(args: &DemoArgs, guest: load_run::Guest) -> Result<i32> {
    let screen = draw::Screen::new();
    let config = Config { keep: args.keep, ..Config::of_this_build()? };
    let duration = Duration::from_secs(args.seconds());
    let outcome =
        load_run::run(&Run { guest, kills: args.kills, duration, seed: args.seed }, config, &screen)?;
    eprint!("{}", outcome.evidence);
    screen.result(&outcome);
    if let Some(path) = &args.report {
        let text = serde_json::to_string_pretty(&outcome.json())?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(i32::from(!outcome.problems().is_empty()))
}

/// Builds every program of the system.
///
/// # Errors
/// If the build fails.
pub fn build() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    crate::run::loud(
        Command::new(cargo)
            .args(["build", "--workspace", "--bins", "--exclude", "xtask"])
            .current_dir(paths::root()),
    )
}

/// Whether a Linux guest can run on this machine; if not, why in a few words.
fn hardware() -> std::result::Result<(), String> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flag =
        |name: &str| cpu.lines().filter(|l| l.starts_with("flags")).any(|l| l.split(' ').any(|f| f == name));
    if !flag("vmx") && !flag("svm") {
        return Err("No hardware virtualization here (the CPU has neither vmx nor svm)".into());
    }
    // hv-vcpu knows exactly what it needs of KVM.
    let probe = Command::new(paths::bin_dir().join("hv-vcpu")).arg("--probe").output();
    match probe {
        Ok(out) if out.status.success() => Ok(()),
        Ok(out) => Err(String::from_utf8_lossy(&out.stderr).trim().trim_end_matches('.').to_owned()),
        Err(e) => Err(format!("hv-vcpu --probe: {e}")),
    }
}

fn in_lab(args: &DemoArgs, kernel: PathBuf, initrd: PathBuf) -> Result<i32> {
    let exe = std::env::current_exe().context("where is xtask")?;
    let mut command: Vec<String> = vec![exe.display().to_string(), "demo".into()];
    let mut push = |flag: &str, value: String| command.extend([flag.to_owned(), value]);
    let guest = args.guest.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default();
    push("--guest", guest);
    push("--duration", args.seconds().to_string());
    push("--kills", args.kills.to_string());
    push("--seed", args.seed.to_string());
    push("--vcpus", args.vcpus.to_string());
    push("--lab-kernel", kernel.display().to_string());
    push("--lab-initrd", initrd.display().to_string());
    // Only the working tree is writable from inside.
    let inside = paths::lab().join(format!("demo-report.{}.json", std::process::id()));
    if args.report.is_some() {
        push("--report", inside.display().to_string());
    }
    let mut lab_args = lab::LabArgs::new(command);
    lab_args.timeout = args.seconds() + 240;
    lab_args.env.push(format!("BH_BIN_DIR={}", lab::programs()?.display()));
    lab_args.tty = std::io::stdout().is_terminal();
    let code = lab::run(&lab_args)?;
    if let Some(report) = &args.report
        && inside.exists()
    {
        std::fs::copy(&inside, report).with_context(|| format!("cannot write {}", report.display()))?;
        std::fs::remove_file(&inside)?;
    }
    Ok(code)
}

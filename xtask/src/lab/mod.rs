//! The lab: L1, a Debian 13 kernel under QEMU's emulation of AMD SVM, with this working tree.
//! See docs/lab.md.

mod image;
mod qemu;

use crate::{debian, paths, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub use qemu::Outcome;

/// Exit status when CMD was still running at the deadline.
pub const EXIT_TIMEOUT: i32 = 124;
/// Exit status when the lab could not be set up or started.
pub const EXIT_LAB: i32 = 125;
/// Exit status when the emulator or L1's kernel died before CMD ended.
pub const EXIT_EMULATOR: i32 = 123;
/// Exit status when CMD itself reported a fault of the emulator, in this and the repeated run.
pub const EXIT_EMULATOR_FAULT: i32 = 122;

/// Options of `cargo xtask lab`.
#[derive(Args, Clone, Debug)]
pub struct LabArgs {
    /// Seconds after which CMD is given up (exit status 124).
    #[arg(long, default_value_t = 600)]
    pub timeout: u64,
    /// Memory of L1 in MiB.
    #[arg(short, long, default_value_t = 2560)]
    pub memory: u32,
    /// Adds a scratch virtio disk of so many MiB (/dev/vda, then /dev/vdb …); empty at each run.
    #[arg(long = "disk", value_name = "MIB")]
    pub disks: Vec<u32>,
    /// Loads one more kernel module before CMD.
    #[arg(long = "module", value_name = "NAME")]
    pub modules: Vec<String>,
    /// Sets an environment variable for CMD.
    #[arg(long = "env", value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Adds to L1's kernel command line.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub append: String,
    /// Uses another directory tree than the host's root as L1's userland; `debian13` means a tree
    /// that is made for it (with QEMU 10).
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub root: PathBuf,
    /// Passes our standard input on to CMD.
    #[arg(long)]
    pub stdin: bool,
    /// Gives CMD a terminal (for an interactive shell).
    #[arg(long)]
    pub tty: bool,
    /// How often a run is repeated when CMD reports a fault of the emulator.
    #[arg(long, default_value_t = 1)]
    pub emulator_retries: u32,
    /// Keeps the run's directory (console log, scratch disks) and says where it is.
    #[arg(long)]
    pub keep: bool,
    /// Says what the lab does.
    #[arg(short, long)]
    pub verbose: bool,
    /// The command and its arguments, run as root in the same directory as here.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

impl LabArgs {
    /// The defaults for a command; fields are then set as needed.
    pub fn new<S: Into<String>>(command: impl IntoIterator<Item = S>) -> Self {
        Self {
            timeout: 600,
            memory: 2560,
            disks: Vec::new(),
            modules: Vec::new(),
            env: Vec::new(),
            append: String::new(),
            root: PathBuf::from("/"),
            stdin: false,
            tty: false,
            emulator_retries: 1,
            keep: false,
            verbose: false,
            command: command.into_iter().map(Into::into).collect(),
        }
    }
}

/// Runs a command in a fresh L1 and returns the exit status to end with: CMD's own, or one of the
/// `EXIT_` values, whose meaning is then printed on standard error.
///
/// # Errors
/// When the lab cannot be set up or started.
pub fn run(args: &LabArgs) -> Result<i32> {
    if inside() {
        bail!("this is the lab already");
    }
    let kernel = prepare()?;
    let mut args = args.clone();
    if args.root == Path::new("debian13") {
        args.root = debian::tree(debian::Release::Trixie)?;
    }
    let args = &args;
    let mut attempt = 0;
    loop {
        attempt += 1;
        let start = Instant::now();
        let outcome = qemu::run(args, &kernel)?;
        let secs = start.elapsed().as_secs();
        match outcome {
            Outcome::Exited(code) => {
                if args.verbose {
                    eprintln!("lab: command ended with {code} after {secs} s");
                }
                return Ok(code);
            }
            Outcome::Fault(what) if attempt <= args.emulator_retries => {
                eprintln!("lab: the emulator failed ({what}); the run does not count, once more");
            }
            Outcome::Fault(what) => {
                eprintln!("lab: the emulator failed again ({what}); given up");
                return Ok(EXIT_EMULATOR_FAULT);
            }
            Outcome::Died(what) => {
                eprintln!("lab: L1 died before the command ended: {what}");
                return Ok(EXIT_EMULATOR);
            }
            Outcome::Timeout(what) => {
                eprintln!("lab: no end after {} s: {what}", args.timeout);
                return Ok(EXIT_TIMEOUT);
            }
        }
    }
}

/// Whether we run inside the lab.
pub fn inside() -> bool {
    std::env::var_os("BH_LAB").is_some()
}

/// Does all set-up that a run needs; quick when it was done before.
///
/// # Errors
/// When packages cannot be installed or fetched.
pub fn prepare() -> Result<debian::Kernel> {
    setup::packages(setup::LAB).context("lab: set-up")?;
    let kernel = debian::kernel(debian::Release::Trixie, "linux-image-amd64")?;
    debian::busybox()?;
    Ok(kernel)
}

/// A directory of one run on the host, removed when dropped. Under /tmp by a short name, because
/// socket paths are limited to 107 bytes.
pub(crate) struct RunDir {
    /// Its path.
    pub path: PathBuf,
    /// Whether it stays.
    pub keep: bool,
}

impl RunDir {
    /// Makes a fresh directory.
    ///
    /// # Errors
    /// When /tmp is not writable.
    pub fn new(keep: bool) -> Result<Self> {
        sweep();
        let id = std::process::id();
        for n in 0..u32::MAX {
            let path = PathBuf::from(format!("/tmp/bh-lab.{id}.{n}"));
            match fs::create_dir(&path) {
                Ok(()) => {
                    if keep {
                        fs::write(path.join("keep"), "")?;
                    }
                    return Ok(Self { path, keep });
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(|| format!("cannot create {}", path.display())),
            }
        }
        bail!("no free name for a run directory in /tmp")
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("lab: files of this run are in {}", self.path.display());
        } else {
            fs::remove_dir_all(&self.path).ok();
        }
    }
}

/// Removes what runs left behind that were killed themselves.
fn sweep() {
    let Ok(entries) = fs::read_dir("/tmp") else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("bh-lab.").and_then(|rest| rest.split('.').next());
        let Some(pid) = pid.and_then(|p| p.parse::<u32>().ok()) else {
            continue;
        };
        let path = entry.path();
        if !Path::new(&format!("/proc/{pid}")).exists() && !path.join("keep").exists() {
            fs::remove_dir_all(path).ok();
        }
    }
}

/// The deadline of a run.
pub(crate) fn deadline(args: &LabArgs) -> Instant {
    Instant::now() + Duration::from_secs(args.timeout)
}

/// Whether cargo's target directory lies inside the working tree.
pub(crate) fn target_inside_tree() -> bool {
    paths::target().starts_with(paths::root())
}

/// The system's programs without symbols, as the lab wants them: it reads them at every start, through an emulated machine's
/// view of the working tree. Gives the folder, for `BH_BIN_DIR`.
///
/// # Errors
/// When a program cannot be read or the folder not written.
pub fn programs() -> Result<PathBuf> {
    let from = paths::bin_dir();
    let to = paths::lab().join("bin");
    fs::create_dir_all(&to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in fs::read_dir(&from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        let program = meta.is_file() && meta.permissions().mode() & 0o111 != 0;
        let target = to.join(entry.file_name());
        let fresh =
            fs::metadata(&target).and_then(|t| Ok(t.modified()? >= meta.modified()?)).unwrap_or(false);
        if !program || fresh {
            continue;
        }
        let part = to.join(format!("{}.{}", entry.file_name().display(), std::process::id()));
        let strip = Command::new("strip").arg("-o").arg(&part).arg(entry.path()).status();
        if !strip.is_ok_and(|s| s.success()) {
            // binutils came with the C linker; without it the symbols stay in.
            fs::copy(entry.path(), &part)?;
        }
        fs::rename(&part, &target)?;
    }
    Ok(to)
}

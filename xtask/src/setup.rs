//! What has to be installed on a fresh Debian 12 or 13, and the lock that keeps two runs from
//! doing it at once.

use crate::{paths, run};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

/// Debian packages that the lab needs installed, each with a file that shows it is there.
/// Kernels, modules and busybox are unpacked to the cache instead and are not installed.
pub const LAB: &[(&str, &str)] =
    &[("qemu-system-x86", "/usr/bin/qemu-system-x86_64"), ("xz-utils", "/usr/bin/xz")];

/// Debian packages that QEMU guests need.
pub const QEMU: &[(&str, &str)] =
    &[("qemu-system-x86", "/usr/bin/qemu-system-x86_64"), ("seabios", "/usr/share/seabios/bios-256k.bin")];

/// Debian packages that the tests of QEMU guests need besides: UEFI, and what makes a disk that it boots from.
pub const QEMU_TESTS: &[(&str, &str)] = &[
    ("ovmf", "/usr/share/OVMF/OVMF_CODE_4M.fd"),
    ("mtools", "/usr/bin/mcopy"),
    ("systemd-boot-efi", "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"),
    ("sbsigntool", "/usr/bin/sbsign"),
    ("openssl", "/usr/bin/openssl"),
    ("binutils", "/usr/bin/objcopy"),
    ("qemu-utils", "/usr/bin/qemu-img"),
];

/// Debian packages that native tests use: C headers for the layout checks, Debian's xenstore
/// clients against our xenstored, `ip` for test networks, `mkfs` for disks, QEMU's and cryptsetup's judgement of images.
pub const TESTS: &[(&str, &str)] = &[
    ("libxen-dev", "/usr/include/xen/xen.h"),
    ("xenstore-utils", "/usr/bin/xenstore-ls"),
    ("gcc", "/usr/bin/gcc"),
    ("libc6-dev", "/usr/include/stdio.h"),
    ("iproute2", "/usr/sbin/ip"),
    ("qemu-utils", "/usr/bin/qemu-img"),
    ("cryptsetup-bin", "/usr/sbin/cryptsetup"),
];

/// Installs those of `packages` that are missing. Silent and quick when nothing is.
///
/// # Errors
/// When apt fails, or when something is missing and we are not root.
pub fn packages(packages: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> =
        packages.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let _lock = lock("setup")?;
    if !is_root() {
        bail!("missing packages: {}; install them, or run as root and it is done here", missing.join(" "));
    }
    eprintln!("setup: installing {}", missing.join(" "));
    if install(&missing).is_err() {
        // The package lists of a fresh machine may be absent or older than the mirror.
        run::quiet(apt_get().arg("update")).context("apt-get update")?;
        install(&missing)?;
    }
    Ok(())
}

/// PyPI's xenstore client, in a Python environment of its own below the target directory, for the conformance script
/// (`xenstored/tests/tools.rs` looks for it there).
///
/// # Errors
/// When there is no Python, or pip cannot fetch it.
pub fn pyxs() -> Result<()> {
    let dir = paths::target().join("pyxs");
    if dir.exists() {
        return Ok(());
    }
    let _lock = lock("pyxs")?;
    if dir.exists() {
        return Ok(());
    }
    // Debian's python3 comes without ensurepip, which makes environments.
    let whole = Command::new("python3").args(["-c", "import ensurepip, venv"]).output();
    if !whole.is_ok_and(|out| out.status.success()) {
        packages(&[("python3-venv", "/usr/share/doc/python3-venv")])?;
    }
    eprintln!("setup: fetching pyxs");
    let part = paths::target().join("pyxs.part");
    if part.exists() {
        fs::remove_dir_all(&part)?;
    }
    run::quiet(Command::new("python3").args(["-m", "venv"]).arg(&part))?;
    run::quiet(Command::new(part.join("bin/python")).args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "pyxs==0.4.1",
    ]))?;
    fs::rename(&part, &dir)?;
    Ok(())
}

fn apt_get() -> Command {
    let mut cmd = Command::new("apt-get");
    cmd.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=300"]);
    cmd
}

fn install(names: &[&str]) -> Result<()> {
    run::quiet(apt_get().args(["install", "-y", "--no-install-recommends"]).args(names)).map(|_| ())
}

/// Whether we run as root.
pub fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|s| {
        s.lines().find_map(|l| l.strip_prefix("Uid:")).and_then(|l| l.split_whitespace().nth(1)) == Some("0")
    })
}

/// Takes a lock shared by all runs in this working tree; released when dropped.
///
/// # Errors
/// When the lock file cannot be made.
pub fn lock(name: &str) -> Result<File> {
    let dir = paths::lab();
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let path = dir.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

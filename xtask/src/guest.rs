//! Guest images: a Debian cloud kernel as it is, and an initramfs of busybox, the guest agent and
//! the few modules that a PV guest needs.

use crate::cpio::Cpio;
use crate::debian::{self, Kernel, Release};
use crate::modules::Modules;
use crate::{lab, paths, run, setup, tools};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the guest loads under Xen, dependencies added; what its kernel has built in is skipped.
const XEN: &[&str] = &["xen_blkfront", "xen_netfront"];
/// What it loads elsewhere: the same image under QEMU, as tests and benches compare it.
const VIRTIO: &[&str] = &["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net"];

/// What it loads besides where its kernel has it: devices that QEMU emulates, memory that comes and goes, the power button.
const EMULATED: &[&str] =
    &["virtio_mem", "xhci_pci", "usb_storage", "sd_mod", "usbhid", "hid_generic", "button", "evdev"];

/// Names under which the agent and busybox are called by kernel and users.
const AGENT_LINKS: &[&str] = &["poweroff", "reboot", "halt"];
const BUSYBOX_LINKS: &[&str] = &[
    "sh", "ls", "cat", "echo", "ip", "ping", "ps", "top", "free", "mount", "umount", "dmesg", "lsmod", "dd",
    "df", "vi", "grep", "wc", "kill", "sleep", "hexdump", "wget", "nc", "date", "uname", "uptime", "lsblk",
    "blkid", "sync", "id", "env", "head", "tail", "setsid", "mkdir",
];

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// Debian 12's cloud kernel, Linux 6.1.
    Debian12,
    /// Debian 13's cloud kernel, Linux 6.12.
    Debian13,
    /// Debian 13's kernel for any machine: it has USB.
    Debian13Full,
}

impl Guest {
    /// All with cloud kernels.
    pub const ALL: &'static [Self] = &[Self::Debian12, Self::Debian13];

    /// Its name in paths and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian12 => "debian12",
            Self::Debian13 => "debian13",
            Self::Debian13Full => "debian13-full",
        }
    }

    fn release(self) -> Release {
        match self {
            Self::Debian12 => Release::Bookworm,
            Self::Debian13 | Self::Debian13Full => Release::Trixie,
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Debian12 | Self::Debian13 => "linux-image-cloud-amd64",
            Self::Debian13Full => "linux-image-amd64",
        }
    }

    /// Modules that it loads outside Xen.
    fn virtio(self) -> Vec<&'static str> {
        let more: &[&str] = if self == Self::Debian13Full { EMULATED } else { &[] };
        VIRTIO.iter().chain(more).copied().collect()
    }
}

/// A guest's files, ready to boot.
#[derive(Clone, Debug)]
pub struct Image {
    /// `uname -r` in it.
    pub version: String,
    /// The bzImage, byte for byte Debian's.
    pub vmlinuz: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// Options of `cargo xtask guest-image`.
#[derive(Args, Clone, Debug)]
pub struct GuestArgs {
    /// Which guests (default: all).
    #[arg(value_enum)]
    pub guests: Vec<Guest>,
}

/// Makes the images and prints where they are.
///
/// # Errors
/// As [`tools::image`].
pub fn run(args: &GuestArgs) -> Result<i32> {
    let guests = if args.guests.is_empty() { Guest::ALL } else { &args.guests };
    for guest in guests {
        let image = tools::image(*guest)?;
        println!(
            "{} (Linux {}): {} {}",
            guest.name(),
            image.version,
            image.vmlinuz.display(),
            image.initrd.display()
        );
    }
    Ok(0)
}

/// Makes one image, or finds it made. The agent is always built first; the initramfs is written
/// again only when something in it changed. Inside the lab, where nothing can be fetched, it takes
/// what was made outside.
///
/// # Errors
/// When packages cannot be fetched or the agent does not build.
pub fn image(guest: Guest) -> Result<Image> {
    setup::packages(&[("xz-utils", "/usr/bin/xz")])?;
    let dir = paths::lab().join("guest").join(guest.name());
    let inside = lab::inside();
    if inside && !dir.join("stamp").exists() {
        bail!("no image of {}: run `cargo xtask guest-image` outside the lab first", guest.name());
    }
    let kernel = debian::kernel(guest.release(), guest.package())?;
    if inside {
        return Ok(Image {
            version: kernel.version,
            vmlinuz: dir.join("vmlinuz"),
            initrd: dir.join("initrd.img"),
        });
    }
    let agent = agent()?;
    let busybox = fs::read(debian::busybox()?)?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let image = Image {
        version: kernel.version.clone(),
        vmlinuz: dir.join("vmlinuz"),
        initrd: dir.join("initrd.img"),
    };
    let mut hash = DefaultHasher::new();
    (&agent, &busybox, XEN, guest.virtio(), AGENT_LINKS, BUSYBOX_LINKS, &kernel.version).hash(&mut hash);
    let stamp = format!("{:016x}", hash.finish());
    let stamp_file = dir.join("stamp");
    let _lock = setup::lock(guest.name())?;
    let fresh = fs::read_to_string(&stamp_file).is_ok_and(|s| s == stamp);
    if !(fresh && image.vmlinuz.exists() && image.initrd.exists()) {
        replace(&image.vmlinuz, &fs::read(&kernel.vmlinuz)?)?;
        replace(&image.initrd, &initramfs(&kernel, &agent, &busybox, &guest.virtio())?)?;
        replace(&stamp_file, stamp.as_bytes())?;
    }
    Ok(image)
}

/// Builds the guest agent and returns its bytes without symbols (a guest unpacks them at each
/// boot, in emulated time).
fn agent() -> Result<Vec<u8>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run::loud(
        Command::new(cargo).args(["build", "--quiet", "--package", "guest-agent"]).current_dir(paths::root()),
    )?;
    stripped(&paths::bin_dir().join("guest-agent"))
}

/// A program's bytes without symbols.
///
/// # Errors
/// It cannot be read.
fn stripped(path: &Path) -> Result<Vec<u8>> {
    let name = path.file_name().unwrap_or_default().display();
    let stripped = paths::lab().join(format!("{name}.{}", std::process::id()));
    fs::create_dir_all(paths::lab())?;
    let strip = Command::new("strip").arg("-o").arg(&stripped).arg(path).status();
    let bytes = match strip {
        Ok(status) if status.success() => fs::read(&stripped),
        // binutils came with the C linker; without it the symbols stay in.
        _ => fs::read(path),
    };
    fs::remove_file(&stripped).ok();
    bytes.with_context(|| format!("cannot read {}", path.display()))
}

fn initramfs(kernel: &Kernel, agent: &[u8], busybox: &[u8], virtio: &[&str]) -> Result<Vec<u8>> {
    let mut cpio = Cpio::new();
    for dir in ["dev", "proc", "sys", "run", "tmp", "root", "etc", "sbin"] {
        cpio.dir(dir);
    }
    cpio.chardev("dev/console", 0o600, 5, 1);
    cpio.chardev("dev/null", 0o666, 1, 3);
    cpio.file("init", 0o755, agent);
    cpio.file("bin/busybox", 0o755, busybox);
    for link in AGENT_LINKS {
        cpio.symlink(&format!("sbin/{link}"), "/init");
    }
    for link in BUSYBOX_LINKS {
        cpio.symlink(&format!("bin/{link}"), "busybox");
    }
    let modules = Modules::open(&kernel.modules)?;
    let mut packed = BTreeSet::new();
    for (list, names) in [("xen", XEN), ("virtio", virtio)] {
        let mut order = String::new();
        for module in modules.closure(names)? {
            let name = module.name;
            order.push_str(&name);
            order.push('\n');
            if packed.insert(name.clone()) {
                cpio.file(&format!("lib/bulkhead-modules/{name}.ko"), 0o644, &module.bytes);
            }
        }
        cpio.file(&format!("lib/bulkhead-modules/{list}"), 0o644, order.as_bytes());
    }
    Ok(cpio.finish())
}

/// Writes a file whole or not at all: a guest may be booting from the old one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, bytes).with_context(|| format!("cannot write {}", part.display()))?;
    fs::rename(&part, path).with_context(|| format!("cannot rename to {}", path.display()))
}

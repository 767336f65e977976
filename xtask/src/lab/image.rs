//! L1's initramfs: a cached base (busybox, modules, scripts) and a small part for each run.

use super::LabArgs;
use crate::cpio::Cpio;
use crate::debian::{self, Kernel};
use crate::modules::Modules;
use crate::{paths, setup};
use anyhow::{Context, Result};
use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

const INIT: &str = include_str!("init.sh");
const STAGE2: &str = include_str!("stage2.sh");

/// Loaded in every L1, dependencies added. Names that the kernel has built in are skipped.
const MODULES: &[&str] = &[
    "9p",
    "9pnet_virtio",
    "overlay",
    "virtio_blk",
    "kvm_amd",
    "udmabuf",
    "tun",
    "veth",
    "bridge",
    "tap",
    "vhost_net",
    "loop",
    // A driver domain's own NAT: nobody loads modules for it. nf_tables' own checksums are asked for by name.
    "crc32c_generic",
    "nf_tables",
    "nft_masq",
    "nft_chain_nat",
];

/// Writes the initramfs of a run and returns its path.
pub fn initrd(args: &LabArgs, kernel: &Kernel, dir: &Path) -> Result<PathBuf> {
    let mut bytes = base(args, kernel)?;
    bytes.extend_from_slice(&per_run(args, kernel)?);
    let path = dir.join("initrd");
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn base(args: &LabArgs, kernel: &Kernel) -> Result<Vec<u8>> {
    let mut hash = DefaultHasher::new();
    (INIT, STAGE2, MODULES, &args.modules, &kernel.version).hash(&mut hash);
    let path = paths::lab().join(format!("l1-{:016x}.initrd", hash.finish()));
    if let Ok(bytes) = fs::read(&path) {
        return Ok(bytes);
    }
    let _lock = setup::lock("l1")?;
    let mut cpio = Cpio::new();
    let busybox = debian::busybox()?;
    cpio.file("bin/busybox", 0o755, &fs::read(busybox)?);
    cpio.chardev("dev/console", 0o600, 5, 1);
    cpio.chardev("dev/null", 0o666, 1, 3);
    cpio.file("init", 0o755, INIT.as_bytes());
    cpio.file("lab/stage2", 0o755, STAGE2.as_bytes());
    let mut names = MODULES.to_vec();
    names.extend(args.modules.iter().map(String::as_str));
    let mut order = String::new();
    for module in Modules::open(&kernel.modules)?.closure(&names)? {
        cpio.file(&format!("lab/modules/{}.ko", module.name), 0o644, &module.bytes);
        order.push_str(&module.name);
        order.push('\n');
    }
    cpio.file("lab/modules/order", 0o644, order.as_bytes());
    let bytes = cpio.finish();
    let part = path.with_extension("part");
    fs::write(&part, &bytes)?;
    fs::rename(&part, &path)?;
    Ok(bytes)
}

fn per_run(args: &LabArgs, kernel: &Kernel) -> Result<Vec<u8>> {
    let mut vars: Vec<(String, String)> = env::vars().filter(|(k, _)| passes(k)).collect();
    vars.push(("BH_LAB".into(), "1".into()));
    let tree = paths::root();
    vars.push(("LAB_TREE".into(), tree.display().to_string()));
    if !super::target_inside_tree() {
        vars.push(("LAB_TARGET".into(), paths::target().display().to_string()));
    }
    vars.push(("LAB_MODULES".into(), kernel.modules.display().to_string()));
    if args.tty {
        vars.push(("LAB_TTY".into(), "1".into()));
    } else if args.stdin {
        vars.push(("LAB_STDIN".into(), "1".into()));
    }
    for pair in &args.env {
        let (key, value) = pair.split_once('=').with_context(|| format!("--env {pair}: not NAME=VALUE"))?;
        vars.push((key.to_owned(), value.to_owned()));
    }
    let mut env_text = String::new();
    for (key, value) in vars {
        env_text.push_str(&format!("export {key}={}\n", quote(&value)));
    }
    let cwd = env::current_dir().context("no current directory")?;
    let words: Vec<String> = args.command.iter().map(|a| quote(a)).collect();
    let mut path = env::var("PATH").unwrap_or_default();
    path.push_str(":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    // A console forgets its size when nobody has it open, so this is done within CMD's session.
    let size = match super::qemu::terminal_size() {
        Some((rows, cols)) if args.tty => format!("stty rows {rows} cols {cols}\n"),
        _ => String::new(),
    };
    let cmd = format!(
        ". /run/lab/env\n{size}export PATH={}\ncd {} || exit 125\nexec {}\n",
        quote(&path),
        quote(&cwd.display().to_string()),
        words.join(" ")
    );
    let mut cpio = Cpio::new();
    cpio.file("lab/env", 0o644, env_text.as_bytes());
    cpio.file("lab/cmd", 0o644, cmd.as_bytes());
    Ok(cpio.finish())
}

/// Which of our environment variables CMD gets.
fn passes(key: &str) -> bool {
    let known = [
        "HOME",
        "USER",
        "LANG",
        "TERM",
        "COLUMNS",
        "LINES",
        "NO_COLOR",
        "RUST_LOG",
        "RUST_BACKTRACE",
        "CARGO_TARGET_DIR",
        "CARGO_MANIFEST_DIR",
    ];
    known.contains(&key)
        || (key.starts_with("BH_") && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
}

/// Quotes a word for a POSIX shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn quoting_survives_a_shell() {
        let word = "it's $HOME \"and\" `more` \\ ";
        let out = std::process::Command::new("sh")
            .args(["-c", &format!("printf %s {}", super::quote(word))])
            .output()
            .expect("sh");
        assert_eq!(String::from_utf8_lossy(&out.stdout), word);
    }
}

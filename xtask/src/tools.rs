//! Guest images with programs that the bare one has no use for: Debian 13's e2fsprogs and iperf3, and one with fio beside them.
//!
//! Each is `initrd.img` with a second archive behind it; the kernel unpacks one after the other. fio has an image to itself because
//! Debian's is linked with the clients of every storage network: 60 MB of libraries, which an emulated guest unpacks at each boot.

use crate::cpio::Cpio;
use crate::guest::{self, Guest, Image, replace};
use crate::{debian, lab, run, setup};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Images by name, and the programs in them.
const IMAGES: &[(&str, &[&str])] = &[
    ("initrd-tools.img", &["usr/sbin/mke2fs", "usr/sbin/e2fsck", "usr/bin/iperf3"]),
    ("initrd-fio.img", &["usr/sbin/mke2fs", "usr/sbin/e2fsck", "usr/bin/iperf3", "usr/bin/fio"]),
];

/// Where Debian keeps libraries; Ceph's has a folder of its own, which fio's name.
const LIBRARIES: &[&str] = &["usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"];
/// What no program is linked with: glibc loads it by itself when a thread is to be cancelled, as iperf3 does at its end.
const LOADED_LATER: &str = "usr/lib/x86_64-linux-gnu/libgcc_s.so.1";
const LINKER: &str = "lib64/ld-linux-x86-64.so.2";

/// The image of a guest; beside Debian 13's, those with tools.
///
/// # Errors
/// As [`guest::image`]; when packages cannot be fetched, or a library of a program is in none of them.
pub fn image(guest: Guest) -> Result<Image> {
    let image = guest::image(guest)?;
    if guest == Guest::Debian13 {
        images(&image)?;
    }
    Ok(image)
}

/// Makes the images beside Debian 13's `initrd.img`, those that are not made of this one. Inside the lab, where nothing can be
/// fetched, what was made outside is taken.
fn images(image: &Image) -> Result<()> {
    if lab::inside() {
        return Ok(());
    }
    let _lock = setup::lock("tools")?;
    let initrd = fs::read(&image.initrd).with_context(|| image.initrd.display().to_string())?;
    for (name, programs) in IMAGES {
        let path = image.initrd.with_file_name(name);
        let stamp_file = path.with_extension("stamp");
        let mut hash = DefaultHasher::new();
        (&initrd, IMAGES, LOADED_LATER).hash(&mut hash);
        let stamp = format!("{:016x}", hash.finish());
        if path.exists() && fs::read_to_string(&stamp_file).is_ok_and(|s| s == stamp) {
            continue;
        }
        replace(&path, &[initrd.as_slice(), &archive(programs)?].concat())?;
        replace(&stamp_file, stamp.as_bytes())?;
    }
    Ok(())
}

/// The programs, the libraries that the dynamic linker loads for them, and mke2fs's settings.
fn archive(programs: &[&str]) -> Result<Vec<u8>> {
    let tree = debian::guest_tools()?;
    let mut files = BTreeMap::from([
        (LINKER.to_owned(), tree.join("usr").join(LINKER)),
        ("etc/mke2fs.conf".to_owned(), tree.join("etc/mke2fs.conf")),
        (LOADED_LATER.to_owned(), tree.join(LOADED_LATER)),
    ]);
    for &program in programs {
        files.insert(program.to_owned(), tree.join(program));
        for library in libraries(&tree, program)? {
            let at = library.strip_prefix(&tree).context("a library of the host's own")?;
            files.insert(at.to_string_lossy().into_owned(), library);
        }
    }
    let mut cpio = Cpio::new();
    for (at, path) in &files {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        cpio.file(at, if at.starts_with("etc") { 0o644 } else { 0o755 }, &bytes);
    }
    Ok(cpio.finish())
}

/// What the dynamic linker loads for a program: asked of the tree's own, with its folders alone.
fn libraries(tree: &Path, program: &str) -> Result<Vec<PathBuf>> {
    let folders: Vec<String> = LIBRARIES.iter().map(|dir| tree.join(dir).display().to_string()).collect();
    let text = run::quiet(
        Command::new(tree.join("usr").join(LINKER))
            .args(["--inhibit-cache", "--library-path", &folders.join(":"), "--list"])
            .arg(tree.join(program)),
    )?;
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!("{program}: {}", line.trim());
    }
    Ok(loaded(&text).filter(|path| !path.ends_with("ld-linux-x86-64.so.2")).collect())
}

/// The files that `ld.so --list` names.
fn loaded(text: &str) -> impl Iterator<Item = PathBuf> {
    text.lines().filter_map(|line| line.split_once(" => ")?.1.split_whitespace().next()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_linkers_list_is_read() {
        let text = "\tlinux-vdso.so.1 (0x00007f)\n\tlibm.so.6 => /t/usr/lib/libm.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 => /t/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found: Vec<PathBuf> = loaded(text).collect();
        assert_eq!(found, [Path::new("/t/usr/lib/libm.so.6"), Path::new("/t/ld-linux-x86-64.so.2")]);
    }
}

//! Debian's own packages, unpacked to the cache: kernels of two releases and a static busybox.
//!
//! apt runs with lists, cache and sources of its own. The sources are the host's, with nothing but
//! the release's name changed, so this file names no mirror; apt verifies signatures and checksums.
//! Sources that are not Debian's (another keyring, other suites) are left out.

use crate::{paths, run, setup};
use anyhow::{Context, Result, anyhow, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A Debian release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Debian 12, Linux 6.1.
    Bookworm,
    /// Debian 13, Linux 6.12.
    Trixie,
}

impl Release {
    /// The name that apt's sources use.
    pub fn suite(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `uname -r` of the kernel.
    pub version: String,
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// The directory that `/lib/modules/VERSION` would be.
    pub modules: PathBuf,
}

const KEYRINGS: &[&str] =
    &["/usr/share/keyrings/debian-archive-keyring.pgp", "/usr/share/keyrings/debian-archive-keyring.gpg"];

/// Fetches and unpacks the kernel behind a meta-package such as `linux-image-cloud-amd64`.
/// The second call finds it in the cache.
///
/// # Errors
/// When apt cannot fetch it.
pub fn kernel(release: Release, meta: &str) -> Result<Kernel> {
    let tree = unpacked(release, meta)?;
    let boot = tree.join("boot");
    let version = fs::read_dir(&boot)
        .with_context(|| format!("cannot read {}", boot.display()))?
        .flatten()
        .find_map(|e| {
            let name = e.file_name().into_string().ok()?;
            name.strip_prefix("vmlinuz-").map(str::to_owned)
        })
        .ok_or_else(|| anyhow!("no kernel image in {}", boot.display()))?;
    let usr = tree.join("usr/lib/modules").join(&version);
    let modules = if usr.exists() { usr } else { tree.join("lib/modules").join(&version) };
    Ok(Kernel { vmlinuz: boot.join(format!("vmlinuz-{version}")), modules, version })
}

/// Path of a static busybox from Debian 12 or 13's package. It is unpacked, not installed: it would
/// displace the host's own.
///
/// # Errors
/// When apt cannot fetch it.
pub fn busybox() -> Result<PathBuf> {
    let tree = unpacked(Release::Trixie, "busybox-static")?;
    ["usr/bin/busybox", "bin/busybox"]
        .iter()
        .map(|p| tree.join(p))
        .find(|p| p.exists())
        .ok_or_else(|| anyhow!("no busybox in {}", tree.display()))
}

/// Debian 12's packages of Xen's two xenstored daemons, and the libraries that they load.
const XEN_DAEMONS: &[&str] = &[
    "xen-utils-4.17",
    "xen-utils-common",
    "libxenmisc4.17",
    "libxencall1",
    "libxendevicemodel1",
    "libxenevtchn1",
    "libxenforeignmemory1",
    "libxengnttab1",
    "libxentoolcore1",
    "libxentoollog1",
];

/// A tree with Xen 4.17's xenstored and oxenstored. Unpacked, not installed: the host's boot menu would get a Xen otherwise.
///
/// # Errors
/// When apt cannot fetch it.
pub fn xen_daemons() -> Result<PathBuf> {
    unpacked_together(Release::Bookworm, "xen-daemons", |_| Ok(names(XEN_DAEMONS)))
}

/// What the guest's tools need of Debian 13, with every library that these depend on.
const GUEST_TOOLS: &[&str] = &["e2fsprogs", "fio", "iperf3"];

/// A tree with e2fsprogs, fio, iperf3 and their libraries, unpacked and not installed.
///
/// # Errors
/// When apt cannot fetch it.
pub fn guest_tools() -> Result<PathBuf> {
    unpacked_together(Release::Trixie, "guest-tools", |apt| apt.with_libraries(GUEST_TOOLS))
}

/// A small Debian tree with QEMU in it, for `--root` where the host's QEMU is too old for a
/// comparison. Takes a minute or two the first time.
///
/// # Errors
/// When debootstrap cannot be installed or fails.
pub fn tree(release: Release) -> Result<PathBuf> {
    let dir = paths::lab().join(format!("root-{}", release.suite()));
    if dir.exists() {
        return Ok(dir);
    }
    setup::packages(&[("debootstrap", "/usr/sbin/debootstrap")])?;
    let _lock = setup::lock("tree")?;
    if dir.exists() {
        return Ok(dir);
    }
    eprintln!("setup: making a tree of Debian {}", release.suite());
    let sources = sources_for(release)?;
    let field = |name: &str| {
        let value = sources.lines().find_map(|l| l.strip_prefix(name));
        value.map_or_else(String::new, |v| v.trim().to_owned())
    };
    let part = dir.with_extension("part");
    if part.exists() {
        fs::remove_dir_all(&part)?;
    }
    run::quiet(
        Command::new("debootstrap")
            .args(["--variant=minbase", "--include=qemu-system-x86,iproute2,busybox"])
            .arg(format!("--keyring={}", field("Signed-By:")))
            .arg(release.suite())
            .arg(&part)
            .arg(field("URIs:")),
    )?;
    fs::rename(&part, &dir)?;
    Ok(dir)
}

/// The directory that holds the unpacked package, fetched first if need be. A kernel meta-package
/// stands for the image that it depends on.
fn unpacked(release: Release, package: &str) -> Result<PathBuf> {
    unpacked_together(release, package, |apt| {
        let image = package.starts_with("linux-image-");
        Ok(vec![if image { apt.image_behind(package)? } else { package.to_owned() }])
    })
}

fn names(packages: &[&str]) -> Vec<String> {
    packages.iter().map(|&p| p.to_owned()).collect()
}

/// The same for several packages in one tree; apt is asked for their names when they have to be fetched.
fn unpacked_together(
    release: Release,
    what: &str,
    packages: impl FnOnce(&Apt) -> Result<Vec<String>>,
) -> Result<PathBuf> {
    let tree = paths::lab().join("pkg").join(format!("{}-{what}", release.suite()));
    if tree.exists() {
        return Ok(tree);
    }
    let _lock = setup::lock("debian")?;
    if tree.exists() {
        return Ok(tree);
    }
    eprintln!("setup: fetching {what} of Debian {}", release.suite());
    let apt = Apt::new(release)?;
    // Unpacked beside its place and renamed, so that a killed run leaves nothing half done.
    let part = tree.with_file_name(format!("{what}.part"));
    if part.exists() {
        fs::remove_dir_all(&part)?;
    }
    fs::create_dir_all(&part)?;
    for deb in apt.download(&packages(&apt)?)? {
        run::quiet(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&part))?;
        fs::remove_file(&deb).ok();
    }
    fs::rename(&part, &tree)?;
    Ok(tree)
}

/// apt with a private configuration for one release.
struct Apt {
    dir: PathBuf,
    conf: PathBuf,
}

impl Apt {
    fn new(release: Release) -> Result<Self> {
        let dir = paths::lab().join("apt").join(release.suite());
        for sub in ["state", "lists/partial", "cache/archives/partial", "parts", "debs"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let sources = sources_for(release)?;
        let list = dir.join("parts/debian.sources");
        let conf = dir.join("apt.conf");
        let d = dir.display();
        fs::write(dir.join("status"), "")?;
        fs::write(
            &conf,
            format!(
                "Dir::State \"{d}/state\";\nDir::State::lists \"{d}/lists\";\n\
                 Dir::State::status \"{d}/status\";\nDir::Cache \"{d}/cache\";\n\
                 Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{d}/parts\";\n\
                 Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n\
                 APT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; }};\n\
                 APT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n"
            ),
        )?;
        fs::write(&list, sources)?;
        let apt = Self { dir, conf };
        run::quiet(apt.cmd("apt-get").args(["-q", "update"]))?;
        Ok(apt)
    }

    fn cmd(&self, program: &str) -> Command {
        let mut cmd = Command::new(program);
        cmd.env("APT_CONFIG", &self.conf).env("LC_ALL", "C").current_dir(self.dir.join("debs"));
        cmd
    }

    fn image_behind(&self, meta: &str) -> Result<String> {
        let text = run::quiet(self.cmd("apt-cache").args(["depends", meta]))?;
        text.lines()
            .filter_map(|l| l.trim().strip_prefix("Depends: "))
            .find(|l| l.starts_with("linux-image-"))
            .map(str::to_owned)
            .ok_or_else(|| anyhow!("{meta} depends on no kernel image"))
    }

    /// These packages and the libraries that they depend on, level by level. What is no library (an interpreter for a package's
    /// scripts, a user to be made) is not needed to run a program.
    fn with_libraries(&self, packages: &[&str]) -> Result<Vec<String>> {
        let mut all = names(packages);
        let mut level = all.clone();
        while !level.is_empty() {
            let text = run::quiet(self.cmd("apt-cache").arg("depends").args(&level))?;
            level.clear();
            for name in text.lines().filter_map(depended_library) {
                if !all.contains(&name) {
                    all.push(name.clone());
                    level.push(name);
                }
            }
        }
        Ok(all)
    }

    /// Fetches packages; the files, in the same order.
    fn download(&self, names: &[String]) -> Result<Vec<PathBuf>> {
        run::quiet(self.cmd("apt-get").args(["-q", "download"]).args(names))?;
        let debs: Vec<PathBuf> =
            fs::read_dir(self.dir.join("debs"))?.flatten().map(|entry| entry.path()).collect();
        names
            .iter()
            .map(|name| {
                let prefix = format!("{name}_");
                let of = |path: &&PathBuf| {
                    path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&prefix))
                };
                debs.iter().find(of).cloned().ok_or_else(|| anyhow!("apt-get download {name} left no file"))
            })
            .collect()
    }
}

/// The library that a line of `apt-cache depends` names, if it does.
fn depended_library(line: &str) -> Option<String> {
    let line = line.trim().trim_start_matches('|');
    let name = line.strip_prefix("Depends: ").or_else(|| line.strip_prefix("PreDepends: "))?;
    (name.starts_with("lib") || name == "zlib1g").then(|| name.to_owned())
}

/// The host's Debian sources, in deb822 form, with the suite changed to `release`.
fn sources_for(release: Release) -> Result<String> {
    let host = host_codename()?;
    let keyring = KEYRINGS
        .iter()
        .find(|p| Path::new(p).exists())
        .ok_or_else(|| anyhow!("no Debian keyring: install debian-archive-keyring"))?;
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|e| e.path()));
    }
    files.sort();
    let mut out = String::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        let found = match file.extension().and_then(|e| e.to_str()) {
            Some("sources") => deb822(&text, &host),
            Some("list") => one_line(&text, &host),
            _ => Vec::new(),
        };
        for source in found {
            let suites: Vec<String> =
                source.suites.iter().map(|s| s.replacen(&host, release.suite(), 1)).collect();
            out.push_str(&format!(
                "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nSigned-By: {keyring}\n\n",
                source.uris,
                suites.join(" ")
            ));
        }
    }
    if out.is_empty() {
        bail!("no Debian source for {host} in /etc/apt/sources.list or sources.list.d");
    }
    Ok(out)
}

fn host_codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    text.lines()
        .find_map(|l| l.strip_prefix("VERSION_CODENAME="))
        .map(|v| v.trim_matches('"').to_owned())
        .ok_or_else(|| anyhow!("/etc/os-release names no release: the lab needs Debian 12 or 13"))
}

#[derive(Debug, PartialEq)]
struct Source {
    uris: String,
    suites: Vec<String>,
}

/// Debian's own: its suites, its main component, and no keyring but Debian's.
fn accept(uris: &str, suites: &str, components: &str, signed_by: &str, host: &str) -> Option<Source> {
    if !signed_by.is_empty() && !signed_by.contains("debian-archive") {
        return None;
    }
    if uris.is_empty() || !components.split_whitespace().any(|c| c == "main") {
        return None;
    }
    let suites: Vec<String> = suites
        .split_whitespace()
        .filter(|s| s.strip_prefix(host).is_some_and(|rest| matches!(rest, "" | "-updates" | "-security")))
        .map(str::to_owned)
        .collect();
    (!suites.is_empty()).then(|| Source { uris: uris.to_owned(), suites })
}

/// Reads the deb822 format of sources.list(5).
fn deb822(text: &str, host: &str) -> Vec<Source> {
    let mut out = Vec::new();
    let lines = text.lines().filter(|l| !l.starts_with('#'));
    let joined = lines.collect::<Vec<_>>().join("\n");
    for stanza in joined.split("\n\n") {
        let field = |name: &str| -> String {
            let mut value = String::new();
            let mut inside = false;
            for line in stanza.lines() {
                if line.starts_with([' ', '\t']) {
                    if inside {
                        value.push(' ');
                        value.push_str(line.trim());
                    }
                } else if let Some((key, rest)) = line.split_once(':') {
                    inside = key.eq_ignore_ascii_case(name);
                    if inside {
                        value = rest.trim().to_owned();
                    }
                }
            }
            value
        };
        let enabled = !field("Enabled").eq_ignore_ascii_case("no");
        if enabled && field("Types").split_whitespace().any(|t| t == "deb") {
            out.extend(accept(
                &field("URIs"),
                &field("Suites"),
                &field("Components"),
                &field("Signed-By"),
                host,
            ));
        }
    }
    out
}

/// Reads the one-line format of sources.list(5).
fn one_line(text: &str, host: &str) -> Vec<Source> {
    let mut out = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or("").trim();
        let Some(rest) = line.strip_prefix("deb ").map(str::trim) else {
            continue;
        };
        let (options, rest) = match rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
            Some((options, rest)) => (options, rest.trim()),
            None => ("", rest),
        };
        let signed_by = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by=")).unwrap_or("");
        let mut words = rest.split_whitespace();
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else {
            continue;
        };
        let components = words.collect::<Vec<_>>().join(" ");
        out.extend(accept(uri, suite, &components, signed_by, host));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{Source, deb822, depended_library, one_line};

    #[test]
    fn libraries_are_taken_and_nothing_else() {
        let text = "fio\n  Depends: libaio1t64\n  Depends: python3\n  PreDepends: zlib1g\n |Depends: libc6\n  Recommends: libx\n  \
                    Depends: <libvirtual>\n    libreal\n";
        let found: Vec<String> = text.lines().filter_map(depended_library).collect();
        assert_eq!(found, ["libaio1t64", "zlib1g", "libc6"]);
    }

    #[test]
    fn third_parties_are_left_out_of_deb822() {
        let text = "Types: deb\n# a comment\nURIs: mirror:/a\nSuites: bookworm bookworm-updates bookworm-backports\n\
                    Components: main contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
                    Types: deb\nURIs: mirror:/b\nSuites: nodistro\nComponents: main\n\n\
                    Types: deb\nURIs: mirror:/c\nSuites: bookworm\nComponents: main\nSigned-By: /k/other.gpg\n\n\
                    Types: deb-src\nURIs: mirror:/d\nSuites: bookworm\nComponents: main\n\n\
                    Enabled: no\nTypes: deb\nURIs: mirror:/e\nSuites: bookworm\nComponents: main\n";
        assert_eq!(
            deb822(text, "bookworm"),
            [Source { uris: "mirror:/a".into(), suites: vec!["bookworm".into(), "bookworm-updates".into()] }]
        );
    }

    #[test]
    fn third_parties_are_left_out_of_one_line() {
        let text = "# c\ndeb mirror:/a bookworm main non-free # x\n\
                    deb [arch=amd64 signed-by=/k/other.gpg] mirror:/b bookworm main\n\
                    deb mirror:/c bookworm stable\ndeb mirror:/d bookworm-pgdg main\n\
                    deb-src mirror:/a bookworm main\ndeb mirror:/s bookworm-security main\n";
        let uris: Vec<String> = one_line(text, "bookworm").into_iter().map(|s| s.uris).collect();
        assert_eq!(uris, ["mirror:/a", "mirror:/s"]);
    }
}

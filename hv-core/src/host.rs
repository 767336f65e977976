//! What this host has: cgroup v2, memory, Landlock, and uids in use.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::sys;

/// Controllers that limits need.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

/// hv-core's part of the cgroup v2 tree.
#[derive(Debug)]
pub struct Cgroups {
    base: PathBuf,
}

fn enable(dir: &Path) -> io::Result<()> {
    let have = fs::read_to_string(dir.join("cgroup.controllers"))?;
    for controller in CONTROLLERS {
        if !have.split_whitespace().any(|c| c == controller) {
            return Err(io::Error::other(format!("no {controller} controller in {}", dir.display())));
        }
    }
    fs::write(dir.join("cgroup.subtree_control"), "+memory +cpu +pids")
}

impl Cgroups {
    /// Prepares a directory for domains' cgroups. Under a service manager that delegated a cgroup to hv-core it is that one,
    /// whose processes then move to a leaf; else a directory of its own at the root.
    ///
    /// # Errors
    /// In one line, why there is no cgroup v2 to use.
    pub fn prepare() -> Result<Cgroups, String> {
        let mounts = fs::read_to_string("/proc/self/mounts").map_err(|e| e.to_string())?;
        let root = mounts
            .lines()
            .filter_map(|l| {
                let mut columns = l.split_whitespace().skip(1);
                let dir = columns.next()?;
                (columns.next()? == "cgroup2").then(|| PathBuf::from(dir))
            })
            .next()
            .ok_or("cgroup v2 is not mounted")?;
        let own = fs::read_to_string("/proc/self/cgroup").map_err(|e| e.to_string())?;
        let own = own.lines().find_map(|l| l.strip_prefix("0::")).unwrap_or("/").trim_matches('/').to_owned();
        let prepare = || -> io::Result<PathBuf> {
            let base = if own.is_empty() {
                enable(&root)?;
                root.join("bulkhead")
            } else {
                let base = root.join(&own);
                let leaf = base.join("hv-core");
                make_dir(&leaf)?;
                // No process may be in a cgroup that gives controllers on; the spawner comes along.
                for pid in fs::read_to_string(base.join("cgroup.procs"))?.lines() {
                    fs::write(leaf.join("cgroup.procs"), pid)?;
                }
                base
            };
            make_dir(&base)?;
            enable(&base)?;
            Ok(base)
        };
        prepare().map(|base| Cgroups { base }).map_err(|e| e.to_string())
    }

    /// A domain's cgroup directory.
    pub fn dir_of(&self, domid: u16) -> String {
        self.base.join(format!("domain-{domid}")).to_string_lossy().into_owned()
    }

    /// Removes a domain's cgroup, whose processes are gone.
    pub fn remove(&self, domid: u16) {
        if let Err(e) = fs::remove_dir(self.dir_of(domid))
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(domid, "cgroup: {e}");
        }
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}

/// Memory of the host, bytes.
pub fn memory_total() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// What Landlock lacks, in words.
pub fn landlock_missing() -> Option<String> {
    match sys::landlock_abi() {
        0 => Some("Landlock: the kernel has none; the empty root file system alone bounds domains".into()),
        n if n < 6 => Some(format!(
            "Landlock ABI 6: the kernel has {n}, without scopes for signals and abstract sockets"
        )),
        _ => None,
    }
}

/// The first uid from `base` on that is above every uid of that range which a process has: survivors of an earlier hv-core
/// share theirs with nobody.
pub fn first_free_uid(base: u32, range: u32) -> u32 {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let uids = processes.filter_map(|e| e.metadata().ok()).map(|m| m.uid());
    uids.filter(|u| (base..base.saturating_add(range)).contains(u)).max().map_or(base, |u| u + 1)
}

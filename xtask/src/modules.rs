//! Kernel modules out of an unpacked Debian kernel package: which file, what it depends on, and
//! its decompressed bytes. Reads the modules themselves, so no `depmod` is needed.

use crate::run;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The modules directory of one kernel (`…/lib/modules/VERSION`).
pub struct Modules {
    dir: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// One module, ready for `finit_module`.
pub struct Module {
    /// Its name with underscores.
    pub name: String,
    /// The decompressed ELF file.
    pub bytes: Vec<u8>,
}

fn canonical(path: &str) -> String {
    let base = path.rsplit('/').next().unwrap_or(path);
    base.split(".ko").next().unwrap_or(base).replace('-', "_")
}

impl Modules {
    /// Indexes a directory by the package's `modules.order` and `modules.builtin`.
    ///
    /// # Errors
    /// When those lists cannot be read.
    pub fn open(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let files = read("modules.order")?.lines().map(|l| (canonical(l), PathBuf::from(l))).collect();
        let builtin = read("modules.builtin")?.lines().map(canonical).collect();
        Ok(Self { dir: dir.to_owned(), files, builtin })
    }

    /// The named modules and all that they depend on, in the order in which to load them.
    /// Names that are built into this kernel, or that it does not know, are left out.
    ///
    /// # Errors
    /// When a module cannot be read or decompressed.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut done = BTreeSet::new();
        let mut out = Vec::new();
        for name in names {
            self.add(name, &mut done, &mut out)?;
        }
        Ok(out)
    }

    fn add(&self, name: &str, done: &mut BTreeSet<String>, out: &mut Vec<Module>) -> Result<()> {
        let name = canonical(name);
        if self.builtin.contains(&name) || !done.insert(name.clone()) {
            return Ok(());
        }
        let Some(rel) = self.files.get(&name) else {
            return Ok(());
        };
        let bytes = self.read(rel)?;
        for dep in depends(&bytes) {
            self.add(&dep, done, out)?;
        }
        out.push(Module { name, bytes });
        Ok(())
    }

    fn read(&self, rel: &Path) -> Result<Vec<u8>> {
        let plain = self.dir.join(rel);
        if plain.exists() {
            return fs::read(&plain).with_context(|| format!("cannot read {}", plain.display()));
        }
        let xz = PathBuf::from(format!("{}.xz", plain.display()));
        run::bytes(Command::new("xz").arg("-dc").arg(&xz))
    }
}

/// The `depends=` entry of a module's `.modinfo`.
fn depends(elf: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = elf.windows(key.len()).position(|w| w == key) else {
        return Vec::new();
    };
    let rest = &elf[at + key.len()..];
    let end = rest.iter().position(|&b| b == 0).unwrap_or(0);
    String::from_utf8_lossy(&rest[..end]).split(',').filter(|s| !s.is_empty()).map(str::to_owned).collect()
}

//! The workspace's test binaries and their ignored tests. A test marked `#[ignore]` runs where its
//! name says: `lab_…` inside L1, `soak_…` in `cargo xtask soak`, `soak_lab_…` by it inside L1.

use crate::{paths, run};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

/// A test that plain `cargo test` leaves out.
#[derive(Clone, Debug)]
pub struct Ignored {
    /// Full name, modules included.
    pub name: String,
    /// Package of the binary.
    pub package: String,
    /// The test binary.
    pub exe: PathBuf,
    /// Directory in which cargo would run it.
    pub dir: PathBuf,
}

/// Builds all programs and test binaries and lists the ignored tests whose own name (after the last `::`)
/// starts with `prefix`.
///
/// # Errors
/// When something does not build.
pub fn ignored(prefix: &str) -> Result<Vec<Ignored>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // Tests start programs of packages that they do not depend on.
    run::loud(Command::new(&cargo).args(["build", "--workspace", "--quiet"]).current_dir(paths::root()))?;
    let json = run::bytes(
        Command::new(cargo)
            .args(["test", "--workspace", "--no-run", "--quiet", "--message-format=json-render-diagnostics"])
            .current_dir(paths::root()),
    )?;
    let mut out = Vec::new();
    for line in String::from_utf8_lossy(&json).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
            continue;
        }
        let (Some(exe), Some(manifest)) = (message["executable"].as_str(), message["manifest_path"].as_str())
        else {
            continue;
        };
        let dir = PathBuf::from(manifest).parent().context("manifest in no directory")?.to_owned();
        let package = message["target"]["name"].as_str().unwrap_or("?").to_owned();
        let list = run::quiet(
            Command::new(exe).args(["--list", "--ignored", "--format", "terse"]).current_dir(&dir),
        )?;
        for name in list.lines().filter_map(|l| l.strip_suffix(": test")) {
            if name.rsplit("::").next().unwrap_or(name).starts_with(prefix) {
                out.push(Ignored {
                    name: name.to_owned(),
                    package: package.clone(),
                    exe: exe.into(),
                    dir: dir.clone(),
                });
            }
        }
    }
    Ok(out)
}

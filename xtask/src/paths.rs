//! Where things are: the working tree, cargo's target directory, and the lab's cache below it.

use std::env;
use std::path::{Path, PathBuf};

/// The target triple that `.cargo/config.toml` sets for the whole workspace.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Root of the working tree.
pub fn root() -> PathBuf {
    // The manifest directory of the run if cargo started us, else of the build.
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Cargo's target directory, `CARGO_TARGET_DIR` respected.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// Directory of the debug binaries of the workspace.
pub fn bin_dir() -> PathBuf {
    target().join(TARGET).join("debug")
}

/// The lab's cache: kernels, modules, images. Safe to delete at any time.
pub fn lab() -> PathBuf {
    target().join("lab")
}

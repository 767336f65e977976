//! SIGKILL of xenstored under hv-core and a load that is checked in full; `cargo xtask soak store` runs the full count.

use std::path::{Path, PathBuf};

use store_soak::run::run;

fn bin_dir() -> PathBuf {
    // A long run wants programs that no build replaces meanwhile.
    let built = Path::new(env!("CARGO_BIN_EXE_store-soak-dom0")).parent().expect("a program is in a folder");
    std::env::var_os("BH_BIN_DIR").map_or_else(|| built.to_owned(), PathBuf::from)
}

fn kills(count: usize, seed: u64) {
    let outcome = run(&bin_dir(), count, seed).unwrap_or_else(|e| panic!("{e:#}"));
    println!("{outcome:#?}");
    assert!(outcome.kills >= count && outcome.updates > 0 && outcome.visits > count as u64);
    assert!(outcome.counted > 0 && outcome.events > count as u64 && outcome.replies > 10 * count as u64);
    for error in ["EACCES", "EAGAIN", "EEXIST", "ENOENT", "ENOSPC"] {
        assert!(outcome.errors.contains_key(error), "{error} never was the right answer");
    }
}

#[test]
fn no_client_notices_300_kills() {
    kills(300, 1);
}

#[test]
#[ignore = "cargo xtask soak"]
fn soak_store() {
    kills(if std::env::var_os("BH_SOAK").is_some() { 5000 } else { 300 }, 2);
}

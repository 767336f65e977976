//! Fuzzing of what others write: requests on a connection, a ring's page, a journal, a migration stream. On stable Rust and without a fuzzer installed: inputs
//! of the committed corpus (`tests/corpus/<target>`) and what a seeded mutation makes of them. An input that shows something new
//! (another kind of answer, another way to be refused) joins the corpus of the run.
//!
//! `cargo xtask fuzz` runs the same targets with libFuzzer. `BH_FUZZ_SECONDS` sets how long each target runs (4), `BH_FUZZ_SEED` the seed. An input that fails is written to the temporary
//! directory, and its path is said; copied to the corpus, it is tried first ever after.

#[path = "fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/targets.rs"]
mod targets;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Most inputs kept during a run.
const KEPT: usize = 4096;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// Runs one target. It gives what it saw, as numbers of no further meaning.
fn fuzz(name: &str, target: impl Fn(&[u8]) -> Vec<u64>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    let mut files: Vec<_> =
        std::fs::read_dir(&dir).expect("corpus").map(|e| e.expect("entry").path()).collect();
    files.sort();
    let mut corpus: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).expect("input")).collect();
    assert!(!corpus.is_empty(), "{} is empty", dir.display());
    let mut seen = BTreeSet::new();
    let mut attempt = |input: &[u8]| -> bool {
        let result = catch_unwind(AssertUnwindSafe(|| target(input)));
        let signs = result.unwrap_or_else(|panic| {
            let path = std::env::temp_dir().join(format!("bh-fuzz-{name}"));
            std::fs::write(&path, input).expect("written");
            eprintln!("{name}: the input is in {}", path.display());
            resume_unwind(panic)
        });
        let before = seen.len();
        seen.extend(signs);
        seen.len() > before
    };
    for input in &corpus {
        attempt(input);
    }
    let seed = number("BH_FUZZ_SEED", 1);
    let mut rng = SmallRng::seed_from_u64(seed);
    let until = Instant::now() + Duration::from_secs(number("BH_FUZZ_SECONDS", 4));
    let mut runs = 0u64;
    while Instant::now() < until {
        // New ones first: half of the time one of the last.
        let from = if rng.random_bool(0.5) { corpus.len().saturating_sub(16) } else { 0 };
        let at = rng.random_range(from..corpus.len());
        let input = mutate::mutate(&mut rng, &corpus, at);
        if attempt(&input) && corpus.len() < KEPT {
            corpus.push(input);
        }
        runs += 1;
    }
    let (files, kept) = (files.len(), corpus.len());
    println!(
        "{name}: {runs} inputs (seed {seed}), {} signs; {files} in the corpus, {kept} at the end",
        seen.len()
    );
    assert!(runs > 100 && kept > files, "the fuzzer found nothing new in {runs} inputs");
}

#[test]
fn requests_on_a_connection() {
    fuzz("wire", targets::wire);
}

#[test]
fn a_rings_page() {
    fuzz("ring", targets::ring);
}

#[test]
fn a_migration_stream() {
    fuzz("stream", targets::stream);
}

#[test]
fn a_journal() {
    fuzz("journal", targets::journal);
}

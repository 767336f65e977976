//! The fuzz targets on stable Rust without a fuzzer: the committed corpus, and inputs made at random. `cargo xtask fuzz` runs the same targets
//! with libFuzzer and coverage feedback.

#[path = "fuzz/targets.rs"]
mod targets;

use std::path::Path;

use proptest::prelude::*;

fn corpus(name: &str, target: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    let files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(!files.is_empty(), "{} is empty", dir.display());
    for file in files {
        println!("{}", file.display());
        target(&std::fs::read(&file).unwrap());
    }
}

#[test]
fn the_corpus() {
    corpus("blkif-request", targets::request);
    corpus("blkif-device", targets::device);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_request(input in proptest::collection::vec(any::<u8>(), 0..300)) {
        targets::request(&input);
    }

    /// Steps that mostly make sense.
    #[test]
    fn any_device(flags: u8, steps in proptest::collection::vec(
        (0u8..8, 0u8..8, 0u64..80, 1u8..12, 0u32..5, proptest::collection::vec(any::<u8>(), 0..20)), 0..60)) {
        let mut input = vec![flags];
        for (step, operation, sector, segments, gref, noise) in steps {
            match step {
                0 | 1 => {
                    input.push(0);
                    let mut slot = vec![operation, segments, 0, 0];
                    slot.resize(if flags & 1 == 0 { 8 } else { 4 }, 0);
                    slot.extend((sector << 8).to_le_bytes());
                    slot.extend((sector * 8).to_le_bytes());
                    for n in 0..11 {
                        slot.extend((gref + n % 2).to_le_bytes());
                        slot.extend([0, 7, 0, 0]);
                    }
                    slot.resize(if flags & 1 == 0 { 112 } else { 108 }, 0);
                    input.extend(slot);
                }
                2 => {
                    input.extend([2, gref as u8, 0, 16]);
                    input.extend([2, 0, 0, 0, 0, 7, 0, 0, 3, 0, 0, 0, 0, 7, 0, 0]);
                }
                4 => input.extend([4, sector as u8, if operation == 7 { 5 } else { 0 }]),
                5 => input.extend([5, operation]),
                6 if operation == 7 => input.extend(noise),
                _ => input.push(3),
            }
        }
        targets::device(&input);
    }
}

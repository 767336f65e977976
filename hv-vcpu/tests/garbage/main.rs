//! A guest that makes garbage hypercalls confuses nobody: see `guest` for what it does. Runs in the lab.

mod guest;

use guest::{NUMBERS, OPS, POINTERS, SHAPES};
use std::process::{Command, Stdio};
use xen_abi::errno::{self, EFAULT, EINVAL, ENOSYS, EPERM};

/// Answers of one ring, by number, first argument, pointer and shape.
struct Answers<'a> {
    words: &'a [i32],
    pointers: usize,
}

impl Answers<'_> {
    fn at(&self, nr: usize, op: usize, pointer: usize, shape: usize) -> i32 {
        self.words[((nr * OPS + op) * self.pointers + pointer) * SHAPES + shape]
    }
}

#[test]
#[ignore = "needs KVM with Xen support: runs in the lab"]
fn lab_garbage_hypercalls_confuse_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("garbage.elf");
    std::fs::write(&kernel, guest::elf()).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_hv-vcpu"))
        .args(["--lone", "--memory", "64M", "--kernel"])
        .arg(&kernel)
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&out.stderr);
    let answers = out.stdout.len() / 4;
    assert_eq!(
        out.status.code(),
        Some(0),
        "the guest turns itself off; {answers} answers before; log:\n{log}"
    );
    assert!(!log.contains("panicked"), "{log}");

    let words: Vec<i32> =
        out.stdout.chunks_exact(4).map(|w| i32::from_le_bytes(w.try_into().unwrap())).collect();
    // Ring 3 tries the first pointer only.
    let (calls, each) = (NUMBERS * OPS * SHAPES, NUMBERS * OPS * POINTERS * SHAPES);
    assert_eq!(words.len(), each + calls, "every call was answered in both rings");
    let kernel = Answers { words: &words[..each], pointers: POINTERS };
    let user = Answers { words: &words[each..], pointers: 1 };
    let mut by_answer = std::collections::BTreeMap::new();
    for nr in 0..NUMBERS {
        for op in 0..OPS {
            for pointer in 0..POINTERS {
                for shape in 0..SHAPES {
                    let what = format!("number {nr}, op {op}, pointer {pointer}, shape {shape}");
                    let answer = kernel.at(nr, op, pointer, shape);
                    assert!(answer >= 0 || errno::name(answer).is_some(), "{what}: {answer}");
                    *by_answer.entry(answer.min(0)).or_insert(0) += 1;
                    let skipped = nr == 29 && (op == 2 || op == 3);
                    let wanted = if skipped { 0 } else { -EPERM };
                    if pointer == 0 {
                        assert_eq!(user.at(nr, op, pointer, shape), wanted, "ring 3: {what}");
                    }
                }
            }
        }
    }
    for (answer, count) in by_answer {
        println!("{:>8} {count}", errno::name(answer).unwrap_or("ok"));
    }

    // A few whose answer is known. Pointers: 3 not mapped, 4 not canonical, 5 beyond RAM, 6 names this domain.
    assert_eq!(kernel.at(17, 0, 0, 0), 4 << 16 | 17);
    for pointer in [3, 4, 5] {
        for (nr, op) in [(12, 7), (17, 6), (20, 6), (32, 6), (34, 1)] {
            assert_eq!(kernel.at(nr, op, pointer, 2), -EFAULT, "{nr} {op} {pointer}");
        }
        assert_eq!(kernel.at(24, 10, pointer, 1), -EFAULT);
    }
    assert_eq!(kernel.at(12, 7, 6, 0), -EINVAL, "shared_info at frame 0");
    assert_eq!(kernel.at(12, 7, 0, 0), -EPERM, "another domain's memory");
    assert_eq!(kernel.at(32, 6, 6, 0), 0, "a port of its own");
    assert_eq!(kernel.at(32, 11, 6, 0), -ENOSYS, "FIFO events");
    assert_eq!(kernel.at(43, 0, 0, 0), -ENOSYS);
    assert_eq!(kernel.at(36, 0, 0, 0), -EPERM, "domctl");
}

//! Against QEMU's own tools: what they make is read here, what is written here they find whole and alike.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::header::NewImage;
use super::*;
use crate::disk::layer::FileLayer;
use nix::fcntl::{Flock, FlockArg};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

pub(super) fn file_layer(path: &Path) -> Arc<dyn Layer> {
    let file =
        std::fs::File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    Arc::new(FileLayer::new(Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap(), len, false))
}

pub(super) fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{program} {args:?}: {text}");
    text
}

fn img(args: &[&str]) -> String {
    run("qemu-img", args)
}

/// qemu-img check: not even a leak.
fn whole(path: &Path) {
    let text = img(&["check", "-f", "qcow2", text(path)]);
    assert!(text.contains("No errors were found"), "{text}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Dir {
        Dir(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn open(path: &Path) -> Image {
    Image::open(file_layer(path), Options::default()).unwrap()
}

fn with_backing(path: &Path, backing: Arc<dyn Layer>, name: &Path) -> Image {
    let backing = Some((backing, text(name).to_owned()));
    Image::open(file_layer(path), Options { backing, ..Options::default() }).unwrap()
}

/// Random operations on the image and on a flat copy.
fn exercise(image: &Image, flat: &mut [u8], rng: &mut SmallRng, operations: u32) {
    let size = flat.len() as u64;
    for _ in 0..operations {
        let sectors = size / 512;
        let at = rng.random_range(0..sectors) * 512;
        let most = ((size - at) / 512).min(if rng.random_range(0..8) == 0 { 600 } else { 24 });
        let len = rng.random_range(1..=most) * 512;
        let range = at as usize..(at + len) as usize;
        match rng.random_range(0..10) {
            0..5 => {
                let mut data = vec![0; len as usize];
                rng.fill(&mut data[..]);
                image.write(at, &data).unwrap();
                flat[range].copy_from_slice(&data);
            }
            5 => {
                image.write_zeroes(at, len).unwrap();
                flat[range].fill(0);
            }
            6 => {
                image.discard(at, len).unwrap();
                // Old bytes or zeroes, each the one or the other.
                let mut now = vec![0; len as usize];
                image.read(at, &mut now).unwrap();
                for (old, now) in flat[range].iter_mut().zip(now) {
                    assert!(now == *old || now == 0);
                    *old = now;
                }
            }
            7 => image.flush().unwrap(),
            _ => {
                let mut data = vec![1; len as usize];
                image.read(at, &mut data).unwrap();
                assert!(data == flat[range], "read at {at}, {len} bytes");
            }
        }
    }
    let mut all = vec![1; flat.len()];
    image.read(0, &mut all).unwrap();
    assert!(all == flat);
}

#[test]
fn what_is_written_here_qemu_reads() {
    let dir = Dir::new();
    for (n, options) in [
        "cluster_size=64k,compat=1.1",
        "cluster_size=512,compat=1.1",
        "cluster_size=4k,compat=0.10",
        "cluster_size=4k,compat=1.1,refcount_bits=1",
        "cluster_size=4k,compat=1.1,refcount_bits=64,lazy_refcounts=on",
        "cluster_size=2M,compat=1.1,preallocation=metadata",
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.at(&format!("{n}.qcow2"));
        // 512-byte clusters: the refcount table must grow.
        img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), "9M"]);
        let mut flat = vec![0; 9 << 20];
        let mut rng = SmallRng::seed_from_u64(n as u64);
        {
            let image = open(&path);
            exercise(&image, &mut flat, &mut rng, 300);
            image.settle().unwrap();
        }
        whole(&path);
        let raw = dir.at("flat");
        std::fs::write(&raw, &flat).unwrap();
        img(&["compare", "-f", "qcow2", "-F", "raw", text(&path), text(&raw)]);
        // And again after QEMU wrote.
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 1M 300k", "-c", "discard 3M 1M", text(&path)]);
        let image = open(&path);
        let mut data = vec![0; 300 << 10];
        image.read(1 << 20, &mut data).unwrap();
        assert!(data.iter().all(|byte| *byte == 0x5a), "{options}");
    }
}

#[test]
fn backing_files_are_the_approved_ones() {
    let dir = Dir::new();
    let (base, middle, top) = (dir.at("base.raw"), dir.at("middle.qcow2"), dir.at("top.qcow2"));
    let mut rng = SmallRng::seed_from_u64(7);
    // Shorter than what stands on it, and no whole number of clusters.
    let mut flat = vec![0; 3 << 20];
    let base_len = (1 << 20) + 1536;
    rng.fill(&mut flat[..base_len]);
    std::fs::write(&base, &flat[..base_len]).unwrap();
    img(&["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&middle), "3M"]);
    // A relative name.
    img(&["create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", text(&top), "3M"]);
    {
        let image = with_backing(&middle, file_layer(&base), &base);
        exercise(&image, &mut flat, &mut rng, 60);
        image.settle().unwrap();
    }
    {
        let below = Arc::new(with_backing(&middle, file_layer(&base), &base));
        let image = with_backing(&top, below, &middle);
        exercise(&image, &mut flat, &mut rng, 200);
        image.settle().unwrap();
    }
    whole(&top);
    let raw = dir.at("flat");
    std::fs::write(&raw, &flat).unwrap();
    img(&["compare", "-f", "qcow2", "-F", "raw", text(&top), text(&raw)]);

    let refused = |backing: Option<(Arc<dyn Layer>, String)>| {
        let error = Image::open(file_layer(&top), Options { backing, ..Options::default() }).unwrap_err();
        assert!(!error.to_string().contains('\n'));
        error.to_string()
    };
    assert!(refused(None).contains("name it as backing"));
    assert!(refused(Some((file_layer(&base), text(&base).into()))).contains("approved is"));
    let error = Image::open(
        file_layer(&raw),
        Options { backing: Some((file_layer(&base), text(&base).into())), ..Options::default() },
    );
    assert!(error.unwrap_err().to_string().contains("no qcow2 image"));
    let alone = dir.at("alone.qcow2");
    img(&["create", "-q", "-f", "qcow2", text(&alone), "1M"]);
    let backing = Some((file_layer(&base), text(&base).to_owned()));
    let error = Image::open(file_layer(&alone), Options { backing, ..Options::default() }).unwrap_err();
    assert!(error.to_string().contains("leave backing out"));
}

#[test]
fn names_of_backing_files() {
    assert!(names_same("/a/b", "/a/b") && names_same("b", "/a/b") && names_same("../x/b", "/a/b"));
    assert!(names_same("file:/a/b", "/a/b"));
    for wrong in ["", "/x/b", "c", "json:{}", "nbd:unix:/b2", "b/"] {
        assert!(!names_same(wrong, "/a/b"), "{wrong}");
    }
}

#[test]
fn snapshots_stay_as_they_are() {
    let dir = Dir::new();
    for compat in ["0.10", "1.1"] {
        let path = dir.at(&format!("s{compat}.qcow2"));
        img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &format!("compat={compat},cluster_size=4k"),
            text(&path),
            "2M",
        ]);
        let mut flat = vec![0; 2 << 20];
        let mut rng = SmallRng::seed_from_u64(1);
        let mut keep = Vec::new();
        for round in 0..3 {
            {
                let image = open(&path);
                exercise(&image, &mut flat, &mut rng, 80);
                image.settle().unwrap();
                assert_eq!(image.snapshots(), round);
            }
            whole(&path);
            img(&["snapshot", "-c", &format!("s{round}"), text(&path)]);
            keep.push(flat.clone());
        }
        {
            let image = open(&path);
            exercise(&image, &mut flat, &mut rng, 200);
            image.settle().unwrap();
        }
        whole(&path);
        for (round, flat) in keep.iter().enumerate() {
            img(&["snapshot", "-a", &format!("s{round}"), text(&path)]);
            let raw = dir.at("flat");
            std::fs::write(&raw, flat).unwrap();
            img(&["compare", "-f", "qcow2", "-F", "raw", text(&path), text(&raw)]);
        }
        img(&["snapshot", "-d", "s1", text(&path)]);
        whole(&path);
    }
}

#[test]
fn compressed_clusters() {
    let dir = Dir::new();
    for how in ["zlib", "zstd"] {
        let (raw, path) = (dir.at("raw"), dir.at(how));
        let mut flat: Vec<u8> = (0..4u32 << 18).flat_map(|word| (word / 37).to_le_bytes()).collect();
        std::fs::write(&raw, &flat).unwrap();
        let option = format!("compression_type={how}");
        img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option, text(&raw), text(&path)]);
        {
            let image = open(&path);
            exercise(&image, &mut flat, &mut SmallRng::seed_from_u64(3), 100);
            image.settle().unwrap();
        }
        whole(&path);
        std::fs::write(&raw, &flat).unwrap();
        img(&["compare", "-f", "qcow2", "-F", "raw", text(&path), text(&raw)]);
    }
}

#[test]
fn growing() {
    let dir = Dir::new();
    let path = dir.at("g.qcow2");
    img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", text(&path), "1M"]);
    let image = open(&path);
    let mut flat = vec![0; 1 << 20];
    let mut rng = SmallRng::seed_from_u64(5);
    exercise(&image, &mut flat, &mut rng, 50);
    for size in [(1 << 20) + 512, 9 << 20, 3 << 30] {
        image.grow(size).unwrap();
        image.write(size - 512, &[7; 512]).unwrap();
        assert_eq!(image.len(), size);
    }
    assert_eq!(image.grow(1 << 20).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
    let mut now = vec![0; 1 << 20];
    image.read(0, &mut now).unwrap();
    assert!(now == flat);
    image.settle().unwrap();
    drop(image);
    whole(&path);
    assert!(img(&["info", text(&path)]).contains("3 GiB"));
}

#[test]
fn new_images_are_valid() {
    let dir = Dir::new();
    let (path, base) = (dir.at("n.qcow2"), dir.at("base"));
    std::fs::write(&base, vec![9; 1 << 20]).unwrap();
    for bits in [12, 16, 21] {
        let _gone = std::fs::remove_file(&path);
        let new = NewImage { size: 1 << 30, cluster_bits: bits, backing: Some((text(&base), "raw")) };
        header::create(&*file_layer(&path), &new).unwrap();
        whole(&path);
        let image = with_backing(&path, file_layer(&base), &base);
        image.write(4096, &[1; 4096]).unwrap();
        image.settle().unwrap();
        drop(image);
        whole(&path);
        run(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                "read -P 9 0 4k",
                "-c",
                "read -P 1 4k 4k",
                "-c",
                "read -P 0 1M 1M",
                text(&path),
            ],
        );
    }
}

#[test]
fn what_is_not_done_is_refused() {
    let dir = Dir::new();
    let make = |options: &str| {
        let path = dir.at("x.qcow2");
        img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), "1M"]);
        Image::open(file_layer(&path), Options::default()).unwrap_err().to_string()
    };
    assert!(make("extended_l2=on,cluster_size=128k").contains("extended_l2=off"));
    let data = format!("data_file={}", text(&dir.at("data")));
    assert!(make(&data).contains("another file"));
}

#[test]
fn images_left_dirty_are_repaired() {
    let dir = Dir::new();
    let path = dir.at("d.qcow2");
    img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", text(&path), "1M"]);
    // qemu-io ends without closing the image.
    let status = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 3 0 256k", "-c", "flush", "-c", "sigraise 9", text(&path)])
        .output()
        .unwrap();
    assert!(!status.status.success());
    let image = open(&path);
    image.write(0, &[4; 4096]).unwrap();
    image.settle().unwrap();
    drop(image);
    whole(&path);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 4 0 4k", "-c", "read -P 3 4k 252k", text(&path)]);
}

#[test]
fn damaged_images_give_errors_and_no_panic() {
    let dir = Dir::new();
    let path = dir.at("c.qcow2");
    img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", text(&path), "1M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 0 64k", text(&path)]);
    img(&["snapshot", "-c", "s", text(&path)]);
    let good = std::fs::read(&path).unwrap();
    let mut rng = SmallRng::seed_from_u64(11);
    let mut refused = 0;
    for _ in 0..300 {
        let mut bad = good.clone();
        for _ in 0..rng.random_range(1..4) {
            // Tables and header; data says nothing.
            let most = if rng.random() { 112 } else { bad.len().min(40960) };
            let at = rng.random_range(0..most);
            bad[at] = rng.random();
        }
        std::fs::write(&path, &bad).unwrap();
        match Image::open(file_layer(&path), Options::default()) {
            Err(_) => refused += 1,
            Ok(image) => {
                let mut data = vec![0; 64 << 10];
                let _damaged = image.read(0, &mut data);
                for at in [0, 4096, 65536, 500 << 10] {
                    let _damaged = image.write(at, &[1; 512]);
                }
                let _damaged = image.discard(0, 32 << 10);
                let _damaged = image.settle();
            }
        }
    }
    assert!(refused > 30, "{refused}");
}

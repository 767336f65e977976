//! Against volumes that cryptsetup and QEMU make.

use std::path::Path;
use std::process::Command;

use super::*;
use crate::disk::layer::FileLayer;
use nix::fcntl::{Flock, FlockArg};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn layer(path: &Path) -> Arc<dyn Layer> {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    Arc::new(FileLayer::new(Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap(), len, false))
}

/// How often QEMU may fail to time its key derivation, which it does on busy machines.
const TIMING_RETRIES: usize = 20;

fn run(program: &str, args: &[&str]) {
    let once = || Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let mut out = once();
    for _ in 0..TIMING_RETRIES {
        if !String::from_utf8_lossy(&out.stderr).contains("Unable to get accurate CPU usage") {
            break;
        }
        out = once();
    }
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn open(path: &Path, key: &[u8]) -> Result<LuksLayer> {
    let below = layer(path);
    let volume = Volume::read(&*below)?;
    let key = volume.unlock(&*below, key)?;
    LuksLayer::new(below, volume.segment, &key)
}

struct Files {
    dir: tempfile::TempDir,
    plain: Vec<u8>,
}

impl Files {
    fn new(len: usize) -> Files {
        let dir = tempfile::tempdir().unwrap();
        let mut plain = vec![0; len];
        SmallRng::seed_from_u64(1).fill(&mut plain[..]);
        std::fs::write(dir.path().join("plain"), &plain).unwrap();
        std::fs::write(dir.path().join("key"), "secret\n").unwrap();
        Files { dir, plain }
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }
}

/// cryptsetup encrypts what is there: with its own cryptography, without the device mapper.
fn encrypted(files: &Files, name: &str, options: &[&str]) -> std::path::PathBuf {
    let path = files.dir.path().join(name);
    std::fs::write(&path, &files.plain).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(files.plain.len() as u64 + (16 << 20))
        .unwrap();
    let key = files.at("key");
    let text = path.to_str().unwrap();
    let mut args =
        vec!["reencrypt", "--encrypt", "--batch-mode", "--type", "luks2", "--reduce-device-size", "16M"];
    args.extend(["--key-file", &key]);
    args.extend(options);
    args.push(text);
    run("cryptsetup", &args);
    path
}

#[test]
fn what_cryptsetup_encrypts_is_read() {
    let files = Files::new(3 << 20);
    let argon = [
        "--pbkdf",
        "argon2id",
        "--pbkdf-memory",
        "4096",
        "--pbkdf-parallel",
        "2",
        "--pbkdf-force-iterations",
        "4",
    ];
    let pbkdf = [
        "--pbkdf",
        "pbkdf2",
        "--pbkdf-force-iterations",
        "1000",
        "--hash",
        "sha512",
        "--sector-size",
        "4096",
    ];
    for (name, options) in [("argon", &argon[..]), ("pbkdf", &pbkdf[..])] {
        let path = encrypted(&files, name, options);
        let volume = open(&path, b"secret\n").unwrap();
        let mut now = vec![0; files.plain.len()];
        volume.read(0, &mut now).unwrap();
        assert!(now == files.plain, "{name}");
        // Not on a boundary of encrypted sectors.
        let mut piece = vec![0; 1536];
        volume.read(512 * 9, &mut piece).unwrap();
        assert!(piece == files.plain[512 * 9..][..1536]);
        volume.write(512 * 11, &[7; 1024]).unwrap();
        volume.read(512 * 9, &mut piece).unwrap();
        assert!(piece[..1024] == files.plain[512 * 9..][..1024] && piece[1024..] == [7; 512]);
        drop(volume);
        let error = open(&path, b"secret").unwrap_err().to_string();
        assert!(error.contains("opens none"), "{error}");
    }
}

#[test]
fn a_torn_first_header_is_replaced_by_the_second() {
    let files = Files::new(1 << 20);
    let path = encrypted(&files, "t", &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let volume = open(&path, b"secret\n").unwrap();
    let mut now = vec![0; files.plain.len()];
    volume.read(0, &mut now).unwrap();
    assert!(now == files.plain);
    drop(volume);
    bytes[16384 + 5000] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(open(&path, b"secret\n").unwrap_err().to_string().contains("both"));
}

/// QEMU reads what was written here (LUKS1: it knows no other).
#[test]
fn what_is_written_here_qemu_reads() {
    let files = Files::new(2 << 20);
    let (path, plain) = (files.at("l1"), files.at("plain"));
    let secret = format!("secret,id=k,file={}", files.at("key"));
    run(
        "qemu-img",
        &[
            "convert",
            "--object",
            &secret,
            "-f",
            "raw",
            "-O",
            "luks",
            "-o",
            "key-secret=k,iter-time=10",
            &plain,
            &path,
        ],
    );
    let volume = open(Path::new(&path), b"secret\n").unwrap();
    assert_eq!(volume.len(), 2 << 20);
    let mut flat = files.plain.clone();
    let mut rng = SmallRng::seed_from_u64(2);
    for _ in 0..100 {
        let at = rng.random_range(0..flat.len() / 512 - 20) * 512;
        let len = rng.random_range(1..20) * 512;
        let mut piece = vec![0; len];
        volume.read(at as u64, &mut piece).unwrap();
        assert!(piece == flat[at..at + len]);
        rng.fill(&mut piece[..]);
        volume.write(at as u64, &piece).unwrap();
        flat[at..at + len].copy_from_slice(&piece);
    }
    volume.grow(3 << 20).unwrap();
    flat.resize(3 << 20, 0);
    drop(volume);
    std::fs::write(&plain, &flat).unwrap();
    let image = format!("driver=luks,key-secret=k,file.filename={path}");
    let raw = format!("driver=raw,file.filename={plain}");
    run("qemu-img", &["compare", "--object", &secret, "--image-opts", &image, &raw]);
}

/// An image inside a volume: no part of it may be a hole.
#[test]
fn qcow2_inside() {
    use crate::disk::qcow2::header::{NewImage, create};
    use crate::disk::qcow2::{Image, Options};
    let files = Files::new(1 << 20);
    let path = files.at("l1");
    let secret = format!("secret,id=k,file={}", files.at("key"));
    run(
        "qemu-img",
        &["create", "-q", "--object", &secret, "-f", "luks", "-o", "key-secret=k,iter-time=10", &path, "0"],
    );
    let volume: Arc<dyn Layer> = Arc::new(open(Path::new(&path), b"secret\n").unwrap());
    create(&*volume, &NewImage { size: 8 << 20, cluster_bits: 16, backing: None }).unwrap();
    {
        let image = Image::open(volume, Options::default()).unwrap();
        image.write(5 << 20, &[3; 4096]).unwrap();
        image.write((1 << 20) + 512, &[4; 512]).unwrap();
        image.settle().unwrap();
    }
    let opts = format!("driver=qcow2,file.driver=luks,file.key-secret=k,file.file.filename={path}");
    run("qemu-img", &["check", "--object", &secret, "--image-opts", &opts]);
    let volume: Arc<dyn Layer> = Arc::new(open(Path::new(&path), b"secret\n").unwrap());
    let image = Image::open(volume, Options::default()).unwrap();
    let mut now = vec![1; 64 << 10];
    image.read(1 << 20, &mut now).unwrap();
    assert!(now[..512] == [0; 512] && now[512..1024] == [4; 512] && now[1024..].iter().all(|b| *b == 0));
}

#[test]
fn damaged_headers_give_errors_and_no_panic() {
    let files = Files::new(1 << 20);
    let path = encrypted(&files, "d", &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]);
    let good = std::fs::read(&path).unwrap();
    let mut rng = SmallRng::seed_from_u64(3);
    for _ in 0..200 {
        let mut bad = good[..64 << 10].to_vec();
        let at = rng.random_range(0..300);
        bad[at] = rng.random();
        if rng.random() {
            bad[6..8].copy_from_slice(&[0, 1]);
        }
        std::fs::write(&path, &bad).unwrap();
        if let Ok(volume) = open(&path, b"secret\n") {
            let mut bytes = vec![0; 4096];
            let _damaged = volume.read(0, &mut bytes);
        }
    }
}

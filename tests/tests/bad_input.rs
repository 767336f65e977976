//! Wrong files, missing parts and full disks: one line that says what and what to do, and the rest keeps running.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_tests::system::System;
use common::*;
use frontends::blkfront::{BlkFront, Op, Outcome};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Creates what must fail; gives the one line.
fn refused(system: &System, what: &str, file: &str) -> String {
    let path = system.dir().join("bad.toml");
    fs::write(&path, file).unwrap();
    let out = system.bh(&["create", path.to_str().unwrap()]).unwrap();
    let error = String::from_utf8_lossy(&out.stderr).trim_end().to_owned();
    assert!(!out.status.success(), "{what}: created\n{}", system.log_tail(25));
    assert_eq!(error.lines().count(), 1, "{what}: more than one line:\n{error}");
    assert!(error.starts_with("bh: "), "{what}: {error}");
    println!("{what}: {error}");
    error
}

fn says(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "{word:?} is not in: {line}");
    }
}

fn disk(path: &Path) -> String {
    format!("[[disk]]\nvdev = \"xvda\"\npath = \"{}\"\n", path.display())
}

fn vif(mac: &str) -> String {
    format!("[[vif]]\nbackend = \"{}\"\nmac = \"{mac}\"\n", netback())
}

fn with_good_guest() -> System {
    let system = start();
    let disk = image(&system, "good.img", 4 << 20);
    create(&system, &loaded_guest_file("good", &disk));
    system
}

/// After a refusal nothing of it is left, and the others work.
fn nothing_left(system: &System) {
    assert!(guest(system, "bad").is_none_or(|g| g["domid"] == 0), "{:?}", guest(system, "bad"));
    if guest(system, "bad").is_some() {
        // One that failed stays listed with its reason until it is removed.
        system.bh_ok(&["destroy", "bad"]).unwrap();
    }
    until(system, "nothing of the refused guest is left", || {
        system.services().is_ok_and(|s| !s.keys().any(|n| n.contains("bad")))
    });
}

#[test]
fn wrong_domain_files() {
    let system = with_good_guest();
    let small = image(&system, "small.img", 511);
    let fine = image(&system, "fine.img", 1 << 20);
    let missing = system.dir().join("missing.img");
    let base = probe_file("bad", None);

    let line = refused(&system, "unknown key", &format!("{base}memroy = 5\n"));
    says(&line, &["bad.toml:5", "unknown", "memroy"]);
    let line = refused(&system, "not TOML", "name = ");
    says(&line, &["bad.toml:1"]);
    let line = refused(&system, "no name", "type = \"process\"\n");
    says(&line, &["missing field `name`; add it"]);
    let line = refused(&system, "missing disk", &format!("{base}{}", disk(&missing)));
    says(&line, &["bad", "disk xvda: /", "missing.img", "check the path"]);
    nothing_left(&system);
    let line = refused(&system, "disk smaller than a sector", &format!("{base}{}", disk(&small)));
    says(&line, &["bad", "xvda", "511", "512", "use a larger one"]);
    nothing_left(&system);
    let line = refused(&system, "a directory as disk", &format!("{base}{}", disk(system.dir())));
    says(&line, &["bad", "xvda"]);
    nothing_left(&system);
    let line = refused(&system, "missing program", &base.replace("/probe\"", "/no-such-program\""));
    says(&line, &["bad", "no-such-program", "check the path"]);
    nothing_left(&system);
    let text_program = system.dir().join("text");
    fs::write(&text_program, "not a program\n").unwrap();
    let real = program("probe").display().to_string();
    let wrong = base.replace(&real, text_program.to_str().unwrap());
    let line = refused(&system, "a program that may not be executed", &wrong);
    says(&line, &["bad", "chmod a+x"]);
    fs::set_permissions(&text_program, fs::Permissions::from_mode(0o755)).unwrap();
    let line = refused(&system, "wrong program", &wrong);
    says(&line, &["bad", "text", "no program for x86-64 Linux"]);
    let line = refused(&system, "a program with shared libraries", &base.replace(&real, "/bin/true"));
    says(&line, &["bad", "/bin/true", "link it statically"]);
    nothing_left(&system);
    let line = refused(
        &system,
        "unknown netback",
        &format!("{base}[[vif]]\nbackend = \"nowhere\"\nmac = \"00:16:3e:00:00:01\"\n"),
    );
    says(&line, &["nowhere", "host file"]);

    // What another has.
    create(&system, &format!("{}{}", probe_file("first", None), vif("00:16:3e:00:00:01")));
    let line = refused(&system, "MAC twice", &format!("{base}{}", vif("00:16:3E:00:00:01")));
    says(&line, &["mac", "00:16:3e:00:00:01", "first"]);
    let line = refused(&system, "name twice", &probe_file("first", None));
    says(&line, &["first", "exists"]);
    let line =
        refused(&system, "the disk of another", &format!("{base}{}", disk(&system.dir().join("good.img"))));
    says(&line, &["xvda", "in use by guest good", "use another disk"]);
    let link = system.dir().join("link.img");
    fs::hard_link(system.dir().join("good.img"), &link).unwrap();
    let line = refused(&system, "the disk of another by another name", &format!("{base}{}", disk(&link)));
    says(&line, &["xvda", "in use"]);
    nothing_left(&system);
    let held =
        Flock::lock(File::options().read(true).write(true).open(&fine).unwrap(), FlockArg::LockExclusive);
    let line = refused(&system, "a disk that a program of the host holds", &format!("{base}{}", disk(&fine)));
    says(&line, &["xvda", "in use"]);
    nothing_left(&system);
    drop(held);

    // Freed, it is taken.
    create(&system, &format!("{base}{}", disk(&fine)));
    for name in ["no-such", "77", ""] {
        let out = system.bh(&["destroy", name]).unwrap();
        assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).lines().count() == 1);
    }
    still_works(&system, "good");
}

/// This machine, or a kernel file that is none.
#[test]
fn pvh_guests_that_cannot_run() {
    let system = with_good_guest();
    let pvh = |kernel: &Path| {
        format!(
            "name = \"bad\"\ntype = \"pvh\"\nkernel = \"{}\"\nmemory = 64\non_crash = \"preserve\"\n",
            kernel.display()
        )
    };
    let text = system.dir().join("text");
    fs::write(&text, "not a kernel\n".repeat(1000)).unwrap();
    let empty = image(&system, "empty", 0);

    let line = refused(&system, "missing kernel", &pvh(&system.dir().join("vmlinuz")));
    says(&line, &["bad", "kernel", "vmlinuz", "check the path"]);
    nothing_left(&system);
    for (what, kernel) in [("wrong kernel", &text), ("empty kernel", &empty)] {
        let line = refused(&system, what, &pvh(kernel));
        says(&line, &["bad", "hv-vcpu"]);
        nothing_left(&system);
    }
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap();
    if !cpu.contains(" svm") && !cpu.contains(" vmx") {
        // A kernel that would be right: an ELF file.
        let line = refused(&system, "no virtualization", &pvh(&program("bh")));
        says(&line, &["bad", "virtualization"]);
        let events = system.bh_ok(&["events"]).unwrap();
        assert!(events.lines().any(|l| l.contains("virtualization")), "{events}");
        nothing_left(&system);
    }
    if !Path::new("/dev/udmabuf").exists() {
        let disk = disk(&image(&system, "pvh.img", 1 << 20));
        let line = refused(&system, "no udmabuf", &format!("{}{disk}", pvh(&program("bh"))));
        says(&line, &["bad", "udmabuf"]);
        nothing_left(&system);
        assert!(system.bh_ok(&["info"]).unwrap().contains("udmabuf"));
    }
    still_works(&system, "good");
}

/// A file system of the test's, unmounted at the end.
struct SmallFs(PathBuf);

impl SmallFs {
    fn new(dir: &Path, size: &str) -> SmallFs {
        fs::create_dir(dir).unwrap();
        let options = format!("size={size}");
        mount(Some("bulkhead-test"), dir, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).unwrap();
        SmallFs(dir.into())
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        if let Err(e) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("umount {}: {e}", self.0.display());
        }
    }
}

#[test]
fn a_full_disk_under_the_image() {
    let system = with_good_guest();
    let small = SmallFs::new(&system.dir().join("small"), "1m");
    let path = small.0.join("sparse.img");
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    create(&system, &probe_file("bad", Some(&path)));
    let brain = Brain::of(&system, "bad");
    let disk = brain.disk(&system);
    let block = [7; 64 << 10];
    let mut failed = None;
    for i in 0..64u64 {
        if let Err(e) = disk.write(i * block.len() as u64, &block) {
            failed = Some((i, e));
            break;
        }
    }
    let (at, error) = failed.expect("1 MiB does not hold 4 MiB");
    assert!(at >= 8, "what fits is written; {error} at {at}");
    // The guest sees an I/O error and goes on: what was written is there, and the backend lives.
    let mut back = vec![0; block.len()];
    disk.read(0, &mut back).unwrap();
    assert!(back == block);
    let backend = &system.services().unwrap()[&blkback_of("bad")];
    assert_eq!((backend.generation, backend.state.as_str()), (1, "running"), "no crash over it");
    let log = fs::read_to_string(system.dir().join(format!("run/log/{}.log", blkback_of("bad")))).unwrap();
    let lines: Vec<&str> = log.lines().filter(|l| l.contains("is full")).collect();
    assert!(!lines.is_empty() && lines.len() <= 5, "it is said, and not for each request:\n{log}");
    // Room again: writes work again.
    let filler = File::options().write(true).open(&path).unwrap();
    filler.write_at(&[0], 0).unwrap();
    let options = MsFlags::MS_REMOUNT;
    mount(None::<&str>, &small.0, None::<&str>, options, Some("size=80m")).unwrap();
    disk.write(at * block.len() as u64, &block).unwrap();
    drop(disk);
    still_works(&system, "good");
    system.bh_ok(&["destroy", "bad"]).unwrap();
}

/// With `no_space = "stop"` nothing fails: the guest's write waits, also across a kill, `bh` says why, and it goes on once there is room.
#[test]
fn a_full_disk_that_has_its_guest_wait() {
    let system = start();
    let small = SmallFs::new(&system.dir().join("small"), "1m");
    let path = small.0.join("sparse.img");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let table = format!("disk = [{{vdev = \"xvda\", path = \"{}\", no_space = \"stop\"}}]\n", path.display());
    create(&system, &(probe_file("waits", None) + &table));
    let brain = Brain::of(&system, "waits");
    let mut front = BlkFront::connect(&brain.domain.hv, &brain.xs, brain.domain.domid(), XVDA, SOON).unwrap();
    let answer = |front: &mut BlkFront, patience: Duration| {
        let mut outcome = None;
        front.wait(patience, |c| outcome = Some(c.outcome)).unwrap();
        outcome
    };
    let block = [7; 32 << 10];
    let fits = (0..256u64).find(|at| {
        front.submit(Op::Write { sector: at * 64, data: &block }, *at).unwrap();
        front.push();
        let outcome = answer(&mut front, Duration::from_secs(2));
        assert!(outcome.is_none_or(|outcome| outcome == Outcome::Done), "{outcome:?}");
        outcome.is_none()
    });
    assert!(fits.is_some_and(|n| (16..48).contains(&n)), "{fits:?} blocks of 32 KiB in 1 MiB");
    let told = || system.bh_ok(&["block-list", "waits"]).unwrap().contains("is full");
    until(&system, "bh says why", told);
    let before = system.kill(&[blkback_of("waits")]).unwrap();
    system.wait_restarted(&before, SOON).unwrap();
    assert_eq!(answer(&mut front, Duration::from_secs(1)), None);
    mount(None::<&str>, &small.0, None::<&str>, MsFlags::MS_REMOUNT, Some("size=16m")).unwrap();
    assert_eq!(answer(&mut front, SOON), Some(Outcome::Done));
    until(&system, "and no longer", || !told());
    drop(front);
    system.bh_ok(&["destroy", "waits"]).unwrap();
}

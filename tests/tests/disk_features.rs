//! What a disk can be and do, in the whole system: cdrom drives and their media, sectors of 4096 bytes, secure discards, limits,
//! the nodes that toolstacks look at, images and servers of the host file, overlays, commits under kills, and a driver domain that tries
//! to reach what is not its own.

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use bulkhead_tests::probe::Probe;
use bulkhead_tests::system::{Config, System};
use common::*;
use domain_kit::Hypercall;
use domain_kit::xs::XsOps;
use frontends::blkfront::load::{Load, Rng};
use frontends::blkfront::{self, BlkDisk, BlkFront, Op, Options, Outcome};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SIZE: u64 = 8 << 20;

/// A guest named `g` whose xvda is this table's, without its braces.
fn guest_with(system: &System, disk: &str) -> Brain {
    create(system, &format!("{}disk = [{{vdev = \"xvda\", {disk}}}]\n", probe_file("g", None)));
    Brain::of(system, "g")
}

fn connect(system: &System, brain: &Brain) -> BlkFront {
    let options = Options::default();
    BlkFront::connect_with(&brain.domain.hv, &brain.xs, brain.domain.domid(), XVDA, SOON, &options)
        .unwrap_or_else(|e| panic!("{e}\n{}", system.log_tail(25)))
        .remove(0)
}

/// One request, and how it ended.
fn ask(front: &mut BlkFront, op: Op<'_>) -> (Outcome, Vec<u8>) {
    front.submit(op, 1).unwrap();
    front.push();
    let mut ended = None;
    front
        .wait(SOON, |completion| {
            let mut bytes = vec![0; completion.read_len()];
            completion.copy_read(&mut bytes);
            ended = Some((completion.outcome, bytes));
        })
        .unwrap();
    ended.expect("no answer")
}

fn backend_node(brain: &Brain, name: &str) -> String {
    let domid = brain.domain.domid();
    let back = brain.xs.read_string(&format!("/local/domain/{domid}/device/vbd/{XVDA}/backend")).unwrap();
    brain.xs.read_string(&format!("{back}/{name}")).unwrap_or_default()
}

fn kill_backend(system: &System, name: &str) {
    let before = system.kill(&[name.to_owned()]).unwrap();
    system.wait_restarted(&before, SOON).unwrap();
}

#[test]
fn a_cdrom_drive_is_filled_and_emptied_under_its_guest() {
    let system = start();
    let medium = |name: &str, byte: u8, bytes: usize| {
        let path = system.dir().join(name);
        std::fs::write(&path, vec![byte; bytes]).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (one, two) = (medium("one.iso", 1, 1 << 20), medium("two.iso", 2, 1 << 20));
    let brain = guest_with(&system, "devtype = \"cdrom\"");
    let mut front = connect(&system, &brain);
    let info = front.info();
    assert!(info.cdrom && info.removable && info.read_only && info.sectors == 0, "{info:?}");
    assert_eq!(
        (backend_node(&brain, "device-type"), backend_node(&brain, "params")),
        ("cdrom".into(), "".into())
    );
    let read = |front: &mut BlkFront| ask(front, Op::Read { sector: 0, len: 4096 });
    let sees = |what: &str, sectors: &str| {
        until(&system, what, || {
            backend_node(&brain, "sectors") == sectors && backend_node(&brain, "state") == "4"
        });
    };
    assert_eq!(read(&mut front).0, Outcome::Error, "no medium");
    assert!(refused(&system, &["block-insert", "g", "xvda", "/nonexistent"]).contains("nonexistent"));
    bh(&system, &["block-insert", "g", "xvda", &one]);
    sees("the medium", "2048");
    assert_eq!(backend_node(&brain, "params"), "disk");
    assert_eq!(read(&mut front), (Outcome::Done, vec![1; 4096]));
    assert_eq!(ask(&mut front, Op::Write { sector: 0, data: &[9; 512] }).0, Outcome::Error, "read-only");
    kill_backend(&system, &blkback_of("g"));
    assert_eq!(read(&mut front), (Outcome::Done, vec![1; 4096]));
    // As xl's names; in place of the other.
    bh(&system, &["cd-insert", "g", "xvda", &two]);
    sees("the other medium", "2048");
    assert_eq!(read(&mut front), (Outcome::Done, vec![2; 4096]));
    bh(&system, &["cd-eject", "g", "xvda"]);
    sees("no medium", "0");
    assert_eq!(read(&mut front).0, Outcome::Error);
    assert!(bh(&system, &["block-list", "g"]).contains("xvda"));
    drop(front);
    // A disk's medium stays where it is.
    create(&system, &probe_file("h", Some(Path::new(&one))));
    assert!(refused(&system, &["block-eject", "h", "xvda"]).contains("devtype"));
}

#[test]
fn sectors_of_4096_bytes_and_secure_discards() {
    let system = start();
    let image = image(&system, "disk", SIZE);
    let brain = guest_with(&system, &format!("path = \"{}\", sector_size = 4096", image.display()));
    // Deprecated, and said by some frontends: it must change nothing.
    let node = format!("/local/domain/{}/device/vbd/{XVDA}/feature-large-sector-size", brain.domain.domid());
    brain.xs.write(&node, "1").unwrap();
    let mut front = connect(&system, &brain);
    let info = front.info();
    assert_eq!((info.sector_size, info.sectors), (4096, SIZE / 512));
    assert!(info.physical_sector_size >= 4096, "{info:?}");
    // In units of 512 bytes all the same, and whole sectors or nothing.
    for (sector, len) in [(1, 4096), (4, 4096), (8, 512), (8, 6144)] {
        assert_eq!(ask(&mut front, Op::Read { sector, len }).0, Outcome::Error, "{sector} {len}");
    }
    assert_eq!(ask(&mut front, Op::Write { sector: 8, data: &[7; 8192] }).0, Outcome::Done);
    assert_eq!(ask(&mut front, Op::Read { sector: 16, len: 4096 }), (Outcome::Done, vec![7; 4096]));
    let secure = Op::SecureDiscard { sector: 8, sectors: 8 };
    let outcome = ask(&mut front, secure).0;
    assert_eq!(outcome, if info.discard_secure { Outcome::Done } else { Outcome::Unsupported });
    assert_ne!(ask(&mut front, Op::SecureDiscard { sector: 9, sectors: 8 }).0, Outcome::Done);
    assert_eq!(ask(&mut front, Op::Write { sector: 8, data: &[0; 8192] }).0, Outcome::Done);
    // A verifying load of such sectors, killed.
    let mut load = Load::new(0, SIZE / 512, 3).with_sector_size(4096);
    if info.discard_secure {
        load = load.with_secure_discards();
    } else {
        println!("no secure discards on this file system");
    }
    let until_then = Instant::now() + Duration::from_secs(3);
    let mut next_kill = Instant::now();
    let mut last = 0;
    while Instant::now() < until_then || load.in_flight() > 0 {
        if Instant::now() < until_then {
            let max_bytes = front.max_bytes();
            load.issue(24, max_bytes, |op, mark| front.submit(op, mark).is_ok());
            front.push();
        }
        let taken = front.wait(SOON, |completion| load.done(&completion)).unwrap();
        assert!(taken > 0, "no answer");
        if Instant::now() > next_kill {
            next_kill += Duration::from_millis(300);
            let pid =
                system.services().ok().and_then(|s| s.get(&blkback_of("g")).map(|s| s.pid)).unwrap_or(0);
            if pid > 1 && pid != last {
                let _gone_already = kill(Pid::from_raw(pid), Signal::SIGKILL);
                last = pid;
            }
        }
    }
    assert!(load.verified() > 0);
    drop(front);
    bh(&system, &["destroy", "g"]);
    let bytes = std::fs::read(&image).unwrap();
    load.check(0, &bytes);
}

#[test]
fn nodes_that_toolstacks_and_people_look_at() {
    let system = start();
    let brain = guest_with(&system, &format!("path = \"{}\"", image(&system, "disk", SIZE).display()));
    let domid = brain.domain.domid();
    assert_eq!(
        (backend_node(&brain, "hotplug-status"), backend_node(&brain, "online")),
        ("connected".into(), "1".into())
    );
    // The frontend's own error node: here of a device that is not there.
    let failed = BlkFront::connect(&brain.domain.hv, &brain.xs, domid, XVDA + 16, Duration::from_millis(100));
    let why = failed.expect_err("there is no xvdb").to_string();
    let said = brain.xs.read_string(&blkfront::error_node(domid, XVDA + 16)).unwrap();
    assert_eq!(said, why);
    // What a guest says of its disk is shown, in one line, until it connects.
    brain.xs.write(&blkfront::error_node(domid, XVDA), "no\nring").unwrap();
    assert!(bh(&system, &["block-list", "g"]).contains("the guest says: no ring"));
    let front = connect(&system, &brain);
    assert!(!bh(&system, &["block-list", "g"]).contains("the guest says"));
    assert!(front.info().flush);
    assert!(front.info().discard);
    let reconnects = |front: BlkFront| {
        drop(front);
        blkfront::disconnect(&brain.xs, domid, XVDA, SOON).unwrap();
        // Before that, a backend leaves a closed device alone.
        until(&system, "the backend offers again", || backend_node(&brain, "state") == "2");
    };
    // A toolstack that wants no discards.
    let back = brain.xs.read_string(&format!("/local/domain/{domid}/device/vbd/{XVDA}/backend")).unwrap();
    bh(&system, &["store", "write", &format!("{back}/discard-enable"), "0"]);
    reconnects(front);
    assert_eq!(backend_node(&brain, "feature-discard"), "0");
    let front = connect(&system, &brain);
    assert!(!front.info().discard);
    // The backend's: a frontend that says what is no ring.
    reconnects(front);
    let path = format!("/local/domain/{domid}/device/vbd/{XVDA}");
    brain.xs.write(&format!("{path}/multi-queue-num-queues"), "99").unwrap();
    brain.xs.write(&format!("{path}/state"), "3").unwrap();
    until(&system, "the backend's error", || bh(&system, &["block-list", "g"]).contains("99 queues"));
}

/// Seconds that 60 reads take, one after the other.
fn sixty_reads(front: &mut BlkFront) -> f64 {
    let began = Instant::now();
    for sector in 0..60 {
        assert_eq!(ask(front, Op::Read { sector, len: 512 }).0, Outcome::Done);
    }
    began.elapsed().as_secs_f64()
}

#[test]
fn limits_of_the_domain_file_of_bh_and_of_grpc() {
    let system = start();
    let disk = format!("path = \"{}\", iops = 100, iops_burst = 10", image(&system, "disk", SIZE).display());
    let brain = guest_with(&system, &disk);
    let mut front = connect(&system, &brain);
    until(&system, "the limit holds", || backend_node(&brain, "limit-iops") == "100");
    std::thread::sleep(Duration::from_millis(200));
    let limited = sixty_reads(&mut front);
    assert!(limited > 0.4, "60 reads in {limited} s at 100 a second, 10 at once");
    // The next process keeps to it before it has seen the store.
    kill_backend(&system, &blkback_of("g"));
    let limited = sixty_reads(&mut front);
    assert!(limited > 0.4, "{limited}");
    bh(&system, &["block-limit", "g", "xvda"]);
    until(&system, "no limit", || sixty_reads(&mut front) < 0.3);
    assert!(
        refused(&system, &["block-limit", "g", "xvda", "--iops-burst", "5"]).contains("nothing without iops")
    );
    assert!(refused(&system, &["block-limit", "g", "xvda", "--bandwidth", "fast"]).contains("bandwidth"));
    assert!(refused(&system, &["block-limit", "g", "xvdz"]).contains("no disk"));
    // By blkback's own socket.
    let socket = system.dir().join(format!("run/ctl/{}.sock", service_domid(&system, &blkback_of("g"))));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let set = |frontend: u32, iops: u64| {
        let socket = socket.to_str().unwrap().to_owned();
        runtime.block_on(async move {
            let channel = proto::unix::at(socket);
            let mut client = proto::blkback::disk_client::DiskClient::new(channel);
            let limits = proto::blkback::SetLimitsRequest {
                frontend,
                device: XVDA,
                iops,
                iops_burst: 1,
                ..Default::default()
            };
            client.set_limits(limits).await.map(drop)
        })
    };
    let domid = u32::from(brain.domain.domid());
    set(domid, 120).unwrap();
    until(&system, "the limit by gRPC holds", || sixty_reads(&mut front) > 0.35);
    assert_eq!(backend_node(&brain, "limit-iops"), "120", "it outlives the process");
    let error = set(domid + 100, 1).unwrap_err();
    assert!(error.message().contains("is not served") && !error.message().contains('\n'), "{error}");
    set(domid, 0).unwrap();
    until(&system, "no limit", || sixty_reads(&mut front) < 0.3);
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

fn tool(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{program} {args:?}: {text}");
}

/// A LUKS volume of [`SIZE`] bytes, all zero inside, and its key file.
fn luks(dir: &Path) -> (String, String) {
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (volume, key, zero) = (at("luks.img"), at("luks.key"), at("zero"));
    std::fs::write(&key, "correct horse").unwrap();
    std::fs::File::create(&zero).unwrap().set_len(SIZE).unwrap();
    let secret = format!("secret,id=k,file={key}");
    // It measures how fast it is, and may find itself too fast to tell.
    let began = Instant::now();
    loop {
        let options = ["-f", "luks", "-o", "key-secret=k,iter-time=10"];
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "--object", &secret]).args(options).args([&volume, &SIZE.to_string()]);
        let out = create.output().unwrap();
        if out.status.success() {
            break;
        }
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(text.contains("CPU usage") && began.elapsed() < SOON, "{text}");
    }
    let target = format!("driver=luks,key-secret=k,file.filename={volume}");
    tool(
        "qemu-img",
        &[
            "convert",
            "-n",
            "--object",
            &secret,
            "--target-image-opts",
            "-f",
            "raw",
            "-S",
            "0",
            &zero,
            &target,
        ],
    );
    (volume, key)
}

fn nbd(dir: &Path, name: &str) -> (Server, String) {
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (image, socket) = (at(&format!("{name}.img")), at(&format!("{name}.sock")));
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let mut command = Command::new("qemu-nbd");
    command.args(["-f", "raw", "-t", "-x", "e", "-e", "8", "--discard=unmap", "-k", &socket, &image]);
    let server = Server(command.spawn().unwrap());
    let began = Instant::now();
    while !Path::new(&socket).exists() {
        assert!(began.elapsed() < SOON, "qemu-nbd does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    (server, socket)
}

/// The host file has the same disks as a domain file.
#[test]
fn images_servers_and_volumes_of_the_host_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (base, top) = (at("base"), at("top.qcow2"));
    std::fs::write(&base, vec![0x42; SIZE as usize]).unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]);
    let (volume, key) = luks(dir.path());
    let (_server, socket) = nbd(dir.path(), "served");
    let mut config = Config::of_this_build().unwrap();
    config.host_file_more = format!(
        r#"
[[blkback]]
name = "image"
disk = "{top}"
format = "qcow2"
backing = [{{path = "{base}"}}]

[[blkback]]
name = "volume"
disk = "{volume}"
key = "{key}"

[[blkback]]
name = "served"
nbd = {{server = "{socket}", export = "e"}}

[[blkback]]
name = "vanishing"
disk = "{base}"
overlay = "{}"
"#,
        dir.path().display()
    );
    let system = start_with(config);
    for (name, first) in [("image", 0x42), ("volume", 0), ("served", 0)] {
        let guest = format!("guest-{name}");
        let text =
            format!("{}disk = [{{vdev = \"xvda\", backend = \"{name}\"}}]\n", probe_file(&guest, None));
        create(&system, &text);
        let brain = Brain::of(&system, &guest);
        let disk = brain.disk(&system);
        let mut bytes = [9; 4096];
        disk.read(8192, &mut bytes).unwrap();
        assert_eq!(bytes, [first; 4096], "{name}");
        disk.write(8192, &[7; 4096]).unwrap();
        kill_backend(&system, name);
        disk.read(8192, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 4096], "{name}");
        disk.sync().unwrap();
        drop(disk);
        bh(&system, &["destroy", &guest]);
    }
    let out = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2", &top]).output().unwrap();
    assert!([Some(0), Some(3)].contains(&out.status.code()), "{out:?}");
    assert!(std::fs::read(&base).unwrap().iter().all(|byte| *byte == 0x42), "the base is only read");
    until(&system, "the overlay's service runs", || {
        system.services().unwrap().get("vanishing").is_some_and(|s| s.state == "running")
    });
}

/// An overlay has no name from the beginning, and its space is free when its guest is gone.
#[test]
fn an_overlay_vanishes_with_its_guest() {
    let system = start();
    let base = image(&system, "base", SIZE);
    let dir = system.dir().join("overlays");
    std::fs::create_dir(&dir).unwrap();
    let table = format!("path = \"{}\", overlay = \"{}\"", base.display(), dir.display());
    let open_there = || {
        let here = dir.to_str().unwrap();
        let mut found = Vec::new();
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            for fd in std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
                let target = std::fs::read_link(fd.path()).unwrap_or_default();
                if target.to_str().is_some_and(|t| t.starts_with(here)) {
                    found.push(target);
                }
            }
        }
        found
    };
    for _ in 0..2 {
        let brain = guest_with(&system, &table);
        let disk = brain.disk(&system);
        let mut bytes = [9; 4096];
        disk.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4096], "nothing of the guest before");
        disk.write(0, &[5; 4096]).unwrap();
        disk.sync().unwrap();
        kill_backend(&system, &blkback_of("g"));
        disk.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [5; 4096], "a restart keeps it");
        assert!(!open_there().is_empty(), "somebody has it open");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "it has no name");
        drop(disk);
        bh(&system, &["destroy", "g"]);
        until(&system, "nobody has it open", || open_there().is_empty());
    }
    assert!(std::fs::read(&base).unwrap().iter().all(|byte| *byte == 0));
}

/// A snapshot is taken and committed again while the guest writes and blkback is killed all the time; then once more without kills.
#[test]
fn a_commit_survives_kills_under_load() {
    let system = start();
    let at = |name: &str| system.dir().join(name).to_str().unwrap().to_owned();
    let base = at("base.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &base, &SIZE.to_string()]);
    let brain = guest_with(&system, &format!("path = \"{base}\", format = \"qcow2\""));
    let disk = BlkDisk::new(connect(&system, &brain)).unwrap();
    let mut flat = vec![0; SIZE as usize];
    let mut rng = Rng::new(11);
    let mut work = |rounds: usize| {
        for round in 0..rounds {
            let offset = rng.below(SIZE / 512 - 128) as usize * 512;
            let data = vec![round as u8 | 1; (1 + rng.below(127) as usize) * 512];
            disk.write(offset as u64, &data).unwrap();
            flat[offset..offset + data.len()].copy_from_slice(&data);
            let look = rng.below(SIZE / 4096) as usize * 4096;
            let mut found = vec![0; 4096];
            disk.read(look as u64, &mut found).unwrap();
            assert!(found == flat[look..look + 4096], "round {round}, at {look}");
        }
    };
    work(60);
    for (round, kills) in [(0, true), (1, false)] {
        let over = at(&format!("over{round}.qcow2"));
        bh(&system, &["block-snapshot", "g", "xvda", &over]);
        work(150);
        assert!(bh(&system, &["block-list", "g"]).contains(&over));
        std::thread::scope(|scope| {
            let committing = scope.spawn(|| system.bh(&["block-commit", "g", "xvda"]).unwrap());
            let mut last = 0;
            let mut killed = 0;
            while !committing.is_finished() {
                work(1);
                let pid =
                    system.services().ok().and_then(|s| s.get(&blkback_of("g")).map(|s| s.pid)).unwrap_or(0);
                // Some 25 kills; then it must come to its end.
                if kills && killed < 25 && pid > 1 && pid != last {
                    let _gone_already = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    (last, killed) = (pid, killed + 1);
                }
            }
            let out = committing.join().unwrap();
            let error = String::from_utf8_lossy(&out.stderr).into_owned();
            println!("commit with {killed} kills: {} {error}", out.status);
            // With kills it may have been given up at the last step: then the disk is as it was, and it is asked for again.
            if !out.status.success() {
                assert!(kills && error.contains("cut short"), "{error}\n{}", system.log_tail(25));
                work(10);
                bh(&system, &["block-commit", "g", "xvda"]);
            }
        });
        assert!(!bh(&system, &["block-list", "g"]).contains(&over));
        work(60);
        kill_backend(&system, &blkback_of("g"));
        work(20);
    }
    let mut all = vec![0; SIZE as usize];
    disk.read(0, &mut all).unwrap();
    assert!(all == flat);
    disk.sync().unwrap();
    drop(disk);
    assert!(refused(&system, &["block-commit", "g", "xvda"]).contains("no backing file"));
    bh(&system, &["destroy", "g"]);
    let out = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2", &base]).output().unwrap();
    assert!([Some(0), Some(3)].contains(&out.status.code()), "{out:?}");
    let raw = at("flat");
    std::fs::write(&raw, &flat).unwrap();
    tool("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", &base, &raw]);
}

/// A verifying load on one queue, while its backend is killed so often; what is on the disk is read back at the end.
fn killed_on(table: &str, system: &System, kills: u32, mut load: Load) {
    let brain = guest_with(system, table);
    let mut front = connect(system, &brain);
    let mut rng = Rng::new(kills.into());
    let (mut last, mut killed, mut answered) = (0, 0, 0u64);
    let mut next = 40;
    let began = Instant::now();
    while killed < kills || load.in_flight() > 0 {
        if killed < kills {
            let max_bytes = front.max_bytes();
            load.issue(32, max_bytes, |op, mark| front.submit(op, mark).is_ok());
            front.push();
        }
        let taken = front.wait(SOON, |completion| load.done(&completion)).unwrap();
        assert!(taken > 0, "no answer\n{}", system.log_tail(25));
        answered += taken as u64;
        if answered >= next && killed < kills {
            next = answered + 20 + rng.below(150);
            let pid =
                system.services().ok().and_then(|s| s.get(&blkback_of("g")).map(|s| s.pid)).unwrap_or(0);
            if pid > 1 && pid != last {
                let _gone_already = kill(Pid::from_raw(pid), Signal::SIGKILL);
                (last, killed) = (pid, killed + 1);
            }
        }
    }
    let disk = BlkDisk::new(front).unwrap();
    let mut all = vec![0; SIZE as usize];
    disk.read(0, &mut all).unwrap();
    load.check(0, &all);
    println!(
        "{kills} kills in {:?}, {answered} requests, {} bytes verified",
        began.elapsed(),
        load.verified()
    );
    drop(disk);
    bh(system, &["destroy", "g"]);
}

fn killed_on_server_and_volume(kills: u32, seed: u64) {
    let system = start();
    let dir = tempfile::tempdir().unwrap();
    let (_server, socket) = nbd(dir.path(), "disk");
    let load = |seed| Load::new(0, SIZE / 512, seed);
    killed_on(&format!("nbd = {{server = \"{socket}\", export = \"e\"}}"), &system, kills, load(seed));
    let (volume, key) = luks(dir.path());
    // Discards are not handed down: the sectors read as before.
    let load = load(seed + 1).without_discards();
    killed_on(&format!("path = \"{volume}\", key = \"{key}\""), &system, kills, load);
}

#[test]
fn killed_on_an_nbd_server_and_in_a_luks_volume() {
    killed_on_server_and_volume(15, 5);
}

#[test]
#[ignore = "long: cargo xtask soak block"]
fn soak_block_nbd_and_luks() {
    killed_on_server_and_volume(if std::env::var_os("BH_SOAK").is_some() { 500 } else { 50 }, 6);
}

/// The program that tries, in blkback's place: made by dom0 as blkback is, with blkback's rights.
#[test]
fn a_blkback_can_open_nothing_but_its_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::of_this_build().unwrap();
    let _bin = probe_as(&mut config, "blkback");
    let made = |name: &str| {
        let path = dir.path().join(name);
        std::fs::File::create(&path).unwrap().write_all_at(&[1; 4096], 0).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (own, other, secret) = (made("own.img"), made("other.img"), made("secret.key"));
    let (_server, socket) = nbd(dir.path(), "n");
    config.host_file_more = format!(
        "[[blkback]]\nname = \"own\"\ndisk = \"{own}\"\n[[blkback]]\nname = \"other\"\ndisk = \"{other}\"\n\
         [[blkback]]\nname = \"net\"\nnbd = {{server = \"{socket}\", export = \"e\"}}\n"
    );
    let system = start_with(config);
    for name in ["own", "net"] {
        let probe = Probe::new(&system.dir().join("run"), service_domid(&system, name));
        let ask =
            |order: &str| probe.order(order).unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25)));
        assert_eq!(ask("list /"), "", "an empty root");
        let host: Vec<String> = [
            "/proc/self/mem",
            "/proc/1/root",
            "/sys/block",
            "/dev/kvm",
            "/dev/sda",
            "/dev/mem",
            "/etc/shadow",
        ]
        .into_iter()
        .chain([own.as_str(), &other, &secret, &socket, "/dev/null", "/run", "/tmp"])
        .map(str::to_owned)
        .collect();
        for path in &host {
            for how in ["open", "uring-open", "create"] {
                let answer = ask(&format!("{how} {path}"));
                assert!(
                    ["ENOENT", "EACCES", "EPERM", "EROFS"].contains(&answer.as_str()),
                    "{name}: {how} {path}: {answer}"
                );
            }
        }
        // A device by its number, another network, abstract sockets, the server by another way than the approved one.
        let mknod = ask(&format!("syscall {} 0 {} {}", nix::libc::SYS_mknodat, 0, 0));
        assert_ne!(mknod, "ok");
        let probe = Probe::new(&system.dir().join("run"), service_domid(&system, name));
        let ask = |order: &str| answer_of(&system, &probe, order);
        for address in ["127.0.0.1:10809", "10.77.0.1:22"] {
            let answer = ask(&format!("uring-connect {address}"));
            assert!(answer != "ok" && answer != "EINPROGRESS", "{address}: {answer}");
        }
        assert_ne!(ask(&format!("unix {socket}")), "ok");
        assert_ne!(ask("abstract bulkhead"), "ok");
        // What hv-core opens for it: its disk, by name, and nothing else.
        let hv = Hypercall::new(probe.hypercall().unwrap());
        let listed: Vec<String> =
            hv.resource_list().unwrap().iter().map(|r| r.name.as_str().unwrap_or("?").to_owned()).collect();
        let wanted = if name == "own" {
            "disk".to_owned()
        } else {
            domain_kit::resource_of("disk", &format!("e@{socket}"))
        };
        assert_eq!(listed, [wanted.as_str()], "{name}");
        let (kind, fd) = hv.resource_open(&wanted).unwrap();
        let connection = name == "net";
        assert_eq!(kind == hv_abi::resource_kind::CONNECT, connection, "{name}");
        if !connection {
            let mut byte = [0];
            std::fs::File::from(fd).read_at(&mut byte, 0).unwrap();
            assert_eq!(byte, [1], "that one it can");
        }
        for foreign in ["disk-1", &other, "key", "kvm", "kernel", "../other.img", &secret] {
            assert!(hv.resource_open(foreign).is_err(), "{name}: {foreign}");
        }
    }
}

/// XSA-349: a guest that writes its state again and again makes its backend look at it now and then, and costs it neither memory nor
/// the service of others.
#[test]
fn xsa_349_a_flood_of_states() {
    let system = start();
    let image = image(&system, "disk", SIZE);
    let brain = guest_with(&system, &format!("path = \"{}\"", image.display()));
    let mut front = connect(&system, &brain);
    let path = format!("/local/domain/{}/device/vbd/{XVDA}/state", brain.domain.domid());
    let backend = service_process(&system, &blkback_of("g"));
    let resident = || -> u64 {
        let text = backend.status("VmRSS").unwrap_or_default();
        text.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0)
    };
    let before = resident();
    let until_then = Instant::now() + Duration::from_secs(3);
    let (mut written, mut longest) = (0, Duration::ZERO);
    while Instant::now() < until_then {
        for _ in 0..100 {
            brain.xs.write(&path, "4").unwrap();
            written += 1;
        }
        let began = Instant::now();
        assert_eq!(ask(&mut front, Op::Read { sector: 0, len: 512 }).0, Outcome::Done);
        longest = longest.max(began.elapsed());
    }
    println!("{written} states, longest read {longest:?}, {} KiB more", resident().saturating_sub(before));
    assert!(resident() < before + (8 << 10), "{} KiB, {before} before", resident());
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    // It still looks.
    std::fs::File::options().write(true).open(&image).unwrap().set_len(2 * SIZE).unwrap();
    until(&system, "the new size", || backend_node(&brain, "sectors") == (2 * SIZE / 512).to_string());
}

/// XSA-350: connecting and disconnecting, with the backend killed in the middle of either.
#[test]
fn xsa_350_connects_and_disconnects_under_kills() {
    let system = start();
    let brain = guest_with(&system, &format!("path = \"{}\"", image(&system, "disk", SIZE).display()));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let stopped = || stop.load(std::sync::atomic::Ordering::Relaxed);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut last, mut rng) = (0, Rng::new(4));
            while !stopped() {
                std::thread::sleep(Duration::from_millis(30 + rng.below(200)));
                let pid =
                    system.services().ok().and_then(|s| s.get(&blkback_of("g")).map(|s| s.pid)).unwrap_or(0);
                if pid > 1 && pid != last {
                    let _gone_already = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    last = pid;
                }
            }
        });
        for round in 0..25u8 {
            let mut front = connect(&system, &brain);
            if round > 0 {
                let found = ask(&mut front, Op::Read { sector: 8, len: 512 });
                assert_eq!(found, (Outcome::Done, vec![round - 1; 512]));
            }
            assert_eq!(ask(&mut front, Op::Write { sector: 8, data: &[round; 512] }).0, Outcome::Done);
            drop(front);
            blkfront::disconnect(&brain.xs, brain.domain.domid(), XVDA, SOON).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let mut front = connect(&system, &brain);
    assert_eq!(ask(&mut front, Op::Read { sector: 8, len: 512 }), (Outcome::Done, vec![24; 512]));
}

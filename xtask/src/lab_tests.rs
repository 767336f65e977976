//! What `cargo xtask test` runs in the lab, besides every ignored test named `lab_…`.

use crate::guest::{Guest, Image};
use crate::lab::{self, LabArgs, RunDir};
use crate::libtest::{self, Ignored};
use crate::{run, setup, tools};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs::{self, File};
use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use workload::stream::{self, StreamConfig, StreamStats};

/// A lab test: name and what it does.
pub type LabTest = (&'static str, fn() -> Result<()>);

/// All lab tests in order. A whole-system run in the lab is one more line here.
pub const ALL: &[LabTest] = &[
    ("lab: L1 has what we need", l1_has_what_we_need),
    ("lab: statuses and deadlines", statuses),
    ("lab: Debian 12 guest image", || guest_image(Guest::Debian12)),
    ("lab: Debian 13 guest image", || guest_image(Guest::Debian13)),
    ("lab: tests named lab_*", ignored_tests),
];

fn expect(args: &LabArgs, status: i32) -> Result<()> {
    let got = lab::run(args)?;
    if got != status {
        bail!("{:?}: status {got}, expected {status}", args.command);
    }
    Ok(())
}

/// Nested SVM, KVM's module, udmabuf, namespaces, cgroup v2, direct I/O on tmpfs.
fn l1_has_what_we_need() -> Result<()> {
    let script = "set -e; test -c /dev/kvm; test -c /dev/udmabuf; test -c /dev/net/tun; \
        grep -q svm /proc/cpuinfo; grep -q 1 /sys/module/kvm_amd/parameters/nested; \
        grep -qw memory /sys/fs/cgroup/cgroup.controllers; unshare -Urnmp --fork true; \
        dd if=/dev/zero of=/tmp/x bs=4096 count=1 oflag=direct 2>/dev/null; \
        ip link add name va type veth peer name vb; ip link add name br0 type bridge; test \"$BH_LAB\" = 1";
    expect(&LabArgs::new(["sh", "-c", script]), 0)
}

/// CMD's own status comes back, a hang and a dead L1 have their documented ones.
fn statuses() -> Result<()> {
    expect(&LabArgs::new(["sh", "-c", "exit 7"]), 7)?;
    let mut hang = LabArgs::new(["sleep", "1000"]);
    hang.timeout = 15;
    expect(&hang, lab::EXIT_TIMEOUT)?;
    let panic = LabArgs::new(["sh", "-c", "echo c >/proc/sysrq-trigger"]);
    expect(&panic, lab::EXIT_EMULATOR)
}

/// The guest image by itself, on plain emulation with virtio devices: its load is right, it ends
/// in order. What then fails under hv-core is not the image's fault.
fn guest_image(guest: Guest) -> Result<()> {
    setup::packages(setup::LAB)?;
    let image = tools::image(guest)?;
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on loopback")?;
    let port = listener.local_addr()?.port();
    let stop = Arc::new(AtomicBool::new(false));
    let config = StreamConfig { rate: 1 << 20, stop: Arc::clone(&stop) };
    let stats = Arc::new(StreamStats::default());
    let shared = Arc::clone(&stats);
    let server = thread::spawn(move || stream::serve(&listener, &config, &shared));
    let console = boot(&image, port);
    stop.store(true, Relaxed);
    if let Ok(result) = server.join() {
        result?;
    }
    let console = console?;
    let lines: Vec<Value> = console
        .lines()
        .filter_map(|l| l.split_once("BH: "))
        .filter_map(|(_, json)| serde_json::from_str(json.trim()).ok())
        .collect();
    let find = |event: &str| lines.iter().rfind(|l| l["ev"] == event);
    let shown = || run::tail(&console, 15);
    if let Some(error) = find("error") {
        bail!("the guest reports {error}");
    }
    let end = find("end").with_context(|| format!("the guest did not end:\n{}", shown()))?;
    if end["clean"] != true || find("boot").is_none_or(|b| b["kernel"] != image.version.as_str()) {
        bail!("the guest's run was not clean:\n{}", shown());
    }
    let (disk, total) = (find("disk_end"), find("total"));
    let verified = disk.and_then(|d| d["disk"]["verified_bytes"].as_u64()).unwrap_or(0);
    let pings = total.and_then(|t| t["ping"]["received"].as_u64()).unwrap_or(0);
    let received = stats.rx_bytes.load(Relaxed);
    if verified < 1 << 20 || pings < 5 || received < 100_000 || stats.first_problem().is_some() {
        bail!(
            "too little or wrong: {verified} bytes verified, {pings} pings answered, {received} \
             TCP bytes, {:?}\n{}",
            stats.first_problem(),
            shown()
        );
    }
    println!("{}: {verified} disk bytes, {received} TCP bytes, {pings} pings", guest.name());
    Ok(())
}

fn boot(image: &Image, port: u16) -> Result<String> {
    let dir = RunDir::new(false)?;
    let disk = dir.path.join("disk");
    File::create(&disk)?.set_len(64 << 20)?;
    let words = format!(
        "console=ttyS0 quiet mitigations=off bh.ip=10.0.2.15/24 bh.gw=10.0.2.2 \
         bh.work=disk,tcp,ping bh.peer=10.0.2.2:{port} bh.disk=vda bh.seconds=3"
    );
    let log = dir.path.join("console");
    let mut cmd = Command::new("timeout");
    cmd.args(["-k", "5", "90", "qemu-system-x86_64", "-nodefaults", "-no-reboot"]);
    cmd.args(["-display", "none", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256M"]);
    cmd.arg("-kernel").arg(&image.vmlinuz).arg("-initrd").arg(&image.initrd);
    cmd.args(["-append", &words, "-serial", &format!("file:{}", log.display())]);
    let drive = format!("if=none,id=d,format=raw,cache=unsafe,file={}", disk.display());
    cmd.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=d"]);
    cmd.args(["-nic", "user,model=virtio-net-pci"]);
    run::quiet(&mut cmd)?;
    Ok(String::from_utf8_lossy(&fs::read(&log)?).into_owned())
}

/// Runs all ignored tests named `lab_…` in one L1, one at a time.
fn ignored_tests() -> Result<()> {
    let tests = libtest::ignored("lab_")?;
    if tests.is_empty() {
        println!("no test is named lab_…");
        return Ok(());
    }
    in_one_l1(&tests, false)
}

/// Runs tests in one L1, one at a time; their guests' images are there. `soak`: with their full counts, and what they print is shown.
///
/// # Errors
/// One failed, or L1.
pub fn in_one_l1(tests: &[Ignored], soak: bool) -> Result<()> {
    let shown = if soak { "--nocapture" } else { "" };
    // Each by itself, so that the one that fails is named and the others still run.
    let mut script = String::from("failed=\n");
    for test in tests {
        script.push_str(&format!(
            "cd '{}' && '{}' --ignored --exact --test-threads=1 {shown} '{}' || failed=\"$failed {}\"\n",
            test.dir.display(),
            test.exe.display(),
            test.name,
            test.name
        ));
    }
    script.push_str("test -z \"$failed\" || { echo \"failed:$failed\"; exit 1; }\n");
    let mut args = LabArgs::new(["sh", "-c", &script]);
    args.timeout = 900;
    args.env.push(format!("BH_BIN_DIR={}", lab::programs()?.display()));
    args.env.extend(soak.then(|| "BH_SOAK=1".to_owned()));
    expect(&args, 0)
}

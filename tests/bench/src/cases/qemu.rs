//! A Debian guest in a machine that QEMU emulates in software, natively: its disk by blkback and its NIC by netback (vhost-user) beside
//! QEMU's own virtio-blk and virtio-net on a TAP, and beside QEMU's storage daemon. The same kernel, RAM disk, fio and iperf3 in all.

use std::cell::RefCell;
use std::fs::File;
use std::io::Read;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::outside::{ADDRESS, Outside, PREFIX};
use bulkhead_tests::system::{Config, System};

use super::block::lab::{fio, samples};
use super::block::speed::IN_LAB;
use super::boot::memory::resident_kib;
use super::boot::start::{BOOT, USERSPACE, console};
use super::boot::terminal::Terminal;
use super::boot::{Image, nic, xvda};
use super::world::listed;
use super::{Settings, or_missing, show_log};
use crate::disk::Sample;
use crate::peers::storage_daemon::Daemon;
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;

/// Most rounds counted: emulated turns take long.
const ROUNDS: usize = 3;
/// Bytes of each disk.
const DISK: u64 = 64 << 20;
/// RAM of the guests, MiB: fio's image is large.
const MEMORY: u32 = 384;
/// Length of each of fio's jobs, milliseconds of the guest's clock.
const JOB_MS: u64 = 2000;
/// The first four of [`IN_LAB`]: 4 KiB at random, read and written, depth 1 and 32.
const JOBS: usize = 4;
/// Length of an iperf3 run, seconds.
const STREAM_S: u32 = 3;
/// Echoes in a turn.
const PINGS: u32 = 50;
/// Longest turn.
const TURN: Duration = Duration::from_secs(120);
/// The goal for a bridge, MiB.
const RESIDENT: f64 = 8.0;
/// The goal for a boot beside bare QEMU.
const BOOT_RATIO: f64 = 1.1;
/// The outside's address on bare QEMU's network, and its TAP.
const TAP_PEER: &str = "10.78.0.1";
const TAP: &str = "bench-tap0";
const IPERF: &str = "/usr/bin/iperf3";

const BUILT_IN: &str = "virtio-blk";
const DAEMON: &str = "qemu-storage-daemon";
const ON_TAP: &str = "virtio-net on TAP";
const BARE: &str = "bare QEMU";

/// A group of lines, for `--only`.
type Group = fn(&Settings) -> Result<Vec<Line>>;
/// A figure of a guest, with the outside's address.
type Measure = fn(&Guest, &str) -> Result<f64>;
type Names = &'static [(&'static str, &'static str, &'static str)];
const DISK_NAMES: Names = &[("QEMU guest's disk", "IOPS", ">= 1.00 x both peers")];
const NET_NAMES: Names = &[("QEMU guest's NIC", "Mb/s", ">= 1.00 x virtio-net on TAP")];
const BOOT_NAMES: Names = &[("create to userspace, QEMU Debian", "s", "<= 1.10 x bare QEMU")];

/// All lines of the case.
pub fn run(settings: &Settings) -> Vec<Line> {
    let wanted = |name: &str| settings.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    let mut lines = Vec::new();
    let groups: [(&str, Names, Group); 3] =
        [("disk", DISK_NAMES, disks), ("nic", NET_NAMES, nics), ("boot", BOOT_NAMES, boots)];
    for (name, names, measure) in groups {
        if wanted(name) {
            lines.extend(or_missing(names, measure(settings)));
        }
    }
    lines
}

fn image(settings: &Settings) -> Result<&Image> {
    settings.image.as_ref().context("needs a guest image (leave out --no-lab)")
}

/// The image with fio and iperf3 in it.
fn tools(settings: &Settings) -> Result<Image> {
    let image = image(settings)?;
    let initrd = image.fio.clone().context("needs a guest image with fio")?;
    Ok(Image { initrd, ..image.clone() })
}

fn start(settings: &Settings) -> Result<System> {
    System::start(Config { bin_dir: settings.bin_dir.clone(), ..Config::of_this_build()? })
}

/// A disk's image, written in full, so that no request meets a hole.
fn filled(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    std::io::copy(&mut std::io::repeat(0xa5).take(DISK), &mut File::create(&path)?)?;
    Ok(path)
}

/// Words for the guest's kernel.
fn cmdline(network: Option<(&str, &str)>) -> String {
    let network = network.map(|(own, gateway)| format!(" bh.ip={own}/{PREFIX} bh.gw={gateway}"));
    format!(
        "console=ttyS0 quiet panic=-1 mitigations=off bh.work=none bh.shell{}",
        network.unwrap_or_default()
    )
}

/// A guest under `bh` with a disk and a NIC.
fn domain_file(name: &str, image: &Image, disk: &Path) -> String {
    let network = cmdline(Some(("10.77.0.2", ADDRESS)));
    let more = format!("accel = \"tcg\"\nwhole_memory = true\n{}{}", xvda(disk), nic());
    image.domain_file(name, "qemu", &network, MEMORY, &more)
}

/// A machine as qemu-bridge's, without devices.
fn bare(image: &Image, words: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "pc,usb=off,memory-backend=ram", "-accel", "tcg", "-cpu", "max", "-smp", "1"])
        .args(["-m", &format!("{MEMORY}M")])
        .args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY}M,share=on,seal=on")])
        .args(["-object", "rng-builtin,id=rng0", "-device", "virtio-rng-pci,rng=rng0"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-append", words]);
    command
}

/// QEMU's own disk, opened as blkback opens one.
fn built_in_disk(command: &mut Command, disk: &Path) {
    let file = format!("driver=file,node-name=f,filename={},cache.direct=on,aio=io_uring", disk.display());
    command
        .args(["-object", "iothread,id=io", "-blockdev", &file, "-blockdev", "driver=raw,node-name=d,file=f"])
        .args(["-device", "virtio-blk-pci,drive=d,iothread=io"]);
}

fn tap_nic(command: &mut Command) {
    command
        .args(["-netdev", &format!("tap,id=n,ifname={TAP},script=no,downscript=no")])
        .args(["-device", "virtio-net-pci,netdev=n,romfile="]);
}

/// A TAP of this name in the outside, with an address there.
pub(crate) fn make_tap(outside: &Outside, tap: &'static str, address: &'static str) -> Result<()> {
    outside.run(move || -> Result<()> {
        ip(&["tuntap", "add", tap, "mode", "tap"])?;
        ip(&["addr", "add", &format!("{address}/{PREFIX}"), "dev", tap])?;
        ip(&["link", "set", tap, "up"])
    })?
}

fn ip(args: &[&str]) -> Result<()> {
    let out = Command::new("ip").args(args).output().context("running ip")?;
    ensure!(out.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}

/// A booted guest with a shell on its console.
pub(crate) struct Guest(RefCell<Terminal>);

impl Guest {
    /// Of a console on which its first process was heard.
    pub(crate) fn up(mut terminal: Terminal) -> Result<Guest> {
        terminal.type_line("")?;
        terminal.expect("guest#", BOOT)?;
        // No echo between us.
        terminal.run("busybox stty -echo", TURN)?;
        Ok(Guest(RefCell::new(terminal)))
    }

    /// Of an emulator that runs in the outside.
    pub(crate) fn of(outside: &Outside, command: Command) -> Result<Guest> {
        let mut terminal = outside.run(move || Terminal::start(command))??;
        terminal.expect(USERSPACE, BOOT)?;
        Guest::up(terminal)
    }

    /// Runs a command in its shell and gives what it prints.
    pub(crate) fn run(&self, command: &str) -> Result<String> {
        self.0.borrow_mut().run(&format!("{command} 2>&1"), TURN)
    }

    /// fio's jobs, one after the other.
    fn fio(&self) -> Result<Vec<Sample>> {
        let fio = fio("/dev/vda", JOB_MS, DISK);
        let mut command = format!("while ! [ -b /dev/vda ]; do sleep 0.1; done; {fio}");
        for workload in &IN_LAB[..JOBS] {
            command += &format!(" {}", workload.fio());
        }
        let said = self.run(&command)?;
        samples(&said).with_context(|| format!("fio said: {said}"))
    }

    /// Mb/s over one TCP stream.
    pub(crate) fn stream(&self, peer: &str, inward: bool) -> Result<f64> {
        let way = if inward { " -R" } else { "" };
        let said = self.run(&format!("{IPERF} -c {peer} -t {STREAM_S} -f m{way}"))?;
        received(&said).with_context(|| format!("iperf3 said: {said}"))
    }

    /// Mean round trip, milliseconds.
    pub(crate) fn ping(&self, peer: &str) -> Result<f64> {
        let said = self.run(&format!("ping -c {PINGS} -i 0.02 {peer}"))?;
        ensure!(said.contains(&format!("{PINGS} packets received")), "pings were lost: {said}");
        mean(&said).with_context(|| format!("ping said: {said}"))
    }
}

/// Mb/s in iperf3's line of the receiving end.
fn received(said: &str) -> Option<f64> {
    let line = said.lines().find(|line| line.trim_end().ends_with("receiver"))?;
    line.split_once(" Mbits/sec")?.0.split_whitespace().next_back()?.parse().ok()
}

/// The second of busybox's "min/avg/max = 1.0/1.2/3.4 ms".
fn mean(said: &str) -> Option<f64> {
    said.split_once("min/avg/max = ")?.1.split('/').nth(1)?.parse().ok()
}

fn ours(system: &System, image: &Image, disk: &Path) -> Result<Guest> {
    system.create(&domain_file("bench", image, disk))?;
    Guest::up(console(system, "bench", USERSPACE)?)
}

fn disks(settings: &Settings) -> Result<Vec<Line>> {
    let image = tools(settings)?;
    let dir = tempfile::Builder::new().prefix("bh-bench-").tempdir()?;
    let system = start(settings)?;
    let ours = ours(&system, &image, &filled(dir.path(), "ours")?).inspect_err(|_| show_log(&system))?;
    let mut command = bare(&image, &cmdline(None));
    built_in_disk(&mut command, &filled(dir.path(), "built-in")?);
    let built_in = Guest::of(&system.outside, command).context(BUILT_IN)?;
    let daemon = Daemon::start(dir.path(), &filled(dir.path(), "daemon")?, true)?;
    let mut command = bare(&image, &cmdline(None));
    command
        .args(["-chardev", &format!("socket,id=c,path={}", daemon.socket().display())])
        .args(["-device", "vhost-user-blk-pci,chardev=c"]);
    let by_daemon = Guest::of(&system.outside, command).context(DAEMON)?;

    let guests = [("ours", &ours), (BUILT_IN, &built_in), (DAEMON, &by_daemon)];
    // Of each guest each turn, of that each job.
    let turns: Vec<RefCell<Vec<Vec<Sample>>>> = guests.iter().map(|_| RefCell::default()).collect();
    let mut contestants: Vec<Contestant<'_>> = guests
        .iter()
        .zip(&turns)
        .map(|((name, guest), turns)| {
            Contestant::new(name, move || {
                let samples = guest.fio().with_context(|| format!("fio on {name}"))?;
                eprintln!("bench: {name}: {:.0?}", samples.iter().map(|s| s.iops).collect::<Vec<_>>());
                let first = samples.first().map_or(f64::NAN, |s| s.iops);
                turns.borrow_mut().push(samples);
                Ok(first)
            })
        })
        .collect();
    take_turns(settings.rounds.min(ROUNDS), &mut contestants)?;
    drop(contestants);
    let turns: Vec<Vec<Vec<Sample>>> = turns.into_iter().map(RefCell::into_inner).collect();
    let mut lines = judged(&turns);
    lines.push(resident(&system, "bench")?);
    Ok(lines)
}

/// The lines of all jobs: of each contestant (ours, built in, the daemon's) each turn, of which the first was to warm up.
fn judged(turns: &[Vec<Vec<Sample>>]) -> Vec<Line> {
    let mut lines = Vec::new();
    for (job, workload) in IN_LAB[..JOBS].iter().enumerate() {
        let of = |i: usize, f: &dyn Fn(&Sample) -> f64| -> Series {
            let turns = turns.get(i).into_iter().flatten().skip(1);
            Series::new(turns.filter_map(|turn| turn.get(job)).map(f).collect())
        };
        for (i, peer) in [(1, BUILT_IN), (2, DAEMON)] {
            let speed = |s: &Sample| s.iops;
            let name = format!("{}: beside {peer}", workload.name);
            let goal = Goal::RatioAtLeast(1.0);
            lines.push(Line::beside(&name, "IOPS", &of(0, &speed), (peer, &of(i, &speed)), goal));
        }
        for (what, f) in [("p50", (|s: &Sample| s.p50) as fn(&Sample) -> f64), ("p99", |s| s.p99)] {
            let name = format!("{}: {what}", workload.name);
            let line = Line::beside(&name, "us", &of(0, &f), (BUILT_IN, &of(1, &f)), Goal::None);
            lines.push(line.peer(DAEMON, &of(2, &f)));
        }
    }
    lines
}

fn resident(system: &System, guest: &str) -> Result<Line> {
    let pid = listed(system, guest)?["host_pid"].as_i64().and_then(|p| i32::try_from(p).ok()).unwrap_or(0);
    ensure!(pid > 0, "the guest's bridge has no process");
    let mib = resident_kib(pid)? as f64 / 1024.0;
    let line = Line::under("resident memory of a qemu-bridge", "MiB", mib, RESIDENT);
    Ok(line.note("after the load; pages of the program file counted in full"))
}

/// iperf3's server, ended when dropped.
pub(crate) struct Server(Child);

impl Server {
    fn start(outside: &Outside, address: &str) -> Result<Server> {
        Server::of(outside, address, None)
    }

    /// The machine's own iperf3, or that of a tree of packages.
    pub(crate) fn of(outside: &Outside, address: &str, tree: Option<&Path>) -> Result<Server> {
        let address: Ipv4Addr = address.parse()?;
        let mut command = Command::new(IPERF);
        if let Some((program, libraries)) = tree.map(super::net::lab::iperf_in) {
            command = Command::new(program);
            command.env("LD_LIBRARY_PATH", libraries);
        }
        let child = outside.run(move || {
            command
                .args(["-s", "-B", &address.to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
        })?;
        Ok(Server(child.with_context(|| format!("starting {IPERF}"))?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn nics(settings: &Settings) -> Result<Vec<Line>> {
    let image = tools(settings)?;
    let dir = tempfile::Builder::new().prefix("bh-bench-").tempdir()?;
    let system = start(settings)?;
    let ours = ours(&system, &image, &filled(dir.path(), "ours")?).inspect_err(|_| show_log(&system))?;
    make_tap(&system.outside, TAP, TAP_PEER)?;
    let mut command = bare(&image, &cmdline(Some(("10.78.0.2", TAP_PEER))));
    tap_nic(&mut command);
    let tap = Guest::of(&system.outside, command).context(ON_TAP)?;
    let _servers = [Server::start(&system.outside, ADDRESS)?, Server::start(&system.outside, TAP_PEER)?];
    for (guest, peer) in [(&ours, ADDRESS), (&tap, TAP_PEER)] {
        guest.run(&format!("while ! ping -c 1 -W 1 {peer} >/dev/null; do :; done"))?;
    }
    let measures: [(&str, &str, Goal, Measure); 3] = [
        ("TCP out of the QEMU guest", "Mb/s", Goal::RatioAtLeast(1.0), |guest, peer| {
            guest.stream(peer, false)
        }),
        ("TCP into the QEMU guest", "Mb/s", Goal::RatioAtLeast(1.0), |guest, peer| guest.stream(peer, true)),
        ("ping of the QEMU guest, mean", "ms", Goal::RatioAtMost(1.0), |guest, peer| guest.ping(peer)),
    ];
    let mut lines = Vec::new();
    for (name, unit, goal, measure) in measures {
        let series = take_turns(
            settings.rounds.min(ROUNDS),
            &mut [
                Contestant::new("ours", || measure(&ours, ADDRESS)),
                Contestant::new(ON_TAP, || measure(&tap, TAP_PEER)),
            ],
        )?;
        let [ours, limit]: [Series; 2] = series.try_into().ok().context("as many series as contestants")?;
        eprintln!("bench: {name}: {:?} beside {:?}", ours.values(), limit.values());
        lines.push(Line::beside(name, unit, &ours, (ON_TAP, &limit), goal));
    }
    Ok(lines)
}

fn boots(settings: &Settings) -> Result<Vec<Line>> {
    let image = image(settings)?;
    let dir = tempfile::Builder::new().prefix("bh-bench-").tempdir()?;
    let system = start(settings)?;
    make_tap(&system.outside, TAP, TAP_PEER)?;
    let (disk, bare_disk) = (filled(dir.path(), "ours")?, filled(dir.path(), "bare")?);
    let series = take_turns(
        settings.rounds.min(ROUNDS),
        &mut [
            Contestant::new("ours", || {
                let start = Instant::now();
                system.create(&domain_file("boot", image, &disk))?;
                drop(console(&system, "boot", USERSPACE)?);
                let seconds = start.elapsed().as_secs_f64();
                system.bh_ok(&["destroy", "boot"])?;
                Ok(seconds)
            }),
            Contestant::new(BARE, || {
                let mut command = bare(image, &cmdline(Some(("10.78.0.2", TAP_PEER))));
                built_in_disk(&mut command, &bare_disk);
                tap_nic(&mut command);
                let start = Instant::now();
                let mut terminal = system.outside.run(move || Terminal::start(command))??;
                terminal.expect(USERSPACE, BOOT)?;
                Ok(start.elapsed().as_secs_f64())
            }),
        ],
    )
    .inspect_err(|_| show_log(&system))?;
    let [ours, limit]: [Series; 2] = series.try_into().ok().context("as many series as contestants")?;
    let goal = Goal::RatioAtMost(BOOT_RATIO);
    let line = Line::beside("create to userspace, QEMU Debian", "s", &ours, (BARE, &limit), goal);
    Ok(vec![line.note(
        "both with a disk and a NIC; ours from `bh create` on, the backend's start and the console included",
    )])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tools_say_is_read() {
        let said = "[  5]   0.00-3.00   sec   248 MBytes   693 Mbits/sec    0             sender\r\n\
                    [  5]   0.00-3.01   sec   247 MBytes   688.5 Mbits/sec                  receiver\r\n";
        assert_eq!(received(said), Some(688.5));
        assert_eq!(received("iperf3: error"), None);
        assert_eq!(mean("round-trip min/avg/max = 0.512/1.250/9.1 ms"), Some(1.25));
    }

    #[test]
    fn each_job_is_judged_beside_both() {
        let turn = |iops: f64| vec![Sample { iops, p50: 1.0, p99: 2.0, ..Sample::default() }; JOBS];
        let lines = judged(&[
            vec![turn(1.0), turn(100.0)],
            vec![turn(500.0), turn(90.0)],
            vec![turn(500.0), turn(110.0)],
        ]);
        assert_eq!(lines.len(), 4 * JOBS);
        assert_eq!((lines[0].met, lines[1].met), (Some(true), Some(false)), "the first turn is to warm up");
    }
}

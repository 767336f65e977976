//! Disk and network of the Debian guest, where udmabuf and grant copies are on the path, beside the same guest with virtio devices
//! under QEMU's microvm.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::outside::{ADDRESS, Outside, PREFIX};
use bulkhead_tests::system::{Config, System};

use super::start::{BOOT, USERSPACE, console, microvm_command};
use super::terminal::Terminal;
use super::{Image, nic, xvda};
use crate::cases::{Settings, or_missing};
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;

/// Rounds counted.
const ROUNDS: usize = 3;
/// Bytes of the disk.
const DISK: u64 = 64 << 20;
/// 4 KiB requests in each turn.
const REQUESTS: u32 = 1_000;
/// Bytes over TCP in each turn.
const STREAM: usize = 4 << 20;
/// Longest turn.
const TURN: Duration = Duration::from_secs(30);
/// The outside's address on the microvm's network.
const MICROVM_PEER: &str = "10.78.0.1";
/// Its TAP device.
const TAP: &str = "bench-tap0";

/// A booted guest with a shell on its console.
struct Guest {
    terminal: RefCell<Terminal>,
    disk: &'static str,
    peer: &'static str,
}

/// The lines.
pub fn lines(settings: &Settings, image: &Image) -> Result<Vec<Line>> {
    let dir = tempfile::Builder::new().prefix("bh-bench-").tempdir()?;
    let disk = dir.path().join("disk.img");
    let file = std::fs::File::create(&disk)?;
    file.set_len(DISK)?;
    // Written in full, so that no request meets a hole.
    std::io::copy(&mut std::io::repeat(0xa5).take(DISK), &mut &file)?;
    let config = Config { bin_dir: settings.bin_dir.clone(), ..Config::of_this_build()? };
    let system = System::start(config)?;
    let ours = debian(&system, image, &disk).inspect_err(|_| crate::cases::show_log(&system))?;
    let virtio_disk = dir.path().join("virtio.img");
    std::fs::copy(&disk, &virtio_disk)?;
    let virtio = microvm(&system.outside, image, &virtio_disk);
    let mut lines = Vec::new();
    for (name, write) in [("Debian guest, 4 KiB reads", false), ("Debian guest, 4 KiB writes", true)] {
        lines.extend(or_missing(
            &[(name, "MiB/s", "")],
            contest(name, &ours, &virtio, |guest| guest.disk(write)),
        ));
    }
    for (name, outward) in
        [("Debian guest, TCP to the outside", true), ("Debian guest, TCP from the outside", false)]
    {
        let line = contest(name, &ours, &virtio, |guest| guest.stream(&system.outside, outward));
        lines.extend(or_missing(&[(name, "MiB/s", "")], line));
    }
    Ok(lines)
}

fn contest(
    name: &str,
    ours: &Guest,
    virtio: &Result<Guest>,
    measure: impl Fn(&Guest) -> Result<f64>,
) -> Result<Vec<Line>> {
    let failed = RefCell::new(virtio.as_ref().err().map(|e| format!("{e:#}")));
    let series = take_turns(
        ROUNDS,
        &mut [
            Contestant::new("a PVH domain", || measure(ours)),
            Contestant::new("QEMU microvm", || {
                let Ok(guest) = virtio else { return Ok(f64::NAN) };
                Ok(measure(guest).unwrap_or_else(|error| {
                    *failed.borrow_mut() = Some(format!("{error:#}"));
                    f64::NAN
                }))
            }),
        ],
    )?;
    let [ours, limit]: [Series; 2] = series.try_into().ok().context("as many series as contestants")?;
    let line = Line::beside(name, "MiB/s", &ours, ("virtio under QEMU microvm", &limit), Goal::None);
    let note = match failed.into_inner() {
        Some(why) => format!("QEMU microvm: {why}"),
        None => "sequential, one at a time (dd with direct I/O), or one stream (nc)".into(),
    };
    eprintln!("bench: {name} measured");
    Ok(vec![line.note(note)])
}

fn debian(system: &System, image: &Image, disk: &Path) -> Result<Guest> {
    let cmdline =
        format!("console=hvc0 quiet panic=-1 bh.work=none bh.shell bh.ip=10.77.0.2/{PREFIX} bh.gw={ADDRESS}");
    system.create(&image.domain_file("io", "pvh", &cmdline, 256, &(xvda(disk) + &nic())))?;
    let terminal = console(system, "io", USERSPACE)?;
    Guest { terminal: RefCell::new(terminal), disk: "/dev/xvda", peer: ADDRESS }.up()
}

fn microvm(outside: &Outside, image: &Image, disk: &Path) -> Result<Guest> {
    outside.run(|| -> Result<()> {
        ip(&["tuntap", "add", TAP, "mode", "tap"])?;
        ip(&["addr", "add", &format!("{MICROVM_PEER}/24"), "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])
    })??;
    let mut command = microvm_command(image, &format!("bh.shell bh.ip=10.78.0.2/24 bh.gw={MICROVM_PEER}"));
    command
        .args(["-drive", &format!("id=d,if=none,format=raw,cache=none,file={}", disk.display())])
        .args(["-device", "virtio-blk-device,drive=d"])
        .args(["-netdev", &format!("tap,id=n,ifname={TAP},script=no,downscript=no")])
        .args(["-device", "virtio-net-device,netdev=n"]);
    let mut terminal = outside.run(move || Terminal::start(command))??;
    terminal.expect(USERSPACE, BOOT)?;
    Guest { terminal: RefCell::new(terminal), disk: "/dev/vda", peer: MICROVM_PEER }.up()
}

impl Guest {
    fn up(self) -> Result<Guest> {
        let mut terminal = self.terminal.borrow_mut();
        terminal.type_line("")?;
        terminal.expect("guest#", BOOT)?;
        // No progress lines and no echo between us.
        terminal.run("busybox stty -echo", TURN)?;
        let wait = format!("while ! [ -b {} ]; do sleep 0.1; done; ping -c 1 -W 5 {}", self.disk, self.peer);
        let said = terminal.run(&wait, TURN)?;
        ensure!(said.contains("1 packets received"), "no way to the outside: {said}");
        drop(terminal);
        Ok(self)
    }

    /// MiB a second of direct 4 KiB requests, one after the other.
    fn disk(&self, write: bool) -> Result<f64> {
        let disk = self.disk;
        let command = match write {
            false => format!("dd if={disk} of=/dev/null bs=4096 count={REQUESTS} iflag=direct"),
            true => format!("dd if=/dev/zero of={disk} bs=4096 count={REQUESTS} oflag=direct"),
        };
        let clock = "cat /proc/uptime";
        let said = self.terminal.borrow_mut().run(&format!("{clock}; {command} 2>&1; {clock}"), TURN)?;
        ensure!(said.contains(&format!("{REQUESTS}+0 records out")), "dd said: {said}");
        let seconds = seconds_between(&said).with_context(|| format!("no times in: {said}"))?;
        Ok(f64::from(REQUESTS) * 4096.0 / f64::from(1 << 20) / seconds)
    }

    /// MiB a second over one TCP stream, timed outside the guest from the first byte to the last.
    fn stream(&self, outside: &Outside, outward: bool) -> Result<f64> {
        let address: Ipv4Addr = self.peer.parse()?;
        let (told, port) = std::sync::mpsc::channel();
        let done = outside.run(move || {
            std::thread::spawn(move || -> Result<f64> {
                let listener = TcpListener::bind((address, 0))?;
                // The driver waits for this; it is there as long as it does.
                let _ = told.send(listener.local_addr()?.port());
                let (mut stream, _) = listener.accept()?;
                stream.set_read_timeout(Some(TURN))?;
                stream.set_write_timeout(Some(TURN))?;
                let mut buffer = vec![0; 1 << 16];
                let mut moved = 0;
                let mut start = Instant::now();
                if outward {
                    loop {
                        let n = stream.read(&mut buffer)?;
                        if moved == 0 {
                            start = Instant::now();
                        }
                        moved += n;
                        if n == 0 || moved >= STREAM {
                            break;
                        }
                    }
                } else {
                    while moved < STREAM {
                        moved += stream.write(&buffer)?;
                    }
                    // The guest closes when it has read everything.
                    stream.shutdown(std::net::Shutdown::Write)?;
                    let left = stream.read(&mut buffer)?;
                    ensure!(left == 0, "the guest answered {left} bytes where it should have closed");
                }
                ensure!(moved >= STREAM, "the stream ended after {moved} bytes");
                Ok(moved as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64())
            })
        })?;
        let port = port.recv_timeout(TURN).context("no listener outside")?;
        let command = match outward {
            true => {
                format!("dd if=/dev/zero bs=65536 count={} 2>/dev/null | nc {address} {port}", STREAM >> 16)
            }
            false => format!("nc {address} {port} </dev/null >/dev/null"),
        };
        self.terminal.borrow_mut().run(&command, TURN)?;
        done.join().map_err(|_| anyhow::anyhow!("the outside's end panicked"))?
    }
}

/// Between the two /proc/uptime lines ("SECONDS IDLE") in a text; they count hundredths of a second.
fn seconds_between(said: &str) -> Option<f64> {
    let times: Vec<f64> = said
        .lines()
        .filter_map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
            // The shell's prompt may stand before them.
            [.., up, idle] if idle.parse::<f64>().is_ok() => up.parse().ok(),
            _ => None,
        })
        .collect();
    let [from, to] = times[..] else { return None };
    (to > from).then_some(to - from)
}

fn ip(args: &[&str]) -> Result<()> {
    let out = Command::new("ip").args(args).output().context("running ip")?;
    ensure!(out.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::seconds_between;

    #[test]
    fn uptimes_are_found() {
        let said = "guest# 10.50 9.80\r\n2000+0 records in\r\n2000+0 records out\r\n11.75 9.90\r\ndone";
        assert_eq!(seconds_between(said), Some(1.25));
        assert_eq!(seconds_between("10.50 9.80\n"), None);
    }
}

//! What a first process does for its system: mounts, modules, network, shell, end.

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::{Pid, sync};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use workload::report::Report;
use workload::work::End;

/// Mounts what everything else needs.
pub fn mounts() -> io::Result<()> {
    let table = [
        ("proc", "/proc", "proc"),
        ("sys", "/sys", "sysfs"),
        ("dev", "/dev", "devtmpfs"),
        ("pts", "/dev/pts", "devpts"),
        ("run", "/run", "tmpfs"),
        ("tmp", "/tmp", "tmpfs"),
    ];
    for (source, target, kind) in table {
        fs::create_dir_all(target)?;
        mount(Some(source), target, Some(kind), MsFlags::empty(), None::<&str>)?;
    }
    Ok(())
}

/// How many CPUs are on line.
pub fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Loads the modules that the image carries for this hypervisor, in the order of its list; `blkfront`: parameters of xen_blkfront.
pub fn load_modules(blkfront: &str, reporter: &dyn Report) {
    let dir = Path::new("/lib/bulkhead-modules");
    let xen = fs::read_to_string("/sys/hypervisor/type").is_ok_and(|t| t.trim() == "xen");
    let Ok(order) = fs::read_to_string(dir.join(if xen { "xen" } else { "virtio" })) else {
        return;
    };
    for name in order.lines().filter(|l| !l.is_empty()) {
        let load = || -> io::Result<()> {
            let file = File::open(dir.join(format!("{name}.ko")))?;
            let parameters = if name == "xen_blkfront" { blkfront } else { "" };
            finit_module(&file, &CString::new(parameters)?, ModuleInitFlags::empty())?;
            Ok(())
        };
        if let Err(e) = load() {
            reporter.error("module", &format!("{name}: {e}"));
        }
    }
}

/// Children that their starters wait for: [`reap`] leaves them their exit status. Locked while one is started, so that none ends
/// before it is in the list.
static AWAITED: Mutex<Vec<Pid>> = Mutex::new(Vec::new());
/// Process id of the console's shell, 0 while there is none.
static SHELL: AtomicI32 = AtomicI32::new(0);

fn awaited() -> MutexGuard<'static, Vec<Pid>> {
    AWAITED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(0))
}

fn busybox(args: &[&str]) -> io::Result<()> {
    command("/bin/busybox", args)
}

/// Runs a program to its end.
///
/// # Errors
/// It cannot be started, or failed: with what it said.
pub fn command(program: &str, args: &[&str]) -> io::Result<()> {
    let mut said = Vec::new();
    let status = lines_of(Command::new(program).args(args), |line| said.push(line.to_owned()))?;
    if status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{program} {}: {status}: {}", args.join(" "), said.join("; "))))
}

/// Runs a program to its end; both its outputs come line by line while it runs.
///
/// # Errors
/// It cannot be started or its output not be read.
pub fn lines_of(command: &mut Command, mut line: impl FnMut(&str)) -> io::Result<ExitStatus> {
    let (output, write) = io::pipe()?;
    command.stdin(Stdio::null()).stdout(write.try_clone()?).stderr(write);
    command.env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin");
    let mut child = {
        let mut awaited = awaited();
        let child = command.spawn()?;
        awaited.push(pid(&child));
        child
    };
    // The command holds the pipe's other end until it is told otherwise, and the end of its output would not come.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut output = BufReader::new(output);
    let mut bytes = Vec::new();
    let read = loop {
        bytes.clear();
        match output.read_until(b'\n', &mut bytes) {
            Ok(0) => break Ok(()),
            Ok(_) => line(String::from_utf8_lossy(&bytes).trim_end()),
            Err(e) => break Err(e),
        }
    };
    // With nobody to read on, what it writes ends it.
    drop(output);
    let status = child.wait();
    awaited().retain(|&p| p != pid(&child));
    // Others that ended behind it have waited.
    reap();
    read.and(status)
}

/// Takes the exit status of every ended child, as process 1 must, but those that are waited for.
pub fn reap() {
    let awaited = awaited();
    loop {
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let Some(pid) = waitid(Id::All, peek).ok().and_then(|status| status.pid()) else { return };
        // Its starter takes it and calls again.
        if awaited.contains(&pid) || waitpid(pid, Some(WaitPidFlag::WNOHANG)).is_err() {
            return;
        }
        SHELL.compare_exchange(pid.as_raw(), 0, SeqCst, SeqCst).ok();
    }
}

/// Waits until a path exists.
pub fn wait_for(path: &str, limit: Duration) -> io::Result<()> {
    let start = Instant::now();
    while !Path::new(path).exists() {
        if start.elapsed() > limit {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no {path} after {} s", limit.as_secs()),
            ));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Opens ICMP sockets to everybody and gives the NIC its static address.
pub fn network(nic: &str, ip: &str, gateway: Option<&str>) -> io::Result<()> {
    busybox(&["ip", "link", "set", "lo", "up"])?;
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    wait_for(&format!("/sys/class/net/{nic}"), Duration::from_secs(60))?;
    configure(nic, ip, gateway)
}

fn configure(nic: &str, ip: &str, gateway: Option<&str>) -> io::Result<()> {
    busybox(&["ip", "addr", "add", ip, "dev", nic])?;
    busybox(&["ip", "link", "set", nic, "up"])?;
    if let Some(gateway) = gateway {
        busybox(&["ip", "route", "add", "default", "via", gateway])?;
    }
    Ok(())
}

/// Gives the NIC its address again whenever it is another one of that name, as Debian's ifupdown does for what is plugged in: at
/// another backend a device is unplugged and plugged in again.
pub fn keep_network(nic: &str, ip: &str, gateway: Option<&str>, reporter: &dyn Report) {
    let number = || fs::read_to_string(format!("/sys/class/net/{nic}/ifindex")).ok();
    let mut had = number();
    loop {
        thread::sleep(Duration::from_millis(50));
        let now = number();
        if now.is_some() && now != had {
            let Err(e) = configure(nic, ip, gateway) else {
                had = now;
                continue;
            };
            // Gone again in the middle: its successor is configured anew.
            if number() == now {
                reporter.error("net", &e);
                had = now;
            }
        }
    }
}

/// Keeps a shell on the console: a new one whenever it ends.
pub fn shell() {
    let console = if Path::new("/dev/hvc0").exists() { "/dev/hvc0" } else { "/dev/console" };
    // In a session of its own with the console as its terminal, so that job control works.
    let script = format!("exec setsid -c sh -l <>{console} >&0 2>&1");
    loop {
        {
            let _held = awaited();
            let child = Command::new("/bin/busybox")
                .args(["sh", "-c", &script])
                .env("PATH", "/bin:/sbin")
                .env("HOME", "/")
                .env("TERM", "vt100")
                .env("PS1", "guest# ")
                .spawn();
            if let Ok(child) = child {
                SHELL.store(i32::try_from(child.id()).unwrap_or(0), SeqCst);
            }
        }
        while SHELL.load(SeqCst) != 0 {
            thread::sleep(Duration::from_millis(100));
            // The signal may have come while the lock was held.
            reap();
        }
        thread::sleep(Duration::from_millis(500));
    }
}

/// Ends the machine.
pub fn finish(end: End) -> ExitCode {
    sync();
    let mode = match end {
        End::Reboot => RebootMode::RB_AUTOBOOT,
        End::Time | End::PowerOff => RebootMode::RB_POWER_OFF,
    };
    // Returns only on an error; process 1 must not end then, or the kernel panics.
    reboot(mode).ok();
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_with_the_status_while_others_are_reaped() {
        let reaper = thread::spawn(|| {
            for _ in 0..200 {
                reap();
                thread::sleep(Duration::from_millis(1));
            }
        });
        let runs: Vec<_> = (0..4)
            .map(|n| {
                thread::spawn(move || {
                    let mut lines = Vec::new();
                    let script = format!("echo a; echo b >&2; exit {n}");
                    let mut command = Command::new("/bin/sh");
                    let status = lines_of(command.args(["-c", &script]), |line| lines.push(line.to_owned()));
                    assert_eq!(lines, ["a", "b"]);
                    assert_eq!(status.unwrap().code(), Some(n));
                })
            })
            .collect();
        for run in runs {
            run.join().unwrap();
        }
        reaper.join().unwrap();
        let why = command("/bin/sh", &["-c", "echo bad; false"]).unwrap_err().to_string();
        assert!(why.contains("bad"), "{why}");
    }
}

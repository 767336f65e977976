//! What a first process does for its system: mounts, modules, network, shell, end.

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sync};
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
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

/// Loads the modules that the image carries for this hypervisor, in the order of its list.
pub fn load_modules(reporter: &dyn Report) {
    let dir = Path::new("/lib/bulkhead-modules");
    let xen = fs::read_to_string("/sys/hypervisor/type").is_ok_and(|t| t.trim() == "xen");
    let Ok(order) = fs::read_to_string(dir.join(if xen { "xen" } else { "virtio" })) else {
        return;
    };
    for name in order.lines().filter(|l| !l.is_empty()) {
        let load = || -> io::Result<()> {
            let file = File::open(dir.join(format!("{name}.ko")))?;
            finit_module(&file, c"", ModuleInitFlags::empty())?;
            Ok(())
        };
        if let Err(e) = load() {
            reporter.error("module", &format!("{name}: {e}"));
        }
    }
}

/// Held while a child of ours is waited for by its starter, so that [`reap`] does not take its
/// exit status.
static WAITING: Mutex<()> = Mutex::new(());
/// Process id of the console's shell, 0 while there is none.
static SHELL: AtomicI32 = AtomicI32::new(0);

fn busybox(args: &[&str]) -> io::Result<()> {
    let _held = WAITING.lock();
    let out = Command::new("/bin/busybox").args(args).stdin(Stdio::null()).output()?;
    if out.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!("{}: {}", args.join(" "), text.trim())))
}

/// Takes the exit status of every ended child, as process 1 must.
pub fn reap() {
    let Ok(_held) = WAITING.try_lock() else {
        return;
    };
    loop {
        match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Err(_) | Ok(WaitStatus::StillAlive) => return,
            Ok(status) => {
                if let Some(pid) = status.pid() {
                    SHELL.compare_exchange(pid.as_raw(), 0, SeqCst, SeqCst).ok();
                }
            }
        }
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

/// Gives the NIC its static address and opens ICMP sockets to everybody.
pub fn network(nic: &str, ip: &str, gateway: Option<&str>) -> io::Result<()> {
    busybox(&["ip", "link", "set", "lo", "up"])?;
    wait_for(&format!("/sys/class/net/{nic}"), Duration::from_secs(60))?;
    busybox(&["ip", "addr", "add", ip, "dev", nic])?;
    busybox(&["ip", "link", "set", nic, "up"])?;
    if let Some(gateway) = gateway {
        busybox(&["ip", "route", "add", "default", "via", gateway])?;
    }
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
}

/// Keeps a shell on the console: a new one whenever it ends.
pub fn shell() {
    let console = if Path::new("/dev/hvc0").exists() { "/dev/hvc0" } else { "/dev/console" };
    // In a session of its own with the console as its terminal, so that job control works.
    let script = format!("exec setsid -c sh -l <>{console} >&0 2>&1");
    loop {
        {
            let _held = WAITING.lock();
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

//! The real system without devices: a guest's console under SIGKILL of dom0, console-backend and xenstored, and a guest's
//! life through `bh`. Needs root and the programs hv-core and xenstored beside ours (`cargo build -p hv-core -p xenstored`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

struct System {
    dir: tempfile::TempDir,
    bin: PathBuf,
    hv_core: Child,
}

impl System {
    /// `None` where it can't run, with the reason told.
    fn start() -> Option<System> {
        let bin = Path::new(env!("CARGO_BIN_EXE_dom0-supervisor")).parent().unwrap().to_owned();
        if !nix::unistd::geteuid().is_root() {
            println!("not run: needs root");
            return None;
        }
        for program in ["hv-core", "xenstored"] {
            if !bin.join(program).exists() {
                println!("not run: {program} is not built");
                return None;
            }
        }
        let dir = tempfile::Builder::new().prefix("bh-dom0-").tempdir().unwrap();
        let root = dir.path().to_owned();
        let at = |name: &str| root.join(name).display().to_string();
        for sub in ["etc", "state", "run"] {
            fs::create_dir(at(sub)).unwrap();
        }
        let host = format!(
            "bin_dir = {:?}\n[restart]\nburst = 0\nbackoff_max_ms = 50\n[xenstored]\nsocket = {:?}\n",
            bin.display().to_string(),
            at("run/xenstored.sock")
        );
        fs::write(at("etc/host.toml"), host).unwrap();
        let log = fs::File::create(at("log")).unwrap();
        let hv_core = Command::new(bin.join("hv-core"))
            .args(["--run-dir", &at("run"), "--dom0", &bin.join("dom0-supervisor").display().to_string()])
            .args(["--dom0-bind", &format!("{}:/etc/bulkhead:ro", at("etc"))])
            .args(["--dom0-bind", &format!("{}:/var/lib/bulkhead", at("state"))])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let system = System { dir, bin, hv_core };
        let end = Instant::now() + Duration::from_secs(60);
        while !system.bh(&["services", "--json"]).is_ok_and(|v| {
            let all = v["services"].as_array().cloned().unwrap_or_default();
            all.len() == 3 && all.iter().all(|s| s["state"] == "running")
        }) {
            assert!(Instant::now() < end, "{}", fs::read_to_string(at("log")).unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(system)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bh"));
        command.arg("--socket").arg(self.dir.path().join("run/dom0.sock")).args(args);
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    fn bh(&self, args: &[&str]) -> Result<Value, String> {
        let out = self.output(args);
        if out.status.success() {
            Ok(serde_json::from_slice(&out.stdout).unwrap_or(Value::Null))
        } else {
            Err(String::from_utf8_lossy(&out.stderr).into())
        }
    }

    fn create(&self, name: &str, rest: &str) -> Result<Value, String> {
        let program = self.bin.join("examples/console-guest");
        let file = self.dir.path().join(format!("{name}.toml"));
        fs::write(&file, format!("name = \"{name}\"\ntype = \"process\"\nprogram = {program:?}\n{rest}"))
            .unwrap();
        self.bh(&["create", &file.display().to_string(), "--json"])
    }

    fn kill(&self, service: &str) {
        let all = self.bh(&["services", "--json"]).unwrap();
        let all = all["services"].as_array().unwrap();
        let pid = all.iter().find(|s| s["name"] == service).unwrap()["host_pid"].as_i64().unwrap();
        if pid > 1 {
            let pid = nix::unistd::Pid::from_raw(pid as i32);
            // It may be between two lives.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

impl Drop for System {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.hv_core.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.hv_core.wait();
    }
}

#[test]
fn a_console_under_kills() {
    let Some(system) = System::start() else { return };
    system.create("g", "").unwrap();
    let out = system.dir.path().join("console");
    let mut console = system
        .command(&["console", "g"])
        .stdin(Stdio::piped())
        .stdout(fs::File::create(&out).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut keys = console.stdin.take().unwrap();
    for round in 0..8 {
        for service in ["console", "dom0-supervisor", "xenstored"] {
            system.kill(service);
            std::thread::sleep(Duration::from_millis(30 * (round % 4)));
        }
    }
    // What is typed gets there once the console is back.
    let end = Instant::now() + Duration::from_secs(20);
    let read = || String::from_utf8_lossy(&fs::read(&out).unwrap()).replace('\r', "");
    while !read().contains("you typed hello") {
        assert!(Instant::now() < end, "no echo:\n{}", read());
        use std::io::Write;
        keys.write_all(b"hello\n").unwrap();
        std::thread::sleep(Duration::from_millis(200));
    }
    console.kill().unwrap();
    console.wait().unwrap();
    let text = read();
    let whole = &text[..text.rfind('\n').unwrap()];
    let lines: Vec<u64> = whole.lines().filter_map(|l| l.strip_prefix("line ")?.parse().ok()).collect();
    assert!(lines.len() > 20);
    assert!(lines.iter().copied().eq(0..lines.len() as u64), "output lost or doubled: {lines:?}");
    let guest = system.bh(&["list", "g", "--json"]).unwrap();
    assert_eq!(
        (guest["guests"][0]["boots"].as_u64(), guest["guests"][0]["generation"].as_u64()),
        (Some(1), Some(1))
    );
}

#[test]
fn a_guests_life() {
    let Some(system) = System::start() else { return };
    let failed = system.create("bad", "args = [\"--fail\", \"the reason is this\"]").unwrap_err();
    assert!(failed.contains("the reason is this") && failed.lines().count() == 1, "{failed}");
    let made = system.create("g", "on_crash = \"preserve\"").unwrap();
    assert_eq!(made["state"], "running");
    assert_eq!(system.output(&["create", "/nonexistent"]).status.code(), Some(2));
    assert_eq!(system.output(&["destroy", "nobody"]).status.code(), Some(3));
    assert_eq!(system.create("g", "").unwrap_err().lines().count(), 1);

    system.bh(&["reboot", "g", "--wait"]).unwrap();
    let again = system.bh(&["list", "g", "--json"]).unwrap()["guests"][0].clone();
    assert_eq!((again["boots"].as_u64(), &again["uuid"]), (Some(2), &made["uuid"]));
    assert_ne!(again["domid"], made["domid"]);
    // dom0 dies while the guest goes down.
    system.bh(&["shutdown", "g"]).unwrap();
    system.kill("dom0-supervisor");
    let end = Instant::now() + Duration::from_secs(20);
    while system.bh(&["list", "g", "--json"]).is_ok() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(20));
    }

    system.create("c", "args = [\"--crash\"]\non_crash = \"preserve\"").unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let guest = system.bh(&["list", "c", "--json"]).unwrap()["guests"][0].clone();
        if guest["note"].as_str().is_some_and(|n| n.contains("crashed")) {
            break;
        }
        assert!(Instant::now() < end, "{guest}");
        std::thread::sleep(Duration::from_millis(20));
    }
    let log = system.output(&["console", "c", "--log"]);
    assert!(String::from_utf8_lossy(&log.stdout).contains("line 20"));
    system.bh(&["destroy", "c"]).unwrap();

    let restarted = system.bh(&["restart", "xenstored", "--json"]).unwrap();
    assert_eq!(restarted["generation"], 2);
    assert!(system.bh(&["restart", "dom0", "--json"]).unwrap()["generation"].as_u64() >= Some(2));
}

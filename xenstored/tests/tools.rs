//! Debian's xenstore-utils and PyPI's pyxs against the standalone daemon: the scripts in `conformance/`, which any xenstored can be
//! checked with, and what only ours must do. Without the tools the tests say so; `cargo xtask test` installs them.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Daemon, installed};

struct Tools(Daemon);

impl Tools {
    fn command(&self, tool: &str, args: &[&str]) -> Command {
        let mut command = Command::new(format!("xenstore-{tool}"));
        command.args(args).env("XENSTORED_PATH", self.0.socket()).stdin(Stdio::null());
        command
    }

    fn ok(&self, tool: &str, args: &[&str]) -> String {
        let out = self.command(tool, args).output().expect("runs");
        assert!(out.status.success(), "xenstore-{tool} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn fails(&self, tool: &str, args: &[&str]) {
        let status = self.command(tool, args).stderr(Stdio::null()).status().expect("runs");
        assert!(!status.success(), "xenstore-{tool} {args:?} should fail");
    }
}

/// Runs a script and shows what it says.
fn passes(command: &mut Command) {
    let out = command.stdin(Stdio::null()).output().expect("runs");
    let said = [out.stdout, out.stderr].map(|s| String::from_utf8_lossy(&s).into_owned()).concat();
    assert!(out.status.success(), "{command:?}: {said}");
    println!("{said}");
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance").join(name)
}

#[test]
fn conformance_by_xenstore_utils() {
    if !installed("xenstore-ls") {
        println!("xenstore-utils is not installed: not tested");
        return;
    }
    let daemon = Daemon::start();
    passes(Command::new("sh").arg(script("tools.sh")).arg(daemon.socket()));
}

#[test]
fn conformance_by_pyxs() {
    // xtask makes the environment below cargo's target directory, three steps above the program.
    let target = Path::new(env!("CARGO_BIN_EXE_xenstored")).ancestors().nth(3).expect("target directory");
    let python = target.join("pyxs/bin/python");
    if !python.exists() {
        println!("{} is not there (cargo xtask test makes it): not tested", python.display());
        return;
    }
    let daemon = Daemon::start();
    passes(Command::new(python).arg(script("pyxs_check.py")).arg(daemon.socket()));
}

#[test]
fn the_tree_as_tools_show_it_survives_sigkill() {
    if !installed("xenstore-ls") {
        println!("xenstore-utils is not installed: not tested");
        return;
    }
    let mut t = Tools(Daemon::start());
    t.ok("write", &["/a/b", "hello", "/a/bin", "\\x00\\x01\\xff"]);
    t.ok("chmod", &["/a/b", "n0", "r3", "b4"]);
    for i in 0..200 {
        t.ok("write", &[&format!("/dir/a-rather-long-name-for-a-node-in-the-store-{i:06}"), "v"]);
    }
    let before = t.ok("ls", &["-fp", "/"]);
    t.0.restart();
    assert_eq!(t.ok("ls", &["-fp", "/"]), before, "the tree after SIGKILL");
    t.ok("rm", &["/dir"]);
    t.fails("list", &["/dir"]);
}

//! Debian's xenstore-utils against the standalone daemon. Without them the test says so.

mod common;

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

#[test]
fn debian_tools() {
    if !installed("xenstore-ls") {
        println!("xenstore-utils is not installed: not tested");
        return;
    }
    let mut t = Tools(Daemon::start());
    t.ok("write", &["/a/b", "hello", "/a/c", "x y"]);
    assert_eq!(t.ok("read", &["/a/b", "/a/c"]), "hello\nx y\n");
    assert_eq!(t.ok("list", &["/a"]), "b\nc\n");
    t.ok("exists", &["/a/b"]);
    t.fails("exists", &["/a/none"]);
    t.fails("read", &["/a/none"]);
    t.ok("chmod", &["/a/b", "n0", "r3", "b4"]);
    assert!(t.ok("ls", &["-p", "/a"]).lines().next().is_some_and(|l| l.contains("(n0,r3,b4)")));
    t.ok("write", &["/a/bin", "\\x00\\x01\\xff"]);
    assert_eq!(t.ok("read", &["/a/bin"]), "\\000\\001\\xff\n");

    let watch = t.command("watch", &["-n", "3", "/a"]).stdout(Stdio::piped()).spawn().expect("runs");
    std::thread::sleep(std::time::Duration::from_millis(300));
    t.ok("write", &["/a/b", "2"]);
    t.ok("rm", &["/a/c"]);
    let seen = watch.wait_with_output().expect("ends");
    assert_eq!(String::from_utf8_lossy(&seen.stdout), "/a\n/a/b\n/a/c\n");

    // More children than one reply holds (DIRECTORY_PART).
    for i in 0..200 {
        t.ok("write", &[&format!("/dir/a-rather-long-name-for-a-node-in-the-store-{i:06}"), "v"]);
    }
    assert_eq!(t.ok("list", &["/dir"]).lines().count(), 200);
    assert_eq!(t.ok("ls", &["/dir"]).lines().count(), 200);

    let before = t.ok("ls", &["-fp", "/"]);
    t.0.restart();
    assert_eq!(t.ok("ls", &["-fp", "/"]), before, "the tree after SIGKILL");
    t.ok("rm", &["/dir"]);
    t.fails("list", &["/dir"]);
}

//! Debian's xenstore-utils against the socket of the running system.

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use bulkhead_tests::system::System;
use common::*;

fn tool(system: &System, name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(format!("xenstore-{name}"));
    command.args(args).env("XENSTORED_PATH", system.dir().join("run/xenstored.sock")).stdin(Stdio::null());
    command
}

fn ok(system: &System, name: &str, args: &[&str]) -> String {
    let out = tool(system, name, args).output().unwrap();
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "xenstore-{name} {args:?}: {error}\n{}", system.log_tail(25));
    String::from_utf8_lossy(&out.stdout).trim_end().to_owned()
}

#[test]
fn debians_tools_and_a_watch_that_outlives_xenstored() {
    if Command::new("xenstore-read").output().is_err() {
        println!("xenstore-utils is not installed: not tested");
        return;
    }
    let system = start();
    create(&system, &probe_file("guest", Some(&image(&system, "guest.img", 1 << 20))));
    let home = format!("/local/domain/{}", domid(&system, "guest"));

    // The guest's device as Xen's tools look for it.
    let device = format!("{home}/device/vbd/{XVDA}");
    let backend = ok(&system, "read", &[&format!("{device}/backend")]);
    assert_eq!(
        backend,
        format!(
            "/local/domain/{}/backend/vbd/{}/{XVDA}",
            service_domid(&system, &blkback_of("guest")),
            domid(&system, "guest")
        )
    );
    assert_eq!(ok(&system, "read", &[&format!("{backend}/frontend")]), device);
    let all = ok(&system, "ls", &["-f", "/local/domain"]);
    assert!(all.contains(&format!("{device}/state")), "{all}");

    // A watch that blocks across a kill of xenstored.
    ok(&system, "write", &["/tool/test", "1"]);
    let mut watch =
        tool(&system, "watch", &["-n", "3", "/tool/test"]).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let (told, heard) = mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|l| drop(told.send(l))));
    let next = |what: &str| {
        let line = heard.recv_timeout(SOON);
        assert_eq!(line.as_deref().ok(), Some("/tool/test"), "{what}\n{}", system.log_tail(25));
    };
    next("the first event, at once");
    for round in 0..2 {
        let victims = system.kill(&["xenstored".into()]).unwrap();
        // Nobody waits for the restart: a client that comes meanwhile is served after it.
        ok(&system, "write", &["/tool/test", &format!("round {round}")]);
        next("an event after a kill");
        system.wait_restarted(&victims, SOON).unwrap();
    }
    assert!(watch.wait().unwrap().success(), "xenstore-watch ended well after its three events");
    assert!(heard.recv_timeout(Duration::from_millis(100)).is_err(), "no event twice");
    assert_eq!(ok(&system, "read", &["/tool/test"]), "round 1");
    assert_eq!(ok(&system, "ls", &["-f", "/local/domain"]), all, "the tree after two kills");
    ok(&system, "rm", &["/tool/test"]);
    assert!(!tool(&system, "exists", &["/tool/test"]).status().unwrap().success());
}

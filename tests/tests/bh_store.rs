//! `bh store` against the running system, through dom0, with both ends killed in between.

mod common;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bulkhead_tests::system::System;
use common::*;
use domain_kit::xs::{XsClient, XsOps};
use serde_json::Value;

/// Runs `bh store …`, which must fail; gives exit status and its one line.
fn refused(system: &System, args: &[&str]) -> (Option<i32>, String) {
    let out = system.bh(&[&["store"], args].concat()).unwrap();
    let error = String::from_utf8_lossy(&out.stderr).trim_end().to_owned();
    assert!(!out.status.success() && error.lines().count() == 1, "{args:?}: {error}");
    (out.status.code(), error)
}

fn store(system: &System, args: &[&str]) -> String {
    let text = system.bh_ok(&[&["store"], args].concat());
    text.unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25))).trim_end().to_owned()
}

fn store_json(system: &System, args: &[&str]) -> Value {
    system.bh_json(&[&["store"], args].concat()).unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25)))
}

fn toolstack(system: &System) -> XsClient {
    XsClient::connect_socket(system.dir().join("run/xenstored.sock"), SOON).unwrap()
}

#[test]
fn nodes_are_listed_read_written_and_removed() {
    let system = start();
    let xs = toolstack(&system);
    store(&system, &["write", "/tool/test/b", "two"]);
    store(&system, &["write", "/tool/test/a", "one"]);
    store(&system, &["write", "/tool/test/a/deep", ""]);
    assert_eq!(xs.read_string("/tool/test/a").unwrap(), "one");
    assert_eq!(store(&system, &["read", "/tool/test/b"]), "two");
    xs.write("/tool/test/c", [0, 255, b'x']).unwrap();
    xs.set_perms("/tool/test/b", &["n0", "r7"]).unwrap();

    let ls = store(&system, &["ls", "/tool/test/"]);
    let names: Vec<&str> = ls.lines().skip(1).filter_map(|l| l.split_whitespace().next()).collect();
    assert_eq!(names, ["a", "b", "c"], "{ls}");
    assert!(ls.contains("n0,r7") && ls.contains("\\x00\\xff\\x78"), "{ls}");
    let tree = store(&system, &["tree", "/tool/test"]);
    let lines: Vec<&str> = tree.lines().map(|l| l.split("  (").next().unwrap()).collect();
    assert_eq!(lines[..4], ["/tool/test", "  a = one", "    deep", "  b = two"], "{tree}");
    let nodes = store_json(&system, &["tree", "/tool/test", "--depth", "1"]);
    let paths: Vec<&str> =
        nodes["nodes"].as_array().unwrap().iter().map(|n| n["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["/tool/test", "/tool/test/a", "/tool/test/b", "/tool/test/c"]);
    let c = store_json(&system, &["read", "/tool/test/c"]);
    assert_eq!(c["bytes"], serde_json::json!([0, 255, 120]));
    assert!(store(&system, &["tree"]).lines().any(|l| l.trim_start().starts_with("tool")));
    assert!(system.bh_ok(&["events"]).unwrap().contains("the administrator wrote /tool/test/a"));

    let (code, error) = refused(&system, &["read", "/tool/none"]);
    assert!(code == Some(3) && error.contains("/tool/none"), "{error}");
    let (code, error) = refused(&system, &["ls", "tool"]);
    assert!(code == Some(2) && error.contains("absolute path"), "{error}");
    let (code, error) = refused(&system, &["tree", "/", "--max-nodes", "3"]);
    assert!(code == Some(1) && error.contains("more than 3 nodes"), "{error}");
    store(&system, &["rm", "/tool/test"]);
    assert!(!xs.exists("/tool/test").unwrap());
    assert_eq!(refused(&system, &["rm", "/tool/test/a"]).0, Some(3));

    let stat = store_json(&system, &["stat"]);
    assert!(stat["nodes"].as_u64().unwrap() > 10 && stat["journal_bytes"].as_u64().unwrap() > 0, "{stat}");
    let domids: Vec<u64> =
        stat["domains"].as_array().unwrap().iter().map(|d| d["domid"].as_u64().unwrap()).collect();
    assert!(domids.contains(&0) && domids.contains(&u64::from(service_domid(&system, netback()))));
}

/// What is written in one transaction is in a snapshot as a whole or not at all, while the store is as busy as it can be.
#[test]
fn a_snapshot_is_of_one_instant() {
    let system = start();
    let xs = toolstack(&system);
    xs.write("/tool/pair/a", "0").unwrap();
    xs.write("/tool/pair/z", "0").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (xs, stop) = (xs.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut n = 0u64;
            while !stop.load(Relaxed) {
                n += 1;
                let text = n.to_string();
                xs.transaction(|tx| {
                    tx.write("/tool/pair/a", &text)?;
                    tx.write("/tool/pair/z", &text)
                })
                .unwrap();
            }
            n
        })
    };
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..40 {
        if round % 20 == 10 {
            let killed = system.kill(&["xenstored".into()]).unwrap();
            system.wait_restarted(&killed, SOON).unwrap();
        }
        let nodes = store_json(&system, &["tree", "/tool/pair"]);
        let values: Vec<&str> =
            nodes["nodes"].as_array().unwrap()[1..].iter().map(|n| n["value"].as_str().unwrap()).collect();
        assert_eq!(values[0], values[1], "half of a transaction");
        seen.insert(values[0].to_owned());
    }
    stop.store(true, Relaxed);
    let written = writer.join().unwrap();
    assert!(seen.len() > 5, "{} of {written} writes seen", seen.len());
}

#[test]
fn a_watch_goes_on_when_xenstored_or_dom0_are_killed() {
    let system = start();
    let xs = toolstack(&system);
    xs.write("/tool/watched", "0").unwrap();
    let mut watch = system
        .bh_command(&["store", "watch", "/tool/watched", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let (told, heard) = mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|l| drop(told.send(l))));
    let wait_for = |what: &str, value: Option<&str>| {
        let end = Instant::now() + SOON;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = heard
                .recv_timeout(left)
                .unwrap_or_else(|_| panic!("{what}: not told\n{}", system.log_tail(25)));
            let event: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(event["path"], "/tool/watched");
            if event["node"]["value"].as_str() == value {
                return;
            }
        }
    };
    wait_for("at once", Some("0"));
    for (round, victim) in ["xenstored", "dom0-supervisor", "xenstored"].iter().enumerate() {
        let killed = system.kill(&[(*victim).to_owned()]).unwrap();
        let value = format!("round {round}");
        xs.write("/tool/watched", &value).unwrap();
        wait_for(&format!("a change beside the kill of {victim}"), Some(&value));
        system.wait_restarted(&killed, SOON).unwrap();
        xs.write("/tool/watched", "quiet").unwrap();
        wait_for("a change after it", Some("quiet"));
    }
    xs.rm("/tool/watched").unwrap();
    wait_for("its end", None);
    watch.kill().unwrap();
    watch.wait().unwrap();
    // A client that left costs xenstored nothing: its threads end.
    let threads = || service_process(&system, "xenstored").status("Threads").unwrap().parse::<u32>().unwrap();
    until(&system, "the watch's thread ends", || threads() <= 8);
    std::thread::sleep(Duration::from_millis(10));
}

/// A guest that reaches a quota gets the error that is documented, nobody else feels it, and it can be seen and changed while it runs.
#[test]
fn quotas_are_seen_and_set_while_guests_run() {
    let system = start();
    create(&system, &probe_file("small", None));
    create(&system, &probe_file("other", None));
    let (small, other) = (Brain::of(&system, "small"), Brain::of(&system, "other"));
    let domid = domid(&system, "small");
    let quota = |name: &str| -> Value {
        let all = store_json(&system, &["quota", "small"]);
        assert_eq!(all["domid"], domid);
        all["quotas"].as_array().unwrap().iter().find(|q| q["name"] == name).cloned().unwrap()
    };
    let number = |name: &str, field: &str| quota(name)[field].as_u64().unwrap();
    assert_eq!(number("nodes", "limit"), 1000, "Xen's default");
    let global = store(&system, &["quota"]);
    assert!(global.lines().any(|l| l.starts_with("nodes") && l.contains("1000")), "{global}");

    let limit = number("nodes", "used") + 3;
    store(&system, &["quota", "small", &format!("nodes={limit}")]);
    assert_eq!(number("nodes", "limit"), limit);
    let write = |brain: &Brain, n: u64| brain.xs.write(&format!("data/{n}"), "x");
    for n in 0..3 {
        write(&small, n).unwrap();
    }
    for n in 3..8 {
        let refused = write(&small, n).unwrap_err();
        assert!(refused.is(domain_kit::xs::XsErrno::ENOSPC), "{refused}");
    }
    for n in 0..20 {
        write(&other, n).unwrap();
    }
    assert_eq!((number("nodes", "used"), number("nodes", "refused")), (limit, 5));
    // Killed, it knows the same.
    let killed = system.kill(&["xenstored".into()]).unwrap();
    system.wait_restarted(&killed, SOON).unwrap();
    assert_eq!((number("nodes", "limit"), number("nodes", "refused")), (limit, 5));
    write(&small, 9).unwrap_err();

    // As metrics, and once in the log.
    let json = system.bh_json(&["services"]).unwrap();
    let xenstored = json["services"].as_array().unwrap().iter().find(|s| s["name"] == "xenstored").unwrap();
    let counted = xenstored["counters"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["name"] == "quota_refused" && c["subject"] == format!("domain-{domid} nodes"));
    assert_eq!(counted.unwrap()["value"], 6, "{xenstored}");
    let stat = store_json(&system, &["stat"]);
    let used = stat["domains"].as_array().unwrap().iter().find(|d| d["domid"] == domid).cloned().unwrap();
    assert_eq!((used["refused"].as_u64(), used["nodes"].as_u64()), (Some(6), Some(limit)));
    let log = std::fs::read_to_string(system.dir().join("run/log/xenstored.log")).unwrap();
    let told = log.lines().filter(|l| l.contains("quota") && l.contains(&format!("domid={domid}"))).count();
    assert_eq!(told, 1, "{log}");

    // Raised, it goes on; set for those to come, they have it.
    store(&system, &["quota", "small", "nodes=0"]);
    write(&small, 9).unwrap();
    store(&system, &["quota", "nodes=777"]);
    create(&system, &probe_file("later", None));
    let _later = Brain::of(&system, "later");
    until(&system, "the new guest is known", || {
        let out = system.bh_json(&["store", "quota", "later"]);
        out.is_ok_and(|q| q["quotas"].as_array().unwrap().iter().any(|q| q["limit"] == 777))
    });
    assert_eq!(number("nodes", "limit"), 0);

    for (args, status, words) in [
        (vec!["quota", "nodez=3"], 2, "nodez"),
        (vec!["quota", "small", "nodes=many"], 2, "NAME=NUMBER"),
        (vec!["quota", "small", "nodes", "3"], 2, "bh store quota [DOMAIN]"),
        (vec!["quota", "nobody"], 3, "nobody"),
        (vec!["quota", "31999"], 3, "31999"),
    ] {
        let (code, error) = refused(&system, &args);
        assert!(code == Some(status) && error.contains(words), "{args:?}: {code:?} {error}");
    }
}

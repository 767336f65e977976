//! A guest changes its driver domain while it runs, by `bh network-move`: its TCP connection and its pings go on, and those of
//! another guest do not notice.

mod common;

use std::time::Duration;

use bulkhead_tests::load_run::{PEER_PORT, Peer};
use bulkhead_tests::outcome::totals;
use bulkhead_tests::outside::{ADDRESS, PREFIX, SECOND_UPLINK};
use bulkhead_tests::progress::Progress;
use bulkhead_tests::system::{Config, System};
use common::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SECOND: &str = "second";

fn file(n: usize) -> String {
    format!(
        "name = \"net{n}\"\ntype = \"process\"\nprogram = \"{}\"\n\
         args = [\"--ip\", \"10.77.0.{}/{PREFIX}\", \"--peer\", \"{ADDRESS}:{PEER_PORT}\", \"--ping\", \"10.77.0.{}\", \
         \"--work\", \"tcp,ping\", \"--rate\", \"2000000\", \"--ping-ms\", \"20\", \"--interval-ms\", \"100\"]\n\
         [[vif]]\nbackend = \"{}\"\nip = [\"10.77.0.{}\"]\n",
        program("process-guest").display(),
        n + 2,
        3 - n,
        netback(),
        n + 2,
    )
}

/// Both have sent, received and pinged more than now.
fn go_on(system: &System, guests: &[(Progress, bulkhead_tests::system::Console)]) {
    for (n, (progress, _)) in guests.iter().enumerate() {
        let before = totals(&progress.lock().last);
        let on = progress.wait(SOON, |seen| {
            let now = totals(&seen.last);
            now.tcp > before.tcp + 200_000 && now.pings > before.pings
        });
        assert!(on, "guest {n} stands still\n{}", system.log_tail(40));
    }
}

fn backend_of(system: &System, guest: &str) -> Vec<(u64, String)> {
    let json = system.bh_json(&["network-list", guest]).unwrap();
    let vifs = json["vifs"].as_array().unwrap();
    vifs.iter().map(|v| (v["vif"].as_u64().unwrap(), v["backend"].as_str().unwrap().to_owned())).collect()
}

#[test]
fn a_tcp_connection_outlives_a_move() {
    let mut config = Config::of_this_build().unwrap();
    config.two_uplinks = true;
    config.host_file_more = format!("[[netback]]\nname = \"{SECOND}\"\nuplink = \"{SECOND_UPLINK}\"\n");
    let system = start_with(config);
    let peer = Peer::start(&system).unwrap();
    let guests: Vec<_> = (0..2)
        .map(|n| {
            create(&system, &file(n));
            system.console(&format!("net{n}"))
        })
        .collect();
    go_on(&system, &guests);
    let number = || system.bh_json(&["network-list", "net0"]).unwrap()["vifs"][0]["devid"].clone();
    let to = |backend: &str| {
        let former = number();
        system
            .bh_ok(&["network-move", "net0", "0", "--backend", backend])
            .unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(40)));
        assert_eq!(backend_of(&system, "net0"), [(0, backend.to_owned())]);
        // A guest that has not looked at the removal yet would not see a new device in the same place.
        assert_ne!(number(), former);
        go_on(&system, &guests);
        // Whoever asks the backend by the vif's own number gets that vif.
        let file = system.dir().join("captured");
        let file = file.to_str().unwrap();
        system.bh_ok(&["capture", "net0", "0", "-w", file, "-n", "3", "--seconds", "10"]).unwrap();
    };
    // The rules of its address are at the new one before it is, and at the old one no more.
    let rules = || system.bh_json(&["network-rules", "net0"]).unwrap()["sets"][0].clone();
    let at = |backend: &str| {
        let path = format!("/local/domain/{}/qubes-firewall/10_77_0_2", service_domid(&system, backend));
        system.bh_ok(&["store", "read", &path]).is_ok()
    };
    system.bh_ok(&["network-rules", "net0", "--add", "action=accept dst4=10.77.0.0/24"]).unwrap();
    let set = rules();
    assert_eq!((set["policy"].as_str(), set["rules"].as_array().map(Vec::len)), (Some("drop"), Some(1)));
    to(SECOND);
    assert_eq!((rules(), at(SECOND), at(netback())), (set.clone(), true, false));
    to(netback());
    assert_eq!((rules(), at(SECOND), at(netback())), (set, false, true));
    to(SECOND);
    // The driver domain hangs for good: nobody is left there who could let go.
    let hung = service_process(&system, SECOND);
    kill(Pid::from_raw(hung.0), Signal::SIGSTOP).unwrap();
    to(netback());
    kill(Pid::from_raw(hung.0), Signal::SIGKILL).unwrap();

    // A second device, and away with it.
    until(&system, "the second netback is back", || {
        system.services().unwrap().get(SECOND).is_some_and(|s| s.state == "running" && s.generation > 1)
    });
    let attached =
        system.bh_json(&["network-attach", "net0", "--backend", SECOND, "--ip", "10.77.0.9"]).unwrap();
    assert_eq!(attached["vif"], 1);
    assert_eq!(backend_of(&system, "net0"), [(0, netback().to_owned()), (1, SECOND.to_owned())]);
    for (args, why) in [
        (["network-move", "net0", "1", "--backend", SECOND], "already"),
        (["network-move", "net0", "7", "--backend", SECOND], "no vif 7"),
        (["network-move", "net0", "0", "--backend", "third"], "no [[netback]] third"),
    ] {
        let error = format!("{:#}", system.bh_ok(&args).unwrap_err());
        assert!(error.contains(why), "{error}");
    }
    system.bh_ok(&["network-detach", "net0", "1", "--force"]).unwrap();
    assert_eq!(backend_of(&system, "net0"), [(0, netback().to_owned())]);
    go_on(&system, &guests);

    for (n, (progress, _)) in guests.iter().enumerate() {
        let seen = progress.lock();
        let tcp = &seen.last["tcp"];
        assert_eq!(
            (tcp["connects"].as_u64(), tcp["resets"].as_u64(), tcp["corrupt"].as_u64()),
            (Some(1), Some(0), Some(0)),
            "guest {n}"
        );
        assert_eq!(seen.boots, 1);
        let gap =
            seen.lines.iter().filter_map(|(_, line)| line["tcp"]["max_gap_ms"].as_f64()).fold(0.0, f64::max);
        println!("guest {n}: longest silence on its TCP stream {gap:.0} ms");
        // The one that stays hears nothing of it.
        assert!(n == 0 || gap < Duration::from_secs(2).as_millis() as f64, "guest {n}: {gap} ms of silence");
    }
    peer.stop();
}

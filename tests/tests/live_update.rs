//! xenstored replaced under the running system: by a live update, which nobody notices, and on disk, which counts only from then on.

mod common;

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_tests::system::{Config, System};
use common::*;
use domain_kit::xs::{SocketTransport, WatchSet, XsClient, XsOps};

/// A client whose connection, once lost, stays lost.
fn toolstack(system: &System) -> XsClient {
    let stream = UnixStream::connect(system.dir().join("run/xenstored.sock")).unwrap();
    XsClient::connect(SocketTransport::connected(stream).unwrap(), SOON).unwrap()
}

fn generation(system: &System) -> u64 {
    system.services().unwrap()["xenstored"].generation
}

fn one_event(system: &System, watch: &WatchSet, path: &str) {
    let event = watch.next_timeout(SOON);
    assert_eq!(event.map(|e| e.path), Some(path.to_owned()), "{}", system.log_tail(25));
    assert!(watch.next_timeout(Duration::from_millis(50)).is_none(), "{path}: told twice");
}

#[test]
fn nobody_notices_a_live_update() {
    let system = start();
    create(&system, &loaded_guest_file("load", &image(&system, "load.img", 64 << 20)));
    create(&system, &probe_file("guest", None));
    let guest = Brain::of(&system, "guest");
    let (client, admin) = (toolstack(&system), toolstack(&system));
    let (by_socket, by_ring) = (client.watch_set().unwrap(), guest.xs.watch_set().unwrap());
    by_socket.watch("/tool/live", "token").unwrap();
    one_event(&system, &by_socket, "/tool/live");
    by_ring.watch("data/live", "token").unwrap();
    one_event(&system, &by_ring, "data/live");
    let restarts = |name: &str| system.services().unwrap()[name].generation;
    let blkback = restarts(&blkback_of("load"));
    // The journal, and the migration stream in both versions.
    for (round, options) in [&[][..], &["-v", "2"], &["-v", "1"], &["-F", "-t", "5"]].into_iter().enumerate()
    {
        let before = generation(&system);
        let text = round.to_string();
        let mut updated = false;
        client
            .transaction(|tx| {
                tx.write("/tool/live", &text)?;
                if !std::mem::replace(&mut updated, true) {
                    // As xenstore-control does it.
                    assert_eq!(admin.control(&["live-update", "-f", "/xenstored"]).unwrap(), "OK");
                    let start = [&["live-update", "-s"], options].concat();
                    assert_eq!(admin.control(&start).unwrap(), "OK", "{}", system.log_tail(25));
                }
                tx.write("/tool/live-too", &text)
            })
            .unwrap_or_else(|e| panic!("{options:?}: {e}\n{}", system.log_tail(25)));
        assert!(updated && generation(&system) > before, "{options:?}: another process serves");
        one_event(&system, &by_socket, "/tool/live");
        assert_eq!(admin.read_string("/tool/live-too").unwrap(), text);
        guest.xs.write("data/live", &text).unwrap();
        one_event(&system, &by_ring, "data/live");
        let home = format!("/local/domain/{}/data/live", guest.domain.domid());
        assert_eq!(client.read_string(&home).unwrap(), text);
        still_works(&system, "load");
    }
    assert_eq!(system.log_tail(200).matches("stream taken over").count(), 2);
    assert_eq!(client.control(&["check"]).unwrap(), "OK");
    assert_eq!(restarts(&blkback_of("load")), blkback, "nothing else was restarted");
}

/// An upgrade puts another program in xenstored's place. A kill before the live update brings the old one back: it alone is sure
/// to run its journal again as it was.
#[test]
fn a_replaced_program_counts_from_the_live_update_on() {
    let mut config = Config::of_this_build().unwrap();
    let bin = tempfile::tempdir().unwrap();
    for name in ["hv-core", "dom0-supervisor", "bh", "xenstored", "console-backend", "blkback", "netback"] {
        fs::copy(config.bin_dir.join(name), bin.path().join(name)).unwrap();
    }
    config.bin_dir = bin.path().into();
    let system = start_with(config);
    let client = toolstack(&system);
    let place = bin.path().join("xenstored");
    let replace = |with: &str| {
        let new = bin.path().join("new");
        fs::copy(bin.path().join(with), &new).unwrap();
        fs::rename(&new, &place).unwrap();
    };
    fs::copy(&place, bin.path().join("right")).unwrap();
    // No xenstored at all: it would end at once.
    replace("bh");
    for round in 0..3 {
        let killed = system.kill(&["xenstored".into()]).unwrap();
        client
            .write("/tool/round", round.to_string())
            .unwrap_or_else(|e| panic!("{e}\n{}", system.log_tail(25)));
        system.wait_restarted(&killed, SOON).unwrap();
    }
    replace("right");
    let before = generation(&system);
    // It ends by itself, and what is there now is started.
    system.bh_ok(&["restart", "xenstored"]).unwrap();
    assert!(generation(&system) > before);
    assert_eq!(client.read_string("/tool/round").unwrap(), "2");
}

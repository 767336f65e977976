//! A journal that is used up: who needs room is told, everybody else is served, and room that is made is used.

mod common;

use std::time::Duration;

use common::Daemon;
use domain_kit::xs::{XsClient, XsErrno, XsError, XsOps};

#[test]
fn a_full_journal_refuses_and_goes_on() {
    let mut daemon = Daemon::with_args(&["--journal-mib", "1"]);
    let xs = XsClient::connect_socket(daemon.socket(), Duration::from_secs(20)).expect("connect");
    let value = "v".repeat(4000);
    xs.write("/small", "1").expect("room");
    let mut made = 0;
    let refused = loop {
        match xs.write(&format!("/big/{made}"), &value) {
            Ok(()) => made += 1,
            Err(e) => break e,
        }
        assert!(made < 10_000, "4 MiB hold no more than that");
    };
    assert!(matches!(refused, XsError::Errno(XsErrno::ENOMEM)), "{refused}");
    assert!(made > 500, "{made}");
    // Nobody else feels it, connections come and go, and the state is whole.
    for _ in 0..50 {
        let other = XsClient::connect_socket(daemon.socket(), Duration::from_secs(20)).expect("connect");
        assert_eq!(other.read("/small").expect("served"), b"1");
    }
    assert_eq!(xs.control(&["check"]).expect("served"), "OK");
    daemon.restart();
    let xs = XsClient::connect_socket(daemon.socket(), Duration::from_secs(20)).expect("connect");
    assert_eq!(xs.read(&format!("/big/{}", made - 1)).expect("kept"), value.as_bytes());
    xs.rm("/big").expect("making room needs none");
    // Memory comes back bit by bit.
    let again = (0..made).filter(|i| xs.write(&format!("/again/{i}"), &value).is_ok()).count();
    assert!(again > made / 2, "{again} of {made}");
    assert_eq!(xs.control(&["check"]).expect("served"), "OK");
}

//! Creation, restarts, ends.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hv_abi::*;
use proto::hvcore::event::Kind;
use proto::hvcore::*;

use crate::system::{System, hv_core_command, until};

pub fn first_steps() {
    let mut system = System::start();
    let dom = system.create(System::request("svc", &[Role::Backend, Role::Xenstore]));
    let hello = dom.hv().hello().unwrap();
    assert_eq!((hello.domid, hello.generation), (dom.id, 1));
    assert_eq!(hello.roles, ROLE_BACKEND | ROLE_XENSTORE);
    assert_eq!((hello.xenstore_domid, hello.console_domid), (dom.id, DOMID_INVALID));
    assert_eq!((hello.instance, hello.prev_exit.how), (dom.instance, EXIT_NONE));
    let version = system.call(|mut c| async move { c.version(VersionRequest {}).await }).unwrap();
    assert_eq!(version.memory_total_bytes, 4096 << 20);
    println!("NOTE lacks {}", version.missing.len());
    system.kill(&dom);
    let hello = dom.hv().hello().unwrap();
    assert_eq!((hello.generation, hello.prev_exit.how, hello.prev_exit.code), (2, EXIT_SIGNAL, 9));
    assert!(hello.prev_exit_ns > 0);
}

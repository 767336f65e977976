//! The guest's first serial line on the domain's PV console, so that its history, `bh console` and a killed console backend are as for any
//! guest.
//!
//! The line is a socket pair: one end is QEMU's, the other lies in the fd store. What the guest writes while no incarnation lives waits
//! in the socket (about 200 KB); what this process had in its hands when it was killed (256 bytes at most) is lost.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use domain_kit::{Domain, Hypercall};
use frontends::console::Console;
use hv_abi::fd_kind;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use serde_json::json;

use crate::qmp::{Qmp, QmpError};

/// QEMU's name of the line, as its command line has it.
pub const CHARDEV: &str = "serial0";
/// In the fd store.
const KEPT: &str = "serial";
/// What is moved at once.
const CHUNK: usize = 256;

/// Why there is no line.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// hv-core.
    #[error(transparent)]
    Hypercall(#[from] domain_kit::HvError),
    /// The console ring.
    #[error(transparent)]
    Ring(#[from] domain_kit::grants::GrantError),
    /// QEMU.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The sockets.
    #[error("serial line: {0}")]
    Os(#[from] Errno),
}

/// Our end of the line: a predecessor's, or a new one if QEMU has none.
///
/// # Errors
/// [`SerialError`].
pub fn open(hv: &Hypercall, qmp: &Qmp) -> Result<OwnedFd, SerialError> {
    let chardevs = qmp.call("query-chardev", json!({}))?;
    let connected = chardevs.as_array().is_some_and(|all| {
        all.iter().any(|c| c["label"] == CHARDEV && c["filename"].as_str().is_some_and(|f| f != "null"))
    });
    if connected && let Ok((_, fd)) = hv.fd_get(KEPT) {
        return Ok(fd);
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
    // Kept first: a line that QEMU has and nobody else would be lost.
    hv.fd_put(KEPT, fd_kind::SOCKET, 0, &ours)?;
    qmp.give_fd("serial", theirs.as_fd())?;
    let address = json!({ "type": "fd", "data": { "str": "serial" } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    qmp.call("chardev-change", json!({ "id": CHARDEV, "backend": backend }))?;
    Ok(ours)
}

/// Moves bytes between the line and the console until the line's other end is closed.
///
/// # Errors
/// [`SerialError`].
pub fn relay(domain: &Domain, line: &OwnedFd) -> Result<(), SerialError> {
    let mut console = loop {
        match Console::open(domain)? {
            Some(console) => break console,
            None => std::thread::sleep(Duration::from_secs(1)),
        }
    };
    let mut typed = Vec::new();
    loop {
        console.clear();
        if typed.len() < 4096 {
            console.read(&mut typed);
        }
        while !typed.is_empty() {
            match send(std::os::fd::AsRawFd::as_raw_fd(line), &typed, MsgFlags::MSG_NOSIGNAL) {
                Ok(n) => drop(typed.drain(..n)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(e) => return Err(e.into()),
            }
        }
        let room = console.room().min(CHUNK);
        let mut bytes = [0; CHUNK];
        let mut moved = false;
        if room > 0 {
            match recv(std::os::fd::AsRawFd::as_raw_fd(line), &mut bytes[..room], MsgFlags::empty()) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    console.write_some(&bytes[..n]);
                    moved = true;
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if moved {
            continue;
        }
        let mut wanted = PollFlags::empty();
        if room > 0 {
            wanted |= PollFlags::POLLIN;
        }
        if !typed.is_empty() {
            wanted |= PollFlags::POLLOUT;
        }
        let mut fds = [PollFd::new(line.as_fd(), wanted), PollFd::new(console.event(), PollFlags::POLLIN)];
        // The console's backend may have been killed before it told us that there is room.
        let timeout = if room > 0 { PollTimeout::NONE } else { PollTimeout::from(50u8) };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

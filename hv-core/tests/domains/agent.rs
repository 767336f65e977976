//! What runs inside a domain. It obeys one-byte orders on its control socket (fd 4); above all it hands its hypercall socket
//! out, so that a test can speak as the domain.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use crate::raw;
use domain_kit::Hypercall;
use domain_kit::mem::SharedMem;
use domain_kit::os::take_inherited;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Sends bytes with descriptors.
pub fn send_fds(stream: &UnixStream, bytes: &[u8], fds: &[&OwnedFd]) {
    let raw: Vec<i32> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let sent =
        sendmsg::<()>(stream.as_raw_fd(), &[io::IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
    sent.expect("sendmsg");
}

/// Receives bytes and at most one descriptor.
pub fn recv_fd(stream: &UnixStream, buffer: &mut [u8]) -> (usize, Option<OwnedFd>) {
    let mut space = nix::cmsg_space!([i32; 4]);
    let mut into = [io::IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut into, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
        .expect("recvmsg");
    let mut fd = None;
    for control in message.cmsgs().expect("control messages") {
        if let ControlMessageOwned::ScmRights(fds) = control {
            fd = fds.into_iter().map(raw::own).next();
        }
    }
    (message.bytes, fd)
}

/// The agent's main.
pub fn run(args: &[String]) -> ! {
    let hypercall = take_inherited(3).expect("fd 3");
    let listener = UnixListener::from(take_inherited(4).expect("fd 4"));
    match args.first().map(String::as_str) {
        Some("dom0") => dom0(hypercall),
        Some("exit") => std::process::exit(7),
        _ => obey(&hypercall, &listener),
    }
}

/// A bridge from the "toolstack" listener to hv-core's control stream, one client at a time and one in a life.
fn dom0(hypercall: OwnedFd) -> ! {
    let control = UnixStream::from(take_inherited(5).expect("fd 5"));
    let hv = Hypercall::new(hypercall);
    let (_, listener) = hv.resource_open("toolstack").expect("toolstack");
    let (client, _) = UnixListener::from(listener).accept().expect("accept");
    let copy = |mut from: UnixStream, mut to: UnixStream| {
        let _until_closed = io::copy(&mut from, &mut to);
        std::process::exit(0);
    };
    let (client2, control2) = (client.try_clone().expect("dup"), control.try_clone().expect("dup"));
    std::thread::spawn(move || copy(client2, control2));
    copy(control, client);
    unreachable!()
}

fn obey(hypercall: &OwnedFd, listener: &UnixListener) -> ! {
    let mut kept: Vec<Box<dyn std::any::Any>> = Vec::new();
    loop {
        let (mut stream, _) = listener.accept().expect("accept");
        let mut order = [0; 64];
        loop {
            let (len, fd) = recv_fd(&stream, &mut order);
            if len == 0 {
                break;
            }
            match order[0] {
                b'f' => send_fds(&stream, b"f", &[hypercall]),
                b'p' => std::process::exit(101),
                b'x' => std::process::exit(3),
                b'a' => std::process::abort(),
                // Keeps a mapping (and with 'K' the descriptor too) of what it was given.
                b'k' | b'K' => {
                    let fd = fd.expect("a descriptor");
                    kept.push(Box::new(SharedMem::map(&fd, 4096).expect("map")));
                    if order[0] == b'K' {
                        kept.push(Box::new(fd));
                    }
                    stream.write_all(b"k").expect("answer");
                }
                b'd' => {
                    kept.clear();
                    stream.write_all(b"d").expect("answer");
                }
                // What can be seen from here, as text.
                b'l' => {
                    let text = look();
                    stream.write_all(&(text.len() as u32).to_le_bytes()).expect("answer");
                    stream.write_all(text.as_bytes()).expect("answer");
                }
                // A call outside of the filter.
                b's' => {
                    let number = i64::from(order[1]) | i64::from(order[2]) << 8;
                    let result = raw::call(number);
                    stream.write_all(&[result as u8]).expect("answer");
                }
                // Reads memory at a mapped granted page: first byte of what was given.
                b'r' => {
                    let mem = SharedMem::map(fd.expect("a descriptor"), 4096).expect("map");
                    let mut byte = [0];
                    mem.copy_out(0, &mut byte);
                    stream.write_all(&byte).expect("answer");
                }
                other => panic!("order {other}"),
            }
        }
    }
}

fn look() -> String {
    let mut text = String::new();
    let mut say = |line: String| text.push_str(&(line + "\n"));
    for entry in std::fs::read_dir("/").expect("/").flatten() {
        say(format!("entry {}", entry.file_name().to_string_lossy()));
    }
    say(format!("pid {}", std::process::id()));
    say(format!("uid {}", nix::unistd::getuid()));
    say(format!("write-root {}", File::create("/x").is_err()));
    for n in 0..64 {
        if raw::is_open(n) {
            say(format!("fd {n}"));
        }
    }
    say(format!(
        "host {}",
        nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default()
    ));
    let event =
        nix::sys::eventfd::EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_NONBLOCK).expect("eventfd");
    let set = |flags| nix::fcntl::fcntl(&event, nix::fcntl::FcntlArg::F_SETFL(flags));
    say(format!("set-nonblocking {:?}", set(nix::fcntl::OFlag::O_NONBLOCK)));
    say(format!("clear-nonblocking {:?}", set(nix::fcntl::OFlag::empty())));
    // Let pass for files' sake; an eventfd has no direct I/O, and keeps all its flags.
    say(format!("direct {:?}", set(nix::fcntl::OFlag::O_DIRECT)));
    let flags = nix::fcntl::fcntl(&event, nix::fcntl::FcntlArg::F_GETFL).expect("F_GETFL");
    say(format!("still {}", flags & nix::fcntl::OFlag::O_NONBLOCK.bits() != 0));
    // FIONBIO, to clear as to set.
    let stream = UnixStream::from(OwnedFd::from(event));
    say(format!("fionbio {:?}", stream.set_nonblocking(false).map_err(|e| e.kind())));
    drop(stream);
    let mut null = [0; 1];
    say(format!("stdin {}", io::stdin().read(&mut null).unwrap_or(9)));
    text
}

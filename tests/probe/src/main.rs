//! A process domain that obeys a test. One order, a line of text, comes on each connection to its control socket (fd 4); the
//! answer is text until the end of the connection. What an order tries is tried from inside of the sandbox; `fd` hands out
//! the hypercall socket, so that a test can speak as this domain.

mod raw;

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use anyhow::{Context, Result};
use domain_kit::os::take_inherited;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockType, sendmsg, socket};

fn main() -> Result<()> {
    let hypercall = take_inherited(hv_abi::HYPERCALL_FD).context("descriptor 3: not started by hv-core")?;
    let listener = take_inherited(hv_abi::CONTROL_LISTENER_FD).context("descriptor 4")?;
    // Kept where a test can find it in this process's memory: `--secret TEXT`.
    let args: Vec<String> = std::env::args().collect();
    println!("probe up, {} arguments", args.len());
    for stream in UnixListener::from(listener).incoming() {
        let mut stream = stream.context("accept")?;
        let mut order = String::new();
        BufReader::new(stream.try_clone()?).read_line(&mut order)?;
        let words: Vec<&str> = order.split_whitespace().collect();
        if words == ["fd"] {
            hand_out(&stream, &hypercall)?;
            continue;
        }
        let answer = obey(&words).unwrap_or_else(|e| format!("bad order: {e:#}"));
        // The test may have left.
        let _ = stream.write_all(answer.as_bytes());
    }
    Ok(())
}

fn hand_out(stream: &UnixStream, fd: &OwnedFd) -> Result<()> {
    let raw = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&raw)];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(b"f")], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// "ok" or the errno's name.
fn outcome<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "ok".into(),
        Err(e) => match e.raw_os_error() {
            Some(n) => format!("{:?}", nix::errno::Errno::from_raw(n)),
            None => e.to_string(),
        },
    }
}

fn obey(words: &[&str]) -> Result<String> {
    Ok(match *words {
        ["open", path] => outcome(File::open(path)),
        ["create", path] => outcome(File::create(path)),
        ["list", path] => match std::fs::read_dir(path) {
            Ok(entries) => {
                let names = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
                names.collect::<Vec<_>>().join(" ")
            }
            Err(e) => outcome::<()>(Err(e)),
        },
        ["unix", path] => outcome(UnixStream::connect(path)),
        ["abstract", name] => {
            outcome(SocketAddr::from_abstract_name(name).and_then(|a| UnixStream::connect_addr(&a)))
        }
        ["connect", address] => outcome(TcpStream::connect(address)),
        // Raw packets of an interface: ETH_P_ALL.
        ["raw-socket"] => {
            let ethernet = nix::sys::socket::SockProtocol::EthAll;
            let flags = nix::sys::socket::SockFlag::empty();
            outcome(socket(AddressFamily::Packet, SockType::Raw, flags, ethernet).map_err(Into::into))
        }
        ["interfaces"] => match nix::net::if_::if_nameindex() {
            Ok(all) => {
                let names = all.iter().map(|i| i.name().to_string_lossy().into_owned());
                names.collect::<Vec<_>>().join(" ")
            }
            Err(e) => outcome::<()>(Err(e.into())),
        },
        ["write", path, text] => outcome(std::fs::write(path, text)),
        ["fds"] => (0..64).filter(|n| raw::is_open(*n)).map(|n| n.to_string()).collect::<Vec<_>>().join(" "),
        ["pid"] => std::process::id().to_string(),
        ["env"] => std::env::vars().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join("\n"),
        ["syscall", number, ref args @ ..] => {
            let number = number.parse()?;
            let mut values = [0; 3];
            for (value, text) in values.iter_mut().zip(args) {
                *value = text.parse()?;
            }
            outcome(raw::call(number, values))
        }
        // io_uring's operations pass no system-call filter.
        ["uring-open", path] => outcome(raw::uring_open(path)),
        ["uring-connect", address] => outcome(raw::uring_connect(address.parse()?)),
        _ => anyhow::bail!("unknown: {words:?}"),
    })
}

//! xenstore round trips beside a bare Unix-socket echo of the same sizes.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domain_kit::xs::Op;
use serde_json::json;

use super::super::world::World;
use super::super::{Settings, or_missing};
use crate::peers::echo::Echo;
use crate::peers::helper::{pin, unpin};
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;
use crate::wire::Remote;

/// Round trips in each turn.
const ROUND_TRIPS: u32 = 1_000;
/// Bytes of the value: a device node's, and a long one.
const SIZES: [usize; 2] = [16, 1024];
/// Bytes of a message's header (io/xs_wire.h).
const HEADER: usize = 16;

const NAMES: &[(&str, &str, &str)] =
    &[("store read, socket, 16 B", "us", ""), ("store read, ring, 16 B", "us", "")];

/// All lines of the case.
pub fn run(settings: &Settings, world: &mut Result<World>) -> Vec<Line> {
    or_missing(NAMES, super::super::borrowed(world).and_then(|world| lines(settings, world)))
}

fn lines(settings: &Settings, world: &mut World) -> Result<Vec<Line>> {
    let socket = RefCell::new(Socket::connect(&world.system.dir().join("run/xenstored.sock"))?);
    let echo = RefCell::new(Echo::start()?);
    let services = world.system.services()?;
    let xenstored = services.get("xenstored").context("no xenstored among the services")?;
    let guest_pid = world.guest_pid()?;
    let guest = RefCell::new(&mut world.guest);
    let domid = guest.borrow_mut().number(&json!({"cmd": "info"}), "domid")? as u16;
    let others = [xenstored.pid, guest_pid, echo.borrow().helper.pid(), own_pid()];
    // What is compared is work, not how long an idle processor takes to wake up, which in a virtual machine is far longer.
    others.iter().try_for_each(|&pid| pin(pid, 0))?;
    let result = contests(settings, &socket, &guest, &echo, domid);
    others.iter().try_for_each(|&pid| unpin(pid))?;
    result
}

fn own_pid() -> i32 {
    std::process::id().cast_signed()
}

fn contests(
    settings: &Settings,
    socket: &RefCell<Socket>,
    guest: &RefCell<&mut Remote>,
    echo: &RefCell<Echo>,
    domid: u16,
) -> Result<Vec<Line>> {
    let ring_path = format!("/local/domain/{domid}/data/bench");
    let mut lines = Vec::new();
    for write in [false, true] {
        let op = if write { "write" } else { "read" };
        for size in SIZES {
            for over_ring in [false, true] {
                let path = if over_ring { &ring_path } else { PATH };
                let (request, reply) = match write {
                    true => (HEADER + path.len() + 1 + size, HEADER + 3),
                    false => (HEADER + path.len() + 1, HEADER + size),
                };
                let command = json!({"cmd": "store", "op": op, "size": size, "count": ROUND_TRIPS});
                let series = take_turns(
                    settings.rounds,
                    &mut [
                        Contestant::new("xenstored", || match over_ring {
                            true => guest.borrow_mut().number(&command, "us"),
                            false => socket.borrow_mut().round_trips(write, size),
                        }),
                        Contestant::new("echo", || {
                            echo.borrow_mut().round_trips(request, reply, ROUND_TRIPS)
                        }),
                    ],
                )?;
                let [ours, limit]: [Series; 2] =
                    series.try_into().ok().context("as many series as contestants")?;
                let way = if over_ring { "ring" } else { "socket" };
                let name = format!("store {op}, {way}, {size} B");
                let line = Line::beside(&name, "us", &ours, ("socket echo", &limit), Goal::None);
                lines.push(line.note("all processes on one processor"));
            }
        }
    }
    Ok(lines)
}

/// The node that the socket's round trips use.
const PATH: &str = "/tool/bulkhead-bench/node";

/// A client without threads, so that what is measured is xenstored.
struct Socket(UnixStream);

impl Socket {
    fn connect(path: &Path) -> Result<Socket> {
        let stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Socket(stream))
    }

    fn call(&mut self, request: &[u8], reply: &mut [u8]) -> Result<()> {
        self.0.write_all(request)?;
        self.0.read_exact(reply)?;
        ensure!(reply[..4] == request[..4], "xenstored answered with an error");
        Ok(())
    }

    fn round_trips(&mut self, write: bool, size: usize) -> Result<f64> {
        let value = vec![b'x'; size];
        let write_request = message(Op::Write, &[PATH.as_bytes(), b"\0", &value]);
        let mut ok = [0; HEADER + 3];
        self.call(&write_request, &mut ok)?;
        let read_request = message(Op::Read, &[PATH.as_bytes(), b"\0"]);
        let mut reply = vec![0; HEADER + size];
        let start = Instant::now();
        for _ in 0..ROUND_TRIPS {
            match write {
                true => self.call(&write_request, &mut ok)?,
                false => self.call(&read_request, &mut reply)?,
            }
        }
        Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(ROUND_TRIPS))
    }
}

/// A request with req_id and tx_id 0.
fn message(op: Op, parts: &[&[u8]]) -> Vec<u8> {
    let body: Vec<u8> = parts.concat();
    let mut out = Vec::with_capacity(HEADER + body.len());
    for word in [op as u32, 0, 0, body.len() as u32] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    out.extend_from_slice(&body);
    out
}

//! Requests: one client's latency, many in flight, many clients.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domain_kit::xs::Op;

use super::arena::Arena;
use super::conn::{Conn, ERROR, request};
use super::daemons::Who;
use super::fleet::{Member, Script, drive};
use super::turns::{Better, Target, take_turns};
use crate::peers::store_echo::VALUE;
use crate::report::Line;
use crate::stats::Series;

/// The node that is read and written.
const NODE: &str = "/tool/bench/node";
/// Requests timed in a turn.
const TIMED: usize = 2_000;
/// Requests of a turn with many in flight.
const PIPELINED: u32 = 20_000;
/// How many are in flight.
const DEPTH: u32 = 32;
/// How long a turn with many clients takes.
pub const SPAN: Duration = Duration::from_millis(300);
/// How many they are.
pub const CLIENTS: usize = 16;

/// One client, one request at a time: the median time of a READ and the daemon's processor time for it.
pub fn one_client(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let whos = arena.with_echo();
    let conns = RefCell::new(BTreeMap::new());
    let results = arena.on_one_processor(|| {
        take_turns(arena.rounds(), &whos, |who| {
            let mut conns = conns.borrow_mut();
            let conn = connection(&mut conns, arena, who)?;
            let mut bytes = Vec::new();
            request(Op::Read, 0, &[NODE.as_bytes(), b"\0"], &mut bytes);
            let before = arena.daemon(who)?.cpu()?;
            let mut times = Series::default();
            for _ in 0..TIMED {
                let start = Instant::now();
                conn.send(&bytes)?;
                let (kind, payload) = conn.message()?;
                times.push(start.elapsed().as_secs_f64() * 1e6);
                ensure!(kind != ERROR && payload.len() == VALUE, "a READ failed");
            }
            let cpu = arena.daemon(who)?.cpu()? - before;
            Ok(vec![times.median(), cpu.as_secs_f64() * 1e6 / TIMED as f64])
        })
    })?;
    let line = |name, figure, target| results.line(name, "us", figure, Better::Lower, target);
    Ok(vec![
        line("READ, one client, p50", 0, Target::AtMost(1.35, Who::Echo)),
        line("CPU time of a READ", 1, Target::Best(1.5)),
    ])
}

fn connection<'a>(conns: &'a mut BTreeMap<Who, Conn>, arena: &Arena<'_>, who: Who) -> Result<&'a mut Conn> {
    if let std::collections::btree_map::Entry::Vacant(entry) = conns.entry(who) {
        let mut conn = Conn::connect(&arena.daemon(who)?.socket)?;
        conn.write(NODE, &[b'x'; VALUE])?;
        entry.insert(conn);
    }
    conns.get_mut(&who).context("just made")
}

/// One client, 32 requests in flight.
pub fn in_flight(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let whos = arena.with_echo();
    let conns = RefCell::new(BTreeMap::new());
    let mut lines = Vec::new();
    for (op, name) in [(Op::Read, "READ, 32 in flight"), (Op::Write, "WRITE, 32 in flight")] {
        let results = arena.on_two_processors(|| {
            take_turns(arena.rounds(), &whos, |who| {
                let mut conns = conns.borrow_mut();
                let conn = connection(&mut conns, arena, who)?;
                let start = Instant::now();
                conn.pipeline(PIPELINED, DEPTH, |_, out| node_request(op, NODE, out))?;
                Ok(vec![f64::from(PIPELINED) / start.elapsed().as_secs_f64() / 1e3])
            })
        })?;
        lines.push(results.line(name, "kop/s", 0, Better::Higher, Target::AtLeast(4.0, Who::C)));
    }
    Ok(lines)
}

fn node_request(op: Op, path: &str, out: &mut Vec<u8>) {
    match op {
        Op::Read => request(op, 0, &[path.as_bytes(), b"\0"], out),
        _ => request(op, 0, &[path.as_bytes(), b"\0", &[b'x'; VALUE]], out),
    }
}

/// A client that repeats one request.
struct Repeat {
    bytes: Vec<u8>,
    done: u64,
}

impl Script for Repeat {
    fn next(&mut self, reply: Option<(u32, &[u8])>, out: &mut Vec<u8>) -> Result<()> {
        if let Some((kind, payload)) = reply {
            ensure!(kind != ERROR, "{}", String::from_utf8_lossy(payload));
            self.done += 1;
        }
        out.extend_from_slice(&self.bytes);
        Ok(())
    }

    fn rests(&self) -> bool {
        true
    }
}

/// 16 clients, each waiting for its reply, each with a node of its own.
pub fn many_clients(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (op, name) in [(Op::Read, "READ, 16 clients"), (Op::Write, "WRITE, 16 clients")] {
        let results = arena.on_one_processor(|| {
            take_turns(arena.rounds(), &arena.with_echo(), |who| {
                let socket = &arena.daemon(who)?.socket;
                let mut members = Vec::new();
                for client in 0..CLIENTS {
                    let path = format!("/tool/bench/client{client:02}");
                    Conn::connect(socket)?.write(&path, &[b'x'; VALUE])?;
                    let mut bytes = Vec::new();
                    node_request(op, &path, &mut bytes);
                    members.push(Member::connect(socket, Repeat { bytes, done: 0 })?);
                }
                let took = drive(&mut members, SPAN)?;
                let done: u64 = members.iter().map(|m| m.script.done).sum();
                Ok(vec![done as f64 / took.as_secs_f64() / 1e3])
            })
        })?;
        lines.push(results.line(name, "kop/s", 0, Better::Higher, Target::Best(1.5)));
    }
    Ok(lines)
}

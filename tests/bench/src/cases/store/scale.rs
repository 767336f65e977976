//! One client's latency beside many watches, many connections and many domains: it must not notice them.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use domain_kit::xs::Op;

use super::arena::Arena;
use super::conn::{Conn, ERROR, request};
use super::daemons::{Daemon, Who};
use crate::peers::helper::{Helper, Role, pin, unpin};
use crate::report::{Goal, Line};
use crate::stats::Series;

/// Watches beside the client.
const WATCHES: u32 = 100_000;
/// Connections that hold them.
const WATCHERS: u32 = 100;
/// Connections beside the client.
const CONNECTIONS: usize = 2_000;
/// Domains beside the client's.
const DOMAINS: usize = 2_000;
/// Requests timed in a turn.
const TIMED: usize = 1_000;
/// How much of a difference is none.
const FLAT: f64 = 1.15;
/// The client's node, which some watch of the many is on.
const NODE: &str = "/scale/w00/n0000";

/// Median time of a request, µs.
fn p50(conn: &mut Conn, op: Op) -> Result<f64> {
    let mut bytes = Vec::new();
    let value: &[u8] = if op == Op::Write { &[b'x'; 16] } else { b"" };
    request(op, 0, &[NODE.as_bytes(), b"\0", value], &mut bytes);
    let mut times = Series::default();
    for _ in 0..TIMED {
        let start = Instant::now();
        conn.send(&bytes)?;
        let (kind, _) = conn.message()?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
        ensure!(kind != ERROR, "a request failed");
    }
    Ok(times.median())
}

fn flat(name: &str, crowded: &Series, alone: &Series) -> Line {
    Line::beside(name, "us", crowded, ("alone", alone), Goal::RatioAtMost(FLAT))
}

/// Ours alone beside ours with a crowd, turn by turn.
fn beside_crowd(
    arena: &Arena<'_>,
    ops: &[(Op, &str)],
    crowd: impl FnOnce(&Daemon) -> Result<Vec<Conn>>,
) -> Result<Vec<Line>> {
    let (alone, crowded) = (arena.fresh(Who::Ours)?, arena.fresh(Who::Ours)?);
    let _crowd = crowd(&crowded)?;
    let mut conns = Vec::new();
    for daemon in [&alone, &crowded] {
        let mut conn = Conn::connect(&daemon.socket)?;
        conn.write(NODE, b"x")?;
        conns.push(conn);
        pin(daemon.pid(), 0)?;
    }
    let me = std::process::id().cast_signed();
    pin(me, 0)?;
    let mut lines = Vec::new();
    for (op, name) in ops {
        let mut series = [Series::default(), Series::default()];
        for _ in 0..arena.rounds() {
            for (conn, series) in conns.iter_mut().zip(&mut series) {
                series.push(p50(conn, *op)?);
            }
        }
        lines.push(flat(name, &series[1], &series[0]));
    }
    unpin(me)?;
    Ok(lines)
}

/// All lines.
pub fn lines(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let reads =
        [(Op::Read, "READ p50 beside 100,000 watches"), (Op::Write, "WRITE p50 beside 100,000 watches")];
    let mut lines = beside_crowd(arena, &reads, |daemon| {
        let mut conns = Vec::new();
        for watcher in 0..WATCHERS {
            let mut conn = Conn::connect(&daemon.socket)?;
            // Nodes of other clients: an event a watch at registration, none later.
            conn.pipeline(WATCHES / WATCHERS, 8, |n, out| {
                let path = format!("/crowd/w{watcher:02}/n{n:04}\0token\0");
                request(Op::Watch, 0, &[path.as_bytes()], out);
            })?;
            conns.push(conn);
        }
        Ok(conns)
    })?;
    let reads = [(Op::Read, "READ p50 beside 2,000 connections")];
    lines.extend(beside_crowd(arena, &reads, |daemon| {
        (0..CONNECTIONS).map(|_| Conn::connect(&daemon.socket)).collect()
    })?);
    lines.push(domains(arena)?);
    Ok(lines)
}

/// A process with the daemon's loop and many rings, and one client of one of them.
struct Rings {
    helper: Helper,
    stream: BufReader<UnixStream>,
}

impl Rings {
    fn start(domains: usize) -> Result<Rings> {
        let (ours, theirs) = UnixStream::pair()?;
        let helper = Helper::start(Role::StoreRings, theirs.try_clone()?.into(), theirs.into())?;
        let mut rings = Rings { helper, stream: BufReader::new(ours) };
        rings.ask(domains)?;
        Ok(rings)
    }

    fn ask(&mut self, number: usize) -> Result<f64> {
        writeln!(self.stream.get_mut(), "{number}")?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        line.trim().parse().context("the helper with the rings")
    }
}

fn domains(arena: &Arena<'_>) -> Result<Line> {
    let (mut alone, mut crowded) = (Rings::start(1)?, Rings::start(DOMAINS)?);
    let mut series = [Series::default(), Series::default()];
    for rings in [&alone, &crowded] {
        pin(rings.helper.pid(), 0)?;
    }
    for _ in 0..arena.rounds() {
        for (rings, series) in [&mut alone, &mut crowded].into_iter().zip(&mut series) {
            series.push(rings.ask(TIMED)?);
        }
    }
    Ok(flat("READ p50 over a ring beside 2,000 domains with rings", &series[1], &series[0])
        .note("the daemon's loop and the client in two threads of one process"))
}

//! One write that many watches hear of.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domain_kit::xs::Op;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::arena::Arena;
use super::conn::{Conn, EVENT};
use super::daemons::Who;
use super::turns::{Better, Target, take_turns};
use crate::report::Line;
use crate::stats::Series;

/// Watches on the node.
const WATCHES: usize = 1_000;
/// Writes in a turn.
const WRITES: usize = 5;
/// Rounds: each write is long.
const ROUNDS: usize = 7;
/// The node.
const NODE: &str = "/tool/bench/watched";
/// How often is looked whether all events are there. Who looks without a pause holds the lock that the daemon's wake-ups need.
const LOOK: Duration = Duration::from_micros(20);
/// How long an event may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who watches.
struct Watchers {
    writer: Conn,
    conns: Vec<Conn>,
    /// All connections, to see which have something to read without reading it.
    epoll: Epoll,
}

impl Watchers {
    fn new(arena: &Arena<'_>, who: Who, connections: usize) -> Result<Watchers> {
        let socket = &arena.daemon(who)?.socket;
        let mut writer = Conn::connect(socket)?;
        writer.write(NODE, b"0")?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut conns = Vec::new();
        for n in 0..connections {
            let mut conn = Conn::connect(socket)?;
            for watch in 0..WATCHES / connections {
                let token = format!("{watch}\0");
                conn.call(Op::Watch, 0, &[NODE.as_bytes(), b"\0", token.as_bytes()])?;
            }
            let once = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            epoll.add(conn.stream.as_fd(), EpollEvent::new(once, n as u64))?;
            conns.push(conn);
        }
        let mut all = Watchers { writer, conns, epoll };
        // The event at registration of the last watch of each may still be on its way.
        all.drain(Duration::from_millis(200))?;
        Ok(all)
    }

    fn drain(&mut self, quiet: Duration) -> Result<()> {
        let wait = EpollTimeout::try_from(quiet)?;
        let mut events = vec![EpollEvent::empty(); self.conns.len()];
        loop {
            let ready = self.epoll.wait(&mut events, wait)?;
            if ready == 0 {
                return Ok(());
            }
            for event in &events[..ready] {
                self.conns[event.data() as usize].swallow()?;
            }
        }
    }

    /// Time from a write until every watch's event is at its client.
    fn write(&mut self) -> Result<f64> {
        let mut events = vec![EpollEvent::empty(); self.conns.len()];
        let start = Instant::now();
        self.writer.write(NODE, b"1")?;
        if self.conns.len() > 1 {
            // Not read while others are still told: what is measured is the daemon.
            let mut told = 0;
            loop {
                let looked = Instant::now();
                told += self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
                if told >= self.conns.len() {
                    break;
                }
                ensure!(start.elapsed() < PATIENCE, "events are missing");
                while looked.elapsed() < LOOK {
                    std::hint::spin_loop();
                }
            }
        }
        let took = (self.conns.len() > 1).then(|| start.elapsed());
        for conn in &mut self.conns {
            for _ in 0..WATCHES / events.len() {
                let (kind, _) = conn.message()?;
                ensure!(kind == EVENT, "a reply to nothing");
            }
        }
        Ok(took.unwrap_or_else(|| start.elapsed()).as_secs_f64() * 1e3)
    }
}

/// 1,000 watches of one connection, and one watch of each of 1,000 connections.
pub fn lines(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (connections, name) in [
        (1, "one write to 1,000 watches, one connection, p50"),
        (WATCHES, "the same to 1,000 connections, p50"),
    ] {
        let all = RefCell::new(BTreeMap::new());
        let results = arena.on_two_processors(|| {
            take_turns(arena.rounds().min(ROUNDS), &arena.with_echo(), |who| {
                let mut all = all.borrow_mut();
                if let Entry::Vacant(entry) = all.entry(who) {
                    entry.insert(Watchers::new(arena, who, connections)?);
                }
                let watchers = all.get_mut(&who).context("just made")?;
                let mut times = Series::default();
                for _ in 0..WRITES {
                    times.push(watchers.write()?);
                }
                Ok(vec![times.median()])
            })
        })?;
        lines.push(results.line(name, "ms", 0, Better::Lower, Target::Best(1.5)));
    }
    Ok(lines)
}

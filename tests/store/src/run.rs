//! The load, the kills, and what came of them.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use domain_kit::xs::Op;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::actor::{Actor, COUNTER, SECRET, Shared};
use super::ledger::Ledger;
use super::world::{FIRST_GUEST, Oracle, World};

/// Clients on sockets with a subtree of their own.
const SOCKETS: usize = 6;
/// Clients on sockets that increment the counter.
const COUNTERS: usize = 2;
/// Domains with rings; the last one increments the counter.
pub const RINGS: u16 = 4;
/// How long a request may wait: far above any pause that is not a failure.
const PATIENCE: Duration = Duration::from_secs(20);
/// One action in so many is a live update, half of those with a kill in the middle.
const UPDATES: u32 = 12;
/// How long visitors stay away.
const VISIT: Duration = Duration::from_millis(2);
/// Load between two moments at which everything due must have come.
const STRETCH: Duration = Duration::from_secs(2);

/// What a run found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Kills.
    pub kills: usize,
    /// Live updates, some of them with a kill in the middle.
    pub updates: usize,
    /// Replies checked.
    pub replies: u64,
    /// Events checked.
    pub events: u64,
    /// Increments of the counter.
    pub counted: u64,
    /// Clients that connected in between, were answered and left.
    pub visits: u64,
    /// How often each error was the right answer.
    pub errors: BTreeMap<String, u64>,
    /// Longest wait of any request between a kill and the next: median, 99th percentile, longest, in milliseconds.
    pub pauses: [f64; 3],
    /// How long it took.
    pub took: Duration,
}

/// Who kills.
#[derive(Debug, Default)]
struct Killer {
    stop: AtomicBool,
    kills: AtomicUsize,
    /// Live updates that were answered.
    updates: AtomicUsize,
    /// Replies so far, told by the load.
    replies: AtomicU64,
    /// Visitors that were answered.
    visits: AtomicU64,
    failure: Mutex<Option<String>>,
}

/// Connects, asks one thing, reads the answer and leaves, again and again: none may find its connection closed, whatever is killed
/// while it is taken up.
fn visit(killer: &Killer, path: &Path) -> Result<()> {
    let mut request = Vec::new();
    for word in [Op::GetDomainPath as u32, 7, 0, 2] {
        request.extend_from_slice(&word.to_ne_bytes());
    }
    request.extend_from_slice(b"5\0");
    while !killer.stop.load(Ordering::Relaxed) {
        let mut stream = UnixStream::connect(path).context("a visitor's connection")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&request).context("a visitor's request")?;
        let mut reply = [0; 16 + 16];
        stream.read_exact(&mut reply).context("a visitor's reply")?;
        ensure!(reply[16..] == *b"/local/domain/5\0", "a visitor was answered {reply:?}");
        killer.visits.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(VISIT);
    }
    Ok(())
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Killer {
    fn run(&self, mut oracle: Oracle, mut control: UnixStream, kills: usize, seed: u64) -> Result<()> {
        control.set_read_timeout(Some(PATIENCE))?;
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut before = 0;
        while self.kills.load(Ordering::Relaxed) < kills && !self.stop.load(Ordering::Relaxed) {
            let deadline = Instant::now() + PATIENCE;
            let pid = loop {
                let (pid, generation) = oracle.xenstored()?;
                if pid > 1 && generation > before {
                    before = generation;
                    break pid;
                }
                ensure!(Instant::now() < deadline, "xenstored was not restarted");
                std::thread::sleep(Duration::from_micros(500));
            };
            if rng.random_ratio(1, UPDATES) {
                self.update(&mut control, rng.random_bool(0.5).then_some(pid), &mut rng)?;
                continue;
            }
            // A third dies while it is still taking up what its predecessor left, the others once they have served somebody.
            if rng.random_ratio(1, 3) {
                std::thread::sleep(Duration::from_micros(rng.random_range(0..8_000)));
            } else {
                let before = self.replies.load(Ordering::Relaxed);
                while self.replies.load(Ordering::Relaxed) == before && !self.stop.load(Ordering::Relaxed) {
                    ensure!(Instant::now() < deadline, "xenstored serves nobody");
                    std::thread::sleep(Duration::from_micros(200));
                }
                std::thread::sleep(Duration::from_micros(rng.random_range(0..20_000)));
            }
            kill(Pid::from_raw(pid), Signal::SIGKILL)
                .context("xenstored ended by itself before it was killed")?;
            self.kills.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Asks for a live update as xenstore-control does, on a connection that lives through all of this. With `victim`, that process
    /// is killed in the middle of it.
    fn update(&self, control: &mut UnixStream, victim: Option<i32>, rng: &mut SmallRng) -> Result<()> {
        let mut bytes = Vec::new();
        // A third by the migration stream, the others by the journal.
        let start: &[u8] =
            if rng.random_ratio(1, 3) { b"live-update\0-s\0-v\x002\0" } else { b"live-update\0-s\0" };
        for payload in [&b"live-update\0-f\0/xenstored\0"[..], start] {
            for word in [Op::Control as u32, 0, 0, payload.len() as u32] {
                bytes.extend_from_slice(&word.to_ne_bytes());
            }
            bytes.extend_from_slice(payload);
        }
        control.write_all(&bytes)?;
        if let Some(pid) = victim {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..6_000)));
            // It may have made way for the next one by itself.
            if kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok() {
                self.kills.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut answers = Vec::new();
        for _ in 0..2 {
            let mut head = [0; 16];
            control.read_exact(&mut head).context("the answer to live-update")?;
            let len = u32::from_ne_bytes([head[12], head[13], head[14], head[15]]) as usize;
            ensure!(len <= 4096, "an answer of {len} bytes");
            let mut payload = vec![0; len];
            control.read_exact(&mut payload).context("the answer to live-update")?;
            answers.push(String::from_utf8_lossy(&payload).trim_end_matches('\0').to_owned());
        }
        // What was said with -f is the process's: one that was killed in between knows nothing of it.
        let forgotten = victim.is_some() && answers[1] == "Not in live-update session.";
        ensure!(answers[0] == "OK" && (answers[1] == "OK" || forgotten), "live-update: {answers:?}");
        self.updates.fetch_add(usize::from(!forgotten), Ordering::Relaxed);
        Ok(())
    }
}

/// Runs the load until xenstored was killed so often.
///
/// # Errors
/// The first thing that was not as it had to be.
pub fn run(bin_dir: &Path, kills: usize, seed: u64) -> Result<Outcome> {
    let world = World::start(bin_dir, RINGS)?;
    load(&world, kills, seed).map_err(|e| anyhow!("seed {seed}: {e:#}\n{}", world.log_tail()))
}

struct Load {
    actors: Vec<Actor>,
    shared: Shared,
    killer: Arc<Killer>,
    pauses: Vec<Duration>,
    kills_seen: usize,
}

fn load(world: &World, kills: usize, seed: u64) -> Result<Outcome> {
    let mut actors = Vec::new();
    for id in 0..SOCKETS + COUNTERS {
        actors.push(Actor::new(id, world.socket()?, None, id >= SOCKETS, seed)?);
    }
    for guest in 0..RINGS {
        let domid = Some(FIRST_GUEST + guest);
        actors.push(Actor::new(actors.len(), world.ring(guest)?, domid, guest + 1 == RINGS, seed)?);
    }
    let bases = actors.iter().map(|a| a.model.base.clone()).collect();
    let shared = Shared { ledger: Ledger::new(bases), ..Shared::default() };
    let mut load = Load { actors, shared, killer: Arc::default(), pauses: Vec::new(), kills_seen: 0 };
    load.set_up()?;
    let start = Instant::now();
    let (oracle, control) = (world.oracle()?, world.socket()?);
    let killer = Arc::clone(&load.killer);
    let thread = std::thread::spawn(move || {
        if let Err(e) = killer.run(oracle, control, kills, seed) {
            *locked(&killer.failure) = Some(format!("{e:#}"));
        }
    });
    let (killer, path) = (Arc::clone(&load.killer), world.socket_path());
    let visitor = std::thread::spawn(move || {
        if let Err(e) = visit(&killer, &path) {
            locked(&killer.failure).get_or_insert(format!("{e:#}"));
        }
    });
    let result = load.stretches(kills);
    load.killer.stop.store(true, Ordering::Relaxed);
    thread.join().map_err(|_| anyhow!("the killer panicked"))?;
    visitor.join().map_err(|_| anyhow!("the visitor panicked"))?;
    result?;
    if let Some(failure) = locked(&load.killer.failure).take() {
        bail!("{failure}");
    }
    load.settle().context("after the last kill")?;
    load.verify()?;
    load.pauses.sort();
    let at = |p: f64| load.pauses.get((load.pauses.len() as f64 * p) as usize).or(load.pauses.last());
    Ok(Outcome {
        kills: load.killer.kills.load(Ordering::Relaxed),
        updates: load.killer.updates.load(Ordering::Relaxed),
        replies: load.shared.replies,
        events: load.shared.ledger.seen() + load.shared.counter_events,
        counted: load.shared.counted.len() as u64,
        visits: load.killer.visits.load(Ordering::Relaxed),
        errors: load.shared.errors,
        pauses: [0.5, 0.99, 1.0].map(|p| at(p).map_or(0.0, |d| d.as_secs_f64() * 1e3)),
        took: start.elapsed(),
    })
}

impl Load {
    /// The subtrees, and watches of everybody on them.
    fn set_up(&mut self) -> Result<()> {
        let roots: Vec<_> = self.actors.iter().map(|a| (a.model.base.clone(), a.model.guest)).collect();
        let first = &mut self.actors[0];
        first.ask(Op::Write, &[COUNTER, "\0", "0"], b"OK\0");
        first.ask(Op::SetPerms, &[COUNTER, "\0b0\0"], b"OK\0");
        first.ask(Op::Write, &[SECRET, "\0", "secret"], b"OK\0");
        for (base, guest) in &roots {
            first.ask(Op::Write, &[base, "\0"], b"OK\0");
            first.ask(Op::SetPerms, &[base, "\0n", &guest.unwrap_or(0).to_string(), "\0"], b"OK\0");
        }
        self.settle().context("setting up")?;
        for actor in &mut self.actors {
            if actor.model.guest.is_some() {
                actor.watch(&mut self.shared.ledger, "/soak", "foreign", true);
            }
        }
        // Everybody on a socket watches the subtree of the next but one, and the first the counter.
        for id in 0..SOCKETS {
            let (base, _) = &roots[(id + 2) % roots.len()];
            self.actors[id].watch(&mut self.shared.ledger, base, &format!("of-{id}"), false);
            let (base, guest) = &roots[roots.len() - 1 - id % usize::from(RINGS)];
            debug_assert!(guest.is_some(), "a ring's subtree");
            self.actors[id].watch(&mut self.shared.ledger, base, &format!("ring-{id}"), false);
        }
        self.actors[0].watch(&mut self.shared.ledger, COUNTER, "counter", false);
        self.settle().context("setting watches")
    }

    fn stretches(&mut self, kills: usize) -> Result<()> {
        while self.killer.kills.load(Ordering::Relaxed) < kills {
            let until = Instant::now() + STRETCH;
            while Instant::now() < until && self.killer.kills.load(Ordering::Relaxed) < kills {
                self.turn(false)?;
            }
            self.settle()?;
        }
        Ok(())
    }

    /// Until every reply and event that is due has come.
    fn settle(&mut self) -> Result<()> {
        while self.actors.iter().any(|a| !a.idle()) {
            self.turn(true)?;
        }
        // What was asked for now is answered after all events of what was asked for before.
        for actor in &mut self.actors {
            actor.ask(Op::GetDomainPath, &["5\0"], b"/local/domain/5\0");
        }
        while self.actors.iter().any(|a| !a.idle()) {
            self.turn(true)?;
        }
        self.shared.ledger.settled()?;
        let (commits, events) = (self.shared.counted.len() as u64, self.shared.counter_events);
        // One event more than commits: the first, at registration.
        ensure!(
            events == 0 || events == commits + 1,
            "{commits} commits of the counter, {events} events of its watch"
        );
        Ok(())
    }

    fn turn(&mut self, ending: bool) -> Result<()> {
        for actor in &mut self.actors {
            actor.act(&mut self.shared, ending);
            actor.push()?;
        }
        let ready: Vec<bool> = {
            let mut fds: Vec<PollFd<'_>> = Vec::new();
            for actor in &self.actors {
                let mut flags = PollFlags::POLLIN;
                flags.set(PollFlags::POLLOUT, actor.wants_to_write());
                fds.push(PollFd::new(actor.stream.as_fd(), flags));
            }
            poll(&mut fds, PollTimeout::from(100u8))?;
            fds.iter().map(|fd| fd.any().unwrap_or(true)).collect()
        };
        for (actor, _) in self.actors.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            actor.pull(&mut self.shared)?;
        }
        self.killer.replies.store(self.shared.replies, Ordering::Relaxed);
        let kills = self.killer.kills.load(Ordering::Relaxed);
        if kills > self.kills_seen {
            self.kills_seen = kills;
            self.pauses.push(std::mem::take(&mut self.shared.longest));
        }
        if let Some(actor) = self.actors.iter().find(|a| a.oldest() > PATIENCE) {
            bail!("no reply for {} s: {}", PATIENCE.as_secs(), actor.describe());
        }
        if let Some(failure) = locked(&self.killer.failure).take() {
            bail!("{failure}");
        }
        Ok(())
    }

    /// The whole tree is what the models say, and the counter what its commits say.
    fn verify(&mut self) -> Result<()> {
        for actor in &mut self.actors {
            let nodes: Vec<_> = actor.model.nodes.iter().map(|(p, n)| (p.clone(), n.value.clone())).collect();
            nodes.iter().for_each(|(path, value)| actor.ask(Op::Read, &[path, "\0"], value));
        }
        self.settle().context("reading all back")?;
        let commits = self.shared.counted.len() as u64;
        ensure!(
            self.shared.counted.last().copied().unwrap_or(0) == commits,
            "numbers are missing in the counter"
        );
        self.actors[0].ask(Op::Read, &[COUNTER, "\0"], commits.to_string().as_bytes());
        self.actors[0].ask(Op::Control, &["check\0"], b"OK\0");
        self.settle().context("the counter at the end")
    }
}

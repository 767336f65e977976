//! Transactions: one client's, many clients' that have nothing to do with each other, and many that fight for the same nodes.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use domain_kit::xs::Op;

use super::arena::Arena;
use super::conn::{ERROR, request};
use super::daemons::Who;
use super::fleet::{Member, Script, drive};
use super::speed::{CLIENTS, SPAN};
use super::turns::{Better, Target, take_turns};
use crate::report::Line;

/// Nodes of each transaction.
const NODES: usize = 5;
/// How long a turn of the conflict lasts: fairness needs many commits of everybody.
const CONFLICT: Duration = Duration::from_millis(1000);
/// Rounds of the conflict.
const CONFLICT_ROUNDS: usize = 7;

/// Start, five writes (with a read before each, if `reads`), end; again after EAGAIN.
struct Transaction {
    base: String,
    reads: bool,
    step: usize,
    tx: u32,
    commits: u64,
    refused: u64,
}

impl Transaction {
    fn new(base: String, reads: bool) -> Self {
        Transaction { base, reads, step: 0, tx: 0, commits: 0, refused: 0 }
    }

    fn requests(&self) -> usize {
        if self.reads { 2 * NODES } else { NODES }
    }

    fn take(&mut self, kind: u32, payload: &[u8]) -> Result<()> {
        let last = self.requests() + 1;
        match (self.step, kind) {
            (step, ERROR) if step == last && payload == b"EAGAIN\0" => self.refused += 1,
            // A node that is not there yet.
            (step, ERROR) if step != last && self.reads && payload == b"ENOENT\0" => {}
            (_, ERROR) => bail!("step {}: {}", self.step, String::from_utf8_lossy(payload)),
            (0, _) => {
                let text = std::str::from_utf8(payload)?.trim_end_matches('\0');
                self.tx = text.parse()?;
            }
            (step, _) if step == last => self.commits += 1,
            _ => {}
        }
        self.step = if self.step == last { 0 } else { self.step + 1 };
        Ok(())
    }
}

impl Script for Transaction {
    fn next(&mut self, reply: Option<(u32, &[u8])>, out: &mut Vec<u8>) -> Result<()> {
        if let Some((kind, payload)) = reply {
            self.take(kind, payload)?;
        }
        let requests = self.requests();
        match self.step {
            0 => request(Op::TransactionStart, 0, &[b"\0"], out),
            step if step > requests => request(Op::TransactionEnd, self.tx, &[b"T\0"], out),
            step => {
                let (node, read) =
                    if self.reads { ((step - 1) / 2, step % 2 == 1) } else { (step - 1, false) };
                let path = format!("{}/{node}\0", self.base);
                match read {
                    true => request(Op::Read, self.tx, &[path.as_bytes()], out),
                    false => {
                        let value = format!("{:016}", self.commits);
                        request(Op::Write, self.tx, &[path.as_bytes(), value.as_bytes()], out);
                    }
                }
            }
        }
        Ok(())
    }

    fn rests(&self) -> bool {
        self.step == 0
    }
}

/// Commits a second, refusals a commit, and the least successful client's commits over the most successful one's.
fn contest(
    arena: &Arena<'_>,
    who: Who,
    clients: usize,
    span: Duration,
    script: impl Fn(usize) -> Transaction,
) -> Result<Vec<f64>> {
    let socket = &arena.daemon(who)?.socket;
    let mut members = Vec::new();
    for client in 0..clients {
        members.push(Member::connect(socket, script(client))?);
    }
    let took = drive(&mut members, span)?.as_secs_f64();
    let commits: Vec<u64> = members.iter().map(|m| m.script.commits).collect();
    let refused: u64 = members.iter().map(|m| m.script.refused).sum();
    let all: u64 = commits.iter().sum();
    ensure!(all > 0, "no transaction went through");
    let (least, most) = (commits.iter().min().copied(), commits.iter().max().copied());
    let fair = least.unwrap_or(0) as f64 / most.unwrap_or(0).max(1) as f64;
    Ok(vec![all as f64 / took, refused as f64 / all as f64, fair])
}

/// One client, and 16 with nodes of their own.
pub fn undisturbed(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (clients, name) in
        [(1, "transactions of 5 writes"), (CLIENTS, "transactions, 16 clients, disjoint nodes")]
    {
        let results = arena.on_one_processor(|| {
            take_turns(arena.rounds(), &arena.daemons(), |who| {
                contest(arena, who, clients, SPAN, |client| {
                    Transaction::new(format!("/tool/bench/tx{client:02}"), false)
                })
            })
        })?;
        lines.push(results.line(name, "commits/s", 0, Better::Higher, Target::Best(1.5)));
    }
    Ok(lines)
}

/// 16 clients and the same five nodes: written blindly, as the reference figures are, and read before.
pub fn conflicts(arena: &Arena<'_>) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (reads, name) in [(false, "16 clients, the same 5 nodes"), (true, "the same, each node read before")]
    {
        let results = arena.on_one_processor(|| {
            take_turns(arena.rounds().min(CONFLICT_ROUNDS), &arena.daemons(), |who| {
                contest(arena, who, CLIENTS, CONFLICT, |_| Transaction::new("/tool/bench/same".into(), reads))
            })
        })?;
        let line = |what: &str, unit, figure, better, target| {
            results.line(&format!("{name}{what}"), unit, figure, better, target)
        };
        lines.push(line("", "commits/s", 0, Better::Higher, Target::Best(1.5)));
        lines.push(line(": EAGAIN", "per commit", 1, Better::Lower, Target::Best(1.5)));
        lines.push(line(": fairness", "min/max", 2, Better::Higher, Target::Floor(0.9)));
    }
    Ok(lines)
}

//! Event channels beside bare eventfds; grant copies beside memcpy.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::pair::{GRANTER, Pair, TAKER};
use super::{Settings, or_missing};
use crate::peers::eventfd::PingPong;
use crate::peers::helper::pin;
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;
use crate::wire::Remote;

/// Round trips in each turn.
const ROUND_TRIPS: u32 = 5_000;
/// Pages granted for the copies: 1 MiB, which stays in the second-level cache, as a network ring's pages do.
const PAGES: usize = 256;

const NAMES: &[(&str, &str, &str)] = &[
    ("evtchn round trip, two processors", "us", "<= 1.10 x eventfd"),
    ("evtchn round trip, one processor", "us", "<= 1.10 x eventfd"),
    ("grant copy, 1 page a call", "ns/page", ""),
];

/// All lines of the case.
pub fn run(settings: &Settings) -> Vec<Line> {
    or_missing(NAMES, lines(settings))
}

fn lines(settings: &Settings) -> Result<Vec<Line>> {
    let mut pair = Pair::start(&settings.bin_dir)?;
    let pids = pair.pids()?;
    let port = pair.granter.number(&json!({"cmd": "port_alloc", "remote": TAKER}), "port")? as u32;
    let bind = json!({"cmd": "port_bind", "remote": GRANTER, "port": port});
    let taker_port = pair.taker.number(&bind, "port")? as u32;
    pair.granter.call(&json!({"cmd": "pong", "port": port}))?;
    let mut lines = vec![
        round_trips(settings, &mut pair.taker, taker_port, pids, (0, 1))?,
        round_trips(settings, &mut pair.taker, taker_port, pids, (0, 0))?,
    ];
    let region = json!({"cmd": "region", "peer": TAKER, "pages": PAGES});
    let gref = pair.granter.number(&region, "gref")? as u32;
    for (batch, count, to_grant) in
        [(1, 2_000, false), (1, 2_000, true), (32, 200, false), (32, 200, true), (256, 25, false)]
    {
        lines.push(grant_copy(settings, &mut pair.taker, gref, batch, count, to_grant)?);
    }
    Ok(lines)
}

/// `cpus`: of the side that measures, and of the one that answers.
fn round_trips(
    settings: &Settings,
    taker: &mut Remote,
    port: u32,
    pids: (i32, i32),
    cpus: (usize, usize),
) -> Result<Line> {
    let name = if cpus.0 == cpus.1 { NAMES[1].0 } else { NAMES[0].0 };
    let (blocking, polling) = (PingPong::start(false)?, PingPong::start(true)?);
    for (measures, answers) in [
        (pids.1, pids.0),
        (std::process::id().cast_signed(), blocking.helper.pid()),
        (std::process::id().cast_signed(), polling.helper.pid()),
    ] {
        pin(measures, cpus.0)?;
        if let Err(error) = pin(answers, cpus.1) {
            return Ok(Line::missing(name, NAMES[0].1, NAMES[0].2, &format!("not measured: {error:#}")));
        }
    }
    let ping = json!({"cmd": "ping", "port": port, "count": ROUND_TRIPS});
    let series = take_turns(
        settings.rounds,
        &mut [
            Contestant::new("evtchn", || taker.number(&ping, "us")),
            Contestant::new("eventfd", || blocking.round_trips(ROUND_TRIPS)),
            Contestant::new("eventfd with poll", || polling.round_trips(ROUND_TRIPS)),
        ],
    );
    crate::peers::helper::unpin(std::process::id().cast_signed())?;
    let [ours, limit, polled]: [Series; 3] =
        series?.try_into().ok().context("as many series as contestants")?;
    Ok(Line::beside(name, "us", &ours, ("eventfd", &limit), Goal::RatioAtMost(1.10))
        .peer("eventfd with poll", &polled))
}

fn grant_copy(
    settings: &Settings,
    taker: &mut Remote,
    gref: u32,
    batch: usize,
    count: usize,
    to_grant: bool,
) -> Result<Line> {
    let command = |cmd: &str| -> Value {
        json!({"cmd": cmd, "granter": GRANTER, "gref": gref, "pages": PAGES, "batch": batch, "count": count, "to_grant": to_grant})
    };
    let (copy, memory) = (command("copy"), command("memcpy"));
    let taker = std::cell::RefCell::new(taker);
    let series = take_turns(
        settings.rounds,
        &mut [
            Contestant::new("grant copy", || taker.borrow_mut().number(&copy, "ns_per_page")),
            Contestant::new("memcpy", || taker.borrow_mut().number(&memory, "ns_per_page")),
        ],
    )?;
    let [ours, limit]: [Series; 2] = series.try_into().ok().context("as many series as contestants")?;
    let pages = if batch == 1 { "1 page".into() } else { format!("{batch} pages") };
    let direction = if to_grant { "to" } else { "from" };
    let name = format!("grant copy {direction} grant, {pages} a call");
    Ok(Line::beside(&name, "ns/page", &ours, ("memcpy", &limit), Goal::None))
}

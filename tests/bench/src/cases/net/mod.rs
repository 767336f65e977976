//! A process guest's TCP and ICMP through netfront, ring, journal and netback, beside the same endpoint on a veth pair.

pub mod lab;

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_tests::outside::ADDRESS;
use serde_json::json;

use super::world::World;
use super::{Settings, or_missing, packets};
use crate::endpoint::Direction;
use crate::peers::{bridge, sink, veth};
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;

/// Length of one turn.
const TURN: Duration = Duration::from_millis(400);
/// Echoes in each turn.
const PINGS: usize = 300;

/// An echo without a reply for so long is sent again.
pub const LOST: Duration = Duration::from_secs(1);

/// iperf3 measures whole seconds.
const BULK_TURN: Duration = Duration::from_secs(1);
/// Names, units and goals of lines.
type Names = &'static [(&'static str, &'static str, &'static str)];

const BULK: Names =
    &[("net TCP out of the guest, large segments", "MiB/s", ">= 1.00 x veth + bridge, kernel TCP")];
/// Kills, and what the pause may be, ms.
const KILLS: usize = 100;
const PAUSE_LIMIT: f64 = 20.0;
const PAUSE: Names = &[("pause after kill -9 of netback, 100 kills", "ms", "p99 < 20 ms")];

const LAB: Names = &[("net in the lab", "Mb/s", ">= 1.00 x both peers")];

const NAMES: Names = &[
    ("net TCP out of the guest", "MiB/s", ""),
    ("net TCP into the guest", "MiB/s", ""),
    ("net ping", "us", ""),
];

/// All lines of the case. `world` starts the system with its guest, if a group needs it.
pub fn run<'a>(settings: &Settings, world: impl FnOnce() -> &'a mut Result<World>) -> Vec<Line> {
    let wanted = |name: &str| settings.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    type Measure = fn(&Settings, &mut World) -> Result<Vec<Line>>;
    let groups: [(&str, Names, Measure); 5] = [
        ("outside", NAMES, lines),
        ("segments", packets::LARGE_NAMES, packets::large),
        ("small", packets::SMALL_NAMES, packets::small),
        ("bulk", BULK, bulk),
        ("pause", PAUSE, pause),
    ];
    let mut all = Vec::new();
    if groups.iter().any(|(name, ..)| wanted(name)) {
        let world = world();
        for (_, names, measure) in groups.iter().filter(|(name, ..)| wanted(name)) {
            let lines = super::borrowed(world).and_then(|world| measure(settings, world));
            all.extend(or_missing(names, lines));
        }
    }
    if wanted("lab") {
        all.extend(or_missing(LAB, lab::lines(settings)));
    }
    all
}

/// TCP whose segments the guest leaves whole, beside the kernel's over veth pairs and a bridge.
fn bulk(settings: &Settings, world: &mut World) -> Result<Vec<Line>> {
    let address: Ipv4Addr = ADDRESS.parse()?;
    let port = world.system.outside.run(move || sink::start(address))??;
    let bridge = bridge::Bridge::new()?;
    let bridged = bridge.sink()?;
    let command = json!({
        "cmd": "bulk", "vif": 1, "peer": ADDRESS, "port": port, "ms": BULK_TURN.as_millis() as u64,
    });
    let guest = RefCell::new(&mut world.guest);
    let mut contestants = vec![
        Contestant::new("netback", || guest.borrow_mut().number(&command, "mib_s")),
        Contestant::new("veth + bridge", || {
            bridge.run(move || sink::stream(bridge::SERVER, bridged, Direction::Out, BULK_TURN))
        }),
    ];
    if bridge.has_iperf() {
        contestants.push(Contestant::new("iperf3", || bridge.iperf(BULK_TURN)));
    }
    let series = take_turns(settings.rounds, &mut contestants)?;
    let [ours, limit] = [0, 1].map(|i| series.get(i).cloned().unwrap_or_default());
    let mut line = Line::beside(
        BULK[0].0,
        "MiB/s",
        &ours,
        ("veth + bridge, kernel TCP", &limit),
        Goal::RatioAtLeast(1.0),
    )
    .note("the guest's TCP sends 64 KiB segments; four copies on the way, the kernel's two");
    if let Some(iperf) = series.get(2) {
        line = line.peer("veth + bridge, iperf3", iperf);
    }
    Ok(vec![line])
}

/// The longest time without an echo after a kill.
fn pause(_: &Settings, world: &mut World) -> Result<Vec<Line>> {
    let pauses = super::restart::guest_pauses(world, "netback", "net", KILLS)?;
    let p99 = pauses.percentile(0.99);
    let line = Line {
        ours: Some(pauses.median()),
        p99: Some(p99),
        met: Some(p99 < PAUSE_LIMIT),
        goal: PAUSE[0].2.into(),
        ratio: Some(p99 / PAUSE_LIMIT),
        samples: pauses.len(),
        ..Line::under(PAUSE[0].0, "ms", f64::NAN, PAUSE_LIMIT)
    };
    let longest = pauses.percentile(1.0);
    Ok(vec![line.note(format!("{KILLS} kills, longest {longest:.1} ms; ratio is p99 over limit"))])
}

fn lines(settings: &Settings, world: &mut World) -> Result<Vec<Line>> {
    let outside = &world.system.outside;
    let address: Ipv4Addr = ADDRESS.parse()?;
    let wire = veth::Wire::new(outside)?;
    let kernels = veth::kernel(outside)?;
    let [port, raw_port, kernel_port] =
        [address, veth::RAW_PEER, veth::KERNEL_PEER].map(|a| outside.run(move || sink::start(a)));
    let (port, raw_port, kernel_port) = (port??, raw_port??, kernel_port??);
    let guest = RefCell::new(&mut world.guest);
    let mut lines = Vec::new();
    for (name, way) in [(NAMES[0].0, Direction::Out), (NAMES[1].0, Direction::In)] {
        let command = json!({
            "cmd": "stream", "peer": ADDRESS, "port": port, "out": way == Direction::Out, "ms": TURN.as_millis() as u64,
        });
        let series = take_turns(
            settings.rounds,
            &mut [
                Contestant::new("netback", || guest.borrow_mut().number(&command, "mib_s")),
                Contestant::new("veth", || {
                    wire.run(move |end| end.stream(veth::RAW_PEER, raw_port, way, TURN))
                }),
                Contestant::new("veth, kernel TCP", || {
                    kernels.run(move || sink::stream(veth::KERNEL_PEER, kernel_port, way, TURN))?
                }),
            ],
        )?;
        let [ours, limit, kernel]: [Series; 3] =
            series.try_into().ok().context("as many series as contestants")?;
        let line = Line::beside(name, "MiB/s", &ours, ("veth", &limit), Goal::None);
        lines.push(
            line.peer("veth, kernel TCP with segmentation offload", &kernel)
                .note("smoltcp in the guest and on the veth; MTU 1500"),
        );
    }
    let command = json!({"cmd": "ping_outside", "peer": ADDRESS, "count": PINGS});
    let series = take_turns(
        settings.rounds,
        &mut [
            Contestant::new("netback", || guest.borrow_mut().number(&command, "us")),
            Contestant::new("veth", || {
                let times = wire.run(|end| {
                    let mut times = Series::default();
                    end.pings(veth::RAW_PEER, LOST, |time| {
                        times.push(time.as_secs_f64() * 1e6);
                        times.len() < PINGS
                    })?;
                    Ok(times)
                })?;
                Ok(times.median())
            }),
        ],
    )?;
    let [ours, limit]: [Series; 2] = series.try_into().ok().context("as many series as contestants")?;
    lines.push(Line::beside(NAMES[2].0, "us", &ours, ("veth", &limit), Goal::None));
    Ok(lines)
}

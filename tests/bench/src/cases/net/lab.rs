//! The Debian guest's NIC in the lab: ours beside QEMU's virtio-net on a TAP and beside QEMU's emulated Xen net backend on a TAP, with the
//! same kernel, RAM disk, iperf3 and ping.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use bulkhead_tests::outside::{ADDRESS, PREFIX};
use bulkhead_tests::system::{Config, System};

use crate::cases::block::lab::{VIRTIO_ACCEL, pc, xen_accel};
use crate::cases::boot::start::{USERSPACE, console};
use crate::cases::boot::{Image, hardware, in_lab, nic};
use crate::cases::qemu::{Guest, Server, make_tap};
use crate::cases::{Settings, or_missing, show_log};
use crate::report::{Goal, Line};
use crate::rounds::{Contestant, take_turns};
use crate::stats::Series;

/// Most rounds counted: each takes half a minute.
const MOST_ROUNDS: usize = 5;
/// RAM of the guests, MiB.
const MEMORY: u32 = 256;

const NAMES: &[(&str, &str, &str)] = &[("net in the lab", "Mb/s", ">= 1.00 x both peers")];
const VIRTIO: &str = "virtio-net on TAP";
const XEN: &str = "QEMU's xen-net-device";

/// A figure of a guest, with the outside's address.
type Measure = fn(&Guest, &str) -> Result<f64>;
/// What is measured: name, unit, goal, how.
const MEASURES: [(&str, &str, Goal, Measure); 3] = [
    ("lab TCP out of the guest", "Mb/s", Goal::RatioAtLeast(1.0), |guest, peer| guest.stream(peer, false)),
    ("lab TCP into the guest", "Mb/s", Goal::RatioAtLeast(1.0), |guest, peer| guest.stream(peer, true)),
    ("lab ping, mean", "ms", Goal::RatioAtMost(1.1), |guest, peer| guest.ping(peer)),
];

/// The lines; where there is no hardware virtualization, from inside the lab, with Debian 13's QEMU.
pub fn lines(settings: &Settings) -> Result<Vec<Line>> {
    let image = settings.image.as_ref().context("needs a guest image (leave out --no-lab)")?;
    let initrd = image.fio.as_ref().map(|fio| fio.with_file_name("initrd-tools.img"));
    let initrd = initrd.filter(|path| path.exists()).context("needs a guest image with iperf3")?;
    let image = &Image { initrd, ..image.clone() };
    if hardware(&settings.bin_dir) {
        return Ok(here(settings, image));
    }
    let tools = image.tools.as_ref().context("needs Debian 13's iperf3 for the lab")?;
    let (rounds, tools) = (settings.rounds.to_string(), tools.to_str().context("the tree's path")?);
    let words = ["net", "--only", "lab", "--rounds", &rounds, "--tools", tools];
    in_lab(settings, image, &words, &["--root", "debian13", "--memory", "3072"])
}

/// Measures on this machine.
pub fn here(settings: &Settings, image: &Image) -> Vec<Line> {
    or_missing(NAMES, measured(settings, image))
}

fn cmdline(console: &str, own: &str, peer: &str) -> String {
    format!("console={console} quiet panic=-1 bh.work=none bh.shell bh.ip={own}/{PREFIX} bh.gw={peer}")
}

/// A PC of QEMU's with this NIC on a TAP of its own, which has the address `peer`.
fn pc_on_tap(
    system: &System,
    image: &Image,
    accel: &str,
    device: &str,
    tap: &'static str,
    (own, peer): (&str, &'static str),
) -> Result<Guest> {
    make_tap(&system.outside, tap, peer)?;
    let mut command = pc(image, accel, MEMORY, &cmdline("ttyS0", own, peer));
    command
        .args(["-netdev", &format!("tap,id=n,ifname={tap},script=no,downscript=no")])
        .args(["-device", &format!("{device},netdev=n")]);
    Guest::of(&system.outside, command)
}

fn measured(settings: &Settings, image: &Image) -> Result<Vec<Line>> {
    let config = Config { bin_dir: settings.bin_dir.clone(), ..Config::of_this_build()? };
    let system = System::start(config)?;
    let file = image.domain_file("net", "pvh", &cmdline("hvc0", "10.77.0.2", ADDRESS), MEMORY, &nic());
    let ours = system
        .create(&file)
        .and_then(|()| console(&system, "net", USERSPACE))
        .and_then(Guest::up)
        .inspect_err(|_| show_log(&system))?;
    let virtio = ("10.78.0.2", "10.78.0.1");
    let xen = ("10.79.0.2", "10.79.0.1");
    let peers = [
        (VIRTIO, virtio.1, {
            let device = "virtio-net-pci,romfile=";
            pc_on_tap(&system, image, VIRTIO_ACCEL, device, "bench-tap0", virtio)
        }),
        (XEN, xen.1, pc_on_tap(&system, image, &xen_accel(), "xen-net-device", "bench-tap1", xen)),
    ];
    for (name, _, guest) in &peers {
        eprintln!(
            "bench: lab: {name}: {}",
            guest.as_ref().map_or_else(|e| format!("{e:#}"), |_| "up".into())
        );
    }
    let tools = image.tools.as_deref();
    let _servers = [ADDRESS, virtio.1, xen.1]
        .into_iter()
        .map(|address| Server::of(&system.outside, address, tools))
        .collect::<Result<Vec<Server>>>()?;
    let all = || {
        std::iter::once(("ours", ADDRESS, Ok(&ours)))
            .chain(peers.iter().map(|(name, peer, guest)| (*name, *peer, guest.as_ref())))
    };
    for (name, peer, guest) in all() {
        let Ok(guest) = guest else { continue };
        let said = guest.run(&format!(
            "n=0; until ping -c 1 -W 1 {peer} >/dev/null || [ $n = 30 ]; do n=$((n+1)); done; echo tries: $n"
        ))?;
        ensure!(!said.contains("tries: 30"), "{name}: no echo of {peer}");
    }
    let mut lines = Vec::new();
    for (name, unit, goal, measure) in MEASURES {
        // A peer that fails costs its own line alone.
        let failed: RefCell<HashMap<&str, String>> = RefCell::default();
        let mut contestants: Vec<Contestant<'_>> = all()
            .map(|(who, peer, guest)| {
                let failed = &failed;
                Contestant::new(who, move || {
                    let told = guest.map_err(|e| anyhow!("{e:#}")).and_then(|guest| measure(guest, peer));
                    match told {
                        Err(why) if peer != ADDRESS => {
                            eprintln!("bench: {name}: {who}: {why:#}");
                            failed.borrow_mut().insert(who, format!("{why:#}"));
                            Ok(f64::NAN)
                        }
                        told => told,
                    }
                })
            })
            .collect();
        let series = take_turns(settings.rounds.min(MOST_ROUNDS), &mut contestants)?;
        drop(contestants);
        for ((who, ..), series) in all().zip(&series) {
            eprintln!("bench: {name}: {who}: {:.1?} {unit}", series.values());
        }
        let failed = failed.into_inner();
        lines.extend(judged((name, unit, goal), &series, |i| failed.get(peers.get(i)?.0).cloned()));
    }
    Ok(lines)
}

/// A line for each peer; `missing` says why one is not there.
fn judged(
    (name, unit, goal): (&str, &'static str, Goal),
    series: &[Series],
    missing: impl Fn(usize) -> Option<String>,
) -> Vec<Line> {
    let Some((ours, peers)) = series.split_first() else { return Vec::new() };
    let judge = |(i, (peer, series)): (usize, (&str, &Series))| {
        let name = format!("{name}, beside {peer}");
        match missing(i) {
            Some(why) => Line::missing(&name, unit, "", &why),
            None => Line::beside(&name, unit, ours, (peer, series), goal),
        }
    };
    [VIRTIO, XEN].into_iter().zip(peers).enumerate().map(judge).collect()
}

/// Where iperf3 and its libraries are in a tree of Debian's packages that are unpacked and not installed.
pub(crate) fn iperf_in(tree: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    (tree.join("usr/bin/iperf3"), tree.join("usr/lib/x86_64-linux-gnu"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_has_its_line() {
        let series = |values: &[f64]| Series::new(values.to_vec());
        let all = [series(&[200.0, 220.0]), series(&[100.0, 110.0]), series(&[400.0, 440.0])];
        let what = ("x", "Mb/s", Goal::RatioAtLeast(1.0));
        let lines = judged(what, &all, |_| None);
        assert_eq!(lines.iter().map(|l| l.met).collect::<Vec<_>>(), [Some(true), Some(false)]);
        let lines = judged(what, &all, |i| (i == 1).then(|| "not up".into()));
        assert_eq!(lines.iter().map(|l| l.met).collect::<Vec<_>>(), [Some(true), None]);
        assert!(lines[1].note.contains("not up"));
        let slow = judged(("p", "ms", Goal::RatioAtMost(1.1)), &all, |_| None);
        assert_eq!(slow.iter().map(|l| l.met).collect::<Vec<_>>(), [Some(false), Some(true)]);
    }
}

//! `bench`: see the library's documentation and docs/benchmarks.md. Built and run by `cargo xtask bench`.

use std::path::PathBuf;
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result};
use bench::cases::boot::Image;
use bench::cases::store::daemons::{Peers, Who, launch};
use bench::cases::world::World;
use bench::cases::{self, Settings};
use bench::peers::helper;
use bench::report::{Host, Report, table};
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[derive(Parser)]
#[command(name = "cargo xtask bench", about = "Measures Bulkhead beside the machine's limits", version)]
struct Cli {
    /// What to measure; all if none is named.
    #[arg(value_enum)]
    cases: Vec<Case>,
    /// Writes the result as JSON too, and beside it a drawing (.svg).
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Rounds in which ours and the others take turns.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Measures ours alone, without peers (case store).
    #[arg(long)]
    ours: bool,
    /// Only groups of lines whose names contain this (store: one-client, in-flight, …; block: depth-1, depth-32, sequential, mixed,
    /// pause, many, lab, and parts of that: lab-depth-1, lab-sequential, …; net: outside,
    /// segments, small, bulk, pause, lab; qemu: disk, nic, boot).
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Tree with Debian's xenstored daemons.
    #[arg(long, hide = true)]
    peers: Option<PathBuf>,
    /// Library that stands in for a Xen below them.
    #[arg(long, hide = true)]
    noxen: Option<PathBuf>,
    /// Kernel of the guest that the lab boots.
    #[arg(long, hide = true)]
    kernel: Option<PathBuf>,
    /// Initial RAM disk of that guest.
    #[arg(long, hide = true)]
    initrd: Option<PathBuf>,
    /// The same with fio in it.
    #[arg(long, hide = true)]
    fio: Option<PathBuf>,
    /// Tree with Debian 13's iperf3.
    #[arg(long, hide = true)]
    tools: Option<PathBuf>,
    /// The program that starts the lab; none: no lab.
    #[arg(long, hide = true)]
    xtask: Option<PathBuf>,
    /// Started by another `bench` inside the lab.
    #[arg(long, hide = true)]
    inside: bool,
    /// The source tree, for counting lines.
    #[arg(long, default_value = ".", hide = true)]
    source: PathBuf,
    #[command(subcommand)]
    internal: Option<Internal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Case {
    /// Event channels and grant copies.
    Evtchn,
    /// xenstore round trips.
    Store,
    /// Disk requests through ring and journal.
    Block,
    /// TCP and ICMP to the outside.
    Net,
    /// Pauses after kills.
    Restart,
    /// Boot time, memory and lines of code.
    Boot,
    /// Disk and NIC of a guest in a machine that QEMU emulates.
    Qemu,
}

const ALL: [Case; 7] =
    [Case::Evtchn, Case::Store, Case::Block, Case::Net, Case::Restart, Case::Boot, Case::Qemu];

#[derive(Subcommand)]
enum Internal {
    /// The other process of a two-process measurement.
    #[command(hide = true)]
    Peer {
        #[arg(value_enum)]
        role: helper::Role,
    },
    /// Becomes one of Debian's daemons.
    #[command(hide = true)]
    Launch {
        #[arg(value_enum)]
        who: Who,
        #[arg(long)]
        root: PathBuf,
        #[arg(long)]
        preload: PathBuf,
        #[arg(long)]
        dir: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.internal {
        Some(Internal::Peer { role }) => helper::run(*role).map(|()| true),
        Some(Internal::Launch { who, root, preload, dir }) => launch(*who, root, preload, dir).map(|()| true),
        None => run(&cli),
    };
    match result {
        // A goal missed is told in the table; it is no failure of the run.
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// As much of the processors as can be had, for this program and all that it starts: the machine may be busy. And as many files.
fn prefer_ourselves() {
    let me = std::process::id().to_string();
    // Both only help, and may be refused.
    let _ = std::process::Command::new("renice")
        .args(["-n", "-15", "-p", &me])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn run(cli: &Cli) -> Result<bool> {
    prefer_ourselves();
    let exe = std::env::current_exe().context("this program's path")?;
    let settings = Settings {
        bin_dir: exe.parent().context("this program is in no folder")?.into(),
        source: cli.source.clone(),
        rounds: cli.rounds.max(1),
        peers: cli.peers.clone().zip(cli.noxen.clone()).map(|(root, preload)| Peers { root, preload }),
        ours_only: cli.ours,
        only: cli.only.clone(),
        image: cli.kernel.clone().zip(cli.initrd.clone()).map(|(kernel, initrd)| Image {
            kernel,
            initrd,
            fio: cli.fio.clone(),
            tools: cli.tools.clone(),
            xtask: cli.xtask.clone(),
        }),
    };
    let host = Host::here();
    println!(
        "{} x {}{}, Linux {}; figures are medians of {} rounds in which all take turns",
        host.cpus,
        host.cpu,
        if host.virtual_machine { " (virtual machine)" } else { "" },
        host.kernel,
        settings.rounds
    );
    let mut report = Report { host, lines: Vec::new() };
    // Started by the first case that needs it.
    let mut world = None;
    for case in if cli.cases.is_empty() { &ALL[..] } else { &cli.cases } {
        let lines = match case {
            Case::Evtchn => cases::evtchn::run(&settings),
            Case::Store => cases::store::run(&settings, || up(&mut world, &settings)),
            Case::Block if cli.inside => settings
                .image
                .as_ref()
                .map_or_else(Vec::new, |image| cases::block::lab::here(&settings, image)),
            Case::Block => cases::block::run(&settings, || up(&mut world, &settings)),
            Case::Net if cli.inside => {
                settings.image.as_ref().map_or_else(Vec::new, |image| cases::net::lab::here(&settings, image))
            }
            Case::Net => cases::net::run(&settings, || up(&mut world, &settings)),
            Case::Restart => cases::restart::run(&settings, up(&mut world, &settings)),
            Case::Boot if cli.inside => {
                settings.image.as_ref().map_or_else(Vec::new, |image| cases::boot::here(&settings, image))
            }
            Case::Boot => cases::boot::run(&settings),
            Case::Qemu => cases::qemu::run(&settings),
        };
        println!("\n{}", table(&lines));
        report.lines.extend(lines);
    }
    if let Some(path) = &cli.report {
        let json = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        let drawing = path.with_extension("svg");
        std::fs::write(&drawing, bench::svg::draw(&report))
            .with_context(|| format!("cannot write {}", drawing.display()))?;
    }
    Ok(true)
}

/// The system, started when the first case needs it.
fn up<'a>(world: &'a mut Option<Result<World>>, settings: &Settings) -> &'a mut Result<World> {
    world.get_or_insert_with(|| World::start(settings))
}

//! The xenstore daemon: as a service domain under hv-core, or by itself.
#![forbid(unsafe_code)]

mod hosted;
mod offline;
mod standalone;
mod view;

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// The xenstore daemon of Bulkhead.
///
/// Under hv-core it is started without arguments. With --standalone it serves a Unix socket without a
/// hypervisor, for tools and tests, and keeps its tree in a file.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Serve a Unix socket, without hv-core.
    #[arg(long, requires = "socket", requires = "state")]
    standalone: bool,
    /// Where the socket is made. A stale one is replaced.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Where the journal is kept. Started again with the same file, the daemon has the whole tree back.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// If the journal is damaged, start from what is whole and say what was dropped, instead of refusing.
    #[arg(long)]
    salvage: bool,
    /// Largest size of each of the journal's two halves, in MiB (the file is sparse).
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=65536))]
    journal_mib: u64,
    /// Write the state in --state to FILE as a migration stream of Xen's format, and end.
    #[arg(long, value_name = "FILE", requires = "state", conflicts_with = "standalone")]
    export: Option<PathBuf>,
    /// Make a new --state from a migration stream, and end.
    #[arg(long, value_name = "FILE", requires = "state", conflicts_with_all = ["standalone", "export"])]
    import: Option<PathBuf>,
    /// Live update: says whether this binary takes over a journal of this layout, or a stream alone.
    #[arg(long, hide = true, value_name = "LAYOUT")]
    accepts: Option<u64>,
    /// Live update: where the predecessor's descriptors are listed.
    #[arg(long, hide = true, value_name = "FD")]
    inherit: Option<i32>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(layout) = args.accepts {
        // Of another layout it takes over a migration stream.
        let same = layout == xenstored::journal::layout::MAGIC;
        println!("{}", if same { standalone::ACCEPTED } else { standalone::STREAM });
        return Ok(());
    }
    if !args.standalone && args.export.is_none() && args.import.is_none() {
        return hosted::run(args.salvage, args.journal_mib << 20)
            .context("xenstored (alone: xenstored --standalone --socket PATH --state FILE)");
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let Some(state) = &args.state else { bail!("--state is needed") };
    let half_size = args.journal_mib << 20;
    if let Some(file) = &args.export {
        return offline::export(state, file, args.salvage, half_size).context("xenstored --export");
    }
    if let Some(file) = &args.import {
        return offline::import(state, file, half_size).context("xenstored --import");
    }
    let Some(socket) = &args.socket else { bail!("--socket is needed") };
    standalone::run(socket, state, args.salvage, half_size, args.inherit).context("xenstored")
}

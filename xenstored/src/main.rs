//! The xenstore daemon: as a service domain under hv-core, or by itself.

mod hosted;
mod standalone;

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
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if !args.standalone {
        return hosted::run(args.salvage, args.journal_mib << 20)
            .context("xenstored (alone: xenstored --standalone --socket PATH --state FILE)");
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let (Some(socket), Some(state)) = (&args.socket, &args.state) else {
        bail!("--socket and --state are needed")
    };
    standalone::run(socket, state, args.salvage, args.journal_mib << 20).context("xenstored")
}

//! dom0: see the library's documentation.

use std::path::PathBuf;

use clap::Parser;

/// The toolstack domain. hv-core starts it; not to be started by hand.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The host file.
    #[arg(long, default_value = "/etc/bulkhead/host.toml")]
    config: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    dom0_supervisor::daemon::run(&args.config)
}

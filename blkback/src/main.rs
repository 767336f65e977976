//! `blkback`: the block backend of one disk, run by hv-core as a process domain. See README.md.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context;
use blkback::device::{self, Shared};
use blkback::disk::attachment::Disk;
use blkback::disk::chain::{self, Approved, Chain, FileSpec};
use blkback::disk::qcow2::log::LOG_BYTES;
use blkback::disk::source::{self, Cache, SourceError};
use blkback::driver::{DiskState, Registry, Vbd};
use blkback::engine::NoSpace;
use blkback::fault;
use clap::{Parser, ValueEnum};
use domain_kit::control::{self, ControlHandle};
use domain_kit::xenbus::{Backend, BackendHandle, connect_store};
use domain_kit::{Domain, Hypercall, fdstore};
use hv_abi::resource_kind;

/// The approved resource that is the disk.
const RESOURCE: &str = "disk";
/// How long a predecessor's I/O may take to drain before the disk is said to be in use.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Read-only.
    R,
    /// Read and write.
    W,
}

/// Block backend: serves one disk to its guests. Started by hv-core, never by hand.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Run as a process domain: the only way to run, so it need not be said.
    #[arg(long)]
    domain: bool,
    /// Whether the disk may be written.
    #[arg(long, value_enum, default_value = "w")]
    mode: Mode,
    /// The disk's file, as FORMAT:NAME, and then each of its backing files. The resource `disk`, raw, if there is none.
    #[arg(long, value_name = "FORMAT:NAME")]
    disk: Vec<FileSpec>,
    /// How the host's page cache is used.
    #[arg(long, value_enum, default_value = "none")]
    cache: Cache,
    /// What happens to writes that find no room on the medium.
    #[arg(long, value_enum, default_value = "report")]
    no_space: NoSpace,
    /// For tests of poison requests only: panic at each write that covers this sector.
    #[arg(long, hide = true, value_name = "SECTOR")]
    fault: Option<u64>,
}

/// Which disk, and how.
#[derive(Clone, Debug)]
struct Wanted {
    chain: Chain,
    cache: Cache,
}

fn open(hv: &Arc<Hypercall>, wanted: &Wanted) -> Result<Arc<dyn Disk>, SourceError> {
    let Wanted { chain, cache } = wanted;
    let found: Arc<dyn Disk> = if chain.is_plain() {
        let (kind, fd) = hv.open(RESOURCE).map_err(SourceError::Open)?;
        let read_only = chain.read_only || kind == resource_kind::FILE_RO;
        Arc::new(source::open(fd, read_only, *cache, PATIENCE)?)
    } else {
        // Kept by hv-core: a write that was answered is not lost with the process.
        let log = match chain.wants_log() && !chain.read_only {
            true => Some(
                fdstore::kept_memory(hv, "disk-log", LOG_BYTES)
                    .map_err(|e| SourceError::Open(format!("the log of its tables: {e}")))?
                    .0,
            ),
            false => None,
        };
        let approved: Arc<dyn Approved> = hv.clone();
        let through = *cache == Cache::Writethrough;
        Arc::new(chain::open(chain, &approved, log.map(Arc::new), PATIENCE)?.with_writethrough(through))
    };
    let fence = found.fence();
    tracing::info!(
        geometry = ?found.geometry(),
        fence = fence.how,
        drain_us = fence.drain.as_micros() as u64,
        "disk opened"
    );
    Ok(found)
}

/// Tries until there is a disk; each failure's line goes to the devices' error nodes by way of the state.
fn keep_trying(
    hv: &Arc<Hypercall>,
    wanted: &Wanted,
    disk: &DiskState,
    control: &ControlHandle,
    handle: &BackendHandle,
) {
    loop {
        match open(hv, wanted) {
            Ok(found) => {
                disk.set(Ok(found));
                control.set_serving(true);
                handle.wake();
                return;
            }
            Err(error) => {
                disk.set(Err(error.to_string()));
                handle.wake();
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

/// Looks once a second whether the disk has grown; the driver then tells the frontends.
fn watch_size(disk: &DiskState, handle: &BackendHandle) {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let Ok(disk) = disk.get() else { continue };
        match disk.look_again() {
            Ok(true) => handle.wake(),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the disk's size cannot be looked at"),
        }
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(sector) = args.fault {
        fault::set_sector(sector);
    }
    let domain = Domain::join("blkback")?;
    let disk = Arc::new(DiskState::new());
    // The fence comes first: nothing of a predecessor's is touched before its I/O is over.
    let chain = Chain::new(args.disk.clone(), args.mode == Mode::R).map_err(anyhow::Error::msg)?;
    let wanted = Wanted { chain, cache: args.cache };
    // Its own channel: an NBD connection that is made anew does not wait for others.
    let hv = Arc::new(domain.hv.new_channel()?);
    match open(&hv, &wanted) {
        Ok(found) => disk.set(Ok(found)),
        Err(error) => {
            tracing::error!(%error, "no disk");
            disk.set(Err(error.to_string()));
        }
    }
    let registry = Arc::new(Registry::default());
    let claiming = Arc::new(AtomicUsize::new(0));
    let mut bus = Backend::new(
        |handle| {
            let fault = args.fault.map(|_| fault::hook as fn() -> _);
            let (no_space, claiming) = (args.no_space, claiming.clone());
            let shared = Shared { domain: domain.clone(), handle, fault, no_space, claiming };
            Vbd::new(shared, disk.clone(), registry.clone(), args.mode == Mode::R)
        },
        domain.domid(),
    )
    .context("eventfd")?;
    // With a predecessor's maps left to claim, the devices' threads say it when they have them; without a disk, and devices that
    // wait for it, nobody does.
    if claiming.load(Relaxed) == 0 && (disk.get().is_ok() || device::kept(&domain.hv)?.is_empty()) {
        domain.hv.served().context("telling hv-core that blkback is up")?;
    }
    let routes = blkback::control::routes(disk.clone(), registry.clone(), bus.handle());
    let control = control::serve_with(&domain, registry, routes).context("gRPC on descriptor 4")?;
    if disk.get().is_ok() {
        control.set_serving(true);
    } else {
        let (disk, control, handle) = (disk.clone(), control.clone(), bus.handle());
        std::thread::Builder::new()
            .name("disk".into())
            .spawn(move || keep_trying(&hv, &wanted, &disk, &control, &handle))
            .context("thread")?;
    }
    let handle = bus.handle();
    std::thread::Builder::new()
        .name("size".into())
        .stack_size(64 << 10)
        .spawn(move || watch_size(&disk, &handle))
        .context("thread")?;
    let xs = loop {
        match connect_store(&domain, Duration::from_secs(10)) {
            Ok(xs) => break xs,
            // Rings are served all the same.
            Err(error) => tracing::warn!(%error, "no store yet"),
        }
    };
    bus.run(&xs).context("watching the store")
}

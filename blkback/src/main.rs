//! `blkback`: the block backend of one disk, run by hv-core as a process domain. See README.md.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context;
use blkback::device::{self, Shared};
use blkback::disk::attachment::Disk;
use blkback::disk::chain::{self, Approved, Chain, FileSpec, Logs};
use blkback::disk::commit;
use blkback::disk::pool::LayeredDisk;
use blkback::disk::qcow2::log::LOG_BYTES;
use blkback::disk::source::{self, Cache, SourceError};
use blkback::driver::{DiskState, Registry, Vbd};
use blkback::engine::NoSpace;
use blkback::fault;
use clap::{Parser, ValueEnum};
use domain_kit::control::{self, ControlHandle};
use domain_kit::mem::SharedMem;
use domain_kit::xenbus::{Backend, BackendHandle, connect_store};
use domain_kit::{Domain, Hypercall, fdstore};
use hv_abi::resource_kind;

/// The fd store's names of a commit's log, and of the mark that it was finished.
const COMMIT_LOG: &str = "commit-log";
const COMMIT_MARK: &str = "commit-mark";
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
    /// The disk's file goes into its first backing file while it is served.
    #[arg(long)]
    commit: bool,
    /// The disk is what another was committed to: served only if that was finished.
    #[arg(long)]
    committed: bool,
    /// A drive without a medium.
    #[arg(long, conflicts_with = "disk")]
    empty: bool,
    /// Bytes of the logical sectors that the guest sees, 512 or 4096. Without it a device's own, and 512 for all else.
    #[arg(long, value_parser = sector_size)]
    sector_size: Option<u32>,
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

fn sector_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("must be 512 or 4096".into()),
    }
}

/// Which disk, and how.
#[derive(Clone, Debug)]
struct Wanted {
    /// `None`: an empty drive.
    chain: Option<Chain>,
    cache: Cache,
    sector_size: Option<u32>,
    committed: bool,
}

fn open(hv: &Arc<Hypercall>, wanted: &Wanted) -> Result<Arc<dyn Disk>, SourceError> {
    let Wanted { chain, cache, sector_size, .. } = wanted;
    let Some(chain) = chain else { return Ok(Arc::new(LayeredDisk::empty())) };
    if wanted.committed && !log(hv, COMMIT_MARK, false)?.is_some_and(|mark| commit::is_marked(&mark)) {
        return Err(SourceError::Open("the commit was cut short; the overlay must be served again".into()));
    }
    let found: Arc<dyn Disk> = if chain.is_plain() {
        let (kind, fd) = hv.open(RESOURCE).map_err(SourceError::Open)?;
        let read_only = chain.read_only || kind == resource_kind::FILE_RO;
        Arc::new(source::open_sectors(fd, read_only, *cache, *sector_size, PATIENCE)?)
    } else {
        let logs = Logs {
            main: log(hv, "disk-log", chain.wants_log() && !chain.read_only)?,
            commit: log(hv, COMMIT_LOG, chain.commit)?,
            mark: log(hv, COMMIT_MARK, chain.commit)?,
        };
        let approved: Arc<dyn Approved> = hv.clone();
        let through = *cache == Cache::Writethrough;
        let disk = chain::open(chain, &approved, &logs, PATIENCE)?;
        Arc::new(disk.with_writethrough(through).with_sectors(sector_size.unwrap_or(512)))
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

/// Memory for changes of tables, kept by hv-core: a write that was answered is not lost with the process. If it is not wanted, what a
/// predecessor left.
fn log(hv: &Arc<Hypercall>, name: &str, wanted: bool) -> Result<Option<Arc<SharedMem>>, SourceError> {
    let failed = |e: String| SourceError::Open(format!("the log of its tables: {e}"));
    let there = || {
        Ok(hv.fd_list().map_err(|e| failed(e.to_string()))?.iter().any(|fd| fd.name.as_str() == Some(name)))
    };
    if !wanted && !there()? {
        return Ok(None);
    }
    let (memory, _) = fdstore::kept_memory(hv, name, LOG_BYTES).map_err(|e| failed(e.to_string()))?;
    Ok(Some(Arc::new(memory)))
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

/// Looks once a second whether the disk has grown, or waits for room; the driver then tells the frontends and the toolstack.
fn watch_size(disk: &DiskState, registry: &Registry, handle: &BackendHandle) {
    let mut stopped = registry.stopped();
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let now = registry.stopped();
        if now != stopped {
            stopped = now;
            handle.wake();
        }
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
    let chain = match args.empty {
        true => None,
        false => {
            let chain = Chain::new(args.disk.clone(), args.mode == Mode::R).map_err(anyhow::Error::msg)?;
            Some(if args.commit { chain.with_commit().map_err(anyhow::Error::msg)? } else { chain })
        }
    };
    let wanted =
        Wanted { chain, cache: args.cache, sector_size: args.sector_size, committed: args.committed };
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
            let workers = Arc::default();
            let shared = Shared { domain: domain.clone(), handle, fault, no_space, claiming, workers };
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
    let control = control::serve_with(&domain, registry.clone(), routes).context("gRPC on descriptor 4")?;
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
        .spawn(move || watch_size(&disk, &registry, &handle))
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

//! `xenstored --standalone`: a Unix socket, a file, no hypervisor.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use xenstored::daemon::Daemon;
use xenstored::domains::NoDomains;
use xenstored::engine::{Engine, Options};
use xenstored::journal::log::Log;
use xenstored::journal::mem::Mem;
use xenstored::keeper::NoKeeper;

/// Serves until SIGTERM or SIGINT.
pub fn run(socket: &Path, state: &Path, salvage: bool, half_size: u64) -> anyhow::Result<()> {
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTERM);
    stop.add(Signal::SIGINT);
    stop.thread_block().context("blocking signals")?;
    let stop =
        SignalFd::with_flags(&stop, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")?;

    // The file is locked before anything of the predecessor's is touched: it may still be going down.
    let (mem, _lock) = open_state(state, half_size)?;
    let options = Options { half_size, salvage, ..Options::default() };
    let (engine, opened) = Engine::open(Rc::new(mem), &options).with_context(|| {
        format!(
            "{}: not used; --salvage starts from what is whole, another --state starts anew",
            state.display()
        )
    })?;
    if let Some(dropped) = &opened.dropped {
        tracing::error!(dropped, "the journal was damaged; the store is older than it was");
    }
    tracing::info!(
        fresh = opened.fresh,
        replayed = opened.replayed,
        nodes = engine.store.tree.len(),
        "journal {}",
        state.display()
    );
    let listener = listen(socket)?;
    let mut daemon = Daemon::new(engine, Some(listener), stop.as_fd(), NoKeeper, NoDomains)?;
    tracing::info!("serving {}", socket.display());
    daemon.run()?;
    if let Err(e) = daemon.engine().compact() {
        tracing::warn!(error = %e, "the journal keeps its events");
    }
    // So that tools fail at once instead of finding a socket that nobody answers.
    let _ = std::fs::remove_file(socket);
    Ok(())
}

fn open_state(path: &Path, half_size: u64) -> anyhow::Result<(Mem, Flock<File>)> {
    let name = path.display();
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("{name}: can't be opened"))?;
    // A killed predecessor's lock goes with its last thread; give it a moment.
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut handle = file.try_clone()?;
    let lock = loop {
        match Flock::lock(handle, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => break lock,
            Err((back, Errno::EAGAIN)) if Instant::now() < deadline => {
                handle = back;
                std::thread::sleep(Duration::from_millis(2));
            }
            Err((_, Errno::EAGAIN)) => bail!("{name}: another xenstored uses this file"),
            Err((_, e)) => return Err(e).context(format!("{name}: can't be locked")),
        }
    };
    let have = file.metadata().with_context(|| format!("{name}: no size"))?.len();
    let want = Log::memory_len(half_size);
    if have < want {
        // Sparse: only what is written takes space.
        file.set_len(want).with_context(|| format!("{name}: can't be made {want} bytes long"))?;
    }
    let mem = Mem::map(file, have.max(want) as usize).with_context(|| format!("{name}: can't be mapped"))?;
    Ok((mem, lock))
}

fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let name = path.display();
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            std::fs::remove_file(path).with_context(|| format!("{name}: a stale socket can't be removed"))?;
        }
        Ok(_) => bail!("{name}: exists and is no socket"),
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("{name}: can't be made"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

//! `xenstored --standalone`: a Unix socket, a file, no hypervisor.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use domain_kit::os::take_inherited;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use xenstored::daemon::Daemon;
use xenstored::domains::NoDomains;
use xenstored::engine::{Engine, Opened, Options};
use xenstored::journal::layout::MAGIC;
use xenstored::journal::log::Log;
use xenstored::journal::mem::Mem;
use xenstored::keeper::NoKeeper;
use xenstored::live::{Accepts, Handover, Plan, Started, Successor};
use xenstored::migrate::{Ends, RingEnd};
use xenstored::store::ConnId;

/// Serves until SIGTERM or SIGINT. With `inherit`, a predecessor's sockets are taken over.
pub fn run(
    socket: &Path,
    state: &Path,
    salvage: bool,
    half_size: u64,
    inherit: Option<i32>,
) -> anyhow::Result<()> {
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTERM);
    stop.add(Signal::SIGINT);
    stop.thread_block().context("blocking signals")?;
    let stop =
        SignalFd::with_flags(&stop, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")?;

    // The file is locked before anything of the predecessor's is touched: it may still be going down.
    let mut inherited = inherit.map(Inherited::take).transpose().context("the predecessor's descriptors")?;
    let options = Options { half_size, salvage, ..Options::default() };
    let streamed = inherited.as_mut().and_then(|i| i.stream.take().map(|(conn, stream)| (conn, stream, i)));
    let (engine, opened, lock) = match streamed {
        Some((asking, stream, ends)) => match take_stream(state, stream, asking, &options, ends) {
            Ok((engine, lock)) => (engine, Opened { fresh: true, ..Opened::default() }, lock),
            Err(e) => {
                // The predecessor's journal is as it left it, if its layout is this one's.
                tracing::error!(error = format!("{e:#}"), "the predecessor's stream is not used");
                open_journal(state, &options, ends.state.take())?
            }
        },
        None => open_journal(state, &options, inherited.as_mut().and_then(|i| i.state.take()))?,
    };
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
    let (listener, sockets) = match inherited {
        Some(inherited) => (inherited.listener, inherited.sockets),
        None => (Some(listen(socket)?), Vec::new()),
    };
    let listener = listener.context("the predecessor had no listening socket")?;
    let keeper = NoKeeper { inherited: sockets };
    let mut daemon = Daemon::new(engine, Some(listener), stop.as_fd(), keeper, NoDomains)?;
    daemon.set_successor(Box::new(Exec { state: lock }));
    tracing::info!("serving {}", socket.display());
    daemon.run()?;
    if let Err(e) = daemon.engine().compact() {
        tracing::warn!(error = %e, "the journal keeps its events");
    }
    // So that tools fail at once instead of finding a socket that nobody answers.
    let _ = std::fs::remove_file(socket);
    Ok(())
}

fn open_journal(
    state: &Path,
    options: &Options,
    inherited: Option<File>,
) -> anyhow::Result<(Engine, Opened, Flock<File>)> {
    let (mem, lock) = open_state(state, options.half_size, inherited)?;
    let (engine, opened) = Engine::open(Rc::new(mem), options).with_context(|| {
        format!(
            "{}: not used; --salvage starts from what is whole, another --state starts anew",
            state.display()
        )
    })?;
    Ok((engine, opened, lock))
}

/// Makes a journal of the predecessor's stream, in a file that replaces the old one when all is in it.
fn take_stream(
    state: &Path,
    mut stream: File,
    asking: ConnId,
    options: &Options,
    inherited: &mut Inherited,
) -> anyhow::Result<(Engine, Flock<File>)> {
    let new = state.with_extension("import");
    // Left by one that was killed here.
    let _ = std::fs::remove_file(&new);
    let (mem, lock) = open_state(&new, options.half_size, None)?;
    let mut bytes = Vec::new();
    stream.rewind()?;
    stream.read_to_end(&mut bytes)?;
    let (engine, imported) = Engine::import(Rc::new(mem), options, &bytes, inherited)?;
    engine.mark_live(asking);
    std::fs::rename(&new, state).with_context(|| format!("{}: can't be replaced", state.display()))?;
    let left_out = imported.left_out[0];
    tracing::info!(nodes = imported.nodes, connections = imported.kept[0], left_out, "stream taken over");
    Ok((engine, lock))
}

/// Opens and locks a journal's file, or takes over the one that the predecessor locked.
pub fn open_state(
    path: &Path,
    half_size: u64,
    inherited: Option<File>,
) -> anyhow::Result<(Mem, Flock<File>)> {
    let name = path.display();
    if let Some(file) = inherited {
        let lock = Flock::lock(file.try_clone()?, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| e)
            .with_context(|| format!("{name}: the predecessor's lock"))?;
        let len = file.metadata()?.len();
        return Ok((Mem::map(file, len as usize)?, lock));
    }
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

/// What a live update hands over, as lines of text in a memfd.
#[derive(Default)]
struct Inherited {
    state: Option<File>,
    listener: Option<UnixListener>,
    sockets: Vec<(ConnId, OwnedFd)>,
    /// A migration stream instead of `state`, and whose request started the update.
    stream: Option<(ConnId, File)>,
}

impl Ends for Inherited {
    fn socket(&mut self, number: u32, _fd: u32) -> bool {
        self.sockets.iter().any(|(id, _)| id.0 == u64::from(number))
    }

    fn ring(&mut self, _domid: u16) -> Option<RingEnd> {
        None
    }
}

impl Inherited {
    fn take(list: i32) -> anyhow::Result<Self> {
        let mut text = String::new();
        let mut file = File::from(take_inherited(list)?);
        file.rewind()?;
        file.read_to_string(&mut text)?;
        let mut inherited = Self::default();
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["state", fd] => inherited.state = Some(take_inherited(fd.parse()?)?.into()),
                ["listener", fd] => inherited.listener = Some(take_inherited(fd.parse()?)?.into()),
                ["stream", id, fd] => {
                    inherited.stream = Some((ConnId(id.parse()?), take_inherited(fd.parse()?)?.into()));
                }
                ["conn", id, fd] => {
                    inherited.sockets.push((ConnId(id.parse()?), take_inherited(fd.parse()?)?));
                }
                _ => bail!("{line:?} is no descriptor"),
            }
        }
        Ok(inherited)
    }
}

/// Live update by exec.
struct Exec {
    state: Flock<File>,
}

/// What a binary prints that takes over the journal.
pub const ACCEPTED: &str = "accepted";
/// What one prints whose journals have another layout.
pub const STREAM: &str = "stream";
/// How long a binary may take to say whether it takes over the journal.
const CHECK: Duration = Duration::from_secs(1);

impl Exec {
    fn exec(&self, handover: &Handover<'_>) -> anyhow::Result<Infallible> {
        let Handover { plan, asking, listener, sockets, stream } = *handover;
        let file = |name| anyhow::Ok(File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?));
        let mut list = file(c"xenstored-live-update")?;
        let mut streamed = None;
        let mut text = format!("state {}\n", self.state.as_raw_fd());
        if let Some(stream) = stream {
            let mut into = file(c"xenstored-stream")?;
            into.write_all(stream)?;
            text.push_str(&format!("stream {} {}\n", asking.0, into.as_raw_fd()));
            streamed = Some(into);
        }
        if let Some(listener) = listener {
            text.push_str(&format!("listener {}\n", listener.as_raw_fd()));
        }
        for (id, fd) in sockets {
            text.push_str(&format!("conn {} {}\n", id.0, fd.as_raw_fd()));
        }
        list.write_all(text.as_bytes())?;
        let file = CString::new(plan.file.as_os_str().as_bytes())?;
        let mut args = vec![file.clone()];
        match &plan.arguments {
            Some(text) => {
                for word in text.split_whitespace() {
                    args.push(CString::new(word)?);
                }
            }
            None => {
                let mut own = std::env::args_os().skip(1);
                while let Some(arg) = own.next() {
                    if arg == "--inherit" {
                        own.next();
                    } else {
                        args.push(CString::new(arg.as_bytes())?);
                    }
                }
            }
        }
        args.push(c"--inherit".into());
        args.push(CString::new(list.as_raw_fd().to_string())?);
        let all = || {
            let own = [list.as_fd(), self.state.as_fd()].into_iter().chain(listener);
            own.chain(streamed.as_ref().map(|s| s.as_fd())).chain(sockets.iter().map(|(_, fd)| *fd))
        };
        let set = |flags: FdFlag| all().try_for_each(|fd| fcntl(fd, FcntlArg::F_SETFD(flags)).map(drop));
        set(FdFlag::empty())?;
        let failed = nix::unistd::execv(&file, &args);
        set(FdFlag::FD_CLOEXEC)?;
        Ok(failed?)
    }
}

impl Successor for Exec {
    fn check(&self, plan: &Plan) -> Result<Accepts, String> {
        let meta = std::fs::metadata(&plan.file).map_err(|_| "File not accessible.")?;
        if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
            return Err("File not executable.".into());
        }
        // A binary that would refuse the journal must not be started: there is no way back.
        let mut child = Command::new(&plan.file)
            .args(["--accepts", &MAGIC.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("Error activating new binary: {e}."))?;
        let deadline = Instant::now() + CHECK;
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => {
                    let mut said = String::new();
                    let read = child.stdout.take().map(|out| out.take(16).read_to_string(&mut said));
                    // Of a program that is no xenstored, success says nothing.
                    return match (read, said.trim_end()) {
                        (Some(Ok(_)), ACCEPTED) => Ok(Accepts::Journal),
                        (Some(Ok(_)), STREAM) => Ok(Accepts::Stream),
                        _ => Err("The binary does not take over this journal.".into()),
                    };
                }
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_micros(200)),
                _ => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err("The binary does not take over this journal.".into());
                }
            }
        }
    }

    fn start(&mut self, handover: &Handover<'_>) -> Started {
        match self.exec(handover) {
            Ok(never) => match never {},
            Err(e) => Started::Failed(format!("Error activating new binary: {e:#}.")),
        }
    }
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

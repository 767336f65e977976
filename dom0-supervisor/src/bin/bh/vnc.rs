//! `bh vnc`: a Unix socket at which viewers find a guest's display. Only its owner (and root) can connect. A restart of dom0 or of the
//! guest's qemu-bridge ends the viewers' sessions; the socket stays, and a viewer that connects meanwhile waits.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, umask};
use proto::toolstack::vnc_input::Input;
use proto::toolstack::{GuestRef, VncInput, VncOutput};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::client::{Dom0, Failure, PATIENCE, lost};

/// Bytes of a viewer moved at once.
const PIECE: usize = 16 << 10;

/// A socket that goes with its value, and perhaps the directory that was made for it.
struct Socket {
    path: PathBuf,
    dir: Option<PathBuf>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        // What is gone already need not go.
        let _ = std::fs::remove_file(&self.path);
        if let Some(dir) = &self.dir {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

fn input(path: &Path, e: &std::io::Error) -> Failure {
    let hint = match e.kind() {
        std::io::ErrorKind::AddrInUse => "; it is there already: give another path, or remove it",
        _ => "",
    };
    Failure::Input(format!("{}: {e}{hint}", path.display()))
}

/// Serves viewers until it is interrupted, or, without `listen`, until the viewer that it starts ends.
///
/// # Errors
/// [`Failure`].
pub async fn run(
    dom0: &Dom0,
    guest: String,
    listen: Option<PathBuf>,
    viewer: PathBuf,
) -> Result<(), Failure> {
    // What is wrong with the guest is said before anything is made.
    drop(open(dom0, &guest, Instant::now()).await?);
    let own = listen.is_none();
    let (path, dir) = match listen {
        Some(path) => (path, None),
        None => {
            let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
            let dir = base.join(format!("bh-vnc-{}", std::process::id()));
            std::fs::DirBuilder::new().mode(0o700).create(&dir).map_err(|e| input(&dir, &e))?;
            (dir.join(&guest), Some(dir))
        }
    };
    // Never open to others, not even between bind(2) and chmod(2). This process has one thread.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(&path);
    umask(before);
    let listener = bound.map_err(|e| input(&path, &e))?;
    let socket = Socket { path, dir };
    if !own {
        eprintln!("bh: the display of {guest} is at {}; interrupt to end", socket.path.display());
        return serve(dom0, &guest, &listener, std::future::pending()).await;
    }
    let started = std::process::Command::new(&viewer).arg(&socket.path).spawn();
    let mut child = started.map_err(|e| {
        Failure::Input(format!("{}: {e}; install a VNC viewer, or say --listen PATH", viewer.display()))
    })?;
    let ended = async move {
        while let Ok(None) = child.try_wait() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    serve(dom0, &guest, &listener, ended).await
}

async fn serve(
    dom0: &Dom0,
    guest: &str,
    listener: &UnixListener,
    ended: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let mut terminated = signal(SignalKind::terminate())?;
    tokio::pin!(ended);
    loop {
        let viewer = tokio::select! {
            viewer = listener.accept() => viewer,
            () = &mut ended => return Ok(()),
            _ = tokio::signal::ctrl_c() => return Ok(()),
            _ = terminated.recv() => return Ok(()),
        };
        let Ok((viewer, _)) = viewer else { continue };
        let uid = viewer.peer_cred().map(|c| c.uid());
        if !uid.is_ok_and(|uid| uid == 0 || uid == nix::unistd::geteuid().as_raw()) {
            eprintln!("bh: a viewer of another user was refused");
            continue;
        }
        let (dom0, guest) = (dom0.clone(), guest.to_owned());
        tokio::spawn(async move {
            if let Err(e) = relay(&dom0, &guest, viewer).await {
                eprintln!("bh: a viewer's session: {e}");
            }
        });
    }
}

type Session = (mpsc::Sender<VncInput>, Streaming<VncOutput>);

/// Begins a session; what is being restarted is waited for until then.
async fn open(dom0: &Dom0, guest: &str, until: Instant) -> Result<Session, Failure> {
    loop {
        let result = async {
            let mut client = dom0.connect().await?;
            let (tx, rx) = mpsc::channel(2);
            let attach = VncInput { input: Some(Input::Attach(GuestRef { guest: guest.to_owned() })) };
            let outgoing = tokio_stream::once(attach).chain(ReceiverStream::new(rx));
            let stream = client.vnc(outgoing).await.map_err(Failure::Status)?;
            Ok((tx, stream.into_inner()))
        }
        .await;
        match result {
            Err(Failure::Status(e))
                if (lost(&e) || e.code() == Code::Unavailable) && Instant::now() < until =>
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            result => return result,
        }
    }
}

async fn relay(dom0: &Dom0, guest: &str, viewer: UnixStream) -> Result<(), Failure> {
    let (tx, mut stream) = open(dom0, guest, Instant::now() + PATIENCE).await?;
    let (mut read, mut write) = viewer.into_split();
    let typing = async {
        let mut buffer = vec![0; PIECE];
        while let Ok(n @ 1..) = read.read(&mut buffer).await {
            let piece = VncInput { input: Some(Input::Data(buffer[..n].to_vec())) };
            if tx.send(piece).await.is_err() {
                return;
            }
        }
    };
    let showing = async {
        // A broken stream ends the session: the viewer connects anew.
        while let Ok(Some(piece)) = stream.message().await {
            if write.write_all(&piece.data).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = typing => {}
        () = showing => {}
    }
    Ok(())
}

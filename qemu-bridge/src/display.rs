//! The guest's display. QEMU's VNC server listens nowhere: each session is a socket pair made here, one end of which QEMU is handed as a
//! client that is already connected. The other end is a gRPC stream's, or taken for a screenshot.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use proto::qemu::VncBytes;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::machine::Machine;
use crate::qmp::{Qmp, QmpError};
use crate::rfb;

/// Sessions at once.
pub const SESSIONS: usize = 8;
/// Bytes moved at once.
const PIECE: usize = 32 << 10;
/// What a screenshot may take.
const PICTURE: Duration = Duration::from_secs(10);

/// A new session's end, of this kind from the beginning: the sandbox lets nobody change it.
///
/// # Errors
/// [`QmpError`]; refused if there is no display.
fn session(qmp: &Qmp, kind: SockFlag) -> Result<UnixStream, QmpError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let refused = |text: String| QmpError::Refused { command: "a VNC session".into(), text };
    let servers = qmp.call("query-vnc-servers", json!({}))?;
    if servers.as_array().is_none_or(Vec::is_empty) {
        return Err(refused("the guest has no display; say display = true in its domain file".into()));
    }
    let made = socketpair(AddressFamily::Unix, SockType::Stream, None, kind | SockFlag::SOCK_CLOEXEC);
    let (ours, theirs) = made.map_err(|e| refused(e.to_string()))?;
    // Two sessions may begin at once.
    let name = format!("vnc-{}", NUMBER.fetch_add(1, Relaxed));
    qmp.give_fd(&name, theirs.as_fd())?;
    // Who may look was asked before: by dom0's socket, and by whoever listens for viewers.
    let client = json!({ "protocol": "vnc", "fdname": name, "skipauth": true });
    if let Err(error) = qmp.call("add_client", client) {
        let _taken_already = qmp.call("closefd", json!({ "fdname": name }));
        return Err(error);
    }
    Ok(ours.into())
}

/// What the display shows, as a PNG file.
///
/// # Errors
/// [`QmpError`]; refused if there is no display.
pub fn screenshot(machine: &Machine) -> Result<Vec<u8>, QmpError> {
    let refused = |text: String| QmpError::Refused { command: "a picture".into(), text };
    let picture = rfb::picture(session(machine.qmp(), SockFlag::empty())?, PICTURE)
        .map_err(|e| refused(e.to_string()))?;
    picture.png().map_err(|e| refused(e.to_string()))
}

/// Sessions of viewers.
#[derive(Debug)]
pub struct Viewers(Arc<Semaphore>);

impl Default for Viewers {
    fn default() -> Viewers {
        Viewers(Arc::new(Semaphore::new(SESSIONS)))
    }
}

impl Viewers {
    /// Moves bytes between a viewer and QEMU until either leaves. Nothing is kept here beyond what is on its way: a viewer that does not
    /// read makes QEMU wait, which then leaves pictures out.
    ///
    /// # Errors
    /// No display, or too many sessions.
    pub async fn serve(
        &self,
        machine: Arc<Machine>,
        mut from: Streaming<VncBytes>,
    ) -> Result<ReceiverStream<Result<VncBytes, Status>>, Status> {
        let permit = Arc::clone(&self.0).try_acquire_owned();
        let permit = permit.map_err(|_| {
            Status::resource_exhausted(format!("{SESSIONS} viewers look at this guest already"))
        })?;
        let made = tokio::task::spawn_blocking(move || session(machine.qmp(), SockFlag::SOCK_NONBLOCK)).await;
        let made = made.map_err(|e| Status::internal(e.to_string()))?.map_err(crate::control::status)?;
        let broken = |e: std::io::Error| Status::internal(format!("a VNC session: {e}"));
        let (mut read, mut write) = tokio::net::UnixStream::from_std(made).map_err(broken)?.into_split();
        let (tx, rx) = mpsc::channel(2);
        tokio::spawn(async move {
            let typing = async {
                while let Ok(Some(piece)) = from.message().await {
                    if write.write_all(&piece.data).await.is_err() {
                        return;
                    }
                }
            };
            let showing = async {
                let mut buffer = vec![0; PIECE];
                while let Ok(n @ 1..) = read.read(&mut buffer).await {
                    if tx.send(Ok(VncBytes { data: buffer[..n].to_vec() })).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = typing => {}
                () = showing => {}
                () = tx.closed() => {}
            }
            drop(permit);
        });
        Ok(ReceiverStream::new(rx))
    }
}

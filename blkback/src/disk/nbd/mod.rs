//! NBD client: whatever serves NBD can be a disk.
//!
//! The connection is made by hv-core (resource of the kind `CONNECT`): this process has no network. Lost connections are made
//! again for as long as it takes, and what was not answered is sent again; the guest waits meanwhile.
//!
//! **Fence.** Of a dead incarnation: see [`session`]. Of a connection that the server dropped or the network lost: a server must
//! not go on with requests of a connection that it has closed; nothing in the protocol lets a client see whether it does.

pub mod session;
#[cfg(test)]
mod tests;
pub mod wire;

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv, send, setsockopt, shutdown, sockopt};

use self::session::{Kept, MOST_READ, SLOTS, next_reply, slot_of};
use self::wire::{Command, Export, Reply, chunk, flag};
use super::layer::Layer;

/// Most bytes of one write.
const MOST_WRITE: u64 = 1 << 20;
/// How long a server may take for the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Longest pause between attempts to connect.
const PAUSE: Duration = Duration::from_secs(2);

/// Makes a connection and keeps its socket for the next incarnation.
pub trait Connector: Send + Sync {
    /// A connected (or connecting) stream socket.
    ///
    /// # Errors
    /// There is none.
    fn connect(&self) -> Result<OwnedFd>;
}

#[derive(Debug)]
enum Slot {
    Free,
    /// Under way, with the data that has come so far.
    Waiting {
        data: Vec<u8>,
        offset: u64,
        error: u32,
    },
    Done {
        data: Vec<u8>,
        error: u32,
    },
    /// Taken by a call that has nothing under way: not yet, not any more, or the connection was lost.
    Lost,
}

struct State {
    socket: Option<Arc<OwnedFd>>,
    slots: Vec<Slot>,
    over: bool,
}

struct Shared {
    connector: Box<dyn Connector>,
    export: String,
    first: Export,
    size: AtomicU64,
    /// Made so far.
    connections: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    /// Held by who sends.
    sender: Mutex<()>,
    kept: Kept,
}

/// An export of a server.
pub struct NbdLayer {
    shared: Arc<Shared>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl std::fmt::Debug for NbdLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdLayer").field("export", &self.shared.export).finish_non_exhaustive()
    }
}

/// A socket as a stream, with a deadline for each call.
struct Handshake<'a>(&'a OwnedFd);

impl Handshake<'_> {
    fn ready(&self, what: nix::poll::PollFlags) -> Result<()> {
        let timeout =
            nix::poll::PollTimeout::try_from(HANDSHAKE.as_millis()).unwrap_or(nix::poll::PollTimeout::MAX);
        match nix::poll::poll(&mut [nix::poll::PollFd::new(self.0.as_fd(), what)], timeout)? {
            0 => Err(Error::new(ErrorKind::TimedOut, "nbd: the server does not answer")),
            _ => Ok(()),
        }
    }
}

impl Read for Handshake<'_> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        self.ready(nix::poll::PollFlags::POLLIN)?;
        Ok(recv(self.0.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT)?)
    }
}

impl Write for Handshake<'_> {
    fn write(&mut self, from: &[u8]) -> Result<usize> {
        self.ready(nix::poll::PollFlags::POLLOUT)?;
        Ok(send(self.0.as_raw_fd(), from, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

fn begin(connector: &dyn Connector, export: &str) -> Result<(OwnedFd, Export)> {
    let socket = connector.connect()?;
    // A reply must fit as a whole.
    setsockopt(&socket, sockopt::RcvBuf, &(256 << 10))?;
    let found = wire::handshake(&mut Handshake(&socket), export)?;
    // Unix sockets have no such option.
    let _no_tcp = setsockopt(&socket, sockopt::TcpNoDelay, &true);
    Ok((socket, found))
}

impl NbdLayer {
    /// Connects. `kept` is what outlives the process; a predecessor's session is over ([`session::drain`]).
    ///
    /// # Errors
    /// One line: the connection's, or what the server said.
    pub fn open(connector: Box<dyn Connector>, export: &str, kept: Kept) -> Result<NbdLayer> {
        kept.clear();
        let (socket, first) = begin(&*connector, export)?;
        let state = State {
            socket: Some(Arc::new(socket)),
            slots: (0..SLOTS).map(|_| Slot::Free).collect(),
            over: false,
        };
        let shared = Arc::new(Shared {
            connector,
            export: export.to_owned(),
            first,
            size: first.size.into(),
            connections: 1.into(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            sender: Mutex::new(()),
            kept,
        });
        let theirs = shared.clone();
        let reader = std::thread::Builder::new().name("nbd".into()).spawn(move || theirs.read_replies())?;
        Ok(NbdLayer { shared, reader: Some(reader) })
    }

    /// The server refuses writes.
    pub fn read_only(&self) -> bool {
        self.shared.first.flags & flag::READ_ONLY != 0
    }

    fn has(&self, flag: u16) -> bool {
        self.shared.first.flags & flag != 0
    }
}

impl Drop for NbdLayer {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state();
            state.over = true;
            if let Some(socket) = &state.socket {
                let _gone_already = shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
            }
        }
        self.shared.changed.notify_all();
        if let Some(reader) = self.reader.take() {
            let _panicked = reader.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// The reader's life: replies to their slots; new connections.
    fn read_replies(&self) {
        let mut buffer = Vec::new();
        loop {
            let Some(socket) = self.state().socket.clone() else {
                if !self.connect_again() {
                    return;
                }
                continue;
            };
            let mut ended = None;
            let result = next_reply(socket.as_fd(), &self.kept, &mut buffer, None, |reply, data| {
                ended = self.note(reply, data)?;
                Ok(())
            });
            if result.is_ok()
                && let Some(number) = ended
            {
                self.finish(number);
            }
            if let Err(error) = result {
                let mut state = self.state();
                if state.over {
                    return;
                }
                tracing::warn!(export = self.export, %error, "nbd: the connection is lost");
                let _gone_already = shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
                state.socket = None;
                for slot in &mut state.slots {
                    if matches!(slot, Slot::Waiting { .. }) {
                        *slot = Slot::Lost;
                    }
                }
                self.changed.notify_all();
            }
        }
    }

    fn connect_again(&self) -> bool {
        let mut pause = Duration::from_millis(20);
        loop {
            if self.state().over {
                return false;
            }
            // Nobody is within a frame of the old connection.
            let sending = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
            self.kept.clear();
            match begin(&*self.connector, &self.export) {
                Ok((_, found)) if found.size < self.first.size || found.kind() != self.first.kind() => {
                    tracing::error!(
                        export = self.export,
                        "nbd: the server has another export of that name now"
                    );
                }
                Ok((socket, found)) => {
                    let connections = self.connections.fetch_add(1, Relaxed) + 1;
                    tracing::info!(export = self.export, connections, "nbd: connected again");
                    self.size.fetch_max(found.size, Relaxed);
                    self.state().socket = Some(Arc::new(socket));
                    drop(sending);
                    self.changed.notify_all();
                    return true;
                }
                Err(error) => tracing::debug!(export = self.export, %error, "nbd: no connection yet"),
            }
            drop(sending);
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE);
        }
    }

    /// A reply is there. Gives the slot that it ends.
    fn note(&self, reply: Reply, data: &[u8]) -> Result<Option<usize>> {
        let nonsense = |what: &str| Error::new(ErrorKind::InvalidData, format!("nbd: {what}"));
        let mut state = self.state();
        let (cookie, done) = match reply {
            Reply::Simple { cookie, .. } => (cookie, true),
            Reply::Chunk { cookie, done, .. } => (cookie, done),
        };
        let number = slot_of(cookie)?;
        let slot = &mut state.slots[number];
        let Slot::Waiting { data: so_far, offset, error } = slot else {
            return Err(nonsense("a reply to what was not asked"));
        };
        match reply {
            Reply::Simple { error: code, .. } => {
                if code == 0 && data.len() != so_far.len() {
                    return Err(nonsense("a simple reply to a read, where structured ones were agreed on"));
                }
                *error = code;
                so_far[..data.len()].copy_from_slice(data);
            }
            Reply::Chunk { kind, .. } => {
                let start = || -> Result<usize> {
                    let at = data.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
                    let at = at
                        .and_then(|at| at.checked_sub(*offset))
                        .ok_or_else(|| nonsense("a chunk's offset"))?;
                    usize::try_from(at).map_err(|_| nonsense("a chunk's offset"))
                };
                match kind {
                    chunk::NONE => {}
                    chunk::DATA => {
                        let (start, bytes) = (start()?, &data[8..]);
                        let end = start.checked_add(bytes.len()).filter(|end| *end <= so_far.len());
                        let end =
                            end.ok_or_else(|| nonsense("a chunk's data lies outside of what was asked for"))?;
                        so_far[start..end].copy_from_slice(bytes);
                    }
                    chunk::HOLE => {
                        let start = start()?;
                        let len =
                            data.get(8..12).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
                        let end = start.checked_add(len as usize).filter(|end| *end <= so_far.len());
                        let end = end.ok_or_else(|| nonsense("a hole lies outside of what was asked for"))?;
                        so_far[start..end].fill(0);
                    }
                    kind if kind & chunk::ERROR != 0 => {
                        let code =
                            data.get(..4).and_then(|b| b.try_into().ok()).map_or(5, u32::from_be_bytes);
                        *error = if *error == 0 { code.max(1) } else { *error };
                    }
                    _ => return Err(nonsense("a chunk of a kind that was not asked for")),
                }
            }
        }
        if done {
            self.kept.answered(number);
        }
        Ok(done.then_some(number))
    }

    /// The reply is noted and off the socket: only now may the slot's number be used again, or the same reply could be met twice.
    fn finish(&self, number: usize) {
        let mut state = self.state();
        let slot = &mut state.slots[number];
        if let Slot::Waiting { data, error, .. } = slot {
            let (data, error) = (std::mem::take(data), *error);
            *slot = Slot::Done { data, error };
        }
        drop(state);
        self.changed.notify_all();
    }

    /// One request to its end, over as many connections as it takes.
    fn call(
        &self,
        command: Command,
        fua: bool,
        offset: u64,
        len: u64,
        data: &[u8],
        back: usize,
    ) -> Result<Vec<u8>> {
        let number = {
            let mut state = self.state();
            loop {
                match state.slots.iter().position(|slot| matches!(slot, Slot::Free)) {
                    Some(number) => {
                        state.slots[number] = Slot::Lost;
                        break number;
                    }
                    None => state = self.wait(state),
                }
            }
        };
        let result = loop {
            let mut state = self.state();
            while state.socket.is_none() && !state.over {
                state = self.wait(state);
            }
            if state.over {
                break Err(ErrorKind::NotConnected.into());
            }
            drop(state);
            {
                let _sending = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
                // As it is now: it may have been made anew before our turn.
                let socket = {
                    let mut state = self.state();
                    let Some(socket) = state.socket.clone() else { continue };
                    state.slots[number] = Slot::Waiting { data: vec![0; back], offset, error: 0 };
                    socket
                };
                let header = wire::request(command, fua, number as u64, offset, len as u32);
                // Where replies are structured, data comes in chunks only.
                let data_back = if self.first.structured { 0 } else { back };
                if self.kept.send(socket.as_fd(), number, data_back, [&header, data]).is_err() {
                    // The reader sees it too, and wakes us.
                    let _gone_already = shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
                }
            }
            let mut state = self.state();
            while matches!(state.slots[number], Slot::Waiting { .. }) && !state.over {
                state = self.wait(state);
            }
            // It stays taken until the end of this call: whoever found it free here would have it freed under them below.
            match std::mem::replace(&mut state.slots[number], Slot::Lost) {
                Slot::Done { data, error: 0 } => break Ok(data),
                Slot::Done { error, .. } => break Err(errno(error)),
                _ => {}
            }
        };
        let last = std::mem::replace(&mut self.state().slots[number], Slot::Free);
        debug_assert!(matches!(last, Slot::Lost), "slot {number} was another's");
        self.changed.notify_all();
        result
    }
}

/// The protocol's error numbers are those of Linux, as far as it names them.
fn errno(code: u32) -> Error {
    match code {
        1 | 5 | 12 | 22 | 28 | 75 | 95 | 108 => Error::from_raw_os_error(code as i32),
        _ => Error::from_raw_os_error(5),
    }
}

impl Layer for NbdLayer {
    fn len(&self) -> u64 {
        self.shared.size.load(Relaxed)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let inside = self.len().saturating_sub(offset).min(into.len() as u64) as usize;
        into[inside..].fill(0);
        let most = MOST_READ.min(self.shared.first.most as usize);
        let mut done = 0;
        while done < inside {
            let n = most.min(inside - done);
            let data = self.shared.call(Command::Read, false, offset + done as u64, n as u64, &[], n)?;
            into[done..done + n].copy_from_slice(&data);
            done += n;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        if offset.checked_add(from.len() as u64).is_none_or(|end| end > self.len()) {
            return Err(ErrorKind::StorageFull.into());
        }
        let most = MOST_WRITE.min(self.shared.first.most.into()) as usize;
        let mut done = 0;
        for piece in from.chunks(most.max(512)) {
            self.shared.call(Command::Write, false, offset + done, piece.len() as u64, piece, 0)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        // In pieces: a server without holes takes its time for each.
        const PIECE: u64 = 32 << 20;
        let zeroes = if self.has(flag::SEND_WRITE_ZEROES) {
            Vec::new()
        } else {
            vec![0; len.min(MOST_WRITE) as usize]
        };
        let mut done = 0;
        while done < len {
            let n = if zeroes.is_empty() { PIECE.min(len - done) } else { (len - done).min(MOST_WRITE) };
            if zeroes.is_empty() {
                self.shared.call(Command::WriteZeroes, false, offset + done, n, &[], 0)?;
            } else {
                self.write(offset + done, &zeroes[..n as usize])?;
            }
            done += n;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        if !self.has(flag::SEND_TRIM) {
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            let n = (len - done).min(1 << 30);
            self.shared.call(Command::Trim, false, offset + done, n, &[], 0)?;
            done += n;
        }
        Ok(())
    }

    /// A server without FLUSH says that it has nothing to flush.
    fn flush(&self) -> Result<()> {
        if self.has(flag::SEND_FLUSH) && !self.read_only() {
            self.shared.call(Command::Flush, false, 0, 0, &[], 0)?;
        }
        Ok(())
    }

    fn grow(&self, _len: u64) -> Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
}

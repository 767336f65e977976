//! A xenstored that does nothing: every request gets the reply that its type has, of one size, without being looked at further.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use anyhow::Result;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Bytes of a header.
const HEADER: usize = 16;
/// XS_READ, whose reply is a value of [`VALUE`] bytes; any other request's is "OK".
const READ: u32 = 2;
/// Bytes of a value.
pub const VALUE: usize = 16;
/// Replies ready to be sent at once.
const BATCH: usize = 512;

struct Client {
    stream: UnixStream,
    /// Bytes of an incomplete request so far.
    pending: usize,
}

/// Serves the listener until its end.
///
/// # Errors
/// Those of epoll.
pub fn serve(listener: BorrowedFd<'_>) -> Result<()> {
    let listener = UnixListener::from(listener.try_clone_to_owned()?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let message = |kind: u32, payload: &[u8]| {
        let words = [kind, 0, 0, payload.len() as u32].map(u32::to_ne_bytes).concat();
        [&words, payload].concat()
    };
    let value = message(READ, &[b'x'; VALUE]);
    let ok = message(11, b"OK\0");
    let batches = [value.repeat(BATCH), ok.repeat(BATCH)];
    let mut clients: BTreeMap<u64, Client> = BTreeMap::new();
    let mut events = [EpollEvent::empty(); 64];
    let mut buffer = vec![0; 64 << 10];
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..ready] {
            let key = event.data();
            if key == 0 {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                let key = stream.as_raw_fd() as u64;
                epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, key))?;
                clients.insert(key, Client { stream, pending: 0 });
                continue;
            }
            let Some(client) = clients.get_mut(&key) else { continue };
            if !answer(client, &mut buffer, &batches) {
                clients.remove(&key);
            }
        }
    }
}

/// Takes what there is and answers it. Requests of one read are taken to be as long as its first one.
fn answer(client: &mut Client, buffer: &mut [u8], batches: &[Vec<u8>; 2]) -> bool {
    let have = match client.stream.read(buffer) {
        Ok(0) => return false,
        Ok(n) => n,
        Err(e) => return e.kind() == ErrorKind::WouldBlock,
    };
    if client.pending > 0 || have < HEADER {
        // Messages that are cut are none of the bench's.
        return false;
    }
    let word = |i: usize| u32::from_ne_bytes(buffer[4 * i..4 * i + 4].try_into().unwrap_or_default());
    let size = HEADER + word(3) as usize;
    if have % size != 0 {
        client.pending = have % size;
        return false;
    }
    let (batch, each) =
        if word(0) == READ { (&batches[0], HEADER + VALUE) } else { (&batches[1], HEADER + 3) };
    let count = (have / size).min(BATCH);
    client.stream.write_all(&batch[..count * each]).is_ok()
}

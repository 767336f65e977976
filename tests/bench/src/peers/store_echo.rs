//! A xenstored that does nothing: every request gets the reply that its type has, of one size, without being looked at further. A
//! WATCH is good for an event at once and one for every WRITE, wherever that is.

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
/// XS_WATCH, XS_WRITE and XS_WATCH_EVENT.
const WATCH: u32 = 4;
const WRITE: u32 = 11;
const EVENT: u32 = 15;
/// Bytes of a value.
pub const VALUE: usize = 16;
/// Replies ready to be sent at once.
const BATCH: usize = 512;

struct Client {
    stream: UnixStream,
    /// Bytes of an incomplete request so far.
    pending: usize,
    /// The events of its watches, each once.
    events: Vec<u8>,
}

fn message(kind: u32, payload: &[u8]) -> Vec<u8> {
    let words = [kind, 0, 0, payload.len() as u32].map(u32::to_ne_bytes).concat();
    [&words, payload].concat()
}

/// Serves the listener until its end.
///
/// # Errors
/// Those of epoll.
pub fn serve(listener: BorrowedFd<'_>) -> Result<()> {
    let listener = UnixListener::from(listener.try_clone_to_owned()?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let value = message(READ, &[b'x'; VALUE]);
    let ok = message(WRITE, b"OK\0");
    let batches = [value.repeat(BATCH), ok.repeat(BATCH)];
    let mut clients: BTreeMap<u64, Client> = BTreeMap::new();
    let mut watched = false;
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
                clients.insert(key, Client { stream, pending: 0, events: Vec::new() });
                continue;
            }
            let Some(client) = clients.get_mut(&key) else { continue };
            match answer(client, &mut buffer, &batches) {
                Some(WRITE) if watched => {
                    for client in clients.values_mut().filter(|c| !c.events.is_empty()) {
                        // Whoever has left is seen at its next turn.
                        let _ = client.stream.write_all(&client.events);
                    }
                }
                Some(kind) => watched |= kind == WATCH,
                None => drop(clients.remove(&key)),
            }
        }
    }
}

/// Takes what there is and answers it; gives the type of the first request. Requests of one read are taken to be as long as it is.
fn answer(client: &mut Client, buffer: &mut [u8], batches: &[Vec<u8>; 2]) -> Option<u32> {
    let have = match client.stream.read(buffer) {
        Ok(0) => return None,
        Ok(n) => n,
        Err(e) => return (e.kind() == ErrorKind::WouldBlock).then_some(0),
    };
    if client.pending > 0 || have < HEADER {
        // Messages that are cut are none of the bench's.
        return None;
    }
    let word = |i: usize| u32::from_ne_bytes(buffer[4 * i..4 * i + 4].try_into().unwrap_or_default());
    let (kind, size) = (word(0), HEADER + word(3) as usize);
    if have % size != 0 {
        client.pending = have % size;
        return None;
    }
    if kind == WATCH {
        let event = message(EVENT, &buffer[HEADER..size]);
        client.stream.write_all(&[&message(WATCH, b"OK\0"), &event[..]].concat()).ok()?;
        client.events.extend_from_slice(&event);
        return Some(kind);
    }
    let (batch, each) = if kind == READ { (&batches[0], HEADER + VALUE) } else { (&batches[1], HEADER + 3) };
    let count = (have / size).min(BATCH);
    client.stream.write_all(&batch[..count * each]).ok()?;
    Some(kind)
}

//! Round trips over a bare Unix stream socket between two processes: a message of one size, an answer of another.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Result, ensure};
use nix::unistd::{read, write};

use super::helper::{Helper, Role};

/// Bytes at the start of each message: its length and that of the answer wanted, u32 each.
const HEADER: usize = 8;
/// Largest message, bytes.
const MAX: usize = 8192;

/// One side here, the echo in a helper process.
#[derive(Debug)]
pub struct Echo {
    socket: UnixStream,
    /// The other side.
    pub helper: Helper,
}

impl Echo {
    /// Starts it.
    ///
    /// # Errors
    /// Those of socketpair(2) and of starting the helper.
    pub fn start() -> Result<Echo> {
        let (socket, other) = UnixStream::pair()?;
        let helper = Helper::start(Role::Echo, other.try_clone()?.into(), other.into())?;
        Ok(Echo { socket, helper })
    }

    /// Mean round trip of `count` messages of `request` bytes with answers of `reply` bytes, microseconds.
    ///
    /// # Errors
    /// Those of the socket; sizes out of range.
    pub fn round_trips(&mut self, request: usize, reply: usize, count: u32) -> Result<f64> {
        ensure!((HEADER..=MAX).contains(&request) && reply <= MAX, "sizes {request}, {reply}");
        let mut message = vec![0x5a; request];
        message[..4].copy_from_slice(&u32::try_from(request)?.to_ne_bytes());
        message[4..8].copy_from_slice(&u32::try_from(reply)?.to_ne_bytes());
        let mut answer = vec![0; reply];
        let start = Instant::now();
        for _ in 0..count {
            self.socket.write_all(&message)?;
            self.socket.read_exact(&mut answer)?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(count))
    }
}

/// The helper's side: answers until the socket closes.
///
/// # Errors
/// Those of the socket; a malformed message.
pub fn serve(input: BorrowedFd<'_>, output: BorrowedFd<'_>) -> Result<()> {
    let mut buffer = [0; MAX];
    loop {
        let mut have = 0;
        let reply = loop {
            let n = read(input.as_fd(), &mut buffer[have..])?;
            if n == 0 {
                return Ok(());
            }
            have += n;
            let word = |at: usize| {
                u32::from_ne_bytes([buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3]]) as usize
            };
            if have >= HEADER {
                let (length, reply) = (word(0), word(4));
                ensure!((HEADER..=MAX).contains(&length) && reply <= MAX, "malformed message");
                if have >= length {
                    break reply;
                }
            }
        };
        let mut sent = 0;
        while sent < reply {
            sent += write(output, &buffer[sent..reply])?;
        }
    }
}

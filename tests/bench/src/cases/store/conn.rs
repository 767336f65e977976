//! A blocking xenstore client without threads or buffers of its own, so that what is measured is the daemon.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use domain_kit::xs::Op;

/// Bytes of a message's header (io/xs_wire.h).
pub const HEADER: usize = 16;
/// XS_WATCH_EVENT.
pub const EVENT: u32 = 15;
/// XS_ERROR.
pub const ERROR: u32 = 16;
/// Longest wait for an answer: removing 100,000 nodes takes C's daemon seconds.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Appends a request with req_id 0.
pub fn request(op: Op, tx: u32, parts: &[&[u8]], out: &mut Vec<u8>) {
    let len: usize = parts.iter().map(|p| p.len()).sum();
    // Messages have at most 4,096 bytes of payload.
    for word in [op as u32, 0, tx, len as u32] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    parts.iter().for_each(|p| out.extend_from_slice(p));
}

/// Type, transaction and payload of the first whole message, and its length.
pub fn first(bytes: &[u8]) -> Option<(u32, &[u8], usize)> {
    let word = |i: usize| Some(u32::from_ne_bytes(bytes.get(4 * i..4 * i + 4)?.try_into().ok()?));
    let len = HEADER + word(3)? as usize;
    Some((word(0)?, bytes.get(HEADER..len)?, len))
}

/// One connection.
#[derive(Debug)]
pub struct Conn {
    /// The socket.
    pub stream: UnixStream,
    unread: Vec<u8>,
}

impl Conn {
    /// Connects.
    ///
    /// # Errors
    /// connect(2)'s.
    pub fn connect(path: &Path) -> Result<Conn> {
        let stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Conn { stream, unread: Vec::new() })
    }

    /// Sends bytes of requests.
    ///
    /// # Errors
    /// The socket's.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("sending to xenstored")
    }

    /// Reads until at least one whole message is there.
    fn fill(&mut self) -> Result<()> {
        let mut buffer = [0; 64 << 10];
        let n = self.stream.read(&mut buffer).context("waiting for xenstored")?;
        ensure!(n > 0, "xenstored closed the connection");
        self.unread.extend_from_slice(&buffer[..n]);
        Ok(())
    }

    /// Reads what there is and throws it away.
    ///
    /// # Errors
    /// The socket's.
    pub fn swallow(&mut self) -> Result<()> {
        self.fill()?;
        let mut at = 0;
        while let Some((_, _, len)) = first(&self.unread[at..]) {
            at += len;
        }
        self.unread.drain(..at);
        Ok(())
    }

    /// The next message, reply or event: its type and payload.
    ///
    /// # Errors
    /// The socket's.
    pub fn message(&mut self) -> Result<(u32, Vec<u8>)> {
        loop {
            if let Some((kind, payload, len)) = first(&self.unread) {
                let message = (kind, payload.to_vec());
                self.unread.drain(..len);
                return Ok(message);
            }
            self.fill()?;
        }
    }

    /// Sends a request and gives its reply; events in between are dropped.
    ///
    /// # Errors
    /// The socket's, and errors that the daemon answers with.
    pub fn call(&mut self, op: Op, tx: u32, parts: &[&[u8]]) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        request(op, tx, parts, &mut bytes);
        self.send(&bytes)?;
        loop {
            match self.message()? {
                (EVENT, _) => {}
                (ERROR, name) => bail!("{op:?}: {}", String::from_utf8_lossy(&name).trim_end_matches('\0')),
                (_, payload) => return Ok(payload),
            }
        }
    }

    /// Writes a node.
    ///
    /// # Errors
    /// As [`Conn::call`].
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<()> {
        self.call(Op::Write, 0, &[path.as_bytes(), b"\0", value]).map(drop)
    }

    /// Sends what `make` appends for 0, 1, … `count` - 1, at most `depth` of them unanswered, and checks that none fails.
    ///
    /// # Errors
    /// The socket's, and errors that the daemon answers with.
    pub fn pipeline(
        &mut self,
        count: u32,
        depth: u32,
        mut make: impl FnMut(u32, &mut Vec<u8>),
    ) -> Result<()> {
        let (mut sent, mut done) = (0, 0);
        let mut out = Vec::new();
        while done < count {
            out.clear();
            while sent < count && sent - done < depth {
                make(sent, &mut out);
                sent += 1;
            }
            if !out.is_empty() {
                self.send(&out)?;
            }
            self.fill()?;
            let mut at = 0;
            while let Some((kind, payload, len)) = first(&self.unread[at..]) {
                match kind {
                    EVENT => {}
                    ERROR => bail!("request {done}: {}", String::from_utf8_lossy(payload)),
                    _ => done += 1,
                }
                at += len;
            }
            self.unread.drain(..at);
        }
        Ok(())
    }
}

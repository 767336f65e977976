//! The client itself: one reader thread takes replies and events apart, any thread may call.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::ops::{XsOps, nul};
use super::transport::{SocketTransport, Transport};
use super::watch::{Registry, WatchSet};
use super::wire::{self, HEADER, Op, PAYLOAD_MAX};
use super::{XsErrno, XsError};

/// How long a call waits unless [`XsClient::set_timeout`] says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one reconnection attempt waits for the server.
const RESET_STEP: Duration = Duration::from_secs(2);

type Answer = Result<Vec<u8>, XsError>;

pub(crate) struct Inner {
    transport: Box<dyn Transport>,
    /// Serialises writers; held during a reset so that nobody writes into a half-made connection.
    sending: Mutex<()>,
    pending: Mutex<HashMap<u32, (Op, SyncSender<Answer>)>>,
    next_id: AtomicU32,
    timeout_ms: AtomicU32,
    pub(crate) watches: Registry,
}

impl Inner {
    fn timeout(&self) -> Duration {
        Duration::from_millis(u64::from(self.timeout_ms.load(Ordering::Relaxed)))
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, HashMap<u32, (Op, SyncSender<Answer>)>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn call(&self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Answer {
        self.call_within(self.timeout(), op, tx_id, parts)
    }

    pub(crate) fn call_within(&self, timeout: Duration, op: Op, tx_id: u32, parts: &[&[u8]]) -> Answer {
        let deadline = Instant::now() + timeout;
        let (answer, wait) = sync_channel(1);
        let req_id = loop {
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            let mut pending = self.pending();
            // 0 is what events carry; a busy id is one that a caller of 2^32 calls ago still waits for.
            if id != 0 && !pending.contains_key(&id) {
                pending.insert(id, (op, answer));
                break id;
            }
        };
        let sent = wire::encode(op, req_id, tx_id, parts).and_then(|msg| {
            let _one = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
            self.transport.send(&msg, deadline)
        });
        if let Err(e) = sent {
            self.pending().remove(&req_id);
            return Err(match e {
                XsError::Timeout(_) => XsError::Timeout(timeout),
                e => e,
            });
        }
        match wait.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(answer) => answer,
            Err(e) => {
                self.pending().remove(&req_id);
                match e {
                    RecvTimeoutError::Timeout => Err(XsError::Timeout(timeout)),
                    RecvTimeoutError::Disconnected => Err(XsError::Disconnected),
                }
            }
        }
    }

    fn dispatch(&self, head: wire::Header, payload: &[u8]) {
        if head.kind == Op::WatchEvent as u32 {
            let mut parts = payload.split(|b| *b == 0);
            if let (Some(path), Some(token)) = (parts.next(), parts.next()) {
                self.watches.deliver(&String::from_utf8_lossy(path), &String::from_utf8_lossy(token));
            }
            return;
        }
        // An unknown id is the answer to a call that gave up.
        let Some((op, answer)) = self.pending().remove(&head.req_id) else { return };
        let result = if head.kind == Op::Error as u32 {
            Err(XsError::Errno(XsErrno::from_payload(payload)))
        } else if head.kind == op as u32 {
            Ok(payload.to_vec())
        } else {
            Err(XsError::Protocol("reply of another type than the request"))
        };
        // Capacity 1 and one answer: never blocks. The caller may have left.
        let _ = answer.try_send(result);
    }

    /// Reads until the stream breaks.
    fn read_stream(&self) -> XsError {
        let mut buf = vec![0u8; 2 * (HEADER + PAYLOAD_MAX)];
        let mut filled = 0;
        loop {
            match self.transport.recv(&mut buf[filled..]) {
                Ok(n) => filled += n,
                Err(e) => return e,
            }
            let mut at = 0;
            loop {
                match wire::decode(&buf[at..filled]) {
                    Err(e) => return e,
                    Ok(Some(head)) if filled - at >= HEADER + head.len => {
                        self.dispatch(head, &buf[at + HEADER..at + HEADER + head.len]);
                        at += HEADER + head.len;
                    }
                    Ok(_) => break,
                }
            }
            buf.copy_within(at..filled, 0);
            filled -= at;
        }
    }

    fn fail_pending(&self) {
        for (_, (_, answer)) in self.pending().drain() {
            let _ = answer.try_send(Err(XsError::Disconnected));
        }
    }

    /// The reader thread: reads, and after a loss connects again and sets the watches again.
    fn run(self: Arc<Self>) {
        loop {
            let why = self.read_stream();
            self.fail_pending();
            if matches!(why, XsError::Closed) {
                return;
            }
            tracing::warn!(error = %why, "xenstore connection lost, reconnecting");
            loop {
                let _one = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
                // Callers between the loss and now got their answer from fail_pending or fail here.
                self.fail_pending();
                match self.transport.reset(Instant::now() + RESET_STEP) {
                    Ok(()) => break,
                    Err(XsError::Closed) => return,
                    Err(e) => tracing::warn!(error = %e, "xenstore reconnection failed, trying again"),
                }
                drop(_one);
                std::thread::sleep(Duration::from_millis(50));
            }
            // In a thread of its own: this one has to read, or the server's side fills up.
            let again = Arc::clone(&self);
            let spawned =
                std::thread::Builder::new().name("xs-rewatch".into()).spawn(move || again.rewatch());
            if let Err(e) = spawned {
                tracing::error!(error = %e, "no thread to set the xenstore watches again");
            }
        }
    }

    fn rewatch(&self) {
        for (path, token) in self.watches.all() {
            let (Ok(path_z), Ok(token_z)) = (nul(&path), nul(&token)) else { continue };
            match self.call(Op::Watch, 0, &[&path_z, &token_z]) {
                Ok(_) | Err(XsError::Errno(XsErrno::EEXIST)) => {}
                Err(XsError::Disconnected | XsError::Closed) => return,
                Err(e) => tracing::error!(path, error = %e, "xenstore watch could not be set again"),
            }
        }
    }
}

/// A connection to xenstored. Clones share it; the last one dropped closes it.
#[derive(Clone)]
pub struct XsClient {
    inner: Arc<Inner>,
    _closer: Arc<Closer>,
}

struct Closer(Arc<Inner>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.transport.close();
    }
}

impl XsClient {
    /// Connects over any transport; resets it first, so nothing of a former incarnation is left.
    ///
    /// # Errors
    /// When the server does not take part before `timeout`.
    pub fn connect(transport: impl Transport, timeout: Duration) -> Result<Self, XsError> {
        transport.reset(Instant::now() + timeout)?;
        let inner = Arc::new(Inner {
            transport: Box::new(transport),
            sending: Mutex::new(()),
            pending: Mutex::new(HashMap::new()),
            next_id: AtomicU32::new(1),
            timeout_ms: AtomicU32::new(DEFAULT_TIMEOUT.as_millis() as u32),
            watches: Registry::default(),
        });
        let reader = Arc::clone(&inner);
        std::thread::Builder::new().name("xs-reader".into()).spawn(move || reader.run())?;
        Ok(Self { _closer: Arc::new(Closer(Arc::clone(&inner))), inner })
    }

    /// Connects to a xenstored's Unix socket, waiting up to `timeout` for it to appear.
    ///
    /// # Errors
    /// As [`XsClient::connect`].
    pub fn connect_socket(path: impl AsRef<Path>, timeout: Duration) -> Result<Self, XsError> {
        Self::connect(SocketTransport::new(path)?, timeout)
    }

    /// Sets how long each later call of all clones waits for its answer.
    pub fn set_timeout(&self, timeout: Duration) {
        let ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        self.inner.timeout_ms.store(ms, Ordering::Relaxed);
    }

    /// A new, empty set of watches.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn watch_set(&self) -> Result<WatchSet, XsError> {
        WatchSet::new(Arc::clone(&self.inner))
    }

    /// Runs `body` in a transaction and commits it; runs it again while the commit conflicts (EAGAIN),
    /// until the client's deadline. An error of `body` aborts the transaction and is returned.
    ///
    /// # Errors
    /// `body`'s, or EAGAIN when it still conflicted at the deadline.
    pub fn transaction<T>(&self, mut body: impl FnMut(&Tx<'_>) -> Result<T, XsError>) -> Result<T, XsError> {
        let deadline = Instant::now() + self.inner.timeout();
        let mut attempt = 0u32;
        loop {
            let id = self.inner.call(Op::TransactionStart, 0, &[b"\0"])?;
            let id = std::str::from_utf8(&id).ok().and_then(|s| s.trim_end_matches('\0').parse().ok());
            let Some(id) = id.filter(|id| *id != 0) else {
                return Err(XsError::Protocol("TRANSACTION_START without an id"));
            };
            let tx = Tx { client: self, id };
            let result = body(&tx).inspect_err(|_| {
                let _ = self.inner.call(Op::TransactionEnd, id, &[b"F\0"]);
            });
            let conflict = match result {
                Err(e) if e.is(XsErrno::EAGAIN) => e,
                Err(e) => return Err(e),
                Ok(value) => match self.inner.call(Op::TransactionEnd, id, &[b"T\0"]) {
                    Ok(_) => return Ok(value),
                    Err(e) if e.is(XsErrno::EAGAIN) => e,
                    Err(e) => return Err(e),
                },
            };
            attempt += 1;
            if Instant::now() >= deadline {
                return Err(conflict);
            }
            if attempt > 3 {
                std::thread::sleep(Duration::from_millis(u64::from(attempt.min(20))));
            }
        }
    }

    /// INTRODUCE (dom0 only): tells the server of a domain's ring. `gfn` is ignored by servers that use grants.
    ///
    /// # Errors
    /// EACCES, EINVAL.
    pub fn introduce(&self, domid: u16, gfn: u64, port: u32) -> Result<(), XsError> {
        let args = [nul(&domid.to_string())?, nul(&gfn.to_string())?, nul(&port.to_string())?].concat();
        self.request(Op::Introduce, &[&args]).map(drop)
    }

    /// RELEASE (dom0 only): disconnects a domain.
    ///
    /// # Errors
    /// EACCES, ENOENT.
    pub fn release(&self, domid: u16) -> Result<(), XsError> {
        self.request(Op::Release, &[&nul(&domid.to_string())?]).map(drop)
    }

    /// IS_DOMAIN_INTRODUCED (dom0 only).
    ///
    /// # Errors
    /// EACCES.
    pub fn is_domain_introduced(&self, domid: u16) -> Result<bool, XsError> {
        Ok(self.request(Op::IsDomainIntroduced, &[&nul(&domid.to_string())?])?.first() == Some(&b'T'))
    }

    /// GET_DOMAIN_PATH: `/local/domain/<domid>`.
    ///
    /// # Errors
    /// EINVAL.
    pub fn domain_path(&self, domid: u16) -> Result<String, XsError> {
        let path = self.request(Op::GetDomainPath, &[&nul(&domid.to_string())?])?;
        Ok(String::from_utf8_lossy(&path).trim_end_matches('\0').to_owned())
    }

    /// SET_TARGET (dom0 only): `domid` may act as `target` does.
    ///
    /// # Errors
    /// EACCES, ENOENT.
    pub fn set_target(&self, domid: u16, target: u16) -> Result<(), XsError> {
        let args = [nul(&domid.to_string())?, nul(&target.to_string())?].concat();
        self.request(Op::SetTarget, &[&args]).map(drop)
    }

    /// CONTROL (dom0 only): runs a command of the daemon and returns its text.
    ///
    /// # Errors
    /// EACCES, EINVAL for an unknown command.
    pub fn control(&self, args: &[&str]) -> Result<String, XsError> {
        let mut payload = Vec::new();
        for arg in args {
            payload.extend_from_slice(&nul(arg)?);
        }
        let text = self.request(Op::Control, &[&payload])?;
        Ok(String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned())
    }
}

impl XsOps for XsClient {
    fn request(&self, op: Op, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        self.inner.call(op, 0, parts)
    }
}

/// An open transaction: see [`XsClient::transaction`].
pub struct Tx<'a> {
    client: &'a XsClient,
    id: u32,
}

impl XsOps for Tx<'_> {
    fn request(&self, op: Op, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        self.client.inner.call(op, self.id, parts)
    }
}

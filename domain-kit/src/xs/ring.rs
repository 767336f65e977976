//! The ring page of a process domain (docs/misc/xenstore-ring.txt), from the client's end.
//!
//! The server can write the whole page, so its indices are allegations: the client's own two indices
//! are kept here, and the server's are checked against them before use.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::XsError;
use super::transport::{Stop, Transport, wait_fd};
use super::wire::{CONNECTED, FEATURE_ERROR, FEATURE_RECONNECTION, RECONNECT, RING_SIZE, ring_off as off};

/// A page shared with a peer. Accesses are atomic or byte copies, never references into the page.
pub trait SharedPage: Send + Sync + 'static {
    /// Loads the aligned 32-bit word at byte offset `off` (Acquire).
    fn load_u32(&self, off: usize) -> u32;
    /// Stores the aligned 32-bit word at byte offset `off` (Release).
    fn store_u32(&self, off: usize, value: u32);
    /// Copies bytes out of the page.
    fn read_bytes(&self, off: usize, buf: &mut [u8]);
    /// Copies bytes into the page.
    fn write_bytes(&self, off: usize, bytes: &[u8]);
}

/// The client's end of a ring page and its event-channel port.
pub struct RingTransport {
    page: Arc<dyn SharedPage>,
    /// Becomes readable when the server notifies.
    rx: OwnedFd,
    /// Writing 1 notifies the server.
    tx: OwnedFd,
    /// Our producer index of the request ring: the page's copy is only published from here.
    req_prod: Mutex<u32>,
    /// Our consumer index of the response ring.
    rsp_cons: AtomicU32,
    space: Condvar,
    stop: Stop,
}

impl RingTransport {
    /// Takes the domain's ring page and the two fds of its store port.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(page: Arc<dyn SharedPage>, rx: OwnedFd, tx: OwnedFd) -> Result<Self, XsError> {
        Ok(Self {
            page,
            rx,
            tx,
            req_prod: Mutex::new(0),
            rsp_cons: AtomicU32::new(0),
            space: Condvar::new(),
            stop: Stop::new()?,
        })
    }

    fn notify(&self) -> Result<(), XsError> {
        match nix::unistd::write(&self.tx, &1u64.to_ne_bytes()) {
            // EAGAIN: the counter is full, so the server has a notification pending.
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn drain(&self) {
        // Only called after poll said it is readable; a lost race blocks nobody, the fd is drained by one thread.
        let mut count = [0u8; 8];
        let _ = nix::unistd::read(&self.rx, &mut count);
    }

    fn check_error(&self) -> Result<(), XsError> {
        if self.page.load_u32(off::FEATURES) & FEATURE_ERROR != 0 {
            let code = self.page.load_u32(off::ERROR);
            if code != 0 {
                return Err(XsError::RingError(code));
            }
        }
        Ok(())
    }
}

/// Splits `len` bytes at stream position `at` into the one or two pieces they occupy in the ring.
fn pieces(at: u32, len: u32) -> [(usize, usize); 2] {
    let start = at % RING_SIZE;
    let first = len.min(RING_SIZE - start);
    [(start as usize, first as usize), (0, (len - first) as usize)]
}

impl Transport for RingTransport {
    fn send(&self, msg: &[u8], deadline: Instant) -> Result<(), XsError> {
        let mut prod = self.req_prod.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rest = msg;
        while !rest.is_empty() {
            self.stop.check()?;
            self.check_error()?;
            let used = prod.wrapping_sub(self.page.load_u32(off::REQ_CONS));
            if used > RING_SIZE {
                return Err(XsError::Protocol("request ring indices are inconsistent"));
            }
            let n = (RING_SIZE - used).min(rest.len() as u32);
            if n == 0 {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    if rest.len() < msg.len() {
                        self.stop.set_broken();
                    }
                    return Err(XsError::Timeout(Duration::ZERO));
                }
                // The reader thread wakes us; the cap covers a notification that raced with the check.
                let wait = left.min(Duration::from_millis(20));
                prod = self.space.wait_timeout(prod, wait).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let (head, tail) = rest.split_at(n as usize);
            let mut src = head;
            for (start, len) in pieces(*prod, n) {
                self.page.write_bytes(off::REQ + start, &src[..len]);
                src = &src[len..];
            }
            *prod = prod.wrapping_add(n);
            self.page.store_u32(off::REQ_PROD, *prod);
            self.notify()?;
            rest = tail;
        }
        Ok(())
    }

    fn recv(&self, buf: &mut [u8]) -> Result<usize, XsError> {
        loop {
            self.stop.check()?;
            self.check_error()?;
            let cons = self.rsp_cons.load(Ordering::Relaxed);
            let avail = self.page.load_u32(off::RSP_PROD).wrapping_sub(cons);
            if avail > RING_SIZE {
                return Err(XsError::Protocol("response ring indices are inconsistent"));
            }
            let n = avail.min(u32::try_from(buf.len()).unwrap_or(u32::MAX));
            if n > 0 {
                let mut at = 0;
                for (start, len) in pieces(cons, n) {
                    self.page.read_bytes(off::RSP + start, &mut buf[at..at + len]);
                    at += len;
                }
                let cons = cons.wrapping_add(n);
                self.rsp_cons.store(cons, Ordering::Relaxed);
                self.page.store_u32(off::RSP_CONS, cons);
                self.notify()?;
                return Ok(n as usize);
            }
            if wait_fd(&self.rx, PollFlags::POLLIN, &self.stop, None)? {
                self.drain();
            }
            self.space.notify_all();
        }
    }

    fn reset(&self, deadline: Instant) -> Result<(), XsError> {
        let mut prod = self.req_prod.lock().unwrap_or_else(PoisonError::into_inner);
        self.stop.mend();
        self.page.store_u32(off::CONNECTION, RECONNECT);
        self.notify()?;
        while self.page.load_u32(off::CONNECTION) != CONNECTED {
            let features = self.page.load_u32(off::FEATURES);
            if features != 0 && features & FEATURE_RECONNECTION == 0 {
                return Err(XsError::Protocol("server without ring reconnection"));
            }
            let step = deadline.min(Instant::now() + Duration::from_millis(50));
            if wait_fd(&self.rx, PollFlags::POLLIN, &self.stop, Some(step))? {
                self.drain();
            } else if Instant::now() >= deadline {
                return Err(XsError::Timeout(Duration::ZERO));
            }
        }
        *prod = self.page.load_u32(off::REQ_PROD);
        let cons = self.page.load_u32(off::RSP_CONS);
        self.rsp_cons.store(cons, Ordering::Relaxed);
        if self.page.load_u32(off::REQ_CONS) != *prod {
            return Err(XsError::Protocol("request ring is not empty after a reset"));
        }
        // The response ring may already carry something new, but never more than it holds.
        if self.page.load_u32(off::RSP_PROD).wrapping_sub(cons) > RING_SIZE {
            return Err(XsError::Protocol("response ring indices are inconsistent"));
        }
        Ok(())
    }

    fn close(&self) {
        self.stop.set();
        self.space.notify_all();
    }
}

impl SharedPage for crate::mem::Page {
    fn load_u32(&self, off: usize) -> u32 {
        self.mem.load_u32(self.base + off, Ordering::Acquire)
    }

    fn store_u32(&self, off: usize, value: u32) {
        self.mem.store_u32(self.base + off, value, Ordering::Release);
    }

    fn read_bytes(&self, off: usize, buf: &mut [u8]) {
        self.mem.copy_out(self.base + off, buf);
    }

    fn write_bytes(&self, off: usize, bytes: &[u8]) {
        self.mem.copy_in(self.base + off, bytes);
    }
}

//! One connection, and what of it outlives the process.
//!
//! **The fence.** Requests that a dead process has sent are carried out whenever the server comes to them, so a new session must not
//! begin before each is answered. The socket is therefore kept in the fd store, and beside it, in shared memory, which requests were sent
//! whole and not answered:
//!
//! - A frame goes out by sendmmsg(2) with its mmsghdr in that memory: the kernel stores the count of bytes before the call
//!   returns, so that a kill never parts the bytes from their count.
//! - A reply is looked at by MSG_PEEK until all of it is there, noted, and only then taken off the socket, in one call that has
//!   nothing to wait for. Whoever comes next finds it either still there or noted, or both.
//!
//! The next incarnation takes the socket ([`drain`]), waits for the replies of all that was sent whole, and closes it. A frame that
//! was cut short is never carried out: a server has all of a write before it begins.
#![expect(unsafe_code, reason = "sendmmsg with its mmsghdr in shared memory")]

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

use domain_kit::mem::SharedMem;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use super::wire::{Reply, reply, reply_len};

/// Requests under way at most.
pub const SLOTS: usize = 16;
/// Bytes of the shared memory.
pub const STATE_BYTES: usize = 4096;
/// Most bytes of one read: with its header it must fit into the socket's buffer as a whole.
pub const MOST_READ: usize = 32 << 10;

const MAGIC: u32 = 0x6e62_6432;
const AT_MAGIC: usize = 0;
/// Slot that is being sent, plus 1.
const AT_SENDING: usize = 4;
/// Bytes of its frame.
const AT_TOTAL: usize = 8;
/// Step in the upper half, bytes sent before it in the lower.
const AT_STEP: usize = 16;
/// Two mmsghdr, for even and odd steps.
const AT_HEADERS: usize = 64;
/// Per slot, four words: how many requests were begun on it, which of them was sent whole last, which was answered last, and the bytes of
/// data that a good simple reply brings.
const AT_SLOTS: usize = 256;
const NO_COUNT: u32 = u32::MAX;

/// The shared memory.
#[derive(Debug)]
pub struct Kept(pub SharedMem);

impl Kept {
    /// As new.
    pub fn clear(&self) {
        self.0.store_u32(AT_MAGIC, 0, Release);
        self.0.zero(4, STATE_BYTES - 4);
        self.0.store_u32(AT_MAGIC, MAGIC, Release);
    }

    fn slot(slot: usize) -> usize {
        AT_SLOTS + 16 * slot
    }

    fn header(step: u32) -> usize {
        AT_HEADERS + (step & 1) as usize * size_of::<libc::mmsghdr>()
    }

    fn count_at(step: u32) -> usize {
        Self::header(step) + std::mem::offset_of!(libc::mmsghdr, msg_len)
    }

    /// A reply of the slot is noted: it is answered whatever becomes of us. The reply can be here before the sender has noted that
    /// it sent all of the request: so each writes a word of its own, and neither undoes what the other says.
    pub fn answered(&self, slot: usize) {
        let begun = self.0.load_u32(Self::slot(slot), Acquire);
        self.0.store_u32(Self::slot(slot) + 8, begun, Release);
    }

    fn begin(&self, slot: usize) {
        let begun = self.0.load_u32(Self::slot(slot), Relaxed);
        self.0.store_u32(Self::slot(slot), begun.wrapping_add(1), Release);
    }

    fn sent(&self, slot: usize) {
        let begun = self.0.load_u32(Self::slot(slot), Relaxed);
        self.0.store_u32(Self::slot(slot) + 4, begun, Release);
    }

    /// It was sent whole and is not answered.
    fn is_sent(&self, slot: usize) -> bool {
        let [sent, answered] = [4, 8].map(|at| self.0.load_u32(Self::slot(slot) + at, Acquire));
        sent.wrapping_sub(answered).cast_signed() > 0
    }

    /// Sends a frame whole. One thread at a time.
    ///
    /// # Errors
    /// The connection's. It is of no use then.
    pub fn send(&self, fd: BorrowedFd<'_>, slot: usize, data_back: usize, frame: [&[u8]; 2]) -> Result<()> {
        let total = frame[0].len() + frame[1].len();
        self.0.store_u32(Self::slot(slot) + 12, data_back as u32, Relaxed);
        self.begin(slot);
        self.0.store_u32(AT_TOTAL, total as u32, Relaxed);
        self.0.store_u32(Self::count_at(0), NO_COUNT, Relaxed);
        self.0.store_u64(AT_STEP, 0, Relaxed);
        self.0.store_u32(AT_SENDING, slot as u32 + 1, Release);
        let (mut step, mut sent) = (0u32, 0usize);
        while sent < total {
            match self.send_some(fd, step, frame, sent) {
                Ok(()) => {}
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {
                    wait(fd, PollFlags::POLLOUT, None)?;
                    continue;
                }
                Err(e) => return Err(e.into()),
            }
            sent += self.0.load_u32(Self::count_at(step), Acquire) as usize;
            step += 1;
            self.0.store_u32(Self::count_at(step), NO_COUNT, Release);
            self.0.store_u64(AT_STEP, u64::from(step) << 32 | sent as u64, Release);
        }
        self.sent(slot);
        self.0.store_u32(AT_SENDING, 0, Release);
        Ok(())
    }

    fn send_some(
        &self,
        fd: BorrowedFd<'_>,
        step: u32,
        frame: [&[u8]; 2],
        sent: usize,
    ) -> std::result::Result<(), Errno> {
        let skip = sent.min(frame[0].len());
        let rest = [&frame[0][skip..], &frame[1][sent - skip..]];
        let mut iov = rest
            .map(|piece| libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() });
        let header = Self::header(step);
        assert!(header.is_multiple_of(8) && header + size_of::<libc::mmsghdr>() <= self.0.len());
        let at: *mut libc::mmsghdr = self.0.as_ptr().wrapping_add(header).cast();
        // SAFETY: `at` is aligned and inside the mapping (checked); all-zero is a valid msghdr; no reference to it exists. The
        // iovecs and what they point to live until the call returns, and the kernel only reads them.
        let n = unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = iov.as_mut_ptr();
            message.msg_iovlen = iov.len() as _;
            (&raw mut (*at).msg_hdr).write(message);
            libc::sendmmsg(fd.as_raw_fd(), at, 1, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        if n < 0 { Err(Errno::last()) } else { Ok(()) }
    }

    /// Notes what a predecessor had sent when it died.
    fn settle(&self) {
        let sending = self.0.load_u32(AT_SENDING, Acquire) as usize;
        if sending == 0 || sending > SLOTS {
            return;
        }
        let word = self.0.load_u64(AT_STEP, Acquire);
        let (step, mut sent) = ((word >> 32) as u32, word as u32);
        let count = self.0.load_u32(Self::count_at(step), Acquire);
        if count != NO_COUNT {
            sent = sent.saturating_add(count);
        }
        if sent >= self.0.load_u32(AT_TOTAL, Acquire) {
            self.sent(sending - 1);
        }
        self.0.store_u32(AT_SENDING, 0, Release);
    }

    /// Bytes of data that the slot's good simple reply brings.
    pub fn data_back(&self, slot: usize) -> usize {
        (self.0.load_u32(Self::slot(slot) + 12, Relaxed) as usize).min(MOST_READ)
    }
}

/// Waits until the socket is ready.
fn wait(fd: BorrowedFd<'_>, what: PollFlags, until: Option<Instant>) -> Result<()> {
    loop {
        let timeout = match until {
            None => PollTimeout::NONE,
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(ErrorKind::TimedOut.into());
                }
                PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut [PollFd::new(fd, what)], timeout) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Looks at the next `len` bytes without taking them.
fn peek(fd: BorrowedFd<'_>, into: &mut [u8], until: Option<Instant>) -> Result<()> {
    let mut pause = Duration::from_micros(20);
    loop {
        wait(fd, PollFlags::POLLIN, until)?;
        match recv(fd.as_raw_fd(), into, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) if n == into.len() => return Ok(()),
            // Part of it is there: poll(2) would return at once.
            Ok(_) => {
                if until.is_some_and(|until| Instant::now() > until) {
                    return Err(ErrorKind::TimedOut.into());
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(2));
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// One reply: its header and what follows it. Gives it to `note`, then takes it off the socket.
///
/// # Errors
/// The connection's; `TimedOut`; what makes no sense.
pub fn next_reply(
    fd: BorrowedFd<'_>,
    kept: &Kept,
    buffer: &mut Vec<u8>,
    until: Option<Instant>,
    note: impl FnOnce(Reply, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut start = [0; 4];
    peek(fd, &mut start, until)?;
    let len = reply_len(start)?;
    buffer.resize(len, 0);
    peek(fd, buffer, until)?;
    let header = reply(buffer);
    let payload = match header {
        Reply::Simple { error: 0, cookie } => kept.data_back(slot_of(cookie)?),
        Reply::Simple { .. } => 0,
        Reply::Chunk { len, .. } => len as usize,
    };
    if payload > MOST_READ + super::wire::CHUNK_EXTRA {
        return Err(Error::new(ErrorKind::InvalidData, "nbd: a reply is longer than what was asked for"));
    }
    buffer.resize(len + payload, 0);
    peek(fd, buffer, until)?;
    note(header, &buffer[len..])?;
    // All of it is there: nothing that a kill could interrupt.
    match recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)? {
        n if n == buffer.len() => Ok(()),
        _ => Err(Error::other("nbd: bytes that were there are gone")),
    }
}

/// The slot that a cookie names.
///
/// # Errors
/// None.
pub fn slot_of(cookie: u64) -> Result<usize> {
    match usize::try_from(cookie) {
        Ok(slot) if slot < SLOTS => Ok(slot),
        _ => Err(Error::new(
            ErrorKind::InvalidData,
            format!("nbd: a reply to {cookie:#x}, which was not asked"),
        )),
    }
}

/// Ends a predecessor's session: waits until everything that it had sent whole is answered. The time that took is the fence's.
///
/// # Errors
/// `TimedOut`; the server closed with requests unanswered, so that nothing is known of them; what makes no sense.
pub fn drain(socket: impl AsFd, kept: &Kept, patience: Duration) -> Result<Duration> {
    let began = Instant::now();
    if kept.0.load_u32(AT_MAGIC, Acquire) != MAGIC {
        return Ok(Duration::ZERO);
    }
    kept.settle();
    let mut buffer = Vec::new();
    while (0..SLOTS).any(|slot| kept.is_sent(slot)) {
        next_reply(socket.as_fd(), kept, &mut buffer, Some(began + patience), |reply, _| {
            match reply {
                Reply::Simple { cookie, .. } | Reply::Chunk { done: true, cookie, .. } => {
                    kept.answered(slot_of(cookie)?);
                }
                Reply::Chunk { .. } => {}
            }
            Ok(())
        })?;
    }
    kept.clear();
    Ok(began.elapsed())
}

#[cfg(test)]
impl Kept {
    /// As a kill in the middle of sending leaves it: `sent` bytes are in the socket.
    pub(super) fn forge(&self, slot: usize, total: u32, sent: u32) {
        self.begin(slot);
        self.0.store_u32(AT_TOTAL, total, Relaxed);
        // Half by an earlier step, the rest by one whose count was not looked at any more.
        self.0.store_u64(AT_STEP, 3 << 32 | u64::from(sent / 2), Relaxed);
        self.0.store_u32(Self::count_at(3), if sent == 0 { NO_COUNT } else { sent - sent / 2 }, Relaxed);
        self.0.store_u32(AT_SENDING, slot as u32 + 1, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that is quick has answered before the sender has noted that all is sent; a kill may come at any of these moments. A slot
    /// that counted as waiting for ever kept the next process from its disk.
    #[test]
    fn an_answer_may_overtake_the_note_that_all_was_sent() {
        let kept = Kept(SharedMem::create("nbd", STATE_BYTES).unwrap().0);
        kept.clear();
        for round in 0..3 {
            kept.begin(5);
            kept.answered(5);
            assert!(!kept.is_sent(5), "round {round}");
            kept.sent(5);
            assert!(!kept.is_sent(5), "round {round}: answered already");
            // The usual order.
            kept.begin(5);
            assert!(!kept.is_sent(5), "not whole yet");
            kept.sent(5);
            assert!(kept.is_sent(5));
            kept.answered(5);
            assert!(!kept.is_sent(5));
        }
        // Killed with all bytes on their way and the answer here, before the note.
        kept.forge(5, 100, 100);
        kept.answered(5);
        kept.settle();
        assert!(!kept.is_sent(5));
        kept.forge(5, 100, 100);
        kept.settle();
        assert!(kept.is_sent(5));
    }
}

//! Unix stream sockets: recvmmsg and sendmmsg with their mmsghdr in the journal.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use super::{Pulled, Pushed};
use crate::engine::Engine;
use crate::journal::log::Full;
use crate::journal::mem::Mem;
use crate::store::ConnId;

/// A stream's two system calls; the model test has its own.
pub trait StreamIo {
    /// Receives into the journal's memory; the count lands at `hdr`.
    ///
    /// # Errors
    /// As recvmmsg(2).
    fn recv(&self, mem: &Mem, hdr: usize, into: [(usize, usize); 2]) -> Result<(), Errno>;

    /// Sends; the count lands at `hdr`.
    ///
    /// # Errors
    /// As sendmmsg(2).
    fn send(&self, mem: &Mem, hdr: usize, from: [&[u8]; 2]) -> Result<(), Errno>;
}

/// A real socket.
pub struct Socket<'a>(pub BorrowedFd<'a>);

impl StreamIo for Socket<'_> {
    fn recv(&self, mem: &Mem, hdr: usize, into: [(usize, usize); 2]) -> Result<(), Errno> {
        mem.recv(self.0.as_fd(), hdr, into)
    }

    fn send(&self, mem: &Mem, hdr: usize, from: [&[u8]; 2]) -> Result<(), Errno> {
        mem.send(self.0.as_fd(), hdr, from)
    }
}

/// Takes what input there is, once.
pub fn pull(engine: &Engine, id: ConnId, io: &impl StreamIo) -> Pulled {
    let Some(conn) = engine.store.conn(id) else { return Pulled::End };
    let Some(slot) = engine.slot(id) else { return Pulled::End };
    let room = slot.room(conn.consumed);
    if room[0].1 + room[1].1 == 0 {
        return Pulled::Nothing;
    }
    let hdr = slot.arm_rx();
    match io.recv(engine.mem(), hdr, room) {
        Ok(()) => match slot.settle_rx() {
            Some(0) => Pulled::End,
            Some(_) => Pulled::Data,
            None => Pulled::Nothing,
        },
        Err(Errno::EAGAIN | Errno::EINTR) => Pulled::Nothing,
        Err(_) => Pulled::End,
    }
}

/// Hands over what output there is.
///
/// # Errors
/// [`Full`]; what was handed over stays so.
pub fn push(engine: &mut Engine, id: ConnId, io: &impl StreamIo) -> Result<Pushed, Full> {
    loop {
        let Some(conn) = engine.store.conn(id) else { return Ok(Pushed::End) };
        let (a, b) = conn.out.pending();
        if a.is_empty() && b.is_empty() {
            return Ok(Pushed::All);
        }
        let Some(slot) = engine.slot(id) else { return Ok(Pushed::End) };
        let hdr = slot.arm_tx();
        match io.send(engine.mem(), hdr, [a, b]) {
            Ok(()) => {
                slot.settle_tx();
                engine.handed_over(id)?;
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(Pushed::Blocked),
            Err(_) => return Ok(Pushed::End),
        }
    }
}

/// Throws the output away: nobody is left to read it.
pub fn discard(engine: &mut Engine, id: ConnId) {
    if let Some(end) = engine.store.conn(id).map(|c| c.out.end())
        && let Some(slot) = engine.slot(id)
    {
        slot.set_sent(end);
        engine.store.drop_output(id, end);
    }
}

//! Ring pages (docs/misc/xenstore-ring.txt): guests' and process domains' alike.
//!
//! The client can write the whole page. The server's two indices live in the journal and are only published to the
//! page; the client's two are checked against them, and any nonsense puts the ring in its error state (XSA-38).
//! Order: input bytes, journal position, shared `req_cons`; output bytes, journal position, shared `rsp_prod`.
//! After a restart both indices are published again from the journal.

use domain_kit::xs::SharedPage;
use xen_abi::xs_wire::{
    XENSTORE_CONNECTED, XENSTORE_CONNECTION_OFFSET, XENSTORE_ERROR_OFFSET, XENSTORE_FEATURES_OFFSET,
    XENSTORE_RECONNECT, XENSTORE_REQ_CONS_OFFSET, XENSTORE_REQ_OFFSET, XENSTORE_REQ_PROD_OFFSET,
    XENSTORE_RING_SIZE, XENSTORE_RSP_CONS_OFFSET, XENSTORE_RSP_OFFSET, XENSTORE_RSP_PROD_OFFSET,
};

use super::{Pulled, Pushed};
use crate::engine::Engine;
use crate::journal::log::Full;
use crate::store::{ConnId, FEATURE_ERROR};

/// The ring's indices make no sense (XENSTORE_ERROR_RINGIDX).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("ring indices are inconsistent")]
pub struct BadIndex;

/// The one or two pieces of the ring that `len` bytes at stream position `at` occupy.
fn pieces(at: u32, len: u32) -> [(usize, usize); 2] {
    let start = at % XENSTORE_RING_SIZE;
    let first = len.min(XENSTORE_RING_SIZE - start);
    [(start as usize, first as usize), (0, (len - first) as usize)]
}

/// Makes the page show what the journal says: after mapping it, and after a reset.
pub fn publish(engine: &Engine, id: ConnId, page: &dyn SharedPage) {
    let (Some(slot), Some(conn)) = (engine.slot(id), engine.store.conn(id)) else { return };
    let features = engine.store.features_of(conn.domid);
    page.store_u32(XENSTORE_FEATURES_OFFSET, features);
    page.store_u32(XENSTORE_REQ_CONS_OFFSET, slot.received() as u32);
    page.store_u32(XENSTORE_RSP_PROD_OFFSET, slot.sent() as u32);
    let error = conn.ignored.filter(|_| features & FEATURE_ERROR != 0);
    page.store_u32(XENSTORE_ERROR_OFFSET, error.unwrap_or(0));
}

/// A domain's ring is seen for the first time. A guest may have written its first request already, which stays; a page that
/// shows indices of an earlier server starts over, as INTRODUCE does in Xen's daemon.
pub fn adopt(engine: &Engine, id: ConnId, page: &dyn SharedPage) {
    let stale = |off| page.load_u32(off) != 0;
    if stale(XENSTORE_REQ_CONS_OFFSET) || stale(XENSTORE_RSP_PROD_OFFSET) {
        empty(engine, id, page);
    } else {
        publish(engine, id, page);
    }
}

/// Whether the client asks for a reset.
pub fn wants_reset(page: &dyn SharedPage) -> bool {
    page.load_u32(XENSTORE_CONNECTION_OFFSET) == XENSTORE_RECONNECT
}

/// Resets the ring: watches, transactions, requests and replies of the connection are gone, the ring is empty.
/// A kill in between leaves the request for the reset standing, so it is done again.
///
/// # Errors
/// [`Full`].
pub fn reset(engine: &mut Engine, id: ConnId, page: &dyn SharedPage) -> Result<(), Full> {
    engine.reset(id)?;
    engine.mem().crash_point();
    empty(engine, id, page);
    engine.mem().crash_point();
    page.store_u32(XENSTORE_CONNECTION_OFFSET, XENSTORE_CONNECTED);
    Ok(())
}

/// Sets all four indices to zero, as a connection's life begins.
pub fn empty(engine: &Engine, id: ConnId, page: &dyn SharedPage) {
    page.store_u32(XENSTORE_REQ_PROD_OFFSET, 0);
    page.store_u32(XENSTORE_RSP_CONS_OFFSET, 0);
    publish(engine, id, page);
}

/// Takes what input there is and room for.
///
/// # Errors
/// [`BadIndex`].
pub fn pull(engine: &Engine, id: ConnId, page: &dyn SharedPage) -> Result<Pulled, BadIndex> {
    let (Some(conn), Some(slot)) = (engine.store.conn(id), engine.slot(id)) else { return Ok(Pulled::End) };
    if conn.ignored.is_some() {
        return Ok(Pulled::Nothing);
    }
    let received = slot.received();
    let cons = received as u32;
    let avail = page.load_u32(XENSTORE_REQ_PROD_OFFSET).wrapping_sub(cons);
    if avail > XENSTORE_RING_SIZE {
        return Err(BadIndex);
    }
    let room: usize = slot.room(conn.consumed).iter().map(|(_, len)| len).sum();
    let n = avail.min(room as u32);
    if n == 0 {
        return Ok(Pulled::Nothing);
    }
    let mut bytes = [0u8; XENSTORE_RING_SIZE as usize];
    let bytes = &mut bytes[..n as usize];
    let mut at = 0;
    for (start, len) in pieces(cons, n) {
        page.read_bytes(XENSTORE_REQ_OFFSET + start, &mut bytes[at..at + len]);
        at += len;
    }
    slot.write_input(received, bytes);
    slot.set_received(received + u64::from(n));
    engine.mem().crash_point();
    page.store_u32(XENSTORE_REQ_CONS_OFFSET, cons.wrapping_add(n));
    Ok(Pulled::Data)
}

/// Hands over what output there is room for. The flag says whether anything was, so that the client is notified.
///
/// # Errors
/// [`BadIndex`] inside, [`Full`] outside.
pub fn push(
    engine: &mut Engine,
    id: ConnId,
    page: &dyn SharedPage,
) -> Result<Result<(Pushed, bool), BadIndex>, Full> {
    let mut moved = false;
    loop {
        let (Some(conn), Some(slot)) = (engine.store.conn(id), engine.slot(id)) else {
            return Ok(Ok((Pushed::End, moved)));
        };
        let (a, b) = conn.out.pending();
        if a.is_empty() && b.is_empty() || conn.ignored.is_some() {
            return Ok(Ok((Pushed::All, moved)));
        }
        let sent = slot.sent();
        let prod = sent as u32;
        let used = prod.wrapping_sub(page.load_u32(XENSTORE_RSP_CONS_OFFSET));
        if used > XENSTORE_RING_SIZE {
            return Ok(Err(BadIndex));
        }
        let piece = if a.is_empty() { b } else { a };
        let n = (XENSTORE_RING_SIZE - used).min(u32::try_from(piece.len()).unwrap_or(u32::MAX));
        if n == 0 {
            return Ok(Ok((Pushed::Blocked, moved)));
        }
        let mut at = 0;
        for (start, len) in pieces(prod, n) {
            page.write_bytes(XENSTORE_RSP_OFFSET + start, &piece[at..at + len]);
            at += len;
        }
        slot.set_sent(sent + u64::from(n));
        engine.mem().crash_point();
        page.store_u32(XENSTORE_RSP_PROD_OFFSET, prod.wrapping_add(n));
        moved = true;
        engine.handed_over(id)?;
    }
}

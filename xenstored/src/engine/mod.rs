//! The store and its journal: every event is carried out, recorded, and only then seen outside.
//!
//! The engine does no waiting and owns no descriptors; the daemon (`daemon`) and the model test (`tests/model.rs`)
//! drive it. A SIGKILL between any two stores to the journal leaves a state from which [`Engine::open`] goes on:
//! an event that was not committed has had no effect, and its request is still in the connection's input buffer.
#![forbid(unsafe_code)]

mod open;

use std::rc::Rc;

use xen_abi::xs_wire::XsMsgType as Op;

pub use open::{ImportError, Opened, Options};

use crate::codec::Writer;
use crate::journal::layout::sb;
use crate::journal::log::{Full, Log};
use crate::journal::mem::Mem;
use crate::journal::slots::Slot;
use crate::store::{Class, Conn, ConnId, Event, Item, Notice, Store, write_snapshot};
use crate::wire::{Errno, HEADER, Header, TooLong};

/// Bytes of unread output at which no more requests of a client are taken.
const UNREAD_GUEST: u64 = 16 << 10;
const UNREAD_SERVICE: u64 = 64 << 10;
const UNREAD_DOM0: u64 = 256 << 10;
/// How the payload of a request begins that concerns the process.
const LIVE: &[u8] = b"live-update\0";
/// The journal is also compacted when so many times `compact_at` bytes of the arena changed.
const CHANGED_AT: u64 = 4;

/// What [`Engine::process`] ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processed {
    /// No complete request is left.
    Idle,
    /// The next request has to wait (see [`Engine::process_while`]).
    Held,
    /// The next request concerns the process: CONTROL live-update. [`Engine::answer`] answers it.
    Live,
    /// The budget is used up.
    More,
    /// The client has to read first.
    Gated,
    /// The client sent a header with too long a payload.
    Violation(u32),
    /// The journal is full; nothing goes on until there is room.
    Stalled,
    /// The connection is no more.
    Gone,
}

/// See the module's description.
pub struct Engine {
    /// The state.
    pub store: Store,
    log: Log,
    mem: Rc<Mem>,
    free: Vec<u32>,
    record: Writer,
    message: Vec<u8>,
    compact_at: u64,
    /// The last compaction failed, and the log says so.
    crowded: bool,
}

impl Engine {
    /// Writes a snapshot, so that the next start has no event to run again (and may be another version's).
    ///
    /// # Errors
    /// [`Full`]; the journal is as before then.
    pub fn compact(&mut self) -> Result<(), Full> {
        let (store, mem) = (&self.store, &self.mem);
        let sent = |conn: &Conn| {
            let slot = Slot::new(mem, conn.slot);
            if slot.tag() == conn.tag { slot.sent() } else { 0 }
        };
        let sums = store.tree.arena().changed();
        self.log.compact(|sink| write_snapshot(store, &sums, sent, sink))?;
        self.store.tree.arena_mut().snapshot_done(self.log.epoch(), &sums);
        Ok(())
    }

    /// Records and carries out one event.
    fn commit(&mut self, event: &Event<'_>) -> Result<(), Full> {
        self.record.0.clear();
        event.encode(&mut self.record);
        let len = self.record.0.len() as u64 + 4;
        let changed = self.store.tree.arena().changed_len();
        if self.log.wants_compaction(len) || changed > CHANGED_AT * self.compact_at {
            match self.compact() {
                Ok(()) => self.crowded = false,
                Err(e) if !self.crowded => {
                    tracing::warn!(error = %e, "the journal could not be compacted");
                    self.crowded = true;
                }
                Err(_) => {}
            }
        }
        self.log.reserve(len, event.can_wait())?;
        let most = self.store.most_growth(event);
        if self.store.tree.arena_mut().reserve(most).is_err() {
            let least = self.store.least_growth(event);
            self.store.tree.arena_mut().reserve(least)?;
        }
        // What is on the heap is lost with the process, and the arena is put back: so they may change first.
        let digest = self.store.apply(event);
        self.record.u32(digest);
        self.log.append(&self.record.0);
        self.store.take_freed_into(&mut self.free);
        self.tell();
        Ok(())
    }

    /// Tells the log of quotas that were reached.
    fn tell(&mut self) {
        for notice in self.store.take_notices() {
            let Notice { domid, item, soft, limit } = notice;
            let quota = item.name();
            match (soft, item) {
                (true, _) => tracing::warn!(domid, quota, limit, "over its soft quota"),
                (false, Item::Outstanding) => {
                    tracing::warn!(
                        domid,
                        quota,
                        limit,
                        "does not read its replies and is not served until it does"
                    );
                }
                (false, _) => {
                    tracing::warn!(domid, quota, limit, "a request was refused: the quota is used up")
                }
            }
        }
    }

    /// The slot of a connection.
    pub fn slot(&self, id: ConnId) -> Option<Slot<'_>> {
        self.store.conn(id).map(|c| Slot::new(&self.mem, c.slot))
    }

    /// The journal's memory.
    pub fn mem(&self) -> &Rc<Mem> {
        &self.mem
    }

    /// Bytes of records in the log.
    pub fn log_len(&self) -> u64 {
        self.log.len()
    }

    /// A socket client connected.
    ///
    /// # Errors
    /// `None` when all slots are taken; [`Full`].
    pub fn open_socket(&mut self) -> Result<Option<ConnId>, Full> {
        let Some(slot) = self.free.pop() else { return Ok(None) };
        let id = self.store.next_conn();
        if let Err(e) = self.commit(&Event::Open { slot }) {
            self.free.push(slot);
            return Err(e);
        }
        self.init_slot(id);
        Ok(Some(id))
    }

    /// A domain with a ring appeared.
    ///
    /// # Errors
    /// `None` when all slots are taken; [`Full`].
    pub fn domain_up(
        &mut self,
        domid: u16,
        instance: u64,
        ring: (u32, u32),
        class: Class,
    ) -> Result<Option<ConnId>, Full> {
        let Some(slot) = self.free.pop() else { return Ok(None) };
        let id = self.store.next_conn();
        let (gref, port) = ring;
        if let Err(e) = self.commit(&Event::DomainUp { domid, instance, gref, port, class, slot }) {
            self.free.push(slot);
            return Err(e);
        }
        self.init_slot(id);
        Ok(Some(id))
    }

    /// A domain is gone.
    ///
    /// # Errors
    /// [`Full`].
    pub fn domain_down(&mut self, domid: u16) -> Result<(), Full> {
        self.commit(&Event::DomainDown(domid))
    }

    /// A domain shut itself down.
    ///
    /// # Errors
    /// [`Full`].
    pub fn domain_shutdown(&mut self, domid: u16) -> Result<(), Full> {
        self.commit(&Event::DomainShutdown(domid))
    }

    /// Sets a quota: of a domain, or the global one that new domains get.
    ///
    /// # Errors
    /// [`Full`].
    pub fn set_quota(&mut self, domid: Option<u16>, item: Item, soft: bool, value: u32) -> Result<(), Full> {
        self.commit(&Event::SetQuota { domid, item, soft, value })
    }

    /// A connection ended.
    ///
    /// # Errors
    /// [`Full`].
    pub fn close(&mut self, id: ConnId) -> Result<(), Full> {
        self.commit(&Event::Close(id))
    }

    /// The client misbehaved: a socket is closed, a ring goes to its error state with this XENSTORE_ERROR_* code.
    ///
    /// # Errors
    /// [`Full`].
    pub fn cut_off(&mut self, id: ConnId, error: u32) -> Result<(), Full> {
        match self.store.conn(id).map(|c| c.domid) {
            Some(Some(_)) => {
                self.commit(&Event::Ignore { conn: id, error })?;
                self.init_slot(id);
                Ok(())
            }
            Some(None) => self.close(id),
            None => Ok(()),
        }
    }

    /// The client reset its ring.
    ///
    /// # Errors
    /// [`Full`].
    pub fn reset(&mut self, id: ConnId) -> Result<(), Full> {
        self.commit(&Event::Reset(id))?;
        self.init_slot(id);
        Ok(())
    }

    fn init_slot(&self, id: ConnId) {
        if let Some(conn) = self.store.conn(id) {
            Slot::new(&self.mem, conn.slot).init(conn.tag);
        }
    }

    /// Unread output, in bytes.
    pub fn unread(&self, id: ConnId) -> u64 {
        self.store.conn(id).map_or(0, |c| c.out.end() - c.out.base())
    }

    /// After output was handed over: forgets it, and notes it in the journal where that matters.
    ///
    /// # Errors
    /// [`Full`].
    pub fn handed_over(&mut self, id: ConnId) -> Result<(), Full> {
        let Some(sent) = self.slot(id).map(|s| s.sent()) else { return Ok(()) };
        self.store.drop_output(id, sent);
        self.note_drained(id)
    }

    fn note_drained(&mut self, id: ConnId) -> Result<(), Full> {
        let Some(conn) = self.store.conn(id) else { return Ok(()) };
        let upto = Slot::new(&self.mem, conn.slot).sent();
        if conn.wants_drain_note(upto) {
            self.commit(&Event::Drained { conn: id, upto })?;
        }
        Ok(())
    }

    /// Whether the client has to read before more of its requests are taken.
    fn gated(&self, conn: &Conn) -> bool {
        let most = match conn.class {
            Class::Guest => UNREAD_GUEST,
            Class::Service => UNREAD_SERVICE,
            Class::Dom0 => UNREAD_DOM0,
        };
        if conn.out.end() - conn.out.base() >= most {
            return true;
        }
        let quota =
            conn.domid.filter(|_| !conn.privileged()).and_then(|d| self.store.domain(d)).map(|d| &d.quota);
        quota.is_some_and(|q| conn.out.messages() >= q.most(Item::Outstanding))
    }

    /// What was received of a connection and not yet carried out.
    pub fn unread_input(&self, id: ConnId) -> Vec<u8> {
        let Some(conn) = self.store.conn(id) else { return Vec::new() };
        let slot = Slot::new(&self.mem, conn.slot);
        let mut bytes = vec![0; slot.received().saturating_sub(conn.consumed) as usize];
        slot.read_input(conn.consumed, &mut bytes);
        bytes
    }

    /// The header of the next request, if all of it has come.
    pub fn next_request(&self, id: ConnId) -> Option<Header> {
        let conn = self.store.conn(id).filter(|c| c.ignored.is_none())?;
        let slot = Slot::new(&self.mem, conn.slot);
        let have = slot.received() - conn.consumed;
        if have < HEADER as u64 {
            return None;
        }
        let mut head = [0; HEADER];
        slot.read_input(conn.consumed, &mut head);
        Header::decode(&head).ok().filter(|h| have >= (HEADER + h.len) as u64)
    }

    /// Whether there is something to do for the connection: a whole request, or a header that is wrong.
    pub fn has_request(&self, id: ConnId) -> bool {
        let Some(conn) = self.store.conn(id) else { return false };
        let slot = Slot::new(&self.mem, conn.slot);
        let have = slot.received() - conn.consumed;
        if have < HEADER as u64 {
            return false;
        }
        let mut head = [0; HEADER];
        slot.read_input(conn.consumed, &mut head);
        Header::decode(&head).map_or(true, |h| have >= (HEADER + h.len) as u64)
    }

    /// Carries out up to `budget` requests of a connection.
    pub fn process(&mut self, id: ConnId, budget: usize) -> Processed {
        self.process_while(id, budget, |_| true)
    }

    /// Carries out up to `budget` requests of a connection, for as long as `may_run` says yes to the next one's header.
    pub fn process_while(
        &mut self,
        id: ConnId,
        budget: usize,
        mut may_run: impl FnMut(&Header) -> bool,
    ) -> Processed {
        for _ in 0..budget {
            let Some(conn) = self.store.conn(id) else { return Processed::Gone };
            let at = conn.consumed;
            let slot = Slot::new(&self.mem, conn.slot);
            let have = slot.received() - at;
            if have < HEADER as u64 || conn.ignored.is_some() {
                return Processed::Idle;
            }
            let mut head = [0; HEADER];
            slot.read_input(at, &mut head);
            let head = match Header::decode(&head) {
                Ok(head) => head,
                Err(TooLong(len)) => return Processed::Violation(len),
            };
            let len = HEADER + head.len;
            if have < len as u64 {
                return Processed::Idle;
            }
            if self.gated(conn) {
                return Processed::Gated;
            }
            if !may_run(&head) {
                return Processed::Held;
            }
            let privileged = conn.privileged();
            let in_order = head.tx_id == 0 || conn.txs.contains_key(&head.tx_id);
            let mut message = std::mem::take(&mut self.message);
            message.resize(len, 0);
            slot.read_input(at, &mut message);
            if privileged && head.op() == Some(Op::Control) && message[HEADER..].starts_with(LIVE) {
                self.message = message;
                return Processed::Live;
            }
            self.mem.store_u64(sb::EXEC_AT, at);
            self.mem.store_u64(sb::EXEC_CONN, id.0);
            let consumed = at + len as u64;
            // What only looks is recorded with its answer: it may tell of what is this process's alone, and costs nothing again.
            let look = if privileged && head.op() == Some(Op::Control) && in_order {
                self.store.look(&message[HEADER..])
            } else {
                None
            };
            let mut done = match &look {
                Some((error, text)) => {
                    let message = &message[..HEADER];
                    self.commit(&Event::Answer { conn: id, consumed, message, error: *error, text })
                }
                None => self.commit(&Event::Request { conn: id, consumed, message: &message }),
            };
            if let Err(e) = done {
                // Answered like this, it needs no room in the arena; if there is none in the log either, it waits.
                let (message, text) = (&message[..HEADER], Errno::ENOMEM.payload());
                done = self.commit(&Event::Answer { conn: id, consumed, message, error: true, text });
                if done.is_ok() {
                    tracing::error!(error = %e, conn = id.0, "a request is answered with ENOMEM");
                }
            }
            self.mem.store_u64(sb::EXEC_CONN, 0);
            self.message = message;
            if let Err(e) = done {
                tracing::error!(error = %e, conn = id.0, "the journal is full, requests wait");
                return Processed::Stalled;
            }
        }
        if self.has_request(id) { Processed::More } else { Processed::Idle }
    }

    /// The arguments of the CONTROL live-update request that [`Processed::Live`] told of.
    pub fn live_request(&self) -> Vec<&[u8]> {
        let payload = self.message.get(HEADER + LIVE.len()..).unwrap_or_default();
        crate::wire::strings(payload).collect()
    }

    /// Notes that the request that [`Processed::Live`] told of is being carried out: the successor answers it.
    pub fn mark_live(&self, id: ConnId) {
        if let Some(conn) = self.store.conn(id) {
            self.mem.store_u64(sb::LIVE_AT, conn.consumed);
            self.mem.store_u64(sb::LIVE_CONN, id.0);
        }
    }

    /// Whether a predecessor carried out the connection's next request. The mark is gone then.
    pub fn take_live_mark(&self, id: ConnId) -> bool {
        let marked = self.mem.load_u64(sb::LIVE_CONN) == id.0
            && self.store.conn(id).is_some_and(|c| c.consumed == self.mem.load_u64(sb::LIVE_AT));
        if marked {
            self.mem.store_u64(sb::LIVE_CONN, 0);
        }
        marked
    }

    /// Answers the request that [`Processed::Live`] told of.
    ///
    /// # Errors
    /// [`Full`].
    pub fn answer(&mut self, id: ConnId, outcome: Result<&str, Errno>) -> Result<(), Full> {
        let Some(conn) = self.store.conn(id) else { return Ok(()) };
        let consumed = conn.consumed + self.message.len() as u64;
        let head = self.message[..HEADER].to_vec();
        let (error, text) = match outcome {
            Ok(text) => (false, [text.as_bytes(), b"\0"].concat()),
            Err(e) => (true, e.payload().to_vec()),
        };
        self.commit(&Event::Answer { conn: id, consumed, message: &head, error, text: &text })
    }
}

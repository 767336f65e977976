//! Opening a journal, or making one, and going on where it stands.

use std::rc::Rc;

use super::Engine;
use crate::codec::{Reader, Writer};
use crate::journal::JournalError;
use crate::journal::arena::Arena;
use crate::journal::layout::{BEHAVIOUR, SLOTS, sb};
use crate::journal::log::{Log, MIN_HALF};
use crate::journal::mem::Mem;
use crate::journal::slots::Slot;
use crate::migrate::{self, Ends, Imported, StreamError, Waiting};
use crate::store::{ConnId, Event, Limits, Loaded, Loader, Store};

/// A request that made the daemon die by its own fault this often costs its connection.
const POISON: u64 = 3;

/// How to open a journal.
#[derive(Debug, Clone)]
pub struct Options {
    /// Bytes of each half when a journal is made.
    pub half_size: u64,
    /// Bytes of events, and of changed pages, after which the log is compacted.
    pub compact_at: u64,
    /// Start from what is whole when a record is damaged, instead of refusing.
    pub salvage: bool,
    /// Limits to set; `None` keeps those of the journal.
    pub limits: Option<Limits>,
    /// The predecessor died by its own fault (panic, SIGSEGV), not by a signal from outside.
    pub own_fault: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { half_size: 256 << 20, compact_at: 512 << 10, salvage: false, limits: None, own_fault: false }
    }
}

/// What opening a journal found.
#[derive(Debug, Default)]
pub struct Opened {
    /// There was none: a fresh store.
    pub fresh: bool,
    /// Events run again.
    pub replayed: u64,
    /// What was dropped, with [`Options::salvage`].
    pub dropped: Option<String>,
    /// The connection whose request killed the daemon too often; it is cut off.
    pub poisoned: Option<ConnId>,
}

/// A stream did not become a journal.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl Engine {
    /// Opens the journal in `mem`, or makes one.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(mem: Rc<Mem>, options: &Options) -> Result<(Self, Opened), JournalError> {
        let mut opened = Opened::default();
        let (store, log) = if Log::exists(&mem)? {
            Self::replay(&mem, options, &mut opened)?
        } else {
            opened.fresh = true;
            Self::format(&mem, options)?
        };
        let mut engine = Self::new(mem, store, log, options);
        if opened.fresh {
            engine.compact()?;
            engine.log.seal();
        }
        engine.attach(&mut opened, options)?;
        Ok((engine, opened))
    }

    /// Makes a journal of a migration stream. It is valid only when all of it is there.
    ///
    /// # Errors
    /// [`ImportError`].
    pub fn import(
        mem: Rc<Mem>,
        options: &Options,
        stream: &[u8],
        ends: &mut dyn Ends,
    ) -> Result<(Self, Imported), ImportError> {
        let (mut store, log) = Self::format(&mem, options)?;
        let imported = migrate::import(stream, &mut store, ends)?;
        let mut engine = Self::new(mem, store, log, options);
        for Waiting { conn, from, bytes, sent } in &imported.waiting {
            engine.init_slot(*conn);
            if let Some(slot) = engine.slot(*conn) {
                slot.write_input(*from, bytes);
                slot.set_received(from + bytes.len() as u64);
                slot.set_sent(*sent);
            }
        }
        engine.compact().map_err(JournalError::from)?;
        engine.log.seal();
        engine.attach(&mut Opened::default(), options)?;
        Ok((engine, imported))
    }

    fn format(mem: &Rc<Mem>, options: &Options) -> Result<(Store, Log), JournalError> {
        if Log::memory_len(options.half_size) > mem.len() as u64 || options.half_size < MIN_HALF {
            return Err(JournalError::Damaged("the file is too short for such halves".into()));
        }
        let log = Log::format(Rc::clone(mem), options.half_size);
        Ok((Store::in_arena(Arena::format(mem, options.half_size)?), log))
    }

    fn new(mem: Rc<Mem>, store: Store, mut log: Log, options: &Options) -> Self {
        log.compact_at(options.compact_at);
        Self {
            store,
            log,
            mem,
            free: Vec::new(),
            record: Writer::default(),
            message: Vec::new(),
            compact_at: options.compact_at,
            crowded: false,
        }
    }

    fn replay(mem: &Rc<Mem>, options: &Options, opened: &mut Opened) -> Result<(Store, Log), JournalError> {
        let behaviour = mem.load_u64(sb::BEHAVIOUR);
        let epoch = mem.load_u64(sb::ACTIVE) >> 1;
        let arena = Arena::open(mem, mem.load_u64(sb::HALF), epoch)?;
        let mut loader = Some(Loader::new(arena));
        let mut store: Option<Store> = None;
        let (log, dropped) = Log::open(Rc::clone(mem), options.salvage, |body| match &mut store {
            None => {
                let part = loader.as_mut().ok_or("a snapshot after the snapshot")?.record(body)?;
                if part == Loaded::Complete {
                    store = loader.take().map(Loader::finish);
                }
                Ok(part == Loaded::Complete)
            }
            Some(store) => {
                let (body, digest) = body.split_last_chunk::<4>().ok_or("a record without a digest")?;
                let mut input = Reader(body);
                let event = Event::decode(&mut input).filter(|_| input.done()).ok_or("not an event")?;
                opened.replayed += 1;
                if store.apply(&event).to_le_bytes() != *digest {
                    return Err("running it again gives other output".into());
                }
                // Old output is dropped as it comes, or a long log would need its whole traffic in memory.
                for id in store.take_touched() {
                    let sent = store.conn(id).map(|c| (c.tag, Slot::new(mem, c.slot)));
                    if let Some((tag, slot)) = sent
                        && slot.tag() == tag
                    {
                        store.drop_output(id, slot.sent());
                    }
                }
                store.take_closed();
                store.take_notices();
                store.take_freed_into(&mut Vec::new());
                Ok(false)
            }
        })?;
        if behaviour != BEHAVIOUR {
            if opened.replayed > 0 {
                return Err(JournalError::Behaviour { found: behaviour, ours: BEHAVIOUR });
            }
            mem.store_u64(sb::BEHAVIOUR, BEHAVIOUR);
        }
        opened.dropped = dropped;
        Ok((store.ok_or_else(|| JournalError::Damaged("no snapshot".into()))?, log))
    }

    /// Brings the slots in line with the replayed state.
    fn attach(&mut self, opened: &mut Opened, options: &Options) -> Result<(), JournalError> {
        let conns: Vec<(ConnId, u32, u64)> = self.store.conns().map(|(id, c)| (id, c.slot, c.tag)).collect();
        let used: std::collections::BTreeSet<u32> = conns.iter().map(|(_, slot, _)| *slot).collect();
        self.free = (0..SLOTS).rev().filter(|slot| !used.contains(slot)).collect();
        let mut broken = Vec::new();
        for (id, index, tag) in conns {
            let slot = Slot::new(&self.mem, index);
            if slot.tag() != tag {
                slot.init(tag);
            }
            slot.settle();
            let (received, sent) = (slot.received(), slot.sent());
            self.store.drop_output(id, sent);
            let Some(conn) = self.store.conn(id) else { continue };
            if conn.consumed > received || sent > conn.out.end() {
                // Only if later records were dropped: its replies are out, its requests are forgotten.
                broken.push((id, conn.domid.is_some()));
            }
        }
        if !broken.is_empty() && opened.dropped.is_none() {
            return Err(JournalError::Damaged(format!("{} connections are ahead of the log", broken.len())));
        }
        for (id, ring) in broken {
            let event = if ring { Event::Ignore { conn: id, error: 1 } } else { Event::Close(id) };
            self.commit(&event)?;
        }
        let blamed = ConnId(self.mem.load_u64(sb::EXEC_CONN));
        let at = self.mem.load_u64(sb::EXEC_AT);
        let innocent = self.store.conn(blamed).is_none_or(|c| c.consumed != at);
        if options.own_fault && blamed.0 != 0 && !innocent {
            let slot = self.store.conn(blamed).map(|c| Slot::new(&self.mem, c.slot));
            if slot.is_some_and(|s| s.blame(at) >= POISON) {
                opened.poisoned = Some(blamed);
                self.cut_off(blamed, 3)?;
            }
        }
        self.mem.store_u64(sb::EXEC_CONN, 0);
        if let Some(limits) = options.limits.as_ref().filter(|l| *l != self.store.limits()) {
            self.commit(&Event::Limits(limits.clone()))?;
        }
        let ids: Vec<ConnId> = self.store.conns().map(|(id, _)| id).collect();
        for id in ids {
            self.note_drained(id)?;
        }
        Ok(())
    }
}

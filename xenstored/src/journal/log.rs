//! The log: a snapshot and the events since, in one of two halves.
//!
//! A record counts once the half's tail word is stored behind it. Compaction writes a snapshot into the other half and
//! then flips the active word; until that one store the old half is the truth.
#![forbid(unsafe_code)]

use std::os::fd::AsFd as _;
use std::rc::Rc;

use nix::fcntl::{FallocateFlags, fallocate};

use super::JournalError;
use super::layout::{BEHAVIOUR, HALVES, MAGIC, Parts, RECORD_HEAD, half, sb};
use super::mem::Mem;

/// Space is taken from the file system in steps of this many bytes.
const CHUNK: u64 = 256 << 10;
/// What a half keeps of it when it is no longer the active one.
const KEEP: u64 = 1 << 20;
/// Smallest size of a half, in bytes.
pub const MIN_HALF: u64 = 256 << 10;
/// The last bytes of a half are for what can't wait: the end of connections and domains.
const HEADROOM: u64 = 64 << 10;

/// There is no room for a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room in the journal for {0} bytes")]
pub struct Full(pub u64);

/// The log in a journal's memory.
pub struct Log {
    mem: Rc<Mem>,
    half_size: u64,
    active: usize,
    epoch: u64,
    /// Bytes of records in the active half.
    tail: u64,
    seq: u64,
    /// Bytes of the snapshot that the active half begins with.
    snapshot: u64,
    /// The log is compacted when it is longer than its snapshot and this many bytes.
    compact_at: u64,
    /// Bytes of each half that the file system has given.
    allocated: [u64; 2],
}

impl Log {
    /// Bytes that a journal with halves of `half_size` needs.
    pub fn memory_len(half_size: u64) -> u64 {
        Parts::new(half_size).end() as u64
    }

    /// Makes an empty log. It is not valid before [`Log::seal`].
    pub fn format(mem: Rc<Mem>, half_size: u64) -> Self {
        mem.store_u64(sb::MAGIC, 0);
        mem.store_u64(sb::BEHAVIOUR, BEHAVIOUR);
        mem.store_u64(sb::HALF, half_size);
        mem.store_u64(sb::EXEC_CONN, 0);
        mem.store_u64(sb::LIVE_CONN, 0);
        // The first compaction goes to half 0.
        Self {
            mem,
            half_size,
            active: 1,
            epoch: 0,
            tail: 0,
            seq: 0,
            snapshot: 0,
            compact_at: 0,
            allocated: [0; 2],
        }
    }

    /// Sets after how many bytes the log is compacted.
    pub fn compact_at(&mut self, bytes: u64) {
        self.compact_at = bytes;
    }

    /// Makes a formatted log valid, after its first compaction.
    pub fn seal(&self) {
        self.mem.store_u64(sb::MAGIC, MAGIC);
    }

    /// Whether the memory holds a journal.
    ///
    /// # Errors
    /// [`JournalError`] when it holds one that this version can't use.
    pub fn exists(mem: &Mem) -> Result<bool, JournalError> {
        let magic = mem.load_u64(sb::MAGIC);
        if magic == MAGIC {
            let half_size = mem.load_u64(sb::HALF);
            let fits = half_size < mem.len() as u64 && Self::memory_len(half_size) <= mem.len() as u64;
            if !fits || half_size < MIN_HALF || !half_size.is_multiple_of(4096) {
                return Err(JournalError::Damaged(format!(
                    "halves of {half_size} bytes do not fit the file"
                )));
            }
            return Ok(true);
        }
        match magic {
            // Empty, or killed before it was sealed.
            0 => Ok(false),
            // All but the last byte of it is the name.
            _ if magic << 8 == MAGIC << 8 => Err(JournalError::Layout),
            // A whole store may be behind it, or somebody's file.
            _ => Err(JournalError::Damaged("it does not begin as a journal does".into())),
        }
    }

    /// The active snapshot's number.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Opens a log and hands each record's body to `each`, which answers whether it was the snapshot's last. A body that `each`
    /// refuses is treated as damage. With `salvage`, damage ends the log there and is described; without, it is an error.
    ///
    /// # Errors
    /// [`JournalError`] when the journal can't be used.
    pub fn open(
        mem: Rc<Mem>,
        salvage: bool,
        mut each: impl FnMut(&[u8]) -> Result<bool, String>,
    ) -> Result<(Self, Option<String>), JournalError> {
        let half_size = mem.load_u64(sb::HALF);
        let word = mem.load_u64(sb::ACTIVE);
        let (active, epoch) = ((word & 1) as usize, word >> 1);
        let mut log = Self {
            mem,
            half_size,
            active,
            epoch,
            tail: 0,
            seq: 0,
            snapshot: 0,
            compact_at: 0,
            allocated: [0; 2],
        };
        let base = log.base(active);
        let tail = log.mem.load_u64(base + half::TAIL);
        let limit = half_size - half::RECORDS as u64;
        if log.mem.load_u64(base + half::EPOCH) != epoch {
            return Err(JournalError::Damaged(
                "the active half is not the one that the superblock names".into(),
            ));
        }
        let mut damage = None;
        while log.tail < tail {
            let record = match log.record(log.tail, limit) {
                Some(body) => each(&body).map(|last| (body.len() as u64, last)),
                None => Err("bad checksum or length".to_owned()),
            };
            match record {
                Ok((len, last)) => {
                    log.seq += 1;
                    log.tail += record_len(len);
                    if last {
                        log.snapshot = log.tail;
                    }
                }
                Err(why) => {
                    let what = format!("record {} at byte {} of {tail}: {why}", log.seq, log.tail);
                    if !salvage || log.snapshot == 0 {
                        return Err(JournalError::Damaged(what));
                    }
                    damage = Some(format!("{what}; dropped this record and all after it"));
                    log.mem.store_u64(base + half::TAIL, log.tail);
                    break;
                }
            }
        }
        if log.snapshot == 0 {
            return Err(JournalError::Damaged("no whole snapshot".into()));
        }
        Ok((log, damage))
    }

    fn base(&self, half: usize) -> usize {
        HALVES + half * self.half_size as usize
    }

    /// The body of the record at `at`, if it is whole.
    fn record(&self, at: u64, limit: u64) -> Option<Vec<u8>> {
        let off = self.base(self.active) + half::RECORDS + at as usize;
        if at + RECORD_HEAD as u64 > limit {
            return None;
        }
        let mut head = [0u8; RECORD_HEAD];
        self.mem.read(off, &mut head);
        let (len, crc) = (word32(&head, 0), word32(&head, 4));
        if at + record_len(u64::from(len)) > limit {
            return None;
        }
        let mut body = vec![0; len as usize];
        self.mem.read(off + RECORD_HEAD, &mut body);
        (head[8..] == self.seq.to_le_bytes() && crc == checksum(self.seq, len, &body)).then_some(body)
    }

    /// Whether the next record of `len` bytes should wait for a compaction.
    pub fn wants_compaction(&self, len: u64) -> bool {
        let used = self.tail + record_len(len);
        used > (self.compact_at + self.snapshot).min(self.half_size - half::RECORDS as u64 - HEADROOM)
    }

    /// Makes sure that a record of `len` bytes can be appended. What can't wait gets the last bytes too.
    ///
    /// # Errors
    /// [`Full`].
    pub fn reserve(&mut self, len: u64, can_wait: bool) -> Result<(), Full> {
        let need = self.tail + record_len(len);
        if can_wait && need + HEADROOM > self.half_size - half::RECORDS as u64 {
            return Err(Full(need));
        }
        self.allocate(self.active, need)
    }

    fn allocate(&mut self, which: usize, need: u64) -> Result<(), Full> {
        if need <= self.allocated[which] {
            return Ok(());
        }
        let room = self.half_size - half::RECORDS as u64;
        if need > room {
            return Err(Full(need));
        }
        let want = need.next_multiple_of(CHUNK).min(room);
        let base = self.base(which) as i64;
        // A store into a page that the file system can't give would be a SIGBUS.
        fallocate(
            self.mem.file().as_fd(),
            FallocateFlags::FALLOC_FL_KEEP_SIZE,
            base,
            want as i64 + half::RECORDS as i64,
        )
        .map_err(|_| Full(need))?;
        self.allocated[which] = want;
        Ok(())
    }

    fn put(&mut self, which: usize, at: u64, seq: u64, body: &[u8]) {
        let off = self.base(which) + half::RECORDS + at as usize;
        let len = body.len() as u32;
        let mut head = [0u8; RECORD_HEAD];
        head[..4].copy_from_slice(&len.to_le_bytes());
        head[4..8].copy_from_slice(&checksum(seq, len, body).to_le_bytes());
        head[8..].copy_from_slice(&seq.to_le_bytes());
        self.mem.write(off + RECORD_HEAD, body);
        self.mem.write(off, &head);
    }

    /// Appends a record whose space was reserved. It is committed when this returns.
    pub fn append(&mut self, body: &[u8]) {
        self.put(self.active, self.tail, self.seq, body);
        self.tail += record_len(body.len() as u64);
        self.seq += 1;
        self.mem.store_u64(self.base(self.active) + half::TAIL, self.tail);
    }

    /// Writes a snapshot into the other half and makes it the active one. With it the arena's undo pages are void.
    ///
    /// # Errors
    /// [`Full`]; the log is as before then.
    pub fn compact(
        &mut self,
        snapshot: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), Full>) -> Result<(), Full>,
    ) -> Result<(), Full> {
        let other = 1 - self.active;
        let (mut tail, mut seq) = (0, 0);
        snapshot(&mut |body| {
            self.allocate(other, tail + record_len(body.len() as u64))?;
            self.put(other, tail, seq, body);
            tail += record_len(body.len() as u64);
            seq += 1;
            Ok(())
        })
        .inspect_err(|_| self.punch(other))?;
        let base = self.base(other);
        self.mem.store_u64(base + half::EPOCH, self.epoch + 1);
        self.mem.store_u64(base + half::TAIL, tail);
        self.mem.store_u64(sb::ACTIVE, (self.epoch + 1) << 1 | other as u64);
        let old = std::mem::replace(&mut self.active, other);
        (self.epoch, self.tail, self.seq, self.snapshot) = (self.epoch + 1, tail, seq, tail);
        self.mem.crash_point();
        self.punch(old);
        Ok(())
    }

    /// Gives the most of a half's memory back.
    fn punch(&mut self, which: usize) {
        if self.allocated[which] <= KEEP {
            return;
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let base = self.base(which) as i64;
        // Only memory is at stake: records are found by the tail, not by zeroes.
        match fallocate(self.mem.file().as_fd(), flags, base + KEEP as i64, (self.half_size - KEEP) as i64) {
            Ok(()) => self.allocated[which] = KEEP - half::RECORDS as u64,
            Err(e) => tracing::debug!(error = %e, "a journal half keeps its memory"),
        }
    }

    /// Bytes of records in the active half.
    pub fn len(&self) -> u64 {
        self.tail
    }

    /// Whether there is no record (never so once sealed).
    pub fn is_empty(&self) -> bool {
        self.tail == 0
    }
}

fn record_len(body: u64) -> u64 {
    (RECORD_HEAD as u64 + body).next_multiple_of(8)
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn checksum(seq: u64, len: u32, body: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&seq.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &len.to_le_bytes()), body)
}

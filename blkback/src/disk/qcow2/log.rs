//! Changes of an image's tables that are not on the medium yet, in memory that outlives the process.
//!
//! A guest must not lose an acknowledged write to a SIGKILL, and an image must not be torn by a power failure. Writing tables at
//! once, each behind a flush, gives both and is slow. So changes of tables go to this log, which hv-core keeps for the next
//! incarnation; now and then they are written out in an order with two flushes ([`super::commit`]), and the log begins anew.
//! A power failure takes the log with it and finds the tables as the last such time left them.
//!
//! Every entry says what a table's field *is* from now on, so that applying entries twice, or to tables that have some of
//! them already, does no harm. An entry counts once the count behind it is stored.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use domain_kit::mem::SharedMem;

/// Entries. With the header they fill 25 pages.
pub const CAPACITY: usize = 4264;
const ENTRY_BYTES: usize = 24;
const HEADER_BYTES: usize = 64;
/// Bytes of the log's memory.
pub const LOG_BYTES: usize = 100 << 10;
const MAGIC: u64 = 0x626b_7163_6f77_0001;

const _: () = assert!(HEADER_BYTES + CAPACITY * ENTRY_BYTES <= LOG_BYTES);

/// One change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The L2 entry of a guest cluster.
    L2 {
        /// Guest cluster.
        guest: u64,
        /// Its entry.
        entry: u64,
    },
    /// The refcount of a host cluster.
    Ref {
        /// Host cluster.
        cluster: u64,
        /// Its refcount.
        count: u64,
    },
    /// A new L2 table.
    Table {
        /// Index in the L1 table.
        index: u64,
        /// Host cluster that it is in.
        cluster: u64,
        /// Host cluster of the table that it began as a copy of; 0 if it began empty.
        source: u64,
    },
    /// One reference less to a host cluster, once the rest is on the medium.
    Free {
        /// Host cluster.
        cluster: u64,
    },
}

impl Entry {
    fn words(self) -> [u64; 3] {
        match self {
            Entry::L2 { guest, entry } => [1, guest, entry],
            Entry::Ref { cluster, count } => [2, cluster, count],
            Entry::Table { index, cluster, source } => [3 | index << 8, cluster, source],
            Entry::Free { cluster } => [4, cluster, 0],
        }
    }

    fn from_words([tag, a, b]: [u64; 3]) -> Option<Entry> {
        Some(match tag & 0xff {
            1 => Entry::L2 { guest: a, entry: b },
            2 => Entry::Ref { cluster: a, count: b },
            3 => Entry::Table { index: tag >> 8, cluster: a, source: b },
            4 => Entry::Free { cluster: a },
            _ => return None,
        })
    }
}

/// See the module. What the entries say is also held in maps.
#[derive(Debug, Default)]
pub struct Log {
    mem: Option<Arc<SharedMem>>,
    count: usize,
    /// Guest cluster to L2 entry.
    pub l2: HashMap<u64, u64>,
    /// Host cluster to refcount.
    pub refs: HashMap<u64, u64>,
    /// L1 index to host cluster and source of a new table.
    pub tables: BTreeMap<u64, (u64, u64)>,
    /// Host clusters to be freed.
    pub frees: Vec<u64>,
}

impl Log {
    /// Takes up what a predecessor left in `mem` for the image called `identity`; what is there of another image is dropped.
    /// Without memory, nothing outlives the process.
    pub fn open(mem: Option<Arc<SharedMem>>, identity: u64) -> Log {
        let mut log = Log { mem, ..Log::default() };
        let Some(mem) = log.mem.clone() else { return log };
        let count = mem.load_u64(16, Acquire) as usize;
        if mem.load_u64(0, Relaxed) != MAGIC || mem.load_u64(8, Relaxed) != identity || count > CAPACITY {
            mem.store_u64(16, 0, Release);
            mem.store_u64(8, identity, Release);
            mem.store_u64(0, MAGIC, Release);
            return log;
        }
        for index in 0..count {
            let at = HEADER_BYTES + index * ENTRY_BYTES;
            let words = [0, 8, 16].map(|word| mem.load_u64(at + word, Relaxed));
            if let Some(entry) = Entry::from_words(words) {
                log.apply(entry);
            }
        }
        log.count = count;
        log
    }

    /// True if `mem` holds changes of the image called `identity`.
    pub fn has_changes(mem: &SharedMem, identity: u64) -> bool {
        mem.load_u64(0, Relaxed) == MAGIC
            && mem.load_u64(8, Relaxed) == identity
            && mem.load_u64(16, Acquire) > 0
    }

    fn apply(&mut self, entry: Entry) {
        match entry {
            Entry::L2 { guest, entry } => drop(self.l2.insert(guest, entry)),
            Entry::Ref { cluster, count } => drop(self.refs.insert(cluster, count)),
            Entry::Table { index, cluster, source } => drop(self.tables.insert(index, (cluster, source))),
            Entry::Free { cluster } => self.frees.push(cluster),
        }
    }

    /// Entries for which there is room.
    pub fn room(&self) -> usize {
        CAPACITY - self.count
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds a change. The caller has looked for room.
    pub fn append(&mut self, entry: Entry) {
        assert!(self.count < CAPACITY, "the caller looks for room first");
        if let Some(mem) = &self.mem {
            let at = HEADER_BYTES + self.count * ENTRY_BYTES;
            for (word, value) in entry.words().into_iter().enumerate() {
                mem.store_u64(at + 8 * word, value, Relaxed);
            }
            mem.store_u64(16, self.count as u64 + 1, Release);
        }
        self.count += 1;
        self.apply(entry);
    }

    /// Everything is on the medium: begins anew. Gives the clusters that may be freed now.
    pub fn reset(&mut self) -> Vec<u64> {
        if let Some(mem) = &self.mem {
            mem.store_u64(16, 0, Release);
        }
        self.count = 0;
        self.l2.clear();
        self.refs.clear();
        self.tables.clear();
        std::mem::take(&mut self.frees)
    }
}

//! qcow2 images, versions 2 and 3 (QEMU's `docs/interop/qcow2.rst`), read and written.
//!
//! | module | what |
//! |---|---|
//! | [`header`] | the header, new images |
//! | [`log`] | changes of tables that are not on the medium yet, kept over SIGKILL |
//! | `refcount` | refcounts, allocation |
//! | `mapping` | from guest clusters to host clusters |
//! | `io` | reads, writes, zeroes, discard |
//! | `commit` | tables to the medium, in order |
//! | `check` | counting references: repair of images left dirty, and the tests' judge |
//!
//! **What is promised.** A write that was answered survives SIGKILL; a flush that was answered survives a power failure; a power
//! failure at any instant leaves an image that `qemu-img check` finds whole but for leaked clusters. Internal snapshots stay as
//! they are: what they share is copied before it is changed.
//!
//! **Locks.** Data is read and overwritten in place outside the state's lock, inside the gate (shared). Clusters become free
//! for others only with the gate shut, so that no late access meets another's data. The gate is taken before the state.

pub mod cache;
mod check;
mod commit;
pub mod header;
mod io;
pub mod log;
mod mapping;
mod refcount;

use std::io::{Error, Result};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use domain_kit::mem::SharedMem;

use self::cache::Cache;
use self::header::{Header, corrupt, field, incompatible};
use self::log::Log;
use super::layer::Layer;

/// What changes.
#[derive(Debug)]
pub(crate) struct State {
    /// As on the medium; see [`Log::tables`] for the rest.
    l1: Vec<u64>,
    l1_offset: u64,
    reftable: Vec<u64>,
    reftable_offset: u64,
    cache: Cache,
    log: Log,
    /// Where the search for free clusters goes on.
    next_free: u64,
    /// Clusters that were freed.
    free: Vec<u64>,
    /// Clusters that lose a reference when the gate is shut next.
    ready: Vec<u64>,
    /// What lies from here on (bytes) was never written: it reads as zeroes.
    fresh: u64,
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: Arc<dyn Layer>,
    backing: Option<Arc<dyn Layer>>,
    header: Header,
    read_only: bool,
    size: AtomicU64,
    state: Mutex<State>,
    gate: RwLock<()>,
}

/// How an image is opened.
#[derive(Debug, Default)]
pub struct Options {
    /// Nothing is written.
    pub read_only: bool,
    /// The approved backing file and its name as approved, an absolute path.
    pub backing: Option<(Arc<dyn Layer>, String)>,
    /// Memory for the log, [`log::LOG_BYTES`] long.
    pub log: Option<Arc<SharedMem>>,
    /// Which image the log is of.
    pub identity: u64,
}

/// Whether the name in an image's header means the approved file: both absolute and the same, or the header's is relative and
/// ends the approved path.
fn names_same(in_header: &str, approved: &str) -> bool {
    let name = in_header.strip_prefix("file:").unwrap_or(in_header);
    if name.starts_with('/') {
        return name == approved;
    }
    // A relative name is relative to the image; its last component is what can be compared whatever the image's place.
    let last = |path: &str| path.rsplit('/').next().map(str::to_owned);
    !name.is_empty() && last(name) == last(approved)
}

impl Image {
    /// Opens the image in `file`.
    ///
    /// # Errors
    /// `InvalidData` with one line that says what is wrong with the image or its backing file; the file's.
    pub fn open(file: Arc<dyn Layer>, options: Options) -> Result<Image> {
        let header = Header::read(&*file)?;
        let backing = match (&header.backing, options.backing) {
            (None, None) => None,
            (Some(name), Some((layer, approved))) if names_same(name, &approved) => Some(layer),
            (Some(name), Some((_, approved))) => {
                return Err(corrupt(format!(
                    "its header names backing file {name:?}, approved is {approved:?}; correct backing in the configuration, or qemu-img rebase -u"
                )));
            }
            (Some(name), None) => {
                return Err(corrupt(format!(
                    "it has a backing file, {name:?}; name it as backing in the configuration"
                )));
            }
            (None, Some((_, approved))) => {
                return Err(corrupt(format!(
                    "it has no backing file, but {approved:?} is configured; leave backing out"
                )));
            }
        };
        let words = |offset: u64, count: u64| -> Result<Vec<u64>> {
            let mut bytes = vec![0; count as usize * 8];
            file.read(offset, &mut bytes)?;
            Ok(bytes.chunks_exact(8).map(|b| b.try_into().map_or(0, u64::from_be_bytes)).collect())
        };
        let l1 = words(header.l1_offset, header.l1_size.into())?;
        let entries = (u64::from(header.reftable_clusters) << header.cluster_bits) / 8;
        let reftable = words(header.reftable_offset, entries)?;
        let fresh = match file.zero_beyond_end() {
            true => file.len().next_multiple_of(header.cluster_size()),
            false => u64::MAX,
        };
        let log = Log::open(options.log.filter(|_| !options.read_only), options.identity);
        let image = Image {
            read_only: options.read_only,
            size: header.size.into(),
            state: Mutex::new(State {
                l1,
                l1_offset: header.l1_offset,
                reftable,
                reftable_offset: header.reftable_offset,
                cache: Cache::new(header.cluster_size()),
                log,
                next_free: 0,
                free: Vec::new(),
                ready: Vec::new(),
                fresh,
            }),
            gate: RwLock::new(()),
            file,
            backing,
            header,
        };
        if !image.read_only {
            image.prepare_writing()?;
        }
        Ok(image)
    }

    fn prepare_writing(&self) -> Result<()> {
        if self.header.autoclear != 0 {
            // Bitmaps and the like are not kept up to date here.
            self.file.write(field::AUTOCLEAR, &0u64.to_be_bytes())?;
            self.file.flush()?;
        }
        if !self.state().log.is_empty() {
            tracing::info!("qcow2: taking up a predecessor's changes");
            self.commit()?;
        }
        if self.header.incompatible & incompatible::DIRTY != 0 {
            self.repair_refcounts()?;
            let bits = self.header.incompatible & !incompatible::DIRTY;
            self.file.write(field::INCOMPATIBLE, &bits.to_be_bytes())?;
            self.file.flush()?;
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    fn v3(&self) -> bool {
        self.header.version >= 3
    }

    /// How many internal snapshots it has.
    pub fn snapshots(&self) -> u32 {
        self.header.snapshots
    }

    /// The approved backing file.
    pub fn backing(&self) -> Option<&Arc<dyn Layer>> {
        self.backing.as_ref()
    }

    /// Makes the guest's disk longer.
    fn grow_to(&self, new: u64) -> Result<()> {
        if self.read_only {
            return Err(std::io::ErrorKind::PermissionDenied.into());
        }
        if new < self.size.load(Relaxed) || !new.is_multiple_of(512) {
            return Err(Error::new(
                std::io::ErrorKind::InvalidInput,
                "qcow2: the new size must be a multiple of 512 and not less than the old",
            ));
        }
        let needed = self.header.l1_needed(new)?;
        self.commit()?;
        let mut st = self.state();
        if needed > st.l1.len() as u64 {
            self.grow_l1(&mut st, needed)?;
        }
        self.file.write(field::SIZE, &new.to_be_bytes())?;
        self.file.flush()?;
        self.size.store(new, Relaxed);
        Ok(())
    }

    /// A longer L1 table. The log is empty.
    fn grow_l1(&self, st: &mut State, needed: u64) -> Result<()> {
        let bits = self.header.cluster_bits;
        let clusters = (needed * 8).div_ceil(self.cluster_size());
        if clusters as usize > st.log.room() / 2 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        // In a row, where nothing was before.
        let mut first = self.file.len().div_ceil(self.cluster_size()).max(st.next_free);
        let mut got = 0;
        while got < clusters {
            let cluster = first + got;
            if self.block_of(st, cluster)? == 0 {
                // Takes this cluster, or some behind it.
                self.add_block(st, cluster)?;
            } else if self.refcount(st, cluster)? == 0 {
                got += 1;
                continue;
            }
            first = cluster + 1;
            got = 0;
        }
        for cluster in first..first + clusters {
            st.log.append(log::Entry::Ref { cluster, count: 1 });
        }
        self.write_tables(st)?;
        let mut bytes: Vec<u8> = st.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize((clusters << bits) as usize, 0);
        self.file.write(first << bits, &bytes)?;
        self.file.flush()?;
        let mut pointer = (needed as u32).to_be_bytes().to_vec();
        pointer.extend((first << bits).to_be_bytes());
        self.file.write(field::L1_SIZE, &pointer)?;
        self.file.flush()?;
        let old = st.l1_offset >> bits;
        let old_clusters = (st.l1.len() as u64 * 8).div_ceil(self.cluster_size());
        st.l1_offset = first << bits;
        st.l1.resize(needed as usize, 0);
        st.fresh = st.fresh.max((first + clusters) << bits);
        st.cache.forget(first << bits, clusters << bits);
        if old != 0 {
            st.ready.extend(old..old + old_clusters);
        }
        Ok(())
    }
}

impl Layer for Image {
    fn len(&self) -> u64 {
        self.size.load(Relaxed)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.read_guest(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.write_guest(offset, from)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.zero_guest(offset, len, false)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.zero_guest(offset, len, true)
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.commit()
    }

    fn grow(&self, len: u64) -> Result<()> {
        self.grow_to(len)
    }

    fn settle(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        // The second writes what the first let free.
        self.commit()?;
        self.commit()
    }

    fn extent(&self, offset: u64, len: u64) -> Result<super::layer::Extent> {
        self.extent_at(offset, len)
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;

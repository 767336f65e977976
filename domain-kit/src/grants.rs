//! Regions (pages granted), grant maps (pages of others), and buffers for grant copies.

use std::sync::Arc;

use hv_abi::{MAX_COPY_ENTRIES, PAGE_SIZE, RegionInfo};

use crate::hypercall::{HvResult, Hypercall, RawMapping};
use crate::mem::SharedMem;

/// Pages of a process domain that one peer may map, mapped here too.
#[derive(Clone, Debug)]
pub struct Region {
    /// What hv-core says of it.
    pub info: RegionInfo,
    /// Its pages.
    pub mem: Arc<SharedMem>,
}

impl Region {
    /// Makes one of `pages` zeroed pages for `peer`.
    ///
    /// # Errors
    /// Those of the hypercall; mapping failures as `ENOMEM`.
    pub fn create(hv: &Hypercall, peer: u16, pages: u32, tag: u64) -> Result<Self, GrantError> {
        let (info, fd) = hv.region_create(peer, pages, tag)?;
        let mem = Arc::new(SharedMem::map(fd, info.pages as usize * PAGE_SIZE)?);
        Ok(Region { info, mem })
    }

    /// The region made earlier with this tag, if there is one: after a restart.
    ///
    /// # Errors
    /// As [`Region::create`].
    pub fn find(hv: &Hypercall, tag: u64) -> Result<Option<Self>, GrantError> {
        let Some(info) = hv.region_list()?.into_iter().find(|r| r.tag == tag) else { return Ok(None) };
        let (info, fd) = hv.region_fetch(info.region)?;
        let mem = Arc::new(SharedMem::map(fd, info.pages as usize * PAGE_SIZE)?);
        Ok(Some(Region { info, mem }))
    }

    /// Grant reference of page `page` (from 0).
    pub fn gref(&self, page: u32) -> u32 {
        assert!(page < self.info.pages, "page {page} of a region of {}", self.info.pages);
        self.info.first_gref + page
    }
}

/// Why a grant could not be used.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// hv-core refused.
    #[error(transparent)]
    Hypercall(#[from] crate::HvError),
    /// The kernel did not map it.
    #[error("mapping granted pages: {0}")]
    Map(#[from] std::io::Error),
}

/// Granted pages of another domain, mapped here.
#[derive(Debug)]
pub struct MappedGrants {
    /// hv-core's handle.
    pub handle: u64,
    /// The mapping; it can be longer than the pages asked for.
    pub mem: Arc<SharedMem>,
    pages: Vec<u32>,
}

impl MappedGrants {
    /// Maps `grefs` of `domid` for reading and writing. `tag` comes back in [`Hypercall::grant_list`] after a restart.
    ///
    /// # Errors
    /// [`hv_abi::Op::GrantMap`]'s; mmap(2)'s, and the grant is then given back.
    pub fn map(hv: &Hypercall, domid: u16, grefs: &[u32], tag: u64) -> Result<Self, GrantError> {
        Self::from_raw(hv, hv.grant_map(domid, grefs, tag)?)
    }

    /// Takes over a map of this domain's previous incarnation.
    ///
    /// # Errors
    /// As [`MappedGrants::map`]; `ESTALE` if hv-core no longer has it.
    pub fn claim(hv: &Hypercall, handle: u64) -> Result<Self, GrantError> {
        Self::from_raw(hv, hv.grant_claim(handle)?)
    }

    fn from_raw(hv: &Hypercall, raw: RawMapping) -> Result<Self, GrantError> {
        let RawMapping { handle, fd_pages, pages, fd } = raw;
        match SharedMem::map(&fd, fd_pages as usize * PAGE_SIZE) {
            Ok(mem) => Ok(MappedGrants { handle, mem: Arc::new(mem), pages }),
            Err(e) => {
                drop(fd);
                hv.grant_unmap(handle)?;
                Err(e.into())
            }
        }
    }

    /// How many pages were asked for.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Byte offset in [`MappedGrants::mem`] of the page of the `index`th gref.
    pub fn offset(&self, index: usize) -> usize {
        self.pages[index] as usize * PAGE_SIZE
    }

    /// Unmaps and tells hv-core. If another part of the process still holds the mapping, nothing is unmapped.
    ///
    /// # Errors
    /// The hypercall's; gives itself back inside `Err` never: a map still in use is logged and stays until the process ends.
    pub fn unmap(self, hv: &Hypercall) -> HvResult<()> {
        let handle = self.handle;
        match Arc::try_unwrap(self.mem) {
            Ok(mem) => {
                drop(mem);
                hv.grant_unmap(handle)
            }
            Err(_) => {
                tracing::error!(handle, "granted pages are still in use and stay mapped");
                Ok(())
            }
        }
    }
}

/// A buffer that hv-core copies granted bytes to and from. Belongs to one incarnation.
#[derive(Debug)]
pub struct CopyBuffer {
    /// For [`hv_abi::CopyEntry::buffer`].
    pub id: u32,
    /// Its bytes.
    pub mem: SharedMem,
}

impl CopyBuffer {
    /// Makes one of `len` bytes (rounded up to whole pages).
    ///
    /// # Errors
    /// Those of memfd_create(2) and the hypercall.
    pub fn new(hv: &Hypercall, len: usize) -> Result<Self, GrantError> {
        let len = len.next_multiple_of(PAGE_SIZE);
        let (mem, fd) = SharedMem::create("copy-buffer", len)?;
        let id = hv.buffer_register(&fd, len as u64)?;
        Ok(CopyBuffer { id, mem })
    }
}

/// Grant-copy entries gathered into batches.
#[derive(Debug, Default)]
pub struct CopyBatch {
    /// What to copy, in order.
    pub entries: Vec<hv_abi::CopyEntry>,
    /// After [`CopyBatch::run`]: GNTST_* of each entry, 0 = done.
    pub statuses: Vec<i16>,
}

impl CopyBatch {
    /// Carries out all entries, in order, with as few hypercalls as there must be.
    ///
    /// # Errors
    /// The hypercall's, not those of single entries.
    pub fn run(&mut self, hv: &Hypercall) -> HvResult<()> {
        self.statuses.clear();
        self.statuses.resize(self.entries.len(), 0);
        for (entries, statuses) in
            self.entries.chunks(MAX_COPY_ENTRIES).zip(self.statuses.chunks_mut(MAX_COPY_ENTRIES))
        {
            hv.grant_copy(entries, statuses)?;
        }
        Ok(())
    }

    /// Empties it for the next batch; keeps its memory.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.statuses.clear();
    }
}

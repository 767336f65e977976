//! Grant copies beside copies inside this process.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use domain_kit::Domain;
use domain_kit::grants::{CopyBatch, CopyBuffer, Region};
use domain_kit::mem::SharedMem;
use hv_abi::{COPY_TO_GRANT, CopyEntry, PAGE_SIZE};
use serde_json::{Value, json};

/// What is copied.
pub struct Job {
    granter: u16,
    gref: u32,
    pages: usize,
    batch: usize,
    count: usize,
    to_grant: bool,
}

impl Job {
    /// From the driver's command: `count` batches of `batch` pages out of `pages`.
    pub fn from(command: &Value) -> Result<Job> {
        let number = |key| super::number(command, key);
        let job = Job {
            granter: number("granter")? as u16,
            gref: number("gref")? as u32,
            pages: number("pages")? as usize,
            batch: number("batch")? as usize,
            count: number("count")? as usize,
            to_grant: command["to_grant"].as_bool().unwrap_or(false),
        };
        ensure!(job.batch > 0 && job.batch <= job.pages && job.count > 0, "batch or count out of range");
        Ok(job)
    }

    fn result(&self, start: Instant) -> Value {
        let pages = (self.batch * self.count) as f64;
        json!({"ns_per_page": start.elapsed().as_secs_f64() * 1e9 / pages})
    }

    /// First page of the batch number `i`: they go round all pages.
    fn first(&self, i: usize) -> usize {
        (i * self.batch) % (self.pages - self.batch + 1)
    }
}

/// What was made so far.
#[derive(Default)]
pub struct Copy {
    regions: Vec<Region>,
    buffer: Option<CopyBuffer>,
    here: Option<(SharedMem, SharedMem)>,
}

impl Copy {
    /// Pages granted to `peer`.
    pub fn region(&mut self, domain: &Domain, peer: u16, pages: u32) -> Result<Value> {
        let region = Region::create(&domain.hv, peer, pages, 0)?;
        for page in 0..pages as usize {
            // Touched, so that no copy waits for the kernel to make the page.
            region.mem.copy_in(page * PAGE_SIZE, &[page as u8; PAGE_SIZE]);
        }
        let gref = region.gref(0);
        self.regions.push(region);
        Ok(json!({"gref": gref}))
    }

    /// Grant copies, batch by batch.
    pub fn grant_copy(&mut self, domain: &Domain, job: &Job) -> Result<Value> {
        let bytes = job.pages * PAGE_SIZE;
        if self.buffer.as_ref().is_none_or(|b| b.mem.len() < bytes) {
            let buffer = CopyBuffer::new(&domain.hv, bytes)?;
            buffer.mem.zero(0, bytes);
            self.buffer = Some(buffer);
        }
        let buffer = self.buffer.as_ref().context("just made")?;
        let mut batch = CopyBatch::default();
        let start = Instant::now();
        for i in 0..job.count {
            batch.clear();
            let first = job.first(i);
            batch.entries.extend((first..first + job.batch).map(|page| CopyEntry {
                domid: job.granter,
                flags: if job.to_grant { COPY_TO_GRANT } else { 0 },
                gref: job.gref + page as u32,
                offset: 0,
                len: PAGE_SIZE as u16,
                buffer: buffer.id,
                buffer_offset: (page * PAGE_SIZE) as u64,
            }));
            batch.run(&domain.hv)?;
            ensure!(batch.statuses.iter().all(|&s| s == 0), "grant copy refused: {:?}", batch.statuses);
        }
        Ok(job.result(start))
    }

    /// The same copies between two shared mappings of this process: memcpy as this project may do it on shared memory.
    pub fn memory_copy(&mut self, job: &Job) -> Result<Value> {
        let bytes = job.pages * PAGE_SIZE;
        if self.here.as_ref().is_none_or(|(a, _)| a.len() < bytes) {
            let make = || SharedMem::create("memcpy", bytes).map(|(mem, _)| mem);
            let (from, to) = (make()?, make()?);
            from.zero(0, bytes);
            to.zero(0, bytes);
            self.here = Some((from, to));
        }
        let (from, to) = self.here.as_ref().context("just made")?;
        let start = Instant::now();
        for i in 0..job.count {
            let first = job.first(i);
            for page in first..first + job.batch {
                crate::peers::memory::copy(from, to, page * PAGE_SIZE, PAGE_SIZE);
            }
        }
        Ok(job.result(start))
    }
}

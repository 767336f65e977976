//! The guest's disk: any pattern of requests, and a light load.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use domain_kit::Domain;
use domain_kit::xs::XsClient;
use frontends::blkfront::{BlkFront, MAX_BYTES, Op, Options, Outcome, QueueShape};
use serde_json::Value;

use crate::disk::{self, Io, Pattern, Places, Target};

/// Bytes of a request of the light load.
const BLOCK: usize = 4096;
/// Number of xvda (docs/misc/vbd-interface.txt).
const XVDA: u32 = 202 << 8;
/// How long the backend may take to connect, or to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests in flight at most: a ring of one page; of up to 1 MiB.
const SHAPE: QueueShape =
    QueueShape { abi: xen_abi::io::blkif::Abi::X86_64, ring_pages: 1, depth: 32, segments: 256 };

/// The first disk, connected at first use.
#[derive(Default)]
pub struct Block {
    disk: Option<Arc<Mutex<Disk>>>,
}

/// A connected disk.
pub struct Disk {
    front: BlkFront,
    places: Places,
}

impl Block {
    /// The disk. A load keeps it locked for as long as it runs.
    pub fn disk(&mut self, domain: &Domain, xs: &XsClient) -> Result<Arc<Mutex<Disk>>> {
        if let Some(disk) = &self.disk {
            return Ok(disk.clone());
        }
        let options = Options { shape: SHAPE, ..Options::default() };
        let mut fronts = BlkFront::connect_with(&domain.hv, xs, domain.domid(), XVDA, PATIENCE, &options)?;
        let Some(front) = fronts.pop() else { anyhow::bail!("xvda has no queue") };
        ensure!(front.max_bytes() > MAX_BYTES, "the backend takes no indirect requests");
        let disk = Disk { front, places: Places::default() };
        Ok(self.disk.insert(Arc::new(Mutex::new(disk))).clone())
    }

    /// One turn of a pattern.
    pub fn run(&mut self, domain: &Domain, xs: &XsClient, command: &Value) -> Result<Value> {
        let pattern: Pattern = serde_json::from_value(command["pattern"].clone())?;
        let disk = self.disk(domain, xs)?;
        let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
        disk.front.set_look(Duration::from_micros(pattern.look_us));
        let mut places = std::mem::take(&mut disk.places);
        let sample = disk::run(&mut *disk, &pattern, &mut places);
        disk.places = places;
        Ok(serde_json::to_value(sample?)?)
    }
}

impl Target for Disk {
    fn submit(&mut self, tag: u32, io: Io) -> Result<()> {
        // Data stay where the guest has granted them, as the other contestants' stay in their buffers.
        let sector = io.offset / 512;
        let submitted = match io.write {
            true => self.front.submit_in_place(sector, io.len, tag.into(), |_, _| ()),
            false => self.front.submit(Op::Read { sector, len: io.len }, tag.into()),
        };
        Ok(submitted?)
    }

    fn wait(&mut self, each: &mut dyn FnMut(u32)) -> Result<()> {
        self.front.push();
        let mut failed = 0;
        let answered = self.front.wait(PATIENCE, |completion| {
            failed += u32::from(completion.outcome != Outcome::Done);
            each(completion.mark as u32);
        })?;
        ensure!(answered > 0, "the backend does not answer");
        ensure!(failed == 0, "{failed} requests failed");
        Ok(())
    }
}

/// A load at depth: random, 70 % reads. What is in flight at its end is waited for.
pub struct Deep {
    disk: Arc<Mutex<Disk>>,
    pattern: Pattern,
}

impl Deep {
    /// A load of `depth` requests of 4 KiB.
    pub fn new(disk: Arc<Mutex<Disk>>, depth: u32) -> Deep {
        let span = disk.lock().unwrap_or_else(PoisonError::into_inner).front.info().sectors * 512;
        let pattern = Pattern { writes: 30, sequential: false, bytes: BLOCK, depth, span, ms: 0, look_us: 0 };
        Deep { disk, pattern }
    }

    /// Fills up to the depth, and waits for what comes next.
    pub fn step(&mut self) -> Result<()> {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        while disk.front.in_flight() < self.pattern.depth as usize {
            let io = disk.places.next(&self.pattern);
            // Nobody asks which was answered.
            disk.submit(0, io)?;
        }
        disk.wait(&mut |_| ())
    }
}

impl Drop for Deep {
    fn drop(&mut self) {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        while disk.front.in_flight() > 0 {
            if let Err(error) = disk.wait(&mut |_| ()) {
                return tracing::error!("the deep load's end: {error:#}");
            }
        }
    }
}

impl Disk {
    /// One request of a light load: a write, then a read.
    pub fn load_request(&mut self) -> Result<()> {
        let blocks = self.front.info().sectors / (BLOCK as u64 / 512);
        let offset = self.places.random() % blocks * BLOCK as u64;
        for write in [true, false] {
            self.submit(0, Io { write, offset, len: BLOCK })?;
            self.wait(&mut |_| ())?;
        }
        Ok(())
    }
}

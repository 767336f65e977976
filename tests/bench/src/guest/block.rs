//! The guest's disk: random 4 KiB requests at a fixed depth.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use domain_kit::Domain;
use domain_kit::xs::XsClient;
use frontends::blkfront::{BlkFront, Op, Outcome};
use serde_json::{Value, json};

/// Bytes of a request.
const BLOCK: usize = 4096;
/// Number of xvda (docs/misc/vbd-interface.txt).
const XVDA: u32 = 202 << 8;
/// How long the backend may take to connect, or to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The first disk, connected at first use.
#[derive(Default)]
pub struct Block {
    disk: Option<Arc<Mutex<Disk>>>,
}

/// A connected disk.
pub struct Disk {
    front: BlkFront,
    seed: u64,
}

impl Block {
    /// The disk. A load keeps it locked for as long as it runs.
    pub fn disk(&mut self, domain: &Domain, xs: &XsClient) -> Result<Arc<Mutex<Disk>>> {
        if let Some(disk) = &self.disk {
            return Ok(disk.clone());
        }
        let front = BlkFront::connect(&domain.hv, xs, domain.domid(), XVDA, PATIENCE)?;
        let disk = Arc::new(Mutex::new(Disk { front, seed: 0x9e37_79b9_7f4a_7c15 }));
        Ok(self.disk.insert(disk).clone())
    }

    /// Requests a second at a depth.
    pub fn run(&mut self, domain: &Domain, xs: &XsClient, command: &Value) -> Result<Value> {
        let disk = self.disk(domain, xs)?;
        let time = Duration::from_millis(super::number(command, "ms")?);
        let depth = super::number(command, "depth")? as usize;
        let write = command["write"].as_bool().unwrap_or(false);
        let iops = disk.lock().unwrap_or_else(PoisonError::into_inner).run(write, depth, time)?;
        Ok(json!({"iops": iops}))
    }
}

impl Disk {
    fn sector(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let blocks = self.front.info().sectors / (BLOCK as u64 / 512);
        (self.seed % blocks) * (BLOCK as u64 / 512)
    }

    fn run(&mut self, write: bool, depth: usize, time: Duration) -> Result<f64> {
        ensure!(depth > 0 && depth <= self.front.free(), "depth {depth} is more than the ring has");
        let data = [0x3c; BLOCK];
        let mut buffer = [0; BLOCK];
        let start = Instant::now();
        let (mut done, mut failed) = (0u64, 0u64);
        loop {
            let over = start.elapsed() >= time;
            if over && self.front.in_flight() == 0 {
                break;
            }
            while !over && self.front.in_flight() < depth {
                let sector = self.sector();
                let op =
                    if write { Op::Write { sector, data: &data } } else { Op::Read { sector, len: BLOCK } };
                self.front.submit(op, 0)?;
            }
            self.front.push();
            let answered = self.front.wait(PATIENCE, |completion| {
                // What was read is copied to where it was wanted, as io_uring's limit has it.
                completion.copy_read(&mut buffer);
                match completion.outcome {
                    Outcome::Done => done += 1,
                    _ => failed += 1,
                }
            })?;
            ensure!(answered > 0, "the backend does not answer");
        }
        ensure!(failed == 0, "{failed} requests failed");
        Ok(done as f64 / start.elapsed().as_secs_f64())
    }

    /// One request of a light load: a write, then a read.
    pub fn load_request(&mut self) -> Result<()> {
        let sector = self.sector();
        let data = [0x3d; BLOCK];
        for op in [Op::Write { sector, data: &data }, Op::Read { sector, len: BLOCK }] {
            self.front.submit(op, 0)?;
            self.front.push();
            let mut fine = false;
            let answered =
                self.front.wait(PATIENCE, |completion| fine = completion.outcome == Outcome::Done)?;
            ensure!(answered == 1 && fine, "a request failed or was not answered");
        }
        Ok(())
    }
}

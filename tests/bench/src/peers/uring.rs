//! Random 4 KiB reads and writes of a file by io_uring with registered file and buffers: what the disk under blkback can do.
#![expect(unsafe_code, reason = "io_uring submissions name memory by address")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, types};
use nix::libc;

/// Bytes of each request.
pub const BLOCK: usize = 4096;

/// An open file with a ring and buffers.
pub struct Disk {
    // Dropped before the buffers: closing the ring ends what the kernel may still do with them.
    ring: IoUring,
    buffers: Vec<[u8; BLOCK]>,
    /// Offset into `buffers` storage that makes them page-aligned is avoided by over-allocating one.
    first: usize,
    depth: u32,
    blocks: u64,
    seed: u64,
}

impl Disk {
    /// A ring of `depth` requests on `file`, of whose first `span` bytes any block may be touched.
    ///
    /// # Errors
    /// io_uring is not allowed here, or no memory may be locked.
    pub fn new(file: &File, span: u64, depth: u32) -> Result<Disk> {
        let blocks = span / BLOCK as u64;
        ensure!(blocks > 0 && depth > 0, "nothing to read");
        let ring = IoUring::new(depth.next_power_of_two()).context("io_uring")?;
        let buffers = vec![[0u8; BLOCK]; depth as usize + 1];
        let first = buffers.as_ptr().cast::<u8>().align_offset(BLOCK);
        let disk = Disk { ring, buffers, first, depth, blocks, seed: 0x1234_5678_9abc_def1 };
        let vecs: Vec<libc::iovec> =
            (0..depth).map(|i| libc::iovec { iov_base: disk.buffer(i).cast(), iov_len: BLOCK }).collect();
        // SAFETY: the buffers live as long as the ring (same struct, ring dropped first) and their storage never moves.
        unsafe { disk.ring.submitter().register_buffers(&vecs) }.context("registering buffers")?;
        disk.ring.submitter().register_files(&[file.as_raw_fd()]).context("registering the file")?;
        Ok(disk)
    }

    fn buffer(&self, index: u32) -> *mut u8 {
        // One buffer more than used is allocated, so a page-aligned start leaves room for all.
        self.buffers.as_ptr().cast::<u8>().wrapping_add(self.first + index as usize * BLOCK).cast_mut()
    }

    fn random_block(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % self.blocks
    }

    /// Requests a second with `depth` in flight for about `time`.
    ///
    /// # Errors
    /// A request that failed or was short.
    pub fn run(&mut self, write: bool, time: Duration) -> Result<f64> {
        let start = Instant::now();
        let mut done = 0u64;
        let mut free: Vec<u32> = (0..self.depth).collect();
        let mut failed = None;
        loop {
            let over = start.elapsed() >= time || failed.is_some();
            if over && free.len() == self.depth as usize {
                break;
            }
            if !over {
                while let Some(index) = free.pop() {
                    let offset = self.random_block() * BLOCK as u64;
                    let (fd, at, len) = (types::Fixed(0), self.buffer(index), BLOCK as u32);
                    let entry = match write {
                        true => opcode::WriteFixed::new(fd, at, len, index as u16).offset(offset).build(),
                        false => opcode::ReadFixed::new(fd, at, len, index as u16).offset(offset).build(),
                    };
                    // SAFETY: the buffer is registered, belongs to this slot alone, and outlives the request (run() ends only when
                    // all have completed, and on unwinding the ring is dropped first).
                    unsafe { self.ring.submission().push(&entry.user_data(index.into())) }
                        .context("submission ring is full")?;
                }
            }
            self.ring.submit_and_wait(1).context("io_uring_enter")?;
            for completion in self.ring.completion() {
                free.push(completion.user_data() as u32);
                match completion.result() {
                    n if n == BLOCK as i32 => done += 1,
                    n => failed = Some(n),
                }
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        match failed {
            Some(n) if n < 0 => Err(std::io::Error::from_raw_os_error(-n)).context("a disk request"),
            Some(n) => anyhow::bail!("a disk request moved only {n} bytes"),
            None => Ok(done as f64 / seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_a_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut disk = match Disk::new(&file, 1 << 20, 8) {
            Ok(disk) => disk,
            // Some machines forbid io_uring; then there is nothing to test.
            Err(e) => return eprintln!("no io_uring here: {e:#}"),
        };
        assert!(disk.run(true, Duration::from_millis(20)).unwrap() > 0.0);
        assert!(disk.run(false, Duration::from_millis(20)).unwrap() > 0.0);
    }
}

//! Threads that keep a block device busy and verify everything that they read back.

use crate::disk::{BLOCK, Tracker};
use crate::pattern::Rng;
use crate::stall::StallMeter;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What a load needs of a disk. Offsets and lengths are multiples of [`BLOCK`]; each call returns
/// when the whole range is done. Buffers are aligned to 4096 bytes.
pub trait BlockDevice: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Fills `buf` from byte `offset` on.
    ///
    /// # Errors
    /// When the device reports an error.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at byte `offset`.
    ///
    /// # Errors
    /// When the device reports an error.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes all acknowledged writes durable.
    ///
    /// # Errors
    /// When the device reports an error.
    fn flush(&self) -> io::Result<()>;
}

/// A file or block device of the operating system, past its page cache where it can be.
#[derive(Debug)]
pub struct OsDevice {
    file: File,
    size: u64,
}

impl OsDevice {
    /// Opens with O_DIRECT, or without where the file system refuses it.
    ///
    /// # Errors
    /// When the path cannot be opened for reading and writing.
    pub fn open(path: &Path) -> io::Result<Self> {
        let open = |flags: i32| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let direct = nix::fcntl::OFlag::O_DIRECT.bits();
        let mut file = match open(direct) {
            Err(e) if e.raw_os_error() == Some(nix::errno::Errno::EINVAL as i32) => open(0)?,
            other => other?,
        };
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, size })
    }
}

impl BlockDevice for OsDevice {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// A buffer aligned to 4096 bytes, as direct I/O and grants need it.
#[derive(Debug)]
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// A zeroed buffer of `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start, len }
    }

    /// The first `len` bytes.
    ///
    /// # Panics
    /// When the buffer is shorter.
    pub fn get(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.len, "within the buffer");
        &mut self.bytes[self.start..self.start + len]
    }
}

/// What a load does.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Seed of contents and of all choices.
    pub seed: u64,
    /// Threads, each with one request in flight.
    pub threads: usize,
    /// Bytes from the start of the device that are used (0: all); must be zero before the start.
    pub span: u64,
    /// Largest request in blocks.
    pub max_blocks: u64,
    /// Writes among 100 requests; the rest are reads.
    pub write_percent: u64,
    /// A flush follows about every so many writes (0: never).
    pub flush_every: u64,
    /// Pause between a thread's requests.
    pub pause: Duration,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            threads: 4,
            span: 0,
            max_blocks: 16,
            write_percent: 50,
            flush_every: 64,
            pause: Duration::ZERO,
        }
    }
}

/// Totals of a load so far. All counters only grow.
#[derive(Debug)]
pub struct LoadStats {
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Bytes written and acknowledged.
    pub written_bytes: AtomicU64,
    /// Bytes read back and proved right.
    pub verified_bytes: AtomicU64,
    /// Requests done without an error.
    pub requests: AtomicU64,
    /// Flushes done without an error.
    pub flushes: AtomicU64,
    /// Requests that the device failed.
    pub errors: AtomicU64,
    /// Blocks that held what they may not.
    pub corrupt: AtomicU64,
    /// Latencies of reads.
    pub reads: StallMeter,
    /// Latencies of writes and flushes.
    pub writes: StallMeter,
    first: Mutex<Option<String>>,
}

impl LoadStats {
    /// Zero counters for `threads` threads.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            read_bytes: zero(),
            written_bytes: zero(),
            verified_bytes: zero(),
            requests: zero(),
            flushes: zero(),
            errors: zero(),
            corrupt: zero(),
            reads: StallMeter::new(threads),
            writes: StallMeter::new(threads),
            first: Mutex::new(None),
        }
    }

    /// The first error or corruption in words.
    #[must_use]
    pub fn first_problem(&self) -> Option<String> {
        self.first.lock().map_or(None, |f| f.clone())
    }

    fn problem(&self, counter: &AtomicU64, text: impl FnOnce() -> String) {
        counter.fetch_add(1, Relaxed);
        if let Ok(mut first) = self.first.lock() {
            first.get_or_insert_with(text);
        }
    }
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    /// The totals.
    pub stats: Arc<LoadStats>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts the threads. Each writes in a part of its own and reads everywhere.
    ///
    /// # Errors
    /// When the device is too small for the number of threads.
    pub fn start(device: Arc<dyn BlockDevice>, config: &LoadConfig) -> io::Result<Self> {
        let span = match config.span {
            0 => device.size(),
            span => span.min(device.size()),
        };
        let blocks = span / BLOCK as u64;
        let share = blocks / config.threads.max(1) as u64;
        if share == 0 || config.threads == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{span} bytes are too few for {} threads", config.threads),
            ));
        }
        let tracker = Arc::new(Tracker::new(config.seed, blocks as usize));
        let stats = Arc::new(LoadStats::new(config.threads));
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..config.threads)
            .map(|id| {
                let worker = Worker {
                    id,
                    first: share * id as u64,
                    share,
                    device: Arc::clone(&device),
                    config: config.clone(),
                    tracker: Arc::clone(&tracker),
                    stats: Arc::clone(&stats),
                    stop: Arc::clone(&stop),
                };
                thread::Builder::new().name(format!("disk-{id}")).spawn(move || worker.run())
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { stats, stop, threads })
    }

    /// Ends the threads once their requests are done; false if one was still waiting at the limit
    /// (it is then left behind).
    #[must_use]
    pub fn stop(self, limit: Duration) -> bool {
        self.stop.store(true, Relaxed);
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if self.threads.iter().all(JoinHandle::is_finished) {
                return true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

struct Worker {
    id: usize,
    first: u64,
    share: u64,
    device: Arc<dyn BlockDevice>,
    config: LoadConfig,
    tracker: Arc<Tracker>,
    stats: Arc<LoadStats>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    fn run(self) {
        let max = self.config.max_blocks.clamp(1, self.share);
        let mut buf = AlignedBuf::new(max as usize * BLOCK);
        let mut rng = Rng::new(self.config.seed ^ ((self.id as u64) << 32));
        while !self.stop.load(Relaxed) {
            // Small requests are the common case, as in life.
            let count = if rng.below(2) == 0 { 1 } else { 1 + rng.below(max) };
            if rng.below(100) < self.config.write_percent {
                let block = self.first + rng.below(self.share - count + 1);
                self.write(block, count, &mut buf);
                // Read back at once now and then: the likeliest place for a lost write.
                if rng.below(4) == 0 {
                    self.read(block, count, &mut buf);
                }
                if self.config.flush_every != 0 && rng.below(self.config.flush_every) == 0 {
                    self.flush();
                }
            } else {
                let block = rng.below(self.tracker.blocks() - count + 1);
                self.read(block, count, &mut buf);
            }
            if !self.config.pause.is_zero() {
                thread::sleep(self.config.pause);
            }
        }
        // A last look at all of the own part: nothing may have been lost meanwhile.
        let mut block = self.first;
        let end = self.first + self.share;
        while block < end {
            let count = max.min(end - block);
            self.read(block, count, &mut buf);
            block += count;
        }
    }

    fn write(&self, block: u64, count: u64, buf: &mut AlignedBuf) {
        let bytes = buf.get(count as usize * BLOCK);
        for (n, chunk) in (block..).zip(bytes.chunks_exact_mut(BLOCK)) {
            self.tracker.begin_write(n, chunk);
        }
        let offset = block * BLOCK as u64;
        let result = self.stats.writes.measure(self.id, || self.device.write_at(bytes, offset));
        match result {
            Ok(()) => {
                (block..block + count).for_each(|n| self.tracker.end_write(n));
                self.stats.written_bytes.fetch_add(bytes.len() as u64, Relaxed);
                self.stats.requests.fetch_add(1, Relaxed);
            }
            Err(e) => self.failed("write", block, &e),
        }
    }

    fn read(&self, block: u64, count: u64, buf: &mut AlignedBuf) {
        let before: Vec<_> = (block..block + count).map(|n| self.tracker.begin_read(n)).collect();
        let bytes = buf.get(count as usize * BLOCK);
        // What was in the buffer must not pass for what was read.
        for chunk in bytes.chunks_exact_mut(BLOCK) {
            chunk[..16].fill(0xa5);
            chunk[BLOCK - 16..].fill(0xa5);
        }
        let offset = block * BLOCK as u64;
        let result = self.stats.reads.measure(self.id, || self.device.read_at(bytes, offset));
        if let Err(e) = result {
            self.failed("read", block, &e);
            return;
        }
        self.stats.read_bytes.fetch_add(bytes.len() as u64, Relaxed);
        self.stats.requests.fetch_add(1, Relaxed);
        for ((n, before), chunk) in (block..).zip(before).zip(bytes.chunks_exact(BLOCK)) {
            match self.tracker.verify(n, before, chunk) {
                Ok(true) => {
                    self.stats.verified_bytes.fetch_add(BLOCK as u64, Relaxed);
                }
                Ok(false) => {}
                Err(e) => self.stats.problem(&self.stats.corrupt, || e.to_string()),
            }
        }
    }

    fn flush(&self) {
        match self.stats.writes.measure(self.id, || self.device.flush()) {
            Ok(()) => {
                self.stats.flushes.fetch_add(1, Relaxed);
            }
            Err(e) => self.failed("flush", 0, &e),
        }
    }

    fn failed(&self, what: &str, block: u64, error: &io::Error) {
        self.stats.problem(&self.stats.errors, || format!("{what} at block {block}: {error}"));
        // A disk that fails at once must not make a busy loop.
        thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, BlockDevice, Load, LoadConfig};
    use std::io;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::sync::{Arc, Mutex};
    use std::thread;
    use std::time::Duration;

    struct Memory {
        bytes: Mutex<Vec<u8>>,
        /// Every so many writes one is dropped though acknowledged (0: none).
        lose: u64,
        writes: AtomicU64,
    }

    impl Memory {
        fn new(blocks: usize, lose: u64) -> Arc<Self> {
            let bytes = Mutex::new(vec![0; blocks * BLOCK]);
            Arc::new(Self { bytes, lose, writes: AtomicU64::new(0) })
        }
    }

    impl BlockDevice for Memory {
        fn size(&self) -> u64 {
            self.bytes.lock().expect("lock").len() as u64
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            let at = offset as usize;
            buf.copy_from_slice(&self.bytes.lock().expect("lock")[at..at + buf.len()]);
            Ok(())
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
            let n = self.writes.fetch_add(1, Relaxed);
            if self.lose != 0 && n % self.lose == self.lose - 1 {
                return Ok(());
            }
            let at = offset as usize;
            self.bytes.lock().expect("lock")[at..at + buf.len()].copy_from_slice(buf);
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn run(lose: u64) -> (u64, u64, u64) {
        let load = Load::start(Memory::new(64, lose), &LoadConfig::default()).expect("start");
        let stats = Arc::clone(&load.stats);
        thread::sleep(Duration::from_millis(150));
        assert!(load.stop(Duration::from_secs(5)));
        let get = |c: &AtomicU64| c.load(Relaxed);
        (get(&stats.verified_bytes), get(&stats.errors), get(&stats.corrupt))
    }

    #[test]
    fn a_good_disk_passes() {
        let (verified, errors, corrupt) = run(0);
        assert!(verified > 1 << 20);
        assert_eq!((errors, corrupt), (0, 0));
    }

    #[test]
    fn a_lost_write_is_found() {
        let (_, errors, corrupt) = run(100);
        assert_eq!(errors, 0);
        assert!(corrupt > 0);
    }

    #[test]
    fn too_small_is_an_error() {
        assert!(Load::start(Memory::new(3, 0), &LoadConfig::default()).is_err());
    }
}

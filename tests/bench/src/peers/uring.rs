//! A file by io_uring with registered file and buffers: what the disk under blkback can do.
#![expect(unsafe_code, reason = "io_uring submissions name memory by address")]

use std::convert::Infallible;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domain_kit::mem::SharedMem;
use domain_kit::poll::Window;
use io_uring::{IoUring, opcode, types};
use nix::libc;

use crate::disk::{Io, Target};

/// An open file with a ring and buffers.
pub struct Disk {
    // Dropped before the buffers: closing the ring ends what the kernel may still do with them.
    ring: IoUring,
    buffers: SharedMem,
    bytes: usize,
    window: Window,
}

impl Disk {
    /// A ring of `depth` requests of up to `bytes` on `file`.
    ///
    /// # Errors
    /// io_uring is not allowed here, or no memory may be locked.
    pub fn new(file: &File, depth: u32, bytes: usize) -> Result<Disk> {
        ensure!(depth > 0 && bytes > 0, "nothing to read");
        let ring = IoUring::new(depth.next_power_of_two()).context("io_uring")?;
        let (buffers, _fd) = SharedMem::create("bench-uring", depth as usize * bytes)?;
        buffers.zero(0, buffers.len());
        let disk = Disk { ring, buffers, bytes, window: Window::new(Duration::ZERO) };
        let vecs: Vec<libc::iovec> =
            (0..depth).map(|i| libc::iovec { iov_base: disk.buffer(i).cast(), iov_len: bytes }).collect();
        // SAFETY: the buffers live as long as the ring (same struct, ring dropped first) and never move.
        unsafe { disk.ring.submitter().register_buffers(&vecs) }.context("registering buffers")?;
        disk.ring.submitter().register_files(&[file.as_raw_fd()]).context("registering the file")?;
        Ok(disk)
    }

    /// Looks for completions so long at most before it sleeps; at first not at all.
    pub fn set_look(&mut self, longest: Duration) {
        self.window = Window::new(longest);
    }

    fn buffer(&self, tag: u32) -> *mut u8 {
        self.buffers.as_ptr().wrapping_add(tag as usize * self.bytes)
    }
}

impl Target for Disk {
    fn submit(&mut self, tag: u32, io: Io) -> Result<()> {
        ensure!(io.len <= self.bytes, "{} bytes in a buffer of {}", io.len, self.bytes);
        let (fd, at, len) = (types::Fixed(0), self.buffer(tag), io.len as u32);
        let entry = match io.write {
            true => opcode::WriteFixed::new(fd, at, len, tag as u16).offset(io.offset).build(),
            false => opcode::ReadFixed::new(fd, at, len, tag as u16).offset(io.offset).build(),
        };
        // The length comes back with it, to be compared.
        let data = u64::from(tag) << 32 | io.len as u64;
        // SAFETY: the buffer is registered, belongs to this tag alone, and outlives the request: closing the ring, which comes
        // first, ends it.
        unsafe { self.ring.submission().push(&entry.user_data(data)) }.context("submission ring is full")
    }

    fn wait(&mut self, each: &mut dyn FnMut(u32)) -> Result<()> {
        let Disk { ring, window, .. } = self;
        let start = Instant::now();
        let mut found = false;
        if window.is_open() {
            ring.submit().context("io_uring_enter")?;
            found =
                window.look(start, || Ok::<_, Infallible>(!ring.completion().is_empty())).unwrap_or_default();
        }
        if !found {
            ring.submit_and_wait(1).context("io_uring_enter")?;
        }
        window.learn(start.elapsed());
        for completion in ring.completion() {
            let (tag, len) = ((completion.user_data() >> 32) as u32, completion.user_data() as u32);
            let result = completion.result();
            if result < 0 {
                return Err(std::io::Error::from_raw_os_error(-result)).context("a disk request");
            }
            ensure!(result.cast_unsigned() == len, "a disk request moved only {result} bytes of {len}");
            each(tag);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::tests::PATTERN;
    use crate::disk::{Pattern, Places, run};

    #[test]
    fn reads_and_writes_a_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut disk = match Disk::new(&file, 4, 4096) {
            Ok(disk) => disk,
            // Some machines forbid io_uring; then there is nothing to test.
            Err(e) => return eprintln!("no io_uring here: {e:#}"),
        };
        for (writes, look) in [(0, 0), (100, 50), (30, 50)] {
            disk.set_look(Duration::from_micros(look));
            let sample = run(&mut disk, &Pattern { writes, ..PATTERN }, &mut Places::default()).unwrap();
            assert!(sample.requests > 0);
        }
        file.set_len(0).unwrap();
        assert!(run(&mut disk, &PATTERN, &mut Places::default()).is_err(), "a read of nothing");
    }
}

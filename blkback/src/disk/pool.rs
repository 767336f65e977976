//! A [`Disk`] over [`Layer`]s: a few threads for each ring, which make the layers' blocking calls.
//!
//! The threads begin with the first request and end when there has been none for some seconds.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::attachment::{
    Buffers, Completions, Discard, Disk, DiskError, DiskQueue, DiskRequest, Fence, Geometry, Operation, Tag,
};
use super::commit::{CommitLayer, Progress};
use super::layer::{Empty, Layer};
use super::source::whole_sectors;

/// Most threads of a ring.
const THREADS: u32 = 4;
/// How long a thread waits for work before it ends.
const LINGER: Duration = Duration::from_secs(5);

/// A disk made of layers.
#[derive(Debug)]
pub struct LayeredDisk {
    layer: Arc<dyn Layer>,
    sectors: AtomicU64,
    /// Bytes of a sector as the guest sees it.
    logical: u32,
    read_only: bool,
    /// Each write is on the medium when it is answered.
    writethrough: bool,
    fence: Fence,
    commit: Option<Arc<CommitLayer>>,
}

impl LayeredDisk {
    /// `layer` is what the guest sees. It is fenced.
    pub fn new(layer: Arc<dyn Layer>, read_only: bool, fence: Fence) -> LayeredDisk {
        let sectors = whole_sectors(layer.len(), 512).into();
        LayeredDisk { sectors, layer, logical: 512, read_only, writethrough: false, fence, commit: None }
    }

    /// The same with logical sectors of so many bytes, 512 or 4096.
    pub fn with_sectors(mut self, logical: u32) -> LayeredDisk {
        self.logical = logical;
        self.sectors = whole_sectors(self.layer.len(), logical).into();
        self
    }

    /// The same, whose image goes into its backing file meanwhile; `commit` is its layer.
    pub fn with_commit(mut self, commit: Arc<CommitLayer>) -> LayeredDisk {
        self.commit = Some(commit);
        self
    }

    /// A drive without a medium.
    pub fn empty() -> LayeredDisk {
        LayeredDisk::new(Arc::new(Empty), true, Fence { how: "there is no medium", drain: Duration::ZERO })
    }

    /// The same, with each write on the medium when it is answered if `writethrough`.
    pub fn with_writethrough(mut self, writethrough: bool) -> LayeredDisk {
        self.writethrough = writethrough;
        self
    }

    /// What the guest sees.
    pub fn layer(&self) -> &Arc<dyn Layer> {
        &self.layer
    }

    fn geometry_now(&self) -> Geometry {
        let discard = Discard { granularity: 4096, alignment: 0, secure: self.layer.overwrites() };
        Geometry {
            logical: self.logical,
            physical: self.logical,
            discard: (!self.read_only).then_some(discard),
            ..Geometry::plain(self.sectors.load(Relaxed), self.read_only)
        }
    }
}

impl Disk for LayeredDisk {
    fn geometry(&self) -> Geometry {
        self.geometry_now()
    }

    fn fence(&self) -> Fence {
        self.fence
    }

    fn look_again(&self) -> io::Result<bool> {
        let now = whole_sectors(self.layer.len(), self.logical);
        Ok(self.sectors.swap(now, Relaxed) != now)
    }

    fn grow(&self, bytes: u64) -> io::Result<()> {
        match bytes.cmp(&self.layer.len()) {
            Ordering::Less => Err(io::ErrorKind::InvalidInput.into()),
            Ordering::Equal => Ok(()),
            Ordering::Greater => self.layer.grow(bytes),
        }
    }

    fn commit(&self) -> Option<Progress> {
        self.commit.as_ref().map(|commit| commit.progress())
    }

    fn settle(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.layer.settle() }
    }

    fn queue(
        self: Arc<Self>,
        buffers: Arc<dyn Buffers>,
        _depth: u32,
    ) -> io::Result<Box<dyn DiskQueue + Send>> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let work = Work { disk: self, buffers, jobs: Mutex::default(), more: Condvar::new(), event };
        Ok(Box::new(PoolQueue { work: Arc::new(work), queued: Vec::new() }))
    }
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<(Tag, DiskRequest)>,
    done: Completions,
    threads: u32,
    idle: u32,
    running: u32,
    /// The queue is gone.
    over: bool,
}

struct Work {
    disk: Arc<LayeredDisk>,
    buffers: Arc<dyn Buffers>,
    jobs: Mutex<Jobs>,
    more: Condvar,
    event: EventFd,
}

impl Work {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread's life.
    fn serve(&self) {
        let mut jobs = self.jobs();
        loop {
            if let Some((tag, request)) = jobs.waiting.pop_front() {
                jobs.running += 1;
                drop(jobs);
                let result = self.carry_out(&request);
                jobs = self.jobs();
                jobs.running -= 1;
                jobs.done.push((tag, result));
                let _full_is_awake_too = self.event.write(1);
                continue;
            }
            if jobs.over {
                break;
            }
            jobs.idle += 1;
            let (back, waited) = self.more.wait_timeout(jobs, LINGER).unwrap_or_else(PoisonError::into_inner);
            jobs = back;
            jobs.idle -= 1;
            if waited.timed_out() && jobs.waiting.is_empty() {
                break;
            }
        }
        jobs.threads -= 1;
    }

    fn carry_out(&self, request: &DiskRequest) -> Result<(), DiskError> {
        let layer = &*self.disk.layer;
        let DiskRequest { operation, offset, len, buffer } = *request;
        let result = match operation {
            Operation::Read => {
                let mut bytes = vec![0; len as usize];
                layer.read(offset, &mut bytes).map(|()| self.buffers.mem().copy_in(buffer as usize, &bytes))
            }
            Operation::Flush => layer.flush(),
            _ if self.disk.read_only => Err(io::ErrorKind::PermissionDenied.into()),
            Operation::Write { fua } => {
                let mut bytes = vec![0; len as usize];
                self.buffers.mem().copy_out(buffer as usize, &mut bytes);
                layer
                    .write(offset, &bytes)
                    .and_then(|()| if fua || self.disk.writethrough { layer.flush() } else { Ok(()) })
            }
            Operation::Discard { secure: false } => layer.discard(offset, len),
            Operation::Discard { secure: true } => erase(layer, offset, len),
            Operation::WriteZeroes => layer.write_zeroes(offset, len),
        };
        result.map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(match error.kind() {
                io::ErrorKind::StorageFull => Errno::ENOSPC as i32,
                io::ErrorKind::PermissionDenied => Errno::EROFS as i32,
                io::ErrorKind::InvalidInput => Errno::EINVAL as i32,
                _ => Errno::EIO as i32,
            });
            if error.raw_os_error().is_none() {
                tracing::error!(offset, len, %error, ?operation, "disk");
            }
            DiskError(errno)
        })
    }
}

/// A secure discard: zeroes over what is there, on the medium when it is answered.
fn erase(layer: &dyn Layer, offset: u64, len: u64) -> io::Result<()> {
    if !layer.overwrites() {
        return Err(Errno::EOPNOTSUPP.into());
    }
    let zeroes = vec![0; len.min(1 << 20) as usize];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(zeroes.len() as u64) as usize;
        layer.write(offset + done, &zeroes[..n])?;
        done += n as u64;
    }
    layer.flush()
}

/// See [`DiskQueue`].
struct PoolQueue {
    work: Arc<Work>,
    queued: Vec<(Tag, DiskRequest)>,
}

impl DiskQueue for PoolQueue {
    fn geometry(&self) -> Geometry {
        self.work.disk.geometry_now()
    }

    fn submit(&mut self, tag: Tag, request: &DiskRequest) {
        self.queued.push((tag, *request));
    }

    fn kick(&mut self) {
        if self.queued.is_empty() {
            return;
        }
        let mut jobs = self.work.jobs();
        let added = self.queued.len() as u32;
        jobs.waiting.extend(self.queued.drain(..));
        let wanted = (jobs.waiting.len() as u32).min(THREADS);
        while jobs.threads < wanted && jobs.idle < added {
            let work = self.work.clone();
            let made = std::thread::Builder::new().name("disk".into()).spawn(move || work.serve());
            if let Err(error) = made {
                tracing::error!(%error, "no thread for the disk");
                break;
            }
            jobs.threads += 1;
        }
        if jobs.threads == 0 {
            // Better than never.
            let failed: Vec<_> =
                jobs.waiting.drain(..).map(|(tag, _)| (tag, Err(DiskError(Errno::ENOMEM as i32)))).collect();
            jobs.done.extend(failed);
            let _full_is_awake_too = self.work.event.write(1);
        }
        drop(jobs);
        match added {
            1 => self.work.more.notify_one(),
            _ => self.work.more.notify_all(),
        }
    }

    fn completed(&mut self, into: &mut Completions) {
        let _taken = self.work.event.read();
        into.append(&mut self.work.jobs().done);
    }

    fn ready(&mut self) -> bool {
        !self.work.jobs().done.is_empty()
    }

    fn wait(&mut self, events: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
        self.kick();
        let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(self.work.event.as_fd(), PollFlags::POLLIN)];
        fds.extend(events.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
        let timeout = match timeout {
            None => PollTimeout::NONE,
            // Rounded up, or a short wait is none.
            Some(time) => PollTimeout::try_from(time.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX),
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn finish(&mut self) {
        self.kick();
        loop {
            {
                let mut jobs = self.work.jobs();
                jobs.done.clear();
                if jobs.running == 0 && jobs.waiting.is_empty() {
                    break;
                }
            }
            let _done_or_early = self.wait(&[], Some(Duration::from_millis(50)));
            let _taken = self.work.event.read();
        }
        if let Err(error) = self.work.disk.layer.settle() {
            tracing::error!(%error, "the disk cannot be flushed at the end of service");
        }
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        self.work.jobs().over = true;
        self.work.more.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::attachment::BUFFER_CHUNK;
    use crate::disk::layer::FileLayer;
    use domain_kit::mem::SharedMem;
    use nix::fcntl::{Flock, FlockArg};

    fn disk(bytes: u64, read_only: bool) -> Arc<LayeredDisk> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
        let fence = Fence { how: "test", drain: Duration::ZERO };
        Arc::new(LayeredDisk::new(Arc::new(FileLayer::new(file, bytes, false)), read_only, fence))
    }

    fn all(queue: &mut dyn DiskQueue, count: usize) -> Completions {
        let mut done = Vec::new();
        while done.len() < count {
            queue.wait(&[], Some(Duration::from_secs(5))).unwrap();
            queue.completed(&mut done);
        }
        done.sort_by_key(|(tag, _)| *tag);
        done
    }

    #[test]
    fn everything_completes_once() {
        let disk = disk(1 << 20, false);
        let (mem, _) = SharedMem::create("b", BUFFER_CHUNK).unwrap();
        let mem = Arc::new(mem);
        let mut queue = disk.clone().queue(mem.clone(), 32).unwrap();
        for tag in 0..32 {
            mem.copy_in(tag * 4096, &[tag as u8 + 1; 4096]);
            let request = DiskRequest {
                operation: Operation::Write { fua: tag % 5 == 0 },
                offset: tag as u64 * 8192,
                len: 4096,
                buffer: tag as u32 * 4096,
            };
            queue.submit(Tag(tag as u32), &request);
        }
        let done = all(&mut *queue, 32);
        assert_eq!(done, (0..32).map(|tag| (Tag(tag), Ok(()))).collect::<Vec<_>>());
        let request = |operation, offset, len| DiskRequest { operation, offset, len, buffer: 0 };
        queue.submit(Tag(0), &request(Operation::Read, 8192 * 7, 4096));
        queue.submit(Tag(1), &request(Operation::Flush, 0, 0));
        queue.submit(Tag(2), &request(Operation::WriteZeroes, 8192 * 9, 4096));
        queue.submit(Tag(3), &request(Operation::Discard { secure: true }, 0, 4096));
        queue.submit(Tag(4), &request(Operation::Discard { secure: false }, 8192 * 10, 4096));
        let done = all(&mut *queue, 5);
        // As the file system under the file has it.
        let secure = disk.geometry().discard.unwrap().secure;
        assert_eq!(done[3].1, if secure { Ok(()) } else { Err(DiskError(Errno::EOPNOTSUPP as i32)) });
        assert!(done.iter().filter(|(_, result)| result.is_ok()).count() == 4 + usize::from(secure));
        let mut erased = [9; 4096];
        disk.layer().read(0, &mut erased).unwrap();
        assert_eq!(erased, if secure { [0; 4096] } else { [1; 4096] });
        let mut bytes = [0; 4096];
        mem.copy_out(0, &mut bytes);
        assert_eq!(bytes, [8; 4096]);
        queue.submit(Tag(0), &request(Operation::Write { fua: false }, 0, 4096));
        queue.finish();
        disk.layer().grow(2 << 20).unwrap();
        assert!(disk.look_again().unwrap() && !disk.look_again().unwrap());
        assert_eq!(queue.geometry().sectors, 4096);
    }

    #[test]
    fn read_only_is_read_only() {
        let disk = disk(1 << 20, true);
        let (mem, _) = SharedMem::create("b", BUFFER_CHUNK).unwrap();
        let mut queue = disk.queue(Arc::new(mem), 4).unwrap();
        let request =
            DiskRequest { operation: Operation::Write { fua: false }, offset: 0, len: 512, buffer: 0 };
        queue.submit(Tag(1), &request);
        assert_eq!(all(&mut *queue, 1), [(Tag(1), Err(DiskError(Errno::EROFS as i32)))]);
        assert!(queue.geometry().discard.is_none());
    }
}

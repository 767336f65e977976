//! A commit while the guest runs: what an image has goes into its backing file, which then holds the whole disk by itself.
//!
//! ```text
//!   guest ─write─► top, then base        guest ─read─► top (over base)
//!   a thread: each range that top has ─► base
//! ```
//! The guest's view is top over base all the time, and only ranges that top has are ever written to base: so the view does not
//! change, and a kill or a power failure at any moment leaves a disk that is whole. The next process begins anew with what top has.
//! Once the thread is through, all that was answered is in base, too, and the toolstack may have base served alone. A mark that
//! outlives the process says so: one that is told to serve base alone and finds no mark refuses.
//!
//! A commit that fails (no room for base, say) fails alone: the guest goes on with top.

use std::io::{self, ErrorKind};
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain_kit::mem::SharedMem;

use super::layer::{Extent, Layer};

/// Ranges that are locked as one: no smaller than the largest cluster of an image, which a write may copy whole.
const REGION: u64 = 2 << 20;
const LOCKS: u64 = 64;
/// Bytes copied at once.
const PIECE: u64 = 256 << 10;

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the disk that are looked at.
    pub done: u64,
    /// All of them.
    pub total: u64,
    /// Everything is in the backing file, and what the guest writes goes there, too.
    pub finished: bool,
    /// Why it failed, in one line.
    pub failed: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub struct CommitLayer {
    top: Arc<dyn Layer>,
    base: Arc<dyn Layer>,
    regions: Vec<Mutex<()>>,
    done: AtomicU64,
    finished: AtomicBool,
    broken: AtomicBool,
    why: Mutex<Option<String>>,
    mark: Option<Arc<SharedMem>>,
}

/// Whether the last commit was finished, in memory that outlives the process.
pub fn is_marked(mark: &SharedMem) -> bool {
    mark.load_u32(0, Acquire) == 1
}

impl CommitLayer {
    /// `base` is `top`'s backing file, opened for writing. `mark` says to later incarnations whether it was finished ([`is_marked`]).
    pub fn new(top: Arc<dyn Layer>, base: Arc<dyn Layer>, mark: Option<Arc<SharedMem>>) -> Arc<CommitLayer> {
        if let Some(mark) = &mark {
            mark.store_u32(0, 0, Release);
        }
        Arc::new(CommitLayer {
            mark,
            top,
            base,
            regions: (0..LOCKS).map(|_| Mutex::default()).collect(),
            done: 0.into(),
            finished: false.into(),
            broken: false.into(),
            why: Mutex::default(),
        })
    }

    /// Copies in a thread of its own.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        let me = self.clone();
        std::thread::Builder::new().name("commit".into()).spawn(move || me.run()).map(drop)
    }

    /// Copies, to the end or to a failure.
    pub fn run(&self) {
        match self.copy_all() {
            Ok(()) => {
                let why = self.why.lock().unwrap_or_else(PoisonError::into_inner);
                if why.is_none() {
                    if let Some(mark) = &self.mark {
                        mark.store_u32(0, 1, Release);
                    }
                    self.finished.store(true, Relaxed);
                }
            }
            Err(error) => drop(self.fail(&error)),
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        Progress {
            done: self.done.load(Relaxed),
            total: self.top.len(),
            finished: self.finished.load(Relaxed),
            failed: self.why.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Gives the commit up; false if that can't be any more: whoever was told that it is finished has base served alone at any time.
    fn fail(&self, error: &io::Error) -> bool {
        let mut why = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        if self.finished.load(Relaxed) {
            return false;
        }
        if why.is_none() {
            tracing::error!(%error, "the backing file cannot take the image in: the commit ends, the disk goes on");
            *why = Some(error.to_string().replace('\n', " "));
            self.broken.store(true, Relaxed);
        }
        true
    }

    /// Nobody else writes in the regions of the range meanwhile.
    fn lock(&self, offset: u64, len: u64) -> Vec<MutexGuard<'_, ()>> {
        let (first, last) = (offset / REGION, offset.saturating_add(len.max(1) - 1) / REGION);
        let mut locks: Vec<u64> =
            (first..=last.min(first + LOCKS - 1)).map(|region| region % LOCKS).collect();
        // One order for all.
        locks.sort_unstable();
        locks
            .iter()
            .map(|i| self.regions[*i as usize].lock().unwrap_or_else(PoisonError::into_inner))
            .collect()
    }

    fn copy_all(&self) -> io::Result<()> {
        let total = self.top.len();
        if self.base.len() < total {
            self.base.grow(total)?;
        }
        let mut bytes = Vec::new();
        for start in (0..total).step_by(REGION as usize) {
            let end = total.min(start + REGION);
            let _alone = self.lock(start, end - start);
            if self.broken.load(Relaxed) {
                return Ok(());
            }
            let mut at = start;
            while at < end {
                let Extent { len, own } = self.top.extent(at, end - at)?;
                let len = len.clamp(1, end - at).min(PIECE);
                if own {
                    bytes.resize(len as usize, 0);
                    self.top.read(at, &mut bytes)?;
                    if bytes.iter().all(|byte| *byte == 0) {
                        self.base.write_zeroes(at, len)?;
                    } else {
                        self.base.write(at, &bytes)?;
                    }
                }
                at += len;
            }
            self.done.store(end, Relaxed);
        }
        self.base.settle()
    }

    /// The same to base, unless the commit has failed. Once it is finished, an error of base is the guest's.
    fn also(&self, change: impl FnOnce(&dyn Layer) -> io::Result<()>) -> io::Result<()> {
        if self.broken.load(Relaxed) {
            return Ok(());
        }
        change(&*self.base).or_else(|error| if self.fail(&error) { Ok(()) } else { Err(error) })
    }
}

impl Layer for CommitLayer {
    fn len(&self) -> u64 {
        self.top.len()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.top.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let _alone = self.lock(offset, from.len() as u64);
        self.top.write(offset, from)?;
        self.also(|base| base.write(offset, from))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let _alone = self.lock(offset, len);
        self.top.write_zeroes(offset, len)?;
        self.also(|base| base.write_zeroes(offset, len))
    }

    /// A hint that is not taken: the two must stay alike.
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.top.flush()?;
        self.also(|base| base.flush())
    }

    fn grow(&self, _len: u64) -> io::Result<()> {
        Err(io::Error::new(ErrorKind::ResourceBusy, "a commit is under way; make it longer afterwards"))
    }

    fn settle(&self) -> io::Result<()> {
        self.top.settle()?;
        self.also(|base| base.settle())
    }

    fn extent(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.top.extent(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::layer::Empty;
    use std::sync::RwLock;

    const SIZE: usize = 5 << 20;

    /// Bytes in memory over a backing layer, page by page; fails from a write on, if told.
    #[derive(Debug)]
    struct Pages {
        bytes: RwLock<(Vec<u8>, Vec<bool>)>,
        below: Arc<dyn Layer>,
        writes_left: AtomicU64,
    }

    impl Pages {
        fn new(below: Arc<dyn Layer>, own: bool, writes_left: u64) -> Arc<Pages> {
            let bytes = RwLock::new((vec![0; SIZE], vec![own; SIZE / 4096]));
            Arc::new(Pages { bytes, below, writes_left: writes_left.into() })
        }

        fn all(&self) -> Vec<u8> {
            let mut all = vec![0; SIZE];
            self.read(0, &mut all).unwrap();
            all
        }
    }

    impl Layer for Pages {
        fn len(&self) -> u64 {
            SIZE as u64
        }
        fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
            let state = self.bytes.read().unwrap();
            for (i, piece) in into.chunks_mut(512).enumerate() {
                let at = offset as usize + i * 512;
                if state.1[at / 4096] {
                    piece.copy_from_slice(&state.0[at..at + piece.len()]);
                } else {
                    self.below.read(at as u64, piece)?;
                }
            }
            Ok(())
        }
        fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
            let left = self.writes_left.load(Relaxed);
            if left == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            self.writes_left.store(left - 1, Relaxed);
            for page in offset as usize / 4096..=(offset as usize + from.len() - 1) / 4096 {
                if !self.bytes.read().unwrap().1[page] {
                    let mut old = vec![0; 4096];
                    self.below.read(page as u64 * 4096, &mut old)?;
                    let mut state = self.bytes.write().unwrap();
                    state.0[page * 4096..][..4096].copy_from_slice(&old);
                    state.1[page] = true;
                }
            }
            self.bytes.write().unwrap().0[offset as usize..][..from.len()].copy_from_slice(from);
            Ok(())
        }
        fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
            self.write(offset, &vec![0; len as usize])
        }
        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            self.write_zeroes(offset, len)
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn grow(&self, _len: u64) -> io::Result<()> {
            Err(ErrorKind::Unsupported.into())
        }
        fn extent(&self, offset: u64, len: u64) -> io::Result<Extent> {
            let state = self.bytes.read().unwrap();
            let own = state.1[offset as usize / 4096];
            Ok(Extent { len: len.min(4096 - offset % 4096), own })
        }
    }

    fn chain(writes_left: u64) -> (Arc<Pages>, Arc<Pages>, Arc<CommitLayer>) {
        let base = Pages::new(Arc::new(Empty), true, writes_left);
        base.bytes.write().unwrap().0.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 4096) as u8);
        let top = Pages::new(base.clone(), false, u64::MAX);
        for page in (0..SIZE / 4096).step_by(3) {
            top.write(page as u64 * 4096 + 512, &[0xaa; 1024]).unwrap();
        }
        let commit = CommitLayer::new(top.clone(), base.clone(), None);
        (base, top, commit)
    }

    #[test]
    fn base_is_the_disk_afterwards_whatever_the_guest_writes_meanwhile() {
        let (base, top, commit) = chain(u64::MAX);
        std::thread::scope(|scope| {
            let copier = scope.spawn(|| commit.run());
            for thread in 0..3u64 {
                let commit = &commit;
                scope.spawn(move || {
                    // Each its own sectors, side by side in the same pages.
                    let mut random = thread + 1;
                    for round in 0..3000u64 {
                        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(round);
                        let page = (random >> 33) % (SIZE as u64 / 4096);
                        let at = page * 4096 + 2048 + thread * 512;
                        match round % 7 {
                            0 => commit.write_zeroes(at, 512).unwrap(),
                            _ => commit.write(at, &[round as u8; 512]).unwrap(),
                        }
                    }
                });
            }
            copier.join().unwrap();
        });
        let progress = commit.progress();
        assert!(progress.finished && progress.failed.is_none(), "{progress:?}");
        assert!(base.all() == top.all());
    }

    /// Killed anywhere: what the guest sees is as it was, and a second commit from there ends as the first would have.
    #[test]
    fn a_commit_that_is_cut_short_anywhere_can_begin_anew() {
        for cut in [0, 1, 2, 10, 100, 1000] {
            let (base, top, commit) = chain(cut);
            let before = top.all();
            commit.run();
            assert!(top.all() == before, "cut after {cut}");
            if commit.progress().failed.is_none() {
                assert!(base.all() == before);
                continue;
            }
            commit.write(4096, &[7; 512]).unwrap();
            commit.flush().unwrap();
            assert!(!commit.progress().finished, "the guest goes on, the commit does not");
            base.writes_left.store(u64::MAX, Relaxed);
            let again = CommitLayer::new(top.clone(), base.clone(), None);
            let now = top.all();
            again.run();
            assert!(again.progress().finished && base.all() == now && top.all() == now);
        }
    }
}

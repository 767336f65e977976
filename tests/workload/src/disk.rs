//! What a block must hold: a header that says which block and version it is, and a payload that
//! follows from both and the seed, so a block in the wrong place, of the wrong age, torn or
//! damaged shows. [`Tracker`] knows which versions a reader may see.

use crate::pattern::mix;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Size of a verified block in bytes: the unit of a write that is seen whole or not at all.
pub const BLOCK: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"BULKHEAD");
/// Header words: magic, block, version, seed, checksum of the payload.
const HEADER: usize = 5;

fn key(seed: u64, block: u64, version: u64) -> u64 {
    mix(seed ^ mix(block ^ mix(version)))
}

fn step(state: u64) -> u64 {
    state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f)
}

/// Fills one block. Version 0 is the block that was never written: all zero.
///
/// # Panics
/// When `buf` is not [`BLOCK`] bytes long.
pub fn fill(buf: &mut [u8], seed: u64, block: u64, version: u64) {
    assert_eq!(buf.len(), BLOCK, "one block");
    if version == 0 {
        buf.fill(0);
        return;
    }
    let mut state = key(seed, block, version);
    let mut sum = 0u64;
    let (words, _) = buf.as_chunks_mut::<8>();
    for word in &mut words[HEADER..] {
        state = step(state);
        sum = sum.rotate_left(5) ^ state;
        *word = state.to_le_bytes();
    }
    for (word, value) in words.iter_mut().zip([MAGIC, block, version, seed, sum]) {
        *word = value.to_le_bytes();
    }
}

/// Why a block is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Corruption {
    /// Neither zero nor one of ours.
    NotOurs {
        /// Block that was read.
        block: u64,
        /// First word found.
        found: u64,
    },
    /// Another block's content, or another run's.
    Misplaced {
        /// Block that was read.
        block: u64,
        /// Block that the content names.
        found: u64,
        /// Seed that the content names.
        seed: u64,
    },
    /// The header is right, the payload is not: torn or damaged.
    Payload {
        /// Block that was read.
        block: u64,
        /// Version in the header.
        version: u64,
        /// First wrong byte.
        offset: usize,
    },
    /// A version that may not be seen: a write was lost, or came back.
    Version {
        /// Block that was read.
        block: u64,
        /// Version found.
        found: u64,
        /// Oldest version allowed.
        oldest: u64,
        /// Newest version allowed.
        newest: u64,
    },
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotOurs { block, found } => {
                write!(f, "block {block}: no valid header (first word {found:#x})")
            }
            Self::Misplaced { block, found, seed } => {
                write!(f, "block {block}: holds block {found} of seed {seed:#x}")
            }
            Self::Payload { block, version, offset } => {
                write!(f, "block {block}: version {version} is damaged at byte {offset}")
            }
            Self::Version { block, found, oldest, newest } => {
                write!(f, "block {block}: version {found} seen, only {oldest} to {newest} may be")
            }
        }
    }
}

impl std::error::Error for Corruption {}

/// Checks one block and returns its version.
///
/// # Errors
/// When the content is not exactly what [`fill`] writes for this block, seed and some version.
///
/// # Panics
/// When `buf` is not [`BLOCK`] bytes long.
pub fn check(buf: &[u8], seed: u64, block: u64) -> Result<u64, Corruption> {
    assert_eq!(buf.len(), BLOCK, "one block");
    let (words, _) = buf.as_chunks::<8>();
    let word = |i: usize| u64::from_le_bytes(words[i]);
    if word(0) == 0 {
        return match words.iter().position(|w| *w != [0; 8]) {
            None => Ok(0),
            Some(at) => Err(Corruption::Payload { block, version: 0, offset: at * 8 }),
        };
    }
    if word(0) != MAGIC {
        return Err(Corruption::NotOurs { block, found: word(0) });
    }
    if word(1) != block || word(3) != seed {
        return Err(Corruption::Misplaced { block, found: word(1), seed: word(3) });
    }
    let version = word(2);
    let mut state = key(seed, block, version);
    let mut sum = 0u64;
    for (at, found) in words.iter().enumerate().skip(HEADER) {
        state = step(state);
        sum = sum.rotate_left(5) ^ state;
        if *found != state.to_le_bytes() {
            return Err(Corruption::Payload { block, version, offset: at * 8 });
        }
    }
    if word(4) != sum {
        return Err(Corruption::Payload { block, version, offset: 32 });
    }
    Ok(version)
}

/// Which versions of each block a reader may see. A block has at most one writer at a time; readers
/// may be many.
#[derive(Debug)]
pub struct Tracker {
    seed: u64,
    /// Newest version whose write was acknowledged.
    acked: Vec<AtomicU64>,
    /// Newest version whose write was begun.
    begun: Vec<AtomicU64>,
}

/// State of a block before a read, to be handed to [`Tracker::verify`] after it.
#[derive(Clone, Copy, Debug)]
pub struct BeforeRead {
    acked: u64,
}

impl Tracker {
    /// Tracks `blocks` blocks, all of version 0.
    #[must_use]
    pub fn new(seed: u64, blocks: usize) -> Self {
        let zeros = || (0..blocks).map(|_| AtomicU64::new(0)).collect();
        Self { seed, acked: zeros(), begun: zeros() }
    }

    /// The seed of all contents.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// How many blocks are tracked.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.acked.len() as u64
    }

    /// Begins a write of `block` and fills `buf` with its new content.
    ///
    /// # Panics
    /// When the block is not tracked or `buf` is not [`BLOCK`] bytes long.
    pub fn begin_write(&self, block: u64, buf: &mut [u8]) {
        let version = self.begun[block as usize].fetch_add(1, SeqCst) + 1;
        fill(buf, self.seed, block, version);
    }

    /// The write begun last was acknowledged without an error. After a failed write this is not
    /// called, and both the old and the new content stay allowed.
    ///
    /// # Panics
    /// When the block is not tracked.
    pub fn end_write(&self, block: u64) {
        let version = self.begun[block as usize].load(SeqCst);
        self.acked[block as usize].store(version, SeqCst);
    }

    /// To be called before a read of `block` is issued.
    ///
    /// # Panics
    /// When the block is not tracked.
    #[must_use]
    pub fn begin_read(&self, block: u64) -> BeforeRead {
        BeforeRead { acked: self.acked[block as usize].load(SeqCst) }
    }

    /// Judges what a read of `block` returned. `Ok(true)`: proved right. `Ok(false)`: a write was
    /// under way meanwhile, so a torn block would have been no fault; nothing is proved.
    ///
    /// # Errors
    /// When the content is none that may be seen.
    ///
    /// # Panics
    /// When the block is not tracked or `buf` is not [`BLOCK`] bytes long.
    pub fn verify(&self, block: u64, before: BeforeRead, buf: &[u8]) -> Result<bool, Corruption> {
        let newest = self.begun[block as usize].load(SeqCst);
        let quiet = before.acked == newest;
        let found = match check(buf, self.seed, block) {
            Ok(found) => found,
            Err(_) if !quiet => return Ok(false),
            Err(e) => return Err(e),
        };
        let oldest = before.acked;
        if (oldest..=newest).contains(&found) {
            Ok(quiet)
        } else {
            Err(Corruption::Version { block, found, oldest, newest })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, Corruption, Tracker, check, fill};

    #[test]
    fn every_kind_of_damage_shows() {
        let mut buf = vec![0; BLOCK];
        assert_eq!(check(&buf, 1, 5), Ok(0));
        fill(&mut buf, 1, 5, 3);
        assert_eq!(check(&buf, 1, 5), Ok(3));
        assert!(matches!(check(&buf, 1, 6), Err(Corruption::Misplaced { .. })));
        assert!(matches!(check(&buf, 2, 5), Err(Corruption::Misplaced { .. })));
        for at in [0, 16, 32, 40, 41, 2048, BLOCK - 1] {
            buf[at] ^= 0x10;
            assert!(check(&buf, 1, 5).is_err(), "byte {at}");
            buf[at] ^= 0x10;
        }
        let mut torn = buf.clone();
        fill(&mut buf, 1, 5, 4);
        torn[..2048].copy_from_slice(&buf[..2048]);
        assert!(matches!(check(&torn, 1, 5), Err(Corruption::Payload { offset: 2048, .. })));
    }

    #[test]
    fn lost_and_returned_writes_show() {
        let tracker = Tracker::new(9, 4);
        let (mut old, mut new) = (vec![0; BLOCK], vec![0; BLOCK]);
        tracker.begin_write(2, &mut old);
        tracker.end_write(2);
        tracker.begin_write(2, &mut new);
        let before = tracker.begin_read(2);
        // In flight: both may be seen, but prove nothing.
        assert_eq!(tracker.verify(2, before, &old), Ok(false));
        assert_eq!(tracker.verify(2, before, &new), Ok(false));
        tracker.end_write(2);
        // Overlapped by the end of the write: still both.
        assert_eq!(tracker.verify(2, before, &old), Ok(false));
        let before = tracker.begin_read(2);
        assert_eq!(tracker.verify(2, before, &new), Ok(true));
        assert!(matches!(
            tracker.verify(2, before, &old),
            Err(Corruption::Version { found: 1, oldest: 2, newest: 2, .. })
        ));
    }
}

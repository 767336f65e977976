//! A verifying load for one queue: reads, writes, barriers, flushes and discards of random places and lengths, each read checked against
//! what was written there last. Requests that overlap are never in flight together.

use std::collections::HashMap;

use domain_kit::ring::RingMem;

use super::{Completion, MAX_BYTES, Op, Outcome};

/// Bytes of a sector.
const SECTOR: usize = 512;

/// xorshift64.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Rng(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// 0 to `n` - 1.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What sector `sector` holds after write number `version`; zeroes for 0: never written, or discarded.
pub fn fill(version: u64, sector: u64, into: &mut [u8]) {
    for chunk in into.chunks_exact_mut(16) {
        chunk[..8].copy_from_slice(&version.to_le_bytes());
        chunk[8..].copy_from_slice(&(if version == 0 { 0 } else { sector }).to_le_bytes());
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    Read,
    /// Version that the sectors have then.
    Now(u64),
    Nothing,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    first: u64,
    sectors: u64,
    done: Done,
}

/// See the module.
#[derive(Debug)]
pub struct Load {
    /// First sector of its part of the disk.
    start: u64,
    /// Version of each sector of that part.
    content: Vec<u64>,
    pending: HashMap<u64, Pending>,
    rng: Rng,
    next: u64,
    verified: u64,
    /// Sectors of 512 bytes in one of the disk's.
    unit: u64,
    /// Some discards are secure.
    secure: bool,
    discards: bool,
}

impl Load {
    /// A load on `sectors` sectors from `start` on, which are all zero. `sectors` is more than the longest request has.
    pub fn new(start: u64, sectors: u64, seed: u64) -> Self {
        let content = vec![0; sectors as usize];
        let (pending, rng) = (HashMap::new(), Rng::new(seed));
        Load { start, content, pending, rng, next: 1, verified: 0, unit: 1, secure: false, discards: true }
    }

    /// The same for a disk of sectors of so many bytes.
    pub fn with_sector_size(mut self, bytes: u32) -> Self {
        self.unit = u64::from(bytes).div_ceil(SECTOR as u64).max(1);
        self
    }

    /// The same without discards: for disks whose discarded sectors read as before.
    pub fn without_discards(mut self) -> Self {
        self.discards = false;
        self
    }

    /// The same with secure discards among the others.
    pub fn with_secure_discards(mut self) -> Self {
        self.secure = true;
        self
    }

    /// Bytes that were read and checked.
    pub fn verified(&self) -> u64 {
        self.verified
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Its own random numbers.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// Submits requests until `depth` are in flight, or no place is found for another. `submit` says false if there is no room.
    pub fn issue(&mut self, depth: usize, max_bytes: usize, mut submit: impl FnMut(Op<'_>, u64) -> bool) {
        for _ in 0..2 * depth {
            if self.pending.len() >= depth {
                break;
            }
            let sectors = match self.rng.below(10) {
                0 => 1 + self.rng.below((max_bytes / SECTOR) as u64),
                1..4 => 1 + self.rng.below((MAX_BYTES / SECTOR) as u64),
                _ => 1 + self.rng.below(8),
            };
            let sectors = sectors.next_multiple_of(self.unit).min((max_bytes / SECTOR) as u64);
            let first = self.rng.below(self.content.len() as u64 - sectors) / self.unit * self.unit;
            let kind = self.rng.below(if self.discards { 100 } else { 97 });
            let data = !(94..97).contains(&kind);
            let overlaps = |p: &Pending| p.first < first + sectors && first < p.first + p.sectors;
            if data && self.pending.values().any(overlaps) {
                continue;
            }
            let version = self.next;
            let sector = self.start + first;
            let bytes = sectors as usize * SECTOR;
            let mut buffer = vec![0; bytes];
            for (i, chunk) in (0..).zip(buffer.chunks_exact_mut(SECTOR)) {
                fill(version, sector + i, chunk);
            }
            let (op, done, sectors) = match kind {
                0..45 => (Op::Read { sector, len: bytes }, Done::Read, sectors),
                45..92 => (Op::Write { sector, data: &buffer }, Done::Now(version), sectors),
                92..94 => {
                    let cut = bytes.min(MAX_BYTES);
                    let barrier = Op::Barrier { sector, data: &buffer[..cut] };
                    (barrier, Done::Now(version), (cut / SECTOR) as u64)
                }
                94..97 => (Op::Flush, Done::Nothing, 0),
                99 if self.secure => (Op::SecureDiscard { sector, sectors }, Done::Now(0), sectors),
                _ => (Op::Discard { sector, sectors }, Done::Now(0), sectors),
            };
            if !submit(op, version) {
                break;
            }
            self.pending.insert(version, Pending { first, sectors, done });
            self.next += 1;
        }
    }

    /// Judges a completion.
    ///
    /// # Panics
    /// If it belongs to nothing, failed, or read something else than was written.
    pub fn done<D: RingMem>(&mut self, completion: &Completion<'_, D>) {
        let found = self.pending.remove(&completion.mark);
        let Some(p) = found else { panic!("a response to nothing: {}", completion.mark) };
        assert_eq!(completion.outcome, Outcome::Done, "{p:?} of the part from {}", self.start);
        let range = p.first as usize..(p.first + p.sectors) as usize;
        match p.done {
            Done::Nothing => {}
            Done::Now(version) => self.content[range].fill(version),
            Done::Read => {
                let mut bytes = vec![0; completion.read_len()];
                completion.copy_read(&mut bytes);
                self.check(p.first, &bytes);
                self.verified += bytes.len() as u64;
            }
        }
    }

    /// Compares bytes from sector `first` of the part on with what must be there. Of sectors with nothing in flight only.
    ///
    /// # Panics
    /// If something else is there.
    pub fn check(&self, first: u64, bytes: &[u8]) {
        let mut want = [0; SECTOR];
        for (i, got) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            fill(self.content[i as usize], self.start + i, &mut want);
            assert!(
                got == want,
                "sector {}: version {} must be there, and {:?} is",
                self.start + i,
                self.content[i as usize],
                &got[..16]
            );
        }
    }

    /// Its part of the disk: first byte, and bytes.
    pub fn part(&self) -> (u64, usize) {
        (self.start * SECTOR as u64, self.content.len() * SECTOR)
    }
}

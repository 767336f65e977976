//! Kills and power failures at every write: the image against a flat model that knows what each sector may hold.

use std::io::{Error, ErrorKind};
use std::sync::Mutex as StdMutex;

use super::header::{NewImage, create};
use super::log::LOG_BYTES;
use super::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const SECTOR: usize = 512;

/// A medium with a volatile cache, which dies after so many writes.
#[derive(Debug)]
struct Medium(StdMutex<Bytes>);

#[derive(Debug)]
struct Bytes {
    /// As the kernel shows it.
    now: Vec<u8>,
    /// As it was when all was flushed last.
    durable: Vec<u8>,
    /// Writes since.
    since: Vec<(usize, Vec<u8>)>,
    /// Writes and flushes until the process dies.
    left: u64,
}

impl Medium {
    fn new(bytes: Vec<u8>) -> Arc<Medium> {
        let state = Bytes { now: bytes.clone(), durable: bytes, since: Vec::new(), left: u64::MAX };
        Arc::new(Medium(StdMutex::new(state)))
    }

    fn step(state: &mut Bytes) -> Result<()> {
        if state.left == 0 {
            return Err(Error::other("killed"));
        }
        state.left -= 1;
        Ok(())
    }

    /// The bytes after a power failure: of what was not flushed, any sectors of any writes.
    fn after_power_failure(&self, rng: &mut SmallRng) -> Vec<u8> {
        let state = self.0.lock().unwrap();
        let mut bytes = state.durable.clone();
        let odds = [0.1, 0.5, 0.9][rng.random_range(0..3)];
        for (at, data) in &state.since {
            for (n, sector) in data.chunks(SECTOR).enumerate() {
                if rng.random_bool(odds) {
                    let at = at + n * SECTOR;
                    bytes.resize(bytes.len().max(at + sector.len()), 0);
                    bytes[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        bytes
    }
}

impl Layer for Medium {
    fn len(&self) -> u64 {
        self.0.lock().unwrap().now.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let state = self.0.lock().unwrap();
        into.fill(0);
        let from = state.now.get(offset as usize..).unwrap_or(&[]);
        let n = from.len().min(into.len());
        into[..n].copy_from_slice(&from[..n]);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let mut state = self.0.lock().unwrap();
        Self::step(&mut state)?;
        let at = offset as usize;
        // The last write of a killed process may be half done.
        let n = if state.left == 0 { from.len() / SECTOR / 2 * SECTOR } else { from.len() };
        let end = state.now.len().max(at + n);
        state.now.resize(end, 0);
        state.now[at..at + n].copy_from_slice(&from[..n]);
        state.since.push((at, from[..n].to_vec()));
        if n < from.len() { Err(Error::other("killed")) } else { Ok(()) }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.write(offset, &vec![0; len as usize])
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let end = (offset + len).min(self.len());
        if end > offset { self.write(offset, &vec![0; (end - offset) as usize]) } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.0.lock().unwrap();
        Self::step(&mut state)?;
        state.durable = state.now.clone();
        state.since.clear();
        Ok(())
    }

    fn grow(&self, _len: u64) -> Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn zero_beyond_end(&self) -> bool {
        true
    }
}

/// What a sector may hold.
#[derive(Clone, Debug)]
struct Sector {
    /// Without a power failure.
    now: u64,
    /// If the last operation on it was not answered, this too.
    maybe: Option<u64>,
    /// After a power failure: everything since the last flush that was answered, and what that flushed.
    since: Vec<u64>,
}

impl Sector {
    fn set(&mut self, value: u64) {
        self.since.extend(self.maybe.take());
        self.since.push(value);
        self.now = value;
    }
}

fn contents(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR / 8)
}

fn value(bytes: &[u8]) -> u64 {
    let first = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes.chunks(8).all(|word| word == &bytes[..8]), "a torn sector");
    first
}

struct Model {
    sectors: Vec<Sector>,
    next: u64,
    rng: SmallRng,
}

impl Model {
    fn one_operation(&mut self, image: &Image) -> Result<()> {
        let count = self.sectors.len();
        let first = self.rng.random_range(0..count);
        let n = self.rng.random_range(1..=(count - first).min(9));
        let range = first..first + n;
        let (offset, len) = ((first * SECTOR) as u64, (n * SECTOR) as u64);
        match self.rng.random_range(0..16) {
            0..8 => {
                self.next += 1;
                // Each sector its own.
                let values: Vec<u64> = range.clone().map(|sector| self.next << 16 | sector as u64).collect();
                let bytes: Vec<u8> = values.iter().flat_map(|value| contents(*value)).collect();
                let result = image.write(offset, &bytes);
                self.changed(range, &values, result)
            }
            kind @ 8..11 => {
                let result =
                    if kind == 8 { image.write_zeroes(offset, len) } else { image.discard(offset, len) };
                if result.is_err() || kind == 8 {
                    return self.changed(range, &vec![0; n], result);
                }
                for sector in range {
                    let mut bytes = vec![0; SECTOR];
                    image.read((sector * SECTOR) as u64, &mut bytes)?;
                    let found = value(&bytes);
                    assert!(found == 0 || found == self.sectors[sector].now);
                    self.sectors[sector].set(found);
                }
                Ok(())
            }
            11..13 => {
                image.flush()?;
                for sector in &mut self.sectors {
                    sector.since = vec![sector.now];
                }
                Ok(())
            }
            _ => {
                let mut bytes = vec![0; n * SECTOR];
                image.read(offset, &mut bytes)?;
                for (sector, bytes) in range.zip(bytes.chunks(SECTOR)) {
                    assert_eq!(value(bytes), self.sectors[sector].now, "sector {sector}");
                }
                Ok(())
            }
        }
    }

    fn changed(&mut self, range: std::ops::Range<usize>, values: &[u64], result: Result<()>) -> Result<()> {
        for (sector, value) in self.sectors[range].iter_mut().zip(values) {
            match result {
                Ok(()) => sector.set(*value),
                Err(_) => sector.maybe = Some(*value),
            }
        }
        result
    }

    /// Looks at everything after the process came back, and goes on from what is there.
    fn look(&mut self, image: &Image, power: bool) {
        for (n, sector) in self.sectors.iter_mut().enumerate() {
            let mut bytes = vec![0; SECTOR];
            image.read((n * SECTOR) as u64, &mut bytes).unwrap();
            let found = value(&bytes);
            let allowed =
                found == sector.now || sector.maybe == Some(found) || power && sector.since.contains(&found);
            assert!(allowed, "sector {n} holds {found:#x}, power failure {power}, allowed {sector:x?}");
            let mut since = if power { Vec::new() } else { std::mem::take(&mut sector.since) };
            since.push(found);
            *sector = Sector { now: found, maybe: None, since };
        }
    }
}

struct Setup {
    bits: u32,
    sectors: usize,
    backing: bool,
    shared: bool,
}

/// Makes every table of an image shared, as by an internal snapshot: the snapshot's table is left out, its references are there.
fn share(image: &Image) {
    image.settle().unwrap();
    let mut st = image.state();
    let l1 = st.l1.clone();
    for (index, table) in l1.iter().map(|entry| entry & mapping::OFFSET).enumerate().filter(|(_, t)| *t != 0)
    {
        let mut clusters = vec![table];
        for n in 0..image.l2_entries() {
            let entry = st.cache.word(&*image.file, table + n * 8).unwrap();
            if entry & mapping::OFFSET != 0 {
                clusters.push(entry & mapping::OFFSET);
                image.file.write(table + n * 8, &(entry & !mapping::COPIED).to_be_bytes()).unwrap();
            }
        }
        for cluster in clusters {
            let cluster = cluster >> image.header.cluster_bits;
            let count = image.refcount(&mut st, cluster).unwrap() + 1;
            st.log.append(log::Entry::Ref { cluster, count });
        }
        let entry = table;
        image.file.write(st.l1_offset + index as u64 * 8, &entry.to_be_bytes()).unwrap();
    }
    image.write_tables(&mut st).unwrap();
}

fn run(setup: &Setup, seed: u64, crashes: u32) -> u64 {
    let mut rng = SmallRng::seed_from_u64(seed);
    let size = (setup.sectors * SECTOR) as u64;
    let mut medium = Medium::new(Vec::new());
    let backing = setup.backing.then(|| {
        let bytes = (0..setup.sectors / 2).flat_map(|n| contents(n as u64 + 1)).collect();
        (Medium::new(bytes) as Arc<dyn Layer>, "/base".to_owned())
    });
    let name = backing.as_ref().map(|_| ("/base", "raw"));
    create(&*medium, &NewImage { size, cluster_bits: setup.bits, backing: name }).unwrap();
    let initial = |n| if setup.backing && n < setup.sectors / 2 { n as u64 + 1 } else { 0 };
    let sectors =
        (0..setup.sectors).map(|n| Sector { now: initial(n), maybe: None, since: vec![initial(n)] });
    let mut model = Model { sectors: sectors.collect(), next: 1, rng: SmallRng::seed_from_u64(seed ^ 1) };
    let (memory, _) = SharedMem::create("log", LOG_BYTES).unwrap();
    let mut memory = Arc::new(memory);
    let open = |medium: &Arc<Medium>, memory: &Arc<SharedMem>| {
        let options =
            Options { read_only: false, backing: backing.clone(), log: Some(memory.clone()), identity: 42 };
        Image::open(medium.clone(), options)
    };
    if setup.shared {
        let image = open(&medium, &memory).unwrap();
        for _ in 0..40 {
            model.one_operation(&image).unwrap();
        }
        share(&image);
    }
    let mut leaks = 0;
    for _ in 0..crashes {
        medium.0.lock().unwrap().left =
            rng.random_range(0..40) + if rng.random_range(0..8) == 0 { 400 } else { 0 };
        // The kill may meet the opening itself.
        if let Ok(image) = open(&medium, &memory) {
            while model.one_operation(&image).is_ok() {}
        }
        let power = rng.random_range(0..3) == 0;
        if power {
            medium = Medium::new(medium.after_power_failure(&mut rng));
            memory = Arc::new(SharedMem::create("log", LOG_BYTES).unwrap().0);
        }
        medium.0.lock().unwrap().left = u64::MAX;
        let image = open(&medium, &memory).unwrap_or_else(|e| panic!("{e}"));
        if power && !setup.shared {
            let (wrong, found) = image.check().unwrap();
            assert!(wrong.is_empty(), "after a power failure: {wrong:?}");
            leaks += found;
        }
        model.look(&image, power);
        image.settle().unwrap();
        for sector in &mut model.sectors {
            sector.since = vec![sector.now];
        }
        // What is shared counts as leaked here: the snapshot's own table is left out.
        let (wrong, _) = image.check().unwrap();
        assert!(wrong.is_empty(), "settled after a crash (power failure: {power}): {wrong:?}");
    }
    leaks
}

#[test]
fn a_crash_at_any_write_leaves_a_whole_image() {
    let runs: u64 = std::env::var("BLKBACK_QCOW2_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let setups = [
        // With 512-byte clusters a table covers 64 clusters and a refcount block 256, so both come up often.
        Setup { bits: 9, sectors: 300, backing: false, shared: false },
        Setup { bits: 9, sectors: 700, backing: true, shared: false },
        Setup { bits: 9, sectors: 200, backing: false, shared: true },
        Setup { bits: 11, sectors: 600, backing: true, shared: false },
        Setup { bits: 12, sectors: 400, backing: true, shared: true },
    ];
    for seed in 0..runs {
        for (n, setup) in setups.iter().enumerate() {
            let result = std::panic::catch_unwind(|| run(setup, seed, 12));
            assert!(result.is_ok(), "set-up {n}, seed {seed}");
        }
    }
}

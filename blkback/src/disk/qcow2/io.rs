//! The guest's reads, writes, zeroes and discards.

use std::io::{Error, ErrorKind, Read, Result};
use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;

use super::header::{Compression, corrupt};
use super::mapping::{COPIED, Mapping, ZERO};
use super::{Image, State};
use crate::disk::layer::{Extent, Layer};

/// Entries of the log that one cluster's change may need.
const ROOM: usize = 16;

impl Image {
    pub(super) fn read_guest(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let _shared = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let size = self.cluster_size();
        let mut done = 0;
        // Beyond the end of the disk, as a backing file that is shorter than what stands on it.
        let inside = self.len().saturating_sub(offset).min(into.len() as u64) as usize;
        into[inside..].fill(0);
        let into = &mut into[..inside];
        while done < into.len() {
            let at = offset + done as u64;
            let (guest, skip) = (at / size, at % size);
            let rest = into.len() - done;
            let mut n = rest.min((size - skip) as usize);
            let mapping = {
                let mut st = self.state();
                let mapping = self.mapping(&mut st, guest)?;
                // As many neighbours as continue it.
                let mut next = guest + 1;
                while n < rest && continues(mapping, self.mapping(&mut st, next)?, (next - guest) * size) {
                    n = rest.min(n + size as usize);
                    next += 1;
                }
                mapping
            };
            let piece = &mut into[done..done + n];
            match mapping {
                Mapping::Data { host, .. } => self.file.read(host + skip, piece)?,
                Mapping::Zero { .. } => piece.fill(0),
                Mapping::Backing => self.read_backing(at, piece)?,
                Mapping::Compressed { host, len } => {
                    let cluster = self.decompress(host, len)?;
                    piece.copy_from_slice(&cluster[skip as usize..][..n]);
                }
            }
            done += n;
        }
        Ok(())
    }

    fn read_backing(&self, at: u64, piece: &mut [u8]) -> Result<()> {
        match &self.backing {
            None => piece.fill(0),
            Some(backing) => {
                let there = backing.len().saturating_sub(at).min(piece.len() as u64) as usize;
                backing.read(at, &mut piece[..there])?;
                piece[there..].fill(0);
            }
        }
        Ok(())
    }

    fn decompress(&self, host: u64, len: u64) -> Result<Vec<u8>> {
        let mut compressed = vec![0; len as usize];
        self.file.read(host, &mut compressed)?;
        let mut cluster = vec![0; self.cluster_size() as usize];
        let read = match self.header.compression {
            Compression::Deflate => {
                flate2::read::DeflateDecoder::new(&compressed[..]).read_exact(&mut cluster)
            }
            Compression::Zstd => ruzstd::decoding::StreamingDecoder::new(&compressed[..])
                .map_err(|e| Error::other(e.to_string()))
                .and_then(|mut decoder| decoder.read_exact(&mut cluster)),
        };
        read.map_err(|e| corrupt(format!("a compressed cluster at {host:#x} is damaged: {e}")))?;
        Ok(cluster)
    }

    pub(super) fn write_guest(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.writable(offset, from.len() as u64)?;
        let size = self.cluster_size();
        let mut done = 0;
        while done < from.len() {
            let at = offset + done as u64;
            let (guest, skip) = (at / size, at % size);
            let rest = from.len() - done;
            let mut n = rest.min((size - skip) as usize);
            {
                let _shared = self.gate.read().unwrap_or_else(PoisonError::into_inner);
                let mut st = self.state();
                if let mapping @ Mapping::Data { host, own: true } = self.mapping(&mut st, guest)? {
                    let mut next = guest + 1;
                    while n < rest && continues(mapping, self.mapping(&mut st, next)?, (next - guest) * size)
                    {
                        n = rest.min(n + size as usize);
                        next += 1;
                    }
                    drop(st);
                    self.file.write(host + skip, &from[done..done + n])?;
                    done += n;
                    continue;
                }
            }
            self.with_room(|st| self.write_new(st, guest, skip, &from[done..done + n]))?;
            done += n;
        }
        Ok(())
    }

    /// Does something with the state when the log has room for it.
    fn with_room<T>(&self, work: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        loop {
            let mut st = self.state();
            if st.log.room() >= ROOM + self.per_compressed() {
                return work(&mut st);
            }
            drop(st);
            self.commit()?;
        }
    }

    /// Most clusters that a compressed one touches.
    fn per_compressed(&self) -> usize {
        // Up to 2^(cluster_bits - 8) sectors.
        ((512 << (self.header.cluster_bits - 8)) >> self.header.cluster_bits) + 2
    }

    /// Writes a piece of a guest cluster that has no cluster of its own (or has by now).
    fn write_new(&self, st: &mut State, guest: u64, skip: u64, piece: &[u8]) -> Result<()> {
        let size = self.cluster_size() as usize;
        let old = self.mapping(st, guest)?;
        if let Mapping::Data { host, own: true } = old {
            // Another thread was quicker. The state's lock keeps it in place.
            return self.file.write(host + skip, piece);
        }
        self.own_table(st, guest)?;
        let host = match old {
            Mapping::Zero { host, own: true } if host != 0 => host,
            _ => self.allocate(st)? << self.header.cluster_bits,
        };
        let whole = piece.len() == size;
        let blank = matches!(old, Mapping::Zero { .. })
            || matches!(old, Mapping::Backing)
                && self.backing.as_ref().is_none_or(|b| b.len() <= guest * size as u64);
        if whole {
            self.file.write(host, piece)?;
        } else if blank && host >= st.fresh {
            self.file.write(host + skip, piece)?;
        } else {
            let mut cluster = vec![0; size];
            match old {
                Mapping::Data { host, .. } => self.file.read(host, &mut cluster)?,
                Mapping::Backing if !blank => self.read_backing(guest * size as u64, &mut cluster)?,
                Mapping::Compressed { host, len } => cluster = self.decompress(host, len)?,
                _ => {}
            }
            cluster[skip as usize..][..piece.len()].copy_from_slice(piece);
            self.file.write(host, &cluster)?;
        }
        st.fresh = st.fresh.max(host + size as u64);
        self.remap(st, guest, host | COPIED, old, host);
        Ok(())
    }

    /// Zeroes, or with `discard` only where it costs nothing.
    pub(super) fn zero_guest(&self, offset: u64, len: u64, discard: bool) -> Result<()> {
        self.writable(offset, len)?;
        let size = self.cluster_size();
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (guest, skip) = (at / size, at % size);
            let n = (size - skip).min(end - at);
            // The last cluster is whole up to the end of the disk.
            let whole = skip == 0 && (n == size || at + n == self.len());
            let done = whole && self.with_room(|st| self.zero_cluster(st, guest))?;
            if !done && !discard {
                self.zero_part(at, n)?;
            }
            at += n;
        }
        Ok(())
    }

    /// Writes zeroes, unless that is what is there.
    fn zero_part(&self, at: u64, n: u64) -> Result<()> {
        let there = { self.mapping(&mut self.state(), at / self.cluster_size())? };
        let blank = matches!(there, Mapping::Zero { .. })
            || there == Mapping::Backing && self.backing.as_ref().is_none_or(|b| b.len() <= at);
        if blank { Ok(()) } else { self.write_guest(at, &vec![0; n as usize]) }
    }

    /// Makes a guest cluster read as zeroes by its mapping alone; false if that cannot be.
    fn zero_cluster(&self, st: &mut State, guest: u64) -> Result<bool> {
        let old = self.mapping(st, guest)?;
        let behind = self.backing.as_ref().is_some_and(|b| b.len() > guest * self.cluster_size());
        match old {
            Mapping::Zero { host: 0, .. } => return Ok(true),
            Mapping::Backing if !behind => return Ok(true),
            _ if behind && !self.v3() => return Ok(false),
            _ => {}
        }
        self.own_table(st, guest)?;
        self.remap(st, guest, if behind { ZERO } else { 0 }, old, 0);
        Ok(true)
    }

    fn writable(&self, offset: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(ErrorKind::PermissionDenied.into());
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size.load(Relaxed) => Ok(()),
            _ => Err(ErrorKind::InvalidInput.into()),
        }
    }

    pub(super) fn extent_at(&self, offset: u64, len: u64) -> Result<Extent> {
        let size = self.cluster_size();
        let mut st = self.state();
        let own = self.mapping(&mut st, offset / size)? != Mapping::Backing;
        let mut run = size - offset % size;
        while run < len && (self.mapping(&mut st, (offset + run) / size)? != Mapping::Backing) == own {
            run += size;
        }
        Ok(Extent { len: run.min(len), own })
    }
}

/// `next`, `distance` bytes on, goes on where `first` is.
fn continues(first: Mapping, next: Mapping, distance: u64) -> bool {
    match (first, next) {
        (Mapping::Data { host: a, own }, Mapping::Data { host: b, own: theirs }) => {
            b == a + distance && own == theirs
        }
        (Mapping::Zero { .. }, Mapping::Zero { .. }) | (Mapping::Backing, Mapping::Backing) => true,
        _ => false,
    }
}

//! LUKS1 and LUKS2 volumes, decrypted in this process (no dm-crypt, which would need rights on the host).
//!
//! Read: headers as cryptsetup's on-disk format specifications tell, passphrases by PBKDF2 or Argon2. Served: aes-xts-plain64 with
//! sectors of 512 to 4096 bytes. Headers are never written; `cryptsetup` does that on a volume that is not in use.

mod header;
mod kdf;
#[cfg(test)]
mod tests;

use std::io::{Error, ErrorKind, Result};
use std::sync::{Arc, Mutex, PoisonError};

use aes::cipher::KeyInit;
use aes::{Aes128, Aes256};
use xts_mode::Xts128;
use zeroize::Zeroizing;

pub use self::header::{Segment, Volume};
use super::layer::{Extent, Layer};

/// An error about a volume: one line.
pub(crate) fn wrong(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidData, format!("luks: {what}"))
}

enum Xts {
    Aes128(Box<Xts128<Aes128>>),
    Aes256(Box<Xts128<Aes256>>),
}

impl Xts {
    /// Two keys in one, as XTS has them.
    fn new(key: &[u8]) -> Result<Xts> {
        let (a, b) = key.split_at(key.len() / 2);
        let bad = |_| wrong("a key of this length is not for AES");
        Ok(match key.len() {
            32 => Xts::Aes128(Box::new(Xts128::new(
                Aes128::new_from_slice(a).map_err(bad)?,
                Aes128::new_from_slice(b).map_err(bad)?,
            ))),
            64 => Xts::Aes256(Box::new(Xts128::new(
                Aes256::new_from_slice(a).map_err(bad)?,
                Aes256::new_from_slice(b).map_err(bad)?,
            ))),
            other => return Err(wrong(format!("keys of {} bits are not supported", other * 8))),
        })
    }

    /// Whole sectors; `first` is the number of the first in units of 512 bytes (plain64).
    fn apply(&self, bytes: &mut [u8], sector: usize, first: u64, encrypt: bool) {
        for (n, piece) in bytes.chunks_exact_mut(sector).enumerate() {
            let tweak = xts_mode::get_tweak_default(u128::from(first + (n * (sector / 512)) as u64));
            match (self, encrypt) {
                (Xts::Aes128(xts), true) => xts.encrypt_sector(piece, tweak),
                (Xts::Aes128(xts), false) => xts.decrypt_sector(piece, tweak),
                (Xts::Aes256(xts), true) => xts.encrypt_sector(piece, tweak),
                (Xts::Aes256(xts), false) => xts.decrypt_sector(piece, tweak),
            }
        }
    }
}

/// An unlocked volume.
pub struct LuksLayer {
    below: Arc<dyn Layer>,
    xts: Xts,
    segment: Segment,
    /// Held while part of an encrypted sector is changed.
    partial: Mutex<()>,
}

impl std::fmt::Debug for LuksLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LuksLayer").field("segment", &self.segment).finish_non_exhaustive()
    }
}

impl LuksLayer {
    /// Serves a volume whose key is known.
    ///
    /// # Errors
    /// The key is of another length than AES-XTS has.
    pub fn new(below: Arc<dyn Layer>, segment: Segment, key: &Zeroizing<Vec<u8>>) -> Result<LuksLayer> {
        Ok(LuksLayer { xts: Xts::new(key)?, below, segment, partial: Mutex::new(()) })
    }

    /// Whole encrypted sectors around the range.
    fn around(&self, offset: u64, len: u64) -> (u64, u64) {
        let sector = self.segment.sector;
        let start = offset / sector * sector;
        (start, (offset + len).next_multiple_of(sector))
    }

    fn number(&self, offset: u64) -> u64 {
        offset / 512 + self.segment.iv_tweak
    }

    fn read_whole(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.below.read(self.segment.offset + offset, into)?;
        self.xts.apply(into, self.segment.sector as usize, self.number(offset), false);
        Ok(())
    }

    fn write_whole(&self, offset: u64, from: &[u8]) -> Result<()> {
        let mut bytes = from.to_vec();
        self.xts.apply(&mut bytes, self.segment.sector as usize, self.number(offset), true);
        self.below.write(self.segment.offset + offset, &bytes)
    }
}

impl Layer for LuksLayer {
    fn len(&self) -> u64 {
        let there = self.below.len().saturating_sub(self.segment.offset);
        self.segment.len.map_or(there, |len| len.min(there)) / self.segment.sector * self.segment.sector
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        // What lies beyond the end is zero, not what zeroes decrypt to.
        let inside = self.len().saturating_sub(offset).min(into.len() as u64) as usize;
        into[inside..].fill(0);
        let into = &mut into[..inside];
        if into.is_empty() {
            return Ok(());
        }
        let (start, end) = self.around(offset, into.len() as u64);
        if (start, end) == (offset, offset + into.len() as u64) {
            return self.read_whole(offset, into);
        }
        let mut bytes = vec![0; (end - start) as usize];
        self.read_whole(start, &mut bytes)?;
        into.copy_from_slice(&bytes[(offset - start) as usize..][..into.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        let (start, end) = self.around(offset, from.len() as u64);
        if self.segment.len.is_some_and(|len| end > len) {
            return Err(ErrorKind::StorageFull.into());
        }
        let old = self.len();
        if start > old {
            // No holes: they would decrypt to garbage.
            self.write_zeroes(old, start - old)?;
        }
        if (start, end) == (offset, offset + from.len() as u64) {
            let _not_within_another = (self.segment.sector > 512)
                .then(|| self.partial.lock().unwrap_or_else(PoisonError::into_inner));
            return self.write_whole(offset, from);
        }
        let _alone = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; (end - start) as usize];
        self.read(start, &mut bytes)?;
        bytes[(offset - start) as usize..][..from.len()].copy_from_slice(from);
        self.write_whole(start, &bytes)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let zeroes = vec![0; len.min(1 << 20) as usize];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeroes.len() as u64) as usize;
            self.write(offset + done, &zeroes[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    /// Not handed down: it would show which sectors are in use.
    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.below.flush()
    }

    fn grow(&self, len: u64) -> Result<()> {
        if self.segment.len.is_some() {
            return Err(ErrorKind::Unsupported.into());
        }
        let old = self.len();
        if len < old || !len.is_multiple_of(self.segment.sector) {
            return Err(ErrorKind::InvalidInput.into());
        }
        // The new bytes are zeroes for whoever reads them: that takes writing them.
        self.write_zeroes(old, len - old)
    }

    /// Zeroes are written as what they encrypt to, over what was there.
    fn overwrites(&self) -> bool {
        self.below.overwrites()
    }

    fn settle(&self) -> Result<()> {
        self.below.settle()
    }

    fn extent(&self, _offset: u64, len: u64) -> Result<Extent> {
        Ok(Extent { len, own: true })
    }
}

//! A small document in memory that outlives the incarnation: settings of a vif, leases, what was said in a vhost-user conversation.
//!
//! Two places, written in turn, each with a sequence number and a checksum: a kill while one is written leaves the other.
//! What is in it is JSON, so that another version can read what it knows.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ring::RingMem;

/// Most bytes of a document.
pub const MAX_DOCUMENT: usize = 128 << 10;
const HEAD: usize = 16;
const PLACE: usize = HEAD + MAX_DOCUMENT;
/// Bytes of memory that it takes.
pub const BYTES: usize = 2 * PLACE;

/// Why a document could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// Longer than [`MAX_DOCUMENT`].
    #[error("{0} bytes of settings are too many")]
    TooLong(usize),
    /// Cannot be written as JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Sequence number and document of one place, if it is whole.
fn place(mem: &impl RingMem, base: usize) -> Option<(u64, Vec<u8>)> {
    let seq = mem.load_u64(base);
    let (len, crc) = (mem.load_u32(base + 8) as usize, mem.load_u32(base + 12));
    if seq == 0 || len > MAX_DOCUMENT {
        return None;
    }
    let mut bytes = vec![0; len];
    mem.copy_out(base + HEAD, &mut bytes);
    (checksum(seq, &bytes) == crc).then_some((seq, bytes))
}

fn checksum(seq: u64, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&seq.to_le_bytes()), bytes)
}

/// Writes a document over the older one.
///
/// # Errors
/// [`KeptError`].
pub fn save<T: Serialize>(mem: &impl RingMem, document: &T) -> Result<(), KeptError> {
    let bytes = serde_json::to_vec(document)?;
    if bytes.len() > MAX_DOCUMENT {
        return Err(KeptError::TooLong(bytes.len()));
    }
    let seqs = [0, PLACE].map(|base| place(mem, base).map_or(0, |(seq, _)| seq));
    let (base, seq) = if seqs[0] <= seqs[1] { (0, seqs[1] + 1) } else { (PLACE, seqs[0] + 1) };
    // Invalid until all of it is there.
    mem.store_u64(base, 0);
    mem.copy_in(base + HEAD, &bytes);
    mem.store_u32(base + 8, bytes.len() as u32);
    mem.store_u32(base + 12, checksum(seq, &bytes));
    mem.store_u64(base, seq);
    Ok(())
}

/// The latest whole document, if there is one and it reads as `T`.
pub fn load<T: DeserializeOwned>(mem: &impl RingMem) -> Option<T> {
    let mut found: Vec<_> = [0, PLACE].into_iter().filter_map(|base| place(mem, base)).collect();
    found.sort_by_key(|(seq, _)| std::cmp::Reverse(*seq));
    found.into_iter().find_map(|(_, bytes)| serde_json::from_slice(&bytes).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::HeapMem;

    #[test]
    fn the_latest_whole_one_counts() {
        let mem = HeapMem::new(BYTES);
        assert_eq!(load::<u32>(&mem), None);
        for n in 1..6u32 {
            save(&mem, &n).unwrap();
            assert_eq!(load(&mem), Some(n));
        }
        let whole = mem.snapshot();
        // Damage to the newest leaves the one before, damage to the other one nothing changes.
        for (base, want) in [(0, 4), (PLACE, 5)] {
            mem.copy_in(0, &whole);
            mem.copy_in(base + HEAD, b"9");
            assert_eq!(load(&mem), Some(want));
            save(&mem, &7u32).unwrap();
            assert_eq!(load(&mem), Some(7u32));
        }
        assert!(save(&mem, &"x".repeat(MAX_DOCUMENT)).is_err());
    }
}

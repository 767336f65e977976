//! A saved guest's file: what it was, and its state as its virtual machine monitor wrote it.
//!
//! ```text
//!   0   magic "BHSAVED\0"             32                description (UTF-8 JSON)
//!   8   u32 version (1)               next page         state, up to the file's end
//!   12  u32 description's bytes
//!   16  u64 state's bytes
//!   24  u32 CRC-32C of the state
//!   28  u32 CRC-32C of bytes 0 to 27 and the description
//! ```
//! Numbers are little-endian. The first page is written last, when all else is on the medium: a file whose writer was ended is none.
//! Whatever is read is an allegation.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: &[u8; 8] = b"BHSAVED\0";
const VERSION: u32 = 1;
const HEAD: usize = 32;
const PAGE: u64 = 4096;
/// Longest description, bytes.
pub const MAX_DESCRIPTION: usize = 256 << 10;
/// Longest state, bytes.
const MAX_STATE: u64 = 1 << 42;

/// Why a file is none of a saved guest.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// The file cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It says what cannot be.
    #[error("{0}")]
    Bad(&'static str),
}

/// A file that is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// What was given when it was written.
    pub description: String,
    /// Where the state begins, bytes.
    pub state_at: u64,
    /// Its length, bytes.
    pub state_bytes: u64,
    crc: u32,
}

/// Where the state behind a description of so many bytes begins.
pub fn state_at(description: usize) -> u64 {
    ((HEAD + description) as u64).next_multiple_of(PAGE)
}

fn word(head: &[u8; HEAD], at: usize) -> u32 {
    u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
}

fn head_crc(head: &[u8; HEAD], description: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&head[..28]), description)
}

/// CRC-32C of a part of a file.
fn crc_of(file: &File, mut at: u64, end: u64) -> io::Result<u32> {
    let mut buffer = vec![0; 1 << 20];
    let mut crc = 0;
    while at < end {
        let n = (end - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..n], at)?;
        crc = crc32c::crc32c_append(crc, &buffer[..n]);
        at += n as u64;
    }
    Ok(crc)
}

/// Makes a file of a description and the state that was written behind [`state_at`] complete, with all on the medium; its length.
///
/// # Errors
/// The file's; the description is too long, or there is no state.
pub fn finish(file: &File, description: &str) -> Result<u64, SavedError> {
    if description.len() > MAX_DESCRIPTION {
        return Err(SavedError::Bad("the guest's description is too long"));
    }
    let (at, end) = (state_at(description.len()), file.metadata()?.len());
    if end <= at {
        return Err(SavedError::Bad("no state was written"));
    }
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head[12..16].copy_from_slice(&(description.len() as u32).to_le_bytes());
    head[16..24].copy_from_slice(&(end - at).to_le_bytes());
    head[24..28].copy_from_slice(&crc_of(file, at, end)?.to_le_bytes());
    let crc = head_crc(&head, description.as_bytes());
    head[28..].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(description.as_bytes(), HEAD as u64)?;
    file.sync_all()?;
    file.write_all_at(&head, 0)?;
    file.sync_all()?;
    Ok(end)
}

impl Saved {
    /// Reads what a file says of itself.
    ///
    /// # Errors
    /// [`SavedError`]; the state is not looked at.
    pub fn open(file: &File) -> Result<Saved, SavedError> {
        let bad = |what| Err(SavedError::Bad(what));
        let len = file.metadata()?.len();
        if len < PAGE {
            return bad("not a saved guest, or not finished");
        }
        let mut head = [0; HEAD];
        file.read_exact_at(&mut head, 0)?;
        if &head[..8] != MAGIC {
            return bad("not a saved guest, or not finished");
        }
        if word(&head, 8) != VERSION {
            return bad("a saved guest of another version");
        }
        let bytes = word(&head, 12) as usize;
        let state_bytes = u64::from(word(&head, 16)) | u64::from(word(&head, 20)) << 32;
        let at = state_at(bytes.min(MAX_DESCRIPTION));
        if bytes > MAX_DESCRIPTION || state_bytes > MAX_STATE || at + state_bytes != len {
            return bad("a saved guest's file that is damaged or cut short");
        }
        let mut description = vec![0; bytes];
        file.read_exact_at(&mut description, HEAD as u64)?;
        if head_crc(&head, &description) != word(&head, 28) {
            return bad("a saved guest's file that is damaged");
        }
        let Ok(description) = String::from_utf8(description) else {
            return bad("a saved guest's file with a description that is no text");
        };
        Ok(Saved { description, state_at: at, state_bytes, crc: word(&head, 24) })
    }

    /// Reads the state and compares its checksum.
    ///
    /// # Errors
    /// [`SavedError`].
    pub fn check_state(&self, file: &File) -> Result<(), SavedError> {
        if crc_of(file, self.state_at, self.state_at + self.state_bytes)? != self.crc {
            return Err(SavedError::Bad("a saved guest's file whose state is damaged"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn saved(description: &str, state: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(state, state_at(description.len())).unwrap();
        finish(&file, description).unwrap();
        file
    }

    #[test]
    fn what_was_saved_is_read() {
        let file = saved("{\"a\":1}", &[7; 100_000]);
        let read = Saved::open(&file).unwrap();
        assert_eq!(
            (read.description.as_str(), read.state_at, read.state_bytes),
            ("{\"a\":1}", 4096, 100_000)
        );
        read.check_state(&file).unwrap();
        let long = "x".repeat(5000);
        assert_eq!(Saved::open(&saved(&long, &[1])).unwrap().state_at, 8192);
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let unfinished = tempfile::tempfile().unwrap();
        assert!(finish(&unfinished, "{}").is_err(), "no state");
        unfinished.write_all_at(&[7; 100], state_at(2)).unwrap();
        assert!(Saved::open(&unfinished).unwrap_err().to_string().contains("not finished"));
        let file = saved("{}", &[7; 100]);
        file.write_all_at(&[8], 4096 + 50).unwrap();
        assert!(Saved::open(&file).unwrap().check_state(&file).unwrap_err().to_string().contains("state"));
        file.set_len(4096 + 99).unwrap();
        assert!(Saved::open(&file).unwrap_err().to_string().contains("cut short"));
        let file = saved("{}", &[7; 100]);
        file.write_all_at(&[2], 8).unwrap();
        assert!(Saved::open(&file).unwrap_err().to_string().contains("version"));
        assert!(finish(&file, &"x".repeat(MAX_DESCRIPTION + 1)).is_err());
    }

    proptest! {
        /// Any change of the first page is seen, whatever else it is.
        #[test]
        fn any_head(at in 0usize..60, value in any::<u8>(), rest in proptest::collection::vec(any::<u8>(), 0..64)) {
            let file = saved("{\"some\": \"description\"}", b"state");
            let before = Saved::open(&file).unwrap();
            file.write_all_at(&rest, 0).unwrap();
            file.write_all_at(&[value], at as u64).unwrap();
            if let Ok(read) = Saved::open(&file) {
                prop_assert_eq!(read, before);
            }
        }
    }
}

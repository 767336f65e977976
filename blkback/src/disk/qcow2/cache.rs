//! What was read of an image's tables, in pieces, bounded. Never dirty: changes are in the log.

use std::collections::HashMap;
use std::io;

use crate::disk::layer::Layer;

/// Bytes of a piece, or less where clusters are smaller.
const PIECE: u64 = 4096;
/// Pieces kept: 1 MiB.
const MOST: usize = 256;

#[derive(Debug)]
struct Piece {
    bytes: Box<[u8]>,
    used: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Cache {
    piece: u64,
    clock: u64,
    pieces: HashMap<u64, Piece>,
}

impl Cache {
    /// For clusters of that many bytes.
    pub fn new(cluster_size: u64) -> Cache {
        Cache { piece: PIECE.min(cluster_size), clock: 0, pieces: HashMap::new() }
    }

    /// Bytes of a piece.
    pub fn piece_len(&self) -> u64 {
        self.piece
    }

    /// The piece that `offset` lies in, read if it is not there.
    ///
    /// # Errors
    /// The file's.
    pub fn piece(&mut self, file: &dyn Layer, offset: u64) -> io::Result<&[u8]> {
        let base = offset - offset % self.piece;
        self.clock += 1;
        if !self.pieces.contains_key(&base) {
            if self.pieces.len() >= MOST {
                self.evict();
            }
            let mut bytes = vec![0; self.piece as usize].into_boxed_slice();
            file.read(base, &mut bytes)?;
            self.pieces.insert(base, Piece { bytes, used: 0 });
        }
        let clock = self.clock;
        let piece = self.pieces.get_mut(&base).ok_or(io::ErrorKind::NotFound)?;
        piece.used = clock;
        Ok(&piece.bytes)
    }

    /// A big-endian word.
    ///
    /// # Errors
    /// The file's.
    pub fn word(&mut self, file: &dyn Layer, offset: u64) -> io::Result<u64> {
        let at = (offset % self.piece) as usize;
        let bytes = self.piece(file, offset)?;
        Ok(u64::from_be_bytes(bytes[at..at + 8].try_into().map_err(|_| io::ErrorKind::InvalidInput)?))
    }

    /// Changes a piece in the file and here. The file comes first: what failed is not remembered.
    ///
    /// # Errors
    /// The file's.
    pub fn update(&mut self, file: &dyn Layer, base: u64, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes: Box<[u8]> = self.piece(file, base)?.into();
        change(&mut bytes);
        if let Err(e) = file.write(base, &bytes) {
            self.pieces.remove(&base);
            return Err(e);
        }
        if let Some(piece) = self.pieces.get_mut(&base) {
            piece.bytes = bytes;
        }
        Ok(())
    }

    /// What is there was overwritten, or is something else now.
    pub fn forget(&mut self, offset: u64, len: u64) {
        let mut base = offset - offset % self.piece;
        while base < offset + len {
            self.pieces.remove(&base);
            base += self.piece;
        }
    }

    /// Drops the half that was not used for longest: seldom, so that its cost does not count.
    fn evict(&mut self) {
        let mut ages: Vec<u64> = self.pieces.values().map(|p| p.used).collect();
        let middle = ages.len() / 2;
        let (_, &mut limit, _) = ages.select_nth_unstable(middle);
        self.pieces.retain(|_, p| p.used > limit);
    }
}

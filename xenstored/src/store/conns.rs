//! Maps by connection. Ids count up, so they are their own hash.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::ConnId;

/// Spreads a small number over all bits.
#[derive(Debug, Default, Clone, Copy)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

/// A map from connections to something.
pub type ConnMap<T> = HashMap<ConnId, T, BuildHasherDefault<IdHasher>>;

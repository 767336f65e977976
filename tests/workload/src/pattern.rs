//! Pseudo-random bytes that both ends can compute: by offset for streams, by key for blocks.

/// The finaliser of SplitMix64: a bijection in which each input bit changes half of the output's.
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A small deterministic generator for choices (offsets, sizes), not for secrets.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator whose whole sequence follows from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The next 64 bits.
    #[allow(clippy::should_implement_trait, reason = "not an iterator: it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit` (0 when `limit` is 0).
    pub fn below(&mut self, limit: u64) -> u64 {
        if limit == 0 { 0 } else { self.next() % limit }
    }
}

/// The 8 bytes of stream `seed` that start at byte `8 * word`.
const fn word(seed: u64, word: u64) -> [u8; 8] {
    mix(seed ^ mix(word)).to_le_bytes()
}

/// Fills `buf` with the bytes of stream `seed` from byte `offset` on.
pub fn fill_stream(seed: u64, offset: u64, buf: &mut [u8]) {
    each_word(seed, offset, buf.len(), |range, bytes| {
        buf[range].copy_from_slice(bytes);
        true
    });
}

/// Compares `buf` with the bytes of stream `seed` from byte `offset` on; the offset of the first
/// byte that differs, if one does.
#[must_use]
pub fn check_stream(seed: u64, offset: u64, buf: &[u8]) -> Option<u64> {
    let mut bad = None;
    each_word(seed, offset, buf.len(), |range, bytes| {
        let start = range.start;
        let got = &buf[range];
        if got == bytes {
            return true;
        }
        let at = got.iter().zip(bytes).position(|(a, b)| a != b).unwrap_or(0);
        bad = Some(offset + (start + at) as u64);
        false
    });
    bad
}

/// Calls `f` with each piece of the range and its right bytes, until it returns false.
fn each_word(seed: u64, offset: u64, len: usize, mut f: impl FnMut(std::ops::Range<usize>, &[u8]) -> bool) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let skip = (at % 8) as usize;
        let take = (8 - skip).min(len - done);
        let bytes = word(seed, at / 8);
        if !f(done..done + take, &bytes[skip..skip + take]) {
            return;
        }
        done += take;
    }
}

#[cfg(test)]
mod tests {
    use super::{check_stream, fill_stream};

    #[test]
    fn stream_is_the_same_however_it_is_cut() {
        let mut whole = vec![0; 1000];
        fill_stream(7, 3, &mut whole);
        let mut at = 0;
        for size in [1, 7, 8, 9, 64, 13, 200] {
            let mut part = vec![0; size];
            fill_stream(7, 3 + at as u64, &mut part);
            assert_eq!(part, whole[at..at + size]);
            at += size;
        }
        assert_eq!(check_stream(7, 3, &whole), None);
        whole[501] ^= 1;
        assert_eq!(check_stream(7, 3, &whole), Some(504));
    }
}

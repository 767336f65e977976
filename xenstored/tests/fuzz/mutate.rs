//! New inputs from old ones.

use rand::Rng;
use rand::rngs::SmallRng;

/// Longest input, bytes.
const MAX: usize = 16 << 10;

/// What a store's inputs are made of.
const WORDS: &[&[u8]] = &[
    b"\0",
    b"/",
    b"//",
    b"/tool",
    b"/local/domain/5",
    b"data",
    b"@introduceDomain",
    b"@releaseDomain/5",
    b"@",
    b"T\0",
    b"F\0",
    b"n0",
    b"r5",
    b"b32752",
    b"65535",
    b"-1",
    b"4294967296",
    b"token",
    b"check\0",
    b"quota\0",
    b"\xff",
];

/// Numbers at which something ends.
const EDGES: &[u32] = &[
    0,
    1,
    2,
    11,
    15,
    16,
    21,
    31,
    1023,
    1024,
    1025,
    2048,
    3072,
    4095,
    4096,
    4097,
    0x7fff_ffff,
    u32::MAX - 1,
    u32::MAX,
];

/// One input, changed in one to eight places.
pub fn mutate(rng: &mut SmallRng, corpus: &[Vec<u8>], at: usize) -> Vec<u8> {
    let mut input = corpus[at].clone();
    for _ in 0..1 << rng.random_range(0..4) {
        change(rng, corpus, &mut input);
    }
    input.truncate(MAX);
    input
}

fn change(rng: &mut SmallRng, corpus: &[Vec<u8>], input: &mut Vec<u8>) {
    let len = input.len();
    let place = |rng: &mut SmallRng| rng.random_range(0..=len);
    let piece = |rng: &mut SmallRng, of: &[u8]| -> Vec<u8> {
        let (a, b) = (rng.random_range(0..=of.len()), rng.random_range(0..=of.len()));
        of[a.min(b)..a.max(b)].to_vec()
    };
    match rng.random_range(0..9) {
        0 if len > 0 => input[rng.random_range(0..len)] ^= 1 << rng.random_range(0..8),
        1 if len > 0 => input[rng.random_range(0..len)] = rng.random(),
        2 if len > 3 => {
            // A word, mostly where headers have theirs.
            let at = rng.random_range(0..len - 3) & if rng.random_bool(0.8) { !3 } else { !0 };
            let edge = EDGES[rng.random_range(0..EDGES.len())];
            input[at..at + 4].copy_from_slice(&edge.to_ne_bytes());
        }
        3 => {
            let (a, b) = (place(rng), place(rng));
            input.drain(a.min(b)..a.max(b).min(a.min(b) + 64));
        }
        4 => {
            let (at, word) = (place(rng), WORDS[rng.random_range(0..WORDS.len())]);
            input.splice(at..at, word.iter().copied());
        }
        5 => {
            let (at, own) = (place(rng), piece(rng, input));
            input.splice(at..at, own);
        }
        6 => {
            let other = &corpus[rng.random_range(0..corpus.len())];
            let other = piece(rng, other);
            let at = place(rng);
            input.splice(at..at, other);
        }
        7 => input.extend_from_slice(&corpus[rng.random_range(0..corpus.len())]),
        _ => {
            let (at, byte, count) = (place(rng), rng.random(), rng.random_range(1..300));
            input.splice(at..at, std::iter::repeat_n(byte, count));
        }
    }
}

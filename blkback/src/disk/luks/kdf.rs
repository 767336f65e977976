//! From passphrase to key: PBKDF2, Argon2; and the anti-forensic split.

use std::io::Result;

use pbkdf2::pbkdf2_hmac;
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};
use zeroize::Zeroizing;

use super::wrong;

/// Most memory of Argon2, KiB: cryptsetup's own limit.
const MOST_MEMORY: u32 = 4 << 20;

/// A hash by cryptsetup's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Sha1,
    Sha256,
    Sha512,
}

impl Hash {
    pub(super) fn by_name(name: &str) -> Result<Hash> {
        match name {
            "sha1" => Ok(Hash::Sha1),
            "sha256" => Ok(Hash::Sha256),
            "sha512" => Ok(Hash::Sha512),
            other => Err(wrong(format!("hash {other:?} is not supported (sha1, sha256, sha512)"))),
        }
    }

    fn digest(self, counter: u32, bytes: &[u8]) -> Vec<u8> {
        fn of<D: Digest>(counter: u32, bytes: &[u8]) -> Vec<u8> {
            D::new().chain_update(counter.to_be_bytes()).chain_update(bytes).finalize().to_vec()
        }
        match self {
            Hash::Sha1 => of::<Sha1>(counter, bytes),
            Hash::Sha256 => of::<Sha256>(counter, bytes),
            Hash::Sha512 => of::<Sha512>(counter, bytes),
        }
    }

    pub(super) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Hash::Sha1 => pbkdf2_hmac::<Sha1>(password, salt, iterations, out),
            Hash::Sha256 => pbkdf2_hmac::<Sha256>(password, salt, iterations, out),
            Hash::Sha512 => pbkdf2_hmac::<Sha512>(password, salt, iterations, out),
        }
    }
}

/// How a keyslot's key is made of the passphrase.
#[derive(Clone, Debug)]
pub(super) enum Kdf {
    Pbkdf2 { hash: Hash, iterations: u32, salt: Vec<u8> },
    Argon2 { id: bool, time: u32, memory: u32, cpus: u32, salt: Vec<u8> },
}

impl Kdf {
    pub(super) fn derive(&self, password: &[u8], len: usize) -> Result<Zeroizing<Vec<u8>>> {
        let mut out = Zeroizing::new(vec![0; len]);
        match self {
            Kdf::Pbkdf2 { hash, iterations, salt } => hash.pbkdf2(password, salt, *iterations, &mut out),
            Kdf::Argon2 { id, time, memory, cpus, salt } => {
                if *memory > MOST_MEMORY {
                    return Err(wrong(format!("a keyslot wants {memory} KiB of memory, too much")));
                }
                let failed = |e: argon2::Error| wrong(format!("argon2: {e}"));
                let params = argon2::Params::new(*memory, *time, *cpus, Some(len)).map_err(failed)?;
                let algorithm = if *id { argon2::Algorithm::Argon2id } else { argon2::Algorithm::Argon2i };
                argon2::Argon2::new(algorithm, argon2::Version::V0x13, params)
                    .hash_password_into(password, salt, &mut out)
                    .map_err(failed)?;
            }
        }
        Ok(out)
    }
}

/// Joins what LUKS split into `stripes` (on-disk format specification, "Anti-forensic splitter").
pub(super) fn merge(hash: Hash, split: &[u8], key_len: usize) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; key_len]);
    let mut stripes = split.chunks_exact(key_len).peekable();
    while let Some(stripe) = stripes.next() {
        block.iter_mut().zip(stripe).for_each(|(byte, other)| *byte ^= other);
        if stripes.peek().is_some() {
            let unit = hash.digest(0, &[]).len();
            let diffused: Vec<u8> = block
                .chunks(unit)
                .enumerate()
                .flat_map(|(n, piece)| {
                    let mut out = hash.digest(n as u32, piece);
                    out.truncate(piece.len());
                    out
                })
                .collect();
            block.copy_from_slice(&Zeroizing::new(diffused));
        }
    }
    block
}

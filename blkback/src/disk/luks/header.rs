//! LUKS1 and LUKS2 headers: parsed with every length checked, and unlocked.

use std::collections::BTreeMap;
use std::io::Result;

use base64ct::{Base64, Encoding};
use serde::Deserialize;
use sha2::{Digest as _, Sha256, Sha512};
use zeroize::Zeroizing;

use super::kdf::{Hash, Kdf, merge};
use super::{Xts, wrong};
use crate::disk::layer::Layer;

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const SECOND_MAGIC: &[u8; 6] = b"SKUL\xba\xbe";
/// Longest LUKS2 header with its JSON: the specification's.
const MOST_HEADER: u64 = 4 << 20;
/// Bytes of a binary LUKS2 header.
const BINARY: usize = 4096;
/// Most bytes of a split key: 4,000 stripes of 64 bytes are usual.
const MOST_SPLIT: u64 = 4 << 20;
/// Longest volume key, bytes.
const MOST_KEY: usize = 64;

/// Where the data is and how it is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub offset: u64,
    /// Bytes; to the end if none.
    pub len: Option<u64>,
    /// Bytes of an encrypted sector.
    pub sector: u64,
    /// Added to sector numbers.
    pub iv_tweak: u64,
}

#[derive(Clone, Debug)]
struct Keyslot {
    kdf: Kdf,
    /// Of the split key.
    offset: u64,
    stripes: u64,
    af_hash: Hash,
    key_len: usize,
    area_key_len: usize,
}

/// A parsed header.
#[derive(Clone, Debug)]
pub struct Volume {
    /// The data.
    pub segment: Segment,
    keyslots: Vec<Keyslot>,
    digest: Kdf,
    digest_value: Vec<u8>,
}

fn check_cipher(name: &str) -> Result<()> {
    match name {
        "aes-xts-plain64" => Ok(()),
        other => Err(wrong(format!("cipher {other:?} is not supported, only aes-xts-plain64"))),
    }
}

impl Volume {
    /// Reads the header of the volume in `file`.
    ///
    /// # Errors
    /// `InvalidData` with one line; the file's.
    pub fn read(file: &dyn Layer) -> Result<Volume> {
        let mut start = vec![0; BINARY];
        file.read(0, &mut start)?;
        match (&start[..6] == MAGIC, u16::from_be_bytes([start[6], start[7]])) {
            (true, 1) => luks1(&start),
            (true, 2) => luks2(file, &start),
            (true, other) => Err(wrong(format!("version {other} is not known"))),
            // The first header may be torn where the second is whole.
            (false, _) => luks2(file, &start),
        }
    }

    /// Tells the volume from others: what a kept key is of.
    pub fn identity(&self) -> &[u8] {
        &self.digest_value
    }

    /// The volume key, if the passphrase opens a keyslot.
    ///
    /// # Errors
    /// `InvalidData` if it opens none; the file's.
    pub fn unlock(&self, file: &dyn Layer, passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
        let mut refused = None;
        for slot in &self.keyslots {
            let area_key = match slot.kdf.derive(passphrase, slot.area_key_len) {
                Ok(key) => key,
                Err(e) => {
                    refused = Some(e);
                    continue;
                }
            };
            let len = (slot.key_len as u64 * slot.stripes).next_multiple_of(512);
            let mut split = Zeroizing::new(vec![0; len as usize]);
            file.read(slot.offset, &mut split)?;
            Xts::new(&area_key)?.apply(&mut split, 512, 0, false);
            let key = merge(slot.af_hash, &split[..slot.key_len * slot.stripes as usize], slot.key_len);
            let digest = self.digest.derive(&key, self.digest_value.len())?;
            if digest[..] == self.digest_value[..] {
                return Ok(key);
            }
        }
        Err(refused.unwrap_or_else(|| {
            wrong("the key opens none of the volume's keyslots; a final line break in a key file counts")
        }))
    }
}

fn text(bytes: &[u8]) -> Result<&str> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).map_err(|_| wrong("its header is damaged"))
}

fn luks1(bytes: &[u8]) -> Result<Volume> {
    let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    check_cipher(&format!("{}-{}", text(&bytes[8..40])?, text(&bytes[40..72])?))?;
    let hash = Hash::by_name(text(&bytes[72..104])?)?;
    let key_len = word(108) as usize;
    if key_len > MOST_KEY || key_len == 0 {
        return Err(wrong("its key is of an impossible length"));
    }
    let mut keyslots = Vec::new();
    for at in (208..592).step_by(48) {
        let stripes = u64::from(word(at + 44));
        if word(at) != 0x00ac_71f3 || stripes == 0 || stripes * key_len as u64 > MOST_SPLIT {
            continue;
        }
        let kdf = Kdf::Pbkdf2 { hash, iterations: word(at + 4), salt: bytes[at + 8..at + 40].to_vec() };
        let offset = u64::from(word(at + 40)) * 512;
        keyslots.push(Keyslot { kdf, offset, stripes, af_hash: hash, key_len, area_key_len: key_len });
    }
    let segment = Segment { offset: u64::from(word(104)) * 512, len: None, sector: 512, iv_tweak: 0 };
    let digest = Kdf::Pbkdf2 { hash, iterations: word(164), salt: bytes[132..164].to_vec() };
    Ok(Volume { segment, keyslots, digest, digest_value: bytes[112..132].to_vec() })
}

#[derive(Deserialize)]
struct Json {
    keyslots: BTreeMap<String, serde_json::Value>,
    segments: BTreeMap<String, JsonSegment>,
    digests: BTreeMap<String, JsonDigest>,
    #[serde(default)]
    config: JsonConfig,
}

#[derive(Default, Deserialize)]
struct JsonConfig {
    #[serde(default)]
    requirements: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct JsonKeyslot {
    key_size: usize,
    af: JsonAf,
    area: JsonArea,
    kdf: JsonKdf,
}

#[derive(Deserialize)]
struct JsonAf {
    stripes: u64,
    hash: String,
}

#[derive(Deserialize)]
struct JsonArea {
    offset: String,
    encryption: String,
    key_size: usize,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum JsonKdf {
    #[serde(rename = "pbkdf2")]
    Pbkdf2 { hash: String, iterations: u32, salt: String },
    #[serde(rename = "argon2i")]
    Argon2i { time: u32, memory: u32, cpus: u32, salt: String },
    #[serde(rename = "argon2id")]
    Argon2id { time: u32, memory: u32, cpus: u32, salt: String },
}

#[derive(Deserialize)]
struct JsonSegment {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    #[serde(default)]
    iv_tweak: String,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    sector_size: u64,
}

#[derive(Deserialize)]
struct JsonDigest {
    keyslots: Vec<String>,
    segments: Vec<String>,
    hash: String,
    iterations: u32,
    salt: String,
    digest: String,
}

fn decode(base64: &str) -> Result<Vec<u8>> {
    Base64::decode_vec(base64).map_err(|_| wrong("its header holds no base64 where it should"))
}

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|_| wrong(format!("its header holds {text:?} where a number should be")))
}

impl JsonKdf {
    fn checked(&self) -> Result<Kdf> {
        Ok(match self {
            JsonKdf::Pbkdf2 { hash, iterations, salt } => {
                Kdf::Pbkdf2 { hash: Hash::by_name(hash)?, iterations: *iterations, salt: decode(salt)? }
            }
            JsonKdf::Argon2i { time, memory, cpus, salt }
            | JsonKdf::Argon2id { time, memory, cpus, salt } => Kdf::Argon2 {
                id: matches!(self, JsonKdf::Argon2id { .. }),
                time: *time,
                memory: *memory,
                cpus: *cpus,
                salt: decode(salt)?,
            },
        })
    }
}

/// The JSON of the header at `at`, with its sequence number, if it is whole.
fn whole(file: &dyn Layer, at: u64, magic: &[u8; 6]) -> Result<Option<(u64, Vec<u8>)>> {
    let mut binary = vec![0; BINARY];
    file.read(at, &mut binary)?;
    let be64 = |at: usize| binary[at..at + 8].iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let (size, sequence, place) = (be64(8), be64(16), be64(256));
    if &binary[..6] != magic
        || binary[6..8] != [0, 2]
        || place != at
        || !(BINARY as u64 + 4096..=MOST_HEADER).contains(&size)
        || !size.is_multiple_of(4096)
    {
        return Ok(None);
    }
    let mut all = vec![0; size as usize];
    file.read(at, &mut all)?;
    let stored: Vec<u8> = all[448..512].to_vec();
    all[448..512].fill(0);
    let sum = match text(&binary[72..104])? {
        "sha256" => Sha256::digest(&all).to_vec(),
        "sha512" => Sha512::digest(&all).to_vec(),
        other => return Err(wrong(format!("checksum {other:?} is not supported"))),
    };
    Ok((stored[..sum.len()] == sum).then(|| (sequence, all.split_off(BINARY))))
}

fn luks2(file: &dyn Layer, start: &[u8]) -> Result<Volume> {
    let first = whole(file, 0, MAGIC)?;
    // Of the same length as the first; if that is damaged, it is looked for at the lengths that there are.
    let said = start[8..16].iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let mut places = vec![said];
    if first.is_none() {
        places.extend((14..=22).map(|bits| 1u64 << bits));
    }
    let mut best = first;
    for place in places {
        if place >= BINARY as u64 && place <= MOST_HEADER && place.is_multiple_of(4096) {
            let second = whole(file, place, SECOND_MAGIC)?;
            best = [best, second].into_iter().flatten().max_by_key(|(sequence, _)| *sequence);
        }
    }
    let Some((_, json)) = best else {
        return Err(wrong("this is no LUKS volume, or both of its headers are damaged"));
    };
    let json: Json = serde_json::from_str(text(&json)?).map_err(|e| wrong(format!("its header: {e}")))?;
    json.checked()
}

impl Json {
    fn checked(&self) -> Result<Volume> {
        if self.config.requirements.as_ref().is_some_and(|r| r.to_string().contains("reencrypt")) {
            return Err(wrong("re-encryption was begun and not finished; run cryptsetup reencrypt"));
        }
        let mut segments = self.segments.iter();
        let (Some((id, segment)), None) = (segments.next(), segments.next()) else {
            return Err(wrong("volumes of more than one segment are not supported"));
        };
        if segment.kind != "crypt" {
            return Err(wrong(format!("a segment of type {:?} is not supported", segment.kind)));
        }
        check_cipher(&segment.encryption)?;
        if ![512, 1024, 2048, 4096].contains(&segment.sector_size) {
            return Err(wrong(format!("sectors of {} bytes are not supported", segment.sector_size)));
        }
        let digest = self.digests.values().find(|digest| digest.segments.contains(id));
        let digest = digest.ok_or_else(|| wrong("its header has no digest of the key"))?;
        let mut keyslots = Vec::new();
        for name in &digest.keyslots {
            let Some(slot) = self.keyslots.get(name) else { continue };
            // Slots for other purposes are of other shapes.
            let Ok(slot) = serde_json::from_value::<JsonKeyslot>(slot.clone()) else { continue };
            check_cipher(&slot.area.encryption)?;
            let sizes = [slot.key_size, slot.area.key_size];
            if sizes.iter().any(|len| *len == 0 || *len > MOST_KEY)
                || slot.af.stripes == 0
                || slot.af.stripes.saturating_mul(slot.key_size as u64) > MOST_SPLIT
            {
                return Err(wrong("a keyslot is of an impossible size"));
            }
            keyslots.push(Keyslot {
                kdf: slot.kdf.checked()?,
                offset: number(&slot.area.offset)?,
                stripes: slot.af.stripes,
                af_hash: Hash::by_name(&slot.af.hash)?,
                key_len: slot.key_size,
                area_key_len: slot.area.key_size,
            });
        }
        let len = if segment.size == "dynamic" { None } else { Some(number(&segment.size)?) };
        let iv_tweak = if segment.iv_tweak.is_empty() { 0 } else { number(&segment.iv_tweak)? };
        let digest_value = decode(&digest.digest)?;
        if digest_value.len() < 16 || digest_value.len() > 64 {
            return Err(wrong("its digest is of an impossible size"));
        }
        let (salt, hash) = (decode(&digest.salt)?, Hash::by_name(&digest.hash)?);
        Ok(Volume {
            segment: Segment { offset: number(&segment.offset)?, len, sector: segment.sector_size, iv_tweak },
            keyslots,
            digest: Kdf::Pbkdf2 { hash, iterations: digest.iterations, salt },
            digest_value,
        })
    }
}

//! The state file: a line of header (magic, version, length, checksum), then JSON. Replaced as a whole: written beside, synced,
//! renamed, directory synced.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Persist, State};

const MAGIC: &str = "bulkhead-dom0-state";
/// Version of the body. A newer one is refused; older ones are read.
const VERSION: u32 = 1;
/// Largest file read or written, bytes.
const MAX_BYTES: u64 = 16 << 20;
const FILE: &str = "state.json";

#[derive(Serialize, Deserialize)]
struct Header {
    magic: String,
    version: u32,
    bytes: u64,
    crc32c: u32,
}

/// Why the state could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system refused.
    #[error("state file {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("state file {path} is damaged ({what}); it was kept as {kept}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// Where it is now.
        kept: PathBuf,
    },
    /// It is from a newer program.
    #[error(
        "state file {path} has version {version}, this program knows {VERSION}: run the newer dom0-supervisor"
    )]
    Newer {
        /// Which.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// It would be too large.
    #[error("the state would be {0} bytes, more than {MAX_BYTES}; remove guests")]
    TooLarge(u64),
    /// Tests: the process was "killed" here.
    #[error("killed")]
    Killed,
}

/// The state file of one state directory.
#[derive(Debug)]
pub struct StateFile {
    dir: PathBuf,
}

impl StateFile {
    /// Opens the directory (made if missing) and reads what is there; a missing file is an empty state. A damaged file is moved
    /// aside and told in the second part: dom0 has to run, and what runs is found in hv-core's table.
    ///
    /// # Errors
    /// The file system's; a file of a newer version.
    pub fn open(dir: &Path) -> Result<(StateFile, State, Option<StateError>), StateError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { path, source }
        };
        fs::create_dir_all(dir).map_err(io(dir))?;
        let path = dir.join(FILE);
        let this = StateFile { dir: dir.to_owned() };
        let bytes = match File::open(&path) {
            Ok(file) => {
                let mut bytes = Vec::new();
                file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io(&path))?;
                bytes
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((this, State::default(), None)),
            Err(e) => return Err(io(&path)(e)),
        };
        match decode(&bytes) {
            Ok(state) => Ok((this, state, None)),
            Err(Bad::Newer(version)) => Err(StateError::Newer { path, version }),
            Err(Bad::Damaged(what)) => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                let kept = dir.join(format!("{FILE}.damaged-{}", now.map_or(0, |d| d.as_secs())));
                fs::rename(&path, &kept).map_err(io(&path))?;
                Ok((this, State::default(), Some(StateError::Damaged { path, what, kept })))
            }
        }
    }
}

enum Bad {
    Newer(u32),
    Damaged(String),
}

fn encode(state: &State) -> Result<Vec<u8>, StateError> {
    let damaged = |e: serde_json::Error| StateError::Io { path: FILE.into(), source: e.into() };
    let body = serde_json::to_vec_pretty(state).map_err(damaged)?;
    let header = Header {
        magic: MAGIC.into(),
        version: VERSION,
        bytes: body.len() as u64,
        crc32c: crc32c::crc32c(&body),
    };
    let mut out = serde_json::to_vec(&header).map_err(damaged)?;
    out.push(b'\n');
    out.extend_from_slice(&body);
    out.push(b'\n');
    if out.len() as u64 > MAX_BYTES {
        return Err(StateError::TooLarge(out.len() as u64));
    }
    Ok(out)
}

fn decode(bytes: &[u8]) -> Result<State, Bad> {
    let damaged = |what: &str| Bad::Damaged(what.to_owned());
    if bytes.len() as u64 > MAX_BYTES {
        return Err(damaged("too large"));
    }
    let end = bytes.iter().position(|b| *b == b'\n').ok_or_else(|| damaged("no header"))?;
    let header: Header = serde_json::from_slice(&bytes[..end]).map_err(|_| damaged("header"))?;
    if header.magic != MAGIC {
        return Err(damaged("another kind of file"));
    }
    if header.version > VERSION {
        return Err(Bad::Newer(header.version));
    }
    let body = usize::try_from(header.bytes).ok().and_then(|len| bytes[end + 1..].get(..len));
    let body = body.ok_or_else(|| damaged("cut short"))?;
    if crc32c::crc32c(body) != header.crc32c {
        return Err(damaged("checksum"));
    }
    serde_json::from_slice(body).map_err(|e| Bad::Damaged(e.to_string()))
}

impl Persist for StateFile {
    fn save(&mut self, state: &State) -> Result<(), StateError> {
        let bytes = encode(state)?;
        let new = self.dir.join(format!("{FILE}.new"));
        let io = |source| StateError::Io { path: new.clone(), source };
        let mut file = File::create(&new).map_err(io)?;
        file.write_all(&bytes).map_err(io)?;
        file.sync_all().map_err(io)?;
        fs::rename(&new, self.dir.join(FILE)).map_err(io)?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_read_and_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut file, state, _) = StateFile::open(dir.path()).unwrap();
        assert_eq!(state, State::default());
        let state = State { next_saga: 42, ..State::default() };
        file.save(&state).unwrap();
        file.save(&state).unwrap();
        assert_eq!(StateFile::open(dir.path()).unwrap().1, state);

        // Every single flipped bit, every cut: damaged, never a wrong state, never a panic.
        let path = dir.path().join(FILE);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() - 1 {
            let mut bad = good.clone();
            bad[at] ^= 1;
            match decode(&bad) {
                Err(_) => {}
                Ok(read) => assert_eq!(read, state, "byte {at}"),
            }
            assert!(decode(&good[..at]).is_err(), "cut at {at}");
        }
        fs::write(&path, &good[..good.len() / 2]).unwrap();
        let (_, state, damage) = StateFile::open(dir.path()).unwrap();
        assert_eq!(state, State::default());
        assert!(damage.unwrap().to_string().contains("damaged"));
        assert!(!path.exists(), "moved aside");

        let newer = String::from_utf8(good).unwrap().replacen("\"version\":1", "\"version\":2", 1);
        fs::write(&path, newer).unwrap();
        assert!(matches!(StateFile::open(dir.path()), Err(StateError::Newer { version: 2, .. })));
    }
}

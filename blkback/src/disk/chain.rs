//! From dom0's configuration to an open disk.
//!
//! `--disk FORMAT:NAME` for the guest's disk, then one for each of its backing files in order. Nothing is probed and nothing is
//! opened that is not named there: the files behind the names are the approved resources `disk`, `disk-1`, `disk-2`, …
//!
//! | FORMAT | is |
//! |---|---|
//! | `raw` | the bytes as they are |
//! | `qcow2` | a qcow2 image |
//! | `luks`, `luks+qcow2` | the same inside a LUKS volume; the key is the resource `key-HASH` |
//! | `nbd`, `nbd+luks`, … | the same on an NBD server; NAME is `EXPORT@ADDRESS`, and the resource is a connection |

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use domain_kit::mem::SharedMem;
use domain_kit::resource_of;
use hv_abi::resource_kind;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{SFlag, fstat};
use zeroize::Zeroizing;

use super::attachment::Fence;
use super::commit::CommitLayer;
use super::layer::{FileLayer, Layer};
use super::luks::{LuksLayer, Volume};
use super::nbd::session::{self, Kept, STATE_BYTES};
use super::nbd::{Connector, NbdLayer};
use super::pool::LayeredDisk;
use super::qcow2::header::NewImage;
use super::qcow2::{self, Image, log::Log};
use super::source::SourceError;

/// Most backing files.
pub const MOST_BACKING: usize = 16;
/// The name of the one file when none is named.
const PLAIN: &str = "disk";
/// A new overlay is smaller than this; what is larger is never formatted.
const NEW_MOST: u64 = 64 << 20;

/// One file of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSpec {
    /// On an NBD server.
    pub nbd: bool,
    /// In a LUKS volume.
    pub luks: bool,
    /// A qcow2 image; if not, raw.
    pub qcow2: bool,
    /// As approved: the path, or the export and address.
    pub name: String,
}

impl FromStr for FileSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (format, name) = text.split_once(':').ok_or("must be FORMAT:NAME")?;
        let mut spec = FileSpec { nbd: false, luks: false, qcow2: false, name: name.to_owned() };
        let mut words: Vec<&str> = format.split('+').collect();
        let mut first_is = |word: &str| {
            let found = words.first() == Some(&word);
            if found {
                words.remove(0);
            }
            found
        };
        spec.nbd = first_is("nbd");
        spec.luks = first_is("luks");
        spec.qcow2 = first_is("qcow2");
        if !spec.qcow2 {
            first_is("raw");
        }
        if !words.is_empty() || name.is_empty() {
            return Err(format!("format {format:?} is not known: raw, qcow2, luks, luks+qcow2, nbd, nbd+…"));
        }
        Ok(spec)
    }
}

/// A disk's files, the guest's first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    files: Vec<FileSpec>,
    /// Nothing is written.
    pub read_only: bool,
    /// What the first file has goes into the second while it is served: see [`super::commit`].
    pub commit: bool,
}

impl Chain {
    /// No `files` at all means one raw file.
    ///
    /// # Errors
    /// One line: too many, or a backing file behind what can have none.
    pub fn new(mut files: Vec<FileSpec>, read_only: bool) -> Result<Chain, String> {
        if files.is_empty() {
            files.push(FileSpec { nbd: false, luks: false, qcow2: false, name: PLAIN.into() });
        }
        if files.len() > MOST_BACKING + 1 {
            return Err(format!("at most {MOST_BACKING} backing files"));
        }
        match files[..files.len() - 1].iter().find(|file| !file.qcow2) {
            Some(file) => Err(format!("{}: only qcow2 images have backing files", file.name)),
            None => Ok(Chain { files, read_only, commit: false }),
        }
    }

    /// The same, to be committed.
    ///
    /// # Errors
    /// One line: nothing is below it, or it is read-only.
    pub fn with_commit(mut self) -> Result<Chain, String> {
        if self.read_only || self.files.len() < 2 {
            return Err("only what is written over a backing file can be committed".into());
        }
        self.commit = true;
        Ok(self)
    }

    /// One raw file or device, which is served without layers.
    pub fn is_plain(&self) -> bool {
        let file = &self.files[0];
        self.files.len() == 1 && !file.nbd && !file.luks && !file.qcow2
    }

    /// Its log in the fd store is needed.
    pub fn wants_log(&self) -> bool {
        self.files.iter().any(|file| file.qcow2)
    }
}

/// Where approved resources come from.
pub trait Approved: Send + Sync {
    /// Opens one afresh: its kind and descriptor.
    ///
    /// # Errors
    /// In words.
    fn open(&self, name: &str) -> Result<(u32, OwnedFd), String>;

    /// Memory that outlives the process, [`KEPT_BYTES`] long, zeroed when it is made: the key of an unlocked volume, so that the next
    /// incarnation does not spend Argon2's seconds again; what an NBD session has under way.
    fn kept(&self, _name: &str) -> Option<SharedMem> {
        None
    }

    /// Keeps a socket for the next incarnation, in place of what was kept under that name.
    ///
    /// # Errors
    /// In words.
    fn keep_socket(&self, _name: &str, _socket: &OwnedFd) -> Result<(), String> {
        Ok(())
    }

    /// What was kept.
    fn kept_socket(&self, _name: &str) -> Option<OwnedFd> {
        None
    }
}

/// See [`Approved::kept`].
pub const KEPT_BYTES: usize = 4096;

fn fnv(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

impl Approved for domain_kit::Hypercall {
    fn open(&self, name: &str) -> Result<(u32, OwnedFd), String> {
        self.resource_open(name).map_err(|e| match e.errno() {
            Some(errno) => errno.desc().to_owned(),
            None => e.to_string(),
        })
    }

    fn kept(&self, name: &str) -> Option<SharedMem> {
        let kept = domain_kit::fdstore::kept_memory(self, name, KEPT_BYTES);
        kept.map(|(mem, _)| mem).inspect_err(|error| tracing::warn!(name, %error, "nothing is kept")).ok()
    }

    fn keep_socket(&self, name: &str, socket: &OwnedFd) -> Result<(), String> {
        self.fd_put(name, hv_abi::fd_kind::SOCKET, 0, socket).map_err(|e| e.to_string())
    }

    fn kept_socket(&self, name: &str) -> Option<OwnedFd> {
        self.fd_get(name).ok().map(|(_, fd)| fd)
    }
}

struct Opened {
    layer: Arc<dyn Layer>,
    identity: u64,
    drain: Duration,
    how: &'static str,
}

/// Memory for changes of qcow2 tables.
#[derive(Clone, Debug, Default)]
pub struct Logs {
    /// Of the guest's image.
    pub main: Option<Arc<SharedMem>>,
    /// Of the backing file that it is committed to.
    pub commit: Option<Arc<SharedMem>>,
    /// See [`CommitLayer::new`].
    pub mark: Option<Arc<SharedMem>>,
}

/// Opens and fences a chain. What a predecessor left in the logs is taken up, also if the image that it is of has another place in the
/// chain since: a snapshot makes the guest's image a backing file, a commit the backing file the guest's image.
///
/// # Errors
/// [`SourceError`], one line.
pub fn open(
    chain: &Chain,
    approved: &Arc<dyn Approved>,
    logs: &Logs,
    patience: Duration,
) -> Result<LayeredDisk, SourceError> {
    let last = chain.files.len() - 1;
    let mut below: Option<(Arc<dyn Layer>, &FileSpec)> = None;
    for index in (1..=last).rev() {
        let spec = &chain.files[index];
        let target = chain.commit && index == 1;
        recover(spec, approved, below.clone(), logs.main.as_ref(), patience)?;
        let log = if target {
            logs.commit.clone()
        } else {
            recover(spec, approved, below.clone(), logs.commit.as_ref(), patience)?;
            None
        };
        let opened = open_source(spec, approved, !target, patience)?;
        below = Some((open_format(spec, opened.layer, below, !target, log, opened.identity)?, spec));
    }
    let spec = &chain.files[0];
    if !chain.read_only {
        recover(spec, approved, below.clone(), logs.commit.as_ref(), patience)?;
    }
    let opened = open_source(spec, approved, chain.read_only, patience)?;
    if spec.qcow2
        && !chain.read_only
        && let Some((backing, backing_spec)) = &below
    {
        format_if_new(&*opened.layer, &**backing, backing_spec)?;
    }
    let base = below.as_ref().map(|(base, _)| base.clone());
    let mut layer =
        open_format(spec, opened.layer, below, chain.read_only, logs.main.clone(), opened.identity)?;
    if layer.len() < 512 {
        return Err(SourceError::TooSmall(layer.len(), 512));
    }
    let fence = Fence { how: opened.how, drain: opened.drain };
    let Some(base) = base.filter(|_| chain.commit) else {
        return Ok(LayeredDisk::new(layer, chain.read_only, fence));
    };
    let commit = CommitLayer::new(layer, base, logs.mark.clone());
    commit.start().map_err(|e| SourceError::Open(format!("no thread: {e}")))?;
    layer = commit.clone();
    Ok(LayeredDisk::new(layer, false, fence).with_commit(commit))
}

/// If the log holds changes of this backing file, from when it was the guest's disk, they go to it now.
fn recover(
    spec: &FileSpec,
    approved: &Arc<dyn Approved>,
    below: Option<(Arc<dyn Layer>, &FileSpec)>,
    log: Option<&Arc<SharedMem>>,
    patience: Duration,
) -> Result<(), SourceError> {
    let Some(log) = log.filter(|_| spec.qcow2) else { return Ok(()) };
    let looked = open_source(spec, approved, true, patience)?;
    if !Log::has_changes(log, looked.identity) {
        return Ok(());
    }
    drop(looked);
    let opened = open_source(spec, approved, false, patience)?;
    let image = open_format(spec, opened.layer, below, false, Some(log.clone()), opened.identity)?;
    tracing::info!(name = spec.name, "the last changes of what is a backing file now are written to it");
    image.settle().map_err(|e| SourceError::Open(e.to_string()))
}

impl FileSpec {
    fn resource(&self, base: &str) -> String {
        if self.name == PLAIN { base.to_owned() } else { resource_of(base, &self.name) }
    }
}

fn open_source(
    spec: &FileSpec,
    approved: &Arc<dyn Approved>,
    read_only: bool,
    patience: Duration,
) -> Result<Opened, SourceError> {
    if spec.nbd {
        return open_nbd(spec, approved, read_only, patience);
    }
    let name = spec.resource("disk");
    let busy = Instant::now() + patience;
    let (kind, fd) = loop {
        match approved.open(&name) {
            Ok(opened) => break opened,
            // A block device that someone else has opened exclusively: a predecessor's I/O perhaps.
            Err(e) if e == Errno::EBUSY.desc() && Instant::now() < busy => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) if e == Errno::EBUSY.desc() => return Err(SourceError::InUse),
            Err(e) => return Err(SourceError::Open(format!("{}: {e}", spec.name))),
        }
    };
    if !read_only && kind == resource_kind::FILE_RO {
        return Err(SourceError::Open(format!("{} is approved for reading only", spec.name)));
    }
    let (file, drain, stat) = lock(fd, read_only, patience)?;
    let device = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFBLK;
    let bytes = (&*file).seek(SeekFrom::End(0)).map_err(|e| SourceError::Open(e.to_string()))?;
    let place = stat.st_dev.to_le_bytes().into_iter().chain(stat.st_ino.to_le_bytes());
    let identity = fnv(spec.name.bytes().chain(place));
    let how = "flock of an open file description of its own, which I/O of the dead one pins";
    let layer = Arc::new(FileLayer::new(file, bytes, device));
    Ok(Opened { layer: unlocked(layer, spec, approved)?, identity, drain, how })
}

fn unlocked(
    mut layer: Arc<dyn Layer>,
    spec: &FileSpec,
    approved: &Arc<dyn Approved>,
) -> Result<Arc<dyn Layer>, SourceError> {
    if spec.luks {
        let failed = |e: std::io::Error| SourceError::Open(format!("{}: {e}", spec.name).replace('\n', " "));
        layer = Arc::new(unlock(layer, spec, approved).map_err(failed)?);
    }
    Ok(layer)
}

/// A connector by hv-core's hand.
struct Connect {
    approved: Arc<dyn Approved>,
    resource: String,
    kept: String,
}

impl Connector for Connect {
    fn connect(&self) -> std::io::Result<OwnedFd> {
        let (kind, socket) = self.approved.open(&self.resource).map_err(std::io::Error::other)?;
        if kind != resource_kind::CONNECT {
            return Err(std::io::Error::other("the resource is no connection"));
        }
        // Before a byte is sent: from then on the next incarnation must be able to wait for the answers.
        self.approved.keep_socket(&self.kept, &socket).map_err(std::io::Error::other)?;
        Ok(socket)
    }
}

fn open_nbd(
    spec: &FileSpec,
    approved: &Arc<dyn Approved>,
    read_only: bool,
    patience: Duration,
) -> Result<Opened, SourceError> {
    let failed = |what: String| SourceError::Open(format!("{}: {what}", spec.name).replace('\n', " "));
    let (export, _) = spec.name.split_once('@').ok_or_else(|| failed("must be EXPORT@ADDRESS".into()))?;
    let (state, socket) = (spec.resource("nbd"), spec.resource("nbd-socket"));
    let kept = match approved.kept(&state) {
        Some(mem) => Kept(mem),
        None => Kept(SharedMem::create("nbd", STATE_BYTES).map_err(|e| failed(e.to_string()))?.0),
    };
    let mut drain = Duration::ZERO;
    if let Some(old) = approved.kept_socket(&socket) {
        drain = match session::drain(&old, &kept, patience) {
            Ok(took) => took,
            Err(e) if e.kind() == std::io::ErrorKind::TimedOut => {
                return Err(failed(
                    "the server has not answered the last requests of the former session".into(),
                ));
            }
            // It has closed the session; see the module for what that means.
            Err(error) => {
                tracing::warn!(name = spec.name, %error, "the server ended the former session without answering all of it");
                Duration::ZERO
            }
        };
    }
    let connector = Connect { approved: approved.clone(), resource: spec.resource("disk"), kept: socket };
    let layer = NbdLayer::open(Box::new(connector), export, kept).map_err(|e| failed(e.to_string()))?;
    if layer.read_only() && !read_only {
        return Err(failed("the server serves it read-only; give mode ro".into()));
    }
    let how = "the former session's requests are answered before it is closed";
    Ok(Opened {
        layer: unlocked(Arc::new(layer), spec, approved)?,
        identity: fnv(spec.name.bytes()),
        drain,
        how,
    })
}

fn unlock(
    layer: Arc<dyn Layer>,
    spec: &FileSpec,
    approved: &Arc<dyn Approved>,
) -> std::io::Result<LuksLayer> {
    let volume = Volume::read(&*layer)?;
    let kept = approved.kept(&spec.resource("luks"));
    // Identity, key, and then that they are there.
    const AT: (usize, usize, usize) = (64, 128, 0);
    let mut id = [0; 64];
    id[..volume.identity().len()].copy_from_slice(volume.identity());
    if let Some(kept) = &kept {
        let len = kept.load_u32(AT.2, Acquire) as usize;
        let mut theirs = [0; 64];
        kept.copy_out(AT.0, &mut theirs);
        if (1..=64).contains(&len) && theirs == id {
            let mut key = Zeroizing::new(vec![0; len]);
            kept.copy_out(AT.1, &mut key);
            return LuksLayer::new(layer, volume.segment, &key);
        }
    }
    let (_, fd) =
        approved.open(&spec.resource("key")).map_err(|e| std::io::Error::other(format!("its key: {e}")))?;
    let mut passphrase = Zeroizing::new(Vec::new());
    File::from(fd).take(MOST_PASSPHRASE + 1).read_to_end(&mut passphrase)?;
    if passphrase.len() as u64 > MOST_PASSPHRASE {
        return Err(std::io::Error::other("its key file is longer than 8 MiB"));
    }
    let key = volume.unlock(&*layer, &passphrase)?;
    if let Some(kept) = &kept {
        kept.store_u32(AT.2, 0, Release);
        kept.copy_in(AT.0, &id);
        kept.copy_in(AT.1, &key);
        kept.store_u32(AT.2, key.len() as u32, Release);
    }
    LuksLayer::new(layer, volume.segment, &key)
}

/// Longest key file, bytes: cryptsetup's.
const MOST_PASSPHRASE: u64 = 8 << 20;

type Locked = (Flock<File>, Duration, nix::sys::stat::FileStat);

fn lock(fd: OwnedFd, shared: bool, patience: Duration) -> Result<Locked, SourceError> {
    let began = Instant::now();
    let stat = fstat(&fd).map_err(|e| SourceError::Open(e.to_string()))?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFREG && kind != SFlag::S_IFBLK {
        return Err(SourceError::Kind);
    }
    let how = if shared { FlockArg::LockSharedNonblock } else { FlockArg::LockExclusiveNonblock };
    let mut file = File::from(fd);
    loop {
        match Flock::lock(file, how) {
            Ok(locked) => return Ok((locked, began.elapsed(), stat)),
            Err((_, Errno::EWOULDBLOCK)) if began.elapsed() >= patience => return Err(SourceError::InUse),
            Err((back, Errno::EWOULDBLOCK)) => {
                file = back;
                std::thread::sleep(Duration::from_micros(500));
            }
            Err((_, e)) => return Err(SourceError::Lock(e.into())),
        }
    }
}

fn open_format(
    spec: &FileSpec,
    layer: Arc<dyn Layer>,
    below: Option<(Arc<dyn Layer>, &FileSpec)>,
    read_only: bool,
    log: Option<Arc<SharedMem>>,
    identity: u64,
) -> Result<Arc<dyn Layer>, SourceError> {
    if !spec.qcow2 {
        return Ok(layer);
    }
    let backing = below.map(|(layer, spec)| (layer, spec.name.clone()));
    let options = qcow2::Options { read_only, backing, log, identity };
    let image = Image::open(layer, options)
        .map_err(|e| SourceError::Open(format!("{}: {e}", spec.name).replace('\n', " ")))?;
    Ok(Arc::new(image))
}

/// An overlay that is empty, or whose making was cut short, is made.
fn format_if_new(file: &dyn Layer, backing: &dyn Layer, spec: &FileSpec) -> Result<(), SourceError> {
    let failed = |e: std::io::Error| SourceError::Open(e.to_string());
    let mut start = [0; 112];
    file.read(0, &mut start).map_err(failed)?;
    if file.len() > NEW_MOST || start.iter().any(|byte| *byte != 0) {
        return Ok(());
    }
    let format = if spec.qcow2 { "qcow2" } else { "raw" };
    // Another program reads the name relative to the overlay or absolute; a source that is no file has none for it.
    let new = NewImage { size: backing.len(), cluster_bits: 16, backing: Some((&spec.name, format)) };
    qcow2::header::create(file, &new).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::attachment::Disk;
    use crate::disk::commit::is_marked;
    use crate::disk::qcow2::log::LOG_BYTES;
    use std::collections::HashMap;
    use std::path::PathBuf;

    struct Files(HashMap<String, (u32, PathBuf)>);

    impl Approved for Files {
        fn open(&self, name: &str) -> Result<(u32, OwnedFd), String> {
            let (kind, path) = self.0.get(name).ok_or("no such resource")?;
            let write = *kind != resource_kind::FILE_RO;
            let file = File::options().read(true).write(write).open(path).map_err(|e| e.to_string())?;
            Ok((*kind, file.into()))
        }
    }

    fn spec(format: &str, path: &std::path::Path) -> FileSpec {
        format!("{format}:{}", path.display()).parse().unwrap()
    }

    fn files(list: &[(u32, &PathBuf)]) -> Arc<dyn Approved> {
        let named = |path: &PathBuf| resource_of("disk", path.to_str().unwrap());
        Arc::new(Files(list.iter().map(|(kind, path)| (named(path), (*kind, (*path).clone()))).collect()))
    }

    const NOW: Duration = Duration::ZERO;
    const RW: u32 = resource_kind::FILE_RW;
    const RO: u32 = resource_kind::FILE_RO;

    fn logs() -> Logs {
        let log = || Some(Arc::new(SharedMem::create("log", LOG_BYTES).unwrap().0));
        Logs { main: log(), commit: log(), mark: log() }
    }

    /// Waits until a commit is over.
    fn committed(disk: &LayeredDisk) {
        let began = Instant::now();
        while !disk.commit().unwrap().finished {
            assert!(disk.commit().unwrap().failed.is_none() && began.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// As the toolstack does it, and with a process that dies in the middle: the overlay goes into its backing file, which is an image with
    /// a backing file of its own, and is the disk alone from then on.
    #[test]
    fn an_overlay_is_committed_and_its_backing_file_is_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (base, disk, over) = (at("base.raw"), at("disk.qcow2"), at("over.qcow2"));
        std::fs::write(&base, vec![1; 1 << 20]).unwrap();
        std::fs::write(&disk, b"").unwrap();
        std::fs::write(&over, b"").unwrap();
        let (logs, specs) = (logs(), [spec("qcow2", &over), spec("qcow2", &disk), spec("raw", &base)]);
        let approved = files(&[(RW, &over), (RW, &disk), (RO, &base)]);
        let open = |from: usize, commit: bool| {
            let chain = Chain::new(specs[from..].to_vec(), false).unwrap();
            let chain = if commit { chain.with_commit().unwrap() } else { chain };
            super::open(&chain, &approved, &logs, NOW).unwrap()
        };
        let lower = open(1, false);
        lower.layer().write(4096, &[2; 8192]).unwrap();
        drop(lower);
        let upper = open(0, false);
        upper.layer().grow(2 << 20).unwrap();
        for n in 0..40u64 {
            upper.layer().write(n * 32768, &[n as u8 | 0x80; 1536]).unwrap();
        }
        upper.layer().write_zeroes(65536, 65536).unwrap();
        let mut want = vec![0; 2 << 20];
        upper.layer().read(0, &mut want).unwrap();
        drop(upper);
        for round in 0..4 {
            let committing = open(0, true);
            committing.layer().write(round * 4096 + 512, &[round as u8; 512]).unwrap();
            want[round as usize * 4096 + 512..][..512].fill(round as u8);
            if round == 3 {
                assert!(!is_marked(logs.mark.as_ref().unwrap()));
                committed(&committing);
                assert!(is_marked(logs.mark.as_ref().unwrap()));
                committing.layer().write(1 << 20, &[0x77; 512]).unwrap();
                want[1 << 20..][..512].fill(0x77);
                assert!(committing.layer().grow(4 << 20).is_err());
            }
            let mut now = vec![0; want.len()];
            committing.layer().read(0, &mut now).unwrap();
            assert!(now == want, "round {round}");
            // Dropped as it is; its thread may still be at work, and the lock with it.
            let weak = Arc::downgrade(committing.layer());
            drop(committing);
            while weak.strong_count() > 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let alone = open(1, false);
        let mut now = vec![0; want.len()];
        alone.layer().read(0, &mut now).unwrap();
        assert!(now == want);
        alone.layer().settle().unwrap();
        drop(alone);
        let out = std::process::Command::new("qemu-img").arg("check").arg(&disk).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert!(std::fs::read(&base).unwrap() == vec![1; 1 << 20], "what is further below is not written");
    }

    #[test]
    fn specifications() {
        let parsed: FileSpec = "nbd+luks+qcow2:e@/run/s".parse().unwrap();
        assert_eq!(parsed, FileSpec { nbd: true, luks: true, qcow2: true, name: "e@/run/s".into() });
        assert!("raw:/x".parse::<FileSpec>().is_ok() && "luks+raw:/x".parse::<FileSpec>().is_ok());
        for bad in ["", "raw", "raw:", "qcow:/x", "qcow2+raw:/x", "luks+nbd:/x"] {
            assert!(bad.parse::<FileSpec>().is_err(), "{bad}");
        }
        let raw: FileSpec = "raw:/x".parse().unwrap();
        assert!(Chain::new(vec![raw.clone(), raw.clone()], false).unwrap_err().contains("only qcow2"));
        assert!(Chain::new(vec![raw], false).unwrap().is_plain());
        assert!(Chain::new(Vec::new(), true).unwrap().is_plain());
    }

    /// A snapshot as the toolstack makes it: an empty file becomes the disk, the disk its backing file; the process is new, and
    /// the old one had changes in the log.
    #[test]
    fn a_disk_becomes_a_backing_file_with_its_last_changes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (base, disk, over) = (at("base.raw"), at("disk.qcow2"), at("over.qcow2"));
        std::fs::write(&base, vec![1; 1 << 20]).unwrap();
        std::fs::write(&disk, b"").unwrap();
        let logs = logs();
        let chain = Chain::new(vec![spec("qcow2", &disk), spec("raw", &base)], false).unwrap();
        let approved = files(&[(RW, &disk), (RO, &base)]);
        let opened = super::open(&chain, &approved, &logs, NOW).unwrap();
        assert_eq!(opened.geometry().sectors, 2048);
        opened.layer().write(4096, &[2; 512]).unwrap();
        // A second process meanwhile is told.
        assert!(matches!(super::open(&chain, &approved, &Logs::default(), NOW), Err(SourceError::InUse)));
        drop(opened);

        std::fs::write(&over, b"").unwrap();
        let chain =
            Chain::new(vec![spec("qcow2", &over), spec("qcow2", &disk), spec("raw", &base)], false).unwrap();
        let list = [(RW, &over), (RW, &disk), (RO, &base)];
        // Half made.
        std::fs::write(&over, vec![0; 70000]).unwrap();
        let opened = super::open(&chain, &files(&list), &logs, NOW).unwrap();
        let mut now = [0; 1024];
        opened.layer().read(4096, &mut now).unwrap();
        assert!(now[..512] == [2; 512] && now[512..] == [1; 512]);
        opened.layer().write(0, &[3; 512]).unwrap();
        opened.layer().settle().unwrap();
        drop(opened);
        for path in [&disk, &over] {
            let out = std::process::Command::new("qemu-img").arg("check").arg(path).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
        let opened = super::open(&chain, &files(&list), &logs, NOW).unwrap();
        opened.layer().read(0, &mut now).unwrap();
        assert!(now[..512] == [3; 512] && now[512..] == [1; 512]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        let chain = Chain::new(vec![spec("qcow2", &path)], false).unwrap();
        let error = |approved: &Arc<dyn Approved>| {
            super::open(&chain, approved, &Logs::default(), NOW).unwrap_err().to_string()
        };
        assert!(error(&files(&[(RW, &path)])).contains("no qcow2 image"));
        assert!(error(&files(&[(RO, &path)])).contains("reading only"));
        assert!(error(&files(&[])).contains("no such resource"));
    }
}

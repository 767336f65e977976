//! A guest's disk: `[[disk]]` of a domain file, or a string in the syntax of xl (Xen's `xl-disk-configuration(5)`).

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{AccessMode, ConfigError, DevType, DiskCache, DiskLimits, DiskOptions, Name, NoSpace, Vdev};

/// Most backing files of an image.
const MOST_BACKING: usize = 16;

/// How an image file holds a disk's bytes. Never probed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// As they are.
    #[default]
    Raw,
    /// QEMU's images.
    Qcow2,
}

impl Format {
    /// As in files and on command lines.
    pub fn word(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// A backing file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backing {
    /// The image file or block device.
    pub path: PathBuf,
    /// How it holds the bytes.
    #[serde(default)]
    pub format: Format,
}

/// An export of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nbd {
    /// `/path/of/a/socket` or `tcp:ADDRESS:PORT`.
    pub server: String,
    /// The export's name.
    #[serde(default)]
    pub export: String,
}

/// A disk. Exactly one of `backend`, `path` and `nbd` is there, or none in an empty cdrom drive: [`DiskEntry::check`] sees to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct DiskEntry {
    /// The guest's name for it.
    pub vdev: Vdev,
    /// A blkback service of the host file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<Name>,
    /// Or a disk of its own: an image file or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Or of a server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<Nbd>,
    /// A disk, or a cdrom drive, which is read-only.
    #[serde(default)]
    pub devtype: DevType,
    /// Read-write, read-only, or written by several.
    #[serde(default)]
    pub mode: AccessMode,
    /// Of the file or export.
    #[serde(default)]
    pub format: Format,
    /// Its backing files, the nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<Backing>,
    /// It is in a LUKS volume, which this file's bytes open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// What the guest writes goes to a file in this directory that is gone when the guest is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<PathBuf>,
    /// How the host's page cache is used.
    #[serde(default)]
    pub cache: DiskCache,
    /// What a full file system under it means.
    #[serde(default)]
    pub no_space: NoSpace,
    /// Bytes of a sector as the guest sees it, 512 or 4096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sector_size: Option<u32>,
    /// Requests a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Requests at once after a rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
    /// Bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// Bytes at once after a rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<u64>,
}

impl Serialize for DiskEntry {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        DiskEntry::serialize(self, to)
    }
}

impl<'de> Deserialize<'de> for DiskEntry {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = DiskEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a disk's table, or a string as xl's disk specifications")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<DiskEntry, E> {
                text.parse().map_err(|e: ConfigError| E::custom(e.0))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DiskEntry, A::Error> {
                let mut entry = DiskEntry::deserialize(MapAccessDeserializer::new(map))?;
                if entry.devtype == DevType::Cdrom {
                    entry.mode = AccessMode::ReadOnly;
                }
                entry.check().map_err(A::Error::custom)?;
                Ok(entry)
            }
        }
        from.deserialize_any(Either)
    }
}

/// Where a disk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSource<'a> {
    /// The host file's service.
    Service(&'a Name),
    /// A driver domain is made for this path.
    Path(&'a PathBuf),
    /// A driver domain is made for this server's export.
    Nbd(&'a Nbd),
}

/// A file of a disk as blkback is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFile<'a> {
    /// As in `qcow2` or `nbd+luks+raw`.
    pub format: String,
    /// What it is called.
    pub name: String,
    /// Where hv-core finds it.
    pub place: Place<'a>,
    /// Is it written?
    pub writable: bool,
    /// Opens its LUKS volume.
    pub key: Option<&'a Path>,
}

/// See [`DiskFile::place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// A file or device.
    Path(&'a Path),
    /// A server.
    Server(&'a str),
    /// A file without a name in this directory.
    Temporary(&'a Path),
}

impl DiskEntry {
    /// Where it comes from.
    pub fn source(&self) -> Option<DiskSource<'_>> {
        match (&self.backend, &self.path, &self.nbd) {
            (Some(name), None, None) => Some(DiskSource::Service(name)),
            (None, Some(path), None) => Some(DiskSource::Path(path)),
            (None, None, Some(nbd)) => Some(DiskSource::Nbd(nbd)),
            _ => None,
        }
    }

    /// One disk by itself: xl's syntax, or the keys of `[[disk]]` as an inline table of TOML (`{vdev = "xvda", …}`).
    ///
    /// # Errors
    /// One line.
    pub fn parse(text: &str) -> Result<DiskEntry, ConfigError> {
        #[derive(Deserialize)]
        struct File {
            disk: DiskEntry,
        }
        if text.trim_start().starts_with('{') {
            let file: File = super::text::parse(&format!("disk = {}", text.trim()), "disk")?;
            return Ok(file.disk);
        }
        text.parse()
    }

    /// How it is served.
    pub fn options(&self) -> DiskOptions {
        DiskOptions { cache: self.cache, no_space: self.no_space, sector_size: self.sector_size }
    }

    /// What the guest may do with it in a second.
    pub fn limits(&self) -> DiskLimits {
        let DiskEntry { iops, iops_burst, bandwidth, bandwidth_burst, .. } = *self;
        DiskLimits { iops, iops_burst, bandwidth, bandwidth_burst }
    }

    /// A cdrom drive without a medium.
    pub fn is_empty_drive(&self) -> bool {
        self.devtype == DevType::Cdrom && self.source().is_none()
    }

    /// A driver domain is made for it and goes with the guest.
    pub fn has_own_backend(&self) -> bool {
        self.backend.is_none()
    }

    /// Is the file that `path` names written? With an overlay it is not.
    pub fn writes_path(&self) -> bool {
        self.mode != AccessMode::ReadOnly && self.overlay.is_none()
    }

    /// One raw file, as blkback takes it without being told of files.
    pub fn is_plain(&self) -> bool {
        self.path.is_some() && self.format == Format::Raw && self.key.is_none() && self.overlay.is_none()
    }

    /// What is wrong, in one line.
    ///
    /// # Errors
    /// That line.
    pub fn check(&self) -> Result<(), String> {
        let vdev = self.vdev.name();
        let bad = |what: &str| Err(format!("disk {vdev}: {what}"));
        let source = match self.source() {
            Some(source) => Some(source),
            None if self.devtype == DevType::Cdrom
                && (&self.backend, &self.path, &self.nbd) == (&None, &None, &None) =>
            {
                None
            }
            None => return bad("give either backend or path or nbd"),
        };
        if self.devtype == DevType::Cdrom && (self.overlay.is_some() || self.mode != AccessMode::ReadOnly) {
            return bad("a cdrom is only read: it has no overlay and no mode but ro");
        }
        if self.sector_size.is_some_and(|bytes| bytes != 512 && bytes != 4096) {
            return bad("sector_size must be 512 or 4096");
        }
        self.limits().check().map_err(|what| format!("disk {vdev}: {what}"))?;
        let paths = self.path.iter().chain(&self.key).chain(&self.overlay);
        for path in paths.chain(self.backing.iter().map(|backing| &backing.path)) {
            let text = path.to_str().unwrap_or_default();
            if !path.is_absolute() || text.contains(|c: char| c.is_control()) {
                return bad(&format!("path {path:?} must be absolute and plain text"));
            }
        }
        if let Some(DiskSource::Service(_)) = source {
            let own = self.format != Format::Raw || self.key.is_some() || self.overlay.is_some();
            if own || !self.backing.is_empty() || self.options() != DiskOptions::default() {
                return bad(
                    "format, backing, key, overlay, cache, no_space and sector_size belong to the [[blkback]] of the host file",
                );
            }
        } else if self.mode == AccessMode::Shared {
            return bad("mode \"w!\" is for a backend of the host file, which several guests name");
        }
        if let Some(DiskSource::Nbd(nbd)) = source {
            let tcp = nbd.server.strip_prefix("tcp:").map(|a| a.parse::<std::net::SocketAddr>().is_ok());
            if !tcp.unwrap_or(nbd.server.starts_with('/')) {
                return bad(
                    "server must be a socket's absolute path or tcp:ADDRESS:PORT, with a numeric address",
                );
            }
            if nbd.export.len() > 255 || nbd.export.contains(|c: char| c.is_control() || c == '@') {
                return bad("export must be at most 255 plain characters without @");
            }
        }
        if self.backing.len() > MOST_BACKING {
            return bad("at most 16 backing files");
        }
        let formats = std::iter::once(self.format).chain(self.backing.iter().map(|b| b.format));
        let raw = formats.take(self.backing.len()).position(|format| format == Format::Raw);
        if raw.is_some() {
            return bad("only a qcow2 image has a backing file; the last of backing may be raw");
        }
        if self.overlay.is_some() && self.mode == AccessMode::ReadOnly {
            return bad("an overlay is for what the guest writes; leave mode out");
        }
        if self.overlay.is_some() && self.backing.len() == MOST_BACKING {
            return bad("at most 15 backing files below an overlay");
        }
        Ok(())
    }

    /// Its files as blkback is told of them, the guest's first. Empty for a service of the host file.
    pub fn files(&self) -> Vec<DiskFile<'_>> {
        let mut out = Vec::new();
        if let Some(dir) = &self.overlay {
            out.push(DiskFile {
                format: "qcow2".into(),
                name: format!("overlay of {}", self.vdev.name()),
                place: Place::Temporary(dir),
                writable: true,
                key: None,
            });
        }
        let luks = if self.key.is_some() { "luks+" } else { "" };
        let (nbd, name, place) = match self.source() {
            Some(DiskSource::Path(path)) => ("", path.display().to_string(), Place::Path(path)),
            Some(DiskSource::Nbd(nbd)) => {
                ("nbd+", format!("{}@{}", nbd.export, nbd.server), Place::Server(&nbd.server))
            }
            _ => return Vec::new(),
        };
        let format = format!("{nbd}{luks}{}", self.format.word());
        out.push(DiskFile { format, name, place, writable: self.writes_path(), key: self.key.as_deref() });
        out.extend(self.backing.iter().map(|backing| DiskFile {
            format: backing.format.word().into(),
            name: backing.path.display().to_string(),
            place: Place::Path(&backing.path),
            writable: false,
            key: None,
        }));
        out
    }

    /// The same disk after a snapshot: what it was is the backing file of the image `new`.
    ///
    /// # Errors
    /// Why that cannot be, in one line.
    pub fn after_snapshot(&self, new: &Path) -> Result<DiskEntry, String> {
        let Some(path) = self.path.clone().filter(|_| self.overlay.is_none() && self.key.is_none()) else {
            return Err(
                "only a disk of a file or device of its own, without key and overlay, can have one".into()
            );
        };
        if self.mode == AccessMode::ReadOnly {
            return Err("it is read-only: nothing would go to the new image".into());
        }
        let mut next = self.clone();
        next.backing.insert(0, Backing { path, format: self.format });
        next.path = Some(new.to_owned());
        next.format = Format::Qcow2;
        if next.files().iter().filter(|file| file.name == new.display().to_string()).count() > 1 {
            return Err("it is that file already".into());
        }
        next.check().map(|()| next)
    }

    /// The same disk after a commit: its backing file, which has taken it in.
    ///
    /// # Errors
    /// Why that cannot be, in one line.
    pub fn after_commit(&self) -> Result<DiskEntry, String> {
        if self.path.is_none() || self.overlay.is_some() || self.key.is_some() {
            return Err("only an image file of its own, without key and overlay, can be committed".into());
        }
        if self.mode == AccessMode::ReadOnly {
            return Err("it is read-only: there is nothing to commit".into());
        }
        let mut next = self.clone();
        if next.backing.is_empty() {
            return Err("it has no backing file".into());
        }
        let Backing { path, format } = next.backing.remove(0);
        (next.path, next.format) = (Some(path), format);
        next.check().map(|()| next)
    }

    /// The same drive with this medium, or without one.
    ///
    /// # Errors
    /// Why that cannot be, in one line.
    pub fn with_medium(&self, path: Option<&Path>) -> Result<DiskEntry, String> {
        if self.devtype != DevType::Cdrom {
            return Err("its medium cannot be changed: it has no devtype = \"cdrom\"".into());
        }
        if self.backend.is_some() {
            return Err("its medium is the host file's; change it there".into());
        }
        let mut next = self.clone();
        (next.path, next.nbd) = (path.map(Path::to_owned), None);
        next.backing.clear();
        next.key = None;
        if path.is_none() {
            next.format = Format::Raw;
        }
        next.check().map(|()| next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn toml(text: &str) -> Result<DiskEntry, String> {
        #[derive(Deserialize)]
        struct File {
            disk: Vec<DiskEntry>,
        }
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        Ok(file.disk.into_iter().next().unwrap())
    }

    #[test]
    fn the_syntax_of_xl() {
        // The examples of xl-disk-configuration(5), as far as they name what there is here.
        for (xl, same) in [
            ("/dev/vg/guest-volume,raw,xvda,rw", "path = \"/dev/vg/guest-volume\"\nvdev = \"xvda\""),
            (
                "format=raw, vdev=xvda, access=rw, target=/dev/vg/guest-volume",
                "path = \"/dev/vg/guest-volume\"\nvdev = \"xvda\"",
            ),
            ("/dev/vg/guest-volume,,xvda", "path = \"/dev/vg/guest-volume\"\nvdev = \"xvda\""),
            ("raw:x".split_at(0).0, ""),
            (
                "vdev=xvdb,format=qcow2,access=ro,target=/a,b=c.qcow2",
                "path = \"/a,b=c.qcow2\"\nvdev = \"xvdb\"\nformat = \"qcow2\"\nmode = \"ro\"",
            ),
            (
                "vdev=xvdd,devtype=cdrom,target=/x.iso",
                "path = \"/x.iso\"\nvdev = \"xvdd\"\ndevtype = \"cdrom\"",
            ),
            (",,xvdd,cdrom", "vdev = \"xvdd\"\ndevtype = \"cdrom\""),
            ("vdev=xvdc,access=w!,backend=shared", "backend = \"shared\"\nvdev = \"xvdc\"\nmode = \"w!\""),
        ] {
            if same.is_empty() {
                continue;
            }
            let parsed: DiskEntry = xl.parse().unwrap();
            assert_eq!(parsed, toml(&format!("[[disk]]\n{same}")).unwrap(), "{xl}");
            assert_eq!(toml(&format!("disk = [{xl:?}]")).unwrap(), parsed);
            let json = serde_json::to_string(&parsed).unwrap();
            assert_eq!(serde_json::from_str::<DiskEntry>(&json).unwrap(), parsed);
        }
        for (bad, want) in [
            ("", "vdev is missing"),
            ("/x,raw", "vdev is missing"),
            ("/x,vhd,xvda", "format \"vhd\""),
            ("/x,raw,xvda,rw,more", "one too many"),
            ("x,raw,xvda", "absolute"),
            ("vdev=xvda,vdev=xvdb,target=/x", "twice"),
            ("vdev=xvda,script=evil,target=/x", "script is not known"),
            ("vdev=xvda,access=w!,target=/x", "several guests name"),
            ("vdev=hda,target=/x", "vdev \"hda\""),
            ("vdev=xvda,devtype=floppy,target=/x", "devtype"),
            ("vdev=xvda,devtype=disk", "either backend or path"),
            ("vdev=xvda,backend=b,target=/x", "either backend or path"),
        ] {
            let e = bad.parse::<DiskEntry>().unwrap_err().0;
            assert!(e.contains(want) && !e.contains('\n'), "{bad}: {e}");
        }
    }

    #[test]
    fn files_for_blkback() {
        let of = |text: &str| toml(&format!("[[disk]]\nvdev = \"xvda\"\n{text}")).unwrap();
        let names = |entry: &DiskEntry| -> Vec<(String, String, bool)> {
            entry.files().into_iter().map(|file| (file.format, file.name, file.writable)).collect()
        };
        let owned = |list: &[(&str, &str, bool)]| -> Vec<(String, String, bool)> {
            list.iter().map(|(format, name, w)| ((*format).into(), (*name).into(), *w)).collect()
        };
        let plain = of("path = \"/a\"");
        assert!(plain.is_plain());
        assert_eq!(names(&plain), owned(&[("raw", "/a", true)]));
        let chain = of(
            "path = \"/a\"\nformat = \"qcow2\"\nbacking = [{path = \"/b\", format = \"qcow2\"}, {path = \"/c\"}]",
        );
        assert_eq!(
            names(&chain),
            owned(&[("qcow2", "/a", true), ("qcow2", "/b", false), ("raw", "/c", false)])
        );
        let overlay = of("path = \"/a\"\noverlay = \"/tmp\"");
        assert_eq!(names(&overlay), owned(&[("qcow2", "overlay of xvda", true), ("raw", "/a", false)]));
        let server =
            of("nbd = {server = \"tcp:192.0.2.1:10809\", export = \"e\"}\nkey = \"/k\"\nmode = \"ro\"");
        assert_eq!(names(&server), owned(&[("nbd+luks+raw", "e@tcp:192.0.2.1:10809", false)]));
        let snapshot = chain.after_snapshot(Path::new("/s")).unwrap();
        assert_eq!(
            names(&snapshot),
            owned(&[
                ("qcow2", "/s", true),
                ("qcow2", "/a", false),
                ("qcow2", "/b", false),
                ("raw", "/c", false)
            ])
        );
        assert!(chain.after_snapshot(Path::new("/b")).unwrap_err().contains("already"));
        assert!(
            overlay.after_snapshot(Path::new("/s")).is_err()
                && server.after_snapshot(Path::new("/s")).is_err()
        );
    }

    #[test]
    fn media_and_commits() {
        let of = |text: &str| toml(&format!("[[disk]]\nvdev = \"xvda\"\n{text}")).unwrap();
        let drive = of("devtype = \"cdrom\"");
        assert!(drive.is_empty_drive() && drive.files().is_empty() && drive.has_own_backend());
        let full = drive.with_medium(Some(Path::new("/a.iso"))).unwrap();
        assert!(full.is_plain() && !full.writes_path() && !full.is_empty_drive());
        assert_eq!(full.with_medium(None).unwrap(), drive);
        let disk = of("path = \"/a\"\nformat = \"qcow2\"\nbacking = [{path = \"/b\"}]");
        assert!(disk.with_medium(None).is_err());
        let alone = disk.after_commit().unwrap();
        assert!(alone.is_plain() && alone.path.as_deref() == Some(Path::new("/b")));
        assert!(alone.after_commit().unwrap_err().contains("no backing file"));
        assert_eq!(alone.after_snapshot(Path::new("/a")).unwrap(), disk);
        let limited = of("path = \"/a\"\niops = 100\nbandwidth = 1000000\nbandwidth_burst = 5000000");
        assert_eq!(limited.limits().nodes().map(|(_, value)| value), [100, 0, 1_000_000, 5_000_000]);
        assert_eq!(of("path = \"/a\"\nsector_size = 4096").options().args(), ["--sector-size=4096"]);
    }

    #[test]
    fn mistakes_are_told() {
        for (text, want) in [
            ("path = \"/a\"\nsector_size = 1024", "512 or 4096"),
            ("path = \"/a\"\niops = 0", "more than 0"),
            ("path = \"/a\"\niops_burst = 10", "nothing without iops"),
            ("path = \"/a\"\nbandwidth = \"fast\"", "invalid type"),
            ("path = \"/a\"\niops = -1", "invalid value"),
            ("devtype = \"cdrom\"\noverlay = \"/t\"", "only read"),
            ("devtype = \"disk\"", "give either"),
            ("backend = \"b\"\nsector_size = 512", "belong to the [[blkback]]"),
            ("path = \"/a\"\nbacking = [{path = \"/b\"}]", "only a qcow2"),
            ("path = \"/a\"\nformat = \"vmdk\"", "unknown variant"),
            ("path = \"/a\"\noverlay = \"/t\"\nmode = \"ro\"", "leave mode out"),
            ("backend = \"b\"\nformat = \"qcow2\"", "belong to the [[blkback]]"),
            ("nbd = {server = \"host:1\"}", "numeric address"),
            ("nbd = {server = \"/s\", export = \"a@b\"}", "export"),
            ("path = \"/a\"\nkey = \"k\"", "absolute"),
            ("path = \"/a\"\nsize = 1", "unknown field"),
        ] {
            let e = toml(&format!("[[disk]]\nvdev = \"xvda\"\n{text}")).unwrap_err();
            assert!(e.contains(want), "{text}: {e}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,80}") {
            let _ = text.parse::<DiskEntry>();
        }
    }
}

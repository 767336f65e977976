//! Small checked values.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::ConfigError;

/// Name of a guest or service: 1 to 40 of `a-z A-Z 0-9 . _ -`, not beginning with `.` or `-`, and not a number (a number
/// is a domid).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let chars = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !chars || !first || text.len() > 40 || text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ConfigError::new(format!(
                "name {text:?} must be 1 to 40 of a-z A-Z 0-9 . _ -, begin with a letter or digit, and not be a number"
            )));
        }
        Ok(Name(text.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An Ethernet address of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A stable address for a guest's vif: Xen's prefix 00:16:3e and three bytes made from the guest's uuid.
    pub fn generated(guest: &Uuid, handle: u32) -> Mac {
        let hash = Uuid::new_v5(guest, format!("vif-{handle}").as_bytes());
        let b = hash.as_bytes();
        // The upper half of the last three bytes is Xen's for fixed assignments.
        Mac([0x00, 0x16, 0x3e, b[0] & 0x7f, b[1], b[2]])
    }
}

impl FromStr for Mac {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || {
            ConfigError::new(format!(
                "mac {text:?} must be six hexadecimal bytes as 00:16:3e:01:02:03, not a multicast address"
            ))
        };
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(bad)?, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(bad());
        }
        Ok(Mac(mac))
    }
}

impl TryFrom<String> for Mac {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A virtual block device's name as the guest sees it: `xvda` … `xvdiz`, with a partition number perhaps. Its number is that of
/// Xen's `docs/man/xen-vbd-interface.7`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Vdev {
    name: String,
    number: u32,
}

impl Default for Vdev {
    /// The first disk.
    fn default() -> Self {
        Vdev { name: "xvda".into(), number: 202 << 8 }
    }
}

impl Vdev {
    /// As in `xvda1`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What stands in xenstore as the device's directory and as `virtual-device`.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl FromStr for Vdev {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || {
            ConfigError::new(format!("vdev {text:?} must be xvda to xvdiv, perhaps with a partition 1 to 15"))
        };
        let rest = text.strip_prefix("xvd").ok_or_else(bad)?;
        let letters = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_lowercase()).len();
        let (disk, partition) = rest.split_at(letters);
        let disk = match disk.as_bytes() {
            [a] => u32::from(a - b'a'),
            [a, b] => (u32::from(a - b'a') + 1) * 26 + u32::from(b - b'a'),
            _ => return Err(bad()),
        };
        let partition = match partition {
            "" => 0,
            p if !p.starts_with('0') => p.parse::<u32>().ok().filter(|p| *p < 16).ok_or_else(bad)?,
            _ => return Err(bad()),
        };
        let number = match disk {
            0..16 => 202 << 8 | disk << 4 | partition,
            16..256 => 1 << 28 | disk << 8 | partition,
            _ => return Err(bad()),
        };
        Ok(Vdev { name: text.to_owned(), number })
    }
}

impl TryFrom<String> for Vdev {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<Vdev> for String {
    fn from(vdev: Vdev) -> String {
        vdev.name
    }
}

impl AccessMode {
    /// As in files.
    pub fn word(self) -> &'static str {
        match self {
            AccessMode::ReadWrite => "rw",
            AccessMode::ReadOnly => "ro",
            AccessMode::Shared => "w!",
        }
    }
}

/// May the guest write?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessMode {
    /// Reads and writes.
    #[default]
    #[serde(rename = "rw")]
    ReadWrite,
    /// Reads only.
    #[serde(rename = "ro")]
    ReadOnly,
    /// Reads and writes a disk that others write too, at its own risk.
    #[serde(rename = "w!")]
    Shared,
}

/// How the host's page cache is used for a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    /// Not at all: O_DIRECT. As xl's raw disks.
    #[default]
    None,
    /// Reads and writes go through it.
    Writeback,
    /// Reads come from it; each write is on the medium when it is answered.
    Writethrough,
}

/// What a full file system under a disk means to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoSpace {
    /// Writes fail.
    #[default]
    Report,
    /// The guest's disk stops until there is room.
    Stop,
}

/// How a disk is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// The page cache.
    pub cache: DiskCache,
    /// A full file system.
    pub no_space: NoSpace,
    /// Bytes of a sector, if the default is not wanted.
    pub sector_size: Option<u32>,
}

/// What kind of drive the guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DevType {
    /// A disk.
    #[default]
    Disk,
    /// A drive whose medium can be changed, and is only read.
    Cdrom,
}

impl DevType {
    /// As in files and in xenstore.
    pub fn word(self) -> &'static str {
        match self {
            DevType::Disk => "disk",
            DevType::Cdrom => "cdrom",
        }
    }
}

/// What a guest may do with a disk in a second; `None` is no limit, and of a burst a tenth of a second's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Requests.
    pub iops: Option<u64>,
    /// Requests at once after a rest.
    pub iops_burst: Option<u64>,
    /// Bytes.
    pub bandwidth: Option<u64>,
    /// Bytes at once after a rest.
    pub bandwidth_burst: Option<u64>,
}

impl DiskLimits {
    /// What is wrong, in one line.
    ///
    /// # Errors
    /// That line.
    pub fn check(self) -> Result<(), String> {
        let DiskLimits { iops, iops_burst, bandwidth, bandwidth_burst } = self;
        let pairs = [("iops", iops, iops_burst), ("bandwidth", bandwidth, bandwidth_burst)];
        for (name, rate, burst) in pairs {
            if rate == Some(0) || burst == Some(0) {
                return Err(format!(
                    "{name} and {name}_burst must be more than 0; leave them out for no limit"
                ));
            }
            if burst.is_some() && rate.is_none() {
                return Err(format!("{name}_burst is nothing without {name}"));
            }
        }
        Ok(())
    }

    /// blkback's nodes of them; 0 where there is none.
    pub fn nodes(self) -> [(&'static str, u64); 4] {
        [
            ("limit-iops", self.iops.unwrap_or(0)),
            ("limit-iops-burst", self.iops_burst.unwrap_or(0)),
            ("limit-bytes", self.bandwidth.unwrap_or(0)),
            ("limit-bytes-burst", self.bandwidth_burst.unwrap_or(0)),
        ]
    }
}

impl DiskOptions {
    /// blkback's arguments; none for what is blkback's default anyway.
    pub fn args(self) -> Vec<String> {
        let mut args = Vec::new();
        let cache = match self.cache {
            DiskCache::None => None,
            DiskCache::Writeback => Some("writeback"),
            DiskCache::Writethrough => Some("writethrough"),
        };
        if let Some(cache) = cache {
            args.extend(["--cache".to_owned(), cache.to_owned()]);
        }
        if self.no_space == NoSpace::Stop {
            args.extend(["--no-space".to_owned(), "stop".to_owned()]);
        }
        // One word: what guests have read of it holds for the life of their backend.
        args.extend(self.sector_size.map(|bytes| format!("--sector-size={bytes}")));
        args
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn vdev_numbers_are_xens() {
        for (name, number) in [
            ("xvda", 51712),
            ("xvda1", 51713),
            ("xvdb", 51728),
            ("xvdp15", 51967),
            ("xvdq", 1 << 28 | 16 << 8),
        ] {
            assert_eq!(name.parse::<Vdev>().unwrap().number(), number, "{name}");
        }
        assert_eq!("xvdaa".parse::<Vdev>().unwrap().number(), 1 << 28 | 26 << 8);
        for bad in ["", "xvd", "sda", "xvda0", "xvda16", "xvdA", "xvdzz", "xvda1x", "xvdaaa", "xvda01"] {
            assert!(bad.parse::<Vdev>().is_err(), "{bad}");
        }
    }

    #[test]
    fn macs() {
        let mac: Mac = "00:16:3e:0A:0b:0c".parse().unwrap();
        assert_eq!(mac.to_string(), "00:16:3e:0a:0b:0c");
        for bad in [
            "",
            "00:16:3e:0a:0b",
            "01:16:3e:0a:0b:0c",
            "00:00:00:00:00:00",
            "+0:16:3e:0a:0b:0c",
            "00:16:3e:0a:0b:0c:0d",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        let guest = Uuid::from_u128(7);
        assert_eq!(Mac::generated(&guest, 0), Mac::generated(&guest, 0), "stable");
        assert_ne!(Mac::generated(&guest, 0), Mac::generated(&guest, 1));
        assert_eq!(Mac::generated(&guest, 0).0[..3], [0, 0x16, 0x3e]);
    }

    #[test]
    fn names() {
        for good in ["a", "debian-13", "_x", "a.b", "0day"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "12", "a b", "-a", ".a", "a/b", "ä"] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC*") {
            let _ = text.parse::<Vdev>();
            let _ = text.parse::<Mac>();
            let _ = text.parse::<Name>();
        }

        #[test]
        fn vdev_numbers_differ(a in "xvd[a-h]?[a-v]([1-9]|1[0-5])?", b in "xvd[a-h]?[a-v]([1-9]|1[0-5])?") {
            let (va, vb) = (a.parse::<Vdev>().unwrap(), b.parse::<Vdev>().unwrap());
            prop_assert_eq!(va.number() == vb.number(), a == b);
        }
    }
}

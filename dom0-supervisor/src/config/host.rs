//! The host file: services, directories, defaults. See `docs/host-file.md`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{AccessMode, Backing, ConfigError, DiskCache, DiskEntry, Format, Name, Nbd, NoSpace, text};

/// The host file, checked.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostFile {
    /// Where the programs are. Empty: beside dom0-supervisor's own.
    #[serde(default)]
    pub bin_dir: PathBuf,
    /// Where the desired state is kept.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Domain files in this directory with `autostart = true` are made when the host starts.
    pub domain_dir: Option<PathBuf>,
    /// Restart policy of every service that has none of its own.
    #[serde(default)]
    pub restart: RestartEntry,
    /// Limits of every service that has none of its own.
    #[serde(default)]
    pub limits: LimitsEntry,
    /// The xenstore domain.
    #[serde(default)]
    pub xenstored: XenstoredEntry,
    /// The console domain.
    #[serde(default)]
    pub console: ConsoleEntry,
    /// Disks, a driver domain each.
    #[serde(default)]
    pub blkback: Vec<BlkbackEntry>,
    /// Networks, a driver domain each.
    #[serde(default)]
    pub netback: Vec<NetbackEntry>,
    /// Where QEMU is.
    #[serde(default)]
    pub qemu: QemuEntry,
}

/// `[qemu]`: QEMU and what it needs of the host's files. The defaults are Debian's.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QemuEntry {
    /// The program.
    pub program: PathBuf,
    /// The dynamic loader that it names.
    pub loader: PathBuf,
    /// Where its libraries and modules are.
    pub libraries: PathBuf,
    /// Where its firmware is.
    pub firmware: Vec<PathBuf>,
    /// UEFI's code, for guests with `firmware = "uefi"`.
    pub uefi: PathBuf,
    /// The same with Secure Boot, for guests with `secure_boot = true`.
    pub uefi_secure: PathBuf,
}

impl Default for QemuEntry {
    fn default() -> Self {
        QemuEntry {
            program: "/usr/bin/qemu-system-x86_64".into(),
            loader: "/lib64/ld-linux-x86-64.so.2".into(),
            libraries: "/usr/lib/x86_64-linux-gnu".into(),
            firmware: vec!["/usr/share/qemu".into(), "/usr/share/seabios".into()],
            uefi: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
            uefi_secure: "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd".into(),
        }
    }
}

/// `[restart]`: see `RestartPolicy` in hvcore.proto.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestartEntry {
    /// First wait before a restart, milliseconds; doubles; 0 = at once.
    pub backoff_ms: u32,
    /// Longest wait, milliseconds.
    pub backoff_max_ms: u32,
    /// At most so many restarts within the window; 0 = no limit.
    pub burst: u32,
    /// The window, milliseconds.
    pub burst_window_ms: u32,
}

impl Default for RestartEntry {
    fn default() -> Self {
        RestartEntry { backoff_ms: 0, backoff_max_ms: 2_000, burst: 30, burst_window_ms: 60_000 }
    }
}

/// `[limits]`: see `Limits` in hvcore.proto. 0 is hv-core's default everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsEntry {
    /// MiB, guest RAM not counted.
    pub memory: u64,
    /// 1 to 10000.
    pub cpu_weight: u32,
    /// Processes and threads.
    pub pids: u32,
    /// Entries of the fd store.
    pub fd_store: u32,
    /// Event-channel ports.
    pub ports: u32,
    /// Pages of others mapped at once.
    pub map_pages: u32,
    /// Hypercall sockets.
    pub channels: u32,
    /// Buffers for grant copies.
    pub buffers: u32,
    /// MiB of all of them, taken as used.
    pub buffer_memory: u64,
}

/// `[xenstored]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct XenstoredEntry {
    /// Where tools on the host reach the store.
    pub socket: PathBuf,
    /// Permission bits of the socket.
    pub socket_mode: u32,
    /// Instead of the host's default.
    pub restart: Option<RestartEntry>,
    /// Instead of the host's default.
    pub limits: Option<LimitsEntry>,
}

impl Default for XenstoredEntry {
    fn default() -> Self {
        XenstoredEntry {
            socket: "/run/xenstored/socket".into(),
            socket_mode: 0o600,
            restart: None,
            limits: None,
        }
    }
}

/// `[console]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleEntry {
    /// False: guests have no console.
    pub enabled: bool,
    /// Instead of the host's default.
    pub restart: Option<RestartEntry>,
    /// Instead of the host's default.
    pub limits: Option<LimitsEntry>,
}

impl Default for ConsoleEntry {
    fn default() -> Self {
        ConsoleEntry { enabled: true, restart: None, limits: None }
    }
}

/// `[[blkback]]`: one disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkbackEntry {
    /// What domain files call it.
    pub name: Name,
    /// The image file or block device; or `nbd`.
    pub disk: Option<PathBuf>,
    /// An export of a server.
    pub nbd: Option<Nbd>,
    /// How the file or export holds the disk's bytes.
    #[serde(default)]
    pub format: Format,
    /// Its backing files, the nearest first.
    #[serde(default)]
    pub backing: Vec<Backing>,
    /// It is in a LUKS volume, which this file's bytes open.
    pub key: Option<PathBuf>,
    /// What guests write goes to a file in this directory that is gone when the service is.
    pub overlay: Option<PathBuf>,
    /// Bytes of a sector as guests see it.
    pub sector_size: Option<u32>,
    /// More arguments of the program: for tests and debugging.
    #[serde(default)]
    pub args: Vec<String>,
    /// How the host's page cache is used.
    #[serde(default)]
    pub cache: DiskCache,
    /// What a full file system under it means.
    #[serde(default)]
    pub no_space: NoSpace,
    /// Read-write or read-only.
    #[serde(default)]
    pub mode: AccessMode,
    /// Instead of the host's default.
    pub restart: Option<RestartEntry>,
    /// Instead of the host's default.
    pub limits: Option<LimitsEntry>,
}

/// `[[netback]]`: one network.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetbackEntry {
    /// What domain files call it.
    pub name: Name,
    /// The host's interface that moves into the driver domain. None: guests reach each other only.
    pub uplink: Option<String>,
    /// How guests reach the uplink.
    #[serde(default)]
    pub mode: NetbackMode,
    /// Address and prefix length that the driver domain has on the guests' side, as "10.0.0.1/24".
    pub gateway: Option<String>,
    /// Routed: the driver domain's own address on the uplink, as "192.0.2.5/24".
    pub uplink_address: Option<String>,
    /// More arguments of the program: for tests and debugging.
    #[serde(default)]
    pub args: Vec<String>,
    /// Routed: the router behind the uplink.
    pub uplink_gateway: Option<std::net::Ipv4Addr>,
    /// Routed: the IPv6 address that the driver domain has on the guests' side, as "fd00:0:0:1::1/64".
    pub gateway6: Option<String>,
    /// Routed: the driver domain's own IPv6 address on the uplink.
    pub uplink_address6: Option<String>,
    /// Routed: the IPv6 router behind the uplink.
    pub uplink_gateway6: Option<std::net::Ipv6Addr>,
    /// DNS servers, for guests (by DHCP) and for names in firewall rules.
    #[serde(default)]
    pub dns: Vec<std::net::IpAddr>,
    /// Routed: DHCP is offered.
    #[serde(default = "yes")]
    pub dhcp: bool,
    /// Routed: IPv6 routers are advertised.
    #[serde(default = "yes")]
    pub ra: bool,
    /// Instead of the host's default.
    pub restart: Option<RestartEntry>,
    /// Instead of the host's default.
    pub limits: Option<LimitsEntry>,
}

/// How a network backend joins guests and uplink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetbackMode {
    /// One Ethernet.
    #[default]
    Bridged,
    /// One Ethernet, but guests reach the uplink alone.
    Isolated,
    /// IP routing.
    Routed,
    /// IP routing; outside, guests have the uplink's address.
    Nat,
}

fn yes() -> bool {
    true
}

fn default_state_dir() -> PathBuf {
    "/var/lib/bulkhead".into()
}

impl BlkbackEntry {
    /// The same as a guest's disk would be.
    pub fn as_disk(&self) -> DiskEntry {
        DiskEntry {
            path: self.disk.clone(),
            nbd: self.nbd.clone(),
            // Who of its guests writes is theirs to say.
            mode: if self.mode == AccessMode::ReadOnly { self.mode } else { AccessMode::ReadWrite },
            format: self.format,
            backing: self.backing.clone(),
            key: self.key.clone(),
            overlay: self.overlay.clone(),
            cache: self.cache,
            no_space: self.no_space,
            sector_size: self.sector_size,
            ..DiskEntry::default()
        }
    }
}

impl HostFile {
    /// Takes the file's text; `source` is named in errors.
    ///
    /// # Errors
    /// One line, with the place for what TOML itself refuses.
    pub fn parse(text: &str, source: &str) -> Result<HostFile, ConfigError> {
        let file: HostFile = text::parse(text, source)?;
        let bad = |what: String| Err(ConfigError::new(format!("{source}: {what}")));
        let mut names =
            std::collections::BTreeSet::from(["dom0", "dom0-supervisor", "hv-core", "xenstored", "console"]);
        let all = file.blkback.iter().map(|b| &b.name).chain(file.netback.iter().map(|n| &n.name));
        for name in all {
            if !names.insert(name.as_str()) {
                return bad(format!("service name {name} is used twice; give every service its own"));
            }
        }
        let mut dirs = vec![("state_dir", &file.state_dir), ("xenstored.socket", &file.xenstored.socket)];
        dirs.extend(file.domain_dir.as_ref().map(|dir| ("domain_dir", dir)));
        dirs.extend((!file.bin_dir.as_os_str().is_empty()).then_some(("bin_dir", &file.bin_dir)));
        for (key, path) in dirs {
            if !path.is_absolute() {
                return bad(format!("{key} {path:?} must be an absolute path"));
            }
        }
        let mut disks = std::collections::BTreeMap::new();
        for blkback in &file.blkback {
            if blkback.disk.is_some() == blkback.nbd.is_some() {
                return bad(format!("blkback {}: give either disk or nbd", blkback.name));
            }
            let as_disk = blkback.as_disk();
            if let Err(what) = as_disk.check() {
                let what = what.strip_prefix("disk xvda: ").unwrap_or(&what);
                return bad(format!("blkback {}: {what}", blkback.name));
            }
            if as_disk.writes_path()
                && let Some(disk) = &blkback.disk
                && let Some(other) = disks.insert(disk, &blkback.name)
            {
                return bad(format!("blkback {}: disk {disk:?} is that of {other} too", blkback.name));
            }
        }
        let mut uplinks = std::collections::BTreeMap::new();
        for netback in &file.netback {
            if let Some(uplink) = &netback.uplink {
                if uplink.is_empty() || uplink.len() > 15 || uplink.contains(['/', ' ']) {
                    return bad(format!(
                        "netback {}: uplink {uplink:?} is not an interface's name",
                        netback.name
                    ));
                }
                if let Some(other) = uplinks.insert(uplink, &netback.name) {
                    return bad(format!("netback {}: uplink {uplink} is that of {other} too", netback.name));
                }
            }
            let addresses = [
                ("gateway", &netback.gateway, false),
                ("uplink_address", &netback.uplink_address, false),
                ("gateway6", &netback.gateway6, true),
                ("uplink_address6", &netback.uplink_address6, true),
            ];
            for (key, address, six) in addresses {
                if let Some(address) = address
                    && (!is_ip_prefix(address) || address.contains(':') != six)
                {
                    return bad(format!(
                        "netback {}: {key} {address:?} must be an address and prefix length as {}",
                        netback.name,
                        if six { "fd00:0:0:1::1/64" } else { "10.0.0.1/24" }
                    ));
                }
            }
            if netback.mode == NetbackMode::Routed && netback.gateway.is_none() {
                return bad(format!("netback {}: mode \"routed\" needs a gateway", netback.name));
            }
        }
        Ok(file)
    }

    /// The blkback service of this name.
    pub fn blkback(&self, name: &str) -> Option<&BlkbackEntry> {
        self.blkback.iter().find(|b| b.name.as_str() == name)
    }

    /// The netback service of this name.
    pub fn netback(&self, name: &str) -> Option<&NetbackEntry> {
        self.netback.iter().find(|n| n.name.as_str() == name)
    }
}

fn is_ip_prefix(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else { return false };
    let Ok(address) = address.parse::<std::net::IpAddr>() else { return false };
    let most = if address.is_ipv4() { 32 } else { 128 };
    !address.is_unspecified() && length.parse::<u8>().is_ok_and(|l| l <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<HostFile, String> {
        HostFile::parse(text, "host.toml").map_err(|e| e.0)
    }

    #[test]
    fn an_empty_file_has_defaults() {
        let host = parse("").unwrap();
        assert_eq!(host.state_dir, PathBuf::from("/var/lib/bulkhead"));
        assert_eq!(host.xenstored.socket, PathBuf::from("/run/xenstored/socket"));
        assert!(host.console.enabled && host.blkback.is_empty());
    }

    #[test]
    fn the_example_is_valid() {
        let text = include_str!("../../../deploy/examples/host.toml");
        let host = parse(text).unwrap();
        assert!(!host.netback.is_empty());
    }

    #[test]
    fn mistakes_are_one_line() {
        let disk = "[[blkback]]\nname = \"d\"\n";
        for (text, want) in [
            ("[xenstored]\nsockt = \"/x\"".to_owned(), "host.toml:2:1: unknown field `sockt`"),
            ("[[blkback]]\ndisk = \"/x\"".to_owned(), "missing field `name`"),
            (format!("{disk}disk = \"x\""), "absolute"),
            (format!("{disk}disk = \"/x\"\nformat = \"vmdk\""), "unknown variant"),
            (disk.to_owned(), "either disk or nbd"),
            (format!("{disk}disk = \"/x\"\nnbd = {{server = \"/s\"}}"), "either disk or nbd"),
            (format!("{disk}nbd = {{server = \"host:1\"}}"), "host.toml: blkback d: server must be"),
            (format!("{disk}disk = \"/x\"\nbacking = [{{path = \"/y\"}}]"), "only a qcow2"),
            (format!("{disk}disk = \"/x\"\nsector_size = 520"), "512 or 4096"),
            (format!("{disk}disk = \"/x\"\nkey = \"k\""), "absolute"),
            (format!("{disk}disk = \"/x\"\n{disk}disk = \"/y\""), "used twice"),
            ("[[blkback]]\nname = \"dom0\"\ndisk = \"/x\"".to_owned(), "used twice"),
            ("[[netback]]\nname = \"n\"\nuplink = \"a/b\"".to_owned(), "not an interface"),
            ("[[netback]]\nname = \"n\"\ngateway = \"10.0.0.1\"".to_owned(), "prefix length"),
            ("[[netback]]\nname = \"n\"\nmode = \"routed\"".to_owned(), "needs a gateway"),
            ("[[netback]]\nname = \"n\"\nmode = \"tunnel\"".to_owned(), "host.toml:3:8"),
            ("state_dir = \"x\"".to_owned(), "absolute"),
        ] {
            let e = parse(&text).unwrap_err();
            assert!(e.contains(want) && !e.contains('\n'), "{text:?}: {e}");
        }
    }
}

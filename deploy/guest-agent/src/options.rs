//! What the kernel command line asks for.

use std::net::{Ipv4Addr, SocketAddr};

/// The `bh.*` words of the kernel command line; see the table in `main.rs`.
#[derive(Debug, Default, PartialEq)]
pub struct Options {
    pub ip: Option<String>,
    pub gateway: Option<String>,
    pub nic: String,
    pub disk_load: bool,
    pub tcp_load: bool,
    pub ping_load: bool,
    pub disk: String,
    pub span_mib: u64,
    pub threads: usize,
    pub max_blocks: u64,
    pub disk_pause_us: u64,
    pub peer: Option<SocketAddr>,
    pub rate: u64,
    pub ping: Option<Ipv4Addr>,
    pub ping_ms: u64,
    pub seed: u64,
    pub seconds: Option<u64>,
    pub interval_ms: u64,
    pub shell: bool,
    /// Disks that get a file system each.
    pub fs: Vec<String>,
    /// Scripts to be run, one after the other.
    pub run: Vec<String>,
    /// Parameters of the module xen_blkfront.
    pub blkfront: String,
    /// Words that start with `bh.` and mean nothing here.
    pub unknown: Vec<String>,
}

impl Options {
    /// Reads `/proc/cmdline`.
    pub fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(cmdline: &str) -> Self {
        let mut o = Self {
            nic: "eth0".into(),
            disk: "xvda".into(),
            threads: 4,
            max_blocks: 16,
            rate: 1 << 20,
            ping_ms: 100,
            seed: 1,
            interval_ms: 250,
            ..Self::default()
        };
        for word in cmdline.split_whitespace() {
            let Some(rest) = word.strip_prefix("bh.") else {
                continue;
            };
            let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
            if !o.set(key, value) {
                o.unknown.push(word.to_owned());
            }
        }
        if o.ping.is_none()
            && let Some(SocketAddr::V4(peer)) = o.peer
        {
            o.ping = Some(*peer.ip());
        }
        o
    }

    fn set(&mut self, key: &str, value: &str) -> bool {
        fn number<T: std::str::FromStr>(value: &str, to: &mut T) -> bool {
            value.parse().map(|v| *to = v).is_ok()
        }
        match key {
            "ip" => self.ip = Some(value.to_owned()),
            "gw" => self.gateway = Some(value.to_owned()),
            "nic" => value.clone_into(&mut self.nic),
            "disk" => value.clone_into(&mut self.disk),
            "shell" => self.shell = true,
            "blkfront" => self.blkfront = value.replace(',', " "),
            "fs" => self.fs = value.split(',').filter(|d| !d.is_empty()).map(str::to_owned).collect(),
            "run" => match decoded(value) {
                Some(script) => self.run.push(script),
                None => return false,
            },
            "work" => {
                for load in value.split(',') {
                    match load {
                        "disk" => self.disk_load = true,
                        "tcp" => self.tcp_load = true,
                        "ping" => self.ping_load = true,
                        "" | "none" => {}
                        _ => return false,
                    }
                }
            }
            "span" => return number(value, &mut self.span_mib),
            "threads" => return number(value, &mut self.threads),
            "max_blocks" => return number(value, &mut self.max_blocks),
            "disk_pause_us" => return number(value, &mut self.disk_pause_us),
            "rate" => return number(value, &mut self.rate),
            "ping_ms" => return number(value, &mut self.ping_ms),
            "seed" => return number(value, &mut self.seed),
            "interval_ms" => return number(value, &mut self.interval_ms),
            "peer" => {
                self.peer = value.parse().ok();
                return self.peer.is_some();
            }
            "ping" => {
                self.ping = value.parse().ok();
                return self.ping.is_some();
            }
            "seconds" => {
                self.seconds = value.parse().ok();
                return self.seconds.is_some();
            }
            _ => return false,
        }
        true
    }
}

/// `%XX` turned into the byte that it stands for, as in a URL: a word of the command line has no spaces.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let hex = rest.split_off(..2)?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::{Options, decoded};

    #[test]
    fn words_are_read_and_unknown_ones_kept() {
        let o = Options::parse(
            "console=hvc0 bh.ip=10.0.0.2/24 bh.work=disk,ping bh.peer=10.0.0.1:99 bh.span=64 \
             bh.shell bh.colour=red bh.seed=x quiet",
        );
        assert_eq!(o.ip.as_deref(), Some("10.0.0.2/24"));
        assert!(o.disk_load && o.ping_load && !o.tcp_load && o.shell);
        assert_eq!((o.span_mib, o.seed, o.threads), (64, 1, 4));
        assert_eq!(o.ping.map(|p| p.to_string()).as_deref(), Some("10.0.0.1"));
        assert_eq!(o.unknown, ["bh.colour=red", "bh.seed=x"]);
    }

    #[test]
    fn scripts_and_disks_are_read() {
        let o = Options::parse(
            "bh.run=echo%20a%3B%20exit%203 bh.fs=xvda,xvdb bh.run=%2 bh.run=b bh.blkfront=a=1,b=2",
        );
        assert_eq!(o.run, ["echo a; exit 3", "b"]);
        assert_eq!((o.fs.len(), o.blkfront.as_str()), (2, "a=1 b=2"));
        assert_eq!(o.unknown, ["bh.run=%2"]);
        assert_eq!((decoded("%zz"), decoded("%ff"), decoded("%")), (None, None, None));
    }
}

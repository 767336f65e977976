//! The command line.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;

use clap::{Parser, ValueEnum};

/// An IPv4 address with its network's prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Address.
    pub address: Ipv4Addr,
    /// Length.
    pub prefix: u8,
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not A.B.C.D/N");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let network = Network {
            address: address.parse().map_err(|_| wrong())?,
            prefix: prefix.parse().map_err(|_| wrong())?,
        };
        if network.prefix > 32 { Err(wrong()) } else { Ok(network) }
    }
}

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Writes, reads back and verifies the first disk.
    Disk,
    /// A checked stream over TCP, both ways.
    Tcp,
    /// ICMP echo.
    Ping,
}

/// A guest that is a plain process: verified disk and network load over the same rings as any guest's. Started by
/// hv-core as dom0 says.
#[derive(Debug, Parser)]
#[command(name = "process-guest", version)]
pub struct Options {
    /// Address of the NIC.
    #[arg(long)]
    pub ip: Option<Network>,
    /// Default gateway.
    #[arg(long)]
    pub gateway: Option<Ipv4Addr>,
    /// The other end of the TCP stream, also of the ping unless --ping says otherwise.
    #[arg(long)]
    pub peer: Option<SocketAddrV4>,
    /// Whom to ping.
    #[arg(long)]
    pub ping: Option<Ipv4Addr>,
    /// Queues of the NIC, as far as its backend has as many.
    #[arg(long, default_value_t = 1)]
    pub queues: usize,
    /// Seed of all contents and choices.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Which loads run.
    #[arg(long, value_delimiter = ',', default_value = "disk,tcp,ping")]
    pub work: Vec<Work>,
    /// Upper limit of what is sent over TCP, bytes a second; 0 = none.
    #[arg(long, default_value_t = 1 << 20)]
    pub rate: u64,
    /// Time between echo requests, ms.
    #[arg(long, default_value_t = 100)]
    pub ping_ms: u64,
    /// Time between progress lines, ms.
    #[arg(long, default_value_t = 250)]
    pub interval_ms: u64,
    /// Threads of the disk load.
    #[arg(long, default_value_t = 4)]
    pub threads: usize,
    /// Largest request of the disk load, blocks of 4 KiB.
    #[arg(long, default_value_t = 16)]
    pub max_blocks: u64,
    /// Part of the disk that is used, MiB; 0 = all.
    #[arg(long, default_value_t = 0)]
    pub span_mib: u64,
    /// Pause between a disk thread's requests, microseconds.
    #[arg(long, default_value_t = 500)]
    pub disk_pause_us: u64,
    /// Ends the load and powers off after so many seconds.
    #[arg(long)]
    pub seconds: Option<u64>,
}

impl Options {
    /// Whether this load was asked for.
    pub fn wants(&self, work: Work) -> bool {
        self.work.contains(&work)
    }

    /// Whom to ping.
    pub fn ping_peer(&self) -> Option<Ipv4Addr> {
        self.ping.or(self.peer.map(|peer| *peer.ip()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demos_command_line() {
        let line = "process-guest --ip 10.77.0.2/24 --gateway 10.77.0.1 --peer 10.77.0.1:7007 --seed 5";
        let options = Options::parse_from(line.split(' '));
        assert_eq!(options.ip, Some(Network { address: Ipv4Addr::new(10, 77, 0, 2), prefix: 24 }));
        assert_eq!(options.ping_peer(), Some(Ipv4Addr::new(10, 77, 0, 1)));
        assert!(options.wants(Work::Disk) && options.wants(Work::Tcp) && options.wants(Work::Ping));
    }
}

//! Which queue a packet goes to: Toeplitz hashes as the frontend configured them by its control ring (netif.h,
//! "Hash configuration"), else a hash of our own.

use serde::{Deserialize, Serialize};
use xen_abi::io::netif::*;

use crate::headers::{Headers, IpAddrs};
use crate::slots::PacketHash;

/// Longest key, bytes: what a hash over two IPv6 addresses and two ports uses.
pub const MAX_KEY: usize = 40;
/// Most entries of the mapping from hashes to queues.
pub const MAX_MAPPING: usize = 128;

const FLAGS: u32 = XEN_NETIF_CTRL_HASH_TYPE_IPV4
    | XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP
    | XEN_NETIF_CTRL_HASH_TYPE_IPV6
    | XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP;

/// What a frontend wants hashed, and how hashes choose queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashConfig {
    /// Toeplitz; else none is made.
    pub toeplitz: bool,
    /// `XEN_NETIF_CTRL_HASH_TYPE_*`.
    pub flags: u32,
    /// At most [`MAX_KEY`] bytes; what is missing is zero.
    pub key: Vec<u8>,
    /// Queue for each hash modulo its length (0 or a power of two, at most [`MAX_MAPPING`]).
    pub mapping: Vec<u32>,
}

/// A request is refused with this `XEN_NETIF_CTRL_STATUS_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub u32);

impl HashConfig {
    /// Types of hashes that can be asked for.
    pub fn supported() -> u32 {
        FLAGS
    }

    /// Chooses the algorithm (`XEN_NETIF_CTRL_HASH_ALGORITHM_*`).
    ///
    /// # Errors
    /// Invalid parameter.
    pub fn set_algorithm(&mut self, algorithm: u32) -> Result<(), Refused> {
        match algorithm {
            XEN_NETIF_CTRL_HASH_ALGORITHM_NONE => self.toeplitz = false,
            XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ => self.toeplitz = true,
            _ => return Err(Refused(XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER)),
        }
        Ok(())
    }

    /// Chooses the types.
    ///
    /// # Errors
    /// Invalid parameter: unknown types, or no algorithm yet.
    pub fn set_flags(&mut self, flags: u32) -> Result<(), Refused> {
        if flags & !FLAGS != 0 || !self.toeplitz {
            return Err(Refused(XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER));
        }
        self.flags = flags;
        Ok(())
    }

    /// Sets the key.
    ///
    /// # Errors
    /// Buffer overflow: longer than [`MAX_KEY`].
    pub fn set_key(&mut self, key: &[u8]) -> Result<(), Refused> {
        if key.len() > MAX_KEY {
            return Err(Refused(XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW));
        }
        self.key = key.to_vec();
        Ok(())
    }

    /// Sets the mapping's length; all entries become queue 0.
    ///
    /// # Errors
    /// Invalid parameter: more than [`MAX_MAPPING`].
    pub fn set_mapping_size(&mut self, entries: u32) -> Result<(), Refused> {
        let entries = entries as usize;
        if entries > MAX_MAPPING {
            return Err(Refused(XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER));
        }
        self.mapping = vec![0; entries];
        Ok(())
    }

    /// Sets entries of the mapping from number `offset` on; `queues` is how many queues there are.
    ///
    /// # Errors
    /// Invalid parameter: beyond the mapping, or a queue that does not exist.
    pub fn set_mapping(&mut self, offset: u32, entries: &[u32], queues: usize) -> Result<(), Refused> {
        let offset = offset as usize;
        let end = offset.checked_add(entries.len()).filter(|&end| end <= self.mapping.len());
        let (Some(end), true) = (end, entries.iter().all(|&q| (q as usize) < queues)) else {
            return Err(Refused(XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER));
        };
        self.mapping[offset..end].copy_from_slice(entries);
        Ok(())
    }

    /// The hash of a packet, if it is of a type that was asked for.
    pub fn hash(&self, headers: &Headers<'_>) -> Option<PacketHash> {
        if !self.toeplitz {
            return None;
        }
        let mut input = [0; 36];
        let (len, ip, tcp) = match headers.ip()? {
            IpAddrs::V4 { src, dst } => {
                input[..4].copy_from_slice(&src.octets());
                input[4..8].copy_from_slice(&dst.octets());
                (8, 0, 1)
            }
            IpAddrs::V6 { src, dst } => {
                input[..16].copy_from_slice(&src.octets());
                input[16..32].copy_from_slice(&dst.octets());
                (32, 2, 3)
            }
        };
        let wants = |bit: u8| self.flags & 1 << bit != 0;
        match headers.ports() {
            Some((src, dst)) if headers.protocol() == Some(6) && wants(tcp) => {
                input[len..len + 2].copy_from_slice(&src.to_be_bytes());
                input[len + 2..len + 4].copy_from_slice(&dst.to_be_bytes());
                Some(PacketHash { hash_type: tcp, value: toeplitz(&self.key, &input[..len + 4]) })
            }
            _ if wants(ip) => Some(PacketHash { hash_type: ip, value: toeplitz(&self.key, &input[..len]) }),
            _ => None,
        }
    }

    /// The queue of a packet among `queues`, and its hash for the frontend.
    pub fn queue(&self, headers: &Headers<'_>, queues: usize) -> (usize, Option<PacketHash>) {
        let hash = self.hash(headers);
        if queues <= 1 {
            return (0, hash);
        }
        let queue = match hash {
            Some(hash) if !self.mapping.is_empty() => {
                self.mapping[hash.value as usize % self.mapping.len()] as usize
            }
            Some(hash) => hash.value as usize,
            None => own(headers) as usize,
        };
        (queue % queues, hash)
    }
}

/// The Toeplitz hash (as in Microsoft's RSS): for each set bit of the input the 32 bits of the key at that place.
pub fn toeplitz(key: &[u8], input: &[u8]) -> u32 {
    let byte = |i: usize| key.get(i).copied().unwrap_or(0);
    let mut window = u32::from_be_bytes([byte(0), byte(1), byte(2), byte(3)]);
    let mut hash = 0;
    for (i, &b) in input.iter().enumerate() {
        let mut next = byte(i + 4);
        for bit in (0..8).rev() {
            if b >> bit & 1 != 0 {
                hash ^= window;
            }
            window = window << 1 | u32::from(next >> 7);
            next <<= 1;
        }
    }
    hash
}

/// A flow's packets go to one queue; both directions of it to the same.
fn own(headers: &Headers<'_>) -> u32 {
    let fold = |bytes: &[u8]| {
        bytes.chunks(4).fold(0u32, |sum, c| {
            let mut word = [0; 4];
            word[..c.len()].copy_from_slice(c);
            sum.wrapping_add(u32::from_le_bytes(word))
        })
    };
    let mut sum = match headers.ip() {
        Some(IpAddrs::V4 { src, dst }) => fold(&src.octets()).wrapping_add(fold(&dst.octets())),
        Some(IpAddrs::V6 { src, dst }) => fold(&src.octets()).wrapping_add(fold(&dst.octets())),
        None => fold(&headers.src()).wrapping_add(fold(&headers.dst())),
    };
    if let Some((a, b)) = headers.ports() {
        sum = sum.wrapping_add(u32::from(a) + u32::from(b));
    }
    // Fibonacci hashing: the upper half is well mixed.
    sum.wrapping_mul(0x9e37_79b9) >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 40] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
        0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
        0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    /// The examples that the specification of receive-side scaling gives.
    #[test]
    fn toeplitz_of_the_specification() {
        let input = [66, 9, 149, 187, 161, 142, 100, 80, 0x0a, 0xea, 0x06, 0xe6];
        assert_eq!(toeplitz(&KEY, &input), 0x51cc_c178);
        assert_eq!(toeplitz(&KEY, &input[..8]), 0x323e_8fc2);
        let input = [199, 92, 111, 2, 65, 69, 140, 83, 0x37, 0x96, 0x12, 0x83];
        assert_eq!(toeplitz(&KEY, &input), 0xc626_b0ea);
    }

    #[test]
    fn settings_are_checked() {
        let mut config = HashConfig::default();
        assert!(config.set_flags(1).is_err(), "no algorithm yet");
        config.set_algorithm(1).unwrap();
        assert!(config.set_algorithm(2).is_err());
        assert!(config.set_flags(0x10).is_err());
        config.set_flags(0xf).unwrap();
        assert_eq!(config.set_key(&[0; 41]), Err(Refused(XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW)));
        config.set_key(&KEY).unwrap();
        assert!(config.set_mapping_size(129).is_err());
        config.set_mapping_size(4).unwrap();
        assert!(config.set_mapping(3, &[0, 0], 2).is_err(), "beyond the end");
        assert!(config.set_mapping(u32::MAX, &[0], 2).is_err());
        assert!(config.set_mapping(0, &[2], 2).is_err(), "no such queue");
        config.set_mapping(2, &[1, 1], 2).unwrap();
        assert_eq!(config.mapping, [0, 0, 1, 1]);
    }

    #[test]
    fn hashes_choose_queues() {
        let mut frame = [0; 54];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[17] = 40;
        frame[23] = 6;
        frame[26..34].copy_from_slice(&[66, 9, 149, 187, 161, 142, 100, 80]);
        frame[34..38].copy_from_slice(&[0x0a, 0xea, 0x06, 0xe6]);
        let headers = Headers::parse(&frame);
        let mut config =
            HashConfig { toeplitz: true, flags: FLAGS, key: KEY.to_vec(), mapping: vec![0, 1, 2, 3] };
        let hash = PacketHash { hash_type: 1, value: 0x51cc_c178 };
        assert_eq!(config.queue(&headers, 4), (0, Some(hash)));
        config.flags = 1;
        assert_eq!(config.queue(&headers, 4), (2, Some(PacketHash { hash_type: 0, value: 0x323e_8fc2 })));
        config.mapping.clear();
        assert_eq!(config.queue(&headers, 4).0, 0x323e_8fc2 % 4);
        config.toeplitz = false;
        let (queue, none) = config.queue(&headers, 4);
        assert_eq!(none, None);
        // The way back goes to the same queue.
        let mut back = frame;
        back[26..34].copy_from_slice(&[161, 142, 100, 80, 66, 9, 149, 187]);
        back[34..38].copy_from_slice(&[0x06, 0xe6, 0x0a, 0xea]);
        assert_eq!(config.queue(&Headers::parse(&back), 4).0, queue);
    }
}

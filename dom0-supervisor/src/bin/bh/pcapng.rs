//! Files of packets in the pcapng format (draft-ietf-opsawg-pcapng): one section, one Ethernet interface, nanoseconds. What is written is
//! whole after each packet, so that a file can be read while it grows.

use std::io::{self, Write};

use proto::toolstack::CapturedPacket;

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const ETHERNET: u16 = 1;

// Options.
const COMMENT: u16 = 1;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const EPB_DROPCOUNT: u16 = 4;

/// Such a file.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
}

/// Adds an option; the last is followed by the end of options in [`Writer::block`].
fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_le_bytes());
    body.extend((value.len() as u16).to_le_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

impl<W: Write> Writer<W> {
    /// Begins one. `interface` is what is captured.
    ///
    /// # Errors
    /// The output's.
    pub fn new(out: W, interface: &str, snap_length: u32) -> io::Result<Writer<W>> {
        let mut this = Writer { out };
        let mut body = Vec::new();
        body.extend(0x1a2b_3c4du32.to_le_bytes());
        body.extend([1, 0, 0, 0]);
        // The section's length is not known.
        body.extend([0xff; 8]);
        option(&mut body, SHB_USERAPPL, concat!("Bulkhead ", env!("CARGO_PKG_VERSION")).as_bytes());
        this.block(SECTION, body)?;
        let mut body = Vec::new();
        body.extend(ETHERNET.to_le_bytes());
        body.extend([0, 0]);
        body.extend(snap_length.to_le_bytes());
        option(&mut body, IF_NAME, interface.as_bytes());
        option(&mut body, IF_TSRESOL, &[9]);
        this.block(INTERFACE, body)?;
        Ok(this)
    }

    /// Adds a packet before which `dropped` were missed.
    ///
    /// # Errors
    /// The output's.
    pub fn packet(&mut self, packet: &CapturedPacket, dropped: u64, comment: Option<&str>) -> io::Result<()> {
        let data = &packet.data;
        let mut body = Vec::with_capacity(64 + data.len());
        body.extend(0u32.to_le_bytes());
        body.extend(((packet.unix_ns >> 32) as u32).to_le_bytes());
        body.extend((packet.unix_ns as u32).to_le_bytes());
        body.extend((data.len() as u32).to_le_bytes());
        body.extend(packet.length.to_le_bytes());
        body.extend(data);
        body.resize(body.len().next_multiple_of(4), 0);
        // As the guest sees it: 1 is inbound, 2 outbound.
        let direction: u32 = if packet.to_guest { 1 } else { 2 };
        option(&mut body, EPB_FLAGS, &direction.to_le_bytes());
        if dropped > 0 {
            option(&mut body, EPB_DROPCOUNT, &dropped.to_le_bytes());
        }
        if let Some(comment) = comment {
            option(&mut body, COMMENT, comment.as_bytes());
        }
        self.block(ENHANCED_PACKET, body)
    }

    /// What was written is there for others.
    ///
    /// # Errors
    /// The output's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// A block whose body ends with at least one option. In one write, so that nobody finds half of it.
    fn block(&mut self, kind: u32, mut body: Vec<u8>) -> io::Result<()> {
        body.extend([0; 4]);
        let length = (body.len() + 12) as u32;
        let mut block = Vec::with_capacity(body.len() + 12);
        block.extend(kind.to_le_bytes());
        block.extend(length.to_le_bytes());
        block.extend(body);
        block.extend(length.to_le_bytes());
        self.out.write_all(&block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_parser::traits::PcapNGPacketBlock;
    use pcap_parser::{Block, OptionCode, parse_block_le};

    #[test]
    fn another_reader_understands_it() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, "web vif 0", 100).unwrap();
        for len in 40..60u32 {
            let packet = CapturedPacket {
                unix_ns: 1_700_000_000_123_456_789 + u64::from(len),
                to_guest: len % 2 == 0,
                length: len + 1000,
                data: vec![len as u8; len as usize],
            };
            writer
                .packet(&packet, u64::from(len - 40), (len == 50).then_some("netback was restarted"))
                .unwrap();
        }
        let (mut rest, mut seen) = (&bytes[..], 0);
        while !rest.is_empty() {
            let (after, block) = parse_block_le(rest).unwrap();
            rest = after;
            match block {
                Block::SectionHeader(s) => assert_eq!((s.major_version, s.minor_version), (1, 0)),
                Block::InterfaceDescription(i) => {
                    assert_eq!((i.linktype.0, i.snaplen, i.if_tsresol), (1, 100, 9));
                    assert!(
                        i.options
                            .iter()
                            .any(|o| o.code == OptionCode(IF_NAME) && o.as_str() == Ok("web vif 0"))
                    );
                }
                Block::EnhancedPacket(p) => {
                    let len = 40 + seen;
                    assert_eq!((p.caplen, p.origlen), (len, len + 1000));
                    assert_eq!(p.packet_data()[..len as usize], vec![len as u8; len as usize]);
                    let time = u64::from(p.ts_high) << 32 | u64::from(p.ts_low);
                    assert_eq!(time, 1_700_000_000_123_456_789 + u64::from(len));
                    let find = |code| {
                        p.options
                            .iter()
                            .find(|o| o.code == OptionCode(code))
                            .map(|o| o.as_bytes().unwrap().to_vec())
                    };
                    let direction = if len % 2 == 0 { 1u32 } else { 2 };
                    assert_eq!(find(EPB_FLAGS).unwrap(), direction.to_le_bytes());
                    let dropped = (seen > 0).then(|| u64::from(seen).to_le_bytes().to_vec());
                    assert_eq!(find(EPB_DROPCOUNT), dropped);
                    assert_eq!(find(COMMENT).is_some(), len == 50);
                    seen += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(seen, 20);
    }
}

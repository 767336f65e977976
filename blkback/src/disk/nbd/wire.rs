//! The NBD protocol (NetworkBlockDevice's `doc/proto.md`): numbers, frames, the handshake.

use std::io::{Error, ErrorKind, Read, Result, Write};

/// Flags of the transmission phase.
pub mod flag {
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES works.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
}

/// Commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Read.
    Read = 0,
    /// Write; the data follows the header.
    Write = 1,
    /// Flush.
    Flush = 3,
    /// Discard.
    Trim = 4,
    /// Zeroes.
    WriteZeroes = 6,
}

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;
/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Longest option reply that is taken.
const MOST_OPTION: u32 = 64 << 10;
/// Longest payload of a structured chunk beside its data.
pub const CHUNK_EXTRA: usize = 4096;

/// What the handshake told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// [`flag`]s.
    pub flags: u16,
    /// Most bytes of a request.
    pub most: u32,
    /// Replies may be structured.
    pub structured: bool,
}

impl Export {
    /// What a new connection must have in common with the one before.
    pub fn kind(&self) -> (u16, bool) {
        (self.flags, self.structured)
    }
}

fn wrong(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidData, format!("nbd: {what}"))
}

fn read<const N: usize>(from: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn option(to: &mut impl Write, option: u32, data: &[u8]) -> Result<()> {
    let mut frame = IHAVEOPT.to_be_bytes().to_vec();
    frame.extend(option.to_be_bytes());
    frame.extend((data.len() as u32).to_be_bytes());
    frame.extend(data);
    to.write_all(&frame)
}

fn option_reply(from: &mut impl Read, option: u32) -> Result<(u32, Vec<u8>)> {
    if u64::from_be_bytes(read(from)?) != OPTION_REPLY || u32::from_be_bytes(read(from)?) != option {
        return Err(wrong("the server's answer to an option makes no sense"));
    }
    let (kind, len) = (u32::from_be_bytes(read(from)?), u32::from_be_bytes(read(from)?));
    if len > MOST_OPTION {
        return Err(wrong("the server's answer to an option is too long"));
    }
    let mut data = vec![0; len as usize];
    from.read_exact(&mut data)?;
    Ok((kind, data))
}

/// Fixed newstyle, for the export called `name`.
///
/// # Errors
/// One line: what the server does not offer, or said; the connection's.
pub fn handshake(stream: &mut (impl Read + Write), name: &str) -> Result<Export> {
    if u64::from_be_bytes(read(stream)?) != NBDMAGIC || u64::from_be_bytes(read(stream)?) != IHAVEOPT {
        return Err(wrong("the server does not speak the newstyle protocol"));
    }
    let server = u16::from_be_bytes(read(stream)?);
    if server & 1 == 0 {
        return Err(wrong("the server does not speak fixed newstyle"));
    }
    stream.write_all(&u32::from(1 | server & 2).to_be_bytes())?;
    option(stream, OPT_STRUCTURED_REPLY, &[])?;
    let structured = option_reply(stream, OPT_STRUCTURED_REPLY)?.0 == REP_ACK;
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(1u16.to_be_bytes());
    data.extend(INFO_BLOCK_SIZE.to_be_bytes());
    option(stream, OPT_GO, &data)?;
    let mut export = None;
    let mut most = 32 << 20;
    // Bounded: a server that tells for ever is none.
    for _ in 0..64 {
        let (kind, data) = option_reply(stream, OPT_GO)?;
        match kind {
            REP_ACK => {
                let (size, flags) = export.ok_or_else(|| wrong("the server told no size"))?;
                return Ok(Export { size, flags, most, structured });
            }
            REP_INFO if data.len() >= 2 => match u16::from_be_bytes([data[0], data[1]]) {
                INFO_EXPORT if data.len() >= 12 => {
                    let size = u64::from_be_bytes(data[2..10].try_into().map_err(wrong)?);
                    export = Some((size, u16::from_be_bytes([data[10], data[11]])));
                }
                INFO_BLOCK_SIZE if data.len() >= 14 => {
                    let word =
                        |at: usize| u32::from_be_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
                    if word(2) > 512 {
                        return Err(wrong(format!(
                            "the server takes blocks of {} bytes at least, and sectors have 512",
                            word(2)
                        )));
                    }
                    most = word(10).max(512);
                }
                _ => {}
            },
            kind if kind & REP_ERROR != 0 => {
                let text: String =
                    String::from_utf8_lossy(&data).chars().filter(|c| !c.is_control()).take(200).collect();
                return Err(wrong(format!(
                    "the server refuses export {name:?}: {text} (error {:#x})",
                    kind ^ REP_ERROR
                )));
            }
            _ => {}
        }
    }
    Err(wrong("the server does not come to an end"))
}

/// A request's header.
pub fn request(command: Command, fua: bool, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    let mut frame = [0; REQUEST_BYTES];
    frame[..4].copy_from_slice(&REQUEST.to_be_bytes());
    frame[4..6].copy_from_slice(&u16::from(fua).to_be_bytes());
    frame[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    frame[8..16].copy_from_slice(&cookie.to_be_bytes());
    frame[16..24].copy_from_slice(&offset.to_be_bytes());
    frame[24..].copy_from_slice(&len.to_be_bytes());
    frame
}

/// What a reply's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// errno, 0 if none. Data of a read follows if none.
    Simple {
        /// errno.
        error: u32,
        /// Whose.
        cookie: u64,
    },
    /// A piece of an answer.
    Chunk {
        /// It is the last.
        done: bool,
        /// What.
        kind: u16,
        /// Whose.
        cookie: u64,
        /// Bytes that follow.
        len: u32,
    },
}

/// Bytes of the header that begins with these four bytes.
///
/// # Errors
/// It begins no reply.
pub fn reply_len(start: [u8; 4]) -> Result<usize> {
    match u32::from_be_bytes(start) {
        SIMPLE => Ok(16),
        STRUCTURED => Ok(20),
        other => Err(wrong(format!("a reply begins with {other:#x}"))),
    }
}

/// A whole header, of [`reply_len`] bytes.
pub fn reply(header: &[u8]) -> Reply {
    let be = |range: std::ops::Range<usize>| {
        header[range].iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    if header.len() == 16 {
        Reply::Simple { error: be(4..8) as u32, cookie: be(8..16) }
    } else {
        Reply::Chunk {
            done: be(4..6) & 1 != 0,
            kind: be(6..8) as u16,
            cookie: be(8..16),
            len: be(16..20) as u32,
        }
    }
}

/// Kinds of chunks.
pub mod chunk {
    /// Nothing.
    pub const NONE: u16 = 0;
    /// u64 offset, data.
    pub const DATA: u16 = 1;
    /// u64 offset, u32 bytes of zeroes.
    pub const HOLE: u16 = 2;
    /// From here on errors: u32 errno first.
    pub const ERROR: u16 = 1 << 15;
}

//! Unpacks the payload of a bzImage into anonymous memory of known size.

use super::{KernelError, MAX_KERNEL_BYTES, bcj};
use memmap2::MmapMut;
use std::io::{Cursor, Read};

/// The magic of lz4's legacy frame, which the kernel's build uses (lz4_Frame_format.md, "Legacy frame").
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
/// The most that one block of a legacy frame unpacks to.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

fn bad(kind: &'static str, why: impl ToString) -> KernelError {
    KernelError::Unpack { kind, why: why.to_string() }
}

/// Unpacks `payload`. The kernel's build appends the unpacked size as 4 bytes; it is an allegation that bounds
/// the buffer, and the stream has to fill it exactly.
pub(super) fn unpack(payload: &[u8]) -> Result<MmapMut, KernelError> {
    let (stream, size) = payload.split_at(payload.len().saturating_sub(4));
    let size = u32::from_le_bytes(size.try_into().map_err(|_| KernelError::Damaged("no payload"))?);
    if size == 0 || u64::from(size) > MAX_KERNEL_BYTES {
        return Err(KernelError::Damaged("the payload's unpacked size is out of range"));
    }
    let mut out = MmapMut::map_anon(size as usize)?;
    match payload {
        // The gzip trailer is the appended size, so the stream is the whole payload.
        [0x1f, 0x8b, ..] => {
            flate2::read::GzDecoder::new(payload).read_exact(&mut out).map_err(|e| bad("gzip", e))?
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4_legacy(stream, &mut out)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            // Straight into the buffer: unpacking is a good part of a guest's start.
            let mut decoder = structured_zstd::decoding::FrameDecoder::new();
            let filled = decoder.decode_all(stream, &mut out).map_err(|e| bad("zstd", e))?;
            if filled != out.len() {
                return Err(bad("zstd", "the stream is shorter than it claims"));
            }
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => xz(stream, &mut out)?,
        [b'B', b'Z', b'h', ..] => return Err(KernelError::Compression("bzip2")),
        [0x5d, 0, 0, ..] => return Err(KernelError::Compression("lzma")),
        [0x89, b'L', b'Z', b'O', ..] => return Err(KernelError::Compression("lzo")),
        [0x7f, b'E', b'L', b'F', ..] => return Err(KernelError::Compression("nothing")),
        _ => return Err(KernelError::Compression("an unknown method")),
    }
    Ok(out)
}

/// Decodes lz4's legacy framing: a magic, then blocks with their packed size before them.
fn lz4_legacy(mut stream: &[u8], out: &mut [u8]) -> Result<(), KernelError> {
    let mut filled = 0;
    while let Some((word, rest)) = stream.split_first_chunk::<4>() {
        let word = u32::from_le_bytes(*word);
        stream = rest;
        if word == LZ4_LEGACY_MAGIC {
            continue;
        }
        if word == 0 {
            break;
        }
        let packed = stream.get(..word as usize).ok_or_else(|| bad("lz4", "a block is cut off"))?;
        stream = &stream[word as usize..];
        let end = out.len().min(filled + LZ4_LEGACY_BLOCK);
        filled +=
            lz4_flex::block::decompress_into(packed, &mut out[filled..end]).map_err(|e| bad("lz4", e))?;
    }
    if filled == out.len() { Ok(()) } else { Err(bad("lz4", "the stream is shorter than it claims")) }
}

/// Reads a variable-length integer of the xz format (.xz file format, section 1.2).
fn xz_vli(data: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..63).step_by(7) {
        let (&byte, rest) = data.split_first()?;
        *data = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Decodes the first block of an .xz stream, which may use the x86 branch filter.
fn xz(stream: &[u8], out: &mut [u8]) -> Result<(), KernelError> {
    const HEADER: usize = 12;
    let cut = || bad("xz", "the block header is cut off");
    // Block header (section 3.1): its size / 4 - 1, flags, optional sizes, filters, padding, CRC32.
    let size = (usize::from(*stream.get(HEADER).ok_or_else(cut)?) + 1) * 4;
    // The smallest header has the size, the flags and one filter; a size byte of 0 is no block at all.
    let header = stream.get(HEADER..HEADER + size).filter(|h| h.len() >= 12).ok_or_else(cut)?;
    let flags = header[1];
    let mut fields = &header[2..size - 4];
    if flags & 0x40 != 0 {
        xz_vli(&mut fields).ok_or_else(cut)?;
    }
    if flags & 0x80 != 0 {
        xz_vli(&mut fields).ok_or_else(cut)?;
    }
    let mut branches = false;
    let mut lzma2 = false;
    for _ in 0..=(flags & 3) {
        let id = xz_vli(&mut fields).ok_or_else(cut)?;
        let props = xz_vli(&mut fields).ok_or_else(cut)?;
        if props > fields.len() as u64 {
            return Err(cut());
        }
        fields = &fields[props as usize..];
        match id {
            0x04 if props == 0 && !lzma2 => branches = true,
            0x21 if !lzma2 => lzma2 = true,
            _ => return Err(bad("xz", "it uses a filter other than x86 and LZMA2")),
        }
    }
    if !lzma2 {
        return Err(bad("xz", "it has no LZMA2 filter"));
    }
    let mut input = Cursor::new(&stream[HEADER + size..]);
    let mut sink = Sink { out, filled: 0 };
    lzma_rs::lzma2_decompress(&mut input, &mut sink).map_err(|e| bad("xz", format!("{e:?}")))?;
    if sink.filled != sink.out.len() {
        return Err(bad("xz", "the stream is shorter than it claims"));
    }
    if branches {
        bcj::decode_x86(out);
    }
    Ok(())
}

/// A writer into a buffer of fixed size that refuses what goes beyond.
struct Sink<'a> {
    out: &'a mut [u8],
    filled: usize,
}

impl std::io::Write for Sink<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let room = self
            .out
            .get_mut(self.filled..self.filled + data.len())
            .ok_or_else(|| std::io::Error::other("it unpacks to more than it claims"))?;
        room.copy_from_slice(data);
        self.filled += data.len();
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

//! The x86 branch filter of the xz format, decoding direction.
//!
//! Kernels are packed with `xz --x86`, which rewrites the operands of CALL (E8) and JMP (E9) from relative to
//! absolute so that they compress better. The `lzma-rs` crate knows LZMA2 only, so the inverse is here.
//! Algorithm: the "x86 BCJ" filter as described for the .xz file format (section 5.3.2).

/// Whether a byte may be the top byte of a converted operand.
fn is_sign_byte(b: u8) -> bool {
    b == 0x00 || b == 0xff
}

/// Undoes the filter over the whole stream, which starts at position 0.
pub(super) fn decode_x86(data: &mut [u8]) {
    const MASK_TO_ALLOWED: [bool; 8] = [true, true, true, false, true, false, false, false];
    const MASK_TO_BIT: [u32; 8] = [0, 1, 2, 2, 3, 3, 3, 3];
    if data.len() < 5 {
        return;
    }
    let limit = data.len() - 4;
    // History of the last opcode bytes seen, as the encoder kept it: bit n set means "n bytes ago".
    let mut mask: u32 = 0;
    let mut prev: Option<usize> = None;
    let mut i = 0;
    while i < limit {
        if data[i] & 0xfe != 0xe8 {
            i += 1;
            continue;
        }
        match prev.map(|p| i - p) {
            Some(gap) if gap <= 3 => {
                mask = (mask << (gap - 1)) & 7;
                if mask != 0 {
                    let byte = data[i + 4 - MASK_TO_BIT[mask as usize] as usize];
                    if !MASK_TO_ALLOWED[mask as usize] || is_sign_byte(byte) {
                        prev = Some(i);
                        mask = (mask << 1) | 1;
                        i += 1;
                        continue;
                    }
                }
            }
            _ => mask = 0,
        }
        prev = Some(i);
        if !is_sign_byte(data[i + 4]) {
            mask = (mask << 1) | 1;
            i += 1;
            continue;
        }
        let mut src = u32::from_le_bytes([data[i + 1], data[i + 2], data[i + 3], data[i + 4]]);
        let here = (i as u32).wrapping_add(5);
        let dest = loop {
            let dest = src.wrapping_sub(here);
            if mask == 0 {
                break dest;
            }
            let shift = MASK_TO_BIT[mask as usize] * 8;
            if !is_sign_byte((dest >> (24 - shift)) as u8) {
                break dest;
            }
            src = dest ^ ((1u32 << (32 - shift)) - 1);
        };
        // The operand is 25 bits with its sign spread over the top byte.
        let dest = if dest & (1 << 24) != 0 { dest | 0xff00_0000 } else { dest & 0x01ff_ffff & 0x00ff_ffff };
        data[i + 1..i + 5].copy_from_slice(&dest.to_le_bytes());
        i += 5;
        mask = 0;
        // The encoder's history counts from the opcode, five bytes back from here: out of its window.
        prev = prev.filter(|&p| i - p <= 3);
    }
}

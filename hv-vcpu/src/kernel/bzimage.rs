//! The Linux x86 boot image (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").

use super::KernelError;

/// `setup_sects`: 512-byte sectors of the real-mode code after the boot sector; 0 means 4.
const SETUP_SECTS: usize = 0x1f1;
/// `boot_flag`: 0xaa55.
const BOOT_FLAG: usize = 0x1fe;
/// `header`: "HdrS".
const HEADER: usize = 0x202;
/// `version` of the boot protocol.
const VERSION: usize = 0x206;
/// `payload_offset`: from the start of the protected-mode code (protocol 2.08).
const PAYLOAD_OFFSET: usize = 0x248;
/// `payload_length` in bytes (protocol 2.08).
const PAYLOAD_LENGTH: usize = 0x24c;

fn u16_at(image: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(image.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Whether the two magic numbers of a Linux boot image are present.
pub(super) fn is_bzimage(image: &[u8]) -> bool {
    u16_at(image, BOOT_FLAG) == Some(0xaa55) && image.get(HEADER..HEADER + 4) == Some(b"HdrS")
}

/// The compressed payload inside a boot image.
pub(super) fn payload(image: &[u8]) -> Result<&[u8], KernelError> {
    let short = KernelError::Damaged("the boot header is cut off");
    let (Some(version), Some(&sects)) = (u16_at(image, VERSION), image.get(SETUP_SECTS)) else {
        return Err(short);
    };
    if version < 0x0208 {
        return Err(KernelError::OldProtocol(version));
    }
    let (Some(offset), Some(length)) = (u32_at(image, PAYLOAD_OFFSET), u32_at(image, PAYLOAD_LENGTH)) else {
        return Err(short);
    };
    let sects = if sects == 0 { 4 } else { usize::from(sects) };
    let start = (sects + 1) * 512 + offset as usize;
    let end = start + length as usize;
    if length < 8 {
        return Err(KernelError::Damaged("the payload is empty"));
    }
    image.get(start..end).ok_or(KernelError::Damaged("the payload lies outside of the file"))
}

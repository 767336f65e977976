//! Kernel images: what a file claims to be is an allegation until every number in it was checked.
//!
//! Two kinds are understood: an ELF file with the PVH entry note (`XEN_ELFNOTE_PHYS32_ENTRY`,
//! xen/include/public/elfnote.h) and a Linux bzImage (Documentation/arch/x86/boot.rst) whose compressed
//! payload is such an ELF file.

mod bcj;
mod bzimage;
mod decompress;
mod elf;

use crate::mem::{GuestMemory, MemError};
use memmap2::MmapMut;
use std::fs::File;
use std::io::Read;

/// The largest kernel file, and the largest unpacked kernel, in bytes.
pub const MAX_KERNEL_BYTES: u64 = 512 << 20;

/// Why a kernel could not be loaded. Each text says what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file could not be read.
    #[error("kernel image can't be read: {0}; check the path and its permissions")]
    Read(#[from] std::io::Error),
    /// The file is larger than [`MAX_KERNEL_BYTES`].
    #[error(
        "kernel image is {0} bytes, more than the limit of {MAX_KERNEL_BYTES}; give a kernel, not a disk"
    )]
    TooLarge(u64),
    /// Neither ELF nor bzImage.
    #[error("kernel image is neither ELF nor a Linux bzImage; give a vmlinux or a vmlinuz file")]
    UnknownFormat,
    /// A header field points outside of the file or contradicts another.
    #[error("kernel image is damaged: {0}; fetch the file again")]
    Damaged(&'static str),
    /// The bzImage is of a boot protocol without a payload that can be found.
    #[error("bzImage has boot protocol {0:#06x}, but 0x0208 or newer is needed; use Linux 2.6.26 or newer")]
    OldProtocol(u16),
    /// The payload is compressed in a way that is not supported.
    #[error("kernel payload is compressed with {0}; build it with gzip, xz, lz4 or zstd")]
    Compression(&'static str),
    /// The payload does not unpack.
    #[error("kernel payload ({kind}) does not unpack: {why}; fetch the file again")]
    Unpack {
        /// The compression format.
        kind: &'static str,
        /// What the decoder said.
        why: String,
    },
    /// The ELF file is for something else.
    #[error("kernel is an ELF file for {0}; a 64-bit x86 kernel is needed")]
    WrongMachine(&'static str),
    /// There is no PVH entry point.
    #[error("kernel has no PVH entry point; it needs CONFIG_PVH=y (XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhNote,
    /// A segment does not lie in guest RAM.
    #[error(
        "kernel wants memory {start:#x}..{end:#x}, guest RAM for it is {low:#x}..{high:#x}; raise `memory`"
    )]
    DoesNotFit {
        /// First byte of the segment.
        start: u64,
        /// Byte after the segment.
        end: u64,
        /// First byte that a kernel may use.
        low: u64,
        /// Byte after the last that a kernel may use.
        high: u64,
    },
    /// Guest memory could not be written.
    #[error("kernel can't be placed: {0}")]
    Memory(#[from] MemError),
}

/// Where a loaded kernel lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedKernel {
    /// The 32-bit PVH entry point (guest physical).
    pub entry: u32,
    /// First byte used by the kernel.
    pub start: u64,
    /// Byte after the last one used by the kernel (bss included).
    pub end: u64,
}

/// Reads `file` into anonymous memory that is given back to the system when the kernel is placed.
pub fn read_image(mut file: &File) -> Result<MmapMut, KernelError> {
    let len = file.metadata()?.len();
    if len > MAX_KERNEL_BYTES {
        return Err(KernelError::TooLarge(len));
    }
    if len == 0 {
        return Err(KernelError::UnknownFormat);
    }
    let mut image = MmapMut::map_anon(len as usize)?;
    file.read_exact(&mut image)?;
    Ok(image)
}

/// Loads the kernel in `image` into guest RAM between `low` and `high` (guest physical).
pub fn load(image: &[u8], mem: &GuestMemory, low: u64, high: u64) -> Result<LoadedKernel, KernelError> {
    if elf::is_elf(image) {
        return elf::load(image, mem, low, high);
    }
    if bzimage::is_bzimage(image) {
        let payload = bzimage::payload(image)?;
        let vmlinux = decompress::unpack(payload)?;
        if !elf::is_elf(&vmlinux) {
            return Err(KernelError::Damaged("the unpacked payload is not an ELF file"));
        }
        return elf::load(&vmlinux, mem, low, high);
    }
    Err(KernelError::UnknownFormat)
}

#[cfg(test)]
mod tests;

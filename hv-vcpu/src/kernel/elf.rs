//! ELF kernels with a PVH entry note (System V ABI "ELF-64 Object File Format"; xen public/elfnote.h).

use super::{KernelError, LoadedKernel};
use crate::mem::GuestMemory;
use zerocopy::{FromBytes, Immutable, KnownLayout};

const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// xen/include/public/elfnote.h: physical entry point of a 32-bit PVH start.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// More program headers than any kernel has.
const MAX_PHDRS: u16 = 256;

#[derive(FromBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct Ehdr {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u64,
    phoff: u64,
    shoff: u64,
    flags: u32,
    ehsize: u16,
    phentsize: u16,
    phnum: u16,
    shentsize: u16,
    shnum: u16,
    shstrndx: u16,
}

#[derive(FromBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct Phdr {
    kind: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
}

/// Whether the file starts with ELF's magic.
pub(super) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF")
}

fn range(image: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let end = offset.checked_add(len)?;
    image.get(usize::try_from(offset).ok()?..usize::try_from(end).ok()?)
}

/// Copies the segments into guest RAM and finds the PVH entry point.
pub(super) fn load(
    image: &[u8],
    mem: &GuestMemory,
    low: u64,
    high: u64,
) -> Result<LoadedKernel, KernelError> {
    let (ehdr, _) =
        Ehdr::read_from_prefix(image).map_err(|_| KernelError::Damaged("the ELF header is cut off"))?;
    match (ehdr.ident[4], ehdr.ident[5], ehdr.machine) {
        (2, 1, EM_X86_64) => {}
        (1, ..) => return Err(KernelError::WrongMachine("a 32-bit machine")),
        (_, 2, _) => return Err(KernelError::WrongMachine("a big-endian machine")),
        _ => return Err(KernelError::WrongMachine("another machine")),
    }
    if usize::from(ehdr.phentsize) != size_of::<Phdr>() || ehdr.phnum == 0 || ehdr.phnum > MAX_PHDRS {
        return Err(KernelError::Damaged("the ELF program header table is malformed"));
    }
    let table = range(image, ehdr.phoff, u64::from(ehdr.phnum) * size_of::<Phdr>() as u64)
        .ok_or(KernelError::Damaged("the ELF program headers lie outside of the file"))?;
    let phdrs: Vec<Phdr> =
        table.chunks_exact(size_of::<Phdr>()).filter_map(|b| Phdr::read_from_bytes(b).ok()).collect();

    let mut entry = None;
    for ph in phdrs.iter().filter(|ph| ph.kind == PT_NOTE) {
        let notes = range(image, ph.offset, ph.filesz)
            .ok_or(KernelError::Damaged("an ELF note lies outside of the file"))?;
        entry = entry.or(find_entry(notes, ph.align));
    }
    let entry = entry.ok_or(KernelError::NoPvhNote)?;

    let (mut start, mut end) = (u64::MAX, 0);
    for ph in phdrs.iter().filter(|ph| ph.kind == PT_LOAD && ph.memsz > 0) {
        if ph.filesz > ph.memsz {
            return Err(KernelError::Damaged("an ELF segment has more bytes in the file than in memory"));
        }
        let data = range(image, ph.offset, ph.filesz)
            .ok_or(KernelError::Damaged("an ELF segment lies outside of the file"))?;
        let seg_end = ph.paddr.checked_add(ph.memsz).filter(|&e| ph.paddr >= low && e <= high).ok_or(
            KernelError::DoesNotFit { start: ph.paddr, end: ph.paddr.saturating_add(ph.memsz), low, high },
        )?;
        // The bss needs no clearing: guest RAM is zero when a domain starts. A later segment may overlap it.
        mem.write(ph.paddr, data)?;
        start = start.min(ph.paddr);
        end = end.max(seg_end);
    }
    if u64::from(entry) < start || u64::from(entry) >= end {
        return Err(KernelError::Damaged("the PVH entry point lies outside of the kernel"));
    }
    Ok(LoadedKernel { entry, start, end })
}

/// Finds the PVH entry among ELF notes: `namesz`, `descsz`, `type`, name, descriptor, each padded.
fn find_entry(mut notes: &[u8], align: u64) -> Option<u32> {
    let align = if align == 8 { 8 } else { 4 };
    let word = |b: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(b.get(at..at + 4)?.try_into().ok()?))
    };
    while notes.len() >= 12 {
        let (namesz, descsz, kind) = (word(notes, 0)? as usize, word(notes, 4)? as usize, word(notes, 8)?);
        let name = notes.get(12..12usize.checked_add(namesz)?)?;
        let desc_at = 12 + namesz.checked_next_multiple_of(align)?;
        let desc_at = if align == 8 { (12 + namesz).next_multiple_of(8) } else { desc_at };
        let desc = notes.get(desc_at..desc_at.checked_add(descsz)?)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return match desc.len() {
                4 => word(desc, 0),
                // Linux writes a native word; the address has to fit 32 bits all the same.
                8 if word(desc, 4) == Some(0) => word(desc, 0),
                _ => None,
            };
        }
        let next = (desc_at + descsz).checked_next_multiple_of(align)?;
        notes = notes.get(next..)?;
    }
    None
}

//! What a PVH guest finds at its entry point (xen/include/public/arch-x86/hvm/start_info.h).

use crate::acpi;
use crate::layout::{self, Layout};
use crate::mem::{GuestMemory, MemError};

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const MEMMAP_RAM: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RESERVED`.
const MEMMAP_RESERVED: u32 = 2;
/// Offset of the module list from [`layout::BOOT_INFO`].
const MODLIST: u64 = 0x100;
/// Offset of the memory map from [`layout::BOOT_INFO`].
const MEMMAP: u64 = 0x200;

/// Writes the ACPI tables, the command line, the memory map, the module list and the start info. Returns the
/// address of the start info, which goes into `ebx`. `initrd` is (address, bytes). The command line has to be
/// shorter than [`layout::CMDLINE_MAX`].
pub fn write_start_info(
    mem: &GuestMemory,
    layout: &Layout,
    cmdline: &str,
    initrd: Option<(u64, u64)>,
    vcpus: u8,
) -> Result<u64, MemError> {
    mem.write(layout::ACPI, &acpi::tables(layout::ACPI, vcpus))?;

    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    mem.write(layout::CMDLINE, &text)?;

    let map = layout.memmap();
    let mut bytes = Vec::new();
    for &(start, len, ram) in &map {
        bytes.extend_from_slice(&start.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&if ram { MEMMAP_RAM } else { MEMMAP_RESERVED }.to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
    }
    mem.write(layout::BOOT_INFO + MEMMAP, &bytes)?;

    if let Some((start, len)) = initrd {
        let entry: Vec<u8> = [start, len, 0, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
        mem.write(layout::BOOT_INFO + MODLIST, &entry)?;
    }

    let mut info = Vec::new();
    for word in [START_MAGIC, 1, 0, u32::from(initrd.is_some())] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for address in [layout::BOOT_INFO + MODLIST, layout::CMDLINE, layout::ACPI, layout::BOOT_INFO + MEMMAP] {
        info.extend_from_slice(&address.to_le_bytes());
    }
    info.extend_from_slice(&(map.len() as u32).to_le_bytes());
    info.extend_from_slice(&0u32.to_le_bytes());
    mem.write(layout::BOOT_INFO, &info)?;
    Ok(layout::BOOT_INFO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_info_has_its_layout() {
        let layout = Layout::new(64 << 20);
        let mem = GuestMemory::anonymous(&layout.ram()).unwrap();
        let at = write_start_info(&mem, &layout, "quiet", Some((0x100_0000, 123)), 2).unwrap();
        let mut info = [0u8; 56];
        mem.read(at, &mut info).unwrap();
        assert_eq!(info[..4], START_MAGIC.to_le_bytes());
        assert_eq!(info[12..16], 1u32.to_le_bytes());
        assert_eq!(info[24..32], layout::CMDLINE.to_le_bytes());
        assert_eq!(info[48..52], (layout.memmap().len() as u32).to_le_bytes());
        let mut text = [0u8; 6];
        mem.read(layout::CMDLINE, &mut text).unwrap();
        assert_eq!(&text, b"quiet\0");
    }
}

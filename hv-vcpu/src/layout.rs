//! The guest-physical memory map.
//!
//! | range | what | told to the guest as |
//! |---|---|---|
//! | 0 .. 0x9_0000 | RAM (real-mode trampolines of the guest) | RAM |
//! | 0x9_0000 .. 0xa_0000 | start info, memory map, module list, command line | reserved |
//! | 0xa_0000 .. 0x10_0000 | ACPI tables from 0xe_0000 | reserved |
//! | 1 MiB .. low end - 16 pages | RAM: kernel, initrd at its top | RAM |
//! | the last 16 pages below the low end | xenstore ring, console ring | reserved |
//! | 3 GiB .. 4 GiB | hole: local APIC, I/O APIC | not listed |
//! | 4 GiB .. | RAM beyond 3 GiB | RAM |

use crate::mem::PAGE_SIZE;

/// Where the hole below 4 GiB starts.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where RAM continues after the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Boot information: start info and what it points to.
pub const BOOT_INFO: u64 = 0x9_0000;
/// The command line (NUL-terminated).
pub const CMDLINE: u64 = 0x9_1000;
/// The most bytes a command line may have, NUL included (Linux's COMMAND_LINE_SIZE).
pub const CMDLINE_MAX: u64 = 2048;
/// End of the boot information.
pub const BOOT_INFO_END: u64 = 0xa_0000;
/// ACPI tables; the RSDP comes first.
pub const ACPI: u64 = 0xe_0000;
/// End of the space for ACPI tables, and start of the RAM for kernels.
pub const KERNEL_LOW: u64 = 0x10_0000;
/// Pages reserved at the top of low RAM.
pub const SPECIAL_PAGES: u64 = 16;
/// The smallest guest.
pub const MIN_MEMORY: u64 = 16 << 20;
/// The largest guest.
pub const MAX_MEMORY: u64 = 1 << 40;
/// Base of the hypercall-page MSR: outside of the ranges that KVM itself answers.
pub const XEN_HYPERCALL_MSR: u32 = 0x4000_0200;

/// The map of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of RAM in all.
    pub memory: u64,
}

/// One entry of the memory map: start, length, whether it is RAM (else reserved).
pub type MapEntry = (u64, u64, bool);

impl Layout {
    /// The map for `memory` bytes of RAM (page-aligned, within [`MIN_MEMORY`] and [`MAX_MEMORY`]).
    pub fn new(memory: u64) -> Self {
        Self { memory }
    }

    /// End of RAM below the hole.
    pub fn low_end(&self) -> u64 {
        self.memory.min(HOLE_START)
    }

    /// RAM as (start, length) pieces.
    pub fn ram(&self) -> Vec<(u64, u64)> {
        let low = self.low_end();
        let mut pieces = vec![(0, low)];
        if self.memory > low {
            pieces.push((HOLE_END, self.memory - low));
        }
        pieces
    }

    /// End of the low RAM that the guest may use freely.
    pub fn usable_low_end(&self) -> u64 {
        self.low_end() - SPECIAL_PAGES * PAGE_SIZE
    }

    /// Guest frame of the xenstore ring.
    pub fn store_gfn(&self) -> u64 {
        self.low_end() / PAGE_SIZE - 1
    }

    /// Guest frame of the console ring.
    pub fn console_gfn(&self) -> u64 {
        self.low_end() / PAGE_SIZE - 2
    }

    /// The memory map as the guest is told, sorted.
    pub fn memmap(&self) -> Vec<MapEntry> {
        let (usable, low) = (self.usable_low_end(), self.low_end());
        let mut map = vec![
            (0, BOOT_INFO, true),
            (BOOT_INFO, KERNEL_LOW - BOOT_INFO, false),
            (KERNEL_LOW, usable - KERNEL_LOW, true),
            (usable, low - usable, false),
        ];
        if self.memory > low {
            map.push((HOLE_END, self.memory - low, true));
        }
        map
    }

    /// Where an initrd of `len` bytes goes: as high as it can in low RAM, but below 1 GiB, which every kernel maps
    /// early; `None` if it would reach down to `kernel_end`.
    pub fn initrd_gpa(&self, len: u64, kernel_end: u64) -> Option<u64> {
        let top = self.usable_low_end().min(1 << 30);
        let start = top.checked_sub(len)? & !(PAGE_SIZE - 1);
        (start >= kernel_end).then_some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_map_is_sorted_and_adds_up() {
        for memory in [MIN_MEMORY, 256 << 20, HOLE_START, HOLE_START + PAGE_SIZE, 8 << 30] {
            let layout = Layout::new(memory);
            let map = layout.memmap();
            assert!(map.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
            assert_eq!(layout.ram().iter().map(|p| p.1).sum::<u64>(), memory);
            assert_eq!(map.iter().map(|e| e.1).sum::<u64>(), memory);
            assert!(layout.store_gfn() * PAGE_SIZE >= layout.usable_low_end());
        }
        assert_eq!(Layout::new(256 << 20).initrd_gpa(300 << 20, 0), None);
        assert!(Layout::new(256 << 20).initrd_gpa(30 << 20, 64 << 20).is_some());
    }
}

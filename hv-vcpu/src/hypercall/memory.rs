//! `memory_op` (xen/include/public/memory.h).

use super::{Answer, Guest, MAX_BATCH};
use crate::errno::Errno;
use crate::mem::PAGE_SIZE;
use crate::platform::GuestCpu;
use crate::state::{State, XenPage};
use xen_abi::memory::*;
use zerocopy::IntoBytes;

/// The highest frame at which the guest may ask for a page of Xen's: 46 bits of address, as Linux uses at most.
const MAX_GFN: u64 = 1 << (46 - 12);
/// The frames of the I/O APIC and local APIC are not memory.
const APIC_GFNS: std::ops::Range<u64> = 0xfec00..0xff000;

impl Guest {
    pub(super) fn memory_op(&self, cpu: &dyn GuestCpu, cmd: u64, arg: u64) -> Answer {
        // The bits above the command say where a call goes on that was cut short.
        let start = u64::from(cmd as u32 >> MEMOP_CMD_BITS);
        let cmd = cmd as u32 & ((1 << MEMOP_CMD_BITS) - 1);
        match cmd {
            XENMEM_ADD_TO_PHYSMAP => {
                let op: XenAddToPhysmap = self.fetch(cpu, arg)?;
                self.check_self(op.domid)?;
                let page = match op.space {
                    XENMAPSPACE_SHARED_INFO if op.idx == 0 => XenPage::SharedInfo,
                    XENMAPSPACE_GRANT_TABLE if op.idx < self.grants.pages() => {
                        XenPage::GrantFrame(op.idx as u32)
                    }
                    XENMAPSPACE_SHARED_INFO | XENMAPSPACE_GRANT_TABLE => return Err(Errno::EINVAL),
                    _ => return Err(Errno::ENOSYS),
                };
                self.place(op.gpfn, page)?;
                Ok(0)
            }
            XENMEM_REMOVE_FROM_PHYSMAP => {
                let op: XenRemoveFromPhysmap = self.fetch(cpu, arg)?;
                self.check_self(op.domid)?;
                let mut state = self.state();
                if state.xen_pages.contains_key(&op.gpfn) {
                    self.unplace(&mut state, op.gpfn);
                    return Ok(0);
                }
                self.give_back(&mut state, op.gpfn)?;
                Ok(0)
            }
            XENMEM_DECREASE_RESERVATION => {
                self.reservation(cpu, arg, start, |state, gfn| self.give_back(state, gfn))
            }
            XENMEM_POPULATE_PHYSMAP => self.reservation(cpu, arg, start, |state, gfn| {
                if !self.mem.is_ram(gfn) {
                    return Err(Errno::ENOMEM);
                }
                state.set_ballooned(gfn, false);
                Ok(())
            }),
            XENMEM_MEMORY_MAP => {
                let mut op: XenMemoryMap = self.fetch(cpu, arg)?;
                let map = self.layout.memmap();
                let count = map.len().min(op.nr_entries as usize);
                for (i, &(addr, size, ram)) in map.iter().take(count).enumerate() {
                    let entry = E820Entry {
                        addr: addr.into(),
                        size: size.into(),
                        r#type: if ram { 1 } else { 2 }.into(),
                    };
                    let at = op.buffer.wrapping_add((i * size_of::<E820Entry>()) as u64);
                    self.copy_out(cpu, at, entry.as_bytes())?;
                }
                op.nr_entries = count as u32;
                self.put(cpu, arg, &op)?;
                Ok(0)
            }
            XENMEM_MAXIMUM_RAM_PAGE => Ok(self.top_gfn()),
            XENMEM_CURRENT_RESERVATION | XENMEM_MAXIMUM_RESERVATION | XENMEM_MAXIMUM_GPFN => {
                let op: XenMemoryDomain = self.fetch(cpu, arg)?;
                self.check_self(op.domid)?;
                let pages = self.layout.memory / PAGE_SIZE;
                Ok(match cmd {
                    XENMEM_CURRENT_RESERVATION => (pages - self.state().ballooned_pages) as i64,
                    XENMEM_MAXIMUM_RESERVATION => pages as i64,
                    _ => self.top_gfn(),
                })
            }
            XENMEM_SET_MEMORY_MAP
            | XENMEM_MACHINE_MEMORY_MAP
            | XENMEM_SET_POD_TARGET
            | XENMEM_GET_POD_TARGET
            | XENMEM_CLAIM_PAGES
            | XENMEM_ACQUIRE_RESOURCE => Err(Errno::EPERM),
            _ => Err(Errno::ENOSYS),
        }
    }

    fn top_gfn(&self) -> i64 {
        self.layout.memmap().last().map_or(0, |&(start, len, _)| ((start + len) / PAGE_SIZE - 1) as i64)
    }

    /// The three calls that take a list of extents: returns how many were done.
    fn reservation(
        &self,
        cpu: &dyn GuestCpu,
        arg: u64,
        start: u64,
        mut each: impl FnMut(&mut State, u64) -> Result<(), Errno>,
    ) -> Answer {
        let op: XenMemoryReservation = self.fetch(cpu, arg)?;
        self.check_self(op.domid)?;
        // 2 MiB extents are the largest that an unprivileged domain of Xen's may ask for.
        if op.extent_order > 9 {
            return Err(Errno::EPERM);
        }
        if start > op.nr_extents {
            return Err(Errno::EINVAL);
        }
        let end = op.nr_extents.min(start.saturating_add(MAX_BATCH));
        for i in start..end {
            let at = op.extent_start.wrapping_add(i.wrapping_mul(8));
            let gfn: u64 = match self.fetch(cpu, at) {
                Ok(gfn) => gfn,
                Err(_) if i > start => return Ok(i as i64),
                Err(e) => return Err(e),
            };
            let mut state = self.state();
            for n in 0..1u64 << op.extent_order {
                if gfn.checked_add(n).is_none_or(|gfn| each(&mut state, gfn).is_err()) {
                    return Ok(i as i64);
                }
            }
        }
        Ok(end as i64)
    }

    /// The guest gives a frame of RAM back.
    fn give_back(&self, state: &mut State, gfn: u64) -> Result<(), Errno> {
        if !self.mem.is_ram(gfn) || state.xen_pages.contains_key(&gfn) {
            return Err(Errno::EINVAL);
        }
        if state.set_ballooned(gfn, true) {
            self.mem.discard(gfn).map_err(|_| Errno::ENOMEM)?;
        }
        Ok(())
    }

    /// Shows `page` at `gfn`, and no longer where it was before.
    fn place(&self, gfn: u64, page: XenPage) -> Result<(), Errno> {
        if gfn == 0 || gfn >= MAX_GFN || APIC_GFNS.contains(&gfn) {
            return Err(Errno::EINVAL);
        }
        let mut state = self.state();
        let before = state.xen_pages.iter().find_map(|(&at, &p)| (p == page).then_some(at));
        if before == Some(gfn) {
            return Ok(());
        }
        for old in [before, state.xen_pages.contains_key(&gfn).then_some(gfn)].into_iter().flatten() {
            self.unplace(&mut state, old);
        }
        let (pages, index) = match page {
            XenPage::SharedInfo => (self.shared_info, 0),
            XenPage::GrantFrame(n) => (self.grants, u64::from(n)),
        };
        if self.mem.is_ram(gfn) {
            self.mem.overlay(gfn, pages, index).map_err(|_| Errno::ENOMEM)?;
        } else {
            let hva = pages.hva(index).ok_or(Errno::EINVAL)?;
            self.platform.add_page(gfn, hva)?;
            self.mem.add_extra(gfn, pages, index).map_err(|_| Errno::EINVAL)?;
        }
        state.xen_pages.insert(gfn, page);
        match page {
            XenPage::GrantFrame(n) => state.grant_frames = state.grant_frames.max(n + 1),
            XenPage::SharedInfo => self.platform.shared_info_at(gfn)?,
        }
        tracing::debug!(gfn, ?page, "page placed");
        Ok(())
    }

    /// Takes a page of Xen's away from `gfn`.
    fn unplace(&self, state: &mut State, gfn: u64) {
        if state.xen_pages.remove(&gfn).is_none() {
            return;
        }
        if self.mem.is_ram(gfn) {
            if let Err(e) = self.mem.remove_overlay(gfn) {
                tracing::warn!(gfn, "a page of Xen's stays where it is: {e}");
            }
        } else {
            self.platform.remove_page(gfn);
            self.mem.remove_extra(gfn);
        }
    }
}

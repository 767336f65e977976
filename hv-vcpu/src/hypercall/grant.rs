//! `grant_table_op` (xen/include/public/grant_table.h): set-up and queries. The table itself is checked by hv-core
//! when a grantee uses an entry. Grants of others to this guest are refused for now.

use super::{Answer, Guest, MAX_BATCH};
use crate::errno::Errno;
use crate::platform::GuestCpu;
use crate::state::XenPage;
use xen_abi::grant_table::*;

impl Guest {
    pub(super) fn grant_table_op(&self, cpu: &dyn GuestCpu, cmd: u64, arg: u64, count: u64) -> Answer {
        let count = count as u32 as u64;
        if count > MAX_BATCH {
            return Err(Errno::E2BIG);
        }
        match cmd as u32 {
            GNTTABOP_QUERY_SIZE => {
                single(count)?;
                let mut op: GnttabQuerySize = self.fetch(cpu, arg)?;
                op.status = self.grant_status(op.dom);
                if op.status == GNTST_OKAY {
                    op.nr_frames = self.state().grant_frames;
                    op.max_nr_frames = self.grants.pages() as u32;
                }
                self.put(cpu, arg, &op)?;
                Ok(0)
            }
            GNTTABOP_SETUP_TABLE => {
                single(count)?;
                let mut op: GnttabSetupTable = self.fetch(cpu, arg)?;
                op.status = self.grant_status(op.dom);
                if op.status == GNTST_OKAY && u64::from(op.nr_frames) > self.grants.pages() {
                    op.status = GNTST_GENERAL_ERROR;
                }
                if op.status == GNTST_OKAY {
                    let mut gfns = vec![u64::MAX; op.nr_frames as usize];
                    {
                        let mut state = self.state();
                        state.grant_frames = state.grant_frames.max(op.nr_frames);
                        for (&gfn, page) in &state.xen_pages {
                            if let XenPage::GrantFrame(n) = page
                                && let Some(slot) = gfns.get_mut(*n as usize)
                            {
                                *slot = gfn;
                            }
                        }
                    }
                    for (i, gfn) in gfns.iter().enumerate() {
                        let at = op.frame_list.wrapping_add(i as u64 * 8);
                        if self.copy_out(cpu, at, &gfn.to_le_bytes()).is_err() {
                            op.status = GNTST_BAD_VIRT_ADDR;
                        }
                    }
                }
                self.put(cpu, arg, &op)?;
                Ok(0)
            }
            GNTTABOP_SET_VERSION => {
                single(count)?;
                let op: GnttabSetVersion = self.fetch(cpu, arg)?;
                match op.version {
                    1 => Ok(0),
                    2 => Err(Errno::ENOSYS),
                    _ => Err(Errno::EINVAL),
                }
            }
            GNTTABOP_GET_VERSION => {
                single(count)?;
                let mut op: GnttabGetVersion = self.fetch(cpu, arg)?;
                self.check_self(op.dom)?;
                op.version = 1;
                self.put(cpu, arg, &op)?;
                Ok(0)
            }
            // Every slot gets a status of its own, or a guest would take an old one for the answer (XSA-318).
            GNTTABOP_MAP_GRANT_REF => self.refuse_all::<GnttabMapGrantRef>(cpu, arg, count, |op| {
                op.status = GNTST_PERMISSION_DENIED;
            }),
            GNTTABOP_UNMAP_GRANT_REF => self.refuse_all::<GnttabUnmapGrantRef>(cpu, arg, count, |op| {
                op.status = GNTST_BAD_HANDLE;
            }),
            GNTTABOP_COPY => self.refuse_all::<GnttabCopy>(cpu, arg, count, |op| {
                op.status = GNTST_PERMISSION_DENIED;
            }),
            GNTTABOP_DUMP_TABLE => Err(Errno::EPERM),
            _ => Err(Errno::ENOSYS),
        }
    }

    fn grant_status(&self, dom: u16) -> i16 {
        if self.check_self(dom).is_ok() { GNTST_OKAY } else { GNTST_PERMISSION_DENIED }
    }

    fn refuse_all<T>(&self, cpu: &dyn GuestCpu, arg: u64, count: u64, refuse: impl Fn(&mut T)) -> Answer
    where
        T: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + zerocopy::KnownLayout,
    {
        for i in 0..count {
            let at = arg.wrapping_add(i * size_of::<T>() as u64);
            let mut op: T = self.fetch(cpu, at)?;
            refuse(&mut op);
            self.put(cpu, at, &op)?;
        }
        Ok(0)
    }
}

fn single(count: u64) -> Result<(), Errno> {
    if count == 1 { Ok(()) } else { Err(Errno::EINVAL) }
}

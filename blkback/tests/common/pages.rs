//! Guest pages without grants.

use std::sync::Arc;

use blkback::engine::{Direction, GuestPages, IndirectPage};
use blkback::request::{MAX_INDIRECT_BYTES, Prepared};
use domain_kit::journal::Slot;
use domain_kit::mem::SharedMem;

/// Guest pages without grants: gref n is page n of those that are granted.
pub struct PlainPages {
    pub guest: Arc<SharedMem>,
    pub buffers: Arc<SharedMem>,
    /// Byte offset of page 0.
    pub first: usize,
    /// How many are granted.
    pub pages: usize,
}

impl PlainPages {
    /// All of `guest` is granted.
    pub fn all(guest: Arc<SharedMem>, buffers: Arc<SharedMem>) -> Self {
        let pages = guest.len() / 4096;
        PlainPages { guest, buffers, first: 0, pages }
    }

    fn page(&self, gref: u32) -> Option<usize> {
        let page = gref as usize;
        (page < self.pages).then(|| self.first + page * 4096)
    }
}

impl GuestPages for PlainPages {
    fn transfer(
        &mut self,
        direction: Direction,
        slots: &[Slot],
        requests: &[Prepared],
        failed: &mut Vec<Slot>,
    ) {
        for &slot in slots {
            let request = &requests[slot.0 as usize];
            let mut at = request.buffer as usize;
            for s in &request.segments {
                let Some(page) = self.page(s.gref) else {
                    failed.push(slot);
                    break;
                };
                let page = page + usize::from(s.offset);
                match direction {
                    Direction::Fetch => self.buffers.copy_from(at, &self.guest, page, s.len.into()),
                    Direction::Store => self.guest.copy_from(page, &self.buffers, at, s.len.into()),
                }
                at += usize::from(s.len);
            }
        }
    }

    fn indirect(&mut self, pages: &[IndirectPage], each: &mut dyn FnMut(Slot, Option<&[u8]>)) {
        for page in pages {
            let mut bytes = [0; MAX_INDIRECT_BYTES];
            let bytes = self.page(page.gref).map(|at| {
                let bytes = &mut bytes[..page.len as usize];
                self.guest.copy_out(at, bytes);
                &*bytes
            });
            each(page.slot, bytes);
        }
    }
}

//! The PV console's ring from the guest's end (`io/console.h`).

use std::os::fd::BorrowedFd;
use std::time::Duration;

use domain_kit::Domain;
use domain_kit::evtchn::Port;
use domain_kit::grants::GrantError;
use domain_kit::mem::Page;
use domain_kit::ring::RingMem;
use xen_abi::console::*;

/// A console. What the backend says of its indices is its word alone.
#[derive(Debug)]
pub struct Console {
    page: Page,
    port: Port,
    /// Own indices; the page's copies are only published.
    out_prod: u32,
    in_cons: u32,
}

impl Console {
    /// The domain's own; `None` if there is no console domain.
    ///
    /// # Errors
    /// The hypercalls'.
    pub fn open(domain: &Domain) -> Result<Option<Console>, GrantError> {
        Ok(domain.console_ring()?.map(|(region, port)| {
            let page = Page::new(region.mem, 0);
            let out_prod = page.load_u32(XENCONS_OUT_PROD_OFFSET);
            let in_cons = page.load_u32(XENCONS_IN_CONS_OFFSET);
            Console { page, port, out_prod, in_cons }
        }))
    }

    /// Readable when the backend did something.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.port.rx()
    }

    /// Takes what latched.
    pub fn clear(&self) {
        self.port.clear();
    }

    /// Bytes that can be written now.
    pub fn room(&self) -> usize {
        let used = self.out_prod.wrapping_sub(self.page.load_u32(XENCONS_OUT_CONS_OFFSET));
        // A backend that claims to be ahead of us gets nothing.
        (XENCONS_OUT_SIZE as u32).saturating_sub(used) as usize
    }

    /// Writes what there is room for; how much that was.
    pub fn write_some(&mut self, bytes: &[u8]) -> usize {
        let all = bytes.len().min(self.room());
        let mut rest = &bytes[..all];
        while !rest.is_empty() {
            let at = self.out_prod as usize % XENCONS_OUT_SIZE;
            let n = rest.len().min(XENCONS_OUT_SIZE - at);
            self.page.copy_in(XENCONS_OUT_OFFSET + at, &rest[..n]);
            self.out_prod = self.out_prod.wrapping_add(n as u32);
            rest = &rest[n..];
        }
        if all > 0 {
            self.page.store_u32(XENCONS_OUT_PROD_OFFSET, self.out_prod);
            self.port.notify();
        }
        all
    }

    /// Writes all of it, however long the backend takes.
    pub fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.port.clear();
            let n = self.write_some(bytes);
            bytes = &bytes[n..];
            if n == 0 {
                // It may also have been killed before it told us.
                let _told_or_not = self.port.wait(Some(Duration::from_millis(50)));
            }
        }
    }

    /// Takes what was typed.
    pub fn read(&mut self, into: &mut Vec<u8>) {
        let prod = self.page.load_u32(XENCONS_IN_PROD_OFFSET);
        let there = prod.wrapping_sub(self.in_cons) as usize;
        // More than fits is nothing that can be believed.
        if there == 0 || there > XENCONS_IN_SIZE {
            self.in_cons = prod;
            self.page.store_u32(XENCONS_IN_CONS_OFFSET, prod);
            return;
        }
        for _ in 0..there {
            let mut byte = [0];
            self.page.copy_out(XENCONS_IN_OFFSET + self.in_cons as usize % XENCONS_IN_SIZE, &mut byte);
            into.push(byte[0]);
            self.in_cons = self.in_cons.wrapping_add(1);
        }
        self.page.store_u32(XENCONS_IN_CONS_OFFSET, self.in_cons);
        self.port.notify();
    }
}

//! The console's light load: a byte of output, until the console domain has taken it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use domain_kit::Domain;
use domain_kit::evtchn::Port;
use domain_kit::mem::Page;
use domain_kit::ring::RingMem;
use xen_abi::console::*;

/// Looks again after so long: the backend may have been killed between taking the byte and telling so.
const LOOK: Duration = Duration::from_millis(5);
/// The most looks at one byte.
const LOOKS: u32 = 2000;

/// The PV console's ring, from the guest's end (io/console.h).
pub struct Console {
    page: Page,
    port: Port,
    out_prod: u32,
}

impl Console {
    /// Takes the domain's console ring.
    ///
    /// # Errors
    /// There is none.
    pub fn open(domain: &Domain) -> Result<Console> {
        let (region, port) = domain.console_ring()?.context("there is no console domain")?;
        let page = Page::new(region.mem, 0);
        let out_prod = page.load_u32(XENCONS_OUT_PROD_OFFSET);
        Ok(Console { page, port, out_prod })
    }

    /// Writes one byte and waits until it was taken.
    ///
    /// # Errors
    /// It was not taken for long.
    pub fn request(&mut self) -> Result<()> {
        self.port.clear();
        self.page.copy_in(XENCONS_OUT_OFFSET + self.out_prod as usize % XENCONS_OUT_SIZE, b".");
        self.out_prod = self.out_prod.wrapping_add(1);
        self.page.store_u32(XENCONS_OUT_PROD_OFFSET, self.out_prod);
        self.port.notify();
        let mut looks = 0;
        while self.page.load_u32(XENCONS_OUT_CONS_OFFSET) != self.out_prod {
            ensure!(
                looks < LOOKS,
                "the console took nothing for {} s",
                LOOKS * LOOK.as_millis() as u32 / 1000
            );
            looks += 1;
            self.port.wait(Some(LOOK))?;
        }
        Ok(())
    }
}

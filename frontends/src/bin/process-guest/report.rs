//! The console of a process guest.

use std::io::Write;
use std::sync::Mutex;
use std::time::Duration;

use domain_kit::Domain;
use domain_kit::evtchn::Port;
use domain_kit::mem::Page;
use domain_kit::ring::RingMem;
use workload::report::Report;
use xen_abi::console::*;

/// The PV console's ring, from the guest's end (io/console.h).
struct Console {
    page: Page,
    port: Port,
    /// Own index; the page's copy is only published.
    out_prod: u32,
}

impl Console {
    /// Writes all of it, however long the backend takes.
    fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.port.clear();
            let used = self.out_prod.wrapping_sub(self.page.load_u32(XENCONS_OUT_CONS_OFFSET));
            // A backend that claims to be ahead of us gets nothing.
            let free = (XENCONS_OUT_SIZE as u32).saturating_sub(used) as usize;
            if free == 0 {
                // It may also have been killed before it told us.
                let _told_or_not = self.port.wait(Some(Duration::from_millis(50)));
                continue;
            }
            let at = self.out_prod as usize % XENCONS_OUT_SIZE;
            let n = bytes.len().min(free).min(XENCONS_OUT_SIZE - at);
            self.page.copy_in(XENCONS_OUT_OFFSET + at, &bytes[..n]);
            self.out_prod = self.out_prod.wrapping_add(n as u32);
            self.page.store_u32(XENCONS_OUT_PROD_OFFSET, self.out_prod);
            self.port.notify();
            bytes = &bytes[n..];
        }
        // Nobody reads input here; it is taken so that the backend's ring never stays full.
        let in_prod = self.page.load_u32(XENCONS_IN_PROD_OFFSET);
        self.page.store_u32(XENCONS_IN_CONS_OFFSET, in_prod);
    }
}

/// The console, or stderr where there is none. Shared by all threads.
pub struct Reporter {
    console: Mutex<Option<Console>>,
}

impl Reporter {
    /// Takes the domain's console ring.
    pub fn open(domain: &Domain) -> Self {
        let console = match domain.console_ring() {
            Ok(Some((region, port))) => {
                let page = Page::new(region.mem, 0);
                let out_prod = page.load_u32(XENCONS_OUT_PROD_OFFSET);
                Some(Console { page, port, out_prod })
            }
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%error, "no console; reports go to stderr");
                None
            }
        };
        Reporter { console: Mutex::new(console) }
    }
}

impl Report for Reporter {
    fn write(&self, line: &str) {
        let mut console = self.console.lock().unwrap_or_else(|e| e.into_inner());
        match console.as_mut() {
            Some(console) => console.write(line.as_bytes()),
            // Nowhere else to say that this failed.
            None => drop(std::io::stderr().write_all(line.as_bytes())),
        }
    }
}

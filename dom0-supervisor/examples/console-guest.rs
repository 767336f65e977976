//! A process guest without devices, for tests: prints numbered lines on its console, answers input, and does what
//! `control/shutdown` says. `--fail TEXT` ends at once instead, `--crash` shuts down as crashed after a moment.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::Duration;

use domain_kit::Domain;
use domain_kit::evtchn::Port;
use domain_kit::mem::Page;
use domain_kit::xs::{RingTransport, XsClient, XsOps};
use xen_abi::console::*;
use xen_abi::sched::{SHUTDOWN_CRASH, SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT};

struct Console {
    page: Page,
    port: Port,
}

impl Console {
    fn index(&self, offset: usize) -> u32 {
        self.page.mem.load_u32(self.page.base + offset, Acquire)
    }

    fn print(&self, text: &str) {
        for byte in text.bytes() {
            let prod = self.index(XENCONS_OUT_PROD_OFFSET);
            while prod.wrapping_sub(self.index(XENCONS_OUT_CONS_OFFSET)) as usize >= XENCONS_OUT_SIZE {
                self.port.notify();
                std::thread::sleep(Duration::from_millis(1));
            }
            let place = prod as usize % XENCONS_OUT_SIZE;
            self.page.mem.copy_in(self.page.base + XENCONS_OUT_OFFSET + place, &[byte]);
            self.page.mem.store_u32(self.page.base + XENCONS_OUT_PROD_OFFSET, prod.wrapping_add(1), Release);
        }
        self.port.notify();
    }

    fn input(&self) -> Vec<u8> {
        let (prod, mut cons) = (self.index(XENCONS_IN_PROD_OFFSET), self.index(XENCONS_IN_CONS_OFFSET));
        let mut out = Vec::new();
        while cons != prod {
            let mut byte = [0];
            let place = cons as usize % XENCONS_IN_SIZE;
            self.page.mem.copy_out(self.page.base + XENCONS_IN_OFFSET + place, &mut byte);
            out.push(byte[0]);
            cons = cons.wrapping_add(1);
        }
        self.page.mem.store_u32(self.page.base + XENCONS_IN_CONS_OFFSET, cons, Release);
        out
    }
}

fn store(domain: &Domain) -> anyhow::Result<XsClient> {
    let (region, port) = domain.store_ring()?.ok_or_else(|| anyhow::anyhow!("no xenstore domain"))?;
    let tx = port.tx().ok_or_else(|| anyhow::anyhow!("the store's port can't send"))?.try_clone_to_owned()?;
    let ring = RingTransport::new(Arc::new(Page::new(region.mem, 0)), port.rx().try_clone_to_owned()?, tx)?;
    Ok(XsClient::connect(ring, Duration::from_secs(20))?)
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let domain = Domain::join("console-guest")?;
    if args.first().is_some_and(|a| a == "--fail") {
        anyhow::bail!("{}", args.get(1).map_or("told to fail", String::as_str));
    }
    let (region, port) = domain.console_ring()?.ok_or_else(|| anyhow::anyhow!("no console domain"))?;
    let console = Console { page: Page::new(region.mem.clone(), 0), port };
    let xs = store(&domain)?;
    let watches = xs.watch_set()?;
    watches.watch("control/shutdown", "shutdown")?;
    domain.hv.served()?;
    for line in 0u64.. {
        console.print(&format!("line {line}\r\n"));
        let typed = console.input();
        if !typed.is_empty() {
            console.print(&format!("you typed {}\r\n", String::from_utf8_lossy(&typed).trim()));
        }
        if args.first().is_some_and(|a| a == "--crash") && line == 20 {
            domain.hv.shutdown(SHUTDOWN_CRASH)?;
        }
        if watches.next_timeout(Duration::from_millis(10)).is_some() {
            let reason = match xs.read_opt("control/shutdown")?.as_deref() {
                Some("poweroff") => SHUTDOWN_POWEROFF,
                Some("reboot") => SHUTDOWN_REBOOT,
                _ => continue,
            };
            xs.write("control/shutdown", "")?;
            console.print("going down\r\n");
            domain.hv.shutdown(reason)?;
        }
    }
    Ok(())
}

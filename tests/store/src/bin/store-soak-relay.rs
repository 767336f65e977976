//! A domain that is nothing but its store ring: bytes of the one connection on descriptor 4 go into it, and what comes out goes back.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use domain_kit::Domain;
use domain_kit::mem::Page;
use domain_kit::xs::{RingTransport, Transport};

/// Longer than any restart.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let domain = Domain::join("store-soak-relay")?;
    let listener = domain_kit::os::take_inherited(hv_abi::CONTROL_LISTENER_FD).context("descriptor 4")?;
    let (region, port) = domain.store_ring()?.context("there is no xenstore domain")?;
    let rx = port.rx().try_clone_to_owned()?;
    let tx = port.tx().context("the store's port cannot send")?.try_clone_to_owned()?;
    let ring = Arc::new(RingTransport::new(Arc::new(Page::new(region.mem.clone(), 0)), rx, tx)?);
    domain.hv.served()?;
    let (stream, _) = UnixListener::from(listener).accept()?;
    let (mut from, mut to) = (stream.try_clone()?, stream);
    let outward = Arc::clone(&ring);
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        // An error ends the connection, which the driver takes as the failure that it is.
        while let Ok(n) = outward.recv(&mut buffer) {
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        std::process::exit(1);
    });
    let mut buffer = [0; 1024];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        ring.send(&buffer[..n], Instant::now() + PATIENCE)?;
    }
}

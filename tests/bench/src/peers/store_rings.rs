//! xenstored's own loop over many rings in one process, and one client of one of them: 2,000 domains without 2,000 processes.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domain_kit::evtchn::Port;
use domain_kit::mem::{Page, SharedMem, sealed_memfd};
use domain_kit::xs::{Op, RingTransport, Transport};
use nix::sys::eventfd::{EfdFlags, EventFd};
use xenstored::daemon::Daemon;
use xenstored::domains::{Domains, Ring, Seen};
use xenstored::engine::{Engine, Options};
use xenstored::journal::log::Log;
use xenstored::journal::mem::Mem;
use xenstored::keeper::NoKeeper;
use xenstored::store::Class;

use crate::cases::store::conn::{ERROR, first, request};
use crate::stats::Series;

/// Bytes of each half of the journal.
const HALF: u64 = 64 << 20;
/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A domain's ring and both ends of its event channel.
struct Guest {
    page: Page,
    to_server: OwnedFd,
    to_guest: OwnedFd,
}

fn eventfd() -> Result<OwnedFd> {
    Ok(EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?.into())
}

/// Domains 1 and up, all there from the beginning.
struct Crowd {
    guests: Arc<BTreeMap<u16, Guest>>,
    /// Never readable; a source without it is taken to have no domains.
    changed: OwnedFd,
}

impl Domains for Crowd {
    fn changed_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.changed.as_fd())
    }

    fn clear(&mut self) {}

    fn list(&mut self) -> io::Result<Vec<Seen>> {
        let seen = |domid: &u16| Seen {
            domid: *domid,
            instance: 1,
            ring: Some((1, 1)),
            class: Class::Guest,
            shutdown: false,
            dying: false,
        };
        Ok(self.guests.keys().map(seen).collect())
    }

    fn attach(&mut self, seen: &Seen) -> io::Result<Ring> {
        let guest = self.guests.get(&seen.domid).ok_or(io::ErrorKind::NotFound)?;
        let port = Port::new(1, guest.to_server.try_clone()?, Some(guest.to_guest.try_clone()?));
        Ok(Ring { page: Arc::new(guest.page.clone()), port })
    }

    fn detach(&mut self, _domid: u16) {}
}

/// The first line says how many domains; each further one how many requests to time, and is answered with their median, µs.
///
/// # Errors
/// Those of the daemon and of the client.
pub fn serve(input: BorrowedFd<'_>, output: BorrowedFd<'_>) -> Result<()> {
    let mut output = std::fs::File::from(output.try_clone_to_owned()?);
    let mut lines = BufReader::new(std::fs::File::from(input.try_clone_to_owned()?)).lines();
    let count: u16 = lines.next().context("how many domains")??.parse()?;
    let mut guests = BTreeMap::new();
    for domid in 1..=count {
        let (mem, _) = SharedMem::create("ring", 4096)?;
        let page = Page::new(Arc::new(mem), 0);
        guests.insert(domid, Guest { page, to_server: eventfd()?, to_guest: eventfd()? });
    }
    let guests = Arc::new(guests);
    // In the middle: neither the first nor the last of any list.
    let client = guests.get(&count.div_ceil(2)).context("a domain")?;
    let ring = RingTransport::new(
        Arc::new(client.page.clone()),
        client.to_guest.try_clone()?,
        client.to_server.try_clone()?,
    )?;
    let crowd = Crowd { guests: Arc::clone(&guests), changed: eventfd()? };
    std::thread::spawn(move || {
        if let Err(e) = daemon(crowd) {
            eprintln!("bench: xenstored's loop: {e:#}");
            std::process::exit(1);
        }
    });
    time(&ring, 10)?;
    writeln!(output, "0")?;
    for line in lines {
        let median = time(&ring, line?.parse()?)?;
        writeln!(output, "{median}")?;
    }
    Ok(())
}

fn daemon(crowd: Crowd) -> Result<()> {
    let len = usize::try_from(Log::memory_len(HALF))?;
    let mem = Mem::map(sealed_memfd("bench-journal", len)?.into(), len)?;
    let options = Options { half_size: HALF, ..Options::default() };
    let (engine, _) = Engine::open(Rc::new(mem), &options)?;
    let stop = eventfd()?;
    Daemon::new(engine, None, stop.as_fd(), NoKeeper::default(), crowd)?.run()?;
    Ok(())
}

fn time(ring: &RingTransport, count: usize) -> Result<f64> {
    let mut bytes = Vec::new();
    request(Op::Read, 0, &[b"/tool\0"], &mut bytes);
    let mut buffer = [0; 4096];
    let mut times = Series::default();
    for _ in 0..count {
        let start = Instant::now();
        ring.send(&bytes, start + PATIENCE)?;
        let mut have = 0;
        while first(&buffer[..have]).is_none() {
            have += ring.recv(&mut buffer[have..])?;
        }
        times.push(start.elapsed().as_secs_f64() * 1e6);
        // "/tool" may be closed to guests: a refusal is as good a round trip.
        ensure!(first(&buffer[..have]).is_some_and(|(kind, ..)| kind == Op::Read as u32 || kind == ERROR));
    }
    Ok(times.median())
}

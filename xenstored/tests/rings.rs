//! Rings: the client of domain-kit against the daemon's loop over shared pages and eventfds, a guest that writes nonsense in its
//! indices (XSA-38), and requests that kill the daemon.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use domain_kit::evtchn::Port;
use domain_kit::mem::{Page, SharedMem, sealed_memfd};
use domain_kit::xs::{RingTransport, SharedPage as _, XsClient, XsErrno, XsError, XsOps};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use xenstored::daemon::Daemon;
use xenstored::domains::{Domains, Ring, Seen};
use xenstored::engine::{Engine, Options};
use xenstored::journal::log::Log;
use xenstored::journal::mem::Mem;
use xenstored::keeper::NoKeeper;
use xenstored::store::{Class, ConnId};
use xenstored::transport::ring::{self, BadIndex};

const HALF: u64 = 4 << 20;

fn eventfd() -> OwnedFd {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).expect("eventfd").into()
}

fn dup(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().expect("dup")
}

/// A domain as the test sees it.
struct Guest {
    page: Page,
    to_server: OwnedFd,
    to_guest: OwnedFd,
    seen: Seen,
}

#[derive(Clone)]
struct Host(Arc<Mutex<BTreeMap<u16, Guest>>>, Arc<OwnedFd>);

impl Host {
    fn new() -> Self {
        Self(Arc::default(), Arc::new(eventfd()))
    }

    fn changed(&self) {
        nix::unistd::write(&*self.1, &1u64.to_ne_bytes()).expect("kick");
    }

    fn add(&self, domid: u16, instance: u64, class: Class) {
        let (mem, _fd) = SharedMem::create("ring", 4096).expect("page");
        let page = Page::new(Arc::new(mem), 0);
        let seen = Seen { domid, instance, ring: Some((1, 1)), class, shutdown: false, dying: false };
        let guest = Guest { page, to_server: eventfd(), to_guest: eventfd(), seen };
        self.0.lock().expect("lock").insert(domid, guest);
        self.changed();
    }

    fn remove(&self, domid: u16) {
        self.0.lock().expect("lock").remove(&domid);
        self.changed();
    }

    fn client(&self, domid: u16) -> XsClient {
        let guests = self.0.lock().expect("lock");
        let guest = &guests[&domid];
        let transport =
            RingTransport::new(Arc::new(guest.page.clone()), dup(&guest.to_guest), dup(&guest.to_server))
                .expect("ring");
        drop(guests);
        XsClient::connect(transport, Duration::from_secs(10)).expect("connected")
    }

    fn page(&self, domid: u16) -> Page {
        self.0.lock().expect("lock")[&domid].page.clone()
    }

    fn kick(&self, domid: u16) {
        nix::unistd::write(&self.0.lock().expect("lock")[&domid].to_server, &1u64.to_ne_bytes())
            .expect("kick");
    }
}

impl Domains for Host {
    fn changed_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.1.as_fd())
    }

    fn clear(&mut self) {
        let _ = nix::unistd::read(&*self.1, &mut [0; 8]);
    }

    fn list(&mut self) -> io::Result<Vec<Seen>> {
        Ok(self.0.lock().expect("lock").values().map(|g| g.seen).collect())
    }

    fn attach(&mut self, seen: &Seen) -> io::Result<Ring> {
        let guests = self.0.lock().expect("lock");
        let guest = guests.get(&seen.domid).ok_or(io::ErrorKind::NotFound)?;
        let port = Port::new(1, dup(&guest.to_server), Some(dup(&guest.to_guest)));
        Ok(Ring { page: Arc::new(guest.page.clone()), port })
    }

    fn detach(&mut self, _domid: u16) {}
}

/// The daemon in a thread; its journal's memfd can be taken up by the next one.
struct Server {
    stop: OwnedFd,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start(host: &Host, journal: &OwnedFd) -> Self {
        let stop = eventfd();
        let (host, journal, stop_in) = (host.clone(), dup(journal), dup(&stop));
        let thread = std::thread::spawn(move || {
            let mem = Mem::map(journal.into(), Log::memory_len(HALF) as usize).expect("map");
            let options = Options { half_size: HALF, ..Options::default() };
            let (engine, _) = Engine::open(Rc::new(mem), &options).expect("journal");
            let mut daemon =
                Daemon::new(engine, None, stop_in.as_fd(), NoKeeper::default(), host).expect("daemon");
            daemon.run().expect("runs");
            daemon.engine().store.check().expect("invariants");
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        nix::unistd::write(&self.stop, &1u64.to_ne_bytes()).expect("stop");
        let ended = self.thread.take().expect("started").join();
        if !std::thread::panicking() {
            ended.expect("the daemon ran to its end");
        }
    }
}

fn journal() -> OwnedFd {
    sealed_memfd("journal", Log::memory_len(HALF) as usize).expect("memfd")
}

#[test]
fn client_over_a_ring() {
    let (host, journal) = (Host::new(), journal());
    host.add(0, 1, Class::Dom0);
    host.add(5, 2, Class::Guest);
    let mut server = Server::start(&host, &journal);
    let (dom0, guest) = (host.client(0), host.client(5));
    dom0.write("/local/domain/5/data", "x").expect("write");
    dom0.set_perms("/local/domain/5", &["n0", "r5"]).expect("perms");
    dom0.set_perms("/local/domain/5/data", &["n5"]).expect("perms");
    guest.write("data/big", vec![7u8; 2000]).expect("more than the ring holds");
    assert_eq!(guest.read("data/big").expect("read"), vec![7u8; 2000]);
    assert!(matches!(guest.write("/tool/x", "y"), Err(XsError::Errno(XsErrno::EACCES))));
    for i in 0..300 {
        guest.write(&format!("data/list/a-node-with-a-long-name-{i:04}"), "").expect("write");
    }
    assert_eq!(guest.directory("data/list").expect("in parts").len(), 300);
    assert_eq!(guest.get_perms("data").expect("perms"), ["n5"]);
    let watches = guest.watch_set().expect("set");
    watches.watch("data/w", "mine").expect("watch");
    let first = watches.next_timeout(Duration::from_secs(5)).expect("fires once");
    assert_eq!((first.path.as_str(), first.token.as_str()), ("data/w", "mine"));
    dom0.write("/local/domain/5/data/w/sub", "1").expect("write");
    assert_eq!(watches.next_timeout(Duration::from_secs(5)).expect("event").path, "data/w/sub");
    let sum = guest
        .transaction(|tx| {
            let n: u32 = tx.read_opt("data/n")?.and_then(|s| s.parse().ok()).unwrap_or(0);
            tx.write("data/n", (n + 1).to_string())?;
            Ok(n + 1)
        })
        .expect("commit");
    assert_eq!(sum, 1);

    // Many threads on one ring.
    std::thread::scope(|s| {
        for t in 0..8 {
            let guest = guest.clone();
            s.spawn(move || {
                for i in 0..100 {
                    let (path, value) = (format!("data/t{t}"), format!("{i}"));
                    guest.write(&path, &value).expect("write");
                    assert_eq!(guest.read_string(&path).expect("read"), value);
                }
            });
        }
    });

    // The server restarts: a pause, nothing else.
    drop(server);
    server = Server::start(&host, &journal);
    assert_eq!(guest.read_string("data/n").expect("read"), "1");
    dom0.write("/local/domain/5/data/w", "2").expect("write");
    assert_eq!(watches.next_timeout(Duration::from_secs(5)).expect("event").path, "data/w");
    assert!(watches.try_next().is_none());

    // The client restarts: the new one resets the ring, the old watch is gone.
    drop(watches);
    drop(guest);
    let guest = host.client(5);
    let watches = guest.watch_set().expect("set");
    watches.watch("data/w", "again").expect("watch");
    assert_eq!(watches.next_timeout(Duration::from_secs(5)).expect("fires once").token, "again");

    // The domain goes, and one with its domid comes.
    let dom0_watches = dom0.watch_set().expect("set");
    dom0_watches.watch("@releaseDomain", "r").expect("watch");
    dom0_watches.watch("@introduceDomain", "i").expect("watch");
    let _ = (
        dom0_watches.next_timeout(Duration::from_secs(5)),
        dom0_watches.next_timeout(Duration::from_secs(5)),
    );
    host.remove(5);
    assert_eq!(dom0_watches.next_timeout(Duration::from_secs(5)).expect("released").token, "r");
    host.add(5, 3, Class::Guest);
    assert_eq!(dom0_watches.next_timeout(Duration::from_secs(5)).expect("introduced").token, "i");
    let guest = host.client(5);
    assert!(guest.read("data/big").is_err());
    assert_eq!(dom0.control(&["check"]).expect("check"), "OK");
    drop(server);
}

/// XSA-38: whatever a guest writes into its page, only its own ring suffers, and a reset brings it back.
#[test]
fn xsa_38_ring_indices() {
    let (host, journal) = (Host::new(), journal());
    host.add(0, 1, Class::Dom0);
    host.add(5, 2, Class::Guest);
    let server = Server::start(&host, &journal);
    let dom0 = host.client(0);
    let page = host.page(5);
    let mut rng = SmallRng::seed_from_u64(38);
    let deadline = Instant::now() + Duration::from_secs(5);
    for round in 0..400 {
        for off in [2048, 2052, 2056, 2060] {
            let value = match rng.random_range(0..5) {
                0 => 0,
                1 => 1023,
                2 => 1025,
                3 => u32::MAX - rng.random_range(0..1100),
                _ => rng.random(),
            };
            page.store_u32(off, value);
        }
        let mut noise = [0u8; 1024];
        rng.fill(&mut noise[..]);
        page.write_bytes(0, &noise);
        host.kick(5);
        if round % 20 == 0 {
            // Another domain is served meanwhile.
            dom0.write("/x", "y").expect("dom0 is served");
        }
        if round % 50 == 0 {
            let guest = host.client(5);
            assert!(guest.read("none").is_err_and(|e| matches!(e, XsError::Errno(_))));
        }
        assert!(Instant::now() < deadline);
    }
    let guest = host.client(5);
    assert!(matches!(guest.read("none"), Err(XsError::Errno(_))));
    drop(server);
}

fn fresh_engine() -> (Rc<Mem>, Engine, ConnId, Page) {
    let mem = Rc::new(Mem::map(journal().into(), Log::memory_len(HALF) as usize).expect("map"));
    let options = Options { half_size: HALF, ..Options::default() };
    let (mut engine, _) = Engine::open(Rc::clone(&mem), &options).expect("journal");
    let conn = engine.domain_up(5, 1, (1, 1), Class::Guest).expect("room").expect("slot");
    let (ring_mem, _fd) = SharedMem::create("ring", 4096).expect("page");
    let page = Page::new(Arc::new(ring_mem), 0);
    ring::adopt(&engine, conn, &page);
    (mem, engine, conn, page)
}

/// Every pair of producer and own index: either at most a ring's worth is taken, or the pair is refused.
#[test]
fn xsa_38_every_index_pair() {
    let (_mem, mut engine, conn, page) = fresh_engine();
    for prod in (0..=2100u32).chain(u32::MAX - 2100..=u32::MAX) {
        engine.reset(conn).expect("room");
        ring::empty(&engine, conn, &page);
        page.store_u32(2052, prod);
        let before = engine.slot(conn).expect("slot").received();
        match ring::pull(&engine, conn, &page) {
            Ok(_) => {
                assert!(prod <= 1024);
                assert_eq!(engine.slot(conn).expect("slot").received() - before, u64::from(prod));
            }
            Err(BadIndex) => assert!(prod > 1024),
        }
    }
}

/// A request that makes the daemon die by its own fault costs its connection at the third time; deaths from outside never do.
#[test]
fn poison_request_costs_its_connection() {
    use xenstored::journal::layout::sb;
    let (mem, mut engine, conn, page) = fresh_engine();
    let request = [2u32, 1, 0, 2].map(u32::to_ne_bytes).concat();
    page.write_bytes(0, &[&request[..], b"/\0"].concat());
    page.store_u32(2052, 18);
    ring::pull(&engine, conn, &page).expect("indices");
    assert!(engine.has_request(conn));
    let options = |own_fault| Options { half_size: HALF, own_fault, ..Options::default() };
    for death in 1..=3 {
        // Killed from outside any number of times in between.
        for own_fault in [false, false, true] {
            mem.store_u64(sb::EXEC_AT, 0);
            mem.store_u64(sb::EXEC_CONN, conn.0);
            drop(engine);
            let opened;
            (engine, opened) = Engine::open(Rc::clone(&mem), &options(own_fault)).expect("journal");
            let expected = (death == 3 && own_fault).then_some(conn);
            assert_eq!(opened.poisoned, expected, "death {death}, own fault {own_fault}");
        }
    }
    assert_eq!(engine.store.conn(conn).and_then(|c| c.ignored), Some(3));
    assert!(!engine.has_request(conn));
    // The client can reset its ring.
    page.store_u32(2068, 1);
    ring::reset(&mut engine, conn, &page).expect("room");
    assert_eq!(page.load_u32(2068), 0);
    assert_eq!(engine.store.conn(conn).and_then(|c| c.ignored), None);
}

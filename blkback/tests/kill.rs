//! Real kills of the real data path: a child process runs engine, ring, journal and io_uring over shared memory, a parent is
//! its frontend with a verifying load and kills it with SIGKILL at random moments. No hv-core: ring, journal and guest pages are
//! memfds that both map. `BLKBACK_KILLS` sets the number (default 60).
#![expect(unsafe_code, reason = "fork: the child calls only into the engine and never returns")]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkback::disk::attachment::{Disk, DiskQueue};
use blkback::disk::source::{self, Cache};
use blkback::engine::{BUFFERS_BYTES, Direction, Engine, GuestPages, IndirectPage};
use blkback::request::{BlkifFormat, Prepared};
use blkback::stats::Stats;
use domain_kit::journal::{JournaledRing, Shape, Slot};
use domain_kit::mem::SharedMem;
use domain_kit::ring::{FrontRing, RingLayout};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use xen_abi::io::blkif::*;

const ABI: Abi = Abi::X86_64;
const SECTORS: u64 = 2048;
const PAGES: usize = 32;
const POISON: u64 = 1000;

/// Guest pages without grants: gref n is page n.
struct PlainPages {
    guest: Arc<SharedMem>,
    buffers: Arc<SharedMem>,
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
            let mut at = requests[slot.0 as usize].buffer as usize;
            for s in &requests[slot.0 as usize].segments {
                if s.gref as usize >= PAGES {
                    failed.push(slot);
                    break;
                }
                let page = s.gref as usize * 4096 + usize::from(s.offset);
                match direction {
                    Direction::Fetch => self.buffers.copy_from(at, &self.guest, page, s.len.into()),
                    Direction::Store => self.guest.copy_from(page, &self.buffers, at, s.len.into()),
                }
                at += usize::from(s.len);
            }
        }
    }

    fn indirect(&mut self, _pages: &[IndirectPage], _each: &mut dyn FnMut(Slot, Option<&[u8]>)) {}
}

struct Shared {
    ring: Arc<SharedMem>,
    journal: Arc<SharedMem>,
    guest: Arc<SharedMem>,
    to_back: EventFd,
    to_front: EventFd,
    path: std::path::PathBuf,
    layout: RingLayout,
    shape: Shape,
}

/// One incarnation. Never returns.
fn incarnation(s: &Shared, own_fault: bool, poison: Option<u64>) -> ! {
    let file = File::options().read(true).write(true).open(&s.path).expect("open");
    let source =
        Arc::new(source::open(file.into(), false, Cache::None, Duration::from_secs(10)).expect("fence"));
    let (ring, unanswered) = JournaledRing::reattach(
        s.ring.clone(),
        s.layout,
        s.journal.clone(),
        s.shape,
        BlkifFormat(ABI),
        own_fault,
    )
    .expect("a sound journal");
    let (buffers, _fd) = SharedMem::create("buffers", BUFFERS_BYTES).expect("buffers");
    let buffers = Arc::new(buffers);
    let disk = source.queue(buffers.clone(), 32).expect("io_uring");
    let guest = PlainPages { guest: s.guest.clone(), buffers };
    let mut engine = Engine::new(ring, ABI, unanswered, guest, disk, Arc::new(Stats::default()));
    if let Some(poison) = poison {
        engine.set_fault_hook(Box::new(move |request| {
            if request.offset == poison * 512 {
                std::process::abort();
            }
        }));
    }
    let mut first = true;
    loop {
        let polled = engine.poll().expect("an honest frontend");
        if polled.notify || std::mem::take(&mut first) {
            s.to_front.write(1).expect("notify");
        }
        if !polled.more {
            engine.disk().wait(&[s.to_back.as_fd()], None).expect("wait");
        }
    }
}

fn start(s: &Shared, own_fault: bool, poison: Option<u64>) -> Pid {
    // SAFETY: the child only runs the engine, on memory of its own and shared mappings, and is killed. Other threads of the test
    // process hold no lock that it needs: allocation after fork is safe with glibc.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => incarnation(s, own_fault, poison),
        ForkResult::Parent { child } => child,
    }
}

fn fill(version: u64, sector: u64) -> [u8; 512] {
    let mut out = [0; 512];
    for chunk in out.chunks_exact_mut(16) {
        chunk[..8].copy_from_slice(&version.to_le_bytes());
        chunk[8..].copy_from_slice(&sector.to_le_bytes());
    }
    out
}

struct Pending {
    operation: u8,
    sector: u64,
    sectors: u64,
    version: u64,
    page: usize,
}

struct Front {
    ring: FrontRing<Arc<SharedMem>>,
    guest: Arc<SharedMem>,
    pending: HashMap<u64, Pending>,
    free_pages: Vec<usize>,
    next_id: u64,
    content: Vec<u64>,
    answered: u64,
    read_back: u64,
}

impl Front {
    fn busy(&self, sector: u64, sectors: u64) -> bool {
        self.pending.values().any(|p| p.sector < sector + sectors && sector < p.sector + p.sectors)
    }

    /// Fills the ring with requests that do not overlap; true if the backend is to be notified.
    fn issue(&mut self, rng: &mut SmallRng, depth: u32) -> bool {
        while self.ring.pending() < depth {
            let sectors = rng.random_range(1..=8);
            let sector = rng.random_range(0..SECTORS - sectors);
            if self.busy(sector, sectors) {
                break;
            }
            let Some(page) = self.free_pages.pop() else { break };
            let id = self.next_id;
            self.next_id += 1;
            let operation = match rng.random_range(0..20) {
                0..9 => BLKIF_OP_READ,
                9..18 => BLKIF_OP_WRITE,
                18 => BLKIF_OP_WRITE_BARRIER,
                _ => BLKIF_OP_FLUSH_DISKCACHE,
            };
            let data = operation != BLKIF_OP_FLUSH_DISKCACHE;
            let mut request = BlkifRequest { operation, id, sector_number: sector, ..Default::default() };
            if data {
                request.nr_segments = 1;
                request.seg[0] = BlkifRequestSegment::new(page as u32, 0, sectors as u8 - 1);
                for i in 0..sectors {
                    let bytes = if operation == BLKIF_OP_READ { [0xee; 512] } else { fill(id, sector + i) };
                    self.guest.copy_in(page * 4096 + i as usize * 512, &bytes);
                }
            }
            self.ring.put(&ABI.encode(&Request::Direct(request)));
            let sectors = if data { sectors } else { 0 };
            self.pending.insert(id, Pending { operation, sector, sectors, version: id, page });
        }
        self.ring.push()
    }

    fn take(&mut self) {
        loop {
            for _ in 0..self.ring.unconsumed().expect("honest backend") {
                let mut bytes = [0; 16];
                self.ring.take(&mut bytes);
                let response = ABI.decode_response(&bytes);
                let p = self.pending.remove(&response.id).expect("a response to nothing that is pending");
                assert_eq!(response.operation, p.operation);
                assert_eq!(response.status, BLKIF_RSP_OKAY);
                self.free_pages.push(p.page);
                self.answered += 1;
                for i in 0..p.sectors {
                    let content = &mut self.content[(p.sector + i) as usize];
                    if p.operation == BLKIF_OP_READ {
                        let mut bytes = [0; 512];
                        self.guest.copy_out(p.page * 4096 + i as usize * 512, &mut bytes);
                        let want = if *content == 0 { [0; 512] } else { fill(*content, p.sector + i) };
                        assert_eq!(bytes, want, "sector {}", p.sector + i);
                        self.read_back += 512;
                    } else {
                        *content = p.version;
                    }
                }
            }
            if !self.ring.final_check().expect("honest backend") {
                return;
            }
        }
    }
}

fn shared(path: &std::path::Path) -> Shared {
    let layout = RingLayout::new(1, ABI.entry_size(), ABI.response_size());
    let shape = JournaledRing::<Arc<SharedMem>, Arc<SharedMem>, BlkifFormat>::shape(&layout, 0, 0);
    let memory = |len| Arc::new(SharedMem::create("kill-test", len).unwrap().0);
    let eventfd =
        || EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    Shared {
        ring: memory(4096),
        journal: memory(shape.bytes()),
        guest: memory(PAGES * 4096),
        to_back: eventfd(),
        to_front: eventfd(),
        path: path.to_owned(),
        layout,
        shape,
    }
}

/// An empty journal for the first incarnation to take up.
fn create(s: &Shared) {
    let (ring, journal) = (s.ring.clone(), s.journal.clone());
    drop(JournaledRing::create(ring, s.layout, journal, s.shape, [0; 6], BlkifFormat(ABI)).unwrap());
}

#[test]
fn kills_lose_nothing() {
    let kills: u32 = std::env::var("BLKBACK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(SECTORS * 512).unwrap();
    let s = shared(disk.path());
    let mut front = Front {
        ring: FrontRing::init(s.ring.clone(), s.layout),
        guest: s.guest.clone(),
        pending: HashMap::new(),
        free_pages: (0..PAGES).collect(),
        next_id: 1,
        content: vec![0; SECTORS as usize],
        answered: 0,
        read_back: 0,
    };
    create(&s);
    let mut rng = SmallRng::seed_from_u64(1);
    let mut child = start(&s, false, None);
    let mut pauses = Vec::new();
    for round in 0..=kills {
        let until = Instant::now() + Duration::from_micros(rng.random_range(0..6000));
        let depth = [1, 4, 32][round as usize % 3];
        let mut seen = front.answered;
        while Instant::now() < until || front.answered == seen {
            if front.issue(&mut rng, depth) {
                s.to_back.write(1).unwrap();
            }
            let mut fds = [PollFd::new(s.to_front.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::from(5000u16)).unwrap();
            assert!(ready > 0, "stuck with {} pending", front.pending.len());
            let _ = s.to_front.read();
            front.take();
            seen = seen.min(front.answered.saturating_sub(1));
        }
        if round == kills {
            break;
        }
        if front.issue(&mut rng, depth) {
            s.to_back.write(1).unwrap();
        }
        let killed = Instant::now();
        kill(child, Signal::SIGKILL).unwrap();
        waitpid(child, None).unwrap();
        child = start(&s, false, None);
        let before = front.answered;
        while front.answered == before && !front.pending.is_empty() {
            let mut fds = [PollFd::new(s.to_front.as_fd(), PollFlags::POLLIN)];
            assert!(poll(&mut fds, PollTimeout::from(5000u16)).unwrap() > 0, "no answer after a kill");
            let _ = s.to_front.read();
            front.take();
        }
        pauses.push(killed.elapsed());
    }
    // Drain, then compare every sector with the file itself.
    while !front.pending.is_empty() {
        let mut fds = [PollFd::new(s.to_front.as_fd(), PollFlags::POLLIN)];
        assert!(poll(&mut fds, PollTimeout::from(5000u16)).unwrap() > 0, "stuck at the end");
        let _ = s.to_front.read();
        front.take();
    }
    kill(child, Signal::SIGKILL).unwrap();
    waitpid(child, None).unwrap();
    let bytes = std::fs::read(disk.path()).unwrap();
    for (sector, &version) in front.content.iter().enumerate() {
        let want = if version == 0 { [0; 512] } else { fill(version, sector as u64) };
        assert_eq!(bytes[sector * 512..][..512], want, "sector {sector} at the end");
    }
    pauses.sort();
    println!(
        "{kills} kills, {} requests answered, {} bytes read back, pause p50 {:?} max {:?}",
        front.answered,
        front.read_back,
        pauses.get(pauses.len() / 2),
        pauses.last()
    );
}

/// A request that makes the service crash is run three times, then answered with an error; all others are served.
#[test]
fn a_poison_request_is_given_up_after_three_crashes() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(SECTORS * 512).unwrap();
    let s = shared(disk.path());
    let mut ring = FrontRing::init(s.ring.clone(), s.layout);
    create(&s);
    for id in 0..8u64 {
        let request = BlkifRequest {
            operation: BLKIF_OP_WRITE,
            nr_segments: 1,
            id,
            sector_number: if id == 5 { POISON } else { id },
            seg: [BlkifRequestSegment::new(id as u32, 0, 0); 11],
            ..Default::default()
        };
        ring.put(&ABI.encode(&Request::Direct(request)));
    }
    ring.push();
    let mut crashes = 0;
    let mut own_fault = false;
    let mut statuses = HashMap::new();
    while statuses.len() < 8 {
        let child = start(&s, own_fault, Some(POISON));
        loop {
            let mut fds = [PollFd::new(s.to_front.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(20u16)).unwrap();
            let _ = s.to_front.read();
            while ring.unconsumed().unwrap() > 0 {
                let mut bytes = [0; 16];
                ring.take(&mut bytes);
                let response = ABI.decode_response(&bytes);
                assert!(statuses.insert(response.id, response.status).is_none(), "answered twice");
            }
            let _asks_for_an_event = ring.final_check().unwrap();
            if statuses.len() == 8 {
                kill(child, Signal::SIGKILL).unwrap();
                waitpid(child, None).unwrap();
                break;
            }
            if let WaitStatus::Signaled(_, signal, _) = waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap() {
                assert_eq!(signal, Signal::SIGABRT);
                crashes += 1;
                own_fault = true;
                break;
            }
        }
    }
    assert_eq!(crashes, 3);
    for (id, status) in statuses {
        assert_eq!(status, if id == 5 { BLKIF_RSP_ERROR } else { BLKIF_RSP_OKAY }, "request {id}");
    }
}

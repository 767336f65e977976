//! Real kills of the real data path: a child process runs engines, rings, journals and io_uring over shared memory, one thread a
//! ring; a parent is its frontend with a verifying load and kills it with SIGKILL at random moments. Three rings of two pages,
//! indirect requests, barriers, flushes, discards, queue depth up to 40. No hv-core: rings, journals and guest pages are memfds that
//! both map. `BLKBACK_KILLS` sets the number (default 60); `cargo xtask soak block` does 10,000.
#![expect(unsafe_code, reason = "fork: the child calls only into the engine and never returns")]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkback::disk::attachment::{Disk, DiskQueue};
use blkback::disk::source::{self, Cache};
use blkback::engine::{BUFFERS_BYTES, Direction, Engine, GuestPages, IndirectPage};
use blkback::request::{BlkifFormat, MAX_INDIRECT_BYTES, Prepared};
use blkback::stats::Stats;
use domain_kit::journal::{JournaledRing, Shape, Slot};
use domain_kit::mem::SharedMem;
use frontends::blkfront::load::{Load, Rng};
use frontends::blkfront::queue::{BlkQueue, QueueShape};
use frontends::blkfront::{Op, Outcome};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use xen_abi::io::blkif::Abi;

/// Sectors of each ring's part of the disk.
const PART: u64 = 4096;
const POISON: u64 = 1000;
const DEPTH: usize = 40;

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
                let page = s.gref as usize * 4096 + usize::from(s.offset);
                if page >= self.guest.len() {
                    failed.push(slot);
                    break;
                }
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
            let mut bytes = vec![0; page.len as usize];
            self.guest.copy_out(page.gref as usize * 4096, &mut bytes);
            each(page.slot, Some(&bytes));
        }
    }
}

/// One ring with all that both processes map of it.
struct Ring {
    ring: Arc<SharedMem>,
    journal: Arc<SharedMem>,
    guest: Arc<SharedMem>,
    to_back: EventFd,
    to_front: EventFd,
    shape: QueueShape,
    journal_shape: Shape,
}

impl Ring {
    fn new(shape: QueueShape) -> Ring {
        let journal_shape = JournaledRing::<Arc<SharedMem>, Arc<SharedMem>, BlkifFormat>::shape(
            &shape.layout(),
            MAX_INDIRECT_BYTES as u32,
            0,
        );
        let memory = |len| Arc::new(SharedMem::create("kill-test", len).unwrap().0);
        let eventfd =
            || EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        Ring {
            ring: memory(shape.ring_pages * 4096),
            journal: memory(journal_shape.bytes()),
            guest: memory(shape.data_pages() * 4096),
            to_back: eventfd(),
            to_front: eventfd(),
            shape,
            journal_shape,
        }
    }

    /// The frontend's end, and an empty journal for the first incarnation to take up.
    fn front(&self) -> BlkQueue<Arc<SharedMem>, Arc<SharedMem>> {
        let front = BlkQueue::new(self.ring.clone(), self.guest.clone(), 0, self.shape);
        let (ring, journal) = (self.ring.clone(), self.journal.clone());
        let format = BlkifFormat(self.shape.abi);
        drop(
            JournaledRing::create(ring, self.shape.layout(), journal, self.journal_shape, [0; 6], format)
                .unwrap(),
        );
        front
    }

    /// Serves it for ever.
    fn serve(&self, disk: Arc<dyn Disk>, own_fault: bool, poison: Option<u64>) -> ! {
        let (ring, unanswered) = JournaledRing::reattach(
            self.ring.clone(),
            self.shape.layout(),
            self.journal.clone(),
            self.journal_shape,
            BlkifFormat(self.shape.abi),
            own_fault,
        )
        .expect("a sound journal");
        let (buffers, _fd) = SharedMem::create("buffers", BUFFERS_BYTES).expect("buffers");
        let buffers = Arc::new(buffers);
        let queue = disk.queue(buffers.clone(), self.shape.layout().size).expect("io_uring");
        let guest = PlainPages { guest: self.guest.clone(), buffers };
        let stats = Arc::new(Stats::default());
        let mut engine = Engine::new(ring, self.shape.abi, unanswered, guest, queue, stats);
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
                self.to_front.write(1).expect("notify");
            }
            if !polled.more {
                engine.disk().wait(&[self.to_back.as_fd()], None).expect("wait");
            }
        }
    }
}

/// One incarnation. Never returns. All rings are behind one fence, which comes first.
fn incarnation(rings: &[Ring], path: &std::path::Path, own_fault: bool, poison: Option<u64>) -> ! {
    let file = File::options().read(true).write(true).open(path).expect("open");
    let disk = source::open(file.into(), false, Cache::None, Duration::from_secs(10)).expect("fence");
    let disk: Arc<dyn Disk> = Arc::new(disk);
    std::thread::scope(|scope| {
        for ring in &rings[1..] {
            let disk = disk.clone();
            scope.spawn(move || ring.serve(disk, own_fault, poison));
        }
        rings[0].serve(disk.clone(), own_fault, poison)
    })
}

fn start(rings: &[Ring], path: &std::path::Path, own_fault: bool, poison: Option<u64>) -> Pid {
    // SAFETY: the child only runs engines, on memory of its own and shared mappings, and is killed. Other threads of the test
    // process hold no lock that it needs: allocation after fork is safe with glibc.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => incarnation(rings, path, own_fault, poison),
        ForkResult::Parent { child } => child,
    }
}

struct Front {
    queue: BlkQueue<Arc<SharedMem>, Arc<SharedMem>>,
    load: Load,
    answered: u64,
}

impl Front {
    fn issue(&mut self, ring: &Ring, depth: usize) {
        let Front { queue, load, .. } = self;
        let max_bytes = queue.max_bytes();
        load.issue(depth, max_bytes, |op, mark| queue.submit(op, mark).is_ok());
        if queue.push() {
            ring.to_back.write(1).unwrap();
        }
    }

    fn take(&mut self) {
        let Front { queue, load, answered } = self;
        *answered += queue.take(|completion| load.done(&completion)).expect("an honest backend") as u64;
    }
}

/// Waits for responses on any ring and takes them.
fn take_all(rings: &[Ring], fronts: &mut [Front]) {
    let mut fds: Vec<_> = rings.iter().map(|r| PollFd::new(r.to_front.as_fd(), PollFlags::POLLIN)).collect();
    let ready = poll(&mut fds, PollTimeout::from(10_000u16)).unwrap();
    let pending: Vec<usize> = fronts.iter().map(|f| f.load.in_flight()).collect();
    assert!(ready > 0, "stuck with {pending:?} pending");
    for (ring, front) in rings.iter().zip(fronts) {
        let _ = ring.to_front.read();
        front.take();
    }
}

fn answered(fronts: &[Front]) -> u64 {
    fronts.iter().map(|f| f.answered).sum()
}

fn kills_lose_nothing_in(kills: u32, seed: u64) {
    let shape = |abi, segments| QueueShape { abi, ring_pages: 2, depth: DEPTH, segments };
    let shapes = [shape(Abi::X86_64, 64), shape(Abi::X86_32, 32), shape(Abi::X86_64, 11)];
    let rings: Vec<Ring> = shapes.into_iter().map(Ring::new).collect();
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(rings.len() as u64 * PART * 512).unwrap();
    let mut fronts: Vec<Front> = (0..)
        .zip(&rings)
        .map(|(i, ring)| Front {
            queue: ring.front(),
            load: Load::new(i * PART, PART, seed + i),
            answered: 0,
        })
        .collect();
    let mut rng = Rng::new(seed);
    let mut child = start(&rings, disk.path(), false, None);
    let mut pauses = Vec::new();
    for round in 0..=kills {
        let until = Instant::now() + Duration::from_micros(rng.below(6000));
        let depth = [1, 8, DEPTH][round as usize % 3];
        let seen = answered(&fronts);
        while Instant::now() < until || answered(&fronts) == seen {
            fronts.iter_mut().zip(&rings).for_each(|(front, ring)| front.issue(ring, depth));
            take_all(&rings, &mut fronts);
        }
        if round == kills {
            break;
        }
        fronts.iter_mut().zip(&rings).for_each(|(front, ring)| front.issue(ring, depth));
        let killed = Instant::now();
        kill(child, Signal::SIGKILL).unwrap();
        waitpid(child, None).unwrap();
        child = start(&rings, disk.path(), false, None);
        let before = answered(&fronts);
        while answered(&fronts) == before && fronts.iter().any(|f| f.load.in_flight() > 0) {
            take_all(&rings, &mut fronts);
        }
        pauses.push(killed.elapsed());
    }
    // Drain, then compare every sector with the file itself.
    while fronts.iter().any(|f| f.load.in_flight() > 0) {
        take_all(&rings, &mut fronts);
    }
    kill(child, Signal::SIGKILL).unwrap();
    waitpid(child, None).unwrap();
    let bytes = std::fs::read(disk.path()).unwrap();
    for front in &fronts {
        let (start, len) = front.load.part();
        front.load.check(0, &bytes[start as usize..][..len]);
    }
    pauses.sort();
    println!(
        "{kills} kills, {} requests answered, {} bytes verified, pause p50 {:?} p99 {:?} max {:?}",
        answered(&fronts),
        fronts.iter().map(|f| f.load.verified()).sum::<u64>(),
        pauses.get(pauses.len() / 2),
        pauses.get(pauses.len() * 99 / 100),
        pauses.last()
    );
}

#[test]
fn kills_lose_nothing() {
    let kills = std::env::var("BLKBACK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    kills_lose_nothing_in(kills, 1);
}

#[test]
#[ignore = "long: cargo xtask soak block"]
fn soak_block_kills() {
    kills_lose_nothing_in(if std::env::var_os("BH_SOAK").is_some() { 10_000 } else { 1000 }, 7);
}

/// A request that makes the service crash is run three times, then answered with an error; all others are served.
#[test]
fn a_poison_request_is_given_up_after_three_crashes() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(PART * 512).unwrap();
    let rings = [Ring::new(QueueShape { depth: 8, ..QueueShape::default() })];
    let mut front = rings[0].front();
    for mark in 0..8u64 {
        let sector = if mark == 5 { POISON } else { mark };
        front.submit(Op::Write { sector, data: &[7; 512] }, mark).unwrap();
    }
    front.push();
    let mut crashes = 0;
    let mut own_fault = false;
    let mut outcomes = HashMap::new();
    while outcomes.len() < 8 {
        let child = start(&rings, disk.path(), own_fault, Some(POISON));
        loop {
            let mut fds = [PollFd::new(rings[0].to_front.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(20u16)).unwrap();
            let _ = rings[0].to_front.read();
            front
                .take(|c| assert!(outcomes.insert(c.mark, c.outcome).is_none(), "answered twice"))
                .expect("an honest backend");
            if outcomes.len() == 8 {
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
    for (mark, outcome) in outcomes {
        assert_eq!(outcome, if mark == 5 { Outcome::Error } else { Outcome::Done }, "request {mark}");
    }
}

//! Real engines in a child process that can be killed: rings, journals and guest pages are memfds that both processes map; the disk is a
//! file. No hv-core.
#![expect(unsafe_code, reason = "fork: the child calls only into the engine and never returns")]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blkback::disk::attachment::{Disk, DiskQueue};
use blkback::disk::source::{self, Cache};
use blkback::engine::gate::{Gate, Seat, Wake};
use blkback::engine::{BUFFERS_BYTES, Engine};
use blkback::request::{BlkifFormat, MAX_INDIRECT_BYTES};
use blkback::stats::Stats;
use domain_kit::journal::{JournaledRing, Shape};
use domain_kit::mem::SharedMem;
use frontends::blkfront::load::Load;
use frontends::blkfront::queue::{BlkQueue, QueueShape};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

use super::PlainPages;

/// One ring with all that both processes map of it.
pub struct Ring {
    ring: Arc<SharedMem>,
    journal: Arc<SharedMem>,
    guest: Arc<SharedMem>,
    pub to_back: EventFd,
    pub to_front: EventFd,
    shape: QueueShape,
    journal_shape: Shape,
}

impl Ring {
    pub fn new(shape: QueueShape) -> Ring {
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
    pub fn front(&self) -> BlkQueue<Arc<SharedMem>, Arc<SharedMem>> {
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
    fn serve(&self, disk: Arc<dyn Disk>, seat: Seat, life: &Life<'_>) -> ! {
        let (ring, unanswered) = JournaledRing::reattach(
            self.ring.clone(),
            self.shape.layout(),
            self.journal.clone(),
            self.journal_shape,
            BlkifFormat(self.shape.abi),
            life.own_fault,
        )
        .expect("a sound journal");
        let (buffers, _fd) = SharedMem::create("buffers", BUFFERS_BYTES).expect("buffers");
        let buffers = Arc::new(buffers);
        let queue = disk.queue(buffers.clone(), self.shape.layout().size).expect("io_uring");
        let queue = (life.wrap)(queue, &buffers);
        let guest = PlainPages::all(self.guest.clone(), buffers);
        let stats = Arc::new(Stats::default());
        let mut engine = Engine::new(ring, self.shape.abi, unanswered, guest, queue, stats);
        engine.set_seat(seat);
        if let Some(poison) = life.poison {
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

type Queue = Box<dyn DiskQueue + Send>;

/// How an incarnation runs.
pub struct Life<'a> {
    pub disk: &'a Path,
    /// Its predecessor died of its own fault.
    pub own_fault: bool,
    /// A request for this sector crashes it.
    pub poison: Option<u64>,
    /// Puts something between engine and disk.
    pub wrap: &'a (dyn Fn(Queue, &Arc<SharedMem>) -> Queue + Sync),
}

impl<'a> Life<'a> {
    pub fn of(disk: &'a Path) -> Self {
        Life { disk, own_fault: false, poison: None, wrap: &|queue, _| queue }
    }

    /// Never returns. All rings are of one device, behind one fence, which comes first.
    fn live(&self, rings: &[Ring]) -> ! {
        let file = File::options().read(true).write(true).open(self.disk).expect("open");
        let disk = source::open(file.into(), false, Cache::None, Duration::from_secs(10)).expect("fence");
        let disk: Arc<dyn Disk> = Arc::new(disk);
        let wake = |ring: &Ring| -> Wake {
            let event = File::from(ring.to_back.as_fd().try_clone_to_owned().expect("dup"));
            Box::new(move || drop((&event).write(&1u64.to_ne_bytes())))
        };
        let gate = Gate::new(rings.iter().map(wake).collect());
        std::thread::scope(|scope| {
            for (number, ring) in (0..).zip(rings).skip(1) {
                let (disk, seat) = (disk.clone(), Seat::new(gate.clone(), number));
                scope.spawn(move || ring.serve(disk, seat, self));
            }
            rings[0].serve(disk.clone(), Seat::new(gate.clone(), 0), self)
        })
    }

    /// Begins in a process of its own.
    pub fn start(&self, rings: &[Ring]) -> Pid {
        // SAFETY: the child only runs engines, on memory of its own and shared mappings, and is killed. Other threads of the test
        // process hold no lock that it needs: allocation after fork is safe with glibc.
        match unsafe { fork() }.expect("fork") {
            ForkResult::Child => self.live(rings),
            ForkResult::Parent { child } => child,
        }
    }
}

/// SIGKILL, and its end.
pub fn end(child: Pid) {
    kill(child, Signal::SIGKILL).unwrap();
    waitpid(child, None).unwrap();
}

pub struct Front {
    pub queue: BlkQueue<Arc<SharedMem>, Arc<SharedMem>>,
    pub load: Load,
    pub answered: u64,
}

impl Front {
    /// One for each ring, with a part of the disk of its own of `part` sectors.
    pub fn of_all(rings: &[Ring], part: u64, seed: u64) -> Vec<Front> {
        let front = |(i, ring): (u64, &Ring)| Front {
            queue: ring.front(),
            load: Load::new(i * part, part, seed + i),
            answered: 0,
        };
        (0..).zip(rings).map(front).collect()
    }

    pub fn issue(&mut self, ring: &Ring, depth: usize) {
        let Front { queue, load, .. } = self;
        let max_bytes = queue.max_bytes();
        load.issue(depth, max_bytes, |op, mark| queue.submit(op, mark).is_ok());
        if queue.push() {
            ring.to_back.write(1).unwrap();
        }
    }

    pub fn take(&mut self) {
        let Front { queue, load, answered } = self;
        *answered += queue.take(|completion| load.done(&completion)).expect("an honest backend") as u64;
    }
}

/// Waits for responses on any ring and takes them.
pub fn take_all(rings: &[Ring], fronts: &mut [Front]) {
    let mut fds: Vec<_> = rings.iter().map(|r| PollFd::new(r.to_front.as_fd(), PollFlags::POLLIN)).collect();
    let ready = poll(&mut fds, PollTimeout::from(10_000u16)).unwrap();
    let pending: Vec<usize> = fronts.iter().map(|f| f.load.in_flight()).collect();
    assert!(ready > 0, "stuck with {pending:?} pending");
    for (ring, front) in rings.iter().zip(fronts) {
        let _ = ring.to_front.read();
        front.take();
    }
}

pub fn answered(fronts: &[Front]) -> u64 {
    fronts.iter().map(|f| f.answered).sum()
}

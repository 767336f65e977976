//! Conversations killed at each of their steps.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use vhost::vhost_user::message::FrontendReq as R;

use super::conversation::{BYTES, Conversation, Wire};
use super::record::Message;
use crate::journal::MAX_ATTEMPTS;
use crate::mem::MSG_LEN;
use crate::model::{Chooser, DyingMem, Fate, Life};
use crate::ring::{HeapMem, RingMem};

const INSTANCE: u64 = 9;
type Said = Message<u32>;

fn message(request: R, words: &[u32], fds: Vec<u32>) -> Said {
    let body = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    Message { request: request as u32, flags: 1, body, fds }
}

/// What a frontend says: two rings are set up, changed, stopped and started again.
fn script() -> Vec<Said> {
    vec![
        message(R::GET_FEATURES, &[], vec![]),
        message(R::SET_FEATURES, &[7, 0], vec![]),
        message(R::GET_INFLIGHT_FD, &[0; 6], vec![]),
        message(R::SET_MEM_TABLE, &[2, 0], vec![10, 11]),
        message(R::SET_VRING_CALL, &[0, 0], vec![12]),
        message(R::SET_VRING_KICK, &[0, 0], vec![13]),
        message(R::SET_VRING_KICK, &[1, 0], vec![14]),
        message(R::SET_VRING_CALL, &[0, 0], vec![15]),
        message(R::GET_VRING_BASE, &[1, 0], vec![]),
        message(R::SET_MEM_TABLE, &[1, 0], vec![16]),
        message(R::SET_VRING_KICK, &[1, 0], vec![17]),
        message(R::GET_FEATURES, &[], vec![]),
    ]
}

/// What a device knows, and what it answers: that depends on what it knows alone.
#[derive(Clone, Debug, Default, PartialEq)]
struct Device(BTreeMap<(u32, u32), (Vec<u8>, Vec<u32>)>);

impl Device {
    fn carry_out(&mut self, said: &Said) -> Option<Said> {
        let queue = said.body.first().copied().unwrap_or(0);
        let is_ring = said.is(R::SET_VRING_CALL) || said.is(R::SET_VRING_KICK) || said.is(R::SET_VRING_BASE);
        let mut reply = None;
        if said.is(R::GET_VRING_BASE) {
            self.0.remove(&(R::SET_VRING_KICK as u32, queue.into()));
            let answer = message(R::GET_VRING_BASE, &[queue.into(), 40 + self.0.len() as u32], vec![]);
            self.0.insert((R::SET_VRING_BASE as u32, queue.into()), (answer.body.clone(), vec![]));
            reply = Some(answer);
        } else if said.is(R::GET_INFLIGHT_FD) {
            let answer = message(R::GET_INFLIGHT_FD, &[3; 6], vec![99]);
            self.0.insert((R::SET_INFLIGHT_FD as u32, 0), (answer.body.clone(), answer.fds.clone()));
            reply = Some(answer);
        } else {
            if said.is(R::GET_FEATURES) {
                reply = Some(message(
                    R::GET_FEATURES,
                    &[self.0.contains_key(&(R::SET_FEATURES as u32, 0)) as u32],
                    vec![],
                ));
            }
            let queue = if is_ring { queue.into() } else { 0 };
            self.0.insert((said.request, queue), (said.body.clone(), said.fds.clone()));
        }
        reply
    }
}

/// What outlives a backend: its memory, its descriptors, the socket with the frontend behind it.
struct World {
    mem: Rc<HeapMem>,
    fds: RefCell<BTreeMap<u64, u32>>,
    script: Vec<Said>,
    /// What the frontend has said, and bytes of the last that were not taken yet.
    said: Cell<usize>,
    untaken: Cell<usize>,
    heard: RefCell<Vec<u8>>,
    heard_fds: RefCell<Vec<u32>>,
    /// What is to be heard until all was said.
    answers: Vec<Option<Said>>,
    /// The kernel moves at most so many bytes at once.
    piece: usize,
}

impl World {
    fn new(piece: usize) -> Rc<World> {
        let mut device = Device::default();
        let script = script();
        let answers = script.iter().map(|said| device.carry_out(said)).collect();
        Rc::new(World {
            mem: Rc::new(HeapMem::new(BYTES)),
            fds: RefCell::default(),
            script,
            said: Cell::new(0),
            untaken: Cell::new(0),
            heard: RefCell::default(),
            heard_fds: RefCell::default(),
            answers,
            piece,
        })
    }

    fn expected(&self, messages: usize) -> (Vec<u8>, Vec<u32>) {
        let answers = self.answers[..messages].iter().flatten();
        (answers.clone().flat_map(Said::bytes).collect(), answers.flat_map(|a| a.fds.clone()).collect())
    }

    /// What a device knows that was never killed.
    fn device(&self, messages: usize) -> Device {
        let mut device = Device::default();
        self.script[..messages].iter().for_each(|said| drop(device.carry_out(said)));
        device
    }
}

struct Socket {
    world: Rc<World>,
    life: Rc<Life>,
}

impl Socket {
    /// What the kernel does inside a call.
    fn count(&self, head: usize, bytes: usize) {
        self.world.mem.store_u32(head + MSG_LEN, bytes as u32);
    }
}

impl Wire for Socket {
    type Fd = u32;

    fn look(&mut self) -> Result<Option<Said>, String> {
        if !self.life.step() {
            return Ok(None);
        }
        let world = &self.world;
        if world.untaken.get() == 0 {
            // The frontend speaks when it has heard all it waits for.
            let (bytes, fds) = world.expected(world.said.get());
            assert_eq!(*world.heard.borrow(), bytes, "answered once, in order");
            assert_eq!(*world.heard_fds.borrow(), fds);
            let Some(next) = world.script.get(world.said.get()) else { return Ok(None) };
            world.said.set(world.said.get() + 1);
            world.untaken.set(next.len());
        }
        let said = world.script[world.said.get() - 1].clone();
        assert_eq!(world.untaken.get(), said.len(), "a message is looked at whole or not at all");
        Ok(Some(said))
    }

    fn send(&mut self, head: usize, bytes: &[u8], fd: Option<&u32>) -> bool {
        if !self.life.step() {
            return false;
        }
        let n = bytes.len().min(self.world.piece);
        self.world.heard.borrow_mut().extend(&bytes[..n]);
        self.world.heard_fds.borrow_mut().extend(fd);
        self.count(head, n);
        self.life.step()
    }

    fn take(&mut self, head: usize, len: usize) -> bool {
        if !self.life.step() {
            return false;
        }
        let n = len.min(self.world.piece);
        let left = self.world.untaken.get().checked_sub(n);
        self.world.untaken.set(left.expect("nothing is taken that is not there"));
        self.count(head, n);
        self.life.step()
    }

    fn store(&mut self, number: u64, fd: &u32) -> bool {
        if self.life.step() {
            self.world.fds.borrow_mut().insert(number, *fd);
        }
        true
    }

    fn fetch(&mut self, number: u64) -> Result<u32, String> {
        self.world.fds.borrow().get(&number).copied().ok_or_else(|| format!("no descriptor {number}"))
    }

    fn stored(&mut self) -> Vec<u64> {
        self.world.fds.borrow().keys().copied().collect()
    }

    fn drop_stored(&mut self, number: u64) {
        if self.life.step() {
            self.world.fds.borrow_mut().remove(&number);
        }
    }

    fn let_go(&mut self) {
        panic!("it can be kept");
    }
}

/// One backend; true if it heard the end.
fn live(world: &Rc<World>, life: &Rc<Life>, first: bool) -> bool {
    let wire = Socket { world: world.clone(), life: life.clone() };
    let mem = DyingMem::new(&world.mem, life);
    let mut talk = if first {
        Conversation::begin(wire, mem, INSTANCE, true)
    } else {
        match Conversation::take_up(wire, mem, INSTANCE, false) {
            Ok(talk) => talk,
            // Killed before there was one: nobody had said anything.
            Err(error) => {
                assert_eq!((world.said.get(), error.as_str()), (0, "no conversation is kept"));
                return live(world, life, true);
            }
        }
    };
    let mut device = Device::default();
    for said in talk.said().unwrap() {
        device.carry_out(&said);
    }
    let all = world.said.get();
    if life.death().is_none() {
        let known = [all, all.saturating_sub(1)].into_iter().any(|n| world.device(n) == device);
        assert!(known, "a new backend knows what the former one knew: {device:?} after {all}");
    }
    while let Ok(Some(said)) = talk.next_message() {
        let reply = device.carry_out(&said);
        if !talk.answer(&said, reply.as_ref()).unwrap() {
            break;
        }
    }
    if life.death().is_some() {
        return false;
    }
    assert_eq!(device, world.device(world.script.len()));
    true
}

fn run(chooser: &Rc<RefCell<Chooser>>, kills: u32, piece: usize) -> u64 {
    let world = World::new(piece);
    let fate = Fate::new(chooser.clone(), kills);
    let mut first = true;
    while !live(&world, &Life::new(&fate), std::mem::take(&mut first)) {}
    let (bytes, fds) = world.expected(world.script.len());
    assert_eq!((&*world.heard.borrow(), &*world.heard_fds.borrow()), (&bytes, &fds));
    // Guest memory, a call and two kicks, the in-flight region: what was replaced is not kept.
    let mut stored: Vec<u32> = world.fds.borrow().values().copied().collect();
    stored.sort_unstable();
    assert_eq!(stored, [13, 15, 16, 17, 99]);
    fate.steps()
}

#[test]
fn killed_at_every_step_it_goes_on() {
    for piece in [usize::MAX, 5] {
        let chooser = Rc::new(RefCell::new(Chooser::exhaustive()));
        let mut runs = 0;
        loop {
            run(&chooser, 1, piece);
            runs += 1;
            if !chooser.borrow_mut().advance() {
                break;
            }
        }
        println!("killed once at each of {runs} steps");
        assert!(runs > 200, "{runs}");
    }
}

#[test]
fn killed_again_and_again_it_goes_on() {
    for seed in 0..400 {
        let chooser = Rc::new(RefCell::new(Chooser::random(seed, 10 + (seed % 40) as u32)));
        run(&chooser, 30, [usize::MAX, 1, 7][seed as usize % 3]);
    }
}

/// A message whose handling crashes its backend each time: the conversation ends.
#[test]
fn a_poison_message_ends_the_conversation() {
    let world = World::new(usize::MAX);
    let fate = Fate::new(Rc::new(RefCell::new(Chooser::random(0, 1))), 0);
    let life = Life::new(&fate);
    let wire = || Socket { world: world.clone(), life: life.clone() };
    let mem = || DyingMem::new(&world.mem, &life);
    let mut talk = Conversation::begin(wire(), mem(), INSTANCE, true);
    talk.next_message().unwrap();
    for attempt in 1..MAX_ATTEMPTS {
        let mut next = Conversation::take_up(wire(), mem(), INSTANCE, true).unwrap();
        // Kills from outside are not the message's fault.
        drop(Conversation::take_up(wire(), mem(), INSTANCE, false).unwrap());
        assert!(next.next_message().unwrap().is_some(), "attempt {attempt}");
    }
    let refused = Conversation::take_up(wire(), mem(), INSTANCE, true).map(|_| ());
    assert!(refused.unwrap_err().contains("poison"));
}

#[test]
fn a_crash_between_messages_is_nobodys_fault() {
    let world = World::new(usize::MAX);
    let fate = Fate::new(Rc::new(RefCell::new(Chooser::random(0, 1))), 0);
    let life = Life::new(&fate);
    let wire = || Socket { world: world.clone(), life: life.clone() };
    let mem = || DyingMem::new(&world.mem, &life);
    let mut talk = Conversation::begin(wire(), mem(), INSTANCE, true);
    let first = talk.next_message().unwrap().unwrap();
    let reply = Device::default().carry_out(&first);
    talk.answer(&first, reply.as_ref()).unwrap();
    for _ in 0..5 {
        let mut talk = Conversation::take_up(wire(), mem(), INSTANCE, true).unwrap();
        talk.said().unwrap();
        let said = talk.next_message().unwrap().unwrap();
        let reply = Device::default().carry_out(&said);
        talk.answer(&said, reply.as_ref()).unwrap();
    }
}

/// Memory that holds anything is refused or taken as the record that it is; nothing panics.
#[test]
fn garbage_is_refused() {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    let mut refused = 0;
    for seed in 0..300 {
        let world = World::new(usize::MAX);
        let fate = Fate::new(Rc::new(RefCell::new(Chooser::random(0, 1))), 0);
        let life = Life::new(&fate);
        let wire = || Socket { world: world.clone(), life: life.clone() };
        let mem = || DyingMem::new(&world.mem, &life);
        let mut talk = Conversation::begin(wire(), mem(), INSTANCE, true);
        let mut device = Device::default();
        for _ in 0..4 {
            let said = talk.next_message().unwrap().unwrap();
            let reply = device.carry_out(&said);
            talk.answer(&said, reply.as_ref()).unwrap();
        }
        drop(talk);
        let mut rng = SmallRng::seed_from_u64(seed);
        for _ in 0..rng.random_range(1..4) {
            let at = [
                rng.random_range(0..2048),
                crate::kept::BYTES / 2 + rng.random_range(0..2048),
                BYTES - rng.random_range(64..1024),
            ];
            let at = at[rng.random_range(0..3)];
            world.mem.copy_in(at, &(0..rng.random_range(1..40)).map(|_| rng.random()).collect::<Vec<u8>>());
        }
        match Conversation::take_up(wire(), mem(), INSTANCE, false) {
            Ok(mut talk) => drop(talk.said()),
            Err(_) => refused += 1,
        }
        let other = Conversation::take_up(wire(), mem(), INSTANCE + 1, false).map(|_| ());
        assert!(other.is_err(), "another frontend's");
    }
    assert!(refused < 300);
    let empty = World::new(1);
    let fate = Fate::new(Rc::new(RefCell::new(Chooser::random(0, 1))), 0);
    let life = Life::new(&fate);
    let wire = Socket { world: empty.clone(), life: life.clone() };
    assert!(Conversation::take_up(wire, DyingMem::new(&empty.mem, &life), INSTANCE, false).is_err());
}

//! Ports: numbers, states, and every short history of two domains.

use super::*;

const A: Peer = Peer { domid: 1, instance: 10 };
const B: Peer = Peer { domid: 2, instance: 20 };
const C: Peer = Peer { domid: 3, instance: 30 };

/// Two or three domains' tables, joined as the server joins them.
struct World(Vec<(Peer, PortTable)>);

impl World {
    fn new(limit: u32) -> World {
        World([A, B, C].map(|p| (p, PortTable::new(limit))).into())
    }

    fn table(&mut self, peer: Peer) -> &mut PortTable {
        &mut self.0.iter_mut().find(|(p, _)| *p == peer).unwrap().1
    }

    fn bind(&mut self, caller: Peer, remote: Peer, port: u32) -> Result<u32, Errno> {
        match bindable(self.table(remote), port, caller)? {
            Err(already) => Ok(already),
            Ok(half) => {
                let number = bind_local(self.table(caller), remote, port, half)?;
                bind_remote(self.table(remote), port, caller, number);
                Ok(number)
            }
        }
    }

    fn close(&mut self, owner: Peer, port: u32) -> Result<(), Errno> {
        let closed = self.table(owner).close(port)?;
        if let Some((remote, remote_port)) = closed.remote {
            self.table(remote).remote_closed(remote_port, owner, port);
        }
        Ok(())
    }

    /// What must hold at any time.
    fn check(&mut self) {
        let all: Vec<(Peer, u32, State)> =
            self.0.iter().flat_map(|(p, t)| t.iter().map(|(n, port)| (*p, n, port.state))).collect();
        for (owner, number, state) in &all {
            if let State::Interdomain(remote, port) = state {
                let other = all.iter().find(|(p, n, _)| p == remote && n == port);
                assert_eq!(
                    other.map(|o| o.2),
                    Some(State::Interdomain(*owner, *number)),
                    "both ends say the same: {all:?}"
                );
                let mine = self.table(*owner).get(*number).unwrap().clone();
                let theirs = self.table(*remote).get(*port).unwrap().clone();
                assert!(same(&mine.rx, &theirs.tx) && same(&mine.tx, &theirs.rx), "crossed eventfds");
            }
        }
    }
}

fn same(a: &Option<Arc<OwnedFd>>, b: &Option<Arc<OwnedFd>>) -> bool {
    matches!((a, b), (Some(a), Some(b)) if Arc::ptr_eq(a, b))
}

fn kicked(fd: &Arc<OwnedFd>) -> u64 {
    let mut value = [0; 8];
    nix::unistd::read(fd, &mut value).map_or(0, |_| u64::from_ne_bytes(value))
}

#[test]
fn numbers_are_the_lowest_free_from_one() {
    let mut table = PortTable::new(4);
    let numbers: Vec<u32> = (0..3).map(|_| table.alloc_unbound(B).unwrap().0).collect();
    assert_eq!(numbers, [1, 2, 3]);
    table.close(2).unwrap();
    assert_eq!(table.close(2).unwrap_err(), Errno::ENOENT);
    assert_eq!(table.bind_ipi(0).unwrap().0, 2);
    assert_eq!(table.bind_virq(3, 0).unwrap().0, 4);
    assert_eq!(table.bind_virq(3, 0).unwrap().0, 4, "idempotent");
    assert_eq!(table.bind_virq(3, 1).unwrap_err(), Errno::ENOSPC);
    assert_eq!(table.alloc_unbound(B).unwrap_err(), Errno::ENOSPC);
}

#[test]
fn a_bind_that_fails_changes_nothing() {
    let mut world = World::new(1);
    let port = world.table(A).alloc_unbound(B).unwrap().0;
    world.table(B).bind_ipi(0).unwrap();
    assert_eq!(world.bind(B, A, port), Err(Errno::ENOSPC));
    assert_eq!(world.table(A).get(port).unwrap().state, State::Unbound(B));
    world.close(B, 1).unwrap();
    assert_eq!(world.bind(B, A, port), Ok(1));
}

#[test]
fn only_the_named_domain_binds() {
    let mut world = World::new(8);
    let port = world.table(A).alloc_unbound(B).unwrap().0;
    assert_eq!(world.bind(C, A, port), Err(Errno::EPERM));
    assert_eq!(world.bind(B, A, port + 1), Err(Errno::ENOENT));
    let reborn = Peer { instance: 21, ..B };
    assert_eq!(bindable(world.table(A), port, reborn).unwrap_err(), Errno::EPERM);
    assert_eq!(world.bind(B, A, port), Ok(1));
    assert_eq!(world.bind(C, A, port), Err(Errno::EBUSY));
    let virq = world.table(A).bind_virq(3, 0).unwrap().0;
    assert_eq!(world.bind(B, A, virq), Err(Errno::ENOENT));
}

#[test]
fn a_close_is_seen_once_and_the_pair_can_be_bound_again() {
    let mut world = World::new(8);
    let port = world.table(A).alloc_unbound(B).unwrap().0;
    let bound = world.bind(B, A, port).unwrap();
    let rx = world.table(A).get(port).unwrap().rx.clone().unwrap();
    world.close(B, bound).unwrap();
    assert_eq!(kicked(&rx), 1);
    assert_eq!(world.table(A).get(port).unwrap().state, State::Unbound(B));
    let again = world.bind(B, A, port).unwrap();
    assert!(same(&world.table(B).get(again).unwrap().tx, &Some(rx.clone())), "the same eventfds");
    world.close(A, port).unwrap();
    assert_eq!(world.table(B).get(again).unwrap().state, State::Unbound(A));
    assert_eq!(world.bind(A, B, again), Ok(1), "and now from the other side");
    assert_eq!(kicked(&rx), 0);
}

/// Every history of 7 steps of two domains with two ports each: alloc, bind of the other's port 1 or 2, close of port 1 or 2.
/// After each step both ends of every connection agree, eventfds are crossed, and a close after a rebind never touches the
/// newer connection (which the generation-free number alone could not tell).
#[test]
fn xsa_338_every_history_of_bind_and_close() {
    const STEPS: usize = 7;
    const CHOICES: usize = 10;
    let mut states = 0u64;
    let mut history = Vec::new();
    fn walk(history: &mut Vec<usize>, states: &mut u64) {
        let mut world = World::new(2);
        for &choice in history.iter() {
            let (me, other) = if choice < 5 { (A, B) } else { (B, A) };
            // Each of these may be refused; the point is what is left afterwards.
            let _may_be_refused = match choice % 5 {
                0 => world.table(me).alloc_unbound(other).map(|_| ()),
                n @ 1..=2 => world.bind(me, other, n as u32).map(drop),
                n => world.close(me, n as u32 - 2),
            };
        }
        world.check();
        *states += 1;
        // Histories that begin with B are A's mirrored.
        if history.len() < STEPS - 2 {
            for choice in 0..CHOICES {
                history.push(choice);
                walk(history, states);
                history.pop();
            }
        }
    }
    history.extend([0, 6]); // B has bound A's first port
    walk(&mut history, &mut states);
    history = vec![0, 5]; // each has an unbound one
    walk(&mut history, &mut states);
    assert_eq!(states, 2 * (1 + 10 + 100 + 1000));
}

//! Event-channel ports of one domain, and what two domains' tables do to each other.
//!
//! ```text
//!                    bind by the remote
//!   free ──alloc──► UNBOUND ─────────────► INTERDOMAIN
//!    ▲               │   ▲                      │ the other side closes, or its domain goes
//!    └────close──────┘   └──────────────────────┘
//!    ▲──────────────────────close───────────────┘        free ──bind──► VIRQ / IPI ──close──► free
//! ```
//!
//! A pair of ports shares two eventfds, made when the first of them is allocated and kept for the pair's life: one side
//! waits on the one and writes the other, the other side the reverse. They latch what is sent while a process is dead. When
//! one side closes, the other's waiting end is kicked once so that it looks.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hv_abi::{PortInfo, port_state};
use nix::errno::Errno;

/// The other end of a port: a domain by number and serial number of its creation, so that a domid used again inherits
/// nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its domid.
    pub domid: u16,
    /// Serial number of its creation.
    pub instance: u64,
}

/// What a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waiting for the peer to bind.
    Unbound(Peer),
    /// Connected to this port of the peer's.
    Interdomain(Peer, u32),
    /// A virtual IRQ.
    Virq {
        /// Which.
        virq: u32,
        /// For which vCPU.
        vcpu: u32,
    },
    /// The owner's own inter-processor interrupt.
    Ipi {
        /// For which vCPU.
        vcpu: u32,
    },
}

/// A port.
#[derive(Clone, Debug)]
pub struct Port {
    /// What it is.
    pub state: State,
    /// The owner waits on it.
    pub rx: Option<Arc<OwnedFd>>,
    /// The owner writes it.
    pub tx: Option<Arc<OwnedFd>>,
}

impl Port {
    /// As the ABI tells it.
    pub fn info(&self, number: u32) -> PortInfo {
        let mut info = PortInfo { port: number, ..PortInfo::default() };
        match self.state {
            State::Unbound(peer) => {
                info.state = port_state::UNBOUND;
                info.remote_domid = peer.domid;
            }
            State::Interdomain(peer, port) => {
                info.state = port_state::INTERDOMAIN;
                info.remote_domid = peer.domid;
                info.remote_port = port;
            }
            State::Virq { virq, vcpu } => {
                info.state = port_state::VIRQ;
                (info.virq, info.vcpu) = (virq, vcpu);
            }
            State::Ipi { vcpu } => {
                info.state = port_state::IPI;
                info.vcpu = vcpu;
            }
        }
        info
    }

    /// The descriptors that the owner gets.
    pub fn fds(&self) -> Vec<Arc<OwnedFd>> {
        self.rx.iter().chain(&self.tx).cloned().collect()
    }
}

/// A domain's ports, numbered from 1.
#[derive(Debug)]
pub struct PortTable {
    ports: BTreeMap<u32, Port>,
    limit: u32,
    /// Every number below is in use.
    first_maybe_free: u32,
}

impl PortTable {
    /// An empty table of at most `limit` ports.
    pub fn new(limit: u32) -> Self {
        PortTable { ports: BTreeMap::new(), limit, first_maybe_free: 1 }
    }

    /// The port with this number.
    pub fn get(&self, port: u32) -> Option<&Port> {
        self.ports.get(&port)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Port)> {
        self.ports.iter().map(|(n, p)| (*n, p))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.ports.len()
    }

    fn free_number(&self) -> Result<u32, Errno> {
        if self.ports.len() >= self.limit as usize {
            return Err(Errno::ENOSPC);
        }
        let mut expected = self.first_maybe_free;
        for &number in self.ports.range(expected..).map(|(n, _)| n) {
            if number != expected {
                break;
            }
            expected += 1;
        }
        Ok(expected)
    }

    fn insert(&mut self, port: Port) -> Result<(u32, &Port), Errno> {
        let number = self.free_number()?;
        self.first_maybe_free = number + 1;
        Ok((number, self.ports.entry(number).or_insert(port)))
    }

    /// A new unbound port with fresh eventfds.
    ///
    /// # Errors
    /// `ENOSPC` no number free; else as eventfd(2).
    pub fn alloc_unbound(&mut self, peer: Peer) -> Result<(u32, &Port), Errno> {
        self.free_number()?;
        let (rx, tx) = (Arc::new(crate::sys::eventfd()?), Arc::new(crate::sys::eventfd()?));
        self.insert(Port { state: State::Unbound(peer), rx: Some(rx), tx: Some(tx) })
    }

    /// A port for a virtual IRQ; the same one if it is bound already.
    ///
    /// # Errors
    /// `ENOSPC`, or as eventfd(2).
    pub fn bind_virq(&mut self, virq: u32, vcpu: u32) -> Result<(u32, &Port), Errno> {
        let state = State::Virq { virq, vcpu };
        if let Some(number) = self.ports.iter().find(|(_, p)| p.state == state).map(|(n, _)| *n) {
            return Ok((number, &self.ports[&number]));
        }
        self.free_number()?;
        let rx = Arc::new(crate::sys::eventfd()?);
        self.insert(Port { state, rx: Some(rx), tx: None })
    }

    /// A port for an IPI.
    ///
    /// # Errors
    /// `ENOSPC`.
    pub fn bind_ipi(&mut self, vcpu: u32) -> Result<(u32, &Port), Errno> {
        self.insert(Port { state: State::Ipi { vcpu }, rx: None, tx: None })
    }

    /// The eventfds of every port of this virtual IRQ.
    pub fn virq_fds(&self, virq: u32) -> impl Iterator<Item = &Arc<OwnedFd>> {
        let of = move |p: &&Port| matches!(p.state, State::Virq { virq: v, .. } if v == virq);
        self.ports.values().filter(of).filter_map(|p| p.rx.as_ref())
    }

    /// Frees a port. What is left to do to the other side is [`Closed`].
    ///
    /// # Errors
    /// `ENOENT` there is none.
    pub fn close(&mut self, port: u32) -> Result<Closed, Errno> {
        let number = port;
        let port = self.ports.remove(&number).ok_or(Errno::ENOENT)?;
        self.first_maybe_free = self.first_maybe_free.min(number);
        Ok(Closed {
            remote: if let State::Interdomain(peer, n) = port.state { Some((peer, n)) } else { None },
        })
    }

    /// The other side of `port`, which was connected to (`by`, `by_port`), has closed: unbound again, and its owner looks.
    pub fn remote_closed(&mut self, port: u32, by: Peer, by_port: u32) {
        if let Some(entry) = self.ports.get_mut(&port)
            && entry.state == State::Interdomain(by, by_port)
        {
            entry.state = State::Unbound(by);
            if let Some(rx) = &entry.rx {
                crate::sys::kick(rx);
            }
        }
    }

    /// Takes everything out, for a domain that goes.
    pub fn close_all(&mut self) -> Vec<(u32, Closed)> {
        let numbers: Vec<u32> = self.ports.keys().copied().collect();
        numbers.into_iter().filter_map(|n| self.close(n).ok().map(|c| (n, c))).collect()
    }
}

/// What a close leaves to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed {
    /// The peer's port that becomes unbound.
    pub remote: Option<(Peer, u32)>,
}

/// First half of a bind: what `caller` gets when it binds `port` of `remote`'s table, without changing anything. `Ok(Err(n))`
/// when the caller has bound it already, as its own port `n`.
///
/// # Errors
/// `ENOENT` no such port, `EPERM` not for the caller, `EBUSY` bound by another.
pub fn bindable(remote: &PortTable, port: u32, caller: Peer) -> Result<Result<Port, u32>, Errno> {
    let entry = remote.get(port).ok_or(Errno::ENOENT)?;
    match entry.state {
        State::Unbound(peer) if peer == caller => {
            Ok(Ok(Port { state: entry.state, rx: entry.tx.clone(), tx: entry.rx.clone() }))
        }
        State::Unbound(_) => Err(Errno::EPERM),
        State::Interdomain(peer, own) if peer == caller => Ok(Err(own)),
        State::Interdomain(..) => Err(Errno::EBUSY),
        // Another's private ports: nothing is told about them.
        State::Virq { .. } | State::Ipi { .. } => Err(Errno::ENOENT),
    }
}

/// Second half, on the caller's own table.
///
/// # Errors
/// `ENOSPC`; then nothing has changed.
pub fn bind_local(own: &mut PortTable, remote: Peer, remote_port: u32, mut port: Port) -> Result<u32, Errno> {
    port.state = State::Interdomain(remote, remote_port);
    Ok(own.insert(port)?.0)
}

/// Last half, on the remote's table.
pub fn bind_remote(remote: &mut PortTable, port: u32, caller: Peer, caller_port: u32) {
    if let Some(entry) = remote.ports.get_mut(&port) {
        entry.state = State::Interdomain(caller, caller_port);
    }
}

#[cfg(test)]
mod tests;

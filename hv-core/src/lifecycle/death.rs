//! Ends: of processes, of maps that nobody claims, of domains.

use std::os::fd::AsFd;
use std::time::Instant;

use hv_abi::*;
use proto::hvcore::event::Kind;

use super::{Answer, DYING_DEADLINE, Lifecycle, LifecycleError};
use crate::grants::Map;
use crate::netdev;
use crate::ports::Peer;
use crate::resources::Resource;

/// SHUTDOWN_crash of sched.h.
const SHUTDOWN_CRASH: u32 = 3;

/// How a wait status reads.
fn exit_info(status: i32, faults_before: u32) -> (ExitInfo, String) {
    const OWN_FAULT_SIGNALS: [i32; 7] =
        [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGSYS, libc::SIGTRAP];
    let signal = status & 0x7f;
    let (how, code, own_fault, text) = if signal != 0 {
        let name = nix::sys::signal::Signal::try_from(signal).map_or("unknown signal", |s| s.as_str());
        let hint = if signal == libc::SIGSYS { " (a system call that its filter forbids)" } else { "" };
        (EXIT_SIGNAL, signal, OWN_FAULT_SIGNALS.contains(&signal), format!("killed by {name}{hint}"))
    } else {
        let code = status >> 8 & 0xff;
        let panicked = code == PANIC_EXIT_STATUS;
        let text = if panicked { "panicked".into() } else { format!("exited with status {code}") };
        (EXIT_CODE, code, panicked, text)
    };
    let own_faults_in_row = if own_fault { faults_before.saturating_add(1) } else { 0 };
    (ExitInfo { how, code, own_fault: own_fault.into(), own_faults_in_row }, text)
}

/// Removes a socket file of ours.
pub(super) fn unlink(path: &str) {
    if let Err(e) = std::fs::remove_file(path)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("{path}: {e}");
    }
}

/// Removes the socket files of listeners among these.
pub(super) fn unlink_listeners(resources: &[Resource]) {
    for resource in resources.iter().filter(|r| r.listener.is_some()) {
        unlink(&resource.path);
    }
}

impl Lifecycle {
    /// A process was reaped: end its calls.
    pub(super) fn reaped(&mut self, pid: i32, status: i32, ns: u64) {
        let (peer, drained) = {
            let mut table = self.hv.lock();
            let Some(domid) = table.by_pid.remove(&pid) else { return };
            let Some(d) = table.domains.get_mut(&domid) else { return };
            let Some(process) = d.process.as_mut().filter(|p| p.pid == pid) else { return };
            process.reaped = Some((status, ns));
            (d.peer, process.incarnation.end())
        };
        if drained {
            self.over(peer);
        }
    }

    /// The last thread of an ended incarnation is done.
    pub(super) fn drained(&mut self, peer: Peer, generation: u32) {
        let over = {
            let table = self.hv.lock();
            let of = table.get(peer).filter(|d| d.generation == generation);
            of.and_then(|d| d.process.as_ref()).is_some_and(|p| p.reaped.is_some())
        };
        if over {
            self.over(peer);
        }
    }

    /// An incarnation is over: reaped, and none of its calls is left.
    fn over(&mut self, peer: Peer) {
        let now = Instant::now();
        let (buffers, maps, text, generation, restart_in, state, crashed) = {
            let mut table = self.hv.lock();
            let going: Vec<Peer> = {
                let dying = table.domains.values().filter(|d| d.state == dom_state::DYING);
                dying.map(|d| d.peer).collect()
            };
            let there: Vec<Peer> = table.domains.values().map(|d| d.peer).collect();
            let Some(d) = table.get_mut(peer) else { return };
            let Some((status, ns)) = d.process.take().and_then(|p| p.reaped) else { return };
            let (info, text) = exit_info(status, d.prev_exit.own_faults_in_row);
            (d.prev_exit, d.prev_exit_ns, d.last_exit) = (info, ns, text.clone());
            d.claim_deadline = None;
            // Pages of domains that go are not for the next incarnation.
            let maps = d.maps.take_if(|m| going.contains(&m.granter) || !there.contains(&m.granter));
            let mut restart_in = None;
            match d.state {
                dom_state::SHUTDOWN | dom_state::DYING => {}
                _ if self.stopping => {}
                _ => {
                    restart_in = d.backoff.next(&d.spec.restart, now);
                    d.state = if restart_in.is_some() { dom_state::RESTARTING } else { dom_state::FAILED };
                }
            }
            let crashed = d.state == dom_state::SHUTDOWN && d.shutdown_reason == SHUTDOWN_CRASH;
            (d.buffers.take(), maps, text, d.generation, restart_in, d.state, crashed)
        };
        drop(buffers);
        self.hv.release_maps(peer, maps);
        self.event(Kind::ProcessDied, peer, &text);
        let for_good = state == dom_state::FAILED || crashed;
        let text = if for_good { self.with_last_words(peer, text) } else { text };
        if let Some(wait) = restart_in {
            self.restarts.insert((now + wait, peer.domid), peer);
        }
        if state == dom_state::FAILED {
            self.event(Kind::Failed, peer, &format!("{text} (not restarted)"));
            self.hv.lock().kick_dom_exc();
        }
        if state == dom_state::DYING {
            self.take_apart(peer, generation);
        }
    }

    /// A process that ended for good told why on its stderr: dom0 shows it to the user.
    fn with_last_words(&self, peer: Peer, text: String) -> String {
        let Some(name) = self.hv.lock().get(peer).map(|d| d.spec.name.clone()) else { return text };
        // What it wrote is in the pipe; the log's thread has it in a moment. Nothing waits for a domain that failed.
        std::thread::sleep(std::time::Duration::from_millis(10));
        let Some(words) = self.logs.last_words(&name) else { return text };
        let text = format!("{text}: {words}");
        if let Some(d) = self.hv.lock().get_mut(peer) {
            d.last_exit = text.clone();
        }
        text
    }

    /// The backoff is over.
    pub(super) fn restart(&mut self, peer: Peer) {
        let still = self.hv.lock().get(peer).is_some_and(|d| d.state == dom_state::RESTARTING);
        if !still {
            return;
        }
        if let Err(reason) = self.start_process(peer) {
            let text = format!("could not be started: {reason}");
            let wait = {
                let mut table = self.hv.lock();
                let Some(d) = table.get_mut(peer) else { return };
                d.last_exit = text.clone();
                let wait = d.backoff.next(&d.spec.restart, Instant::now());
                if wait.is_none() {
                    d.state = dom_state::FAILED;
                    table.kick_dom_exc();
                }
                wait
            };
            match wait {
                Some(wait) => {
                    tracing::warn!(domid = peer.domid, "{text}; trying again in {wait:?}");
                    // Never at once: what is wrong with the file will not be right in the same moment.
                    let at = Instant::now() + wait.max(std::time::Duration::from_millis(10));
                    self.restarts.insert((at, peer.domid), peer);
                }
                None => self.event(Kind::Failed, peer, &text),
            }
        }
    }

    /// Predecessors' maps whose time is over.
    pub(super) fn drop_unclaimed(&mut self, now: Instant) {
        let mut dropped: Vec<(Peer, Vec<Map>)> = Vec::new();
        for d in self.hv.lock().domains.values_mut() {
            if d.claim_deadline.is_some_and(|at| at <= now) {
                d.claim_deadline = None;
                let generation = d.generation;
                dropped.push((d.peer, d.maps.take_if(|m| m.generation != generation)));
            }
        }
        for (peer, maps) in dropped {
            if !maps.is_empty() {
                tracing::warn!(
                    domid = peer.domid,
                    maps = maps.len(),
                    "a predecessor's maps were not claimed"
                );
            }
            self.hv.release_maps(peer, maps);
        }
    }

    /// DestroyDomain.
    pub(super) fn destroy(&mut self, peer: Peer, answer: Answer<()>) {
        let running = {
            let mut table = self.hv.lock();
            let Some(d) = table.get_mut(peer) else {
                let _may_have_left = answer.send(Err(LifecycleError::NotFound));
                return;
            };
            let first = d.state != dom_state::DYING;
            d.state = dom_state::DYING;
            if first && d.pvh.is_some() {
                d.dying_deadline = Some(Instant::now() + DYING_DEADLINE);
            }
            if let Some(process) = &d.process {
                // No more calls of it from now on, even before it is reaped.
                process.incarnation.end();
            }
            let running = d.process.is_some();
            if !first && !running {
                drop(table);
                let _may_have_left = answer.send(Ok(()));
                return;
            }
            table.kick_dom_exc();
            running
        };
        self.restarts.retain(|_, p| *p != peer);
        self.destroying.push((peer, answer));
        if running {
            self.kill(peer);
        } else {
            let generation = self.hv.lock().get(peer).map_or(0, |d| d.generation);
            self.take_apart(peer, generation);
        }
    }

    /// A DYING domain has no process any more: everything of its own goes. What others hold of its memory keeps it DYING.
    fn take_apart(&mut self, peer: Peer, generation: u32) {
        tracing::debug!(domid = peer.domid, generation, "taking apart");
        let (fds, maps, resources, control, regions, netdevs) = {
            let mut table = self.hv.lock();
            let Some(d) = table.get_mut(peer) else { return };
            let ports = d.ports.close_all();
            let fds = d.fds.take_all();
            let maps = d.maps.take_if(|_| true);
            let resources: Vec<Resource> = std::mem::take(&mut d.resources).into_values().collect();
            let control = d.kept.take();
            let regions = std::mem::replace(&mut d.regions, crate::grants::region::Regions::new(0));
            for (port, closed) in ports {
                table.finish_close(peer, port, closed);
            }
            let netdevs = table.get(peer).map(|d| d.spec.netdevs.clone()).unwrap_or_default();
            (fds, maps, resources, control, regions, netdevs)
        };
        // Closing these may take its time (a TAP, a large memfd): not under the lock.
        unlink_listeners(&resources);
        if let Some(kept) = &control {
            unlink(&kept.control_path);
            for dev in netdevs {
                match netdev::bring_back(&dev, kept.netns.as_fd()) {
                    Ok(()) => {}
                    // Never moved there, or removed by its other end.
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                    Err(e) => tracing::warn!(domid = peer.domid, "{dev} did not come back to the host: {e}"),
                }
            }
        }
        drop((fds, resources, control, regions));
        self.hv.release_maps(peer, maps);
        if let Some(cgroups) = &self.cgroups {
            cgroups.remove(peer.domid);
        }
        for (_, answer) in self.destroying.extract_if(.., |(p, _)| *p == peer) {
            let _may_have_left = answer.send(Ok(()));
        }
        self.finish_dying(Instant::now());
    }

    /// Removes DYING domains of whose pages none is held; ends the patience with holders.
    pub(super) fn finish_dying(&mut self, now: Instant) {
        let mut gone = Vec::new();
        let mut stubborn = Vec::new();
        {
            let mut table = self.hv.lock();
            for d in table.domains.values_mut() {
                if d.state != dom_state::DYING || d.process.is_some() || d.kept.is_some() {
                    continue;
                }
                if d.pvh.as_ref().is_none_or(|p| p.pinned() == 0) {
                    gone.push((d.peer, d.event_id(), d.spec.name.clone()));
                } else if d.dying_deadline.is_some_and(|at| at <= now) {
                    d.dying_deadline = None;
                    stubborn.push(d.peer);
                }
            }
        }
        for granter in stubborn {
            let holders: Vec<Peer> = {
                let table = self.hv.lock();
                table.domains.values().filter(|d| d.maps.any_of(granter)).map(|d| d.peer).collect()
            };
            for holder in holders {
                let what = format!("still maps pages of domain {}, which was destroyed", granter.domid);
                self.hv.violation(holder, &what, true);
            }
        }
        for (peer, id, name) in gone {
            let domain = self.hv.lock().domains.remove(&peer.domid);
            self.hv.events.push(Kind::Destroyed, id, &name, "");
            self.hv.lock().kick_dom_exc();
            // Guest RAM is freed here.
            drop(domain);
        }
    }

    /// Undoes a creation that failed before its process ran.
    pub(super) fn forget(&mut self, peer: Peer) {
        if let Some(d) = self.hv.lock().get_mut(peer) {
            d.state = dom_state::DYING;
        }
        self.take_apart(peer, 0);
        // Never set up: nothing for `take_apart` to find.
        self.finish_dying(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_faults_count() {
        let own = |status, before| exit_info(status, before).0;
        assert_eq!(own(PANIC_EXIT_STATUS << 8, 0).own_fault, 1);
        assert_eq!(own(1 << 8, 0).own_fault, 0);
        assert_eq!(own(0, 3).own_faults_in_row, 0);
        for signal in [4, 5, 6, 7, 8, 11, 31] {
            assert_eq!((own(signal, 2).own_fault, own(signal, 2).own_faults_in_row), (1, 3), "{signal}");
        }
        let killed = own(libc::SIGKILL, 2);
        assert_eq!(
            (killed.how, killed.code, killed.own_fault, killed.own_faults_in_row),
            (EXIT_SIGNAL, 9, 0, 0)
        );
        assert_eq!(own(libc::SIGSEGV | 0x80, 0).code, 11, "the core bit is no part of the signal");
    }
}

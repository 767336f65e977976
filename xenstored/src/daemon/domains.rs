//! Domains and their rings come and go.

use std::collections::HashMap;
use std::time::Instant;

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{CONNS, Daemon, DaemonError, Link, RESCAN};
use crate::domains::{Domains, Seen};
use crate::keeper::FdKeeper;
use crate::transport::ring;

impl<K: FdKeeper, D: Domains> Daemon<K, D> {
    /// Compares hv-core's list of domains with what the store knows.
    pub(super) fn scan_domains(&mut self) -> Result<(), DaemonError> {
        self.rescan_at = None;
        if self.domains.changed_fd().is_none() {
            return Ok(());
        }
        let seen = match self.domains.list() {
            Ok(seen) => seen,
            Err(e) => {
                tracing::error!(error = %e, "no list of domains");
                self.rescan_at = Some(Instant::now() + RESCAN);
                return Ok(());
            }
        };
        let living: HashMap<u16, u64> =
            seen.iter().filter(|s| !s.dying).map(|s| (s.domid, s.instance)).collect();
        let alive = |domid, instance| living.get(&domid).is_some_and(|i| instance == 0 || *i == instance);
        let store = &self.engine.store;
        let known = store.domains().map(|(domid, d)| (domid, d.instance));
        let all = known.chain(store.prepared().map(|domid| (domid, 0)));
        let gone: Vec<u16> =
            all.filter(|(domid, instance)| !alive(*domid, *instance)).map(|(domid, _)| domid).collect();
        for domid in gone {
            tracing::info!(domid, "domain is gone");
            if let Err(e) = self.engine.domain_down(domid) {
                tracing::error!(error = %e, domid, "the journal is full, a domain's end waits");
                self.rescan_at = Some(Instant::now() + RESCAN);
                continue;
            }
            self.flush_touched()?;
            self.drop_closed();
            self.domains.detach(domid);
        }
        for seen in seen.iter().filter(|s| !s.dying) {
            if let Err(e) = self.take_up_domain(seen) {
                tracing::warn!(domid = seen.domid, error = %e, "domain's store ring can't be had yet");
                self.rescan_at = Some(Instant::now() + RESCAN);
            }
        }
        self.flush_touched()
    }

    fn take_up_domain(&mut self, seen: &Seen) -> Result<(), DaemonError> {
        if seen.shutdown && self.engine.store.domain(seen.domid).is_some_and(|d| !d.shutdown) {
            self.engine.domain_shutdown(seen.domid)?;
        }
        let Some(ring_at) = seen.ring.filter(|_| !self.engine.store.was_released(seen.domid, seen.instance))
        else {
            return Ok(());
        };
        let known = self.engine.store.domain(seen.domid).cloned();
        let conn =
            known.filter(|d| d.instance == seen.instance && d.ring == Some(ring_at)).and_then(|d| d.conn);
        if conn.is_some_and(|id| self.links.contains_key(&id)) {
            return Ok(());
        }
        if conn.is_none()
            && let Some(old) = self.engine.store.domain(seen.domid).and_then(|d| d.conn)
        {
            // The same domain with another ring.
            self.close(old)?;
            self.domains.detach(seen.domid);
        }
        let ring = self.domains.attach(seen)?;
        let id = match conn {
            Some(id) => {
                ring::publish(&self.engine, id, &*ring.page);
                id
            }
            None => {
                let Some(id) = self.engine.domain_up(seen.domid, seen.instance, ring_at, seen.class)? else {
                    tracing::error!(domid = seen.domid, "domain is refused: all connection slots are taken");
                    return Ok(());
                };
                tracing::info!(domid = seen.domid, "domain introduced");
                self.drop_closed();
                ring::adopt(&self.engine, id, &*ring.page);
                id
            }
        };
        self.epoll.add(ring.port.rx(), EpollEvent::new(EpollFlags::EPOLLIN, CONNS + id.0))?;
        ring.port.notify();
        self.links.insert(id, Link::Ring(ring));
        self.flush(id)?;
        self.wake(id);
        Ok(())
    }
}

//! What the engine does with each request.

use domain_kit::journal::{MAX_ATTEMPTS, Slot};
use domain_kit::ring::RingMem;
use xen_abi::io::blkif::{BLKIF_RSP_ERROR, BLKIF_RSP_OKAY};

use super::{Direction, Engine, GuestPages, IndirectPage, NO_SPACE_RETRY, NoSpace, Phase};
use crate::disk::attachment::{DiskError, DiskQueue, DiskRequest, Operation, Tag};
use crate::request::{Kind, indirect_page, is_barrier};

impl<R: RingMem, J: RingMem, G: GuestPages, D: DiskQueue> Engine<R, J, G, D> {
    /// Takes up what is in `taken`: indirect segments are copied, once, and journalled before anything is judged by them.
    pub(super) fn accept(&mut self) {
        for &slot in &self.taken {
            let i = slot.0 as usize;
            self.began[i] = self.now;
            self.unreadable[i] = false;
            let Some((gref, len)) = indirect_page(self.abi, self.ring.request(slot)) else { continue };
            if self.ring.kept(slot) == 0 {
                self.indirect.push(IndirectPage { slot, gref, len });
            }
        }
        if !self.indirect.is_empty() {
            let (ring, unreadable) = (&mut self.ring, &mut self.unreadable);
            self.guest.indirect(&self.indirect, &mut |slot, bytes| match bytes {
                Some(bytes) => ring.keep(slot, bytes),
                None => unreadable[slot.0 as usize] = true,
            });
            self.indirect.clear();
        }
        self.queue.extend(self.taken.drain(..));
    }

    fn submit(&mut self, slot: Slot, operation: Operation) {
        let request = &self.requests[slot.0 as usize];
        let (offset, len) = match operation {
            Operation::Flush => (0, 0),
            _ => (request.offset, request.len),
        };
        let request = DiskRequest { operation, offset, len, buffer: request.buffer };
        self.disk.submit(Tag(slot.0), &request);
    }

    /// Takes the disk's completions through their next phase.
    pub(super) fn complete(&mut self) -> bool {
        self.disk.completed(&mut self.done);
        if self.done.is_empty() {
            return false;
        }
        let mut done = std::mem::take(&mut self.done);
        for (Tag(i), result) in done.drain(..) {
            let slot = Slot(i);
            let phase = std::mem::take(&mut self.phases[i as usize]);
            if let Err(DiskError(errno)) = result {
                self.disk_failed(slot, errno);
                continue;
            }
            match phase {
                Phase::Reading => self.store.push(slot),
                Phase::FlushBeforeWrite => self.fetch.push(slot),
                Phase::Writing => self.finish(slot, BLKIF_RSP_OKAY),
                Phase::Flushing => self.finish(slot, BLKIF_RSP_OKAY),
                Phase::Discarding => self.finish(slot, BLKIF_RSP_OKAY),
                Phase::Idle => tracing::error!(slot = slot.0, "a completion for nothing"),
            }
        }
        self.done = done;
        self.store_reads();
        self.start_writes();
        true
    }

    fn store_reads(&mut self) {
        if self.store.is_empty() {
            return;
        }
        self.guest.transfer(Direction::Store, &self.store, &self.requests, &mut self.failed);
        let mut store = std::mem::take(&mut self.store);
        for slot in store.drain(..) {
            if self.failed.contains(&slot) {
                self.refuse(slot, "its pages cannot be written");
            } else {
                self.finish(slot, BLKIF_RSP_OKAY);
            }
        }
        self.store = store;
        self.failed.clear();
    }

    fn start_writes(&mut self) {
        if self.fetch.is_empty() {
            return;
        }
        self.guest.transfer(Direction::Fetch, &self.fetch, &self.requests, &mut self.failed);
        let mut fetch = std::mem::take(&mut self.fetch);
        for slot in fetch.drain(..) {
            if self.failed.contains(&slot) {
                self.refuse(slot, "its pages cannot be read");
                continue;
            }
            let i = slot.0 as usize;
            self.phases[i] = Phase::Writing;
            let fua = self.requests[i].kind != Kind::Write;
            self.submit(slot, Operation::Write { fua });
        }
        self.fetch = fetch;
        self.failed.clear();
    }

    /// Starts what may start, in request order.
    pub(super) fn dispatch(&mut self) -> bool {
        self.wants_alone = false;
        if let Some(until) = self.stopped_until {
            if self.now < until {
                return false;
            }
            self.stopped_until = None;
        }
        let mut moved = false;
        while let Some(&slot) = self.queue.front() {
            if self.exclusive {
                break;
            }
            let i = slot.0 as usize;
            let attempts = self.ring.attempts(slot);
            if attempts >= MAX_ATTEMPTS {
                self.queue.pop_front();
                tracing::error!(
                    index = self.ring.req_index(slot),
                    attempts,
                    "poison request: answered with an error"
                );
                self.stats.poisoned.add(1);
                self.ring.respond(slot, BLKIF_RSP_ERROR, 0);
                moved = true;
                continue;
            }
            let alone = attempts > 0 || is_barrier(self.ring.request(slot));
            if alone && self.running > 0 {
                break;
            }
            let may = if alone { self.seat.enter_alone() } else { self.seat.enter() };
            if !may {
                self.wants_alone = alone;
                break;
            }
            // From here on a crash is this request's.
            self.ring.start(slot);
            let mut geometry = self.disk.geometry();
            geometry.read_only |= self.read_only;
            self.ring.kept_bytes(slot, &mut self.extra);
            let request = &mut self.requests[i];
            let checked = if self.unreadable[i] {
                Err(crate::request::Refusal::Invalid("its indirect page cannot be read"))
            } else {
                request.check(self.abi, self.ring.request(slot), &self.extra, &geometry)
            };
            if let Err(refusal) = checked {
                self.queue.pop_front();
                moved = true;
                tracing::debug!(index = self.ring.req_index(slot), %refusal, "request refused");
                self.stats.refused.add(1);
                self.ring.respond(slot, refusal.status(), 0);
                continue;
            }
            if request.has_data() {
                // Without room for its data it waits for others to end.
                let Some(buffer) = self.arena.take(request.len as usize) else { break };
                request.buffer = buffer;
            }
            if let Err(wait) = self.limiter.pass(self.now, request.len) {
                if request.has_data() {
                    self.arena.give(request.buffer, request.len as usize);
                }
                self.stats.throttled.add(1);
                self.stopped_until = Some(self.now + wait);
                break;
            }
            self.queue.pop_front();
            moved = true;
            if let Some(fault) = &mut self.fault {
                fault(request);
            }
            self.exclusive = alone;
            self.running += 1;
            match request.kind {
                Kind::Read => {
                    self.phases[i] = Phase::Reading;
                    self.submit(slot, Operation::Read);
                }
                Kind::Write => self.fetch.push(slot),
                Kind::Flush | Kind::Barrier => {
                    let data = request.has_data();
                    self.phases[i] = if data { Phase::FlushBeforeWrite } else { Phase::Flushing };
                    self.submit(slot, Operation::Flush);
                }
                Kind::Discard { secure } => {
                    self.phases[i] = Phase::Discarding;
                    self.submit(slot, Operation::Discard { secure });
                }
            }
        }
        self.start_writes();
        moved
    }

    /// A request is out of the disk: its buffer is free again.
    fn leave(&mut self, slot: Slot) {
        let request = &self.requests[slot.0 as usize];
        if request.has_data() {
            self.arena.give(request.buffer, request.len as usize);
        }
        self.running -= 1;
        self.exclusive = false;
    }

    fn finish(&mut self, slot: Slot, status: i16) {
        let i = slot.0 as usize;
        if status == BLKIF_RSP_OKAY {
            if self.no_room && self.requests[i].kind != Kind::Read {
                self.no_room = false;
                self.stats.no_space.set(0);
                self.enospc_logged = false;
                tracing::info!("there is room again");
            }
            let request = &self.requests[i];
            let took = self.now.saturating_duration_since(self.began[i]);
            self.stats.done(request.kind, request.len, took);
        }
        self.leave(slot);
        self.ring.respond(slot, status, 0);
        self.answered += 1;
    }

    fn refuse(&mut self, slot: Slot, why: &str) {
        tracing::warn!(index = self.ring.req_index(slot), why, "request failed");
        self.stats.refused.add(1);
        self.finish(slot, BLKIF_RSP_ERROR);
    }

    fn disk_failed(&mut self, slot: Slot, errno: i32) {
        let error = std::io::Error::from_raw_os_error(errno);
        let offset = self.requests[slot.0 as usize].offset;
        let full = error.kind() == std::io::ErrorKind::StorageFull;
        if full && !std::mem::replace(&mut self.enospc_logged, true) {
            let stop = self.no_space == NoSpace::Stop;
            let then = if stop { "the guest's disk stops" } else { "writes fail" };
            tracing::error!(offset, "the file system under the disk is full: {then} until there is room");
        }
        if full && self.no_space == NoSpace::Stop {
            self.stats.no_space.set(1);
            self.no_room = true;
            self.stopped_until = Some(self.now + NO_SPACE_RETRY);
            self.leave(slot);
            self.queue.push_front(slot);
            return;
        }
        self.stats.errors.add(1);
        if !full {
            tracing::error!(offset, %error, "disk error: answered to that request alone");
        }
        self.finish(slot, BLKIF_RSP_ERROR);
    }
}

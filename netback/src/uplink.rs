//! The thread that takes packets from the uplink's TAP to the guests.
//!
//! Packets are read into memory that outlives the incarnation and noted there; see [`crate::spool`].

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain_kit::hypercall::Hypercall;
use domain_kit::mem::SharedMem;
use hv_abi::fd_kind;
use nix::errno::Errno;

use crate::connection::{ConnectError, kept_memory, system};
use crate::offload::VNET_HDR_LEN;
use crate::queue::{ARENA_BYTES, Fate, Frame, QueueError, SCRATCH};
use crate::slots::{MAX_RX_PACKET, MIN_PACKET};
use crate::spool::{self, Spool};
use crate::switch::{Lane, Origin, Switch};
use crate::tap::Tap;
use crate::worker::Control;
use domain_kit::ring::Span;

/// The TAP's name.
pub const NAME: &str = "net0";
const TAP_ENTRY: &str = "uplink-tap";
const MEMORY_ENTRY: &str = "uplink-mem";
/// Packets that are read before they are handed on, at most.
const MAX_BATCH: usize = 64;
const NOTES: usize = 4096;
/// How often guests are told of their router; they are told that it lasts three times as long.
const ADVERTISE: Duration = Duration::from_secs(600);

const fn notes_fit() {
    assert!(spool::notes_bytes(MAX_BATCH) <= NOTES);
}
const _: () = notes_fit();

/// All that the thread needs.
#[derive(Debug)]
pub struct UplinkWork {
    tap: Arc<Tap>,
    lane: Lane,
    notes: Span,
    spool: Spool,
    switch: Arc<Switch>,
    /// After an own crash: one at a time, so that the right one is blamed.
    careful: bool,
}

/// The uplink's TAP: a predecessor's, or a new one.
///
/// # Errors
/// No /dev/net/tun in the sandbox, no permission, the fd store is full.
pub fn tap(hv: &Hypercall) -> Result<Arc<Tap>, ConnectError> {
    let tap = match hv.fd_get(TAP_ENTRY) {
        Ok((_, fd)) => Tap::from_fd(fd).map_err(system("taking over the TAP"))?,
        Err(e) if e.is(Errno::ENOENT) => {
            let tap = Tap::create(NAME)
                .map_err(system("making a TAP with /dev/net/tun (bound into the sandbox? CAP_NET_ADMIN?)"))?;
            hv.fd_put(TAP_ENTRY, fd_kind::TAP, 0, &tap)?;
            tap
        }
        Err(e) => return Err(e.into()),
    };
    tap.take_all_offloads().map_err(system("setting the TAP's offloads"))?;
    Ok(Arc::new(tap))
}

impl UplinkWork {
    /// Takes up what a predecessor had read and not handed on, if there is such.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn open(
        hv: &Hypercall,
        tap: Arc<Tap>,
        switch: Arc<Switch>,
        own_fault: bool,
    ) -> Result<UplinkWork, ConnectError> {
        let bytes = NOTES + ARENA_BYTES;
        let (fd, mem): (_, Arc<SharedMem>) = kept_memory(hv, MEMORY_ENTRY, bytes)?;
        let buffer = hv.buffer_register(&fd, bytes as u64)?;
        let (notes, arena) = (Span::new(mem.clone(), 0, NOTES), Span::new(mem, NOTES, ARENA_BYTES));
        // Memory that was never used is an empty spool.
        let spool =
            Spool::recover(&notes, 0, MAX_BATCH, 0..SCRATCH, &arena, own_fault).unwrap_or_else(|error| {
                tracing::error!(%error, "what was read from the uplink is lost");
                Spool::create(&notes, 0, MAX_BATCH, 0..SCRATCH)
            });
        let lane = Lane::new(arena, buffer, hv.new_channel()?);
        Ok(UplinkWork { tap, lane, notes, spool, switch, careful: own_fault })
    }

    /// Runs until it is stopped.
    ///
    /// # Errors
    /// [`QueueError::Tap`].
    pub fn run(&mut self, control: &Control) -> Result<(), QueueError> {
        let mut next = Instant::now() + ADVERTISE;
        while !control.stopping() {
            if control.resting() {
                control.sleep(&[], None);
                continue;
            }
            self.hand_on();
            if Instant::now() >= next {
                self.switch.advertise(&mut self.lane);
                next = Instant::now() + ADVERTISE;
            }
            if !self.read()? {
                control.sleep(&[self.tap.as_fd()], Some(next.saturating_duration_since(Instant::now())));
            }
        }
        Ok(())
    }

    /// Reads what is there, up to a batch; false if there was nothing.
    fn read(&mut self) -> Result<bool, QueueError> {
        let mut any = false;
        while let Some(at) = self.spool.room() {
            let from = self.lane.arena.absolute(at - VNET_HDR_LEN);
            let read = self
                .tap
                .read(self.lane.arena.mem(), from, VNET_HDR_LEN + MAX_RX_PACKET)
                .map_err(QueueError::Tap)?;
            let Some(read) = read else { break };
            any = true;
            let len = read.saturating_sub(VNET_HDR_LEN);
            if (MIN_PACKET..=MAX_RX_PACKET).contains(&len) {
                self.spool.note(&self.notes, &self.lane.arena, len);
                self.switch.stats.tx_packets.add(1);
                self.switch.stats.tx_bytes.add(len as u64);
            }
        }
        Ok(any)
    }

    fn hand_on(&mut self) {
        let (numbers, frames): (Vec<usize>, Vec<Frame>) = self.spool.unmarked().into_iter().unzip();
        let (base, notes) = (self.spool.base(), &self.notes);
        let size = if std::mem::take(&mut self.careful) { 1 } else { MAX_BATCH };
        for (batch, numbers) in frames.chunks(size).zip(numbers.chunks(size)) {
            let mut fates = [Fate::default(); MAX_BATCH];
            self.switch.forward(Origin::Uplink, &mut self.lane, batch, &mut fates[..batch.len()], &mut |i| {
                spool::mark_one(notes, base, numbers[i]);
            });
            if let Some(&last) = numbers.last() {
                self.spool.hand(notes, last);
            }
        }
        self.spool.rewind(&self.notes);
    }
}

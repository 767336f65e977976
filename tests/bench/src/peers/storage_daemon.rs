//! QEMU's storage daemon with a vhost-user-blk export, and a driver for its queue: a split virtqueue (virtio 1.2, 2.7) with event
//! indices (2.7.10) in one shared region, and the block device's requests (5.2.6).
#![expect(unsafe_code, reason = "the vhost crate's event descriptors are given up and taken by number")]

use std::convert::Infallible;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domain_kit::evtchn::Port;
use domain_kit::mem::SharedMem;
use domain_kit::poll::Window;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::disk::{Io, Target};

/// The program, of Debian's qemu-system-common or qemu-storage-daemon.
pub const PROGRAM: &str = "/usr/bin/qemu-storage-daemon";

/// Descriptors of the queue: three a request.
const QUEUE: u16 = 128;
/// Guest-physical address of the region; its pieces, bytes from its start.
const BASE: u64 = 1 << 20;
const DESC: usize = 0;
const AVAIL: usize = 4096;
const USED: usize = 8192;
const HEADERS: usize = 12288;
const DATA: usize = 16384;
/// Bytes of a request's header, and of its room with the status behind it.
const HEADER: usize = 16;
const HEADER_ROOM: usize = 32;

const F_EVENT_IDX: u64 = 1 << 29;
const F_PROTOCOL: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running daemon that exports one file; ended when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    /// Exports `file`, opened as blkback has it, from an I/O thread. The socket is made in `dir`.
    ///
    /// # Errors
    /// It is not installed, or does not come up.
    pub fn start(dir: &Path, file: &Path, direct: bool) -> Result<Daemon> {
        let socket = dir.join("qsd.sock");
        let onoff = if direct { "on" } else { "off" };
        let mut command = Command::new(PROGRAM);
        command
            .args(["--object", "iothread,id=t"])
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=f,filename={},cache.direct={onoff},aio=io_uring,locking=off",
                file.display()
            ))
            .args(["--blockdev", "driver=raw,node-name=r,file=f"])
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=r,writable=on,iothread=t,addr.type=unix,addr.path={}",
                socket.display()
            ))
            .stdin(Stdio::null());
        let child = command.spawn().with_context(|| format!("starting {PROGRAM}"))?;
        let mut daemon = Daemon { child, socket };
        let deadline = Instant::now() + PATIENCE;
        while !daemon.socket.exists() {
            if let Some(status) = daemon.child.try_wait()? {
                anyhow::bail!("{PROGRAM} ended: {status}");
            }
            ensure!(Instant::now() < deadline, "{PROGRAM} makes no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(daemon)
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The driver of its queue.
pub struct Driver {
    mem: SharedMem,
    _memfd: OwnedFd,
    session: Frontend,
    port: Port,
    bytes: usize,
    /// Free-running: made available; taken from the used ring; told to the device.
    avail: u16,
    used: u16,
    told: u16,
    window: Window,
}

impl Driver {
    /// Connects, for up to `depth` requests of up to `bytes`.
    ///
    /// # Errors
    /// The daemon refuses, or lacks what is needed.
    pub fn connect(daemon: &Daemon, depth: u32, bytes: usize) -> Result<Driver> {
        ensure!(depth * 3 <= u32::from(QUEUE), "depth {depth} is more than the queue has");
        let len = (DATA + depth as usize * bytes).next_multiple_of(4096);
        let (mem, memfd) = SharedMem::create("bench-virtio", len)?;
        mem.zero(0, len);
        let mut session = Frontend::connect(&daemon.socket, 1).context("vhost-user")?;
        let offered = session.get_features()?;
        let wanted = F_EVENT_IDX | F_PROTOCOL | F_VERSION_1;
        ensure!(offered & wanted == wanted, "{PROGRAM} offers features {offered:#x}, not {wanted:#x}");
        session.set_owner()?;
        let protocol = session.get_protocol_features()? & VhostUserProtocolFeatures::MQ;
        session.set_protocol_features(protocol)?;
        session.set_features(wanted)?;
        let at = mem.as_ptr() as u64;
        session.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: len as u64,
            userspace_addr: at,
            mmap_offset: 0,
            mmap_handle: memfd.as_raw_fd(),
        }])?;
        session.set_vring_num(0, QUEUE)?;
        session.set_vring_base(0, 0)?;
        session.set_vring_addr(
            0,
            &VringConfigData {
                queue_max_size: QUEUE,
                queue_size: QUEUE,
                flags: 0,
                desc_table_addr: at + DESC as u64,
                used_ring_addr: at + USED as u64,
                avail_ring_addr: at + AVAIL as u64,
                log_addr: None,
            },
        )?;
        let (call, kick) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        session.set_vring_call(0, &call)?;
        session.set_vring_kick(0, &kick)?;
        session.set_vring_enable(0, true)?;
        let port = Port::new(0, fd_of(&call)?, Some(fd_of(&kick)?));
        let window = Window::new(Duration::ZERO);
        let mut driver =
            Driver { mem, _memfd: memfd, session, port, bytes, avail: 0, used: 0, told: 0, window };
        (0..depth).for_each(|tag| driver.fixed_descriptors(tag));
        Ok(driver)
    }

    /// Looks for responses so long at most before it sleeps; at first not at all.
    pub fn set_look(&mut self, longest: Duration) {
        self.window = Window::new(longest);
    }

    fn describe(&self, index: u16, at: usize, len: usize, flags: u16) {
        let place = DESC + 16 * usize::from(index);
        self.mem.store_u64(place, BASE + at as u64, Relaxed);
        self.mem.store_u32(place + 8, len as u32, Relaxed);
        self.mem.store_u16(place + 12, flags, Relaxed);
        self.mem.store_u16(place + 14, index + 1, Relaxed);
    }

    fn header(tag: u32) -> usize {
        HEADERS + tag as usize * HEADER_ROOM
    }

    /// Header and status of a tag never move.
    fn fixed_descriptors(&mut self, tag: u32) {
        let first = tag as u16 * 3;
        let header = Self::header(tag);
        self.describe(first, header, HEADER, DESC_NEXT);
        self.describe(first + 2, header + HEADER, 1, DESC_WRITE);
    }

    fn used_idx(&self) -> u16 {
        self.mem.load_u16(USED + 2, Acquire)
    }

    /// The device is told what it was not told yet, if it wants to be.
    fn kick(&mut self) {
        if self.told == self.avail {
            return;
        }
        self.mem.store_u16(AVAIL + 2, self.avail, Release);
        fence(SeqCst);
        let event = self.mem.load_u16(USED + 4 + 8 * usize::from(QUEUE), Acquire);
        let (old, new) = (self.told, self.avail);
        self.told = new;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.port.notify();
        }
    }

    fn take(&mut self, each: &mut dyn FnMut(u32)) -> Result<usize> {
        let mut taken = 0;
        while self.used != self.used_idx() {
            let slot = USED + 4 + 8 * usize::from(self.used % QUEUE);
            let tag = self.mem.load_u32(slot, Relaxed) / 3;
            self.used = self.used.wrapping_add(1);
            let status = self.mem.load_u8(Self::header(tag) + HEADER, Relaxed);
            ensure!(status == 0, "a request failed with status {status}");
            each(tag);
            taken += 1;
        }
        Ok(taken)
    }
}

fn fd_of(event: &EventFd) -> Result<OwnedFd> {
    let fd = event.try_clone()?.into_raw_fd();
    // SAFETY: just made, and given up by its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Target for Driver {
    fn submit(&mut self, tag: u32, io: Io) -> Result<()> {
        ensure!(io.len <= self.bytes, "{} bytes in a buffer of {}", io.len, self.bytes);
        let header = Self::header(tag);
        self.mem.store_u32(header, u32::from(io.write), Relaxed);
        self.mem.store_u64(header + 8, io.offset / 512, Relaxed);
        self.mem.store_u8(header + HEADER, 0xff, Relaxed);
        let first = tag as u16 * 3;
        let flags = DESC_NEXT | if io.write { 0 } else { DESC_WRITE };
        self.describe(first + 1, DATA + tag as usize * self.bytes, io.len, flags);
        self.mem.store_u16(AVAIL + 4 + 2 * usize::from(self.avail % QUEUE), first, Relaxed);
        self.avail = self.avail.wrapping_add(1);
        Ok(())
    }

    fn wait(&mut self, each: &mut dyn FnMut(u32)) -> Result<()> {
        self.kick();
        let start = Instant::now();
        if self.window.is_open() {
            let (mem, used) = (&self.mem, self.used);
            let _found =
                self.window.look(start, || Ok::<_, Infallible>(mem.load_u16(USED + 2, Acquire) != used));
        }
        let mut taken = self.take(each)?;
        while taken == 0 {
            // Asks for an event with the next response, then looks once more.
            self.mem.store_u16(AVAIL + 4 + 2 * usize::from(QUEUE), self.used, Relaxed);
            fence(SeqCst);
            self.port.clear();
            taken = self.take(each)?;
            if taken == 0 {
                ensure!(self.port.wait(Some(PATIENCE))?, "{PROGRAM} does not answer");
                taken = self.take(each)?;
            }
        }
        self.window.learn(start.elapsed());
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The daemon may be gone.
        let _ = self.session.get_vring_base(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::tests::PATTERN;
    use crate::disk::{Pattern, Places, run};

    #[test]
    fn reads_and_writes_by_vhost_user() {
        if !Path::new(PROGRAM).exists() {
            return eprintln!("no {PROGRAM} here");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let daemon = Daemon::start(dir.path(), &path, false).unwrap();
        let mut driver = Driver::connect(&daemon, 4, 4096).unwrap();
        driver.submit(3, Io { write: false, offset: 8192, len: 4096 }).unwrap();
        driver.wait(&mut |tag| assert_eq!(tag, 3)).unwrap();
        let mut bytes = [0; 4096];
        driver.mem.copy_out(DATA + 3 * 4096, &mut bytes);
        assert_eq!(bytes, [7; 4096]);
        driver.mem.copy_in(DATA, &[9; 4096]);
        driver.submit(0, Io { write: true, offset: 4096, len: 4096 }).unwrap();
        driver.wait(&mut |tag| assert_eq!(tag, 0)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[4096..8192], [9; 4096]);
        for look in [0, 100] {
            driver.set_look(Duration::from_micros(look));
            let sample = run(&mut driver, &Pattern { ms: 50, ..PATTERN }, &mut Places::default()).unwrap();
            assert!(sample.requests > 4);
        }
        driver.submit(0, Io { write: false, offset: 1 << 30, len: 4096 }).unwrap();
        assert!(driver.wait(&mut |_| ()).is_err(), "a read beyond the end");
    }
}

//! The conversation with a frontend: the `vhost` crate's messages on the one hand, a [`Device`]'s rings on the other.
//!
//! ```text
//!            memory, addresses, kick known, enabled
//!   stopped ─────────────────────────────────────────► running (a thread of the device's)
//!      ▲                                                  │
//!      └── disabled, GET_VRING_BASE, new memory, hang-up ─┘   what is under way is answered first
//! ```

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, recvmsg, sendmsg};
use vhost::vhost_user::message::*;
use vhost::vhost_user::{BackendReqHandler, Error, Result as VhostResult, VhostUserBackendReqHandlerMut};

use super::conversation::{Conversation, Wire};
use super::inflight::{Inflight, region_bytes};
use super::log::DirtyLog;
use super::memory::{GuestMemory, RegionInfo, must_not_shrink};
use super::queue::{Queue, QueueAddresses};
use super::record::{HEAD, MAX_BODY, Message};
use super::wire::fds_of;
use super::{F_LOG_ALL, F_PROTOCOL_FEATURES, MAX_QUEUE_SIZE};
use crate::mem::{SharedMem, sealed_memfd};
use crate::ring::RingMem;

/// Most queues of a device.
pub const MAX_QUEUES: usize = 64;

/// Where a ring's driver is told of answers. The frontend changes it while the ring runs.
#[derive(Debug, Default)]
pub struct Call(Mutex<Option<OwnedFd>>);

impl Call {
    /// Tells the driver.
    pub fn fire(&self) {
        let call = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(fd) = call.as_ref() else { return };
        // The other end can make the descriptor a blocking one and fill it.
        let mut ask = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
        if matches!(poll(&mut ask, PollTimeout::ZERO), Ok(1..)) {
            let _full_is_told_too = nix::unistd::write(fd, &1u64.to_ne_bytes());
        }
    }

    fn set(&self, fd: Option<OwnedFd>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = fd;
    }
}

/// Takes what is latched in a kick descriptor without ever waiting, whatever its flags.
pub fn clear_kick(kick: &OwnedFd) {
    let mut count = [0; 8];
    let mut into = [std::io::IoSliceMut::new(&mut count)];
    // The offset is "none", which nix has no word for: rustix has.
    let _empty_is_fine = rustix::io::preadv2(kick, &mut into, u64::MAX, rustix::io::ReadWriteFlags::NOWAIT);
}

/// A ring to be served.
#[derive(Debug)]
pub struct Ring {
    /// Its number.
    pub index: u16,
    /// The virtqueue.
    pub queue: Queue,
    /// Readable when the driver has work.
    pub kick: OwnedFd,
    /// To tell the driver.
    pub call: Arc<Call>,
    /// The requests under way, and those that a predecessor left. Only if the device wants it.
    pub inflight: Option<(Inflight, Vec<u16>)>,
    /// What was agreed on.
    pub features: u64,
}

/// What a kind of device is.
pub trait Device {
    /// virtio features offered, without vhost-user's own.
    fn features(&self) -> u64;
    /// Most queues.
    fn queues(&self) -> u16;
    /// The configuration space, if the backend has it.
    fn config(&self) -> Option<Vec<u8>>;
    /// Whether requests under way outlive this process.
    fn inflight(&self) -> bool;
    /// Serves a ring from now on.
    ///
    /// # Errors
    /// One line.
    fn start(&mut self, ring: Ring) -> Result<(), String>;
    /// Ends serving a ring once what is under way is answered; the index of the request that is next. `None`: it does not end.
    fn stop(&mut self, index: u16) -> Option<u16>;
}

#[derive(Debug, Default)]
struct Vring {
    at: QueueAddresses,
    base: u16,
    kick: Option<OwnedFd>,
    call: Arc<Call>,
    enabled: bool,
    running: bool,
}

#[derive(Debug)]
struct Tracked {
    mem: Arc<SharedMem>,
    offset: usize,
    queue_size: u16,
}

struct Handler<'a, D> {
    device: &'a mut D,
    crashed: bool,
    /// What is carried out now was said to a predecessor: rings go on where it stopped.
    taking_up: bool,
    features: u64,
    memory: Option<Arc<GuestMemory>>,
    log: Arc<DirtyLog>,
    tracked: Option<Tracked>,
    vrings: Vec<Vring>,
    /// Why the conversation is over.
    broken: Option<String>,
}

/// Carries out what the frontend says until it hangs up or breaks the protocol. All rings are stopped then. What a predecessor was told
/// is carried out first, without an answer; `ready` is called when that is done. `crashed`: the predecessor ended by its own fault.
///
/// # Errors
/// What was wrong, in one line; hanging up is none.
pub fn serve<W, M, D>(
    talk: &mut Conversation<W, M>,
    device: &mut D,
    crashed: bool,
    ready: impl FnOnce(),
) -> Result<(), String>
where
    W: Wire<Fd = OwnedFd>,
    M: RingMem,
    D: Device,
{
    let count = usize::from(device.queues()).min(MAX_QUEUES);
    let handler = Handler {
        device,
        crashed,
        taking_up: true,
        features: 0,
        memory: None,
        log: Arc::default(),
        tracked: None,
        vrings: std::iter::repeat_with(Vring::default).take(count).collect(),
        broken: None,
    };
    let handler = Arc::new(Mutex::new(handler));
    let result = relay(talk, &handler, ready);
    let mut handler = handler.lock().unwrap_or_else(PoisonError::into_inner);
    for index in 0..count {
        let _told_if_it_hangs = handler.stop(index);
    }
    result
}

fn relay<W, M, D>(
    talk: &mut Conversation<W, M>,
    handler: &Arc<Mutex<Handler<'_, D>>>,
    ready: impl FnOnce(),
) -> Result<(), String>
where
    W: Wire<Fd = OwnedFd>,
    M: RingMem,
    D: Device,
{
    let mut messages = Messages::new(handler)?;
    for message in talk.said()? {
        messages.carry_out(&message)?;
    }
    {
        let mut handler = handler.lock().unwrap_or_else(PoisonError::into_inner);
        handler.taking_up = false;
        handler.crashed = false;
    }
    ready();
    while let Some(message) = talk.next_message()? {
        let reply = messages.carry_out(&message)?;
        if !talk.answer(&message, reply.as_ref())? {
            break;
        }
    }
    Ok(())
}

/// The `vhost` crate's end of a socket pair: it reads messages from sockets alone.
struct Messages<'a, 'd, D: Device> {
    handler: &'a Arc<Mutex<Handler<'d, D>>>,
    ours: UnixStream,
    reader: BackendReqHandler<Mutex<Handler<'d, D>>>,
}

impl<'a, 'd, D: Device> Messages<'a, 'd, D> {
    fn new(handler: &'a Arc<Mutex<Handler<'d, D>>>) -> Result<Self, String> {
        let (ours, theirs) = UnixStream::pair().map_err(|e| format!("a pair of sockets: {e}"))?;
        Ok(Messages { handler, ours, reader: BackendReqHandler::from_stream(theirs, handler.clone()) })
    }

    /// Carries a message out; the answer, if it has one.
    fn carry_out(&mut self, message: &Message<OwnedFd>) -> Result<Option<Message<OwnedFd>>, String> {
        let bytes = message.bytes();
        let fds: Vec<_> = message.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(&bytes)];
        let sent = sendmsg::<()>(self.ours.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None);
        if sent != Ok(bytes.len()) {
            return Err("handing a message on".into());
        }
        let done = self.reader.handle_request();
        let mut handler = self.handler.lock().unwrap_or_else(PoisonError::into_inner);
        match (done, message.enable()) {
            (Ok(()), _) => {}
            // QEMU's virtio-net enables its queues before it says which features it takes. The crate has taken the message and refuses it.
            (Err(Error::InactiveFeature(_)), Some((index, enable))) => {
                if let Err(error) = handler.set_vring_enable(index, enable) {
                    return Err(handler.broken.take().unwrap_or_else(|| error.to_string()));
                }
            }
            (Err(error), _) => {
                let why = handler.broken.take().unwrap_or_else(|| error.to_string());
                return Err(format!("message {}: {why}", message.request));
            }
        }
        match handler.broken.take() {
            Some(why) => Err(why),
            None => self.reply(),
        }
    }

    fn reply(&self) -> Result<Option<Message<OwnedFd>>, String> {
        let mut bytes = [0; HEAD + MAX_BODY];
        let mut space = cmsg_space!([std::os::fd::RawFd; 1]);
        let (len, fds) = {
            let mut into = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            match recvmsg::<UnixAddr>(self.ours.as_raw_fd(), &mut into, Some(&mut space), flags) {
                Ok(received) => (received.bytes, fds_of(&received)?),
                Err(Errno::EAGAIN) => return Ok(None),
                Err(error) => return Err(format!("an answer: {error}")),
            }
        };
        Message::new(&bytes[..len], fds).map(Some).ok_or_else(|| "an answer that is not whole".into())
    }
}

impl<D: Device> Handler<'_, D> {
    fn fail<T>(&mut self, why: impl Into<String>) -> VhostResult<T> {
        self.broken.get_or_insert(why.into());
        Err(Error::InvalidParam)
    }

    fn vring(&mut self, index: u32) -> VhostResult<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn stop(&mut self, index: usize) -> Result<(), String> {
        let Some(vring) = self.vrings.get_mut(index).filter(|v| v.running) else { return Ok(()) };
        vring.running = false;
        match self.device.stop(index as u16) {
            Some(base) => {
                vring.base = base;
                Ok(())
            }
            None => Err(format!("queue {index} does not end")),
        }
    }

    fn stop_all(&mut self) -> Result<(), String> {
        (0..self.vrings.len()).try_for_each(|index| self.stop(index))
    }

    fn start(&mut self, index: usize) -> Result<(), String> {
        let (Some(memory), Some(vring)) = (&self.memory, self.vrings.get_mut(index)) else { return Ok(()) };
        if vring.running || !vring.enabled || vring.at.size == 0 || vring.at.desc == 0 {
            return Ok(());
        }
        let Some(kick) = &vring.kick else { return Ok(()) };
        let kick = kick.try_clone().map_err(|e| format!("kick: {e}"))?;
        let mut queue = Queue::new(memory.clone(), &vring.at, self.features, vring.base)
            .map_err(|e| format!("queue {index}: {e}"))?;
        let inflight = match &self.tracked {
            Some(tracked) if self.device.inflight() => {
                if tracked.queue_size < queue.size() {
                    return Err(format!("queue {index} is larger than what is tracked of it"));
                }
                let base = tracked.offset + index * region_bytes(tracked.queue_size);
                let (region, left) = Inflight::attach(
                    tracked.mem.clone(),
                    base,
                    queue.size(),
                    queue.used_idx(),
                    self.crashed,
                )?;
                // What was taken and not answered is known; the frontend only knows what was answered.
                queue.set_next_avail(left.next_avail);
                Some((region, left.again))
            }
            _ if self.taking_up && self.device.inflight() => {
                return Err("the frontend does not keep which requests are under way".into());
            }
            _ if self.taking_up => {
                // In order: what was taken and not handed back is taken again.
                queue.set_next_avail(queue.used_idx());
                None
            }
            _ => None,
        };
        if self.taking_up {
            queue.log_used();
        }
        let ring = Ring {
            index: index as u16,
            queue,
            kick,
            call: vring.call.clone(),
            inflight,
            features: self.features,
        };
        self.device.start(ring)?;
        vring.running = true;
        Ok(())
    }

    fn map_inflight(&mut self, inflight: &VhostUserInflight, file: &File) -> Result<(), String> {
        must_not_shrink(file)?;
        let queues = usize::from(inflight.num_queues);
        let end = inflight.mmap_offset.checked_add(inflight.mmap_size).filter(|end| *end <= 1 << 30);
        let end = end.ok_or("the in-flight region is too long")? as usize;
        let there = file.metadata().map_err(|e| format!("in-flight region: {e}"))?.len();
        let size = inflight.queue_size;
        let wanted = queues.checked_mul(region_bytes(size)).filter(|w| *w as u64 <= inflight.mmap_size);
        if wanted.is_none() || (end as u64) > there || size == 0 || queues > self.vrings.len() {
            return Err("the in-flight region is shorter than its queues".into());
        }
        let mem = SharedMem::map(file, end).map_err(|e| format!("mapping the in-flight region: {e}"))?;
        self.tracked =
            Some(Tracked { mem: Arc::new(mem), offset: inflight.mmap_offset as usize, queue_size: size });
        Ok(())
    }
}

/// What becomes of an error that ends the conversation.
macro_rules! or_fail {
    ($self:ident, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err(why) => return $self.fail(why),
        }
    };
}

impl<D: Device> VhostUserBackendReqHandlerMut for Handler<'_, D> {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        or_fail!(self, self.stop_all());
        self.vrings.iter_mut().for_each(|vring| vring.kick = None);
        Ok(())
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.reset_owner()
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.device.features() | F_PROTOCOL_FEATURES | F_LOG_ALL)
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        if features & !(self.device.features() | F_PROTOCOL_FEATURES | F_LOG_ALL) != 0 {
            return self.fail(format!("features {features:#x} were not offered"));
        }
        self.features = features;
        // The one that changes while rings run.
        self.log.set_on(features & F_LOG_ALL != 0);
        if features & F_PROTOCOL_FEATURES == 0 {
            self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<vhost::VhostUserMemoryRegionBase>>> {
        or_fail!(self, self.stop_all());
        let regions: Vec<(RegionInfo, File)> = table
            .iter()
            .zip(files)
            .map(|(r, file)| {
                // Packed fields, copied out.
                let (gpa, len, user, offset) = (r.guest_phys_addr, r.memory_size, r.user_addr, r.mmap_offset);
                (RegionInfo { gpa, len, user, offset }, file)
            })
            .collect();
        if regions.len() != table.len() {
            return self.fail("a memory region without a file");
        }
        let memory = or_fail!(self, GuestMemory::map(&regions));
        self.memory = Some(Arc::new(memory.with_log(self.log.clone())));
        for index in 0..self.vrings.len() {
            or_fail!(self, self.start(index));
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        if num == 0 || num > u32::from(MAX_QUEUE_SIZE) {
            return self.fail(format!("a queue of {num} descriptors"));
        }
        self.vring(index)?.at.size = num as u16;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let vring = self.vring(index)?;
        let size = vring.at.size;
        vring.at = QueueAddresses { size, desc: descriptor, avail: available, used };
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        self.vring(index)?.base = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        or_fail!(self, self.stop(index as usize));
        let vring = self.vring(index)?;
        vring.kick = None;
        let base = vring.base;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let Some(fd) = fd else { return self.fail("queues without a kick descriptor are not served") };
        or_fail!(self, self.stop(index.into()));
        self.vring(index.into())?.kick = Some(fd.into());
        or_fail!(self, self.start(index.into()));
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let vring = self.vring(index.into())?;
        vring.call.set(fd.map(OwnedFd::from));
        // What was answered meanwhile was told to the former one.
        if vring.running {
            vring.call.fire();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> VhostResult<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        let mut all = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::LOG_SHMFD;
        if self.device.config().is_some() {
            all |= VhostUserProtocolFeatures::CONFIG;
        }
        if self.device.inflight() {
            all |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        Ok(all)
    }

    fn set_protocol_features(&mut self, _features: u64) -> VhostResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.vring(index)?.enabled = enable;
        let done = if enable { self.start(index as usize) } else { self.stop(index as usize) };
        or_fail!(self, done);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        let config = self.device.config().ok_or(Error::InvalidParam)?;
        // What the frontend knows beyond ours is zero.
        let (offset, size) = (offset as usize, size as usize);
        let mut out = vec![0; size];
        let there = config.get(offset..).unwrap_or_default();
        let n = there.len().min(size);
        out[..n].copy_from_slice(&there[..n]);
        Ok(out)
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        // Nothing in it is the driver's to change.
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: vhost::vhost_user::GpuBackend) -> VhostResult<()> {
        Err(Error::InvalidParam)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(Error::InvalidParam)
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        let (queues, size) = (asked.num_queues, asked.queue_size);
        if usize::from(queues) > self.vrings.len() || size == 0 || size > MAX_QUEUE_SIZE {
            return self.fail(format!("{queues} queues of {size} descriptors to be tracked"));
        }
        let len = usize::from(queues.max(1)) * region_bytes(size);
        let made = sealed_memfd("inflight", len).map_err(|e| format!("in-flight region: {e}"));
        let file = File::from(or_fail!(self, made));
        let inflight = VhostUserInflight::new(len as u64, 0, queues, size);
        or_fail!(self, self.map_inflight(&inflight, &file));
        Ok((inflight, file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> VhostResult<()> {
        or_fail!(self, self.map_inflight(inflight, &file));
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Err(Error::InvalidParam)
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<vhost::VhostUserMemoryRegionBase>> {
        Err(Error::InvalidParam)
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        Err(Error::InvalidParam)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> VhostResult<Option<File>> {
        Err(Error::InvalidParam)
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        Err(Error::InvalidParam)
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        Err(Error::InvalidParam)
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> VhostResult<()> {
        let (offset, len) = (log.mmap_offset, log.mmap_size);
        or_fail!(self, self.log.set_bitmap(&file, offset, len));
        Ok(())
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;

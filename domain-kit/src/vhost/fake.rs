//! An hv-core for tests: it dials, and keeps descriptors.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use hv_abi::{FdInfo, FdPutReq, ListRep, Name, NameReq, Op, RepHeader, ReqHeader, ResourceInfo};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, recvmsg, sendmsg, socketpair,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::wire::fds_of;
use crate::hypercall::Hypercall;

/// What it keeps.
#[derive(Clone, Default)]
pub struct Store(Arc<Mutex<BTreeMap<String, (u32, OwnedFd)>>>);

impl Store {
    pub fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().keys().cloned().collect()
    }
}

type Answer = Result<(Vec<u8>, Option<OwnedFd>), Errno>;

struct Core {
    store: Store,
    refusals: usize,
    frontends: Sender<UnixStream>,
}

impl Core {
    fn answer(&mut self, op: u16, body: &[u8], fd: Option<OwnedFd>) -> Answer {
        let name = |name: &Name| name.as_str().unwrap().to_owned();
        let named = || name(&NameReq::read_from_bytes(body).unwrap().name);
        let mut store = self.store.0.lock().unwrap();
        let info = |name: &str, kind| FdInfo { name: Name::new(name).unwrap(), kind, pad: 0, tag: 0 };
        match op {
            op if op == Op::FdPut as u16 => {
                let req = FdPutReq::read_from_bytes(body).unwrap();
                store.insert(name(&req.name), (req.kind, fd.unwrap()));
                Ok((Vec::new(), None))
            }
            op if op == Op::FdGet as u16 => {
                let name = named();
                let (kind, fd) = store.get(&name).ok_or(Errno::ENOENT)?;
                Ok((info(&name, *kind).as_bytes().to_vec(), Some(fd.try_clone().unwrap())))
            }
            op if op == Op::FdList as u16 => {
                let mut bytes = ListRep { count: store.len() as u32, more: 0 }.as_bytes().to_vec();
                for (name, (kind, _)) in store.iter() {
                    bytes.extend(info(name, *kind).as_bytes());
                }
                Ok((bytes, None))
            }
            op if op == Op::FdDelete as u16 => {
                store.remove(&named()).map(|_| (Vec::new(), None)).ok_or(Errno::ENOENT)
            }
            op if op == Op::ResourceOpen as u16 => {
                if self.refusals > 0 {
                    self.refusals -= 1;
                    return Err(Errno::ECONNREFUSED);
                }
                let (backend, frontend) = UnixStream::pair().unwrap();
                let _nobody_looks = self.frontends.send(frontend);
                Ok((ResourceInfo::new_zeroed().as_bytes().to_vec(), Some(backend.into())))
            }
            _ => Err(Errno::EINVAL),
        }
    }
}

/// It refuses the first `refusals` dials; the other ends of the rest come out of the channel.
pub fn hypervisor(refusals: usize, frontends: Sender<UnixStream>) -> (Hypercall, Store) {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let store = Store::default();
    let mut core = Core { store: store.clone(), refusals, frontends };
    std::thread::spawn(move || {
        loop {
            let mut buffer = [0; 4096];
            let mut space = cmsg_space!([std::os::fd::RawFd; 1]);
            let (len, fd) = {
                let mut into = [IoSliceMut::new(&mut buffer)];
                let flags = MsgFlags::MSG_CMSG_CLOEXEC;
                let got = recvmsg::<UnixAddr>(theirs.as_raw_fd(), &mut into, Some(&mut space), flags);
                let Ok(got) = got else { return };
                (got.bytes, fds_of(&got).unwrap().pop())
            };
            let Ok((request, body)) = ReqHeader::read_from_prefix(&buffer[..len]) else { return };
            let (status, body, fd) = match core.answer(request.op, body, fd) {
                Ok((body, fd)) => (0, body, fd),
                Err(errno) => (-(errno as i32), Vec::new(), None),
            };
            let header = RepHeader { seq: request.seq, status };
            let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(&body)];
            let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
            let rights = [ControlMessage::ScmRights(&fds)];
            let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
            if sendmsg::<()>(theirs.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None).is_err() {
                return;
            }
        }
    });
    (Hypercall::new(ours), store)
}

//! What survives a crash in the model: the journal's memory, the sockets' and rings' bytes, the clients.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use domain_kit::mem::sealed_memfd;
use domain_kit::xs::SharedPage;
use nix::errno::Errno;
use xenstored::journal::log::Log;
use xenstored::journal::mem::Mem;
use xenstored::transport::stream::StreamIo;

pub const HALF: u64 = 1 << 20;

pub fn memory() -> Rc<Mem> {
    let len = Log::memory_len(HALF) as usize;
    let fd = sealed_memfd("model", len).expect("memfd");
    Rc::new(Mem::map(fd.into(), len).expect("map"))
}

/// A socket as the kernel keeps it: bytes each way, moved and counted in one step.
#[derive(Default)]
pub struct Stream {
    pub to_server: RefCell<VecDeque<u8>>,
    pub to_client: RefCell<VecDeque<u8>>,
    /// Most bytes a call moves; 0 gives EAGAIN.
    pub at_once: RefCell<usize>,
    /// Most bytes the client leaves unread.
    pub room: RefCell<usize>,
}

impl StreamIo for Stream {
    fn recv(&self, mem: &Mem, hdr: usize, into: [(usize, usize); 2]) -> Result<(), Errno> {
        mem.crash_point();
        let mut queue = self.to_server.borrow_mut();
        let want = into[0].1 + into[1].1;
        let n = want.min(queue.len()).min(*self.at_once.borrow());
        if n == 0 {
            return Err(Errno::EAGAIN);
        }
        let bytes: Vec<u8> = queue.drain(..n).collect();
        let first = n.min(into[0].1);
        mem.kernel_write(into[0].0, &bytes[..first]);
        mem.kernel_write(into[1].0, &bytes[first..]);
        mem.kernel_msg_len(hdr, n as u32);
        mem.crash_point();
        Ok(())
    }

    fn send(&self, mem: &Mem, hdr: usize, from: [&[u8]; 2]) -> Result<(), Errno> {
        mem.crash_point();
        let mut queue = self.to_client.borrow_mut();
        let free = self.room.borrow().saturating_sub(queue.len());
        let n = (from[0].len() + from[1].len()).min(*self.at_once.borrow()).min(free);
        if n == 0 {
            return Err(Errno::EAGAIN);
        }
        queue.extend(from[0].iter().chain(from[1]).take(n));
        mem.kernel_msg_len(hdr, n as u32);
        mem.crash_point();
        Ok(())
    }
}

/// A ring page.
pub struct RingPage(Vec<AtomicU8>);

impl RingPage {
    pub fn new() -> Arc<Self> {
        Arc::new(Self((0..4096).map(|_| AtomicU8::new(0)).collect()))
    }
}

impl SharedPage for RingPage {
    fn load_u32(&self, off: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read_bytes(off, &mut bytes);
        u32::from_ne_bytes(bytes)
    }

    fn store_u32(&self, off: usize, value: u32) {
        self.write_bytes(off, &value.to_ne_bytes());
    }

    fn read_bytes(&self, off: usize, buf: &mut [u8]) {
        for (i, b) in buf.iter_mut().enumerate() {
            *b = self.0[off + i].load(Ordering::Relaxed);
        }
    }

    fn write_bytes(&self, off: usize, bytes: &[u8]) {
        for (i, b) in bytes.iter().enumerate() {
            self.0[off + i].store(*b, Ordering::Relaxed);
        }
    }
}

//! The journal's memory: the one module of this crate that touches mapped memory and raw system calls.
//!
//! The mapping belongs to this process alone (its file is kept by hv-core's fd store, or locked), so no other
//! process writes it; the kernel does, during the system calls made here. SIGKILL keeps the program order of
//! stores, which is all the ordering the journal needs.
#![expect(unsafe_code, reason = "mapped memory, and mmsghdr structures inside it for recvmmsg and sendmmsg")]

use std::cell::Cell;
use std::fs::File;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;

/// `msg_len` before a call: no call stores this value.
pub const UNSET: u32 = u32::MAX;
/// Offset of `msg_len` in `struct mmsghdr`.
const MSG_LEN: usize = std::mem::offset_of!(libc::mmsghdr, msg_len);
/// Size of `struct mmsghdr`.
pub const MMSGHDR: usize = size_of::<libc::mmsghdr>();

/// What a test's unwinding carries when it "crashed" the daemon between two stores.
#[derive(Debug)]
pub struct Crash;

/// A shared mapping of a file.
pub struct Mem {
    map: MmapRaw,
    file: File,
    /// Tests: stores until the crash; 0 is never.
    fuse: Cell<u64>,
    /// Stores so far.
    steps: Cell<u64>,
    /// Where the part begins that an [`Owned`] has; nobody else touches it.
    shared_end: Cell<usize>,
}

impl Mem {
    /// Maps the first `len` bytes of a file that is at least that long.
    ///
    /// # Errors
    /// That of mmap(2).
    pub fn map(file: File, len: usize) -> std::io::Result<Self> {
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        let shared_end = Cell::new(map.len());
        Ok(Self { map, file, fuse: Cell::new(0), steps: Cell::new(0), shared_end })
    }

    /// The file behind it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the mapping is empty (it never is).
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// Tests: unwinds with [`Crash`] instead of the `n`th store from now; 0 turns it off.
    pub fn crash_after(&self, n: u64) {
        self.fuse.set(n);
    }

    /// Stores made so far.
    pub fn steps(&self) -> u64 {
        self.steps.get()
    }

    /// A point at which the process may die. True if it does so here.
    fn step(&self) -> bool {
        self.steps.set(self.steps.get() + 1);
        match self.fuse.get() {
            0 => false,
            n => {
                self.fuse.set(n - 1);
                n == 1
            }
        }
    }

    /// A point at which a test may crash the daemon although nothing is stored.
    pub fn crash_point(&self) {
        if self.step() {
            std::panic::panic_any(Crash);
        }
    }

    fn at(&self, off: usize, len: usize, align: usize) -> *mut u8 {
        let end = self.shared_end.get();
        assert!(off.is_multiple_of(align) && off.checked_add(len).is_some_and(|last| last <= end));
        // SAFETY: off is inside the mapping (checked above), so the result is too.
        unsafe { self.map.as_mut_ptr().add(off) }
    }

    /// Loads a word.
    pub fn load_u64(&self, off: usize) -> u64 {
        // SAFETY: aligned and inside the mapping (`at`), which lives as long as self; only atomics and copies touch it.
        unsafe { AtomicU64::from_ptr(self.at(off, 8, 8).cast()) }.load(Ordering::Acquire)
    }

    /// Stores a word, after all stores before it.
    pub fn store_u64(&self, off: usize, value: u64) {
        self.crash_point();
        // SAFETY: as in load_u64.
        unsafe { AtomicU64::from_ptr(self.at(off, 8, 8).cast()) }.store(value, Ordering::Release);
    }

    /// Copies bytes out.
    pub fn read(&self, off: usize, into: &mut [u8]) {
        let from = self.at(off, into.len(), 1);
        // SAFETY: from..+len is inside the mapping, into is a Rust buffer outside it.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies bytes in.
    pub fn write(&self, off: usize, from: &[u8]) {
        // A crash in the middle of a copy leaves part of it.
        let crash = self.step();
        let len = if crash { from.len() / 2 } else { from.len() };
        let into = self.at(off, from.len(), 1);
        // SAFETY: into..+len is inside the mapping, from is a Rust buffer outside it.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, len) }
        if crash {
            std::panic::panic_any(Crash);
        }
    }

    /// The result of the call whose mmsghdr is at `hdr`, or [`UNSET`].
    pub fn msg_len(&self, hdr: usize) -> u32 {
        // SAFETY: as in load_u64.
        unsafe { AtomicU32::from_ptr(self.at(hdr + MSG_LEN, 4, 4).cast()) }.load(Ordering::Acquire)
    }

    /// Stores a result without a crash point: what the kernel does inside a call.
    pub fn kernel_msg_len(&self, hdr: usize, value: u32) {
        // SAFETY: as in load_u64.
        unsafe { AtomicU32::from_ptr(self.at(hdr + MSG_LEN, 4, 4).cast()) }.store(value, Ordering::Release);
    }

    /// Copies bytes in without a crash point: what the kernel does inside a call.
    pub fn kernel_write(&self, off: usize, from: &[u8]) {
        let fuse = self.fuse.replace(0);
        self.write(off, from);
        self.fuse.set(fuse);
    }

    /// Forgets the last call's result.
    pub fn clear_msg_len(&self, hdr: usize) {
        self.crash_point();
        self.kernel_msg_len(hdr, UNSET);
    }

    /// recvmmsg(2) of one message into up to two pieces of this memory; the count lands at `hdr`.
    ///
    /// # Errors
    /// That of the call; EAGAIN when nothing is there. The count is untouched then.
    pub fn recv(&self, fd: BorrowedFd<'_>, hdr: usize, into: [(usize, usize); 2]) -> Result<(), Errno> {
        let mut iov =
            into.map(|(off, len)| libc::iovec { iov_base: self.at(off, len, 1).cast(), iov_len: len });
        self.call(hdr, &mut iov, |msg| {
            // SAFETY: msg is one mmsghdr in this mapping whose iovecs point into this mapping; a null timeout is allowed.
            unsafe { libc::recvmmsg(fd.as_raw_fd(), msg, 1, libc::MSG_DONTWAIT, std::ptr::null_mut()) }
        })
    }

    /// sendmmsg(2) of one message; the count lands at `hdr`.
    ///
    /// # Errors
    /// That of the call; EAGAIN when there is no room. The count is untouched then.
    pub fn send(&self, fd: BorrowedFd<'_>, hdr: usize, from: [&[u8]; 2]) -> Result<(), Errno> {
        let slices = from.map(IoSlice::new);
        let mut iov =
            slices.map(|s| libc::iovec { iov_base: s.as_ptr().cast_mut().cast(), iov_len: s.len() });
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        self.call(hdr, &mut iov, |msg| {
            // SAFETY: msg is one mmsghdr in this mapping; sendmmsg only reads what its iovecs point to.
            unsafe { libc::sendmmsg(fd.as_raw_fd(), msg, 1, flags) }
        })
    }

    fn call(
        &self,
        hdr: usize,
        iov: &mut [libc::iovec],
        run: impl FnOnce(*mut libc::mmsghdr) -> libc::c_int,
    ) -> Result<(), Errno> {
        let at: *mut libc::mmsghdr = self.at(hdr, MMSGHDR, align_of::<libc::mmsghdr>()).cast();
        self.crash_point();
        // SAFETY: `at` is aligned and inside the mapping; all-zero is a valid msghdr, and no reference to it exists.
        unsafe {
            let mut head: libc::msghdr = std::mem::zeroed();
            head.msg_iov = iov.as_mut_ptr();
            head.msg_iovlen = iov.len() as _;
            (&raw mut (*at).msg_hdr).write(head);
        }
        let n = run(at);
        self.crash_point();
        if n < 0 { Err(Errno::last()) } else { Ok(()) }
    }
}

/// The end of the mapping, for one owner: as in a `Vec<u8>`, slices of it can be lent because only `&mut self` writes.
pub struct Owned {
    mem: Rc<Mem>,
    range: Range<usize>,
}

impl Owned {
    /// Takes everything from `start` on; `None` if another has it.
    pub fn take(mem: &Rc<Mem>, start: usize) -> Option<Self> {
        if mem.shared_end.get() != mem.map.len() || start >= mem.map.len() {
            return None;
        }
        mem.shared_end.set(start);
        Some(Self { mem: Rc::clone(mem), range: start..mem.map.len() })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has no bytes (it never is).
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    fn at(&self, off: usize, len: usize) -> *mut u8 {
        assert!(off.checked_add(len).is_some_and(|end| end <= self.range.len()));
        // SAFETY: inside the mapping: off + len is inside `range` (checked above), which is inside the mapping.
        unsafe { self.mem.map.as_mut_ptr().add(self.range.start + off) }
    }

    /// Bytes, for as long as nothing is written.
    #[inline]
    pub fn bytes(&self, off: usize, len: usize) -> &[u8] {
        let from = self.at(off, len);
        // SAFETY: in bounds (`at`); only this process maps the file, and in it only this owner reaches the range
        // (`Mem::at` ends before it, `take` gives it once), writing by `&mut self` alone, which the result's life excludes.
        unsafe { std::slice::from_raw_parts(from, len) }
    }

    /// Copies bytes in; a point at which the process may die, as [`Mem::write`].
    #[inline]
    pub fn write(&mut self, off: usize, from: &[u8]) {
        let crash = self.mem.step();
        let len = if crash { from.len() / 2 } else { from.len() };
        let into = self.at(off, from.len());
        // SAFETY: in bounds (`at`); `from` can't be in the range, as no slice of it lives beside `&mut self`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, len) }
        if crash {
            std::panic::panic_any(Crash);
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.mem.shared_end.set(self.range.end);
    }
}

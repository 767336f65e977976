//! Memory shared with another domain.
//!
//! The other side may change any byte at any time, so nothing here ever hands out a reference to shared
//! bytes: single fields are read and written by atomics, longer ones are copied out once and judged on the
//! copy. All offsets are bytes from the start; an access beyond the end is a bug of the caller and panics
//! (offsets must be checked before they get here).
#![expect(
    unsafe_code,
    reason = "mapped memory is only reachable by pointers; this module bounds every access"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use hv_abi::PAGE_SIZE;
use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Bytes of a `struct mmsghdr`.
pub const MMSGHDR: usize = size_of::<libc::mmsghdr>();
/// Where its count is.
pub const MSG_LEN: usize = std::mem::offset_of!(libc::mmsghdr, msg_len);

/// One descriptor as a control message.
#[repr(C)]
struct Rights {
    head: libc::cmsghdr,
    fd: libc::c_int,
}

/// A shared mapping.
#[derive(Debug)]
pub struct SharedMem {
    map: MmapRaw,
    len: usize,
}

macro_rules! atomic_access {
    ($($load:ident $store:ident $ty:ty, $atomic:ty;)*) => {$(
        /// Loads one aligned field.
        pub fn $load(&self, offset: usize, order: Ordering) -> $ty {
            self.check(offset, size_of::<$ty>(), align_of::<$ty>());
            // SAFETY: in bounds and aligned (checked), mapped as long as self lives, only touched as atomics.
            unsafe { <$atomic>::from_ptr(self.map.as_mut_ptr().add(offset).cast()) }.load(order)
        }
        /// Stores one aligned field.
        pub fn $store(&self, offset: usize, value: $ty, order: Ordering) {
            self.check(offset, size_of::<$ty>(), align_of::<$ty>());
            // SAFETY: in bounds and aligned (checked), mapped as long as self lives, only touched as atomics.
            unsafe { <$atomic>::from_ptr(self.map.as_mut_ptr().add(offset).cast()) }.store(value, order)
        }
    )*};
}

impl SharedMem {
    /// Maps the first `len` bytes of `fd` shared, for reading and writing.
    ///
    /// # Errors
    /// That of mmap(2); `EINVAL` if `len` is 0.
    pub fn map(fd: impl AsFd, len: usize) -> io::Result<Self> {
        if len == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let map = MmapOptions::new().len(len).map_raw(fd.as_fd().as_raw_fd())?;
        Ok(SharedMem { map, len })
    }

    /// Makes a sealed memfd of `len` bytes (zeroed) and maps it.
    ///
    /// # Errors
    /// Those of memfd_create(2), ftruncate(2), mmap(2).
    pub fn create(name: &str, len: usize) -> io::Result<(Self, OwnedFd)> {
        let fd = sealed_memfd(name, len)?;
        Ok((Self::map(&fd, len)?, fd))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The mapping's address, for interfaces of the kernel that take one (io_uring's registered buffers). The memory
    /// must be treated as changing at any time.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    #[inline]
    fn check(&self, offset: usize, len: usize, align: usize) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len) && offset.is_multiple_of(align),
            "access of {len} bytes at {offset} outside a shared mapping of {} bytes",
            self.len
        );
    }

    atomic_access! {
        load_u8 store_u8 u8, AtomicU8;
        load_u16 store_u16 u16, AtomicU16;
        load_u32 store_u32 u32, AtomicU32;
        load_u64 store_u64 u64, AtomicU64;
    }

    /// Sets bits of a byte.
    pub fn or_u8(&self, offset: usize, bits: u8, order: Ordering) {
        self.check(offset, 1, 1);
        // SAFETY: in bounds (checked), mapped as long as self lives, only touched as atomics.
        unsafe { AtomicU8::from_ptr(self.map.as_mut_ptr().add(offset)) }.fetch_or(bits, order);
    }

    /// Compare-and-swap of an aligned u32; gives what was there.
    ///
    /// # Errors
    /// The value found, if it is not `current`.
    pub fn cas_u32(&self, offset: usize, current: u32, new: u32) -> Result<u32, u32> {
        self.check(offset, 4, 4);
        // SAFETY: in bounds and aligned (checked), mapped as long as self lives, only touched as atomics.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().add(offset).cast()) }.compare_exchange(
            current,
            new,
            Ordering::SeqCst,
            Ordering::SeqCst,
        )
    }

    /// Copies bytes out, each exactly once.
    pub fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.check(offset, into.len(), 1);
        // SAFETY: the source is in bounds (checked) and mapped, the target is a slice; a mapping and a Rust object never overlap.
        unsafe { copy_bytes(into.as_mut_ptr(), self.map.as_mut_ptr().add(offset), into.len()) };
    }

    /// Copies bytes in.
    pub fn copy_in(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len(), 1);
        // SAFETY: the target is in bounds (checked) and mapped, the source is a slice; a mapping and a Rust object never overlap.
        unsafe { copy_bytes(self.map.as_mut_ptr().add(offset), from.as_ptr(), from.len()) };
    }

    /// Copies `len` bytes between two mappings (which may be the same if the ranges do not overlap).
    pub fn copy_from(&self, offset: usize, source: &SharedMem, source_offset: usize, len: usize) {
        self.check(offset, len, 1);
        source.check(source_offset, len, 1);
        // SAFETY: both ranges are in bounds (checked) and mapped.
        unsafe {
            copy_bytes(self.map.as_mut_ptr().add(offset), source.map.as_mut_ptr().add(source_offset), len);
        }
    }

    /// Gives the memory of whole pages back to the kernel: they read as zeroes from now on. Of a memfd only.
    ///
    /// # Errors
    /// That of madvise(2).
    pub fn release(&self, offset: usize, len: usize) -> io::Result<()> {
        self.check(offset, len, PAGE_SIZE);
        let start = std::ptr::NonNull::new(self.map.as_mut_ptr().wrapping_add(offset).cast());
        let start = start.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a range of this mapping; its bytes change to zero, as shared bytes may at any time.
        unsafe { nix::sys::mman::madvise(start, len, nix::sys::mman::MmapAdvise::MADV_REMOVE) }?;
        Ok(())
    }

    /// sendmmsg(2) of one message whose head is in this memory, at `head`: the count lands there inside the call, so that a kill
    /// cannot part it from the bytes. Waits for room.
    ///
    /// # Errors
    /// That of the call; the count is untouched then.
    pub fn send_counted(
        &self,
        socket: BorrowedFd<'_>,
        head: usize,
        bytes: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), Errno> {
        let mut rights = fd.map(|fd| Rights {
            head: libc::cmsghdr {
                cmsg_len: size_of::<libc::cmsghdr>() + size_of::<libc::c_int>(),
                cmsg_level: libc::SOL_SOCKET,
                cmsg_type: libc::SCM_RIGHTS,
            },
            fd: fd.as_raw_fd(),
        });
        let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        self.counted(head, &mut iov, rights.as_mut(), |message| {
            // SAFETY: `message` is one mmsghdr in this mapping whose pointers are good for this call; sendmmsg only reads through them.
            unsafe { libc::sendmmsg(socket.as_raw_fd(), message, 1, libc::MSG_NOSIGNAL) }
        })
    }

    /// recvmmsg(2) of one message in the same way. Descriptors that come with it are closed. Never waits.
    ///
    /// # Errors
    /// That of the call; the count is untouched then.
    pub fn recv_counted(&self, socket: BorrowedFd<'_>, head: usize, into: &mut [u8]) -> Result<(), Errno> {
        let mut iov = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        self.counted(head, &mut iov, None, |message| {
            let (fd, flags) = (socket.as_raw_fd(), libc::MSG_DONTWAIT);
            // SAFETY: `message` is one mmsghdr in this mapping, its iovec is `into`; a null timeout is allowed.
            unsafe { libc::recvmmsg(fd, message, 1, flags, std::ptr::null_mut()) }
        })
    }

    fn counted(
        &self,
        head: usize,
        iov: &mut libc::iovec,
        rights: Option<&mut Rights>,
        call: impl FnOnce(*mut libc::mmsghdr) -> libc::c_int,
    ) -> Result<(), Errno> {
        self.check(head, MMSGHDR, align_of::<libc::mmsghdr>());
        // SAFETY: inside the mapping and aligned (checked). All-zero is a valid msghdr, and no reference to it exists.
        let at: *mut libc::mmsghdr = unsafe { self.map.as_mut_ptr().add(head) }.cast();
        // SAFETY: as before; the count beside it is left as it is.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = iov;
            message.msg_iovlen = 1;
            if let Some(rights) = rights {
                message.msg_control = (&raw mut *rights).cast();
                message.msg_controllen = size_of::<Rights>();
            }
            (&raw mut (*at).msg_hdr).write(message);
        }
        if call(at) < 0 { Err(Errno::last()) } else { Ok(()) }
    }

    /// Sets bytes to zero.
    pub fn zero(&self, offset: usize, len: usize) {
        let zeros = [0; 512];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeros.len());
            self.copy_in(offset + done, &zeros[..n]);
            done += n;
        }
    }
}

/// Copies bytes of which some are shared, each read once and written once, in no particular order. Not a Rust copy: the other
/// side may write at the same time, which the compiler must not reason about.
///
/// # Safety
/// Both ranges are mapped; they do not overlap unless they are shared memory.
#[inline]
unsafe fn copy_bytes(to: *mut u8, from: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the ranges are the caller's.
    unsafe {
        if std::arch::is_x86_feature_detected!("ermsb") {
            copy_string(to, from, len);
        } else {
            copy_words(to, from, len);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..len {
        // SAFETY: inside the caller's ranges.
        unsafe {
            let byte = AtomicU8::from_ptr(from.add(i).cast_mut()).load(Ordering::Relaxed);
            AtomicU8::from_ptr(to.add(i)).store(byte, Ordering::Relaxed);
        }
    }
}

/// [`copy_bytes`] for processors that are quick at string operations, and say so (ERMS).
///
/// # Safety
/// As there.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_string(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the ranges are the caller's; the direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
}

/// [`copy_bytes`] for all others. In words and not in vectors: to an emulated processor a string operation is a loop over its bytes
/// (QEMU 7.2's takes 12 to 17 ms for a MiB), vectors are no better than one over words (2 to 3 ms), and this takes 0.2 ms.
///
/// # Safety
/// As there.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_words(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the ranges are the caller's: 32 bytes at a time, then the rest in words and bytes, len in all. The direction flag is
    // clear by the ABI.
    unsafe {
        std::arch::asm!(
            "test {blocks}, {blocks}",
            "jz 3f",
            "2:",
            "mov {a}, [rsi]",
            "mov {b}, [rsi + 8]",
            "mov {c}, [rsi + 16]",
            "mov {d}, [rsi + 24]",
            "mov [rdi], {a}",
            "mov [rdi + 8], {b}",
            "mov [rdi + 16], {c}",
            "mov [rdi + 24], {d}",
            "add rsi, 32",
            "add rdi, 32",
            "dec {blocks}",
            "jnz 2b",
            "3:",
            "rep movsq",
            "mov rcx, {bytes}",
            "rep movsb",
            blocks = inout(reg) len / 32 => _,
            bytes = in(reg) len % 8,
            a = out(reg) _,
            b = out(reg) _,
            c = out(reg) _,
            d = out(reg) _,
            inout("rcx") len % 32 / 8 => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack)
        );
    }
}

/// One page of a shared mapping.
#[derive(Clone, Debug)]
pub struct Page {
    /// The mapping.
    pub mem: Arc<SharedMem>,
    /// Byte offset of the page's start in it.
    pub base: usize,
}

impl Page {
    /// The page with this number of a mapping.
    pub fn new(mem: Arc<SharedMem>, page: usize) -> Self {
        Page { mem, base: page * PAGE_SIZE }
    }
}

/// A memfd of `len` zero bytes that can neither shrink nor grow.
///
/// # Errors
/// Those of memfd_create(2), ftruncate(2), fcntl(2).
pub fn sealed_memfd(name: &str, len: usize) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&fd, i64::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    #[should_panic(expected = "outside a shared mapping")]
    fn access_beyond_the_end() {
        let (mem, _fd) = SharedMem::create("test", 4096).unwrap();
        mem.load_u32(4096, Ordering::Relaxed);
    }

    #[test]
    fn a_sealed_memfd_keeps_its_size() {
        let fd = sealed_memfd("test", 8192).unwrap();
        assert!(nix::unistd::ftruncate(&fd, 4096).is_err());
        assert!(nix::unistd::ftruncate(&fd, 16384).is_err());
    }

    proptest! {
        #[test]
        fn copies_are_exact(offset in 0usize..64, data in proptest::collection::vec(any::<u8>(), 0..256)) {
            let (mem, _fd) = SharedMem::create("test", 4096).unwrap();
            mem.copy_in(offset, &data);
            let mut back = vec![0; data.len()];
            mem.copy_out(offset, &mut back);
            prop_assert_eq!(&back, &data);
            let mut after = [0; 1];
            mem.copy_out(offset + data.len(), &mut after);
            prop_assert_eq!(after[0], 0);
            mem.copy_from(2048, &mem, offset, data.len());
            mem.copy_out(2048, &mut back);
            prop_assert_eq!(&back, &data);
        }

        /// Whichever this machine's processor would take.
        #[cfg(target_arch = "x86_64")]
        #[test]
        fn both_ways_to_copy(from in 0usize..80, to in 0usize..80, len in 0usize..700) {
            let source: Vec<u8> = (0..800).map(|i| (i * 7 % 251) as u8 + 1).collect();
            for copy in [copy_string, copy_words] {
                let mut target = vec![0; 800];
                // SAFETY: from + len and to + len are below 800.
                unsafe { copy(target.as_mut_ptr().add(to), source.as_ptr().add(from), len) };
                prop_assert_eq!(&target[to..to + len], &source[from..from + len]);
                prop_assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0));
            }
        }
    }
}

//! What Xen's xenstored daemons ask of libxenctrl, libxenevtchn and libxengnttab, answered without a Xen.
//!
//! `cargo xtask bench store` loads this with LD_PRELOAD into Debian's C xenstored and oxenstored, so that they serve their sockets on a
//! machine that has no hypervisor. Domain 0 exists, no other domain does, and no event ever comes. Nothing of this is on the path of a
//! request over a socket. It is compiled by rustc as a shared library (xtask's `bench.rs`), because the workspace's own programs are
//! static; as a member of the workspace it is checked like every other crate.
//!
//! Signatures: tools/include/xenevtchn.h, xengnttab.h and xenctrl.h of Xen 4.17.

// Every item is a symbol for another program's C code to call by its name.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicI32, Ordering};

/// XENEVTCHN_NO_CLOEXEC.
const NO_CLOEXEC: c_uint = 1;
/// EFD_CLOEXEC and EFD_NONBLOCK (sys/eventfd.h).
const EFD_CLOEXEC: c_int = 0o2_000_000;
const EFD_NONBLOCK: c_int = 0o4_000;

unsafe extern "C" {
    safe fn eventfd(initial: c_uint, flags: c_int) -> c_int;
    safe fn close(fd: c_int) -> c_int;
}

/// The event channel device: an eventfd that nothing ever signals. The daemons poll it, and keep it over an exec.
static EVTCHN: AtomicI32 = AtomicI32::new(-1);
/// Local ports are numbered as they are bound; 0 is none.
static NEXT_PORT: AtomicI32 = AtomicI32::new(1);

/// A handle that no one looks into.
fn handle() -> *mut c_void {
    (&raw const NEXT_PORT).cast_mut().cast()
}

fn port() -> c_int {
    NEXT_PORT.fetch_add(1, Ordering::Relaxed)
}

/// xenevtchn_open.
// SAFETY (of the name, here and below): the daemons' own library of this name is the only other definition, and is meant to be hidden.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_open(_logger: *mut c_void, flags: c_uint) -> *mut c_void {
    let cloexec = if flags & NO_CLOEXEC == 0 { EFD_CLOEXEC } else { 0 };
    EVTCHN.store(eventfd(0, EFD_NONBLOCK | cloexec), Ordering::Relaxed);
    handle()
}

/// xenevtchn_fdopen: after a live update, on the inherited descriptor.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_fdopen(_logger: *mut c_void, fd: c_int, _flags: c_uint) -> *mut c_void {
    EVTCHN.store(fd, Ordering::Relaxed);
    handle()
}

/// xenevtchn_close.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_close(_xce: *mut c_void) -> c_int {
    close(EVTCHN.swap(-1, Ordering::Relaxed))
}

/// xenevtchn_fd.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_fd(_xce: *mut c_void) -> c_int {
    EVTCHN.load(Ordering::Relaxed)
}

/// xenevtchn_bind_virq.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_bind_virq(_xce: *mut c_void, _virq: c_uint) -> c_int {
    port()
}

/// xenevtchn_bind_interdomain.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_bind_interdomain(_xce: *mut c_void, _domid: u32, _remote: u32) -> c_int {
    port()
}

/// xenevtchn_unbind.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_unbind(_xce: *mut c_void, _port: u32) -> c_int {
    0
}

/// xenevtchn_notify.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_notify(_xce: *mut c_void, _port: u32) -> c_int {
    0
}

/// xenevtchn_unmask.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_unmask(_xce: *mut c_void, _port: u32) -> c_int {
    0
}

/// xenevtchn_pending: nothing is.
#[unsafe(no_mangle)]
pub extern "C" fn xenevtchn_pending(_xce: *mut c_void) -> c_int {
    -1
}

/// xengnttab_open.
#[unsafe(no_mangle)]
pub extern "C" fn xengnttab_open(_logger: *mut c_void, _flags: c_uint) -> *mut c_void {
    handle()
}

/// xengnttab_close.
#[unsafe(no_mangle)]
pub extern "C" fn xengnttab_close(_xgt: *mut c_void) -> c_int {
    0
}

/// xengnttab_set_max_grants.
#[unsafe(no_mangle)]
pub extern "C" fn xengnttab_set_max_grants(_xgt: *mut c_void, _count: u32) -> c_int {
    0
}

/// xengnttab_map_grant_ref: there is no domain that could grant.
#[unsafe(no_mangle)]
pub extern "C" fn xengnttab_map_grant_ref(
    _xgt: *mut c_void,
    _domid: u32,
    _gref: u32,
    _prot: c_int,
) -> *mut c_void {
    std::ptr::null_mut()
}

/// xengnttab_unmap.
#[unsafe(no_mangle)]
pub extern "C" fn xengnttab_unmap(_xgt: *mut c_void, _start: *mut c_void, _count: u32) -> c_int {
    0
}

/// xc_interface_open.
#[unsafe(no_mangle)]
pub extern "C" fn xc_interface_open(
    _log: *mut c_void,
    _dombuild: *mut c_void,
    _flags: c_uint,
) -> *mut c_void {
    handle()
}

/// xc_interface_close.
#[unsafe(no_mangle)]
pub extern "C" fn xc_interface_close(_xch: *mut c_void) -> c_int {
    0
}

/// The beginning of xc_dominfo_t; the rest is not looked at by a xenstored.
#[repr(C)]
pub struct DomInfo {
    domid: u32,
    ssidref: u32,
    /// dying, crashed, shutdown, paused, … from the lowest bit.
    flags: u32,
}

/// xc_domain_getinfo: domain 0 alone, alive.
///
/// # Safety
/// As Xen's: `info` has room for `max` entries.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_domain_getinfo(
    _xch: *mut c_void,
    first: u32,
    max: c_uint,
    info: *mut DomInfo,
) -> c_int {
    if first > 0 || max == 0 || info.is_null() {
        return 0;
    }
    // SAFETY: the caller's array has room for `max` >= 1 entries, each longer than DomInfo.
    unsafe { info.write(DomInfo { domid: 0, ssidref: 0, flags: 0 }) };
    1
}

/// xc_get_last_error, which oxenstored reads after a failure: no text.
#[unsafe(no_mangle)]
pub extern "C" fn xc_error_code_to_desc(_code: c_int) -> *const c_char {
    c"no Xen here".as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domain_0_alone_exists_and_no_event_comes() {
        let mut info = DomInfo { domid: 9, ssidref: 9, flags: 9 };
        // SAFETY: one entry, as said.
        let found = [0, 1].map(|domid| unsafe { xc_domain_getinfo(handle(), domid, 1, &raw mut info) });
        assert_eq!((found, info.domid, info.flags), ([1, 0], 0, 0));
        let xce = xenevtchn_open(std::ptr::null_mut(), NO_CLOEXEC);
        assert!(xenevtchn_fd(xce) >= 0);
        assert!(xenevtchn_bind_virq(xce, 3) > 0);
        assert_eq!(xenevtchn_pending(xce), -1);
        assert_eq!(xenevtchn_close(xce), 0);
    }
}

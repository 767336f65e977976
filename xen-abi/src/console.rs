//! `io/console.h` and the console commands of `xen.h`: the PV console's ring page.

consts! { "xen.h";
    u32 {
        /// `__HYPERVISOR_console_io`: write `arg2` bytes at `arg3`.
        CONSOLEIO_WRITE(CONSOLEIO_write) = 0;
        /// `__HYPERVISOR_console_io`: read up to `arg2` bytes to `arg3`; returns their number.
        CONSOLEIO_READ(CONSOLEIO_read) = 1;
    }
}

abi! { "io/console.h";
    /// The console ring page. All indices run freely; see the `*_OFFSET` constants for access as atomics.
    /// `in` is what the guest reads, `out` what it prints.
    pub struct XenconsInterface("struct xencons_interface") [3088] {
        input("in"): [u8; XENCONS_IN_SIZE] = 0,
        output("out"): [u8; XENCONS_OUT_SIZE] = 1024,
        in_cons: u32 = 3072,
        in_prod: u32 = 3076,
        out_cons: u32 = 3080,
        out_prod: u32 = 3084,
    }
}

/// Bytes of the `in` ring, to the guest. A power of two.
pub const XENCONS_IN_SIZE: usize = 1024;
/// Bytes of the `out` ring, from the guest. A power of two.
pub const XENCONS_OUT_SIZE: usize = 2048;
/// Byte offset of the `in` ring.
pub const XENCONS_IN_OFFSET: usize = core::mem::offset_of!(XenconsInterface, input);
/// Byte offset of the `out` ring.
pub const XENCONS_OUT_OFFSET: usize = core::mem::offset_of!(XenconsInterface, output);
/// Byte offset of `in_cons`, written by the guest.
pub const XENCONS_IN_CONS_OFFSET: usize = core::mem::offset_of!(XenconsInterface, in_cons);
/// Byte offset of `in_prod`, written by the backend.
pub const XENCONS_IN_PROD_OFFSET: usize = core::mem::offset_of!(XenconsInterface, in_prod);
/// Byte offset of `out_cons`, written by the backend.
pub const XENCONS_OUT_CONS_OFFSET: usize = core::mem::offset_of!(XenconsInterface, out_cons);
/// Byte offset of `out_prod`, written by the guest.
pub const XENCONS_OUT_PROD_OFFSET: usize = core::mem::offset_of!(XenconsInterface, out_prod);

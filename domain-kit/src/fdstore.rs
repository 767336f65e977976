//! Memory that outlives an incarnation: a sealed memfd kept in hv-core's fd store.

use hv_abi::fd_kind;
use nix::errno::Errno;

use crate::grants::GrantError;
use crate::hypercall::Hypercall;
use crate::mem::{SharedMem, sealed_memfd};

/// The shared memory kept under `name`, made (zeroed) if there is none. The flag is true if it was made now.
///
/// A kill between making and storing loses nothing: the next incarnation makes it again.
///
/// # Errors
/// Those of the fd-store calls and of mapping; `EINVAL` if what is stored has another length.
pub fn kept_memory(hv: &Hypercall, name: &str, len: usize) -> Result<(SharedMem, bool), GrantError> {
    match hv.fd_get(name) {
        Ok((_, fd)) => {
            let stored = nix::sys::stat::fstat(&fd).map_err(std::io::Error::from)?.st_size;
            if stored != len as i64 {
                let what = format!("fd store entry {name:?} has {stored} bytes, expected {len}");
                return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, what).into());
            }
            Ok((SharedMem::map(fd, len)?, false))
        }
        Err(e) if e.is(Errno::ENOENT) => {
            let fd = sealed_memfd(name, len)?;
            hv.fd_put(name, fd_kind::MEMFD, 0, &fd)?;
            Ok((SharedMem::map(fd, len)?, true))
        }
        Err(e) => Err(e.into()),
    }
}

//! `xen_version` (xen/include/public/version.h).

use super::{Answer, Guest};
use crate::cpuid::{XEN_MAJOR, XEN_MINOR};
use crate::errno::Errno;
use crate::mem::PAGE_SIZE;
use crate::platform::GuestCpu;
use xen_abi::features::*;
use xen_abi::version::*;

/// What a PVH guest is told that Xen can do.
const FEATURES: u32 = 1 << XENFEAT_WRITABLE_PAGE_TABLES
    | 1 << XENFEAT_WRITABLE_DESCRIPTOR_TABLES
    | 1 << XENFEAT_AUTO_TRANSLATED_PHYSMAP
    | 1 << XENFEAT_SUPERVISOR_MODE_KERNEL
    | 1 << XENFEAT_PAE_PGDIR_ABOVE_4GB
    | 1 << XENFEAT_GNTTAB_MAP_AVAIL_BITS
    | 1 << XENFEAT_HVM_CALLBACK_VECTOR
    | 1 << XENFEAT_HVM_SAFE_PVCLOCK
    | 1 << XENFEAT_MEMORY_OP_VNODE_SUPPORTED
    | 1 << XENFEAT_LINUX_RSDP_UNRESTRICTED;

/// `text` in a field of `N` bytes, NUL-terminated.
fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [0; N];
    let n = text.len().min(N - 1);
    out[..n].copy_from_slice(&text.as_bytes()[..n]);
    out
}

impl Guest {
    pub(super) fn xen_version(&self, cpu: &dyn GuestCpu, cmd: u64, arg: u64) -> Answer {
        match cmd as u32 {
            XENVER_VERSION => return Ok(i64::from(XEN_MAJOR << 16 | XEN_MINOR)),
            XENVER_PAGESIZE => return Ok(PAGE_SIZE as i64),
            XENVER_EXTRAVERSION => {
                self.copy_out(cpu, arg, &field::<XEN_EXTRAVERSION_LEN>(".0-bulkhead"))?;
            }
            XENVER_COMPILE_INFO => {
                let info = XenCompileInfo {
                    compiler: field("rustc"),
                    compile_by: field("bulkhead"),
                    compile_domain: field(""),
                    compile_date: field(""),
                };
                self.put(cpu, arg, &info)?;
            }
            XENVER_CAPABILITIES => {
                self.copy_out(cpu, arg, &field::<XEN_CAPABILITIES_INFO_LEN>("hvm-3.0-x86_64 "))?;
            }
            XENVER_CHANGESET => {
                self.copy_out(cpu, arg, &field::<XEN_CHANGESET_INFO_LEN>("unavailable"))?;
            }
            XENVER_PLATFORM_PARAMETERS => {
                self.put(cpu, arg, &XenPlatformParameters { virt_start: 0 })?;
            }
            XENVER_GET_FEATURES => {
                let mut info: XenFeatureInfo = self.fetch(cpu, arg)?;
                if info.submap_idx >= XENFEAT_NR_SUBMAPS {
                    return Err(Errno::EINVAL);
                }
                info.submap = FEATURES;
                self.put(cpu, arg, &info)?;
            }
            XENVER_GUEST_HANDLE => self.copy_out(cpu, arg, &self.uuid)?,
            XENVER_COMMANDLINE => self.copy_out(cpu, arg, &field::<XEN_COMMANDLINE_LEN>(""))?,
            XENVER_BUILD_ID => return Err(Errno::ENODATA),
            _ => return Err(Errno::ENOSYS),
        }
        Ok(0)
    }
}

//! memcpy(3) between two shared mappings.
#![expect(unsafe_code, reason = "the limit is the plain copy of the machine, not our atomic one")]

use domain_kit::mem::SharedMem;

/// Copies `len` bytes at the same `offset` of both.
///
/// # Panics
/// If the range is outside one of them.
pub fn copy(from: &SharedMem, to: &SharedMem, offset: usize, len: usize) {
    let end = offset.checked_add(len);
    assert!(end.is_some_and(|end| end <= from.len() && end <= to.len()), "outside a mapping");
    // SAFETY: in bounds of two different mappings (checked; `from` and `to` are made apart), both of this process alone.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(offset), to.as_ptr().add(offset), len) };
}

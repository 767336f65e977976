//! What the guest sees in CPUID: KVM's supported leaves without KVM's own, Xen's leaves at 0x40000000
//! (xen/include/public/arch-x86/cpuid.h), and one package with a core per vCPU.

use crate::layout::XEN_HYPERCALL_MSR;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Xen version that is told to the guest: 4.17.
pub const XEN_MAJOR: u32 = 4;
/// See [`XEN_MAJOR`].
pub const XEN_MINOR: u32 = 17;

const XEN_BASE: u32 = 0x4000_0000;
/// First leaf after the range of hypervisor leaves.
const HYPERVISOR_END: u32 = 0x4001_0000;
/// Highest Xen leaf that is answered.
const XEN_MAX: u32 = XEN_BASE + 4;

/// `XEN_HVM_CPUID_X2APIC_VIRT`.
const HVM_X2APIC_VIRT: u32 = 1 << 1;
/// `XEN_HVM_CPUID_VCPU_ID_PRESENT`: leaf 4 ebx holds the vCPU id.
const HVM_VCPU_ID_PRESENT: u32 = 1 << 3;
/// `XEN_HVM_CPUID_DOMID_PRESENT`: leaf 4 ecx holds the domid.
const HVM_DOMID_PRESENT: u32 = 1 << 4;

/// A leaf that is the same for every index (ecx).
fn plain(function: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { flags: 0, ..leaf(function, 0, regs) }
}

/// A leaf for one index.
fn leaf(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: regs[0],
        ebx: regs[1],
        ecx: regs[2],
        edx: regs[3],
        ..Default::default()
    }
}

/// The guest's CPUID for vCPU `vcpu` of `vcpus` (1..=8), from what KVM supports.
pub fn guest(supported: &[kvm_cpuid_entry2], vcpu: u32, vcpus: u32, domid: u16) -> Vec<kvm_cpuid_entry2> {
    let shift = vcpus.next_power_of_two().trailing_zeros();
    let mut out: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .copied()
        .filter(|e| !(XEN_BASE..HYPERVISOR_END).contains(&e.function) && !matches!(e.function, 0xb | 0x1f))
        .collect();
    let mut top_leaf = 0;
    for e in &mut out {
        match e.function {
            0 => top_leaf = e.eax,
            1 => {
                e.ebx = (e.ebx & 0xffff) | (vcpu << 24) | (1 << shift << 16);
                // No MONITOR (3), VMX (5) or OS-set bits (27 is the guest's own); a hypervisor (31) is present.
                e.ecx = (e.ecx & !(1 << 3 | 1 << 5)) | (1 << 31);
                // HTT: more than one logical processor in the package.
                e.edx = (e.edx & !(1 << 28)) | (u32::from(vcpus > 1) << 28);
            }
            // Cores sharing a cache, cores in the package.
            4 if e.eax & 0x1f != 0 => {
                let level = (e.eax >> 5) & 7;
                let sharing = if level >= 3 { (1 << shift) - 1 } else { 0 };
                e.eax = (e.eax & 0x3fff) | (sharing << 14) | (((1 << shift) - 1) << 26);
            }
            // No five-level paging: linear addresses have 48 bits, which the checks of guest pointers rely on.
            7 if e.index == 0 => e.ecx &= !(1 << 16),
            // No SVM (2) and no extended topology (22) for the guest.
            0x8000_0001 => e.ecx &= !(1 << 2 | 1 << 22),
            0x8000_0008 => e.ecx = (shift << 12) | (vcpus - 1),
            0x8000_000a | 0x8000_001d | 0x8000_001e => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    if top_leaf >= 0xb {
        // Extended topology: one thread a core, `vcpus` cores; edx is the APIC id.
        out.push(leaf(0xb, 0, [0, 1, 0x100, vcpu]));
        out.push(leaf(0xb, 1, [shift, vcpus, 0x201, vcpu]));
        out.push(leaf(0xb, 2, [0, 0, 2, vcpu]));
    }
    let word = |b: &[u8; 4]| u32::from_le_bytes(*b);
    out.push(plain(XEN_BASE, [XEN_MAX, word(b"XenV"), word(b"MMXe"), word(b"nVMM")]));
    out.push(plain(XEN_BASE + 1, [XEN_MAJOR << 16 | XEN_MINOR, 0, 0, 0]));
    out.push(plain(XEN_BASE + 2, [1, XEN_HYPERCALL_MSR, 0, 0]));
    // Time: KVM fills in the scale where it knows these leaves.
    for index in 0..3 {
        out.push(leaf(XEN_BASE + 3, index, [0, 0, 0, 0]));
    }
    let features = HVM_X2APIC_VIRT | HVM_VCPU_ID_PRESENT | HVM_DOMID_PRESENT;
    out.push(plain(XEN_BASE + 4, [features, vcpu, u32::from(domid), 0]));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let mut all = vec![
            leaf(0, 0, [0x1f, 0, 0, 0]),
            leaf(1, 0, [0x830f10, 0xff00_0800, u32::MAX, u32::MAX]),
            leaf(4, 0, [!0x1e, 0, 0, 0]),
            leaf(7, 0, [0, u32::MAX, u32::MAX, 0]),
            leaf(0xb, 0, [9, 9, 9, 9]),
            leaf(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0, 0]),
        ];
        all.push(leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]));
        all.push(leaf(0x4000_0001, 0, [u32::MAX; 4]));
        all
    }

    fn get(all: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = all.iter().filter(|e| e.function == function && e.index == index);
        let entry = *found.next().expect("leaf is there");
        assert!(found.next().is_none(), "leaf {function:#x} is there once");
        entry
    }

    #[test]
    fn xen_leaves_replace_kvm_ones() {
        for vcpus in 1..=8 {
            for vcpu in 0..vcpus {
                let all = guest(&supported(), vcpu, vcpus, 7);
                let sig = get(&all, 0x4000_0000, 0);
                let text: Vec<u8> =
                    [sig.ebx, sig.ecx, sig.edx].iter().flat_map(|w| w.to_le_bytes()).collect();
                assert_eq!(text, b"XenVMMXenVMM");
                assert_eq!(get(&all, 0x4000_0001, 0).eax, 4 << 16 | 17);
                assert_eq!(sig.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 0, "a guest may ask with any ecx");
                let hvm = get(&all, 0x4000_0004, 0);
                assert_eq!((hvm.ebx, hvm.ecx), (vcpu, 7));
                let one = get(&all, 1, 0);
                assert_eq!(one.ebx >> 24, vcpu);
                assert_ne!(one.ecx & 1 << 31, 0);
                assert_eq!(one.ecx & 1 << 5, 0);
                assert_eq!(get(&all, 7, 0).ecx & 1 << 16, 0);
                assert_eq!(get(&all, 0xb, 1).edx, vcpu);
                assert_eq!(get(&all, 0x8000_0001, 0).ecx & 1 << 2, 0);
            }
        }
    }
}

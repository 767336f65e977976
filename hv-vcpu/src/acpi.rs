//! The ACPI tables of a PVH guest: RSDP, XSDT, FADT (hardware-reduced), DSDT with `_S5_`, MADT with the local
//! APICs. Field offsets are from the ACPI specification 6.4, chapter 5.2.

/// I/O port of the sleep control register; `SLP_TYP` 5 with `SLP_EN` set turns the guest off (ACPI 4.8.3.7).
pub const SLEEP_PORT: u16 = 0x600;
/// I/O port of the sleep status register; it always reads as 0.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// I/O port of the reset register (the one that chipsets use).
pub const RESET_PORT: u16 = 0xcf9;
/// What the guest writes to [`RESET_PORT`] to reboot.
pub const RESET_VALUE: u8 = 6;
/// What the guest writes to [`SLEEP_PORT`] to turn itself off: `SLP_TYP` 5, `SLP_EN`.
pub const SLEEP_S5: u8 = (5 << 2) | (1 << 5);

/// Guest-physical address of the local APICs.
const LAPIC_ADDR: u32 = 0xfee0_0000;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |a, &b| a.wrapping_add(b))
}

/// A table: the common header (ACPI 5.2.6) with the right length and checksum, then `body`.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut t = Vec::with_capacity(36 + body.len());
    t.extend_from_slice(signature);
    t.extend_from_slice(&(36 + body.len() as u32).to_le_bytes());
    t.extend_from_slice(&[revision, 0]);
    t.extend_from_slice(b"BLKHD ");
    t.extend_from_slice(b"BULKHEAD");
    t.extend_from_slice(&1u32.to_le_bytes());
    t.extend_from_slice(b"BLKH");
    t.extend_from_slice(&1u32.to_le_bytes());
    t.extend_from_slice(body);
    t[9] = sum(&t).wrapping_neg();
    t
}

/// A generic address structure (ACPI 5.2.3.2) for one byte of I/O space.
fn io_byte(port: u16) -> [u8; 12] {
    let mut gas = [1, 8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    gas[4..6].copy_from_slice(&port.to_le_bytes());
    gas
}

fn fadt(dsdt: u64) -> Vec<u8> {
    // Offsets are of the whole table; `put` takes off the header.
    let mut body = vec![0u8; 276 - 36];
    let mut put =
        |offset: usize, data: &[u8]| body[offset - 36..offset - 36 + data.len()].copy_from_slice(data);
    put(40, &(dsdt as u32).to_le_bytes());
    // IAPC_BOOT_ARCH: no VGA (bit 2), no CMOS clock (bit 5); no legacy devices, no 8042.
    put(109, &0x0024u16.to_le_bytes());
    // Flags: WBINVD, no fixed power and sleep buttons, reset register, hardware-reduced.
    put(112, &(1u32 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20).to_le_bytes());
    put(116, &io_byte(RESET_PORT));
    put(128, &[RESET_VALUE]);
    put(131, &[4]);
    put(140, &dsdt.to_le_bytes());
    put(244, &io_byte(SLEEP_PORT));
    put(256, &io_byte(SLEEP_STATUS_PORT));
    put(268, b"XenVMM\0\0");
    table(b"FACP", 6, &body)
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&LAPIC_ADDR.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    for id in 0..vcpus {
        // Processor local APIC (5.2.12.2): ACPI id, APIC id, enabled.
        body.extend_from_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    table(b"APIC", 4, &body)
}

/// AML: `Name (_S5_, Package () { 5, 5 })`.
const DSDT_AML: &[u8] = &[0x08, b'_', b'S', b'5', b'_', 0x12, 6, 2, 0x0a, 5, 0x0a, 5];

/// All tables for `vcpus` vCPUs (1..=8), to be placed at `base`. The RSDP is at the start.
pub fn tables(base: u64, vcpus: u8) -> Vec<u8> {
    let mut out = vec![0u8; 64];
    let place = |out: &mut Vec<u8>, t: Vec<u8>| {
        let at = base + out.len() as u64;
        out.extend_from_slice(&t);
        out.resize(out.len().next_multiple_of(16), 0);
        at
    };
    let dsdt = place(&mut out, table(b"DSDT", 2, DSDT_AML));
    let fadt = place(&mut out, fadt(dsdt));
    let madt = place(&mut out, madt(vcpus));
    let entries: Vec<u8> = [fadt, madt].iter().flat_map(|a| a.to_le_bytes()).collect();
    let xsdt = place(&mut out, table(b"XSDT", 1, &entries));

    // RSDP (5.2.5.3), revision 2; the first checksum covers 20 bytes, the extended one all 36.
    let mut rsdp = [0u8; 36];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(b"BLKHD ");
    rsdp[15] = 2;
    rsdp[20..24].copy_from_slice(&36u32.to_le_bytes());
    rsdp[24..32].copy_from_slice(&xsdt.to_le_bytes());
    rsdp[8] = sum(&rsdp[..20]).wrapping_neg();
    rsdp[32] = sum(&rsdp).wrapping_neg();
    out[..36].copy_from_slice(&rsdp);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(t: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(t[at..at + 8].try_into().unwrap())
    }

    fn table_at(all: &[u8], base: u64, addr: u64) -> &[u8] {
        let at = (addr - base) as usize;
        let len = u32::from_le_bytes(all[at + 4..at + 8].try_into().unwrap()) as usize;
        &all[at..at + len]
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let base = 0xe_0000;
        for vcpus in 1..=8 {
            let all = tables(base, vcpus);
            assert!(all.len() < 0x2_0000);
            assert_eq!(&all[..8], b"RSD PTR ");
            assert_eq!(sum(&all[..20]), 0);
            assert_eq!(sum(&all[..36]), 0);
            let xsdt = table_at(&all, base, u64_at(&all, 24));
            assert_eq!(&xsdt[..4], b"XSDT");
            assert_eq!(sum(xsdt), 0);
            let fadt = table_at(&all, base, u64_at(xsdt, 36));
            let madt = table_at(&all, base, u64_at(xsdt, 44));
            assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 276));
            assert_eq!((&madt[..4], madt.len()), (&b"APIC"[..], 44 + 8 * usize::from(vcpus)));
            let dsdt = table_at(&all, base, u64_at(fadt, 140));
            assert_eq!(&dsdt[..4], b"DSDT");
            for t in [fadt, madt, dsdt] {
                assert_eq!(sum(t), 0);
            }
        }
    }
}

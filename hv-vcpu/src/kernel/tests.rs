use super::*;
use flate2::Compression;
use proptest::prelude::*;
use std::io::Write;
use std::process::{Command, Stdio};

const LOW: u64 = 1 << 20;
const HIGH: u64 = 16 << 20;

fn memory() -> GuestMemory {
    GuestMemory::anonymous(&[(0, HIGH)]).unwrap()
}

/// An ELF kernel: one segment of `code` at 2 MiB with its entry 16 bytes in, and a PVH note.
fn elf(code: &[u8]) -> Vec<u8> {
    let (base, note_at, code_at) = (2u64 << 20, 64 + 2 * 56, 0x100);
    let mut f = vec![0u8; code_at];
    f[..20].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0]);
    f[32..40].copy_from_slice(&64u64.to_le_bytes());
    f[54..56].copy_from_slice(&56u16.to_le_bytes());
    f[56..58].copy_from_slice(&2u16.to_le_bytes());
    let mut ph = |at: usize, kind: u32, offset: u64, paddr: u64, filesz: u64, memsz: u64| {
        f[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        f[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
        f[at + 24..at + 32].copy_from_slice(&paddr.to_le_bytes());
        f[at + 32..at + 40].copy_from_slice(&filesz.to_le_bytes());
        f[at + 40..at + 48].copy_from_slice(&memsz.to_le_bytes());
    };
    ph(64, 1, code_at as u64, base, code.len() as u64, code.len() as u64 + 4096);
    ph(64 + 56, 4, note_at as u64, 0, 20, 20);
    f[note_at..note_at + 4].copy_from_slice(&4u32.to_le_bytes());
    f[note_at + 4..note_at + 8].copy_from_slice(&4u32.to_le_bytes());
    f[note_at + 8..note_at + 12].copy_from_slice(&18u32.to_le_bytes());
    f[note_at + 12..note_at + 16].copy_from_slice(b"Xen\0");
    f[note_at + 16..note_at + 20].copy_from_slice(&(base as u32 + 16).to_le_bytes());
    f.extend_from_slice(code);
    f
}

/// Code-like bytes with many branches, so that the x86 filter has work to do.
fn code() -> Vec<u8> {
    let mut state = 0x1234_5678u32;
    (0..300_000u32)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match i % 7 {
                0 => 0xe8,
                3 if state & 0x1000 != 0 => 0xe9,
                4 => [0, 0xff][(state >> 31) as usize],
                _ => (state >> 24) as u8,
            }
        })
        .collect()
}

/// A bzImage around a payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut f = vec![0u8; 1024 + 0x40];
    f[0x1f1] = 1;
    f[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
    f[0x202..0x206].copy_from_slice(b"HdrS");
    f[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    f[0x248..0x24c].copy_from_slice(&0x40u32.to_le_bytes());
    f[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    f.extend_from_slice(payload);
    f
}

/// Runs a packer of the system; `None` if it is not installed.
fn pack(tool: &str, args: &[&str], data: &[u8]) -> Option<Vec<u8>> {
    let mut child =
        Command::new(tool).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    let mut input = child.stdin.take().unwrap();
    let copy = data.to_vec();
    let feeder = std::thread::spawn(move || input.write_all(&copy));
    let out = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    assert!(out.status.success());
    Some(out.stdout)
}

fn check_loaded(image: &[u8], code: &[u8]) {
    let mem = memory();
    let got = load(image, &mem, LOW, HIGH).unwrap();
    assert_eq!(got.entry, (2 << 20) + 16);
    assert_eq!((got.start, got.end), (2 << 20, (2 << 20) + code.len() as u64 + 4096));
    let mut back = vec![0; code.len()];
    mem.read(2 << 20, &mut back).unwrap();
    assert!(back == code);
}

fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    packed.extend_from_slice(&(size as u32).to_le_bytes());
    packed
}

#[test]
fn elf_is_loaded() {
    check_loaded(&elf(&code()), &code());
}

#[test]
fn bzimage_with_every_compression() {
    let vmlinux = elf(&code());
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), Compression::fast());
    gz.write_all(&vmlinux).unwrap();
    check_loaded(&bzimage(&gz.finish().unwrap()), &code());

    let mut seen = vec!["gzip"];
    for (tool, args) in [
        ("xz", &["--check=crc32", "--x86", "--lzma2=dict=4MiB"][..]),
        ("xz", &["--check=crc32", "--lzma2=dict=4MiB"]),
        ("lz4", &["-l", "-9"]),
        ("zstd", &["-19"]),
    ] {
        if let Some(packed) = pack(tool, args, &vmlinux) {
            check_loaded(&bzimage(&with_size(packed, vmlinux.len())), &code());
            seen.push(tool);
        }
    }
    println!("seen: {seen:?}");
}

#[test]
fn zstd_by_hand_and_with_faults() {
    use structured_zstd::encoding::{CompressionLevel, compress_slice_to_vec};
    let vmlinux = elf(&code());
    let packed = compress_slice_to_vec(&vmlinux, CompressionLevel::Fastest);
    check_loaded(&bzimage(&with_size(packed.clone(), vmlinux.len())), &code());
    let mem = memory();
    let refused = |packed: Vec<u8>, size: usize| {
        let got = load(&bzimage(&with_size(packed, size)), &mem, LOW, HIGH);
        assert!(matches!(got, Err(KernelError::Unpack { kind: "zstd", .. })), "{got:?}");
    };
    for wrong in [vmlinux.len() - 1, vmlinux.len() + 1, 1] {
        refused(packed.clone(), wrong);
    }
    for cut in [5, packed.len() / 2, packed.len() - 1] {
        refused(packed[..cut].to_vec(), vmlinux.len());
    }
    // A flipped bit may unpack to something else, but never to more, and never ends in a panic.
    for at in (4..packed.len()).step_by(1 + packed.len() / 2000) {
        let mut flipped = packed.clone();
        flipped[at] ^= 1 << (at % 8);
        let _ = load(&bzimage(&with_size(flipped, vmlinux.len())), &mem, LOW, HIGH);
    }
}

#[test]
fn lz4_legacy_by_hand() {
    // Blocks of 8 MiB, framed as the kernel's build does.
    let vmlinux = elf(&code());
    let mut packed = 0x184c_2102u32.to_le_bytes().to_vec();
    let block = lz4_flex::block::compress(&vmlinux);
    packed.extend_from_slice(&(block.len() as u32).to_le_bytes());
    packed.extend_from_slice(&block);
    check_loaded(&bzimage(&with_size(packed, vmlinux.len())), &code());
}

#[test]
fn each_mistake_has_its_error() {
    let mem = memory();
    let go = |image: &[u8]| load(image, &mem, LOW, HIGH).unwrap_err();
    assert!(matches!(go(b""), KernelError::UnknownFormat));
    assert!(matches!(go(&[0; 4096]), KernelError::UnknownFormat));
    let good = elf(&[0x90; 64]);
    assert!(matches!(go(&good[..40]), KernelError::Damaged(_)));
    assert!(matches!(go(&good[..good.len() - 1]), KernelError::Damaged(_)));
    let mut f = good.clone();
    f[4] = 1;
    assert!(matches!(go(&f), KernelError::WrongMachine(_)));
    let mut f = good.clone();
    f[18] = 183;
    assert!(matches!(go(&f), KernelError::WrongMachine(_)));
    let mut f = good.clone();
    f[64 + 56] = 0;
    assert!(matches!(go(&f), KernelError::NoPvhNote));
    let mut f = good.clone();
    f[64 + 24..64 + 32].copy_from_slice(&(HIGH - 64).to_le_bytes());
    assert!(matches!(go(&f), KernelError::DoesNotFit { .. }));
    let mut f = good.clone();
    f[64 + 40..64 + 48].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(go(&f), KernelError::DoesNotFit { .. }));

    let mut f = bzimage(b"BZhxxxxxxxx\x10\0\0\0");
    assert!(matches!(go(&f), KernelError::Compression("bzip2")));
    f[0x206] = 0;
    f[0x207] = 2;
    assert!(matches!(go(&f), KernelError::OldProtocol(0x0200)));
    let f = bzimage(b"\x02\x21\x4c\x18\xff\xff\xff\xff\x10\0\0\0");
    assert!(matches!(go(&f), KernelError::Unpack { kind: "lz4", .. }));
    let f = bzimage(b"\x02\x21\x4c\x18\xff\xff\xff\xff\xff\xff\xff\xff");
    assert!(matches!(go(&f), KernelError::Damaged(_)));
    for e in [go(b""), go(&f)] {
        assert!(!e.to_string().contains('\n'));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Garbage is refused or loaded, never anything else.
    #[test]
    fn garbage_never_panics(data in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let mem = memory();
        let _ = load(&data, &mem, LOW, HIGH);
        let mut f = elf(&data);
        let _ = load(&f, &mem, LOW, HIGH);
        f[..4].copy_from_slice(b"\x7fELF");
        for (magic, tail) in [
            (&b"\x1f\x8b\x08\0"[..], 0x1_0000u32),
            (b"\x02\x21\x4c\x18", 0x1_0000),
            (b"\x28\xb5\x2f\xfd", 0x1_0000),
            (b"\xfd7zXZ\0\0\x01\x69\x22\xde\x36", 0x1_0000),
        ] {
            let mut payload = magic.to_vec();
            payload.extend_from_slice(&data);
            payload.extend_from_slice(&tail.to_le_bytes());
            let _ = load(&bzimage(&payload), &mem, LOW, HIGH);
        }
    }

    /// Any byte of the headers may be anything.
    #[test]
    fn flipped_headers_never_panic(at in 0usize..0x100, value in any::<u8>(), at2 in 0usize..0x100, value2 in any::<u8>()) {
        let mem = memory();
        let mut f = elf(&[0x90; 256]);
        f[at] = value;
        f[at2] = value2;
        let _ = load(&f, &mem, LOW, HIGH);
        let mut f = bzimage(&with_size(vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0], 64));
        f[0x1f0 + at % 0x60] = value;
        f[0x1f0 + at2 % 0x60] = value2;
        let _ = load(&f, &mem, LOW, HIGH);
    }
}

//! The test guest: a PVH kernel of a few hundred bytes that makes every hypercall with garbage, first from ring 0,
//! then from ring 3, writes each answer to the debug port, and turns itself off by ACPI.
//!
//! It is assembled here for [`BASE`] and never runs in this process.
#![expect(unsafe_code, reason = "the guest's code is assembled into this binary and read as bytes")]

use std::arch::global_asm;

/// Where the guest is loaded. Beyond it: page tables (+0x10000), hypercall page (+0x14000), a scratch page
/// (+0x15000), the stack below +0x20000, pages with arguments (+0x100000).
pub const BASE: u32 = 0x20_0000;
/// Hypercall numbers 0 up to this are tried.
pub const NUMBERS: usize = 44;
/// First arguments 0 up to this are tried.
pub const OPS: usize = 33;
/// Pointers that are tried; see the list at +0x48 below.
pub const POINTERS: usize = 7;
/// Ways to place the pointer among the arguments: (p, p), (0, p), (p, 1).
pub const SHAPES: usize = 3;

global_asm!(
    ".pushsection .rodata.test_guest, \"a\", @progbits",
    ".balign 16",
    ".globl bulkhead_test_guest, bulkhead_test_guest_end",
    "bulkhead_test_guest:",
    ".code32",
    "  jmp guest_start",
    // At fixed places, as absolute addresses are easiest so: +0x10 gdtr, +0x20 GDT, +0x48 pointers.
    ".org bulkhead_test_guest + 0x10",
    "  .word 39",
    "  .long 0x200020",
    ".org bulkhead_test_guest + 0x20",
    "  .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff",
    "  .quad 0x300000, 0x310000, 0x320000, 0x80000000, 0x8000000000000000, 0x3ffffffc, 0x330000",
    "guest_start:",
    "  cli",
    "  cld",
    "  mov esp, 0x220000",
    // Four-level tables that map the first GiB, open to ring 3.
    "  mov edi, 0x210000",
    "  xor eax, eax",
    "  mov ecx, 0x1000",
    "  rep stosd",
    "  mov dword ptr [0x210000], 0x211007",
    "  mov dword ptr [0x211000], 0x212007",
    "  mov edi, 0x212000",
    "  mov eax, 0x87",
    "  mov ecx, 512",
    "2: mov [edi], eax",
    "  add eax, 0x200000",
    "  add edi, 8",
    "  dec ecx",
    "  jnz 2b",
    // Arguments: zeros, DOMID_SELF all over, ones, DOMID_SELF and zeros.
    "  mov edi, 0x310000",
    "  mov eax, 0x7ff07ff0",
    "  mov ecx, 1024",
    "  rep stosd",
    "  mov edi, 0x320000",
    "  mov eax, -1",
    "  mov ecx, 1024",
    "  rep stosd",
    "  mov dword ptr [0x330000], 0x7ff0",
    "  mov eax, cr4",
    "  or eax, 0x20",
    "  mov cr4, eax",
    "  mov eax, 0x210000",
    "  mov cr3, eax",
    "  mov ecx, 0xc0000080",
    "  rdmsr",
    "  or eax, 0x100",
    "  wrmsr",
    "  mov eax, cr0",
    "  or eax, 0x80000000",
    "  mov cr0, eax",
    "  lgdt [0x200010]",
    "  .byte 0xea",
    "  .long 0x200000 + (guest_long - bulkhead_test_guest)",
    "  .word 8",
    ".code64",
    "guest_long:",
    "  mov eax, 0x10",
    "  mov ds, eax",
    "  mov es, eax",
    "  mov ss, eax",
    // The MSR that Xen's CPUID names fills the hypercall page.
    "  mov eax, 0x40000002",
    "  cpuid",
    "  mov ecx, ebx",
    "  mov eax, 0x214000",
    "  xor edx, edx",
    "  wrmsr",
    "  mov ebp, 21",
    "  call guest_all",
    // The same with the first pointer only from ring 3, with I/O allowed there.
    "  push 0x1b",
    "  push 0x220000",
    "  push 0x3002",
    "  push 0x23",
    "  lea rax, [rip + guest_ring3]",
    "  push rax",
    "  iretq",
    "guest_ring3:",
    "  mov ebp, 3",
    "  call guest_all",
    "  mov dx, 0x600",
    "  mov al, 0x34",
    "  out dx, al",
    "3: jmp 3b",
    // All numbers (r12), first arguments (r13), pointers and shapes (r14, up to ebp).
    "guest_all:",
    "  xor r12d, r12d",
    "4: xor r13d, r13d",
    "5: xor r14d, r14d",
    "6: xor r15d, r15d",
    // Not sched_op's shutdown and poll: they end the guest, or wait for ever.
    "  cmp r12d, 29",
    "  jne 7f",
    "  cmp r13d, 2",
    "  je 9f",
    "  cmp r13d, 3",
    "  je 9f",
    // Earlier answers may have changed the arguments.
    "7: mov qword ptr [0x300000], 0",
    "  mov qword ptr [0x330000], 0x7ff0",
    "  mov qword ptr [0x330008], 0",
    "  mov qword ptr [0x330010], 0",
    "  mov eax, r14d",
    "  xor edx, edx",
    "  mov ecx, 3",
    "  div ecx",
    "  mov rbx, [rax * 8 + 0x200048]",
    "  mov rsi, rbx",
    "  cmp edx, 1",
    "  jne 8f",
    "  xor esi, esi",
    "8: mov eax, edx",
    "  mov rdx, rbx",
    "  cmp eax, 2",
    "  mov eax, 1",
    "  cmove rdx, rax",
    "  mov rdi, r13",
    "  mov r10, rbx",
    "  mov r8, rbx",
    "  mov r9, rbx",
    "  mov rax, r12",
    // Behind the `mov eax, imm32` of the page's first entry.
    "  mov ecx, 0x214005",
    "  call rcx",
    "  mov r15d, eax",
    "9: mov dword ptr [r14 * 4 + 0x215000], r15d",
    "  inc r14d",
    "  cmp r14d, ebp",
    "  jb 6b",
    "  mov esi, 0x215000",
    "  lea ecx, [rbp * 4]",
    "  mov edx, 0xe9",
    "  rep outsb",
    "  inc r13d",
    "  cmp r13d, 33",
    "  jb 5b",
    "  inc r12d",
    "  cmp r12d, 44",
    "  jb 4b",
    "  ret",
    "bulkhead_test_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static bulkhead_test_guest: u8;
    static bulkhead_test_guest_end: u8;
}

fn code() -> &'static [u8] {
    // SAFETY: the two symbols bound one piece of read-only data of this binary.
    unsafe {
        let start = &raw const bulkhead_test_guest;
        let end = &raw const bulkhead_test_guest_end;
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    }
}

/// The guest as an ELF file with a PVH note.
pub fn elf() -> Vec<u8> {
    let (note_at, code_at) = (64 + 2 * 56, 0x1000usize);
    let mut f = vec![0u8; code_at];
    let mut put = |at: usize, bytes: &[u8]| f[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(16, &[2, 0, 62, 0]);
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let len = code().len() as u64;
    let load = [code_at as u64, 0, BASE.into(), len, 0x20_0000];
    let note = [note_at as u64, 0, 0, 20, 20];
    for (at, kind, fields) in [(64, 1u32, load), (64 + 56, 4, note)] {
        put(at, &kind.to_le_bytes());
        for (i, field) in fields.iter().enumerate() {
            put(at + 8 + i * 8, &field.to_le_bytes());
        }
    }
    for (i, word) in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), BASE].iter().enumerate() {
        put(note_at + i * 4, &word.to_le_bytes());
    }
    f.extend_from_slice(code());
    f
}

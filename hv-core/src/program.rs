//! Programs of domains: what can be said of one before it is started, where a person reads it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};

/// Most program headers that are looked at.
const MAX_HEADERS: usize = 128;
/// Length of an ELF64 header and of one of its program headers, bytes (elf.h).
const EHDR: usize = 64;
const PHDR: usize = 56;
/// elf.h: the machine of x86-64, and the program header that names a dynamic loader.
const EM_X86_64: u16 = 62;
const PT_INTERP: u32 = 3;

/// Opens a program and checks that it can run in a domain's empty root. `dynamic`: its loader and libraries are bound in.
///
/// # Errors
/// One line: what is wrong and what to do.
pub fn open(path: &str, dynamic: bool) -> Result<OwnedFd, String> {
    // Non-blocking, so that a pipe in that place cannot hold the caller.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = opened.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => format!("program {path}: there is no such file; check the path"),
        _ => format!("program {path}: {e}; check the path and its permissions"),
    })?;
    let meta = file.metadata().map_err(|e| format!("program {path}: {e}"))?;
    if !meta.is_file() {
        return Err(format!("program {path}: it is not a file; give the path of a program"));
    }
    if meta.permissions().mode() & 0o001 == 0 {
        return Err(format!("program {path}: not everyone may execute it; chmod a+x {path}"));
    }
    match check(&file, dynamic) {
        Ok(()) => Ok(file.into()),
        Err(why) => Err(format!("program {path}: {why}")),
    }
}

fn check(file: &File, dynamic: bool) -> Result<(), &'static str> {
    const NO_ELF: &str = "it is no program for x86-64 Linux (ELF); give one";
    let mut head = [0; EHDR];
    file.read_exact_at(&mut head, 0).map_err(|_| NO_ELF)?;
    let short = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    // Class 64 bit, little-endian.
    if head[..6] != *b"\x7fELF\x02\x01" || short(18) != EM_X86_64 || usize::from(short(54)) != PHDR {
        return Err(NO_ELF);
    }
    let mut offset = [0; 8];
    offset.copy_from_slice(&head[32..40]);
    let offset = u64::from_le_bytes(offset);
    for i in 0..usize::from(short(56)).min(MAX_HEADERS) {
        let mut kind = [0; 4];
        let at = offset.checked_add((i * PHDR) as u64).ok_or(NO_ELF)?;
        file.read_exact_at(&mut kind, at).map_err(|_| NO_ELF)?;
        if u32::from_le_bytes(kind) == PT_INTERP && !dynamic {
            return Err("it needs shared libraries, which a domain does not have; link it statically");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &[u8], mode: u32) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        open(path.to_str().unwrap(), false).unwrap_err()
    }

    fn elf(machine: u16, headers: &[u32]) -> Vec<u8> {
        let mut out = vec![0; EHDR + headers.len() * PHDR];
        out[..6].copy_from_slice(b"\x7fELF\x02\x01");
        out[18..20].copy_from_slice(&machine.to_le_bytes());
        out[32..40].copy_from_slice(&(EHDR as u64).to_le_bytes());
        out[54..56].copy_from_slice(&(PHDR as u16).to_le_bytes());
        out[56..58].copy_from_slice(&(headers.len() as u16).to_le_bytes());
        for (i, kind) in headers.iter().enumerate() {
            out[EHDR + i * PHDR..][..4].copy_from_slice(&kind.to_le_bytes());
        }
        out
    }

    #[test]
    fn each_mistake_says_what_to_do() {
        assert!(open("/no/such", false).unwrap_err().contains("check the path"));
        assert!(open("/tmp", false).unwrap_err().contains("not a file"));
        assert!(refused(b"#!/bin/sh\n", 0o755).contains("no program"));
        assert!(refused(b"", 0o755).contains("no program"));
        assert!(refused(&elf(40, &[1]), 0o755).contains("no program"), "another machine");
        assert!(refused(&elf(EM_X86_64, &[1, PT_INTERP]), 0o755).contains("link it statically"));
        assert!(refused(&elf(EM_X86_64, &[1]), 0o750).contains("chmod a+x"));
        let mut cut = elf(EM_X86_64, &[1, 1]);
        cut.truncate(EHDR + 10);
        assert!(refused(&cut, 0o755).contains("no program"));
        let mut far = elf(EM_X86_64, &[1, 1]);
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(refused(&far, 0o755).contains("no program"));
    }

    #[test]
    fn this_test_is_a_program() {
        let own = std::env::current_exe().unwrap();
        open(own.to_str().unwrap(), true).unwrap();
    }
}

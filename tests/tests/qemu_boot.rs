//! What a QEMU guest starts from when it has no kernel beside it: UEFI, with and without Secure Boot, on both machines. Natively, under TCG.

mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/machine.rs"]
mod machine;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::system::System;
use common::*;
use linux::*;

fn run_tool(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A qcow2 disk with nothing but an EFI system partition's file system, in which a unified kernel lies where UEFI looks for one.
fn efi_disk(system: &System, cmdline: &str, signed: bool) -> PathBuf {
    let (kernel, initrd) = linux("debian13");
    let at = |name: &str| system.dir().join(name).to_str().unwrap().to_owned();
    let (words, unified, flat, disk) = (at("cmdline"), at("unified.efi"), at("esp.img"), at("esp.qcow2"));
    std::fs::write(&words, cmdline).unwrap();
    let section = |name: &str, file: &str| format!("{name}={file}");
    let (kernel, initrd) = (kernel.to_str().unwrap(), initrd.to_str().unwrap());
    let sections = [
        (".cmdline", words.as_str(), "0x30000"),
        (".linux", kernel, "0x2000000"),
        (".initrd", initrd, "0x4000000"),
    ];
    let mut args: Vec<String> = Vec::new();
    for (name, file, address) in sections {
        args.extend(["--add-section".into(), section(name, file)]);
        args.extend(["--change-section-vma".into(), section(name, address)]);
    }
    args.extend(["/usr/lib/systemd/boot/efi/linuxx64.efi.stub".into(), unified.clone()]);
    run_tool("objcopy", &args.iter().map(String::as_str).collect::<Vec<_>>());
    if signed {
        // Debian's ovmf brings variables whose key is public, passphrase and all, for tests like this.
        let (key, ours) = ("/usr/share/ovmf/PkKek-1-snakeoil.key", at("signer.key"));
        run_tool("openssl", &["rsa", "-in", key, "-passin", "pass:snakeoil", "-out", &ours]);
        let certificate = "/usr/share/ovmf/PkKek-1-snakeoil.pem";
        run_tool("sbsign", &["--key", &ours, "--cert", certificate, "--output", &unified, &unified]);
    }
    image(system, "esp.img", 40 << 20);
    run_tool("mformat", &["-i", &flat, "-F", "::"]);
    run_tool("mmd", &["-i", &flat, "::/EFI", "::/EFI/BOOT"]);
    run_tool("mcopy", &["-i", &flat, &unified, "::/EFI/BOOT/BOOTX64.EFI"]);
    run_tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &flat, &disk]);
    disk.into()
}

/// UEFI boots a unified kernel from a qcow2 disk that blkback serves; the variables are the guest's own.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_boots_by_uefi() {
    let system = start();
    let look = script("cat /sys/firmware/efi/fw_platform_size");
    let disk = efi_disk(&system, &format!("console=ttyS0 quiet panic=1 mitigations=off {look}"), false);
    let vars = variables(&system, "OVMF_VARS_4M.fd");
    let before = std::fs::read(&vars).unwrap();
    let (progress, _console) = boot(&system, &uefi_file(&vars, &disk, ""));
    assert_eq!(said(&system, &progress, 0, Duration::from_secs(20)), ["64"], "booted by UEFI");
    assert!(std::fs::read(&vars).unwrap() != before, "the firmware keeps its variables there");
    // Nothing but a broken QEMU makes that file longer.
    std::fs::File::options().write(true).open(&vars).unwrap().set_len(9 << 20).unwrap();
    until(&system, "its end", || state(&system) == "gone");
    assert!(system.log_tail(25).contains("nvram has 9437184 bytes"), "{}", system.log_tail(25));
}

/// This guest's own copy of the firmware's variables.
fn variables(system: &System, template: &str) -> PathBuf {
    let vars = system.dir().join("vars.fd");
    std::fs::copy(Path::new("/usr/share/OVMF").join(template), &vars).unwrap();
    vars
}

fn uefi_file(vars: &Path, disk: &Path, more: &str) -> String {
    format!(
        "name = \"linux\"\ntype = \"qemu\"\naccel = \"tcg\"\nwhole_memory = true\nmemory = 256\n\
         firmware = \"uefi\"\nnvram = \"{}\"\n{more}\n\
         [[disk]]\nvdev = \"xvda\"\npath = \"{}\"\nformat = \"qcow2\"\n",
        vars.display(),
        disk.display()
    )
}

/// Secure Boot with Microsoft's keys refuses a kernel that nobody signed; without it the same disk boots on the same machine, where another disk
/// is plugged in and taken out.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_with_secure_boot_on_q35() {
    let system = start();
    let until_word = |test: &str| format!("until {test}; do sleep 0.1; done");
    let scripts = [
        format!("{}; cat /sys/block/vdb/size", until_word("[ -e /sys/block/vdb ]")),
        until_word("[ ! -e /sys/block/vdb ]"),
    ];
    let words: Vec<String> = scripts.iter().map(|text| script(text)).collect();
    let disk =
        efi_disk(&system, &format!("console=ttyS0 quiet panic=1 mitigations=off {}", words.join(" ")), false);
    let vars = variables(&system, "OVMF_VARS_4M.ms.fd");
    create(&system, &uefi_file(&vars, &disk, "machine = \"q35\"\nsecure_boot = true\ndisplay = true"));
    until(&system, "the firmware's refusal", || {
        let text = system.bh_ok(&["console", "linux", "--log"]).unwrap_or_default();
        assert!(!text.contains("BH: "), "it booted");
        text.contains("Access Denied") || text.contains("Security Violation")
    });
    let picture = system.dir().join("uefi.png");
    system.bh_ok(&["screenshot", "linux", picture.to_str().unwrap()]).unwrap();
    assert!(std::fs::metadata(&picture).unwrap().len() > 1000);
    if let Some(kept) = std::env::var_os("BH_SCREENSHOT") {
        std::fs::copy(&picture, kept).unwrap();
    }
    system.bh_ok(&["destroy", "linux"]).unwrap();

    let vars = variables(&system, "OVMF_VARS_4M.fd");
    let (progress, _console) = boot(&system, &uefi_file(&vars, &disk, "machine = \"q35\""));
    let other = image(&system, "plug.img", 24 << 20);
    system.bh_ok(&["block-attach", "linux", "vdev=xvdb", &format!("target={}", other.display())]).unwrap();
    assert_eq!(said(&system, &progress, 0, Duration::from_secs(20)), ["49152"]);
    system.bh_ok(&["block-detach", "linux", "xvdb"]).unwrap();
    said(&system, &progress, 1, Duration::from_secs(20));
    system.bh_ok(&["destroy", "linux"]).unwrap();
}

/// Secure Boot starts a kernel that is signed with a key of the guest's variables, and the kernel knows it.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_with_a_signed_kernel() {
    let system = start();
    let look = script("dmesg | grep -ic 'secure boot enabled'");
    let disk = efi_disk(&system, &format!("console=ttyS0 quiet panic=1 mitigations=off {look}"), true);
    let vars = variables(&system, "OVMF_VARS_4M.snakeoil.fd");
    let (progress, _console) =
        boot(&system, &uefi_file(&vars, &disk, "machine = \"q35\"\nsecure_boot = true"));
    let lines = said(&system, &progress, 0, Duration::from_secs(20));
    assert_ne!(lines, ["0"], "the kernel was started by Secure Boot");
    system.bh_ok(&["destroy", "linux"]).unwrap();
}

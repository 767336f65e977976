//! QEMU guests: the two domains of each. The guest's own has qemu-bridge as its process; the other is QEMU, which hv-core starts as it
//! starts every domain's process. They meet at QEMU's monitor: descriptor 4 of QEMU's domain, the socket that every domain listens on,
//! to which the guest's domain has a connection approved.

use std::path::{Path, PathBuf};

use domain_kit::resource_of;
use proto::hvcore::resource::Kind;
use proto::hvcore::{Bind, CreateDomainRequest, Limits, Resource, Role};
use uuid::Uuid;

use crate::config::{Accel, DomainFile, Firmware, HostFile, MachineType, Q35_PORTS};
use crate::state::{Guest, guest_uuid_text};

/// Tasks of QEMU: processors, I/O, its thread pool.
const QEMU_PIDS: u32 = 256;
/// Where a kernel and its initial RAM disk are in QEMU's file system.
const KERNEL: &str = "/boot/kernel";
const INITRD: &str = "/boot/initrd";
/// And UEFI's code and variables.
const UEFI_CODE: &str = "/uefi/code";
const UEFI_VARS: &str = "/uefi/vars";

/// The uuid of QEMU's domain.
pub fn emulator_uuid(guest: &Uuid) -> Uuid {
    Uuid::new_v5(guest, b"qemu")
}

/// QEMU's domain. `kvm`: the host can run processors itself.
pub fn emulator(host: &HostFile, guest: &Guest, kvm: bool) -> CreateDomainRequest {
    let config = &guest.config;
    let qemu = &host.qemu;
    let read_only = |path: &Path, target: &str| Bind {
        source: path.display().to_string(),
        target: target.to_owned(),
        read_only: true,
        executable: false,
    };
    let same = |path: &PathBuf| read_only(path, &path.display().to_string());
    let mut binds = vec![same(&qemu.libraries), Bind { executable: true, ..same(&qemu.loader) }];
    binds.extend(qemu.firmware.iter().map(same));
    binds.extend(config.kernel.as_deref().map(|path| read_only(path, KERNEL)));
    binds.extend(config.ramdisk.as_deref().map(|path| read_only(path, INITRD)));
    if let Some(vars) = uefi_vars(config) {
        let code = if config.secure_boot { &qemu.uefi_secure } else { &qemu.uefi };
        binds.push(read_only(code, UEFI_CODE));
        // The one file of the host that a QEMU can write.
        binds.push(Bind { read_only: false, ..read_only(vars, UEFI_VARS) });
    }
    let kvm = match config.accel {
        Some(accel) => accel == Accel::Kvm,
        None => kvm,
    };
    if kvm {
        binds.push(Bind { read_only: false, ..read_only(Path::new("/dev/kvm"), "/dev/kvm") });
    }
    let memory_bytes = match config.limits.memory {
        0 => 0,
        mib => (mib << 20) + (config.maxmem() << 20),
    };
    CreateDomainRequest {
        name: format!("qemu-{}", config.name),
        uuid: guest_uuid_text(&emulator_uuid(&guest.uuid)),
        roles: vec![Role::Service.into()],
        program: qemu.program.display().to_string(),
        args: arguments(host, guest, kvm),
        // It has no /proc to find itself in.
        env: vec![format!("QEMU_MODULE_DIR={}", qemu.libraries.join("qemu").display())],
        seccomp: "qemu".into(),
        limits: Some(Limits {
            memory_bytes,
            cpu_weight: config.limits.cpu_weight,
            pids: QEMU_PIDS,
            ..Limits::default()
        }),
        binds,
        paused: true,
        ..CreateDomainRequest::default()
    }
}

/// The variables of a guest that starts with UEFI.
fn uefi_vars(config: &DomainFile) -> Option<&Path> {
    config.nvram.as_deref().filter(|_| config.firmware == Some(Firmware::Uefi))
}

/// QEMU's command line: nothing that is not named here. Disks and NICs are plugged in by qemu-bridge before the guest starts.
fn arguments(host: &HostFile, guest: &Guest, kvm: bool) -> Vec<String> {
    let (config, uuid) = (&guest.config, &guest.uuid);
    let memory = config.memory.unwrap_or(0);
    let mut args: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| args.extend([format!("-{option}"), value]);
    add("name", format!("guest={},debug-threads=on", config.name));
    host.qemu.firmware.iter().for_each(|dir| add("L", dir.display().to_string()));
    add("uuid", uuid.to_string());
    let q35 = config.machine == Some(MachineType::Q35);
    let machine = if q35 { "q35,smm=" } else { "pc,smm=" };
    // System management mode keeps UEFI's variables from the guest's system, and is of no other use here.
    let smm = if config.secure_boot { "on" } else { "off" };
    add("machine", format!("{machine}{smm},usb=off,dump-guest-core=off,memory-backend=ram"));
    add("accel", if kvm { "kvm" } else { "tcg" }.into());
    add("cpu", config.cpu.clone().unwrap_or_else(|| if kvm { "host" } else { "max" }.into()));
    match config.maxvcpus() {
        most if most > config.vcpus() => add("smp", format!("{},maxcpus={most}", config.vcpus())),
        _ => add("smp", config.vcpus().to_string()),
    }
    let more = config.maxmem().saturating_sub(memory);
    if more > 0 {
        add("m", format!("{memory}M,maxmem={}M", config.maxmem()));
        // Of this the guest has as much as `bh mem-set` says.
        add("object", format!("memory-backend-memfd,id=more,size={more}M,share=on,seal=on,reserve=off"));
        add("device", "virtio-mem-pci,id=mem0,memdev=more,requested-size=0".into());
    } else {
        add("m", format!("{memory}M"));
    }
    add("object", format!("memory-backend-memfd,id=ram,size={memory}M,share=on,seal=on"));
    add("sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    // The processors wait until all devices are there; what ends the guest leaves QEMU, so that its state can be asked for.
    add("action", "shutdown=pause,panic=pause,reboot=reset,watchdog=reset".into());
    add("chardev", "socket,id=qmp,fd=4,server=on,wait=off".into());
    add("mon", "chardev=qmp,mode=control".into());
    add("chardev", "null,id=serial0".into());
    add("device", "isa-serial,chardev=serial0".into());
    add("object", "rng-builtin,id=rng0".into());
    add("device", "virtio-rng-pci,rng=rng0,id=rng0".into());
    add("device", "pvpanic".into());
    // Another at each start of a machine, so also when the guest goes on from a file; the same when it is reset.
    add("device", "vmgenid,guid=auto".into());
    if uefi_vars(config).is_some() {
        let flash =
            |unit: u32, file: &str, more: &str| format!("if=pflash,format=raw,unit={unit},file={file}{more}");
        add("drive", flash(0, UEFI_CODE, ",readonly=on"));
        add("drive", flash(1, UEFI_VARS, ""));
    }
    if config.secure_boot {
        // The variables are written in system management mode alone.
        add("global", "driver=cfi.pflash01,property=secure,value=on".into());
    }
    if q35 {
        // Nothing can be plugged into the root complex itself. Eight ports share a slot.
        for port in 0..Q35_PORTS {
            let (slot, function) = (0x10 + port / 8, port % 8);
            let first = if function == 0 { ",multifunction=on" } else { "" };
            add(
                "device",
                format!("pcie-root-port,id=port{port},chassis={},addr={slot:#x}.{function}{first}", port + 1),
            );
        }
    }
    if config.usb {
        add("device", "qemu-xhci,id=xhci,p2=8,p3=8".into());
    }
    add("display", "none".into());
    if config.display {
        add("device", "VGA".into());
        // A server that listens nowhere: sessions are handed to it.
        add("vnc", "none".into());
    }
    if config.kernel.is_some() {
        add("kernel", KERNEL.into());
        if config.ramdisk.is_some() {
            add("initrd", INITRD.into());
        }
        if !config.cmdline.is_empty() {
            add("append", config.cmdline.clone());
        }
    }
    if guest.restore.is_some() {
        args.extend(["-incoming", "defer"].map(str::to_owned));
    }
    args.extend(["-nodefaults", "-no-user-config", "-S"].map(str::to_owned));
    args
}

/// What leads the guest's own domain to QEMU's monitor.
pub fn monitor(control_socket: &str) -> Resource {
    Resource { name: "qmp".into(), kind: Kind::Connect.into(), path: control_socket.to_owned(), mode: 0 }
}

/// The file that a guest goes on from, for its own domain.
pub fn restored(guest: &Guest) -> Option<Resource> {
    let path = guest.restore.as_deref()?.display().to_string();
    Some(Resource { name: "restore".into(), kind: Kind::FileRo.into(), path, mode: 0 })
}

/// The file of its variables, whose length the guest's own domain looks at.
pub fn variables(config: &DomainFile) -> Option<Resource> {
    let path = uefi_vars(config)?.display().to_string();
    Some(Resource { name: "nvram".into(), kind: Kind::FileRo.into(), path, mode: 0 })
}

/// The name by which a device's backend knows the way to its frontend: also the value of its node.
pub fn vhost_resource(guest: &Uuid, kind: &str, id: u32) -> String {
    resource_of("vhost", &format!("{guest}/{kind}/{id}"))
}

/// What leads a device's backend to QEMU, which listens inside its own domain: its vhost-user NICs take no socket that was handed to it.
pub fn vhost_socket(guest: &Uuid, kind: &str, id: u32) -> Resource {
    let emulator = guest_uuid_text(&emulator_uuid(guest));
    Resource {
        name: vhost_resource(guest, kind, id),
        kind: Kind::Connect.into(),
        path: format!("inside:{emulator}:{kind}{id}"),
        mode: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(more: &str) -> Guest {
        let text = format!(
            "name = \"g\"\ntype = \"qemu\"\nmemory = 64\nkernel = \"/k\"\ncmdline = \"console=ttyS0\"\n\
             whole_memory = true\ndisk = [{{vdev = \"xvda\", path = \"/d\"}}]\n{more}"
        );
        Guest::new(DomainFile::parse(&text, "t").unwrap(), 0)
    }

    #[test]
    fn qemu_gets_what_it_needs_and_nothing_else() {
        let host = HostFile::parse("", "h").unwrap();
        let request = emulator(&host, &guest(""), false);
        assert!(request.paused && request.capabilities.is_empty() && request.resources.is_empty());
        assert!(request.binds.iter().all(|b| b.read_only));
        assert_eq!(request.binds.iter().filter(|b| b.executable).count(), 1);
        for word in ["-nodefaults", "-no-user-config", "-sandbox", "-S"] {
            assert!(request.args.iter().any(|a| a == word), "{word}");
        }
        let kvm = |more, can| emulator(&host, &guest(more), can).binds.iter().any(|b| b.target == "/dev/kvm");
        assert!(kvm("", true) && !kvm("", false));
        assert!(kvm("accel = \"kvm\"", false) && !kvm("accel = \"tcg\"", true));
    }

    #[test]
    fn uefi_has_its_variables_to_itself() {
        let host = HostFile::parse("", "h").unwrap();
        let request = emulator(&host, &guest("firmware = \"uefi\"\nnvram = \"/v\""), false);
        let own = variables(&guest("firmware = \"uefi\"\nnvram = \"/v\"").config).unwrap();
        assert_eq!((own.name.as_str(), own.path.as_str(), own.kind()), ("nvram", "/v", Kind::FileRo));
        assert_eq!(variables(&guest("").config), None);
        let bind = |target: &str| request.binds.iter().find(|b| b.target == target).cloned();
        assert!(
            bind(UEFI_CODE).is_some_and(|b| b.read_only && b.source == "/usr/share/OVMF/OVMF_CODE_4M.fd")
        );
        assert!(bind(UEFI_VARS).is_some_and(|b| !b.read_only && b.source == "/v"));
        assert_eq!(request.binds.iter().filter(|b| !b.read_only).count(), 1);
        assert!(request.args.iter().any(|a| a.contains("unit=0") && a.contains("readonly=on")));
        let refused = |more: &str| {
            let text = format!("name = \"g\"\ntype = \"qemu\"\nmemory = 64\nkernel = \"/k\"\n{more}");
            DomainFile::parse(&text, "t").unwrap_err().to_string()
        };
        assert!(refused("firmware = \"uefi\"").contains("needs nvram"));
        assert!(refused("nvram = \"/v\"").contains("is for firmware"));
    }

    #[test]
    fn backends_reach_the_guests_own_emulator() {
        let uuid = Uuid::from_u128(7);
        let socket = vhost_socket(&uuid, "vbd", 51712);
        assert_eq!(socket.path, format!("inside:{}:vbd51712", emulator_uuid(&uuid)));
        assert_eq!(socket.name, vhost_resource(&uuid, "vbd", 51712));
        assert_ne!(socket.name, vhost_resource(&uuid, "vif", 51712));
    }
}

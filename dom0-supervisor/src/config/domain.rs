//! The domain file: one guest. See `docs/domain-file.md`.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{ConfigError, DiskEntry, LimitsEntry, MOST_USB, Mac, Name, UsbEntry, UsbKind, text};

/// A domain file, checked. Serialised, it is also how the state file keeps a guest's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainFile {
    /// The guest's name.
    pub name: Name,
    /// What kind of guest.
    #[serde(rename = "type", default)]
    pub guest_type: GuestType,
    /// Stable identity; made at creation if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// PVH: kernel image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// PVH: initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramdisk: Option<PathBuf>,
    /// PVH: kernel command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// PVH: RAM in MiB, even.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// PVH: 1 to 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// QEMU: what runs its processors; chosen by what the host's can if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<Accel>,
    /// QEMU: the processors' model, as QEMU names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// QEMU: what the machine starts with; BIOS if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
    /// QEMU: UEFI's variables: this guest's own copy of the firmware's template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<PathBuf>,
    /// QEMU with UEFI: only what the keys in the variables trust is started.
    #[serde(default, skip_serializing_if = "is_no")]
    pub secure_boot: bool,
    /// QEMU: the machine; a PC with PCI if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineType>,
    /// QEMU: most RAM in MiB that `bh mem-set` can give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maxmem: Option<u64>,
    /// QEMU: most vCPUs that `bh vcpu-set` can give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maxvcpus: Option<u32>,
    /// QEMU: a USB controller.
    #[serde(default, skip_serializing_if = "is_no")]
    pub usb: bool,
    /// QEMU: USB devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub usbdev: Vec<UsbEntry>,
    /// QEMU: a display.
    #[serde(default, skip_serializing_if = "is_no")]
    pub display: bool,
    /// QEMU: its disks' and NICs' backends may see all of its memory.
    #[serde(default, skip_serializing_if = "is_no")]
    pub whole_memory: bool,
    /// Process guest: the statically linked program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,
    /// Process guest: its arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Process guest: KEY=VALUE.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<DiskEntry>,
    /// Network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vif: Vec<VifEntry>,
    /// What follows a power-off.
    #[serde(default = "destroy")]
    pub on_poweroff: OnEvent,
    /// What follows a reboot.
    #[serde(default = "restart")]
    pub on_reboot: OnEvent,
    /// What follows a crash of the guest or of its runner.
    #[serde(default = "destroy")]
    pub on_crash: OnEvent,
    /// Make it when the host starts, if the file is in the host file's `domain_dir`.
    #[serde(default)]
    pub autostart: bool,
    /// Limits of the runner.
    #[serde(default)]
    pub limits: LimitsEntry,
}

/// Slots of the emulated machine's PCI bus that are left for disks and NICs.
const QEMU_DEVICES: usize = 24;
/// Root ports of a q35 machine: one for each disk and NIC.
pub(crate) const Q35_PORTS: usize = 16;
/// Most vCPUs.
const MAX_VCPUS: u32 = 8;
/// Most RAM, MiB.
const MAX_MEMORY: u64 = 1 << 20;

/// What runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestType {
    /// A kernel on KVM, under hv-vcpu.
    #[default]
    Pvh,
    /// A process that uses the `frontends` crate.
    Process,
    /// A machine that QEMU emulates, under qemu-bridge.
    Qemu,
}

/// What runs a QEMU guest's processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The host's processors.
    Kvm,
    /// Software.
    Tcg,
}

/// What a QEMU guest's machine starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF.
    Uefi,
}

/// Which machine QEMU emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    /// A PC of the nineties, with PCI.
    Pc,
    /// One with PCI Express.
    Q35,
}

/// What is done after a guest's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnEvent {
    /// Everything of it is removed.
    Destroy,
    /// It is started again, in a new domain with the same uuid.
    Restart,
    /// It stays as it is, for looking at.
    Preserve,
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifecycle {
    /// It powered off.
    Poweroff,
    /// It wants to start again.
    Reboot,
    /// It crashed, or its runner did.
    Crash,
}

/// `[[vif]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VifEntry {
    /// A netback service of the host file.
    pub backend: Name,
    /// Its number in the guest; its place in the list if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devid: Option<u32>,
    /// Made from the guest's uuid if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The guest's addresses; it can use no others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ip: Vec<IpAddr>,
    /// Greatest IP packet, bytes; netback's default if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The guest may use any addresses if false.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub antispoof: bool,
    /// No packets to and from other guests.
    #[serde(default, skip_serializing_if = "is_no")]
    pub isolated: bool,
    /// Routed: DHCP requests of the guest are answered.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub dhcp: bool,
    /// Routed: IPv6 routers are advertised to the guest.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub ra: bool,
    /// The cable is pulled if false.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub link: bool,
    /// Bytes a second that the guest may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// Rules for what the guest sends, in Qubes' form.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub firewall: Vec<String>,
}

impl VifEntry {
    /// One at a backend, with nothing else said.
    pub fn of(backend: Name) -> VifEntry {
        VifEntry {
            backend,
            devid: None,
            mac: None,
            ip: Vec::new(),
            mtu: None,
            antispoof: true,
            isolated: false,
            dhcp: true,
            ra: true,
            link: true,
            rate: None,
            firewall: Vec::new(),
        }
    }

    /// One by itself: the keys of `[[vif]]` as TOML, one a line.
    ///
    /// # Errors
    /// One line.
    pub fn parse(text: &str) -> Result<VifEntry, ConfigError> {
        #[derive(Deserialize)]
        struct File {
            vif: VifEntry,
        }
        let file: File = super::text::parse(&format!("[vif]\n{text}"), "vif")?;
        Ok(file.vif)
    }

    /// As [`VifEntry::parse`] reads it.
    ///
    /// # Errors
    /// What cannot be written as TOML.
    pub fn to_text(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|e| ConfigError(e.to_string()))
    }
}

fn yes() -> bool {
    true
}
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_yes(value: &bool) -> bool {
    *value
}
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_no(value: &bool) -> bool {
    !*value
}

fn destroy() -> OnEvent {
    OnEvent::Destroy
}
fn restart() -> OnEvent {
    OnEvent::Restart
}

impl DomainFile {
    /// Takes the file's text; `source` is named in errors.
    ///
    /// # Errors
    /// One line, with the place for what TOML itself refuses.
    pub fn parse(text: &str, source: &str) -> Result<DomainFile, ConfigError> {
        let file: DomainFile = text::parse(text, source)?;
        file.check().map_err(|what| ConfigError::new(format!("{source}: {what}")))?;
        Ok(file)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        match self.guest_type {
            GuestType::Pvh => self.check_pvh()?,
            GuestType::Process => self.check_process()?,
            GuestType::Qemu => self.check_qemu()?,
        }
        self.check_qemu_alone()?;
        if self.disk.len() > 64 || self.vif.len() > 16 {
            return Err("at most 64 disks and 16 vifs".into());
        }
        let mut vdevs = std::collections::BTreeSet::new();
        for disk in &self.disk {
            let vdev = disk.vdev.name();
            if !vdevs.insert(disk.vdev.number()) {
                return Err(format!("disk {vdev} is there twice"));
            }
            disk.check()?;
        }
        for (index, vif) in self.vif.iter().enumerate() {
            if vif.mtu.is_some_and(|mtu| !(68..=65535).contains(&mtu)) {
                return Err(format!("vif {index}: mtu must be 68 to 65535"));
            }
            if vif.rate == Some(0) {
                return Err(format!("vif {index}: rate must not be 0; leave it out for no limit"));
            }
            // netback judges them, and says what is wrong with one.
            let bytes: usize = vif.firewall.iter().map(|rule| rule.len() + 1).sum();
            if bytes > 4000 || vif.firewall.iter().any(|rule| rule.contains('\n')) {
                return Err(format!(
                    "vif {index}: firewall rules are one line each and 4000 bytes together at most"
                ));
            }
            if vif.ip.len() > 64 {
                return Err(format!("vif {index}: at most 64 addresses"));
            }
        }
        let mut ids = std::collections::BTreeSet::new();
        for (index, vif) in self.vif.iter().enumerate() {
            let id = vif.devid.unwrap_or(index as u32);
            if id > 255 || !ids.insert(id) {
                return Err(format!(
                    "vif {index}: number {id} is there twice, or above 255; leave devid out"
                ));
            }
        }
        let mut macs = std::collections::BTreeSet::new();
        for mac in self.vif.iter().filter_map(|vif| vif.mac) {
            if !macs.insert(mac) {
                return Err(format!("mac {mac} is there twice; leave mac out to have one made"));
            }
        }
        Ok(())
    }

    fn check_pvh(&self) -> Result<(), String> {
        if self.kernel.is_none() {
            return Err("type \"pvh\" needs kernel".into());
        }
        self.check_kernel("pvh")
    }

    /// Kernel, memory and processors, as PVH and QEMU guests have them.
    fn check_kernel(&self, word: &str) -> Result<(), String> {
        for (key, path) in [("kernel", self.kernel.as_ref()), ("ramdisk", self.ramdisk.as_ref())] {
            if let Some(path) = path
                && !path.is_absolute()
            {
                return Err(format!("{key} {path:?} must be an absolute path"));
            }
        }
        match self.memory {
            None => return Err(format!("type \"{word}\" needs memory (MiB)")),
            Some(mib) if !(16..=1 << 20).contains(&mib) || mib % 2 != 0 => {
                return Err(format!("memory {mib} must be an even number of MiB from 16 to 1048576"));
            }
            Some(_) => {}
        }
        if !(1..=8).contains(&self.vcpus()) {
            return Err(format!("vcpus {} must be 1 to 8", self.vcpus()));
        }
        if self.cmdline.len() > 2047 || self.cmdline.contains(['\0', '\n']) {
            return Err("cmdline must be at most 2047 bytes and one line".into());
        }
        if self.program.is_some() || !self.args.is_empty() || !self.env.is_empty() {
            return Err("program, args and env are for type \"process\"".into());
        }
        Ok(())
    }

    fn check_qemu(&self) -> Result<(), String> {
        self.check_kernel("qemu")?;
        if self.kernel.is_none() && (self.ramdisk.is_some() || !self.cmdline.is_empty()) {
            return Err("ramdisk and cmdline need kernel".into());
        }
        if self.kernel.is_none() && self.disk.is_empty() {
            return Err("type \"qemu\" needs a kernel or a disk to boot from".into());
        }
        let devices = !self.disk.is_empty() || !self.vif.is_empty();
        if devices && !self.whole_memory {
            return Err(
                "a QEMU guest's backends see all of its memory; say whole_memory = true to allow that".into(),
            );
        }
        let odd = |c: char| !(c.is_ascii_alphanumeric() || "-_.,+=".contains(c));
        if self.cpu.as_deref().is_some_and(|cpu| cpu.is_empty() || cpu.len() > 500 || cpu.contains(odd)) {
            return Err(
                "cpu must be a model as QEMU names it, with +FEATURE and -FEATURE behind commas".into()
            );
        }
        match (self.firmware, &self.nvram) {
            (Some(Firmware::Uefi), Some(path)) if path.is_absolute() => {}
            (Some(Firmware::Uefi), _) => {
                return Err(
                    "firmware \"uefi\" needs nvram: an absolute path to this guest's own copy of the \
                     firmware's variables, as /usr/share/OVMF/OVMF_VARS_4M.fd"
                        .into(),
                );
            }
            (_, Some(_)) => return Err("nvram is for firmware \"uefi\"".into()),
            (_, None) => {}
        }
        let q35 = self.machine == Some(MachineType::Q35);
        if self.secure_boot && (!q35 || self.nvram.is_none()) {
            return Err(
                "secure_boot needs machine = \"q35\", firmware = \"uefi\" and nvram, at first a copy of \
                        /usr/share/OVMF/OVMF_VARS_4M.ms.fd"
                    .into(),
            );
        }
        let (many, room) = (self.disk.len() + self.vif.len(), if q35 { Q35_PORTS } else { QEMU_DEVICES });
        if many > room {
            return Err(format!("{many} disks and vifs; a QEMU guest of this machine has room for {room}"));
        }
        self.check_qemu_growth()
    }

    /// What can be plugged into a QEMU guest while it runs.
    fn check_qemu_growth(&self) -> Result<(), String> {
        let memory = self.memory.unwrap_or(0);
        if self
            .maxmem
            .is_some_and(|most| most < memory || most > MAX_MEMORY || !(most - memory).is_multiple_of(4))
        {
            return Err(format!(
                "maxmem must be at least memory ({memory}), at most {MAX_MEMORY}, and differ from it by a multiple of 4 MiB"
            ));
        }
        if self.maxvcpus.is_some_and(|most| most < self.vcpus() || most > MAX_VCPUS) {
            return Err(format!("maxvcpus must be {} (vcpus) to {MAX_VCPUS}", self.vcpus()));
        }
        if self.usbdev.iter().any(|e| e.kind != UsbKind::Qdisk) && !self.usb {
            return Err("usbdev needs usb = true".into());
        }
        if self.usbdev.len() > MOST_USB {
            return Err(format!("at most {MOST_USB} USB devices"));
        }
        for (index, entry) in self.usbdev.iter().enumerate() {
            entry.check()?;
            if self.usbdev[..index].iter().any(|other| other.id == entry.id) {
                return Err(format!("usbdev {} is there twice", entry.id));
            }
        }
        Ok(())
    }

    fn check_qemu_alone(&self) -> Result<(), String> {
        let any = self.accel.is_some() || self.cpu.is_some() || self.display || self.whole_memory;
        let any = any || self.firmware.is_some() || self.nvram.is_some() || self.secure_boot || self.usb;
        let any = any || self.machine.is_some() || self.maxmem.is_some() || self.maxvcpus.is_some();
        if (any || !self.usbdev.is_empty()) && self.guest_type != GuestType::Qemu {
            return Err("accel, cpu, display, firmware, machine, maxmem, maxvcpus, nvram, secure_boot, usb, usbdev and \
                        whole_memory are for type \"qemu\""
                .into());
        }
        Ok(())
    }

    fn check_process(&self) -> Result<(), String> {
        match &self.program {
            None => return Err("type \"process\" needs program".into()),
            Some(path) if !path.is_absolute() => {
                return Err(format!("program {path:?} must be an absolute path"));
            }
            Some(_) => {}
        }
        if self.kernel.is_some() || self.ramdisk.is_some() || !self.cmdline.is_empty() {
            return Err("kernel, ramdisk and cmdline are for types \"pvh\" and \"qemu\"".into());
        }
        if self.memory.is_some() || self.vcpus.is_some() {
            return Err("memory and vcpus are for types \"pvh\" and \"qemu\"; use limits.memory".into());
        }
        if self.env.iter().any(|e| !e.contains('=') || e.contains('\0')) {
            return Err("env entries must be KEY=VALUE".into());
        }
        if self.args.iter().any(|a| a.contains('\0')) {
            return Err("args must not hold a nul byte".into());
        }
        Ok(())
    }

    /// vCPUs, 1 if not said.
    pub fn vcpus(&self) -> u32 {
        self.vcpus.unwrap_or(1)
    }

    /// Most vCPUs.
    pub fn maxvcpus(&self) -> u32 {
        self.maxvcpus.unwrap_or_else(|| self.vcpus())
    }

    /// Most RAM in MiB.
    pub fn maxmem(&self) -> u64 {
        self.maxmem.or(self.memory).unwrap_or(0)
    }

    /// RAM in bytes; 0 for process guests.
    pub fn ram_bytes(&self) -> u64 {
        self.memory.unwrap_or(0) << 20
    }

    /// What this guest wants after such an end.
    pub fn action(&self, end: Lifecycle) -> OnEvent {
        match end {
            Lifecycle::Poweroff => self.on_poweroff,
            Lifecycle::Reboot => self.on_reboot,
            Lifecycle::Crash => self.on_crash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<DomainFile, String> {
        DomainFile::parse(text, "d.toml").map_err(|e| e.0)
    }

    #[test]
    fn the_examples_are_valid() {
        let pvh = parse(include_str!("../../../deploy/examples/debian.toml")).unwrap();
        assert_eq!(pvh.guest_type, GuestType::Pvh);
        assert!(!pvh.disk.is_empty() && !pvh.vif.is_empty());
        let process = parse(include_str!("../../../deploy/examples/process-guest.toml")).unwrap();
        assert_eq!(process.guest_type, GuestType::Process);
    }

    #[test]
    fn what_is_kept_reads_back() {
        let file = parse(include_str!("../../../deploy/examples/debian.toml")).unwrap();
        let json = serde_json::to_string(&file).unwrap();
        assert_eq!(serde_json::from_str::<DomainFile>(&json).unwrap(), file);
    }

    #[test]
    fn mistakes_are_one_line() {
        let pvh = "name = \"g\"\nkernel = \"/k\"\nmemory = 64\n";
        for (rest, want) in [
            ("vcpu = 2", "d.toml:4:1: unknown field `vcpu`"),
            ("vcpus = 9", "1 to 8"),
            ("memory = 3", "duplicate key"),
            ("program = \"/p\"", "for type \"process\""),
            ("type = \"hvm\"", "d.toml:4:8"),
            ("[[disk]]\nvdev = \"sda\"\npath = \"/x\"", "d.toml:5:8: vdev \"sda\""),
            ("[[disk]]\nvdev = \"xvda\"", "either backend or path"),
            ("[[disk]]\nvdev = \"xvda\"\npath = \"/x\"\nbackend = \"b\"", "either backend or path"),
            ("[[disk]]\nvdev = \"xvda\"\npath = \"x\"", "absolute"),
            ("disk = [{vdev = \"xvda\", path = \"/x\"}, {vdev = \"xvda\", path = \"/y\"}]", "twice"),
            (
                "vif = [{backend = \"n\", mac = \"00:16:3e:00:00:01\"}, {backend = \"n\", mac = \"00:16:3E:00:00:01\"}]",
                "twice",
            ),
            ("[[vif]]\nbackend = \"n\"\nmac = \"1\"", "d.toml:6:7: mac"),
        ] {
            let e = parse(&format!("{pvh}{rest}")).unwrap_err();
            assert!(e.contains(want) && !e.contains('\n'), "{rest:?}: {e}");
        }
        assert!(parse("name = \"g\"").unwrap_err().contains("needs kernel"));
        assert!(parse("name = \"g\"\nkernel = \"k\"\nmemory = 64").unwrap_err().contains("absolute"));
        assert!(parse("name = \"g\"\ntype = \"process\"").unwrap_err().contains("needs program"));
        assert!(parse("name = \"7\"\nkernel = \"/k\"").unwrap_err().starts_with("d.toml:1:8: name \"7\""));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[ -~\\n]{0,200}") {
            if let Err(e) = parse(&text) {
                prop_assert!(!e.contains('\n'));
            }
        }
    }
}

//! Compares every struct and constant of this crate with Xen's C headers, where those (Debian: `libxen-dev`) and
//! a C compiler are installed. Where not, the `const` assertions inside the crate are all there is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use xen_abi::io::{blkif, netif, ring};
use xen_abi::*;

/// A struct's C name, header, size and fields.
type Layout = (&'static str, &'static str, usize, &'static [(&'static str, usize, usize)]);

macro_rules! layouts {
    ($($ty:path),* $(,)?) => {
        &[$((<$ty as CLayout>::C_NAME, <$ty as CLayout>::HEADER, size_of::<$ty>(), <$ty as CLayout>::FIELDS)),*]
    };
}

const STRUCTS: &[Layout] = layouts![
    xen::VcpuTimeInfo,
    xen::ArchVcpuInfo,
    xen::VcpuInfo,
    xen::ArchSharedInfo,
    xen::SharedInfo,
    xen::MulticallEntry,
    version::XenCompileInfo,
    version::XenPlatformParameters,
    version::XenFeatureInfo,
    version::XenBuildId,
    start_info::HvmStartInfo,
    start_info::HvmModlistEntry,
    start_info::HvmMemmapTableEntry,
    hvm::XenHvmParam,
    hvm::XenHvmEvtchnUpcallVector,
    hvm::XenHvmGetTime,
    hvm::XenHvmGetMemType,
    hvm::XenHvmPagetableDying,
    memory::XenMemoryReservation,
    memory::XenMemoryDomain,
    memory::XenAddToPhysmap,
    memory::XenAddToPhysmapBatch,
    memory::XenRemoveFromPhysmap,
    memory::XenMemoryMap,
    memory::XenPodTarget,
    memory::XenMachphysMapping,
    event_channel::EvtchnAllocUnbound,
    event_channel::EvtchnBindInterdomain,
    event_channel::EvtchnBindVirq,
    event_channel::EvtchnBindPirq,
    event_channel::EvtchnBindIpi,
    event_channel::EvtchnClose,
    event_channel::EvtchnSend,
    event_channel::EvtchnStatus,
    event_channel::EvtchnBindVcpu,
    event_channel::EvtchnUnmask,
    event_channel::EvtchnReset,
    event_channel::EvtchnInitControl,
    event_channel::EvtchnExpandArray,
    event_channel::EvtchnSetPriority,
    grant_table::GrantEntryV1,
    grant_table::GnttabMapGrantRef,
    grant_table::GnttabUnmapGrantRef,
    grant_table::GnttabSetupTable,
    grant_table::GnttabCopyPtr,
    grant_table::GnttabCopy,
    grant_table::GnttabQuerySize,
    grant_table::GnttabSetVersion,
    grant_table::GnttabGetVersion,
    physdev::PhysdevEoi,
    physdev::PhysdevIrqStatusQuery,
    physdev::PhysdevMapPirq,
    physdev::PhysdevUnmapPirq,
    physdev::PhysdevGetFreePirq,
    sched::SchedShutdown,
    sched::SchedPoll,
    sched::SchedRemoteShutdown,
    sched::SchedWatchdog,
    vcpu::VcpuRunstateInfo,
    vcpu::VcpuRegisterRunstateMemoryArea,
    vcpu::VcpuRegisterTimeMemoryArea,
    vcpu::VcpuSetPeriodicTimer,
    vcpu::VcpuSetSingleshotTimer,
    vcpu::VcpuRegisterVcpuInfo,
    vcpu::VcpuGetPhysid,
    console::XenconsInterface,
    xs_wire::XsdSockmsg,
    xs_wire::XenstoreDomainInterface,
    blkif::BlkifRequestSegment,
    blkif::BlkifRequest,
    blkif::BlkifRequestDiscard,
    blkif::BlkifRequestIndirect,
    blkif::BlkifResponse,
    netif::NetifTxRequest,
    netif::NetifTxResponse,
    netif::NetifRxRequest,
    netif::NetifRxResponse,
    netif::NetifExtraInfo,
    netif::XenNetifCtrlRequest,
    netif::XenNetifCtrlResponse,
    netif::XenNetifGref,
];

/// As a 32-bit x86 frontend sees them.
const STRUCTS_32: &[Layout] = layouts![
    blkif::BlkifRequestSegment,
    blkif::x86_32::BlkifRequest32,
    blkif::x86_32::BlkifRequestDiscard32,
    blkif::x86_32::BlkifRequestIndirect32,
    blkif::x86_32::BlkifResponse32,
    netif::NetifTxRequest,
    netif::NetifTxResponse,
    netif::NetifRxRequest,
    netif::NetifRxResponse,
    netif::NetifExtraInfo,
];

/// The header with xenstore's requests.
const XS_WIRE_H: &str = "/usr/include/xen/io/xs_wire.h";
/// Requests that came after Xen 4.17.
const XS_NEWER_THAN_4_17: [&str; 4] = ["XS_GET_FEATURE", "XS_SET_FEATURE", "XS_GET_QUOTA", "XS_SET_QUOTA"];

/// Constants that are macros in C, so that one a header lacks can be told.
const MACROS: &[&[(&str, i128)]] = &[
    xen::C_CONSTS,
    version::C_CONSTS,
    features::C_CONSTS,
    elfnote::C_CONSTS,
    event_channel::C_CONSTS,
    grant_table::C_CONSTS,
    start_info::C_CONSTS,
    hvm::HVMOP_C_CONSTS,
    hvm::C_CONSTS,
    memory::C_CONSTS,
    physdev::C_CONSTS,
    sched::C_CONSTS,
    vcpu::C_CONSTS,
    console::C_CONSTS,
    cpuid::C_CONSTS,
    blkif::C_CONSTS,
    netif::C_CONSTS,
];

/// Pages that later versions of Xen add fields to, at the end.
const GROWING: [&str; 2] = ["struct xencons_interface", "struct xenstore_domain_interface"];

/// The tools' view of the interface version that has every struct used here in its present form.
const PROLOGUE: &str = "#define __XEN_TOOLS__ 1\n#define __XEN_INTERFACE_VERSION__ 0x00040e00\n";

const HEADERS: [&str; 22] = [
    "xen.h",
    "version.h",
    "features.h",
    "elfnote.h",
    "errno.h",
    "event_channel.h",
    "grant_table.h",
    "memory.h",
    "physdev.h",
    "sched.h",
    "vcpu.h",
    "hvm/hvm_op.h",
    "hvm/params.h",
    "arch-x86/cpuid.h",
    "arch-x86/hvm/start_info.h",
    "io/ring.h",
    "io/console.h",
    "io/xs_wire.h",
    "io/xenbus.h",
    "io/blkif.h",
    "io/netif.h",
    "io/protocols.h",
];

fn includes(out: &mut String, headers: &[&str]) {
    for header in headers {
        writeln!(out, "#include <xen/{header}>").unwrap();
    }
}

/// What the program has to print: a line's key and our value.
struct Wanted {
    program: String,
    values: BTreeMap<String, i128>,
}

impl Wanted {
    fn expect(&mut self, key: String, expression: &str, value: i128) {
        writeln!(self.program, "    P(\"{key}\", {expression});").unwrap();
        assert!(self.values.insert(key.clone(), value).is_none(), "{key} is listed twice");
    }

    fn usize(&mut self, key: String, expression: &str, value: usize) {
        self.expect(key, expression, value as i128);
    }
}

fn wanted() -> Wanted {
    let mut wanted = Wanted { program: String::from(PROLOGUE), values: BTreeMap::new() };
    let out = &mut wanted.program;
    out.push_str("#include <stdio.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <string.h>\n");
    // xs_wire.h has its table of errors only if the system's errno.h came first.
    out.push_str("#include <errno.h>\n");
    includes(out, &HEADERS);
    out.push_str(
        "#define P(key, v) ((v) < 0 ? printf(\"%s=%lld\\n\", key, (long long)(v)) \
         : printf(\"%s=%llu\\n\", key, (unsigned long long)(v)))\n\
         int main(void) {\n",
    );
    for &(c_name, _, size, fields) in STRUCTS {
        wanted.usize(format!("sizeof {c_name}"), &format!("sizeof({c_name})"), size);
        for &(field, offset, bytes) in fields.iter().filter(|(field, ..)| !field.starts_with('_')) {
            wanted.usize(
                format!("offsetof {c_name} {field}"),
                &format!("offsetof({c_name}, {field})"),
                offset,
            );
            let expression = format!("sizeof((({c_name} *)0)->{field})");
            wanted.usize(format!("sizeof {c_name} {field}"), &expression, bytes);
        }
    }
    for &(name, value) in MACROS.iter().copied().flatten() {
        writeln!(wanted.program, "#ifdef {name}").unwrap();
        wanted.expect(name.to_string(), name, value);
        wanted.program.push_str("#endif\n");
    }
    for &(name, value) in errno::C_CONSTS {
        wanted.expect(name.to_string(), name, value);
    }
    for &(name, value) in xs_wire::C_CONSTS {
        wanted.expect(name.to_string(), name, value);
    }
    // Enumerators, which the preprocessor can't ask for: Xen 4.17's header lacks the newest requests.
    let header = std::fs::read_to_string(XS_WIRE_H).unwrap_or_default();
    let newer = |name: &str| XS_NEWER_THAN_4_17.contains(&name) && !header.contains(name);
    for message in xs_wire::XsMsgType::ALL.iter().filter(|m| !newer(m.c_name())) {
        wanted.expect(message.c_name().to_string(), message.c_name(), message.raw().into());
    }
    for state in xenbus::XenbusState::ALL {
        wanted.expect(state.c_name().to_string(), state.c_name(), state.raw().into());
    }
    let count = "sizeof(xsd_errors) / sizeof(xsd_errors[0])";
    wanted.usize("xsd_errors".into(), count, xs_wire::XSD_ERRORS.len());
    for (i, (number, name)) in xs_wire::XSD_ERRORS.into_iter().enumerate() {
        wanted.expect(format!("xsd_errors {i}"), &format!("xsd_errors[{i}].errnum"), number.into());
        let same = format!("strcmp(xsd_errors[{i}].errstring, \"{name}\")");
        wanted.expect(format!("xsd_errors {i} {name}"), &same, 0);
    }
    for (name, entry) in [
        ("blkif", blkif::Abi::X86_64.entry_size()),
        ("netif_tx", netif::TX_ENTRY_SIZE),
        ("netif_rx", netif::RX_ENTRY_SIZE),
        ("xen_netif_ctrl", netif::CTRL_ENTRY_SIZE),
    ] {
        let sring = format!("struct {name}_sring");
        for (field, offset) in [
            ("req_prod", ring::REQ_PROD_OFFSET),
            ("req_event", ring::REQ_EVENT_OFFSET),
            ("rsp_prod", ring::RSP_PROD_OFFSET),
            ("rsp_event", ring::RSP_EVENT_OFFSET),
            ("ring", ring::RING_OFFSET),
        ] {
            wanted.usize(format!("{sring} {field}"), &format!("offsetof({sring}, {field})"), offset);
        }
        wanted.usize(format!("{name} entry"), &format!("sizeof(union {name}_sring_entry)"), entry);
        for pages in [1, 2, 4, 16] {
            let expression = format!("__CONST_RING_SIZE({name}, {})", pages * PAGE_SIZE);
            wanted.expect(format!("{name} {pages} pages"), &expression, ring::ring_size(pages, entry).into());
        }
    }
    for abi in [blkif::Abi::X86_64, blkif::Abi::X86_32] {
        let name = if abi == blkif::Abi::X86_64 { "X86_64" } else { "X86_32" };
        let same = format!("strcmp(XEN_IO_PROTO_ABI_{name}, \"{}\")", abi.protocol());
        wanted.expect(format!("protocol {name}"), &same, 0);
    }
    for (name, value) in [
        ("XEN_EXTRAVERSION_LEN", version::XEN_EXTRAVERSION_LEN),
        ("XEN_CAPABILITIES_INFO_LEN", version::XEN_CAPABILITIES_INFO_LEN),
        ("XEN_CHANGESET_INFO_LEN", version::XEN_CHANGESET_INFO_LEN),
        ("sizeof(xen_commandline_t)", version::XEN_COMMANDLINE_LEN),
        ("SIF_INITDOMAIN", start_info::SIF_INITDOMAIN as usize),
        ("EVTCHN_2L_NR_CHANNELS", xen::EVTCHN_2L_NR_CHANNELS as usize),
    ] {
        wanted.usize(name.to_string(), name, value);
    }
    wanted.program.push_str("    return 0;\n}\n");
    wanted
}

/// The compiler, if it and the headers are there.
fn compiler() -> Option<&'static str> {
    let found =
        ["cc", "gcc", "clang"].into_iter().find(|cc| Command::new(cc).arg("--version").output().is_ok());
    if !Path::new("/usr/include/xen/xen.h").exists() {
        println!("libxen-dev headers not installed: constants only");
        return None;
    }
    if found.is_none() {
        println!("no C compiler installed: constants only");
    }
    found
}

#[test]
fn x86_64_matches_the_c_headers() {
    let Some(cc) = compiler() else { return };
    let wanted = wanted();
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("layout.c"), dir.path().join("layout"));
    std::fs::write(&source, &wanted.program).unwrap();
    let built =
        Command::new(cc).args(["-std=gnu11", "-w", "-o"]).arg(&program).arg(&source).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let printed = Command::new(&program).output().unwrap();
    assert!(printed.status.success());

    let mut found = BTreeMap::new();
    for line in String::from_utf8(printed.stdout).unwrap().lines() {
        let (key, value) = line.rsplit_once('=').unwrap();
        found.insert(key.to_string(), value.parse::<i128>().unwrap());
    }
    let mut wrong = Vec::new();
    let mut missing = Vec::new();
    for (key, ours) in &wanted.values {
        let may_grow = GROWING.iter().any(|name| *key == format!("sizeof {name}"));
        match found.get(key) {
            None => missing.push(key),
            Some(theirs) if may_grow && theirs >= ours && *theirs <= PAGE_SIZE as i128 => {}
            Some(theirs) if theirs != ours => wrong.push(format!("{key}: ours {ours}, C {theirs}")),
            Some(_) => {}
        }
    }
    println!("{} values compared with the C headers; not in these headers: {missing:?}", found.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Headers may drop or not have a name or two; more would mean that the comparison is broken.
    assert!(missing.len() <= 10, "{missing:?}");
}

#[test]
fn x86_32_matches_the_c_headers() {
    let Some(cc) = compiler() else { return };
    // Only compiled: a 32-bit C library need not be there.
    let mut source = String::from(PROLOGUE);
    source.push_str("#include <stddef.h>\n#include <stdint.h>\n");
    includes(&mut source, &["xen.h", "io/blkif.h", "io/netif.h"]);
    let mut check = |expression: &str, ours: usize| {
        writeln!(source, "_Static_assert({expression} == {ours}, \"{expression}\");").unwrap();
    };
    for &(c_name, _, size, fields) in STRUCTS_32 {
        check(&format!("sizeof({c_name})"), size);
        for &(field, offset, bytes) in fields.iter().filter(|(field, ..)| !field.starts_with('_')) {
            check(&format!("offsetof({c_name}, {field})"), offset);
            check(&format!("sizeof((({c_name} *)0)->{field})"), bytes);
        }
    }
    check("sizeof(union blkif_sring_entry)", blkif::Abi::X86_32.entry_size());
    check("__CONST_RING_SIZE(blkif, 4096)", ring::ring_size(1, blkif::Abi::X86_32.entry_size()) as usize);
    let dir = tempfile::tempdir().unwrap();
    let flags = ["-m32", "-std=gnu11", "-ffreestanding", "-w", "-fsyntax-only"];
    let run = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        Command::new(cc).args(flags).arg(&path).output().unwrap()
    };
    if !run("empty.c", "int x;\n").status.success() {
        println!("the C compiler has no -m32: constants only");
        return;
    }
    let built = run("layout32.c", &source);
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

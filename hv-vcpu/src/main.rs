//! Runs one unmodified PVH guest on KVM with Xen's guest ABI.
//!
//! Two ways to run: `--domain`, as a process domain that hv-core started, and `--lone`, without hv-core, for
//! bringing up kernels. See the crate's README.

use anyhow::{Context, bail};
use clap::Parser;
use domain_kit::Domain;
use hv_vcpu::domain::HvCore;
use hv_vcpu::hypervisor::{Hypervisor, ShutdownReason};
use hv_vcpu::kvm::{self, KvmError};
use hv_vcpu::layout::{self, Layout};
use hv_vcpu::lone::Lone;
use hv_vcpu::mem::{GuestMemory, SharedPages};
use hv_vcpu::run::{Config, Ring, prepare};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

/// Exit status of a guest that a fault of nested emulation ended: nothing can be said of such a run.
const EXIT_EMULATOR_FAULT: i32 = 30;
/// Where the lab looks for such faults.
const EMULATOR_FAULT_FILE: &str = "/run/lab/emulator-fault";
/// Grant frames of a lone guest.
const LONE_GRANT_FRAMES: u64 = 32;

/// Runs one unmodified PVH guest on KVM with Xen's guest ABI.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Run as a process domain of hv-core: kernel, initrd and KVM come as resources, memory from hv-core.
    #[arg(long, conflicts_with = "lone", required_unless_present_any = ["lone", "probe"])]
    domain: bool,
    /// Only tell whether this machine can run a guest: exit status 0, or 1 and one line that says why not.
    #[arg(long, conflicts_with_all = ["lone", "domain"])]
    probe: bool,
    /// Run without hv-core: own memory, no devices, the console goes to stdout.
    #[arg(long)]
    lone: bool,
    /// The kernel (ELF with a PVH note, or bzImage); with --domain the name of the resource.
    #[arg(long, default_value = "kernel")]
    kernel: PathBuf,
    /// The initial RAM disk; with --domain the name of the resource (default: "initrd", if there is one).
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, default_value = "console=hvc0")]
    cmdline: String,
    /// RAM of a lone guest: bytes, or with the suffix K, M or G.
    #[arg(long, default_value = "256M", value_parser = parse_size)]
    memory: u64,
    /// How many vCPUs (1 to 8).
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// With --domain: the name of the resource that is /dev/kvm.
    #[arg(long, default_value = "kvm")]
    kvm: String,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("`{text}` is no size; write it like 256M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is too large"))
}

fn main() {
    let args = Args::parse();
    kvm::look::block_signal();
    let result = match () {
        () if args.probe => probe(),
        () if args.lone => run_lone(&args),
        () => run_domain(&args),
    };
    match result {
        Ok(status) => std::process::exit(status),
        Err(e) => {
            eprintln!("hv-vcpu: {e:#}");
            std::process::exit(1);
        }
    }
}

/// Says why the guest ended, and gives the exit status.
fn report(end: &kvm::vcpu::End, domid: u16) -> i32 {
    match &end.detail {
        Some(detail) => tracing::error!(domid, reason = ?end.reason, "{detail}"),
        None => tracing::info!(domid, reason = ?end.reason, "the guest ended"),
    }
    if end.emulator_fault {
        return EXIT_EMULATOR_FAULT;
    }
    end.reason.exit_code()
}

/// Opens the KVM device of a machine that has one worth using.
fn open_kvm() -> Result<kvm_ioctls::Kvm, KvmError> {
    kvm::check_hardware()?;
    let device = File::options().read(true).write(true).open("/dev/kvm").map_err(KvmError::NoDevice)?;
    Ok(kvm::ioctl::kvm_from_fd(device.into()))
}

fn probe() -> anyhow::Result<i32> {
    kvm::check_xen(&open_kvm()?)?;
    println!("this machine can run PVH guests");
    Ok(0)
}

fn run_lone(args: &Args) -> anyhow::Result<i32> {
    domain_kit::domain::init_logging("hv-vcpu");
    let open = |path: &PathBuf, what: &str| {
        File::open(path).with_context(|| format!("{what} {} can't be opened", path.display()))
    };
    let config = Config {
        kernel: open(&args.kernel, "kernel")?,
        initrd: args.initrd.as_ref().map(|p| open(p, "initrd")).transpose()?,
        cmdline: args.cmdline.clone(),
        vcpus: args.vcpus,
        memory: args.memory,
        uuid: [0; 16],
    };
    config.check()?;
    let kvm = open_kvm()?;

    let mem: &'static GuestMemory =
        Box::leak(Box::new(GuestMemory::anonymous(&Layout::new(args.memory).ram())?));
    let grants: &'static SharedPages = Box::leak(Box::new(SharedPages::new("grants", LONE_GRANT_FRAMES)?));
    let hv: &'static Lone = Box::leak(Box::default());
    let prepared = prepare(&kvm, &config, mem, grants, hv)?;
    let (_, port) = prepared.add_ring(Ring::Console, 0)?;
    let console = prepared.guest.layout.console_gfn();
    hv.drain_console(mem, console, port).context("console")?;
    prepared.load(&config)?;

    let end = prepared.run()?;
    hv_vcpu::lone::drain(mem, console * hv_vcpu::mem::PAGE_SIZE);
    if end.emulator_fault && std::env::var_os("BH_LAB").is_some() {
        let _ = std::fs::write(EMULATOR_FAULT_FILE, end.detail.as_deref().unwrap_or_default());
    }
    Ok(report(&end, hv.domid()))
}

fn run_domain(args: &Args) -> anyhow::Result<i32> {
    let domain = Domain::join("hv-vcpu")?;
    let hello = domain.hello;
    let hv: &'static HvCore = Box::leak(Box::new(HvCore::new(domain)));
    let end = match start_domain(args, hv, &hello) {
        Ok(end) => end,
        Err(e) => {
            // It would fail in the same way again: the domain is over, and dom0 is told so.
            tracing::error!(domid = hello.domid, "the guest can't be started: {e:#}");
            let _ = hv.hypercall().shutdown(ShutdownReason::Crash.raw());
            return Err(e);
        }
    };
    let status = report(&end, hello.domid);
    hv.hypercall().shutdown(end.reason.raw()).context("hv-core was not told of the guest's end")?;
    Ok(status)
}

fn start_domain(
    args: &Args,
    hv: &'static HvCore,
    hello: &hv_abi::HelloRep,
) -> anyhow::Result<kvm::vcpu::End> {
    let began = Instant::now();
    let call = hv.hypercall();
    let resource = |name: &str| -> anyhow::Result<OwnedFd> {
        Ok(call.resource_open(name).with_context(|| format!("resource `{name}` of the domain"))?.1)
    };
    let name = |path: &PathBuf| path.to_string_lossy().into_owned();
    let initrd = match &args.initrd {
        Some(path) => Some(resource(&name(path))?),
        None => call.resource_open("initrd").ok().map(|(_, fd)| fd),
    };
    let (info, ram, frames) = call.ram_fetch().context("guest memory from hv-core")?;
    let layout = Layout::new(info.ram_bytes);
    let config = Config {
        kernel: resource(&name(&args.kernel))?.into(),
        initrd: initrd.map(File::from),
        cmdline: args.cmdline.clone(),
        vcpus: args.vcpus,
        memory: info.ram_bytes,
        uuid: hello.uuid,
    };
    config.check()?;
    if info.low_bytes != layout.low_end() || layout::HOLE_END != hv_abi::HIGH_RAM_START {
        bail!(
            "hv-core lays guest RAM out differently ({} bytes below 4 GiB); use one version of both",
            info.low_bytes
        );
    }
    kvm::check_hardware()?;
    let device = call.resource_open(&args.kvm).map_err(|e| KvmError::NoDevice(std::io::Error::other(e)))?.1;
    let kvm = kvm::ioctl::kvm_from_fd(device);

    let mem: &'static GuestMemory = Box::leak(Box::new(GuestMemory::from_file(ram.into(), &layout.ram())?));
    let grants: &'static SharedPages =
        Box::leak(Box::new(SharedPages::from_file(frames.into(), info.grant_frames.into())?));
    let prepared = prepare(&kvm, &config, mem, grants, hv)?;
    if hello.xenstore_domid != hv_abi::DOMID_INVALID {
        let (gref, port) = prepared.add_ring(Ring::Store, hello.xenstore_domid)?;
        call.set_store_ring(gref, port).context("announcing the xenstore ring")?;
    }
    if hello.console_domid != hv_abi::DOMID_INVALID {
        let (gref, port) = prepared.add_ring(Ring::Console, hello.console_domid)?;
        call.set_console_ring(gref, port).context("announcing the console ring")?;
    }
    let vm_ms = began.elapsed().as_millis() as u64;
    prepared.load(&config)?;
    // dom0 takes it as the sign that there is a guest.
    call.served().context("telling hv-core that the guest starts")?;
    tracing::info!(
        domid = hello.domid,
        vcpus = args.vcpus,
        memory_mib = info.ram_bytes >> 20,
        vm_ms,
        load_ms = began.elapsed().as_millis() as u64 - vm_ms,
        "the guest starts"
    );
    Ok(prepared.run()?)
}

//! `bh`: the command line of a Bulkhead host. See `docs/bh.md`.

mod block;
mod capture;
mod client;
mod commands;
mod console;
mod json;
mod network;
mod pcapng;
mod rules;
mod save;
mod store;
mod table;
mod usb;
mod vnc;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use client::Failure;
use dom0_supervisor::config::Name;

/// Manages guests and services of a Bulkhead host.
#[derive(Debug, Parser)]
#[command(name = "bh", version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Args {
    /// Socket of dom0.
    #[arg(long, global = true, default_value = "/run/bulkhead/dom0.sock")]
    socket: PathBuf,
    /// Print JSON instead of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit status: 0 done, 1 failed, 2 wrong input, 3 no such guest or service, 4 dom0 does not answer, \
5 not done in time, 6 exists or busy.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Guests.
    List {
        /// Only this one (name, domid or uuid), with its devices.
        guest: Option<String>,
    },
    /// Make and start a guest from a domain file.
    Create {
        /// The domain file; - for standard input.
        file: PathBuf,
    },
    /// Ask a guest to power off.
    Shutdown {
        /// Name, domid or uuid.
        guest: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Ask a guest to reboot.
    Reboot {
        /// Name, domid or uuid.
        guest: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// End a guest at once.
    Destroy {
        /// Name, domid or uuid.
        guest: String,
    },
    /// Stop the processors of a QEMU guest.
    Pause {
        /// Name, domid or uuid.
        guest: String,
    },
    /// Let a paused guest go on.
    Unpause {
        /// Name, domid or uuid.
        guest: String,
    },
    /// Reset a QEMU guest in place, as by its reset button.
    Reset {
        /// Name, domid or uuid.
        guest: String,
    },
    /// Save a QEMU guest, its memory and configuration into a file.
    Save {
        #[command(flatten)]
        wanted: save::Wanted,
    },
    /// Make a guest that goes on from where it was saved.
    Restore {
        /// The file.
        file: PathBuf,
    },
    /// What a QEMU guest's display shows, as a PNG file.
    Screenshot {
        /// Name, domid or uuid.
        guest: String,
        /// The file.
        file: PathBuf,
    },
    /// USB devices of a QEMU guest.
    UsbList {
        /// Name, domid or uuid.
        guest: String,
    },
    /// Give a running QEMU guest a USB device.
    UsbAttach {
        /// Name, domid or uuid.
        guest: String,
        #[command(flatten)]
        wanted: usb::Wanted,
    },
    /// Take a USB device from a running QEMU guest.
    UsbDetach {
        /// Name, domid or uuid.
        guest: String,
        /// As bh usb-list shows it.
        id: String,
    },
    /// Give a running QEMU guest more or less memory.
    MemSet {
        /// Name, domid or uuid.
        guest: String,
        /// MiB, or with m, g or t behind it.
        #[arg(value_parser = usb::mib)]
        memory: u64,
    },
    /// Give a running QEMU guest more or fewer processors.
    VcpuSet {
        /// Name, domid or uuid.
        guest: String,
        /// How many.
        #[arg(value_parser = clap::value_parser!(u32).range(1..))]
        count: u32,
    },
    /// A QEMU guest's display, in a viewer that is started, or at a socket for one.
    #[command(alias = "vncviewer")]
    Vnc {
        /// Name, domid or uuid.
        guest: String,
        /// Start no viewer; have them connect to this Unix socket, which is made here and is the caller's alone.
        #[arg(long, value_name = "PATH")]
        listen: Option<PathBuf>,
        /// The viewer; it is given the path of a Unix socket.
        #[arg(long, value_name = "PROGRAM", default_value = "vncviewer", conflicts_with = "listen")]
        viewer: PathBuf,
    },
    /// A guest's console. Ctrl-] leaves it.
    Console {
        /// Name, domid or uuid.
        guest: String,
        /// Print what is kept and end.
        #[arg(long)]
        log: bool,
    },
    /// Disks of a guest.
    BlockList {
        /// Name, domid or uuid.
        guest: String,
    },
    /// Give a running guest a disk.
    BlockAttach {
        /// Name, domid or uuid.
        guest: String,
        /// The disk as in xl: TARGET,FORMAT,VDEV,ACCESS or key=value, or {…} with the keys of `[[disk]]`. Several are put together.
        #[arg(required = true)]
        disk: Vec<String>,
    },
    /// Take a disk from a running guest.
    BlockDetach {
        /// Name, domid or uuid.
        guest: String,
        /// As xvdb.
        vdev: String,
        /// Even if the guest does not let go of it.
        #[arg(long)]
        force: bool,
    },
    /// Make a disk of a running guest longer.
    BlockResize {
        /// Name, domid or uuid.
        guest: String,
        /// As xvdb.
        vdev: String,
        /// Bytes, or with K, M, G or T (1024 each).
        size: String,
    },
    /// Put a new qcow2 image on top of a running guest's disk; what it was stays as it is now.
    BlockSnapshot {
        /// Name, domid or uuid.
        guest: String,
        /// As xvdb.
        vdev: String,
        /// The new image; made here.
        image: PathBuf,
    },
    /// Put a running guest's image into its backing file, which is the disk then.
    BlockCommit {
        /// Name, domid or uuid.
        guest: String,
        /// As xvdb.
        vdev: String,
    },
    /// Put a medium into a running guest's cdrom drive.
    #[command(alias = "cd-insert")]
    BlockInsert {
        /// Name, domid or uuid.
        guest: String,
        /// As xvdb.
        vdev: String,
        /// The medium: an image file or device.
        medium: PathBuf,
    },
    /// Take the medium out of a running guest's cdrom drive.
    #[command(alias = "cd-eject")]
    BlockEject {
        /// Name, domid or uuid.
        guest: String,
        /// As xvdb.
        vdev: String,
    },
    /// What a running guest may do with a disk in a second. What is left out has no limit.
    BlockLimit {
        /// Name, domid or uuid.
        guest: String,
        /// As xvdb.
        vdev: String,
        /// Requests.
        #[arg(long)]
        iops: Option<u64>,
        /// Requests at once after a rest; a tenth of a second's if left out.
        #[arg(long)]
        iops_burst: Option<u64>,
        /// Bytes, or with K, M, G or T.
        #[arg(long)]
        bandwidth: Option<String>,
        /// Bytes at once after a rest; a tenth of a second's if left out.
        #[arg(long)]
        bandwidth_burst: Option<String>,
    },
    /// Network devices of a guest.
    NetworkList {
        /// Name, domid or uuid.
        guest: String,
    },
    /// Give a running guest a network device.
    NetworkAttach {
        /// Name, domid or uuid.
        guest: String,
        /// Its number; the lowest that is free if missing.
        vif: Option<u32>,
        #[command(flatten)]
        wanted: network::Wanted,
    },
    /// Take a network device from a running guest.
    NetworkDetach {
        /// Name, domid or uuid.
        guest: String,
        /// Its number.
        vif: u32,
        /// Even if the guest does not let go of it.
        #[arg(long)]
        force: bool,
    },
    /// Move a network device of a running guest to another netback, also when the old one is gone for good.
    NetworkMove {
        /// Name, domid or uuid.
        guest: String,
        /// Its number.
        vif: u32,
        /// The netback that is to serve it.
        #[arg(long)]
        backend: Name,
    },
    /// Pull the cable of a guest's network device, or plug it in again.
    NetworkLink {
        /// Name, domid or uuid.
        guest: String,
        /// Its number.
        vif: u32,
        /// Up or down.
        #[arg(value_enum)]
        link: network::Link,
    },
    /// Firewall rules of the addresses of a guest's network device, at Qubes' paths: shown, or changed.
    NetworkRules {
        #[command(flatten)]
        wanted: rules::Wanted,
    },
    /// Packets of a guest's network device, to a pcapng file.
    Capture {
        #[command(flatten)]
        wanted: capture::Wanted,
    },
    /// Service domains.
    Services {
        /// With the counters of each (JSON has them anyway).
        #[arg(long, conflicts_with = "brief")]
        statistics: bool,
        /// JSON without counters: no service is asked.
        #[arg(long)]
        brief: bool,
    },
    /// Read the host file again and follow it.
    Reload,
    /// Restart a service (its guests only see a pause), or make one that was refused.
    Restart {
        /// Its name, as bh services shows it.
        service: String,
        /// Seconds to wait for it.
        #[arg(long, default_value_t = 10)]
        timeout: u32,
    },
    /// The store: its tree, watches, quotas.
    Store {
        #[command(subcommand)]
        command: store::StoreCommand,
    },
    /// The host.
    Info,
    /// What happened.
    Events {
        /// Go on with what happens.
        #[arg(short, long)]
        follow: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Wait {
    /// Wait until it happened.
    #[arg(long)]
    wait: bool,
    /// Seconds to wait.
    #[arg(long, default_value_t = 60)]
    timeout: u32,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("bh: {e}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(commands::run(args));
    // A blocked read of standard input must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Someone closed our output (`bh events | head`): that is no error.
        Err(Failure::Output(e)) if e.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bh: {failure}");
            ExitCode::from(failure.code())
        }
    }
}

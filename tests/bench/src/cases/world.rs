//! The whole system with one process guest (`bench-guest`) that has a disk and a NIC.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_tests::system::{Config, NETBACK, System};

use super::Settings;
use crate::wire::Remote;

/// Bytes of the guest's disk.
pub const DISK: u64 = 256 << 20;
/// The guest's name.
pub const GUEST: &str = "bench";
/// The guest's address; the outside has [`bulkhead_tests::outside::ADDRESS`].
pub const GUEST_ADDRESS: &str = "10.77.0.2";

/// The running system.
#[derive(Debug)]
pub struct World {
    /// hv-core and all under it.
    pub system: System,
    /// The guest's bench commands.
    pub guest: Remote,
    /// Another guest with a NIC alone, once somebody needed it.
    pub other: Option<Remote>,
    /// Image of the guest's disk.
    pub disk: PathBuf,
    // Ours, so that it is there before the system and goes after it.
    _dir: tempfile::TempDir,
}

impl World {
    /// Starts it and waits until the guest answers.
    ///
    /// # Errors
    /// In words, with the last lines of the logs.
    pub fn start(settings: &Settings) -> Result<World> {
        let dir = tempfile::Builder::new().prefix("bh-bench-").tempdir()?;
        let disk = dir.path().join("disk.img");
        fill(&disk)?;
        // Two guests with 16 queues each, and what else there is.
        let more = "args = [\"--queues\", \"16\"]\n\
                    limits = { channels = 256, buffers = 256, buffer_memory = 1024, pids = 512 }\n";
        let config = Config {
            bin_dir: settings.bin_dir.clone(),
            host_file_more: more.into(),
            ..Config::of_this_build()?
        };
        let system = System::start(config)?;
        let domain_file = format!(
            r#"name = "{GUEST}"
type = "process"
program = "{program}"

[[disk]]
vdev = "xvda"
path = "{disk}"

[[vif]]
backend = "{NETBACK}"

# For packets without a TCP.
[[vif]]
backend = "{NETBACK}"
"#,
            program = settings.bin_dir.join("bench-guest").display(),
            disk = disk.display(),
        );
        let guest = system
            .create(&domain_file)
            .and_then(|()| domid(&system, GUEST))
            .and_then(|domid| Remote::connect(&super::pair::control_socket(system.dir(), domid), UP))
            .inspect_err(|_| crate::cases::show_log(&system))?;
        Ok(World { system, guest, other: None, disk, _dir: dir })
    }
}

impl World {
    /// Another guest, with a NIC alone.
    ///
    /// # Errors
    /// In words, with the last lines of the logs.
    pub fn second_guest(system: &System, settings: &Settings) -> Result<Remote> {
        const NAME: &str = "bench2";
        let program = settings.bin_dir.join("bench-guest");
        let file = format!(
            "name = \"{NAME}\"\ntype = \"process\"\nprogram = \"{}\"\n[[vif]]\nbackend = \"{NETBACK}\"\n",
            program.display()
        );
        system
            .create(&file)
            .and_then(|()| domid(system, NAME))
            .and_then(|domid| Remote::connect(&super::pair::control_socket(system.dir(), domid), UP))
            .inspect_err(|_| crate::cases::show_log(system))
    }

    /// Host process id of the guest.
    ///
    /// # Errors
    /// It has none.
    pub fn guest_pid(&self) -> Result<i32> {
        let pid = listed(&self.system, GUEST)?["host_pid"].as_i64().and_then(|p| i32::try_from(p).ok());
        pid.filter(|&pid| pid > 0).context("the guest has no process")
    }
}

/// How long the guest may take to be there.
const UP: Duration = Duration::from_secs(20);

/// What `bh list --json` says of a guest.
pub(crate) fn listed(system: &System, name: &str) -> Result<serde_json::Value> {
    let list = system.bh_json(&["list"])?;
    let guests = list["guests"].as_array().or(list.as_array()).context("bh list --json: no list")?;
    guests.iter().find(|g| g["name"] == name).cloned().with_context(|| format!("{name} is not in the list"))
}

fn domid(system: &System, name: &str) -> Result<u16> {
    let domid = listed(system, name)?["domid"].as_u64().context("the guest has no domid")?;
    Ok(u16::try_from(domid)?)
}

/// Written in full, so that no request meets a hole.
fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    let chunk: Vec<u8> = (0..1u32 << 18).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for _ in 0..DISK / chunk.len() as u64 {
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    Ok(())
}

//! One turn of a pattern on a block device of a Linux guest: `bench-disk /dev/xvda '{"writes":0,…}'` prints what it gave. Put into
//! the guest's RAM disk by `cargo xtask bench block`.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};
use bench::disk::{Pattern, Places, run};
use bench::peers::uring::Disk;
use nix::libc;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, device, pattern] = &args[..] else { anyhow::bail!("bench-disk DEVICE PATTERN") };
    let pattern: Pattern = serde_json::from_str(pattern).context("the pattern")?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .with_context(|| device.clone())?;
    let mut disk = Disk::new(&file, pattern.depth, pattern.bytes)?;
    let sample = run(&mut disk, &pattern, &mut Places::default())?;
    println!("{}", serde_json::to_string(&sample)?);
    Ok(())
}
